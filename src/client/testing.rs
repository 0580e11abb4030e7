//! A cluster in one struct, behind a [`Caller`]: partitions with members and leaders, one shared set of rows, and the
//! faults that tests ask for. What it knows is the truth; the router's map is only as new as its last refresh.

use super::{
    query,
    router::{Caller, Question},
    routing::Routing,
};
use crate::{
    error::{Error, Hint, Outcome, Reason},
    key::{
        Epoch, KeyKind, KeyspaceId, Layout, NodeId, PartitionId, Replica, ReplicaId, Span, Tokens, position, successor,
        token,
    },
    placement::{Keyspace, MapDelta, Node, Partition, Phase, Standing},
    proto::v1::{self, reply, request},
};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep_until};

/// When a session was opened that a node whose clock is ahead has opened.
const AHEAD: u64 = u64::MAX;

pub(crate) const SPACE: KeyspaceId = KeyspaceId(1);

/// What happens to one request that reaches a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Executed, and the answer is lost with the connection.
    AnswerLost,
    /// Executed, and the node never answers.
    AnswerHangs,
    /// Not executed; the connection is lost after it was sent.
    RequestLost,
    /// Refused like this.
    Refused(Reason),
}

#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) id: u64,
    pub(crate) span: Span,
    pub(crate) members: Vec<u64>,
    pub(crate) leader: Option<u64>,
    pub(crate) term: u64,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) layout: Option<Layout>,
    pub(crate) kind: Option<KeyKind>,
    pub(crate) version: u64,
    pub(crate) parts: Vec<Part>,
    ids: u64,
    pub(crate) rows: BTreeMap<Bytes, (Bytes, u64)>,
    last_version: u64,
    /// (client, sequence) → what was answered.
    remembered: BTreeMap<(Bytes, u64), reply::Result>,
    /// The same for ranged deletes, which give each partition its own answer, copied to both sides of a split.
    remembered_ranges: Vec<((Bytes, u64), v1::DeleteRangeRequest, v1::DeleteRangeReply)>,
    pub(crate) sessions: u64,
    /// Nodes whose clocks are ahead: partitions refuse the sessions that they open.
    pub(crate) ahead: BTreeSet<u64>,
    /// Sessions opened up to here are forgotten.
    pub(crate) forgotten: u64,
    pub(crate) down: BTreeSet<u64>,
    /// Neither answers nor refuses.
    pub(crate) hanging: BTreeSet<u64>,
    /// Rows that a node's replica has not got yet.
    pub(crate) missing: BTreeSet<(u64, Bytes)>,
    /// Taken by the next requests with a route, one each.
    pub(crate) faults: Vec<Fault>,
    /// Most rows in an answer.
    pub(crate) rows_max: usize,
    /// Partitions without a quorum.
    pub(crate) no_quorum: BTreeSet<u64>,
    /// Every routed request: node and operation.
    pub(crate) calls: Vec<(u64, &'static str)>,
    /// How often a write was applied, by key.
    pub(crate) applied: BTreeMap<Bytes, u32>,
}

pub(crate) struct Fake {
    pub(crate) routing: Routing,
    pub(crate) world: Mutex<World>,
    pub(crate) prefer: Option<NodeId>,
}

impl Fake {
    /// Three nodes; partitions cut at these positions, each on every node, led by node 1.
    pub(crate) fn new(layout: Layout, cuts: &[Bytes]) -> Arc<Self> {
        let mut world = World { layout: Some(layout), rows_max: usize::MAX, ..World::default() };
        let mut start = Bytes::new();
        for end in cuts.iter().cloned().map(Some).chain([None]) {
            let span = Span::new(start.clone(), end.clone());
            world.ids += 1;
            world.parts.push(Part { id: world.ids, span, members: vec![1, 2, 3], leader: Some(1), term: 1 });
            start = end.unwrap_or_default();
        }
        world.version = 1;
        let fake = Arc::new(Self { routing: Routing::new(), world: Mutex::new(world), prefer: None });
        fake.publish();
        fake
    }

    /// Makes the router's map the truth.
    pub(crate) fn publish(&self) {
        let delta = self.world.lock().delta();
        let _ = self.routing.apply(delta);
    }
}

