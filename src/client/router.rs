//! Executes any request of the API against the partitions it concerns: the same code in the client library and inside
//! every server. It speaks the messages of the API and knows nothing of how they travel: that is its [`Caller`]'s.
//!
//! Invariants:
//! * every write goes out under a session and a sequence, the caller's or the router's own;
//! * `NOT_LEADER` and `WRONG_PARTITION` never reach the user.

use super::{
    attempt::{ATTEMPT_MIN, Effect, Job, PATIENCE, Patience, REFRESH_MAX, Repeats, Served, is_unavailable},
    query::{self, Serve},
    routing::Routing,
    sessions::Sessions,
};
use crate::{
    error::{Error, Outcome, Reason},
    key::{KeyKind, KeyspaceId, Layout, NodeId, PartitionId},
    placement::Map,
    proto::v1::{self, reply, request},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::RwLock;
use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// A node that did not answer is asked after the others for this long.
const SUSPECT_FOR: Duration = Duration::from_secs(1);
/// Sessions that one write goes through when partitions keep forgetting them.
const SESSIONS_PER_WRITE_MAX: u32 = 3;

/// What a node is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Where it belongs; see [`Caller::call`].
    pub route: Option<v1::Route>,
    /// What to do.
    pub op: &'a request::Op,
}

impl Question<'_> {
    /// As a message of its own that says how long its asker waits.
    #[must_use]
    pub fn to_request(&self, deadline: Instant) -> v1::Request {
        let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis();
        let deadline_ms = u32::try_from(left_ms).unwrap_or(u32::MAX).max(1);
        v1::Request { id: 0, deadline_ms, route: self.route, op: Some(self.op.clone()) }
    }
}

/// Carries requests to nodes.
pub trait Caller: Send + Sync + 'static {
    /// Sends a request to a node and waits for its answer, at most until `deadline`. With a route the node answers from
    /// its own replica; `OpenSession` comes without one and is answered by any node itself.
    ///
    /// An error is `UNREACHABLE`, `DEADLINE_EXCEEDED` or `OVERLOADED`, with the outcome `NotApplied` only if the request
    /// has certainly not been sent. (Errors of the node come inside the reply.)
    fn call(
        &self,
        to: NodeId,
        question: Question<'_>,
        deadline: Instant,
    ) -> impl Future<Output = Result<v1::Reply, Error>> + Send;

    /// What is known of where partitions live.
    fn routing(&self) -> &Routing;

    /// Gets a map newer than `than`. Returns when there is one, or when there is none to be had; the router does not
    /// wait longer than its own bound.
    fn refresh(&self, than: u64) -> impl Future<Output = ()> + Send;

    /// Whether a request is sent again that was refused because a node is overloaded. Inside a server it is not: whoever
    /// asked it is told, and waits.
    fn repeats_overloaded(&self) -> bool {
        true
    }

    /// The nearest node: inside a server, the server's own.
    fn prefer(&self) -> Option<NodeId>;
}

/// Routes requests. Cheap to clone.
pub struct Router<C: Caller> {
    shared: Arc<Shared<C>>,
}

struct Shared<C> {
    caller: C,
    sessions: Sessions,
    repeats: Repeats,
    turn: AtomicUsize,
    suspects: RwLock<BTreeMap<NodeId, Instant>>,
    /// Whether `suspects` holds anything: spares the hot path a lock.
    suspecting: AtomicBool,
}

impl<C: Caller> Clone for Router<C> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<C: Caller> fmt::Debug for Router<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router").finish_non_exhaustive()
    }
}

/// What routing needs to know of a keyspace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space {
    pub(crate) id: KeyspaceId,
    pub(crate) kind: KeyKind,
    pub(crate) layout: Layout,
}

impl<C: Caller> Router<C> {
    /// A router over this caller.
    #[must_use]
    pub fn new(caller: C) -> Self {
        Self {
            shared: Arc::new(Shared {
                caller,
                sessions: Sessions::default(),
                repeats: Repeats::default(),
                turn: AtomicUsize::new(0),
                suspects: RwLock::default(),
                suspecting: AtomicBool::new(false),
            }),
        }
    }

    /// The caller.
    #[must_use]
    pub fn caller(&self) -> &C {
        &self.shared.caller
    }

