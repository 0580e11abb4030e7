//! Routed requests: answered by this node's own replica of the partition, or refused with a hint.
//!
//! A read first reaches the point that its consistency asks for (a barrier, a bounded staleness, a token), then looks
//! at the rows under the lock that applies share; ownership is checked there, at the moment of reading. A write goes to
//! the partition's queue; whether it happens is decided in the log.
//!
//! A write that the node's budgets have no room for is refused before it is queued ([`crate::node::Ticket`]).
//!
//! Requests that are [`alike`] are executed together: what they ask of the partition is reached once, and each gets its
//! own answer.

use super::{
    convert::{self, Rules},
    read::{Choice, ReadPoint},
};
use crate::{
    client::{
        query,
        token::{Seen, SessionToken},
    },
    error::{Error, Outcome, Reason},
    key::{PartitionId, Tokens},
    kv::{self, ScanSpec},
    node::{Node, Partition, Written, config::Limits},
    placement::load::ROW_LOOKED_BYTES,
    plant::{Bug, planted},
    proto::{rows, v1},
    raft::LogPosition,
    telemetry,
};
use bytes::Bytes;
use std::sync::Arc;
use tokio::time::Instant;
use v1::{reply::Result as Answer, request::Op};

/// Bytes of keys and values in a page at most (a single larger row goes alone).
pub(crate) const PAGE_BYTES_MAX: u64 = 1 << 20;

/// Executes requests on this node's replicas.
#[derive(Clone)]
pub(crate) struct Executor {
    pub(crate) node: Arc<Node>,
    pub(crate) limits: Arc<Limits>,
}

/// Requests on one partition.
struct Call<'a> {
    node: &'a Node,
    partition: Arc<Partition>,
    rules: Rules<'a>,
    deadline: Instant,
}

impl Executor {
    /// Answers a request that names its partition.
    pub(crate) async fn execute(&self, request: v1::Request, deadline: Instant) -> Result<Answer, Error> {
        let mut answers = self.execute_alike(vec![request], deadline).await;
        answers.pop().expect("one answer for each request")
    }

    /// Answers requests that are [`alike`], or one of any kind: one answer for each, in order.
    pub(crate) async fn execute_alike(
        &self,
        requests: Vec<v1::Request>,
        deadline: Instant,
    ) -> Vec<Result<Answer, Error>> {
        let count = requests.len();
        let is_write = is_write(requests.first().and_then(|request| request.op.as_ref()));
        let mut answers = match self.call(requests.first(), deadline) {
            Ok(Some(call)) => call.answer(requests).await,
            Ok(None) => vec![Ok(Answer::OpenSession(self.open_session()))],
            Err(error) => std::iter::repeat_n(Err(error), count).collect(),
        };
        if is_write {
            for error in answers.iter_mut().filter_map(|answer| answer.as_mut().err()) {
                // Everything that can have been proposed says so itself.
                error.outcome.get_or_insert(Outcome::NotApplied);
            }
        }
        answers
    }

    /// What requests that are like this one are answered with; none for the opening of a session.
    fn call(&self, request: Option<&v1::Request>, deadline: Instant) -> Result<Option<Call<'_>>, Error> {
        let op = request.and_then(|request| request.op.as_ref()).ok_or_else(unknown_op)?;
        if Instant::now() >= deadline {
            return Err(Error::new(Reason::DeadlineExceeded, "the deadline had passed when the request was looked at"));
        }
        if self.node.is_stopping() {
            let message = format!("node {} is stopping; ask another", self.node.id());
            return Err(Error::new(Reason::Stopping, message));
        }
        if let Op::OpenSession(_) = op {
            return Ok(None);
        }
        let route = request.and_then(|request| request.route.as_ref());
        let route = route.ok_or_else(|| Error::new(Reason::Internal, "a routed request without a route"))?;
        let id = PartitionId(route.partition);
        let partition = self.node.partition(id).ok_or_else(|| self.not_here(id))?;
        let map = self.node.routing().map();
        let name = keyspace_of(op);
        let keyspace = map.keyspace_by_name(name).ok_or_else(|| keyspace_unknown(name))?;
        let belongs = map.partition(id).is_some_and(|partition| partition.keyspace == keyspace.id);
        if !belongs {
            return Err(self.not_here(id));
        }
        let rules = Rules::new(keyspace, &self.limits);
        Ok(Some(Call { node: &self.node, partition, rules, deadline }))
    }

    /// A new write session, identified by randomness and by the time of this node.
    pub(crate) fn open_session(&self) -> v1::OpenSessionReply {
        let id = u128::from(crate::env::random_u64()) << 64 | u128::from(crate::env::random_u64());
        v1::OpenSessionReply { client_id: Bytes::copy_from_slice(&id.to_be_bytes()), opened: self.node.stamp() }
    }

    fn not_here(&self, id: PartitionId) -> Error {
        Error::new(Reason::WrongPartition, format!("node {} has no replica of partition {id}", self.node.id()))
            .hint(self.node.hint(id))
    }
}

