//! A network in memory: frames between the nodes of one process, with faults that can be changed at any time.
//!
//! Without faults a frame is delivered at once, by one task per receiving node, which belongs to the scope in which
//! the node was attached: aborting that scope ends the delivery too.
//!
//! Invariants:
//! * frames of one lane of one link, from one node to another, are never reordered, whatever its delays; snapshots have
//!   a lane of their own, as over gRPC;
//! * only a frame that stands alone (`stands_alone`) strays: comes late, or a second time. gRPC never does that. It is
//!   what senders do that ask again after a lost connection, while what they sent before is still on its way; a client's
//!   request only comes late, as its sender judges an answer by what it knows to have sent;
//! * a frame is lost when its link is cut at the moment it is sent or at the moment it would arrive; a cut is silent, as
//!   in a real network, while a removed node is [`SendError::NotConnected`], and [`MemoryNetwork::disconnect`] tells
//!   the sender;
//! * the same seed and the same order of calls give the same fate to every frame.

use super::{Frame, Inbox, Kind, Lost, SendError, Transport};
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
    /// Probability in `[0, 1]` that a frame that stands alone comes a second time.
    pub duplicate: f64,
    /// Probability in `[0, 1]` that a frame that stands alone is overtaken by those behind it.
    pub reorder: f64,
    /// How much later than in order the second or overtaken one comes at most.
    pub stray_max: Duration,
}

impl Shape {
    /// A link that takes this long, always.
    #[must_use]
    pub fn delay(delay: Duration) -> Self {
        Self { delay_min: delay, delay_max: delay, ..Self::default() }
    }

    /// A link that loses this share of frames.
    #[must_use]
    pub fn loss(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }
}

/// Whether a frame means the same whenever and however often it arrives: answers, of which an endpoint takes the first,
/// and questions whose senders repeat them or whose receivers keep no order. Not appends, which have an order in their
/// session and must keep it between sessions and heartbeats, and not news, of which the last to come counts.
const fn stands_alone(frame: &Frame) -> bool {
    match frame.kind {
        _ if frame.reply => true,
        Kind::Ping | Kind::Sleep | Kind::RaftVote | Kind::RaftPreVote | Kind::RaftSnapshot | Kind::Confirm => true,
        Kind::ReadIndex | Kind::Kv | Kind::Driver | Kind::Ask | Kind::Cut | Kind::Merge | Kind::Survey => true,
        Kind::RaftAppend | Kind::RaftTransfer | Kind::MapPush | Kind::Leader | Kind::Load => false,
    }
}

/// Whether a frame that stands alone may also come a second time. Not a client's request: "not applied" in its answer says
/// that it has been consumed, which a second one would belie.
const fn may_repeat(frame: &Frame) -> bool {
    stands_alone(frame) && (frame.reply || !matches!(frame.kind, Kind::Kv))
}

type Link = (NodeId, NodeId);

#[derive(Default)]
struct Faults {
    cut: BTreeSet<Link>,
    clogged: BTreeSet<Link>,
    /// Until when a link that was disconnected refuses frames.
    away: BTreeMap<Link, Instant>,
    shapes: BTreeMap<Link, Shape>,
    every: Shape,
}

struct Shared {
    faults: RwLock<Faults>,
    receivers: RwLock<BTreeMap<NodeId, Arc<Receiver>>>,
    /// Who wants to hear of lost connections.
    lost: RwLock<BTreeMap<NodeId, Arc<Lost>>>,
    rng: Mutex<StdRng>,
}

#[derive(Default)]
struct Receiver {
    queue: Mutex<Queue>,
    arrived: Notify,
}

/// By time of arrival, then by order sent.
type Frames = BTreeMap<(Instant, u64), (NodeId, Frame)>;

#[derive(Default)]
struct Queue {
    frames: Frames,
    /// Those that have arrived at the end of a clogged link.
    clogged: Frames,
    sent: u64,
    /// When the latest frame of each sender and lane arrives: none overtakes it.
    latest: BTreeMap<(NodeId, bool), Instant>,
    closed: bool,
}

/// What becomes of a frame: how long it takes, whether it leaves its line, and how long its copy takes if there is one.
#[derive(Default)]
struct Fate {
    delay: Duration,
    strays: bool,
    copy: Option<Duration>,
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
            lost: RwLock::default(),
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

    /// Holds every frame from `from` to `to` back, until unclogged. A real connection would be given up after
    /// [some seconds](super::grpc::KEEPALIVE_TIMEOUT).
    pub fn clog(&self, from: NodeId, to: NodeId) {
        self.0.faults.write().clogged.insert((from, to));
    }

    /// Delivers what a clogged link held back, in order.
    pub fn unclog(&self, from: NodeId, to: NodeId) {
        if !self.0.faults.write().clogged.remove(&(from, to)) {
            return;
        }
        if let Some(receiver) = self.receiver(to) {
            receiver.release(|sender| sender == from);
        }
    }

    /// Breaks the connection from `from` to `to`: what is on its way is lost, the sender is told, and what it sends is
    /// refused for `away`. What comes the other way goes on.
    pub fn disconnect(&self, from: NodeId, to: NodeId, away: Duration) {
        self.0.faults.write().away.insert((from, to), Instant::now() + away);
        let unsent = self.receiver(to).map(|receiver| receiver.forget(from)).unwrap_or_default();
        let lost = self.0.lost.read().get(&from).cloned();
        if let Some(lost) = lost {
            lost(to, |_every_kind| true, &unsent);
        }
    }