    pub(crate) fn repeats(&self) -> &Repeats {
        &self.shared.repeats
    }

    /// What is known of where partitions live.
    #[must_use]
    pub fn routing(&self) -> &Routing {
        self.shared.caller.routing()
    }

    /// Executes a request that has no route (a route is ignored), at most until `deadline`.
    ///
    /// # Errors
    /// Of the catalogue; those of writes say what is known of the write.
    pub async fn execute(&self, request: v1::Request, deadline: Instant) -> Result<reply::Result, Error> {
        let Some(mut op) = request.op else { return Err(Error::field("op", "the request names no operation")) };
        self.execute_op(&mut op, deadline).await
    }

    /// Executes what a request asks for; `op` is spent.
    ///
    /// What a plain read or write of one row does not need is boxed, here and in what is called from here, and the
    /// operation stays where it is: the state of a request under way is made, moved and kept for every caller, and would be
    /// several times as large.
    pub(crate) async fn execute_op(&self, op: &mut request::Op, deadline: Instant) -> Result<reply::Result, Error> {
        use request::Op;
        use std::mem::take;
        match op {
            Op::Get(_) => self.get(op, deadline).await.map(reply::Result::Get),
            Op::BatchGet(get) => Box::pin(self.batch_get(take(get), deadline)).await.map(reply::Result::BatchGet),
            Op::Scan(scan) => Box::pin(self.scan(take(scan), deadline)).await.map(reply::Result::Scan),
            Op::Count(count) => Box::pin(self.count(take(count), deadline)).await.map(reply::Result::Count),
            Op::OpenSession(_) => {
                let opened = Box::pin(self.open_session(None, &[], deadline)).await;
                opened.map(|(_, reply)| reply::Result::OpenSession(reply))
            }
            op => self.execute_write(op, deadline).await.map_err(|error| match error.outcome {
                Some(_) => error,
                None => error.outcome(Outcome::NotApplied),
            }),
        }
    }

    async fn execute_write(&self, op: &mut request::Op, deadline: Instant) -> Result<reply::Result, Error> {
        use request::Op;
        use std::mem::take;
        match op {
            Op::Write(batch) => Box::pin(self.batch(take(batch), deadline)).await.map(reply::Result::Batch),
            Op::DeleteRange(delete) => {
                Box::pin(self.delete_range(take(delete), deadline)).await.map(reply::Result::DeleteRange)
            }
            op => {
                let (keyspace, _) = single_of(op).ok_or_else(|| Error::field("op", "not a write"))?;
                let space = self.space(keyspace, deadline).await?;
                self.write_one(space, op, deadline).await.map(reply::Result::Write)
            }
        }
    }

    /// A write to one key.
    pub(crate) async fn write_one(
        &self,
        space: Space,
        op: &mut request::Op,
        deadline: Instant,
    ) -> Result<v1::WriteReply, Error> {
        let (_, key) = single_of(op).ok_or_else(|| Error::field("op", "not a write"))?;
        query::check_key(space.kind, key)?;
        query::check_write(op)?;
        let position = crate::key::position(space.layout, key);
        let place = |map: &Map| Ok(map.locate(space.id, &position).map(|partition| partition.id));
        match self.write(&place, op, None, deadline).await?.result {
            reply::Result::Write(reply) => Ok(reply),
            _ => Err(mismatched()),
        }
    }

    /// Reads one row.
    async fn get(&self, op: &mut request::Op, deadline: Instant) -> Result<v1::GetReply, Error> {
        let request::Op::Get(get) = &*op else { return Err(mismatched()) };
        let space = self.space(&get.keyspace, deadline).await?;
        query::check_key(space.kind, &get.key)?;
        self.get_in(space, op, deadline).await
    }

