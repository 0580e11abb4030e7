//! Operations of a history as requests of the API, and answers as what a history says of them.

use super::history::{Event, Kind, Mode, Process, ReadMode, Served};
use crate::{
    key::NodeId,
    proto::v1::{self, batch_item, batch_item_reply, condition::Must, reply, request},
};
use bytes::Bytes;
use serde_json::{Value as Json, json};

/// One operation. Keys and values are text.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Op {
    Read { key: String, mode: ReadMode },
    Write { key: String, value: String },
    Cas { key: String, old: Option<String>, new: Option<String> },
    Delete { key: String },
    Incr { key: String, n: i64 },
    Scan(Scan),
    Batch(Vec<Swap>),
}

/// Rows of `[from, to)`, page after page.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Scan {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) limit: Option<u64>,
    pub(crate) page_rows: u32,
    pub(crate) reverse: bool,
    pub(crate) mode: ReadMode,
}

/// One row of an atomic batch: from the value it must have to another.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Swap {
    pub(crate) key: String,
    pub(crate) old: String,
    pub(crate) new: String,
}

impl Op {
    /// How the history puts it when it begins.
    pub(crate) fn event(&self, process: Process) -> Event {
        let (f, key, value, read) = match self {
            Self::Read { key, mode } => ("read", Some(key), Json::Null, Some(*mode)),
            Self::Write { key, value } => ("write", Some(key), json!(value), None),
            Self::Cas { key, old, new } => ("cas", Some(key), json!([old, new]), None),
            Self::Delete { key } => ("delete", Some(key), Json::Null, None),
            Self::Incr { key, n } => ("incr", Some(key), json!(n), None),
            Self::Scan(scan) => ("scan", None, scan.value(), Some(scan.mode)),
            Self::Batch(swaps) => {
                let reads = swaps.iter().map(|swap| json!(["r", swap.key, swap.old]));
                let writes = swaps.iter().map(|swap| json!(["w", swap.key, swap.new]));
                ("batch", None, reads.chain(writes).collect(), None)
            }
        };
        Event { key: key.cloned(), value, read, ..Event::new(process, Kind::Invoke, f) }
    }

    /// The level of a read; none for a write.
    pub(crate) const fn mode(&self) -> Option<ReadMode> {
        match self {
            Self::Read { mode, .. } | Self::Scan(Scan { mode, .. }) => Some(*mode),
            _ => None,
        }
    }

    /// As a request; `token` is what the session has seen, `page_token` where a scan goes on.
    pub(crate) fn request(
        &self,
        keyspace: &str,
        session: Option<v1::WriteSession>,
        token: Bytes,
        page_token: Bytes,
    ) -> v1::Request {
        let keyspace = keyspace.to_owned();
        let op = match self.clone() {
            Self::Read { key, mode } => {
                let options = Some(options_of(mode, token));
                request::Op::Get(v1::GetRequest { keyspace, key: key.into(), options })
            }
            Self::Scan(scan) => request::Op::Scan(scan.request(keyspace, token, page_token)),
            Self::Write { key, value } => {
                let (key, value) = (key.into(), value.into());
                request::Op::Put(v1::PutRequest { keyspace, key, value, session, ..Default::default() })
            }
            Self::Cas { key, old, new } => request::Op::CompareAndSet(v1::CompareAndSetRequest {
                keyspace,
                key: key.into(),
                condition: Some(condition(old)),
                value: new.map(Into::into),
                return_previous: true,
                session,
            }),
            Self::Delete { key } => {
                let key = key.into();
                request::Op::Delete(v1::DeleteRequest { keyspace, key, session, ..Default::default() })
            }
            Self::Incr { key, n } => {
                let (key, delta) = (key.into(), n);
                request::Op::Increment(v1::IncrementRequest { keyspace, key, delta, session, ..Default::default() })
            }
            Self::Batch(swaps) => {
                let items = swaps.into_iter().map(Swap::item).collect();
                request::Op::Write(v1::BatchRequest { keyspace, items, atomic: true, session })
            }
        };
        v1::Request { op: Some(op), ..Default::default() }
    }
}

impl Scan {
    fn value(&self) -> Json {
        json!({
            "from": self.from,
            "to": self.to,
            "limit": self.limit,
            "page": self.page_rows,
            "reverse": self.reverse,
        })
    }

