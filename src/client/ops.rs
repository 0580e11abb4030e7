//! Operations, each built step by step and run by `.await`.

use super::{
    Error, Keyspace, Session,
    keys::{IntoBytes, IntoKey, KeyType, Row},
};
use crate::proto::v1::{self, batch_item, batch_item_reply, condition::Must, reply, request};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use std::{
    future::{Future, IntoFuture},
    pin::Pin,
    time::Duration,
};

/// The future of an operation.
pub type Running<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// How fresh a read must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Consistency {
    /// Sees every write acknowledged before the read began. Assumes nothing about clocks.
    #[default]
    Linearizable,
    /// The same from the leader's lease; assumes bounded drift of clock rates.
    Lease,
    /// Misses no write acknowledged more than this long before the read began (at least 1 ms). Any replica.
    Bounded(Duration),
    /// Some past state of the partition, from any replica, also without a quorum.
    Eventual,
}

/// How a read is to be made.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadChoice {
    options: v1::ReadOptions,
    session: Option<Session>,
}

impl ReadChoice {
    fn set(&mut self, consistency: Consistency) {
        let (level, staleness) = match consistency {
            Consistency::Linearizable => (v1::Consistency::Linearizable, Duration::ZERO),
            Consistency::Lease => (v1::Consistency::Lease, Duration::ZERO),
            Consistency::Bounded(staleness) => (v1::Consistency::Bounded, staleness),
            Consistency::Eventual => (v1::Consistency::Eventual, Duration::ZERO),
        };
        self.options.consistency = level as i32;
        self.options.max_staleness_ms = u64::try_from(staleness.as_millis()).unwrap_or(u64::MAX);
    }

    /// The options as sent, with what the session has seen by now.
    fn to_pb(&self) -> Option<v1::ReadOptions> {
        let mut options = self.options.clone();
        if let Some(session) = &self.session {
            options.session_token = session.token();
        }
        Some(options)
    }

    fn saw<'a>(&self, reads: impl IntoIterator<Item = &'a v1::ReadInfo>) -> Result<(), Error> {
        let Some(session) = &self.session else { return Ok(()) };
        reads.into_iter().try_for_each(|read| session.see(&read.session_token))
    }
}

macro_rules! read_methods {
    ($name:ident) => {
        impl<K: KeyType> $name<K> {
            /// How fresh the answer must be; linearizable if not said.
            #[must_use]
            pub fn consistency(mut self, consistency: Consistency) -> Self {
                self.read.set(consistency);
                self
            }

            /// Reads at least what this session has seen, from any replica, and adds what is seen now to it.
            #[must_use]
            pub fn session(mut self, session: &Session) -> Self {
                self.read.options.consistency = v1::Consistency::Session as i32;
                self.read.session = Some(session.clone());
                self
            }

            /// Answers as eventual if the chosen freshness cannot be had; the answer's `degraded` says so.
            #[must_use]
            pub fn or_degrade(mut self) -> Self {
                self.read.options.on_unavailable = v1::OnUnavailable::Degrade as i32;
                self
            }

            /// Time for the whole operation (of a scan: for each page) instead of the client's default.
            #[must_use]
            pub fn deadline(mut self, deadline: Duration) -> Self {
                self.deadline = deadline;
                self
            }
        }
    };
}

read_methods!(Get);
read_methods!(GetMany);
read_methods!(Count);
read_methods!(Scan);

macro_rules! into_future {
    ($name:ident, $output:ty) => {
        impl<K: KeyType> IntoFuture for $name<K> {
            type Output = Result<$output, Error>;
            type IntoFuture = Running<$output>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(self.run())
            }
        }
    };
}

/// Reads one row: `None` if there is none.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct Get<K: KeyType> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) key: Bytes,
    pub(super) read: ReadChoice,
    pub(super) deadline: Duration,
}

impl<K: KeyType> Get<K> {
    /// For eventual reads: whether a replica that has no such row asks others before it answers "none". On by default.
    pub fn confirm_absent(mut self, confirm: bool) -> Self {
        self.read.options.confirm_absent = Some(confirm);
        self
    }

    /// The row, and who served it how fresh.
    ///
    /// # Errors
    /// As of the operation itself.
    pub async fn with_info(self) -> Result<(Option<Row<K>>, v1::ReadInfo), Error> {
        let get = v1::GetRequest { keyspace: self.keyspace.name(), key: self.key, options: self.read.to_pb() };
        match self.keyspace.execute(request::Op::Get(get), self.deadline).await? {
            reply::Result::Get(reply) => {
                self.read.saw(&reply.read)?;
                Ok((reply.row.map(Row::of_pb).transpose()?, reply.read.unwrap_or_default()))
            }
            _ => Err(super::router::mismatched().into()),
        }
    }

    async fn run(self) -> Result<Option<Row<K>>, Error> {
        Ok(self.with_info().await?.0)
    }
}

into_future!(Get, Option<Row<K>>);

/// Reads many rows, in the order asked.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct GetMany<K: KeyType> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) keys: Vec<Bytes>,
    pub(super) read: ReadChoice,
    pub(super) deadline: Duration,
}