    pub(crate) async fn get_in(
        &self,
        space: Space,
        op: &mut request::Op,
        deadline: Instant,
    ) -> Result<v1::GetReply, Error> {
        let request::Op::Get(get) = &*op else { return Err(mismatched()) };
        let position = crate::key::position(space.layout, &get.key);
        let place = |map: &Map| Ok(map.locate(space.id, &position).map(|partition| partition.id));
        let confirms = query::confirms_absent(get.options.as_ref());
        let confirms_degraded = get.options.as_ref().is_some_and(|options| options.confirm_absent.unwrap_or(true));
        let served = self.read(&place, op, None, deadline).await?;
        let (partition, node) = (served.partition, served.node);
        let reply::Result::Get(reply) = served.result else { return Err(mismatched()) };
        let leader = reply.read.as_ref().is_some_and(|read| read.role() == v1::Role::Leader);
        if reply.found || leader || !(confirms || confirms_degraded && is_degraded(&reply)) {
            return Ok(reply);
        }
        let request::Op::Get(get) = op else { return Err(mismatched()) };
        Box::pin(self.confirm_absent(&place, std::mem::take(get), reply, (partition, node), deadline)).await
    }

    /// A replica had no such row: asks the leader, or, if there is none, the other members.
    async fn confirm_absent(
        &self,
        place: super::attempt::Place<'_>,
        get: v1::GetRequest,
        absent: v1::GetReply,
        (partition, asked): (PartitionId, NodeId),
        deadline: Instant,
    ) -> Result<v1::GetReply, Error> {
        let strong = request::Op::Get(v1::GetRequest { options: None, ..get.clone() });
        let soon = deadline.min(Instant::now() + PATIENCE);
        let job = Job {
            patience: Patience::Once,
            deadline: soon,
            ..Job::read(place, &strong, None, Serve::LeaderFirst, deadline)
        };
        if let Ok(Served { result: reply::Result::Get(reply), .. }) = self.run(&job).await {
            return Ok(reply);
        }
        let options = v1::ReadOptions {
            consistency: v1::Consistency::Eventual as i32,
            confirm_absent: Some(false),
            ..Default::default()
        };
        let weak = request::Op::Get(v1::GetRequest { options: Some(options), ..get });
        let map = self.routing().map();
        let members = map.partition(partition).map_or_else(Vec::new, |partition| partition.members.clone());
        let soon = deadline.min(Instant::now() + ATTEMPT_MIN);
        let mut answers: FuturesUnordered<_> = members
            .iter()
            .filter(|member| member.node != asked)
            .map(|member| self.ask(partition, member.node, (&weak, None), soon))
            .collect();
        while let Some(answer) = answers.next().await {
            if let Ok(reply::Result::Get(mut reply)) = answer
                && reply.found
            {
                let degraded = is_degraded(&absent);
                reply.read.iter_mut().for_each(|read| read.degraded = degraded);
                return Ok(reply);
            }
        }
        Ok(absent)
    }

    /// A read of one partition, with its fall-back. What the options say of fall-backs is done here and taken out of `op`.
    pub(crate) async fn read(
        &self,
        place: super::attempt::Place<'_>,
        op: &mut request::Op,
        tokens: Option<v1::Tokens>,
        deadline: Instant,
    ) -> Result<Served, Error> {
        let Some(options) = options_mut(op) else { return Err(mismatched()) };
        let serve = query::serve_of(options.as_ref())?;
        let degrades = query::degrades(options.as_ref());
        if let Some(options) = options {
            options.on_unavailable = v1::OnUnavailable::Fail as i32;
            options.confirm_absent = Some(false);
        }
        if degrades {
            return Box::pin(self.read_or_degrade(place, op, tokens, serve, deadline)).await;
        }
        self.run(&Job::read(place, op, tokens, serve, deadline)).await
    }

    async fn read_or_degrade(
        &self,
        place: super::attempt::Place<'_>,
        op: &mut request::Op,
        tokens: Option<v1::Tokens>,
        serve: Serve,
        deadline: Instant,
    ) -> Result<Served, Error> {
        let now = Instant::now();
        let half = now + deadline.saturating_duration_since(now) / 2;
        let job = Job { patience: Patience::Short, ..Job::read(place, op, tokens, serve, half) };
        let error = match self.run(&job).await {
            Err(error) if is_unavailable(error.reason) => error,
            other => return other,
        };
        if let Some(Some(options)) = options_mut(op) {
            options.consistency = v1::Consistency::Eventual as i32;
        }
        let job = Job { patience: Patience::Once, ..Job::read(place, op, tokens, Serve::Anyone, deadline) };
        let mut served = self.run(&job).await.map_err(|_| error)?;
        mark_degraded(&mut served.result);
        Ok(served)
    }

