//! Calls with deadlines over a [`Transport`], and the dispatch of incoming frames to services.
//!
//! Invariants:
//! * a frame leaves when [`Endpoint::call`] or [`Endpoint::cast`] is called, not when the future is first polled: the
//!   order of calls is the order of frames;
//! * a call is forgotten when it is answered, when its deadline passes, when its future is dropped and when the
//!   connection that it left by has ended: nobody waits for the answer of a node that is known to be away;
//! * an answer is taken only from the node and for the kind that were asked. Call ids begin at a random number, so
//!   that an answer meant for an earlier life of this node matches nothing.

use super::{Frame, Inbox, Kind, SendError, Transport};
use crate::{env, key::NodeId};
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// Calls of one node that may wait for an answer at the same time.
pub const CALLS_MAX: usize = 1 << 16;

/// No call waits longer, whatever its deadline.
pub const CALL_DEADLINE_MAX: Duration = Duration::from_secs(600);

/// Why a call has no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CallError {
    /// The node is not connected. The call did not leave.
    #[error("not connected")]
    NotConnected,
    /// The queue to the node is full, or too many calls are waiting. The call did not leave.
    #[error("queue full")]
    QueueFull,
    /// No answer came in time. The other node may have acted on the call.
    #[error("no answer in time")]
    Timeout,
    /// The connection ended before an answer came. The other node may have acted on the call.
    #[error("connection lost")]
    Lost,
    /// This endpoint was closed. The other node may have acted on the call.
    #[error("stopped")]
    Stopped,
}

impl CallError {
    /// Whether the other node may have acted on the call.
    #[must_use]
    pub const fn may_have_arrived(self) -> bool {
        matches!(self, Self::Timeout | Self::Lost | Self::Stopped)
    }
}

impl From<SendError> for CallError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::NotConnected => Self::NotConnected,
            SendError::QueueFull => Self::QueueFull,
        }
    }
}

/// Handles the frames of one kind.
pub trait Service: Send + Sync + 'static {
    /// Takes one call or cast, in the order sent by `from`. Must not block; may spawn. A cast's `reply` goes nowhere.
    fn handle(&self, from: NodeId, body: Bytes, reply: Reply);
}

/// Where the answer to a call goes. Dropping it answers nothing: the caller waits until its deadline.
pub struct Reply {
    wires: Arc<Wires>,
    to: NodeId,
    kind: Kind,
    call: u64,
}

impl Reply {
    /// Answers. Lost if the caller cannot be reached now; its deadline covers that.
    pub fn send(self, body: Bytes) {
        if self.call == 0 {
            return;
        }
        if self.to == self.wires.me {
            self.wires.complete(self.to, self.kind, self.call, body);
            return;
        }
        let frame = Frame { kind: self.kind, call: self.call, reply: true, body };
        if let Err(error) = self.wires.transport.send(self.to, frame) {
            tracing::debug!(to = %self.to, kind = ?self.kind, %error, "answer lost");
        }
    }

    /// Whether anybody waits for an answer: false for a cast.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.call != 0
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reply(to {}, {:?}, call {})", self.to, self.kind, self.call)
    }
}

/// What calls and answers share with the endpoint.
struct Wires {
    me: NodeId,
    transport: Arc<dyn Transport>,
    calls: Mutex<Calls>,
}

struct Calls {
    next: u64,
    closed: bool,
    waiting: BTreeMap<u64, Waiting>,
}

type Answer = oneshot::Receiver<Result<Bytes, CallError>>;

struct Waiting {
    to: NodeId,
    kind: Kind,
    answer: oneshot::Sender<Result<Bytes, CallError>>,
}

impl Wires {
    /// Ends the call that this answers, if it still waits.
    fn complete(&self, from: NodeId, kind: Kind, call: u64, body: Bytes) {
        let mut calls = self.calls.lock();
        if !calls.waiting.get(&call).is_some_and(|waiting| waiting.to == from && waiting.kind == kind) {
            return; // Too late, or never asked.
        }
        let waiting = calls.waiting.remove(&call);
        drop(calls);
        if let Some(waiting) = waiting {
            // The future may have been dropped at this very moment; then nobody misses the answer.
            let _ = waiting.answer.send(Ok(body));
        }
    }
}

