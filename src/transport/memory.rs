//! A network in memory: frames between the nodes of one process, with faults that can be changed at any time.
//!
//! Without faults a frame is delivered at once, by one task per receiving node, which belongs to the scope in which
//! the node was attached: aborting that scope ends the delivery too.
//!
//! Invariants:
//! * frames of one link, from one node to another, are never reordered, whatever its delays;
//! * a frame is lost when its link is cut at the moment it is sent or at the moment it would arrive; a cut is silent, as
//!   in a real network, while a removed node is [`SendError::NotConnected`];
//! * the same seed and the same order of calls give the same losses and delays.

use super::{Frame, Inbox, SendError, Transport};
use crate::{env, key::NodeId};
use parking_lot::{Mutex, RwLock};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::Notify,
    task::yield_now,
    time::{Instant, sleep_until},
};

/// Frames that may wait for one receiving node.
pub const QUEUE_FRAMES: usize = 1 << 16;

/// Frames delivered before other tasks get a turn.
const DELIVER_FRAMES: usize = 256;

/// What a link does to frames. The default: deliver at once.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Shape {
    /// Shortest time on the way.
    pub delay_min: Duration,
    /// Longest time on the way, drawn evenly; ignored below `delay_min`.
    pub delay_max: Duration,
    /// Probability in `[0, 1]` that a frame is lost.
    pub loss: f64,
}

impl Shape {
    /// A link that takes this long, always.
    #[must_use]
    pub fn delay(delay: Duration) -> Self {
        Self { delay_min: delay, delay_max: delay, loss: 0.0 }
    }

    /// A link that loses this share of frames.
    #[must_use]
    pub fn loss(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }
}

type Link = (NodeId, NodeId);

#[derive(Default)]
struct Faults {
    cut: BTreeSet<Link>,
    shapes: BTreeMap<Link, Shape>,
    every: Shape,
}

struct Shared {
    faults: RwLock<Faults>,
    receivers: RwLock<BTreeMap<NodeId, Arc<Receiver>>>,
    rng: Mutex<StdRng>,
}

#[derive(Default)]
struct Receiver {
    queue: Mutex<Queue>,
    arrived: Notify,
}

#[derive(Default)]
struct Queue {
    /// By time of arrival, then by order sent.
    frames: BTreeMap<(Instant, u64), (NodeId, Frame)>,
    sent: u64,
    /// When the latest frame of each sender arrives: none overtakes it.
    latest: BTreeMap<NodeId, Instant>,
    closed: bool,
}

/// The network. Clones are the same network.
#[derive(Clone)]
pub struct MemoryNetwork(Arc<Shared>);

impl MemoryNetwork {
    /// A network without nodes, whose losses and delays follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Shared {
            faults: RwLock::default(),
            receivers: RwLock::default(),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
        }))
    }

    /// The transport of `node`. It sends nothing while the node is not attached.
    #[must_use]
    pub fn port(&self, node: NodeId) -> Arc<dyn Transport> {
        Arc::new(Port { node, shared: Arc::clone(&self.0) })
    }

    /// Makes `node` reachable; its frames go to `inbox`, by a task of the caller's scope. Replaces an earlier life of
    /// the node, whose waiting frames are lost.
    pub fn attach(&self, node: NodeId, inbox: Arc<dyn Inbox>) {
        let receiver = Arc::new(Receiver::default());
        let before = self.0.receivers.write().insert(node, Arc::clone(&receiver));
        if let Some(before) = before {
            before.close();
        }
        env::spawn(deliver(node, receiver, inbox, Arc::clone(&self.0)));
    }

    /// Takes `node` away: frames that wait for it are lost, later ones refused.
    pub fn remove(&self, node: NodeId) {
        let removed = self.0.receivers.write().remove(&node);
        if let Some(receiver) = removed {
            receiver.close();
        }
    }

    /// Loses every frame from `from` to `to`, until healed.
    pub fn cut(&self, from: NodeId, to: NodeId) {
        self.0.faults.write().cut.insert((from, to));
    }

    /// Undoes [`Self::cut`] for this direction.
    pub fn heal(&self, from: NodeId, to: NodeId) {
        self.0.faults.write().cut.remove(&(from, to));
    }

    /// Undoes every cut and every shape.
    pub fn heal_all(&self) {
        *self.0.faults.write() = Faults::default();
    }

    /// Shapes the link from `from` to `to`.
    pub fn shape(&self, from: NodeId, to: NodeId, shape: Shape) {
        self.0.faults.write().shapes.insert((from, to), shape);
    }

    /// Shapes every link that has no shape of its own.
    pub fn shape_all(&self, shape: Shape) {
        self.0.faults.write().every = shape;
    }
}