/// Whether two requests can be executed together: reads of rows of the same partition at the same consistency, or writes
/// to the same partition.
pub(crate) fn alike(one: &v1::Request, other: &v1::Request) -> bool {
    let (Some(route), Some(other_route)) = (&one.route, &other.route) else { return false };
    let (Some(op), Some(other_op)) = (&one.op, &other.op) else { return false };
    route.partition == other_route.partition
        && keyspace_of(op) == keyspace_of(other_op)
        && match (op, other_op) {
            (Op::Get(get), Op::Get(other)) => get.options == other.options,
            (op, other) => is_write(Some(op)) && is_write(Some(other)),
        }
}

/// Whether the request can change rows.
pub(crate) fn is_write(op: Option<&Op>) -> bool {
    match op {
        Some(
            Op::Put(_) | Op::Delete(_) | Op::CompareAndSet(_) | Op::Increment(_) | Op::Write(_) | Op::DeleteRange(_),
        ) => true,
        Some(Op::Get(_) | Op::BatchGet(_) | Op::Scan(_) | Op::Count(_) | Op::OpenSession(_)) | None => false,
    }
}

/// Name of a request for metrics.
pub(crate) fn method(op: Option<&Op>) -> &'static str {
    match op {
        Some(Op::Get(_)) => "Get",
        Some(Op::BatchGet(_)) => "BatchGet",
        Some(Op::Put(_)) => "Put",
        Some(Op::Delete(_)) => "Delete",
        Some(Op::CompareAndSet(_)) => "CompareAndSet",
        Some(Op::Increment(_)) => "Increment",
        Some(Op::Write(_)) => "Write",
        Some(Op::DeleteRange(_)) => "DeleteRange",
        Some(Op::Scan(_)) => "Scan",
        Some(Op::Count(_)) => "Count",
        Some(Op::OpenSession(_)) => "OpenSession",
        None => "Unknown",
    }
}

pub(crate) fn unknown_op() -> Error {
    Error::field("op", "the request is empty or of a kind that this server does not know")
}

pub(crate) fn keyspace_unknown(name: &str) -> Error {
    let message = format!("there is no keyspace {name:?}; `meridian keyspace list` shows those that exist");
    Error::new(Reason::KeyspaceUnknown, message).with("keyspace", name).in_field("keyspace")
}

/// Name of the keyspace that a request speaks of.
pub(crate) fn keyspace_of(op: &Op) -> &str {
    let name = match op {
        Op::Get(get) => &get.keyspace,
        Op::BatchGet(get) => &get.keyspace,
        Op::Put(put) => &put.keyspace,
        Op::Delete(delete) => &delete.keyspace,
        Op::CompareAndSet(cas) => &cas.keyspace,
        Op::Increment(increment) => &increment.keyspace,
        Op::Write(batch) => &batch.keyspace,
        Op::DeleteRange(range) => &range.keyspace,
        Op::Scan(scan) => &scan.keyspace,
        Op::Count(count) => &count.keyspace,
        Op::OpenSession(_) => "",
    };
    query::keyspace_name(name)
}