    /// A write to one partition, under its session or the router's own.
    pub(crate) async fn write(
        &self,
        place: super::attempt::Place<'_>,
        op: &mut request::Op,
        tokens: Option<v1::Tokens>,
        deadline: Instant,
    ) -> Result<Served, Error> {
        let own = session_mut(op).is_some_and(|session| session.as_ref().is_none_or(|s| s.client_id.is_empty()));
        if !own {
            let job = Job { effect: Effect::WriteForCaller, ..Job::write(place, op, tokens, deadline) };
            return self.run(&job).await;
        }
        let mut ahead = Vec::new();
        let mut leader = None;
        let mut sessions = 0;
        loop {
            sessions += 1;
            let ticket = self.shared.sessions.begin(|| Box::pin(self.open_session(leader, &ahead, deadline))).await?;
            if let Some(session) = session_mut(op) {
                *session = Some(ticket.to_pb());
            }
            match self.run(&Job::write(place, op, tokens, deadline)).await {
                Err(error)
                    if matches!(error.reason, Reason::SessionExpired | Reason::SessionAhead)
                        && error.outcome == Some(Outcome::NotApplied) =>
                {
                    self.shared.sessions.leave(&ticket);
                    if sessions == SESSIONS_PER_WRITE_MAX {
                        return Err(error);
                    }
                    if error.reason == Reason::SessionAhead {
                        ahead.push(ticket.opened_by());
                        // The partition's time is its leader's.
                        let partition = place(&self.routing().look()).ok().flatten();
                        leader = partition.and_then(|id| self.routing().leader(id)).map(|leader| leader.node);
                    }
                }
                other => return other,
            }
        }
    }

    /// Opens a session, by `first` or the nearest node if they answer, and by one of `ahead` only if no other does: their
    /// clocks are. Says which node did.
    async fn open_session(
        &self,
        first: Option<NodeId>,
        ahead: &[NodeId],
        deadline: Instant,
    ) -> Result<(NodeId, v1::OpenSessionReply), Error> {
        let nodes: Vec<NodeId> = self.routing().look().nodes().keys().copied().collect();
        let start = self.rotate();
        let near = first.or_else(|| self.caller().prefer());
        let others = (0..nodes.len()).map(|i| nodes[(start + i) % nodes.len()]);
        let mut order: Vec<NodeId> = near.into_iter().chain(others.filter(|node| Some(*node) != near)).collect();
        order.sort_by_key(|node| (ahead.contains(node), self.is_suspect(*node)));
        let mut last = match order.is_empty() {
            true => Error::new(Reason::NotInitialized, "no node is known yet"),
            false => Error::new(Reason::DeadlineExceeded, "the deadline passed before the write had a session"),
        };
        for node in order {
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                break;
            }
            let soon = (now + (left / 4).max(ATTEMPT_MIN)).min(deadline);
            let op = request::Op::OpenSession(v1::OpenSessionRequest {});
            match self.caller().call(node, Question { route: None, op: &op }, soon).await.map(|reply| reply.result) {
                Ok(Some(reply::Result::OpenSession(reply))) => return Ok((node, reply)),
                Ok(Some(reply::Result::Error(error))) => last = error.into(),
                Ok(_) => last = mismatched(),
                Err(error) => {
                    self.suspect(node);
                    last = error;
                }
            }
        }
        Err(last.outcome(Outcome::NotApplied))
    }

    /// The keyspace of this name, looked for in a newer map if this one has none.
    pub(crate) async fn space(&self, name: &str, deadline: Instant) -> Result<Space, Error> {
        let name = query::keyspace_name(name);
        match self.find_space(name) {
            (Some(space), _) => Ok(space),
            (None, version) => Box::pin(self.space_of_newer(name, version, deadline)).await,
        }
    }

    async fn space_of_newer(&self, name: &str, version: u64, deadline: Instant) -> Result<Space, Error> {
        self.refresh_until(version, deadline.min(Instant::now() + REFRESH_MAX)).await;
        let (found, version) = self.find_space(name);
        found.ok_or_else(|| {
            if version == 0 {
                return Error::new(Reason::NotInitialized, "the cluster has not been formed yet: run `meridian init`");
            }
            Error::new(Reason::KeyspaceUnknown, format!("there is no keyspace \"{name}\"")).in_field("keyspace")
        })
    }

    fn find_space(&self, name: &str) -> (Option<Space>, u64) {
        let map = self.routing().look();
        let found = map.keyspace_by_name(name).filter(|keyspace| !keyspace.is_internal());
        let space = found.map(|keyspace| Space { id: keyspace.id, kind: keyspace.kind, layout: keyspace.layout });
        (space, map.version())
    }

    /// A number that differs from call to call, to spread load over replicas.
    pub(crate) fn rotate(&self) -> usize {
        self.shared.turn.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn suspect(&self, node: NodeId) {
        self.shared.suspects.write().insert(node, Instant::now() + SUSPECT_FOR);
        self.shared.suspecting.store(true, Ordering::Relaxed);
    }

    pub(crate) fn trust(&self, node: NodeId) {
        if self.has_suspects() {
            let mut suspects = self.shared.suspects.write();
            suspects.remove(&node);
            self.shared.suspecting.store(!suspects.is_empty(), Ordering::Relaxed);
        }
    }

    pub(crate) fn has_suspects(&self) -> bool {
        self.shared.suspecting.load(Ordering::Relaxed)
    }

    pub(crate) fn is_suspect(&self, node: NodeId) -> bool {
        self.shared.suspects.read().get(&node).is_some_and(|until| Instant::now() < *until)
    }
}