impl World {
    pub(crate) fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.last_version += 1;
        self.rows.insert(key.into(), (value.into(), self.last_version));
    }

    /// Cuts the partition that holds this position in two; the left one keeps its id unless `fresh`.
    pub(crate) fn split(&mut self, at: &Bytes, fresh: bool) {
        let Some(index) = self.parts.iter().position(|part| part.span.contains(at) && part.span.start != *at) else {
            return;
        };
        let mut right = self.parts[index].clone();
        self.ids += 1;
        right.id = self.ids;
        right.span = Span::new(at.clone(), right.span.end);
        let left = &mut self.parts[index];
        left.span = Span::new(left.span.start.clone(), Some(at.clone()));
        if fresh {
            self.ids += 1;
            left.id = self.ids;
        }
        self.parts.insert(index + 1, right);
        self.version += 1;
    }

    /// Joins a partition with its right neighbour, under a new id.
    pub(crate) fn merge(&mut self, index: usize) {
        if self.parts.len() < 2 {
            return;
        }
        let index = index % (self.parts.len() - 1);
        let right = self.parts.remove(index + 1);
        self.ids += 1;
        let left = &mut self.parts[index];
        left.span = Span::new(left.span.start.clone(), right.span.end);
        left.id = self.ids;
        self.version += 1;
    }

    pub(crate) fn lead(&mut self, index: usize, node: Option<u64>) {
        let count = self.parts.len();
        let part = &mut self.parts[index % count];
        part.leader = node;
        part.term += 1;
    }

    fn delta(&self) -> MapDelta {
        let nodes = 1..=3;
        let replicas = |part: &Part| -> Vec<Replica> {
            part.members.iter().map(|n| Replica { id: ReplicaId(part.id * 10 + n), node: NodeId(*n) }).collect()
        };
        let partition = |part: &Part| Partition {
            id: PartitionId(part.id),
            keyspace: SPACE,
            span: part.span.clone(),
            epoch: Epoch::default(),
            members: replicas(part),
            target: replicas(part),
            phase: Phase::Active,
            initializer: ReplicaId(0),
            leaving: Vec::new(),
            birth: part.span.clone(),
            cut: None,
            merge: None,
        };
        MapDelta {
            cluster_id: "fake".into(),
            to_version: self.version,
            nodes: nodes
                .map(|n| Node {
                    id: NodeId(n),
                    uuid: String::new(),
                    address: format!("n{n}:1"),
                    zone: String::new(),
                    weight_milli: 1_000,
                    ephemeral: false,
                    standing: Standing::Active,
                })
                .collect(),
            keyspaces: vec![Keyspace {
                id: SPACE,
                name: "default".into(),
                kind: self.kind.unwrap_or(KeyKind::Bytes),
                layout: self.layout.expect("set"),
                replicas: 3,
            }],
            partitions: self.parts.iter().map(partition).collect(),
            ..MapDelta::default()
        }
    }

    fn layout(&self) -> Layout {
        self.layout.expect("set")
    }

    fn error(&self, reason: Reason, part: Option<&Part>) -> Error {
        let hint = Hint {
            partition: PartitionId(part.map_or(0, |part| part.id)),
            leader: part.and_then(|part| part.leader).map(NodeId),
            term: part.map_or(0, |part| part.term),
            map_version: self.version,
        };
        Error::new(reason, format!("fake {}", reason.as_str())).outcome(Outcome::NotApplied).hint(hint)
    }

    fn execute(&mut self, node: u64, route: v1::Route, op: request::Op) -> Result<reply::Result, Error> {
        let part = self.parts.iter().find(|part| part.id == route.partition && part.members.contains(&node)).cloned();
        let Some(part) = part else { return Err(self.error(Reason::WrongPartition, None)) };
        let write = !matches!(
            op,
            request::Op::Get(_) | request::Op::BatchGet(_) | request::Op::Scan(_) | request::Op::Count(_)
        );
        let options = match &op {
            request::Op::Get(get) => get.options.clone(),
            request::Op::BatchGet(get) => get.options.clone(),
            request::Op::Scan(scan) => scan.options.clone(),
            request::Op::Count(count) => count.options.clone(),
            _ => None,
        };
        assert!(!query::degrades(options.as_ref()), "the router degrades by itself");
        let weak = options.is_some_and(|options| options.consistency() == v1::Consistency::Eventual);
        if !weak && self.no_quorum.contains(&part.id) {
            return Err(self.error(Reason::NoQuorum, Some(&Part { leader: None, ..part })));
        }
        match part.leader {
            None if !weak => return Err(self.error(Reason::LeaderUnknown, Some(&part))),
            Some(leader) if write && leader != node => return Err(self.error(Reason::NotLeader, Some(&part))),
            _ => {}
        }
        let tokens = query::tokens_of_pb(route.tokens.as_ref());
        self.perform(node, &part, tokens, op)
    }

    fn perform(&mut self, node: u64, part: &Part, tokens: Tokens, op: request::Op) -> Result<reply::Result, Error> {
        let read = v1::ReadInfo {
            partition: part.id,
            node,
            role: if part.leader == Some(node) { v1::Role::Leader } else { v1::Role::Follower } as i32,
            session_token: super::token::SessionToken::of(PartitionId(part.id), super::token::Seen::default()).encode(),
            ..Default::default()
        };
        match op {
            request::Op::Get(get) => Ok(reply::Result::Get(self.get(node, part, &get.key, read)?)),
            request::Op::BatchGet(get) => {
                let items: Result<_, Error> =
                    get.keys.iter().map(|key| self.get(node, part, key, read.clone())).collect();
                Ok(reply::Result::BatchGet(v1::BatchGetReply { items: items? }))
            }
            request::Op::Scan(scan) => {
                assert!(scan.page_rows >= 1 && scan.prefix.is_empty() && scan.page_token.is_empty());
                let reverse = scan.order() == v1::Order::Descending;
                let limit = self.rows_max.min(scan.page_rows as usize);
                let (rows, covered) = self.look(part, tokens, scan.range.as_ref(), reverse, limit)?;
                Ok(reply::Result::Scan(v1::ScanReply {
                    rows,
                    reads: vec![read],
                    covered: Some(covered),
                    ..Default::default()
                }))
            }
            request::Op::Count(count) => {
                let (rows, covered) = self.look(part, tokens, count.range.as_ref(), false, self.rows_max)?;
                let (count, covered) = (rows.len() as u64, Some(covered));
                Ok(reply::Result::Count(v1::CountReply { count, reads: vec![read], covered }))
            }
            write => self.write(part, tokens, write),
        }
    }

    fn owns(&self, part: &Part, key: &Bytes) -> Result<(), Error> {
        match part.span.contains(&position(self.layout(), key)) {
            true => Ok(()),
            false => Err(self.error(Reason::WrongPartition, None)),
        }
    }

    fn get(&self, node: u64, part: &Part, key: &Bytes, read: v1::ReadInfo) -> Result<v1::GetReply, Error> {
        self.owns(part, key)?;
        let row = self.rows.get(key).filter(|_| !self.missing.contains(&(node, key.clone())));
        let row = row.map(|(value, version)| v1::Row { key: key.clone(), value: value.clone(), version: *version });
        Ok(v1::GetReply { found: row.is_some(), row, read: Some(read) })
    }

    fn look(
        &self,
        part: &Part,
        tokens: Tokens,
        range: Option<&v1::KeyRange>,
        reverse: bool,
        limit: usize,
    ) -> Result<(Vec<v1::Row>, v1::Covered), Error> {
        let asked = range.map_or_else(Span::all, query::span_of_range);
        let (span, tokens) = match self.layout() {
            Layout::Hashed => match Tokens::of_span(&part.span).and_then(|own| own.intersect(&tokens)) {
                Some(tokens) => (asked, tokens),
                None => return Err(self.error(Reason::WrongPartition, None)),
            },
            Layout::Ordered => {
                let inside = asked.intersect(&part.span);
                let leads = if reverse { inside.end == asked.end } else { inside.start == asked.start };
                if inside.is_empty() || !leads {
                    return Err(self.error(Reason::WrongPartition, None));
                }
                (inside, Tokens::ALL)
            }
        };
        let mut found: Vec<v1::Row> = self
            .rows
            .range::<[u8], _>(span.bounds())
            .filter(|(key, _)| tokens == Tokens::ALL || tokens.contains(token(key)))
            .map(|(key, (value, version))| v1::Row { key: key.clone(), value: value.clone(), version: *version })
            .collect();
        if reverse {
            found.reverse();
        }
        let cut = found.len() > limit;
        found.truncate(limit);
        let covered = match (cut.then(|| found.last()).flatten(), reverse) {
            (None, _) => span,
            (Some(last), false) => Span::new(span.start, Some(successor(&last.key))),
            (Some(last), true) => Span::new(last.key.clone(), span.end),
        };
        let tokens = (self.layout() == Layout::Hashed).then_some(v1::Tokens { first: tokens.first, last: tokens.last });
        Ok((found, v1::Covered { range: Some(query::range_of_span(&covered)), tokens }))
    }

    fn write(&mut self, part: &Part, tokens: Tokens, op: request::Op) -> Result<reply::Result, Error> {
        let session = match &op {
            request::Op::Put(put) => put.session.clone(),
            request::Op::Delete(delete) => delete.session.clone(),
            request::Op::Increment(increment) => increment.session.clone(),
            request::Op::Write(batch) => batch.session.clone(),
            request::Op::DeleteRange(delete) => delete.session.clone(),
            other => panic!("not used in tests: {other:?}"),
        };
        let session = session.expect("the router attaches a session");
        if session.opened <= self.forgotten {
            // As the state machine: it cannot know whether there was an earlier attempt.
            return Err(self.error(Reason::SessionExpired, None).outcome(Outcome::Unknown));
        }
        if session.opened == AHEAD {
            return Err(self.error(Reason::SessionAhead, None).outcome(Outcome::NotApplied));
        }
        // As the state machine does: by session first, whatever the partition is now; a copy went along with splits.
        let slot = (session.client_id, session.sequence);
        if let request::Op::DeleteRange(delete) = &op {
            return self.delete_range(part, tokens, slot, delete.clone());
        }
        if let Some(remembered) = self.remembered.get(&slot) {
            return Ok(remembered.clone());
        }
        let result = self.apply(part, op)?;
        self.remembered.insert(slot, result.clone());
        Ok(result)
    }

    fn delete_range(
        &mut self,
        part: &Part,
        tokens: Tokens,
        slot: (Bytes, u64),
        delete: v1::DeleteRangeRequest,
    ) -> Result<reply::Result, Error> {
        let asked = delete.range.as_ref().map_or_else(Span::all, query::span_of_range);
        // Answers of this partition, and those that it inherited.
        let inside = if self.layout() == Layout::Ordered { asked.intersect(&part.span) } else { asked };
        let speaks = |reply: &v1::DeleteRangeReply| {
            let covered = query::coverage_of_pb(reply.covered.as_ref()).unwrap();
            let own = Tokens::of_span(&part.span).unwrap_or(Tokens::ALL);
            let hashed = self.layout() == Layout::Hashed;
            covered.span.contains(&inside.start) && (!hashed || covered.tokens.contains(own.first.max(tokens.first)))
        };
        if let Some((_, earlier, reply)) =
            self.remembered_ranges.iter().find(|(held, _, reply)| *held == slot && speaks(reply))
        {
            assert_eq!(earlier.range, delete.range, "a sequence is used again for another request");
            return Ok(reply::Result::DeleteRange(reply.clone()));
        }
        let (rows, covered) = self.look(part, tokens, delete.range.as_ref(), false, usize::MAX)?;
        rows.iter().for_each(|row| {
            self.rows.remove(&row.key);
        });
        let infos = vec![v1::WriteInfo { partition: part.id, ..Default::default() }];
        let reply = v1::DeleteRangeReply { deleted: rows.len() as u64, infos, covered: Some(covered) };
        self.remembered_ranges.push((slot, delete, reply.clone()));
        Ok(reply::Result::DeleteRange(reply))
    }

    fn apply(&mut self, part: &Part, op: request::Op) -> Result<reply::Result, Error> {
        let applied = |existed, number| {
            let info = Some(v1::WriteInfo { partition: part.id, ..Default::default() });
            reply::Result::Write(v1::WriteReply { applied: true, existed, number, info, ..Default::default() })
        };
        match op {
            request::Op::Put(put) => {
                self.owns(part, &put.key)?;
                *self.applied.entry(put.key.clone()).or_default() += 1;
                let existed = self.rows.contains_key(&put.key);
                self.put(put.key, put.value);
                Ok(applied(existed, None))
            }
            request::Op::Delete(delete) => {
                self.owns(part, &delete.key)?;
                let existed = self.rows.remove(&delete.key).is_some();
                if delete.must_exist && !existed {
                    return Err(self.error(Reason::NotFound, None));
                }
                Ok(applied(existed, None))
            }
            request::Op::Increment(increment) => {
                self.owns(part, &increment.key)?;
                *self.applied.entry(increment.key.clone()).or_default() += 1;
                let old = self
                    .rows
                    .get(&increment.key)
                    .map_or(0, |(value, _)| std::str::from_utf8(value).unwrap().parse::<i64>().unwrap());
                self.put(increment.key, (old + increment.delta).to_string());
                Ok(applied(false, Some(old + increment.delta)))
            }
            request::Op::Write(batch) => {
                assert!(batch.atomic, "batches that are not atomic come as single writes");
                for item in &batch.items {
                    self.owns(part, query::key_of_item(item)?)?;
                }
                Ok(reply::Result::Batch(v1::BatchReply { applied: true, items: Vec::new() }))
            }
            other => panic!("not used in tests: {other:?}"),
        }
    }
}