impl Wires {
    /// Ends the calls to a node that left by a connection which has ended.
    fn lose(&self, to: NodeId, carried: fn(Kind) -> bool, unsent: &[u64]) {
        let lost: BTreeMap<u64, Waiting> = {
            let mut calls = self.calls.lock();
            let waiting = std::mem::take(&mut calls.waiting).into_iter();
            let (lost, kept) = waiting.partition(|(_, waiting)| waiting.to == to && carried(waiting.kind));
            calls.waiting = kept;
            lost
        };
        let unsent: BTreeSet<u64> = unsent.iter().copied().collect();
        for (call, waiting) in lost {
            let error = if unsent.contains(&call) { CallError::NotConnected } else { CallError::Lost };
            // As with answers, the future may have been dropped.
            let _ = waiting.answer.send(Err(error));
        }
    }
}

/// Forgets its call when dropped.
struct Open {
    wires: Arc<Wires>,
    call: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.wires.calls.lock().waiting.remove(&self.call);
    }
}

/// One node's end of the transport.
pub struct Endpoint {
    /// In which services handle frames: what they spawn ends with the node, whoever delivers the frames.
    scope: Option<Arc<env::Scope>>,
    wires: Arc<Wires>,
    services: RwLock<BTreeMap<Kind, Arc<dyn Service>>>,
    contacts: Mutex<BTreeMap<NodeId, Instant>>,
}

impl Endpoint {
    /// The endpoint of node `me`. Belongs to the scope of the caller, whose randomness it uses.
    #[must_use]
    pub fn new(me: NodeId, transport: Arc<dyn Transport>) -> Arc<Self> {
        let calls = Calls { next: env::random_u64(), closed: false, waiting: BTreeMap::new() };
        let wires = Arc::new(Wires { me, transport, calls: Mutex::new(calls) });
        let weak = Arc::downgrade(&wires);
        wires.transport.on_lost(Box::new(move |to, carried, unsent| {
            if let Some(wires) = weak.upgrade() {
                wires.lose(to, carried, unsent);
            }
        }));
        Arc::new(Self { scope: env::scope(), wires, services: RwLock::default(), contacts: Mutex::default() })
    }

    /// This node.
    #[must_use]
    pub fn me(&self) -> NodeId {
        self.wires.me
    }