impl<K: KeyType> GetMany<K> {
    async fn run(self) -> Result<Vec<Option<Row<K>>>, Error> {
        let get = v1::BatchGetRequest { keyspace: self.keyspace.name(), keys: self.keys, options: self.read.to_pb() };
        match self.keyspace.execute(request::Op::BatchGet(get), self.deadline).await? {
            reply::Result::BatchGet(reply) => {
                self.read.saw(reply.items.iter().flat_map(|item| &item.read))?;
                reply.items.into_iter().map(|item| item.row.map(Row::of_pb).transpose()).collect()
            }
            _ => Err(super::router::mismatched().into()),
        }
    }
}

into_future!(GetMany, Vec<Option<Row<K>>>);

/// Counts the rows of a range.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct Count<K: KeyType> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) range: v1::KeyRange,
    pub(super) read: ReadChoice,
    pub(super) deadline: Duration,
}

impl<K: KeyType> Count<K> {
    async fn run(self) -> Result<u64, Error> {
        let count = v1::CountRequest {
            keyspace: self.keyspace.name(),
            range: Some(self.range),
            options: self.read.to_pb(),
            ..Default::default()
        };
        match self.keyspace.execute(request::Op::Count(count), self.deadline).await? {
            reply::Result::Count(reply) => {
                self.read.saw(&reply.reads)?;
                Ok(reply.count)
            }
            _ => Err(super::router::mismatched().into()),
        }
    }
}

into_future!(Count, u64);

/// Reads a range in key order. Each partition is read at the chosen freshness at its own moment: the whole is not one
/// snapshot.
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct Scan<K: KeyType> {
    pub(super) keyspace: Keyspace<K>,
    pub(super) request: v1::ScanRequest,
    pub(super) read: ReadChoice,
    pub(super) deadline: Duration,
}

/// One page of a scan.
#[derive(Clone, Debug)]
pub struct Page<K: KeyType> {
    /// Rows in the order asked for; a page may be empty and still not be the last.
    pub rows: Vec<Row<K>>,
    /// Who served it how fresh, one per partition read.
    pub reads: Vec<v1::ReadInfo>,
    /// Intervals left out, with [`Scan::skip_unavailable`].
    pub missing: Vec<v1::MissingRange>,
    /// Where a later scan can go on ([`Scan::page_token`]); empty at the end.
    pub next: Bytes,
}

impl<K: KeyType> Scan<K> {
    /// Largest key first; the bounds mean the same.
    pub fn reverse(mut self) -> Self {
        self.request.order = v1::Order::Descending as i32;
        self
    }

    /// At most this many rows in all (at least 1); every row if not said.
    pub fn limit(mut self, rows: u64) -> Self {
        self.request.limit = Some(rows);
        self
    }

    /// Leaves the values out.
    pub fn keys_only(mut self) -> Self {
        self.request.keys_only = true;
        self
    }

    /// At most this many rows per page, 1,000 if not said.
    pub fn page_rows(mut self, rows: u32) -> Self {
        self.request.page_rows = rows;
        self
    }

    /// Goes on where an earlier, equal scan left off.
    pub fn page_token(mut self, token: impl IntoBytes) -> Self {
        self.request.page_token = token.into_bytes();
        self
    }

    /// Leaves out partitions that cannot answer and reports them in [`Page::missing`], instead of failing.
    pub fn skip_unavailable(mut self) -> Self {
        self.request.on_partition_failure = v1::OnPartitionFailure::Skip as i32;
        self
    }

    /// The pages, one after the other. After an error the stream ends.
    pub fn pages(mut self) -> impl Stream<Item = Result<Page<K>, Error>> + Send + Unpin + use<K> {
        self.request.keyspace = self.keyspace.name();
        self.request.options = self.read.to_pb();
        let read = self.read;
        let pages = self.keyspace.client().router().scan_pages(self.request, self.deadline);
        Box::pin(pages.map(move |page| {
            let page = page?;
            read.saw(&page.reads)?;
            let rows: Result<Vec<Row<K>>, Error> = page.rows.into_iter().map(Row::of_pb).collect();
            Ok(Page { rows: rows?, reads: page.reads, missing: page.missing, next: page.next_page_token })
        }))
    }

    /// The rows, fetched page by page as they are taken. After an error the stream ends.
    pub fn rows(self) -> impl Stream<Item = Result<Row<K>, Error>> + Send + Unpin + use<K> {
        Box::pin(self.pages().map_ok(|page| stream::iter(page.rows).map(Ok)).try_flatten())
    }

    async fn run(self) -> Result<Vec<Row<K>>, Error> {
        self.pages()
            .try_fold(Vec::new(), |mut rows, page| async move {
                rows.extend(page.rows);
                Ok(rows)
            })
            .await
    }
}

into_future!(Scan, Vec<Row<K>>);

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
            _ => Err(super::router::mismatched().into()),
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
            _ => return Err(super::router::mismatched().into()),
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
        None => Err(super::router::mismatched().into()),
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
            _ => Err(super::router::mismatched().into()),
        }
    }
}

into_future!(DeleteRange, u64);