impl std::fmt::Debug for MemoryNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.receivers.read().keys()).finish()
    }
}

impl Shared {
    fn is_cut(&self, link: Link) -> bool {
        self.faults.read().cut.contains(&link)
    }

    /// How long the next frame of the link takes; `None` if it is lost.
    fn fate(&self, link: Link) -> Option<Duration> {
        let shape = {
            let faults = self.faults.read();
            if faults.cut.contains(&link) {
                return None;
            }
            faults.shapes.get(&link).copied().unwrap_or(faults.every)
        };
        if shape == Shape::default() {
            return Some(Duration::ZERO);
        }
        let mut rng = self.rng.lock();
        if rng.random_bool(shape.loss.clamp(0.0, 1.0)) {
            return None;
        }
        let spread = shape.delay_max.saturating_sub(shape.delay_min);
        Some(shape.delay_min + spread.mul_f64(rng.random::<f64>()))
    }
}

impl Receiver {
    fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        queue.frames.clear();
        drop(queue);
        self.arrived.notify_one();
    }
}

/// One node's way into the network.
struct Port {
    node: NodeId,
    shared: Arc<Shared>,
}

impl Transport for Port {
    fn send(&self, to: NodeId, frame: Frame) -> Result<(), SendError> {
        let receiver = {
            let receivers = self.shared.receivers.read();
            if !receivers.contains_key(&self.node) {
                return Err(SendError::NotConnected);
            }
            receivers.get(&to).cloned().ok_or(SendError::NotConnected)?
        };
        let Some(delay) = self.shared.fate((self.node, to)) else { return Ok(()) };
        let mut queue = receiver.queue.lock();
        if queue.closed {
            return Err(SendError::NotConnected);
        }
        if queue.frames.len() >= QUEUE_FRAMES {
            return Err(SendError::QueueFull);
        }
        let mut at = Instant::now() + delay;
        let latest = queue.latest.entry(self.node).or_insert(at);
        at = at.max(*latest);
        *latest = at;
        queue.sent += 1;
        let place = (at, queue.sent);
        queue.frames.insert(place, (self.node, frame));
        let is_next = queue.frames.first_key_value().is_some_and(|(first, _)| *first == place);
        drop(queue);
        if is_next {
            receiver.arrived.notify_one();
        }
        Ok(())
    }

    fn set_addresses(&self, _addresses: &[(NodeId, String)]) {} // Nodes are found by id.
}

enum Next {
    Due(NodeId, Frame),
    At(Instant),
    Nothing,
    Closed,
}

fn next(receiver: &Receiver) -> Next {
    let mut queue = receiver.queue.lock();
    if queue.closed {
        return Next::Closed;
    }
    match queue.frames.first_entry() {
        None => Next::Nothing,
        Some(first) if first.key().0 > Instant::now() => Next::At(first.key().0),
        Some(first) => {
            let (from, frame) = first.remove();
            Next::Due(from, frame)
        }
    }
}

