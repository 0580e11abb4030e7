//! Operations that write, each built step by step and run by `.await`.

use super::{
    Error, Keyspace, Session,
    keys::{IntoBytes, IntoKey, KeyType, Row},
    reads::{Running, into_future},
    router::mismatched,
};
use crate::proto::v1::{self, batch_item, batch_item_reply, condition::Must, reply, request};
use bytes::Bytes;
use std::{future::IntoFuture, time::Duration};

/// What must hold of a row for a write to happen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    /// There is no such row.
    Absent,
    /// There is one.
    Present,
    /// There is one with exactly this version.
    Version(u64),
    /// There is one with exactly this value.
    Value(Bytes),
}

impl Expected {
    /// A row with exactly this value.
    pub fn value(value: impl IntoBytes) -> Self {
        Self::Value(value.into_bytes())
    }

    fn into_pb(self) -> Option<v1::Condition> {
        let must = match self {
            Self::Absent => Must::Absent(true),
            Self::Present => Must::Present(true),
            Self::Version(version) => Must::Version(version),
            Self::Value(value) => Must::Value(value),
        };
        Some(v1::Condition { must: Some(must) })
    }
}

/// What a write did. An unmet condition is a result, not an error.
#[derive(Clone, PartialEq, Debug)]
pub struct Written<K: KeyType> {
    /// Whether the write happened; false when its condition did not hold.
    pub applied: bool,
    /// Version of the row now; 0 if there is none.
    pub version: u64,
    /// Whether the row existed before.
    pub existed: bool,
    /// The row before, if asked for and there was one.
    pub previous: Option<Row<K>>,
    /// The number after an increment.
    pub number: Option<i64>,
    /// Who applied it.
    pub info: v1::WriteInfo,
}

impl<K: KeyType> Written<K> {
    fn of_pb(reply: v1::WriteReply) -> Result<Self, Error> {
        Ok(Self {
            applied: reply.applied,
            version: reply.version,
            existed: reply.existed,
            previous: reply.previous.map(Row::of_pb).transpose()?,
            number: reply.number,
            info: reply.info.unwrap_or_default(),
        })
    }
}

/// A write to one key, of the kind `W`.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct Write<K: KeyType, W> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) write: W,
    pub(super) session: Option<Session>,
    pub(super) deadline: Duration,
}

/// Sets a value.
pub type Put<K> = Write<K, v1::PutRequest>;
/// Deletes a row.
pub type Delete<K> = Write<K, v1::DeleteRequest>;
/// Replaces or deletes a row if a condition holds.
pub type CompareAndSet<K> = Write<K, v1::CompareAndSetRequest>;
/// Adds to a number.
pub type Increment<K> = Write<K, v1::IncrementRequest>;

/// The kinds of single writes.
pub trait SingleWrite: Send + 'static {
    /// The field of its keyspace and of its wish for the row before.
    fn fields(&mut self) -> (&mut String, &mut bool);
    /// As a request.
    fn into_op(self) -> request::Op;
}

macro_rules! single_write {
    ($($type:ident => $op:ident;)*) => {
        $(impl SingleWrite for v1::$type {
            fn fields(&mut self) -> (&mut String, &mut bool) {
                (&mut self.keyspace, &mut self.return_previous)
            }

            fn into_op(self) -> request::Op {
                request::Op::$op(self)
            }
        })*
    };
}

single_write! {
    PutRequest => Put;
    DeleteRequest => Delete;
    CompareAndSetRequest => CompareAndSet;
    IncrementRequest => Increment;
}

impl<K: KeyType, W: SingleWrite> Write<K, W> {
    /// Returns the row as it was before.
    pub fn return_previous(mut self) -> Self {
        *self.write.fields().1 = true;
        self
    }

    /// Adds what was written to the session, so that reads in it see it.
    pub fn session(mut self, session: &Session) -> Self {
        self.session = Some(session.clone());
        self
    }

    /// Time for the operation instead of the client's default.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    async fn run(mut self) -> Result<Written<K>, Error> {
        *self.write.fields().0 = self.keyspace.name();
        match self.keyspace.execute(self.write.into_op(), self.deadline).await? {
            reply::Result::Write(reply) => {
                let written = Written::of_pb(reply)?;
                if let Some(session) = &self.session {
                    session.see(&written.info.session_token)?;
                }
                Ok(written)
            }
            _ => Err(mismatched().into()),
        }
    }
}

impl<K: KeyType, W: SingleWrite> IntoFuture for Write<K, W> {
    type Output = Result<Written<K>, Error>;
    type IntoFuture = Running<Written<K>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

macro_rules! condition_methods {
    ($name:ident) => {
        impl<K: KeyType> $name<K> {
            /// Only if this holds; otherwise `applied` is false and nothing has changed.
            pub fn when(mut self, expected: Expected) -> Self {
                self.write.condition = expected.into_pb();
                self
            }

            /// Only if there is such a row.
            pub fn if_present(self) -> Self {
                self.when(Expected::Present)
            }

            /// Only if the row has exactly this version.
            pub fn if_version(self, version: u64) -> Self {
                self.when(Expected::Version(version))
            }

            /// Only if the row has exactly this value.
            pub fn if_value(self, value: impl IntoBytes) -> Self {
                self.when(Expected::value(value))
            }
        }
    };
}

condition_methods!(Put);
condition_methods!(Delete);

impl<K: KeyType> Put<K> {
    /// Only if there is no such row.
    pub fn if_absent(self) -> Self {
        self.when(Expected::Absent)
    }
}

impl<K: KeyType> Delete<K> {
    /// Fails with `NOT_FOUND` if there is no such row; otherwise that is a success with `existed = false`.
    pub fn must_exist(mut self) -> Self {
        self.write.must_exist = true;
        self
    }
}

impl<K: KeyType> CompareAndSet<K> {
    pub(super) fn new(keyspace: Keyspace<K>, key: Bytes, expected: Expected, value: Option<Bytes>) -> Self {
        let condition = expected.into_pb();
        keyspace.write(v1::CompareAndSetRequest { key, condition, value, ..Default::default() })
    }
}

/// Many writes of distinct keys, each on its own or all or nothing.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct Batch<K: KeyType> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) request: v1::BatchRequest,
    pub(super) session: Option<Session>,
    pub(super) deadline: Duration,
}