fn name_of(op: &request::Op) -> &'static str {
    match op {
        request::Op::Get(_) => "get",
        request::Op::BatchGet(_) => "batch_get",
        request::Op::Scan(_) => "scan",
        request::Op::Count(_) => "count",
        request::Op::OpenSession(_) => "open_session",
        _ => "write",
    }
}

impl Caller for Arc<Fake> {
    async fn call(&self, to: NodeId, question: Question<'_>, deadline: Instant) -> Result<v1::Reply, Error> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let hang = || async {
            sleep_until(deadline).await;
            Error::new(Reason::DeadlineExceeded, "fake: no answer").outcome(Outcome::Unknown)
        };
        if self.world.lock().hanging.contains(&to.0) {
            return Err(hang().await);
        }
        let (result, fault) = {
            let mut world = self.world.lock();
            let op = question.op.clone();
            if world.down.contains(&to.0) {
                return Err(Error::new(Reason::Unreachable, "fake: refused").outcome(Outcome::NotApplied));
            }
            let Some(route) = question.route else {
                world.sessions += 1;
                let client_id = Bytes::copy_from_slice(&u128::from(world.sessions).to_be_bytes());
                let reply = v1::OpenSessionReply {
                    client_id,
                    opened: if world.ahead.contains(&to.0) { AHEAD } else { world.sessions },
                };
                return Ok(v1::Reply { id: 0, result: Some(reply::Result::OpenSession(reply)) });
            };
            world.calls.push((to.0, name_of(&op)));
            let fault = if world.faults.is_empty() { None } else { Some(world.faults.remove(0)) };
            match fault {
                Some(Fault::RequestLost) => (None, fault),
                Some(Fault::Refused(reason)) => {
                    let part = world.parts.iter().find(|part| part.id == route.partition).cloned();
                    (Some(Err(world.error(reason, part.as_ref()))), fault)
                }
                _ => (Some(world.execute(to.0, route, op)), fault),
            }
        };
        match fault {
            Some(Fault::AnswerHangs) => return Err(hang().await),
            Some(Fault::AnswerLost | Fault::RequestLost) => {
                return Err(Error::new(Reason::Unreachable, "fake: connection lost").outcome(Outcome::Unknown));
            }
            _ => {}
        }
        let result = match result.expect("executed or refused") {
            Ok(result) => result,
            Err(error) => reply::Result::Error((&error).into()),
        };
        Ok(v1::Reply { id: 0, result: Some(result) })
    }

    fn routing(&self) -> &Routing {
        &self.routing
    }

    async fn refresh(&self, _than: u64) {
        self.publish();
    }

    fn prefer(&self) -> Option<NodeId> {
        self.prefer
    }
}