impl<'a> Job<'a> {
    pub(crate) fn read(
        place: super::attempt::Place<'a>,
        op: &'a request::Op,
        tokens: Option<v1::Tokens>,
        serve: Serve,
        deadline: Instant,
    ) -> Self {
        let heavy = matches!(op, request::Op::Count(_));
        Self { place, op, tokens, serve, effect: Effect::Read, patience: Patience::Usual, heavy, deadline }
    }

    fn write(
        place: super::attempt::Place<'a>,
        op: &'a request::Op,
        tokens: Option<v1::Tokens>,
        deadline: Instant,
    ) -> Self {
        let heavy = matches!(op, request::Op::DeleteRange(_));
        let (serve, effect, patience) = (Serve::Leader, Effect::Write, Patience::Usual);
        Self { place, op, tokens, serve, effect, patience, heavy, deadline }
    }
}

pub(crate) fn mismatched() -> Error {
    Error::new(Reason::Internal, "a node's answer does not match the request")
}

fn single_of(op: &request::Op) -> Option<(&str, &Bytes)> {
    use request::Op;
    Some(match op {
        Op::Put(put) => (&put.keyspace, &put.key),
        Op::Delete(delete) => (&delete.keyspace, &delete.key),
        Op::CompareAndSet(cas) => (&cas.keyspace, &cas.key),
        Op::Increment(increment) => (&increment.keyspace, &increment.key),
        _ => return None,
    })
}

pub(crate) fn session_mut(op: &mut request::Op) -> Option<&mut Option<v1::WriteSession>> {
    use request::Op;
    Some(match op {
        Op::Put(put) => &mut put.session,
        Op::Delete(delete) => &mut delete.session,
        Op::CompareAndSet(cas) => &mut cas.session,
        Op::Increment(increment) => &mut increment.session,
        Op::Write(batch) => &mut batch.session,
        Op::DeleteRange(delete) => &mut delete.session,
        _ => return None,
    })
}

fn options_mut(op: &mut request::Op) -> Option<&mut Option<v1::ReadOptions>> {
    use request::Op;
    Some(match op {
        Op::Get(get) => &mut get.options,
        Op::BatchGet(get) => &mut get.options,
        Op::Scan(scan) => &mut scan.options,
        Op::Count(count) => &mut count.options,
        _ => return None,
    })
}

fn is_degraded(reply: &v1::GetReply) -> bool {
    reply.read.as_ref().is_some_and(|read| read.degraded)
}

fn mark_degraded(result: &mut reply::Result) {
    let mark = |read: &mut v1::ReadInfo| read.degraded = true;
    match result {
        reply::Result::Get(reply) => reply.read.iter_mut().for_each(mark),
        reply::Result::BatchGet(reply) => reply.items.iter_mut().flat_map(|item| &mut item.read).for_each(mark),
        reply::Result::Scan(reply) => reply.reads.iter_mut().for_each(mark),
        reply::Result::Count(reply) => reply.reads.iter_mut().for_each(mark),
        _ => {}
    }
}