    fn request(self, keyspace: String, token: Bytes, page_token: Bytes) -> v1::ScanRequest {
        let bound = |key: String, inclusive| Some(v1::Bound { key: key.into(), inclusive });
        let order = if self.reverse { v1::Order::Descending } else { v1::Order::Ascending };
        v1::ScanRequest {
            keyspace,
            range: Some(v1::KeyRange { lower: bound(self.from, true), upper: bound(self.to, false) }),
            order: order as i32,
            limit: self.limit,
            page_rows: self.page_rows,
            page_token,
            options: Some(options_of(self.mode, token)),
            ..Default::default()
        }
    }
}

impl Swap {
    fn item(self) -> v1::BatchItem {
        let (key, value, condition) = (self.key.into(), self.new.into(), Some(condition(Some(self.old))));
        let put = v1::PutRequest { key, value, condition, ..Default::default() };
        v1::BatchItem { op: Some(batch_item::Op::Put(put)) }
    }
}

fn condition(old: Option<String>) -> v1::Condition {
    let must = old.map_or(Must::Absent(true), |old| Must::Value(old.into()));
    v1::Condition { must: Some(must) }
}

fn options_of(read: ReadMode, token: Bytes) -> v1::ReadOptions {
    let (consistency, session_token) = match read.mode {
        Mode::Linearizable => (v1::Consistency::Linearizable, Bytes::new()),
        Mode::Lease => (v1::Consistency::Lease, Bytes::new()),
        Mode::Bounded => (v1::Consistency::Bounded, Bytes::new()),
        Mode::Session => (v1::Consistency::Session, token),
        Mode::Eventual => (v1::Consistency::Eventual, Bytes::new()),
    };
    let (consistency, max_staleness_ms) = (consistency as i32, read.bound_ms.unwrap_or(0));
    v1::ReadOptions { consistency, max_staleness_ms, session_token, ..Default::default() }
}

/// A node as histories name it.
pub(crate) fn name_of(node: u64) -> Option<String> {
    (node != 0).then(|| NodeId(node).to_string())
}

/// Who served a read.
pub(crate) fn served(read: &v1::ReadInfo, version: Option<u64>) -> Served {
    let role = match read.role() {
        v1::Role::Leader => Some("leader"),
        v1::Role::Follower => Some("follower"),
        v1::Role::Learner => Some("learner"),
        v1::Role::Unspecified => None,
    };
    let lag_ms = match read.staleness.and_then(|staleness| staleness.known) {
        Some(v1::staleness::Known::None(_)) => Some(0),
        Some(v1::staleness::Known::AtMostUs(us)) => Some(us.div_ceil(1_000)),
        Some(v1::staleness::Known::Unknown(_)) | None => None,
    };
    Served {
        node: name_of(read.node),
        part: Some(read.partition),
        epoch: read.epoch.map(|epoch| epoch.bounds),
        term: Some(read.term),
        log: Some(read.applied_index),
        role: role.map(str::to_owned),
        lag_ms,
        version,
        degraded: read.degraded.then_some(true),
    }
}

/// Who served a read that was put together from several: the first, but as stale as the stalest.
pub(crate) fn served_all(parts: impl IntoIterator<Item = Served>) -> Option<Served> {
    parts.into_iter().reduce(|first, next| Served {
        lag_ms: first.lag_ms.zip(next.lag_ms).map(|(one, other)| one.max(other)),
        degraded: first.degraded.or(next.degraded),
        ..first
    })
}

fn served_write(reply: &v1::WriteReply) -> Option<Served> {
    let info = reply.info.as_ref()?;
    Some(Served {
        node: name_of(info.node),
        part: Some(info.partition),
        epoch: info.epoch.map(|epoch| epoch.bounds),
        term: Some(info.term),
        log: Some(info.log_index),
        role: Some("leader".to_owned()),
        version: Some(reply.version),
        ..Served::default()
    })
}

/// What a write's answer says.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) applied: bool,
    pub(crate) number: Option<i64>,
    /// The row before.
    pub(crate) previous: Option<Bytes>,
    pub(crate) srv: Option<Served>,
    pub(crate) token: Bytes,
}

impl Written {
    /// None if it is not the answer to a write.
    pub(crate) fn of(result: reply::Result) -> Option<Self> {
        let (applied, first) = match result {
            reply::Result::Write(reply) => (reply.applied, reply),
            reply::Result::Batch(batch) => match batch.items.into_iter().next()?.result? {
                batch_item_reply::Result::Write(reply) => (batch.applied, reply),
                batch_item_reply::Result::Error(_) => return None,
            },
            _ => return None,
        };
        let srv = served_write(&first);
        let token = first.info.map(|info| info.session_token).unwrap_or_default();
        Some(Self { applied, number: first.number, previous: first.previous.map(|row| row.value), srv, token })
    }
}