impl Call<'_> {
    /// One answer for each request, in order.
    async fn answer(&self, requests: Vec<v1::Request>) -> Vec<Result<Answer, Error>> {
        let first = requests.first().and_then(|request| request.op.as_ref());
        if let Some(Op::Get(get)) = first {
            let options = get.options.clone();
            return self.gets(options, requests.into_iter().filter_map(|request| request.op)).await;
        }
        if is_write(first) {
            return self.writes(requests).await;
        }
        let mut answers = Vec::with_capacity(requests.len());
        for request in requests {
            answers.push(self.other(request).await);
        }
        answers
    }

    /// A read of more than single rows.
    async fn other(&self, request: v1::Request) -> Result<Answer, Error> {
        let tokens = convert::tokens_of(request.route.and_then(|route| route.tokens));
        match request.op.ok_or_else(unknown_op)? {
            Op::BatchGet(get) => self.batch_get(get).await.map(Answer::BatchGet),
            Op::Scan(scan) => self.scan(scan, tokens).await.map(Answer::Scan),
            Op::Count(count) => self.count(count, tokens).await.map(Answer::Count),
            _ => unreachable!("single rows, writes and sessions are answered elsewhere"),
        }
    }

    async fn reach(&self, options: Option<v1::ReadOptions>) -> Result<ReadPoint, Error> {
        let choice = Choice::of(options.unwrap_or_default())?;
        super::read::reach(self.node, &self.partition, &choice, self.deadline).await
    }

    /// Reads the rows at the point reached, and says who served them.
    fn at<T>(&self, point: &ReadPoint, read: impl FnOnce(&kv::Store) -> T) -> (T, v1::ReadInfo) {
        let group = self.partition.group();
        let (value, version, index) =
            group.read(|machine, applied| (read(machine.store()), machine.store().last_version(), applied.index));
        let map = self.node.routing().map();
        let epoch = map.partition(self.partition.id).map(|partition| partition.epoch).unwrap_or_default();
        let info = v1::ReadInfo {
            partition: self.partition.id.0,
            epoch: Some(v1::Epoch { bounds: epoch.bounds, members: epoch.members }),
            term: group.leadership().term,
            applied_index: index,
            node: self.node.id().0,
            role: point.role as i32,
            consistency: point.level as i32,
            staleness: Some(point.staleness_to_pb()),
            session_token: SessionToken::of(self.partition.id, Seen { index, version }).encode(),
            degraded: false,
            scan: None,
        };
        (value, info)
    }

    /// What was read, if it is this replica's to say; counts it.
    fn owned<T>(&self, point: &ReadPoint, read: Result<T, kv::NotOwned>) -> Result<T, Error> {
        let value = read.map_err(|refusal| Error::from(refusal).hint(self.node.hint(self.partition.id)))?;
        telemetry::observe_reads(point.level_name(), point.role_name(), 1);
        Ok(value)
    }

    /// Reads single rows, all at one point.
    async fn gets(
        &self,
        options: Option<v1::ReadOptions>,
        gets: impl Iterator<Item = Op>,
    ) -> Vec<Result<Answer, Error>> {
        type Found = Result<Option<kv::Row>, kv::NotOwned>;
        let key = |op| match op {
            Op::Get(get) => self.rules.key(get.key),
            _ => unreachable!("only reads of single rows are alike to one"),
        };
        let keys: Vec<Result<Bytes, Error>> = gets.map(key).collect();
        let point = match self.reach(options).await {
            Ok(point) => point,
            Err(error) => return keys.into_iter().map(|key| Err(key.err().unwrap_or_else(|| error.clone()))).collect(),
        };
        let look_up = |store: &kv::Store| {
            let mut rows = Vec::with_capacity(keys.len());
            for keys in keys.chunks(kv::CALLED_ROWS) {
                store.call_for(keys.iter().flatten());
                rows.extend(keys.iter().map(|key| key.as_ref().ok().map(|key| store.get(key))));
            }
            rows
        };
        let (rows, info): (Vec<Option<Found>>, _) = self.at(&point, look_up);
        let mut served = 0;
        let answer = |(key, row): (Result<Bytes, Error>, Option<Found>)| {
            let (key, Some(row)) = (key?, row) else { unreachable!("every key that may be one was looked up") };
            let row = row.map_err(|refusal| Error::from(refusal).hint(self.node.hint(self.partition.id)))?;
            self.partition.counters().read(&key, row.as_ref().map_or(0, value_bytes));
            served += 1;
            Ok(Answer::Get(get_reply(key, row, info.clone())))
        };
        let answers = keys.into_iter().zip(rows).map(answer).collect();
        telemetry::observe_reads(point.level_name(), point.role_name(), served);
        answers
    }

    async fn batch_get(&self, get: v1::BatchGetRequest) -> Result<v1::BatchGetReply, Error> {
        query::check_items("keys", get.keys.len())?;
        let keys = get.keys.into_iter().map(|key| self.rules.key(key)).collect::<Result<Vec<_>, _>>()?;
        let point = self.reach(get.options).await?;
        let (rows, read) =
            self.at(&point, |store| keys.iter().map(|key| store.get(key)).collect::<Result<Vec<_>, _>>());
        let rows = self.owned(&point, rows)?;
        let bytes = rows.iter().flatten().map(value_bytes).sum();
        self.partition.counters().read(keys.first().unwrap_or(&Bytes::new()), bytes);
        let items = keys.into_iter().zip(rows).map(|(key, row)| get_reply(key, row, read.clone())).collect();
        Ok(v1::BatchGetReply { items })
    }

    async fn scan(&self, scan: v1::ScanRequest, tokens: Option<Tokens>) -> Result<v1::ScanReply, Error> {
        let span = self.rules.span(scan.range.as_ref())?;
        query::check_scan(&scan)?;
        let page_rows = if scan.page_rows == 0 { query::PAGE_ROWS_DEFAULT } else { scan.page_rows } as u64;
        let limit = scan.limit.unwrap_or(page_rows).min(page_rows);
        let reverse = scan.order() == v1::Order::Descending;
        let point = self.reach(scan.options).await?;
        let spec = ScanSpec {
            span,
            tokens,
            reverse,
            rows_max: limit,
            bytes_max: PAGE_BYTES_MAX,
            keys_only: scan.keys_only,
            count_only: false,
        };
        let (page, mut read) = self.at(&point, |store| pack(store, &spec));
        let (page, packed) = self.owned(&point, page)?;
        self.partition.counters().read(&spec.span.start, page.bytes.max(page.looked * ROW_LOOKED_BYTES));
        let (rows, rows_scanned) = (page.count, page.looked);
        read.scan = Some(v1::ScanCost { rows, rows_scanned, bytes: page.bytes, ..Default::default() });
        metrics::counter!(telemetry::SCAN_ROWS_RETURNED_TOTAL).increment(rows);
        let covered = Some(convert::covered_to_pb(&page.covered, page.covered_tokens));
        let reply = v1::ScanReply { reads: vec![read], covered, ..Default::default() };
        if scan.packed {
            return Ok(v1::ScanReply { packed_rows: packed, ..reply });
        }
        let rows = rows::unpack(&packed).expect("they were just packed");
        Ok(v1::ScanReply { rows, ..reply })
    }

    async fn count(&self, count: v1::CountRequest, tokens: Option<Tokens>) -> Result<v1::CountReply, Error> {
        let span = self.rules.span(count.range.as_ref())?;
        let point = self.reach(count.options).await?;
        let spec = ScanSpec {
            span,
            tokens,
            reverse: false,
            rows_max: u64::MAX,
            bytes_max: u64::MAX,
            keys_only: true,
            count_only: true,
        };
        let (page, read) = self.at(&point, |store| store.scan(&spec, |_, _| {}));
        let page = self.owned(&point, page)?;
        self.partition.counters().read(&spec.span.start, page.looked * ROW_LOOKED_BYTES);
        let covered = convert::covered_to_pb(&page.covered, page.covered_tokens);
        Ok(v1::CountReply { count: page.count, reads: vec![read], covered: Some(covered) })
    }

    /// Proposes writes together; each gets its own answer.
    async fn writes(&self, requests: Vec<v1::Request>) -> Vec<Result<Answer, Error>> {
        let mut writes = Vec::with_capacity(requests.len());
        let mut ticket = self.partition.ticket(self.deadline);
        let asked: Vec<Result<Asked, Error>> = requests
            .into_iter()
            .map(|request| {
                let op = request.op.ok_or_else(unknown_op)?;
                let is_batch = matches!(op, Op::Write(_));
                let tokens = convert::tokens_of(request.route.and_then(|route| route.tokens));
                let write = self.rules.write(op, tokens)?.ok_or_else(unknown_op)?;
                ticket.take(&write)?;
                let keys = convert::keys_of(&write.op);
                writes.push(write);
                Ok(Asked { is_batch, keys })
            })
            .collect();
        let mut written = self.partition.write_all(writes, ticket).await.into_iter();
        let mut infos = Infos { call: self, last: None };
        let mut answer = |asked: Asked| {
            let written = written.next().expect("one result for each write");
            self.written(&asked, written, &mut infos)
        };
        asked.into_iter().map(|asked| asked.and_then(&mut answer)).collect()
    }

    /// What became of one write, for who asked for it.
    fn written(&self, asked: &Asked, written: Result<Written, Error>, infos: &mut Infos<'_>) -> Result<Answer, Error> {
        let Written { at, reply } = written.map_err(|error| {
            if error.reason == Reason::NotLeader && error.hint.is_none() {
                return error.hint(self.node.hint(self.partition.id));
            }
            error
        })?;
        if reply.replayed {
            metrics::counter!(telemetry::DEDUPE_HITS_TOTAL).increment(1);
        }
        let done = reply.answer.map_err(|refusal| {
            let error = Error::from(refusal);
            if error.reason == Reason::WrongPartition { error.hint(self.node.hint(self.partition.id)) } else { error }
        })?;
        let mut info = |version| infos.of(at, version, reply.replayed);
        Ok(match done {
            kv::Done::Single(single) if !asked.is_batch => {
                let info = info(single.version);
                Answer::Write(convert::written_to_pb(&asked.keys[0], single, info))
            }
            kv::Done::Single(_) => unreachable!("a batch is answered as a batch"),
            kv::Done::Batch { applied, items } => {
                let item = |(key, written): (&Bytes, kv::Written)| {
                    let info = info(written.version);
                    let write = convert::written_to_pb(key, written, info);
                    v1::BatchItemReply { result: Some(v1::batch_item_reply::Result::Write(write)) }
                };
                Answer::Batch(v1::BatchReply { applied, items: asked.keys.iter().zip(items).map(item).collect() })
            }
            kv::Done::DeleteRange(deleted) => Answer::DeleteRange(v1::DeleteRangeReply {
                deleted: deleted.count,
                infos: vec![info(0)],
                covered: Some(convert::covered_to_pb(&deleted.covered, deleted.covered_tokens)),
            }),
        })
    }
}