    fn receiver(&self, node: NodeId) -> Option<Arc<Receiver>> {
        self.0.receivers.read().get(&node).cloned()
    }

    /// Undoes every cut, clog and shape.
    pub fn heal_all(&self) {
        *self.0.faults.write() = Faults::default();
        for receiver in self.0.receivers.read().values() {
            receiver.release(|_| true);
        }
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

    fn is_clogged(&self, link: Link) -> bool {
        self.faults.read().clogged.contains(&link)
    }

    fn is_away(&self, link: Link) -> bool {
        self.faults.read().away.get(&link).is_some_and(|until| Instant::now() < *until)
    }

    /// What becomes of the next frame of the link; `None` if it is lost.
    fn fate(&self, link: Link, stands_alone: bool, may_repeat: bool) -> Option<Fate> {
        let shape = {
            let faults = self.faults.read();
            if faults.cut.contains(&link) {
                return None;
            }
            faults.shapes.get(&link).copied().unwrap_or(faults.every)
        };
        if shape == Shape::default() {
            return Some(Fate::default());
        }
        let mut rng = self.rng.lock();
        if rng.random_bool(shape.loss.clamp(0.0, 1.0)) {
            return None;
        }
        let spread = shape.delay_max.saturating_sub(shape.delay_min);
        let delay = shape.delay_min + spread.mul_f64(rng.random::<f64>());
        let mut fate = Fate { delay, ..Fate::default() };
        if stands_alone {
            let mut late = |share: f64| {
                rng.random_bool(share.clamp(0.0, 1.0)).then(|| delay + shape.stray_max.mul_f64(rng.random::<f64>()))
            };
            fate.copy = late(shape.duplicate).filter(|_| may_repeat);
            if let Some(late) = late(shape.reorder) {
                (fate.delay, fate.strays) = (late, true);
            }
        }
        Some(fate)
    }
}

impl Receiver {
    fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        queue.frames.clear();
        queue.clogged.clear();
        drop(queue);
        self.arrived.notify_one();
    }

    /// Puts clogged frames back where they stood.
    fn release(&self, of: impl Fn(NodeId) -> bool) {
        let mut queue = self.queue.lock();
        let (mut released, kept) = std::mem::take(&mut queue.clogged).into_iter().partition(|(_, (from, _))| of(*from));
        queue.clogged = kept;
        queue.frames.append(&mut released);
        drop(queue);
        self.arrived.notify_one();
    }

    /// Drops the frames of a sender. Returns the calls that were held back: they had not left.
    fn forget(&self, sender: NodeId) -> Vec<u64> {
        let mut queue = self.queue.lock();
        queue.frames.retain(|_, (from, _)| *from != sender);
        let calls = queue.clogged.values().filter(|(from, frame)| *from == sender && !frame.reply && frame.call != 0);
        let unsent = calls.map(|(_, frame)| frame.call).collect();
        queue.clogged.retain(|_, (from, _)| *from != sender);
        unsent
    }
}

impl Queue {
    /// Adds a frame; one that strays may be overtaken.
    fn add(&mut self, from: NodeId, frame: Frame, delay: Duration, strays: bool) {
        let mut at = Instant::now() + delay;
        if !strays {
            let latest = self.latest.entry((from, frame.kind.is_bulk())).or_insert(at);
            at = at.max(*latest);
            *latest = at;
        }
        self.sent += 1;
        self.frames.insert((at, self.sent), (from, frame));
    }

    fn first(&self) -> Option<(Instant, u64)> {
        self.frames.first_key_value().map(|(place, _)| *place)
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
        let link = (self.node, to);
        if self.shared.is_away(link) {
            return Err(SendError::NotConnected);
        }
        let Some(fate) = self.shared.fate(link, stands_alone(&frame), may_repeat(&frame)) else { return Ok(()) };
        let mut queue = receiver.queue.lock();
        if queue.closed {
            return Err(SendError::NotConnected);
        }
        if queue.frames.len() + queue.clogged.len() >= QUEUE_FRAMES {
            return Err(SendError::QueueFull);
        }
        let first = queue.first();
        if let Some(delay) = fate.copy {
            queue.add(self.node, frame.clone(), delay, true);
        }
        queue.add(self.node, frame, fate.delay, fate.strays);
        let changed = queue.first() != first;
        drop(queue);
        if changed {
            receiver.arrived.notify_one();
        }
        Ok(())
    }

    fn set_addresses(&self, _addresses: &[(NodeId, String)]) {} // Nodes are found by id.

    fn on_lost(&self, lost: Lost) {
        self.shared.lost.write().insert(self.node, Arc::new(lost));
    }
}

enum Next {
    Due(NodeId, Frame),
    At(Instant),
    Nothing,
    Closed,
}

fn next(receiver: &Receiver, node: NodeId, shared: &Shared) -> Next {
    let mut queue = receiver.queue.lock();
    if queue.closed {
        return Next::Closed;
    }
    let now = Instant::now();
    loop {
        let (place, (from, frame)) = match queue.frames.first_entry() {
            None => return Next::Nothing,
            Some(first) if first.key().0 > now => return Next::At(first.key().0),
            Some(first) => first.remove_entry(),
        };
        if !shared.is_clogged((from, node)) {
            return Next::Due(from, frame);
        }
        queue.clogged.insert(place, (from, frame));
    }
}

async fn deliver(node: NodeId, receiver: Arc<Receiver>, inbox: Arc<dyn Inbox>, shared: Arc<Shared>) {
    let mut delivered = 0;
    loop {
        match next(&receiver, node, &shared) {
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
mod tests;
