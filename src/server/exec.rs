//! Routed requests: answered by this node's own replica of the partition, or refused with a hint.
//!
//! A read first reaches the point that its consistency asks for (a barrier, a bounded staleness, a token), then looks
//! at the rows under the lock that applies share; ownership is checked there, at the moment of reading. A write goes to
//! the partition's queue; whether it happens is decided in the log.

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
    node::{Node, Partition, config::Limits},
    plant::{Bug, planted},
    proto::v1,
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

/// One request on its partition.
struct Call<'a> {
    node: &'a Node,
    partition: Arc<Partition>,
    rules: Rules<'a>,
    tokens: Option<Tokens>,
    deadline: Instant,
}

impl Executor {
    /// Answers a request that names its partition.
    pub(crate) async fn execute(&self, request: v1::Request, deadline: Instant) -> Result<Answer, Error> {
        let is_write = is_write(request.op.as_ref());
        let result = self.answer(request, deadline).await;
        result.map_err(|error| match (is_write, error.outcome) {
            // Everything that can have been proposed says so itself.
            (true, None) => error.outcome(Outcome::NotApplied),
            _ => error,
        })
    }

    async fn answer(&self, request: v1::Request, deadline: Instant) -> Result<Answer, Error> {
        let op = request.op.ok_or_else(unknown_op)?;
        if Instant::now() >= deadline {
            return Err(Error::new(Reason::DeadlineExceeded, "the deadline had passed when the request was looked at"));
        }
        if self.node.is_stopping() {
            let message = format!("node {} is stopping; ask another", self.node.id());
            return Err(Error::new(Reason::Stopping, message));
        }
        if let Op::OpenSession(_) = op {
            return Ok(Answer::OpenSession(self.open_session()));
        }
        let route = request.route.ok_or_else(|| Error::new(Reason::Internal, "a routed request without a route"))?;
        let id = PartitionId(route.partition);
        let partition = self.node.partition(id).ok_or_else(|| self.not_here(id))?;
        let map = self.node.routing().map();
        let name = keyspace_of(&op);
        let keyspace = map.keyspace_by_name(name).ok_or_else(|| keyspace_unknown(name))?;
        let belongs = map.partition(id).is_some_and(|partition| partition.keyspace == keyspace.id);
        if !belongs {
            return Err(self.not_here(id));
        }
        let rules = Rules::new(keyspace, &self.limits);
        let tokens = convert::tokens_of(route.tokens);
        let call = Call { node: &self.node, partition, rules, tokens, deadline };
        match op {
            Op::Get(get) => call.get(get).await.map(Answer::Get),
            Op::BatchGet(get) => call.batch_get(get).await.map(Answer::BatchGet),
            Op::Scan(scan) => call.scan(scan).await.map(Answer::Scan),
            Op::Count(count) => call.count(count).await.map(Answer::Count),
            Op::Put(_)
            | Op::Delete(_)
            | Op::CompareAndSet(_)
            | Op::Increment(_)
            | Op::Write(_)
            | Op::DeleteRange(_) => call.write(op).await,
            Op::OpenSession(_) => unreachable!("answered above"),
        }
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
    async fn reach(&self, options: Option<v1::ReadOptions>) -> Result<ReadPoint, Error> {
        let choice = Choice::of(options.unwrap_or_default())?;
        super::read::reach(self.node, &self.partition, &choice, self.deadline).await
    }

    /// Reads the rows at the point reached, from a key on, and says who served them.
    fn at<T>(
        &self,
        point: &ReadPoint,
        key: &Bytes,
        read: impl FnOnce(&kv::Store) -> Result<T, kv::NotOwned>,
        bytes_of: impl FnOnce(&T) -> u64,
    ) -> Result<(T, v1::ReadInfo), Error> {
        let group = self.partition.group();
        let (value, version, index) =
            group.read(|machine, applied| (read(machine.store()), machine.store().last_version(), applied.index));
        let value = value.map_err(|refusal| Error::from(refusal).hint(self.node.hint(self.partition.id)))?;
        self.partition.counters().read(key, bytes_of(&value));
        let status = group.status();
        telemetry::observe_read(point.level_name(), point.role_name());
        let map = self.node.routing().map();
        let epoch = map.partition(self.partition.id).map(|partition| partition.epoch).unwrap_or_default();
        let info = v1::ReadInfo {
            partition: self.partition.id.0,
            epoch: Some(v1::Epoch { bounds: epoch.bounds, members: epoch.members }),
            term: status.term,
            applied_index: index,
            node: self.node.id().0,
            role: point.role as i32,
            consistency: point.level as i32,
            staleness: Some(point.staleness_to_pb()),
            session_token: SessionToken::of(self.partition.id, Seen { index, version }).encode(),
            degraded: false,
            scan: None,
        };
        Ok((value, info))
    }

    async fn get(&self, get: v1::GetRequest) -> Result<v1::GetReply, Error> {
        let key = self.rules.key(get.key)?;
        let point = self.reach(get.options).await?;
        let (row, read) = self.at(&point, &key, |store| store.get(&key), |row| row.as_ref().map_or(0, value_bytes))?;
        Ok(get_reply(key, row, read))
    }

    async fn batch_get(&self, get: v1::BatchGetRequest) -> Result<v1::BatchGetReply, Error> {
        query::check_items("keys", get.keys.len())?;
        let keys = get.keys.into_iter().map(|key| self.rules.key(key)).collect::<Result<Vec<_>, _>>()?;
        let point = self.reach(get.options).await?;
        let (rows, read) = self.at(
            &point,
            keys.first().unwrap_or(&Bytes::new()),
            |store| keys.iter().map(|key| store.get(key)).collect::<Result<Vec<_>, _>>(),
            |rows| rows.iter().flatten().map(value_bytes).sum(),
        )?;
        let items = keys.into_iter().zip(rows).map(|(key, row)| get_reply(key, row, read.clone())).collect();
        Ok(v1::BatchGetReply { items })
    }

    async fn scan(&self, scan: v1::ScanRequest) -> Result<v1::ScanReply, Error> {
        let span = self.rules.span(scan.range.as_ref())?;
        query::check_scan(&scan)?;
        let page_rows = if scan.page_rows == 0 { query::PAGE_ROWS_DEFAULT } else { scan.page_rows } as u64;
        let limit = scan.limit.unwrap_or(page_rows).min(page_rows);
        let reverse = scan.order() == v1::Order::Descending;
        let point = self.reach(scan.options).await?;
        let spec = ScanSpec {
            span,
            tokens: self.tokens,
            reverse,
            rows_max: limit,
            bytes_max: PAGE_BYTES_MAX,
            keys_only: scan.keys_only,
            count_only: false,
        };
        let mut bytes = 0;
        let measure = |page: &kv::Page| {
            bytes = page.rows.iter().map(|(key, row)| key.len() as u64 + value_bytes(row)).sum();
            bytes
        };
        let (page, mut read) = self.at(&point, &spec.span.start, |store| store.scan(&spec), measure)?;
        let (rows, rows_scanned) = (page.rows.len() as u64, page.looked);
        read.scan = Some(v1::ScanCost { rows, rows_scanned, bytes, ..Default::default() });
        metrics::counter!(telemetry::SCAN_ROWS_RETURNED_TOTAL).increment(page.rows.len() as u64);
        let rows = page.rows.into_iter().map(|(key, row)| v1::Row { key, value: row.value, version: row.version });
        Ok(v1::ScanReply {
            rows: rows.collect(),
            next_page_token: Bytes::new(),
            reads: vec![read],
            missing: Vec::new(),
            covered: Some(convert::covered_to_pb(&page.covered, page.covered_tokens)),
        })
    }

    async fn count(&self, count: v1::CountRequest) -> Result<v1::CountReply, Error> {
        let span = self.rules.span(count.range.as_ref())?;
        let point = self.reach(count.options).await?;
        let spec = ScanSpec {
            span,
            tokens: self.tokens,
            reverse: false,
            rows_max: u64::MAX,
            bytes_max: u64::MAX,
            keys_only: true,
            count_only: true,
        };
        let (page, read) = self.at(&point, &spec.span.start, |store| store.scan(&spec), |_| 0)?;
        let covered = convert::covered_to_pb(&page.covered, page.covered_tokens);
        Ok(v1::CountReply { count: page.count, reads: vec![read], covered: Some(covered) })
    }

    async fn write(&self, op: Op) -> Result<Answer, Error> {
        let is_batch = matches!(op, Op::Write(_));
        let write = self.rules.write(op, self.tokens)?.ok_or_else(unknown_op)?;
        let keys = convert::keys_of(&write.op);
        let written = self.partition.write(write, self.deadline).await.map_err(|error| {
            if error.reason == Reason::NotLeader && error.hint.is_none() {
                return error.hint(self.node.hint(self.partition.id));
            }
            error
        })?;
        let replayed = written.reply.replayed;
        if replayed {
            metrics::counter!(telemetry::DEDUPE_HITS_TOTAL).increment(1);
        }
        let done = written.reply.answer.map_err(|refusal| {
            let error = Error::from(refusal);
            if error.reason == Reason::WrongPartition { error.hint(self.node.hint(self.partition.id)) } else { error }
        })?;
        let info = |version| self.write_info(written.at, version, replayed);
        Ok(match done {
            kv::Done::Single(single) if !is_batch => {
                let info = info(single.version);
                Answer::Write(convert::written_to_pb(&keys[0], single, info))
            }
            kv::Done::Single(_) => unreachable!("a batch is answered as a batch"),
            kv::Done::Batch { applied, items } => {
                let item = |(key, written): (&Bytes, kv::Written)| {
                    let info = info(written.version);
                    let write = convert::written_to_pb(key, written, info);
                    v1::BatchItemReply { result: Some(v1::batch_item_reply::Result::Write(write)) }
                };
                Answer::Batch(v1::BatchReply { applied, items: keys.iter().zip(items).map(item).collect() })
            }
            kv::Done::DeleteRange(deleted) => Answer::DeleteRange(v1::DeleteRangeReply {
                deleted: deleted.count,
                infos: vec![info(0)],
                covered: Some(convert::covered_to_pb(&deleted.covered, deleted.covered_tokens)),
            }),
        })
    }

    fn write_info(&self, at: crate::raft::LogPosition, version: u64, replayed: bool) -> v1::WriteInfo {
        let map = self.node.routing().map();
        let epoch = map.partition(self.partition.id).map(|partition| partition.epoch).unwrap_or_default();
        let seen = Seen { index: at.index - u64::from(planted(Bug::WriteTokenEarly)), version };
        v1::WriteInfo {
            partition: self.partition.id.0,
            epoch: Some(v1::Epoch { bounds: epoch.bounds, members: epoch.members }),
            term: at.term,
            log_index: at.index,
            node: self.node.id().0,
            replayed,
            session_token: SessionToken::of(self.partition.id, seen).encode(),
        }
    }
}

fn value_bytes(row: &kv::Row) -> u64 {
    row.value.len() as u64
}

fn get_reply(key: Bytes, row: Option<kv::Row>, read: v1::ReadInfo) -> v1::GetReply {
    let row = row.map(|row| v1::Row { key, value: row.value, version: row.version });
    v1::GetReply { found: row.is_some(), row, read: Some(read) }
}