    /// What moves the frames.
    #[must_use]
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.wires.transport
    }

    /// Hands frames of `kind` to `service` from now on. Frames of a kind without a service are dropped.
    pub fn register(&self, kind: Kind, service: Arc<dyn Service>) {
        self.services.write().insert(kind, service);
    }

    /// Sends `body` to node `to` and waits for its answer, for `deadline` at most.
    ///
    /// A call to this node itself runs the service before this function returns: hold no lock that the service needs.
    ///
    /// # Errors
    /// See [`CallError`]; the answer to a call that timed out is dropped when it comes.
    pub fn call(
        &self,
        to: NodeId,
        kind: Kind,
        body: Bytes,
        deadline: Duration,
    ) -> impl Future<Output = Result<Bytes, CallError>> + Send + use<> {
        let until = Instant::now() + deadline.min(CALL_DEADLINE_MAX);
        let opened = self.open(to, kind, body);
        async move {
            let (_forget_when_done, answer) = opened?;
            match timeout_at(until, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_closed)) => Err(CallError::Stopped),
                Err(_elapsed) => Err(CallError::Timeout),
            }
        }
    }

    fn open(&self, to: NodeId, kind: Kind, body: Bytes) -> Result<(Open, Answer), CallError> {
        let (answer, receiver) = oneshot::channel();
        let call = {
            let mut calls = self.wires.calls.lock();
            if calls.closed {
                return Err(CallError::NotConnected);
            }
            if calls.waiting.len() >= CALLS_MAX {
                return Err(CallError::QueueFull);
            }
            calls.next = calls.next.wrapping_add(1).max(1);
            let call = calls.next;
            calls.waiting.insert(call, Waiting { to, kind, answer });
            call
        };
        let open = Open { wires: Arc::clone(&self.wires), call };
        if to == self.me() {
            self.dispatch(to, kind, call, body);
        } else {
            self.wires.transport.send(to, Frame { kind, call, reply: false, body })?;
        }
        Ok((open, receiver))
    }

    /// Sends `body` to node `to`, wanting no answer.
    ///
    /// # Errors
    /// When the frame was dropped at once. `Ok` promises nothing.
    pub fn cast(&self, to: NodeId, kind: Kind, body: Bytes) -> Result<(), SendError> {
        if to == self.me() {
            self.dispatch(to, kind, 0, body);
            return Ok(());
        }
        self.wires.transport.send(to, Frame { kind, call: 0, reply: false, body })
    }

    /// Time since the last frame from `node`; `None` if there was none yet.
    #[must_use]
    pub fn last_contact(&self, node: NodeId) -> Option<Duration> {
        self.contacts.lock().get(&node).map(Instant::elapsed)
    }

    /// Time since the last frame, for every node that ever sent one.
    #[must_use]
    pub fn contacts(&self) -> BTreeMap<NodeId, Duration> {
        self.contacts.lock().iter().map(|(node, at)| (*node, at.elapsed())).collect()
    }

    /// Calls that wait for an answer.
    #[must_use]
    pub fn calls_waiting(&self) -> usize {
        self.wires.calls.lock().waiting.len()
    }

    /// Lets go of all services and ends all calls, which breaks the cycles between an endpoint and its services.
    pub fn close(&self) {
        let services = std::mem::take(&mut *self.services.write());
        let waiting = {
            let mut calls = self.wires.calls.lock();
            calls.closed = true;
            std::mem::take(&mut calls.waiting)
        };
        drop((services, waiting));
    }

    fn dispatch(&self, from: NodeId, kind: Kind, call: u64, body: Bytes) {
        let Some(service) = self.services.read().get(&kind).cloned() else {
            tracing::debug!(%from, ?kind, "frame of a kind that nothing handles");
            return;
        };
        let reply = Reply { wires: Arc::clone(&self.wires), to: from, kind, call };
        match &self.scope {
            Some(scope) => scope.enter(|| service.handle(from, body, reply)),
            None => service.handle(from, body, reply),
        }
    }
}