/// What is needed of a write to tell of it.
struct Asked {
    is_batch: bool,
    keys: Vec<Bytes>,
}

/// Where writes stand in the log, for the wire.
struct Infos<'a> {
    call: &'a Call<'a>,
    /// The last one, without its token: most that are told of together stand in one entry.
    last: Option<v1::WriteInfo>,
}

impl Infos<'_> {
    fn of(&mut self, at: LogPosition, version: u64, replayed: bool) -> v1::WriteInfo {
        let id = self.call.partition.id;
        let seen = Seen { index: at.index - u64::from(planted(Bug::WriteTokenEarly)), version };
        let session_token = SessionToken::of(id, seen).encode();
        if let Some(last) = self.last.as_ref().filter(|last| last.log_index == at.index && last.term == at.term) {
            return v1::WriteInfo { replayed, session_token, ..last.clone() };
        }
        let map = self.call.node.routing().map();
        let epoch = map.partition(id).map(|partition| partition.epoch).unwrap_or_default();
        let info = v1::WriteInfo {
            partition: id.0,
            epoch: Some(v1::Epoch { bounds: epoch.bounds, members: epoch.members }),
            term: at.term,
            log_index: at.index,
            node: self.call.node.id().0,
            replayed,
            session_token: Bytes::new(),
        };
        self.last = Some(info.clone());
        v1::WriteInfo { session_token, ..info }
    }
}

/// A page, and its rows as the bytes that are sent.
fn pack(store: &kv::Store, spec: &ScanSpec) -> Result<(kv::Page, Bytes), kv::NotOwned> {
    let row_bytes = store.bytes() / store.rows().max(1) + rows::ROW_OVERHEAD_BYTES as u64;
    let room = (spec.rows_max.min(store.rows()) * row_bytes).min(PAGE_BYTES_MAX);
    let mut packer = rows::Packer::with_capacity(room as usize);
    let page = store.scan(spec, |key, row| packer.push(key, row.value, row.version))?;
    Ok((page, packer.finish()))
}

fn value_bytes(row: &kv::Row) -> u64 {
    row.value.len() as u64
}

fn get_reply(key: Bytes, row: Option<kv::Row>, read: v1::ReadInfo) -> v1::GetReply {
    let row = row.map(|row| v1::Row { key, value: row.value, version: row.version });
    v1::GetReply { found: row.is_some(), row, read: Some(read) }
}