/// What a batch did.
#[derive(Clone, Debug)]
pub struct BatchWritten<K: KeyType> {
    /// Whether every item was applied.
    pub applied: bool,
    /// One per item, in their order.
    pub items: Vec<Result<Written<K>, Error>>,
}

impl<K: KeyType> Batch<K> {
    /// Sets a value.
    pub fn put(self, key: impl IntoKey<K>, value: impl IntoBytes) -> Self {
        let (key, value) = (key.into_key(), value.into_bytes());
        self.item(batch_item::Op::Put(v1::PutRequest { key, value, ..Default::default() }))
    }

    /// Sets a value if something holds.
    pub fn put_when(self, key: impl IntoKey<K>, expected: Expected, value: impl IntoBytes) -> Self {
        let (key, value, condition) = (key.into_key(), value.into_bytes(), expected.into_pb());
        self.item(batch_item::Op::Put(v1::PutRequest { key, value, condition, ..Default::default() }))
    }

    /// Deletes a row.
    pub fn delete(self, key: impl IntoKey<K>) -> Self {
        self.item(batch_item::Op::Delete(v1::DeleteRequest { key: key.into_key(), ..Default::default() }))
    }

    /// Deletes a row if something holds.
    pub fn delete_when(self, key: impl IntoKey<K>, expected: Expected) -> Self {
        let (key, condition) = (key.into_key(), expected.into_pb());
        self.item(batch_item::Op::Delete(v1::DeleteRequest { key, condition, ..Default::default() }))
    }

    /// Adds to a number.
    pub fn increment(self, key: impl IntoKey<K>, delta: i64) -> Self {
        let key = key.into_key();
        self.item(batch_item::Op::Increment(v1::IncrementRequest { key, delta, ..Default::default() }))
    }

    /// All or nothing: every key must lie in one partition, and if one condition fails nothing is applied.
    pub fn atomic(mut self) -> Self {
        self.request.atomic = true;
        self
    }

    /// Adds what was written to the session.
    pub fn session(mut self, session: &Session) -> Self {
        self.session = Some(session.clone());
        self
    }

    /// Time for the operation instead of the client's default.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Items so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.request.items.len()
    }

    /// Whether there is no item yet. An empty batch is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.request.items.is_empty()
    }

    fn item(mut self, op: batch_item::Op) -> Self {
        self.request.items.push(v1::BatchItem { op: Some(op) });
        self
    }

    async fn run(mut self) -> Result<BatchWritten<K>, Error> {
        self.request.keyspace = self.keyspace.name();
        let reply = match self.keyspace.execute(request::Op::Write(self.request), self.deadline).await? {
            reply::Result::Batch(reply) => reply,
            _ => return Err(mismatched().into()),
        };
        let items: Vec<Result<Written<K>, Error>> = reply.items.into_iter().map(item_of).collect();
        if let Some(session) = &self.session {
            for written in items.iter().flatten() {
                session.see(&written.info.session_token)?;
            }
        }
        Ok(BatchWritten { applied: reply.applied, items })
    }
}

fn item_of<K: KeyType>(item: v1::BatchItemReply) -> Result<Written<K>, Error> {
    match item.result {
        Some(batch_item_reply::Result::Write(reply)) => Written::of_pb(reply),
        Some(batch_item_reply::Result::Error(error)) => Err(crate::error::Error::from(error).into()),
        None => Err(mismatched().into()),
    }
}

into_future!(Batch, BatchWritten<K>);

/// Deletes every row of a range; atomic in each partition, not across them.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct DeleteRange<K: KeyType> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) range: v1::KeyRange,
    pub(super) session: Option<Session>,
    pub(super) deadline: Duration,
}

impl<K: KeyType> DeleteRange<K> {
    /// Adds what was deleted to the session.
    pub fn session(mut self, session: &Session) -> Self {
        self.session = Some(session.clone());
        self
    }

    /// Time for the operation instead of the client's default.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Number of rows deleted.
    async fn run(self) -> Result<u64, Error> {
        let (keyspace, range) = (self.keyspace.name(), Some(self.range));
        let delete = v1::DeleteRangeRequest { keyspace, range, session: None };
        match self.keyspace.execute(request::Op::DeleteRange(delete), self.deadline).await? {
            reply::Result::DeleteRange(reply) => {
                if let Some(session) = &self.session {
                    reply.infos.iter().try_for_each(|info| session.see(&info.session_token))?;
                }
                Ok(reply.deleted)
            }
            _ => Err(mismatched().into()),
        }
    }
}

into_future!(DeleteRange, u64);