async fn deliver(node: NodeId, receiver: Arc<Receiver>, inbox: Arc<dyn Inbox>, shared: Arc<Shared>) {
    let mut delivered = 0;
    loop {
        match next(&receiver) {
            Next::Closed => return,
            Next::Nothing => receiver.arrived.notified().await,
            Next::At(at) => tokio::select! {
                biased;
                () = receiver.arrived.notified() => {}
                () = sleep_until(at) => {}
            },
            Next::Due(from, frame) => {
                if !shared.is_cut((from, node)) {
                    inbox.deliver(from, frame);
                }
                delivered += 1;
                if delivered % DELIVER_FRAMES == 0 {
                    yield_now().await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Kind, *};
    use bytes::Bytes;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);
    const MS: Duration = Duration::from_millis(1);

    /// Keeps what arrives, and when.
    struct Keep(Mutex<Vec<(NodeId, u64, Instant)>>);
    impl Inbox for Keep {
        fn deliver(&self, from: NodeId, frame: Frame) {
            self.0.lock().push((from, frame.call, Instant::now()));
        }
    }
    impl Keep {
        fn numbers(&self, from: NodeId) -> Vec<u64> {
            self.0.lock().iter().filter(|(node, ..)| *node == from).map(|(_, n, _)| *n).collect()
        }
    }

    fn network(seed: u64) -> (MemoryNetwork, [Arc<dyn Transport>; 3], [Arc<Keep>; 3]) {
        let network = MemoryNetwork::new(seed);
        let keeps = [A, B, C].map(|node| {
            let keep = Arc::new(Keep(Mutex::default()));
            network.attach(node, keep.clone());
            keep
        });
        let ports = [A, B, C].map(|node| network.port(node));
        (network, ports, keeps)
    }

    fn frame(n: u64) -> Frame {
        Frame { kind: Kind::Ping, call: n, reply: false, body: Bytes::new() }
    }

    /// Long enough, in virtual time, for every delay used here.
    async fn settle() {
        tokio::time::sleep(1_000 * MS).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_is_one_way_and_ends_when_healed() {
        let (network, [a, b, _], [at_a, at_b, _]) = network(1);
        network.cut(A, B);
        a.send(B, frame(1)).unwrap();
        b.send(A, frame(2)).unwrap();
        settle().await;
        assert_eq!((at_b.numbers(A), at_a.numbers(B)), (vec![], vec![2]));
        network.heal(A, B);
        a.send(B, frame(3)).unwrap();
        settle().await;
        assert_eq!(at_b.numbers(A), [3]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_also_takes_frames_on_the_way() {
        let (network, [a, ..], [_, at_b, _]) = network(1);
        network.shape(A, B, Shape::delay(10 * MS));
        a.send(B, frame(1)).unwrap();
        network.cut(A, B);
        settle().await;
        assert_eq!(at_b.numbers(A), Vec::<u64>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn delay_is_kept_and_slows_no_other_link() {
        let (network, [a, _, c], [_, at_b, _]) = network(1);
        network.shape(A, B, Shape::delay(50 * MS));
        let start = Instant::now();
        a.send(B, frame(1)).unwrap();
        c.send(B, frame(2)).unwrap();
        settle().await;
        let arrived = at_b.0.lock().clone();
        assert_eq!(arrived.iter().map(|(from, n, _)| (*from, *n)).collect::<Vec<_>>(), [(C, 2), (A, 1)]);
        assert_eq!(arrived[1].2 - start, 50 * MS);
        assert_eq!(arrived[0].2, start);
    }

    #[tokio::test(start_paused = true)]
    async fn random_delays_never_reorder_a_link() {
        let (network, [a, ..], [_, at_b, _]) = network(5);
        network.shape_all(Shape { delay_min: MS, delay_max: 90 * MS, loss: 0.0 });
        for n in 0..500 {
            a.send(B, frame(n)).unwrap();
            if n == 250 {
                network.shape_all(Shape::default());
            }
        }
        settle().await;
        assert_eq!(at_b.numbers(A), (0..500).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn losses_follow_from_the_seed() {
        let run = async |seed| {
            let (network, [a, ..], [_, at_b, _]) = network(seed);
            network.shape_all(Shape::loss(0.3));
            for n in 0..1_000 {
                a.send(B, frame(n)).unwrap();
            }
            settle().await;
            at_b.numbers(A)
        };
        let first = run(7).await;
        assert!((600..800).contains(&first.len()), "{}", first.len());
        assert!(first.is_sorted());
        assert_eq!(first, run(7).await);
        assert_ne!(first, run(8).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_removed_node_neither_gets_nor_sends_until_attached_again() {
        let (network, [a, b, _], [at_a, at_b, _]) = network(1);
        network.shape(A, B, Shape::delay(10 * MS));
        a.send(B, frame(1)).unwrap();
        network.remove(B);
        assert_eq!(a.send(B, frame(2)), Err(SendError::NotConnected));
        assert_eq!(b.send(A, frame(3)), Err(SendError::NotConnected));
        let again = Arc::new(Keep(Mutex::default()));
        network.attach(B, again.clone());
        a.send(B, frame(4)).unwrap();
        settle().await;
        assert_eq!((at_a.numbers(B), at_b.numbers(A), again.numbers(A)), (vec![], vec![], vec![4]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_refuses() {
        let (_network, [a, ..], [_, at_b, _]) = network(1);
        for n in 0..QUEUE_FRAMES as u64 {
            a.send(B, frame(n)).unwrap();
        }
        assert_eq!(a.send(B, frame(0)), Err(SendError::QueueFull));
        settle().await;
        assert_eq!(at_b.numbers(A).len(), QUEUE_FRAMES);
        a.send(B, frame(0)).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_crash_of_the_scope_ends_delivery() {
        let network = MemoryNetwork::new(1);
        let scope = env::Scope::seeded(1);
        let keep = Arc::new(Keep(Mutex::default()));
        scope.enter(|| network.attach(B, keep.clone()));
        network.attach(A, Arc::new(Keep(Mutex::default())));
        scope.abort_all();
        network.port(A).send(B, frame(1)).unwrap();
        settle().await;
        assert_eq!(keep.numbers(A), Vec::<u64>::new());
    }
}