impl Inbox for Endpoint {
    fn deliver(&self, from: NodeId, frame: Frame) {
        self.contacts.lock().insert(from, Instant::now());
        if frame.reply {
            self.wires.complete(from, frame.kind, frame.call, frame.body);
        } else {
            self.dispatch(from, frame.kind, frame.call, frame.body);
        }
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("me", &self.me()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::memory::MemoryNetwork, *};

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const SOON: Duration = Duration::from_secs(1);

    /// Spawns a task that never ends.
    struct Spawn;
    impl Service for Spawn {
        fn handle(&self, _from: NodeId, _body: Bytes, _reply: Reply) {
            env::spawn(std::future::pending::<()>());
        }
    }

    #[tokio::test]
    async fn what_a_service_spawns_belongs_to_the_endpoints_scope_whoever_delivers() {
        let scope = env::Scope::seeded(1);
        let network = MemoryNetwork::new(1);
        let endpoint = scope.enter(|| Endpoint::new(A, network.port(A)));
        endpoint.register(Kind::Kv, Arc::new(Spawn));
        assert_eq!(scope.live_tasks(), 0);
        endpoint.deliver(B, Frame { kind: Kind::Kv, reply: false, call: 0, body: Bytes::new() });
        assert_eq!(scope.live_tasks(), 1);
    }

    /// Answers with the body, or never when it is empty.
    struct Echo;
    impl Service for Echo {
        fn handle(&self, _from: NodeId, body: Bytes, reply: Reply) {
            if !body.is_empty() {
                reply.send(body);
            }
        }
    }

    /// Keeps what arrives.
    #[derive(Default)]
    struct Keep(Mutex<Vec<Bytes>>);
    impl Service for Keep {
        fn handle(&self, _from: NodeId, body: Bytes, reply: Reply) {
            self.0.lock().push(body.clone());
            reply.send(body);
        }
    }

    fn pair() -> (MemoryNetwork, Arc<Endpoint>, Arc<Endpoint>) {
        let network = MemoryNetwork::new(1);
        let [a, b] = [A, B].map(|node| {
            let endpoint = Endpoint::new(node, network.port(node));
            network.attach(node, endpoint.clone());
            endpoint.register(Kind::Kv, Arc::new(Echo));
            endpoint
        });
        (network, a, b)
    }

    fn number(n: u64) -> Bytes {
        Bytes::copy_from_slice(&n.to_be_bytes())
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_answered_by_the_other_node_and_by_this_one() {
        let (_network, a, _b) = pair();
        for to in [A, B] {
            assert_eq!(a.call(to, Kind::Kv, "x".into(), SOON).await, Ok("x".into()));
        }
        assert_eq!(a.calls_waiting(), 0);
        assert!(a.last_contact(B).is_some() && a.contacts().len() == 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_times_out_or_is_dropped_leaves_nothing_behind() {
        let (_network, a, _b) = pair();
        let start = Instant::now();
        assert_eq!(a.call(B, Kind::Kv, Bytes::new(), SOON).await, Err(CallError::Timeout));
        assert!(start.elapsed() >= SOON && start.elapsed() < 2 * SOON);
        assert_eq!(a.calls_waiting(), 0);
        let dropped = a.call(B, Kind::Kv, Bytes::new(), SOON);
        assert_eq!(a.calls_waiting(), 1);
        drop(dropped);
        assert_eq!(a.calls_waiting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unreachable_node_is_refused_at_once() {
        let (network, a, _b) = pair();
        network.remove(B);
        assert_eq!(a.call(B, Kind::Kv, "x".into(), SOON).await, Err(CallError::NotConnected));
        assert_eq!(a.calls_waiting(), 0);
        assert_eq!(a.cast(B, Kind::Kv, "x".into()), Err(SendError::NotConnected));
    }

    #[tokio::test]
    async fn calls_arrive_in_the_order_made_also_when_polled_in_another() {
        let (_network, a, b) = pair();
        let keep = Arc::new(Keep::default());
        b.register(Kind::RaftAppend, keep.clone());
        let mut calls: Vec<_> = (0..2_000).map(|n| a.call(B, Kind::RaftAppend, number(n), SOON)).collect();
        calls.reverse();
        for (call, n) in calls.into_iter().zip((0..2_000).rev()) {
            assert_eq!(call.await, Ok(number(n)));
        }
        assert_eq!(*keep.0.lock(), (0..2_000).map(number).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_from_another_node_or_for_another_kind_is_ignored() {
        let (_network, a, _b) = pair();
        let call = a.call(B, Kind::Kv, Bytes::new(), SOON);
        let id = *a.wires.calls.lock().waiting.keys().next().unwrap();
        let answer = |kind| Frame { kind, call: id, reply: true, body: "forged".into() };
        a.deliver(NodeId(3), answer(Kind::Kv));
        a.deliver(B, answer(Kind::Driver));
        assert_eq!(a.calls_waiting(), 1);
        a.deliver(B, answer(Kind::Kv));
        assert_eq!(call.await, Ok("forged".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_calls_are_bounded() {
        let (_network, a, _b) = pair();
        let calls: Vec<_> = (0..CALLS_MAX).map(|_| a.call(A, Kind::Kv, Bytes::new(), SOON)).collect();
        assert_eq!(a.call(A, Kind::Kv, "x".into(), SOON).await, Err(CallError::QueueFull));
        drop(calls);
        assert_eq!(a.call(A, Kind::Kv, "x".into(), SOON).await, Ok("x".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn closing_ends_calls_and_lets_services_go() {
        let (_network, a, _b) = pair();
        let keep = Arc::new(Keep::default());
        a.register(Kind::Driver, keep.clone());
        let call = a.call(B, Kind::Kv, Bytes::new(), SOON);
        a.close();
        assert_eq!(call.await, Err(CallError::Stopped));
        assert_eq!(Arc::strong_count(&keep), 1);
    }

    #[test]
    fn call_ids_differ_from_life_to_life() {
        let first = |seed| {
            let network = MemoryNetwork::new(1);
            env::Scope::seeded(seed).enter(|| Endpoint::new(A, network.port(A)).wires.calls.lock().next)
        };
        assert_ne!(first(1), first(2));
        assert_eq!(first(1), first(1));
    }
}
