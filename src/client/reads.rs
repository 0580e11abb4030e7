//! Operations that read, each built step by step and run by `.await`.

use super::{
    Error, Keyspace, Session,
    keys::{IntoBytes, KeyType, Row},
    router::mismatched,
};
use crate::proto::v1::{self, reply, request};
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
            pub fn consistency(mut self, consistency: Consistency) -> Self {
                self.read.set(consistency);
                self
            }

            /// Reads at least what this session has seen, from any replica, and adds what is seen now to it.
            pub fn session(mut self, session: &Session) -> Self {
                self.read.options.consistency = v1::Consistency::Session as i32;
                self.read.session = Some(session.clone());
                self
            }

            /// Answers as eventual if the chosen freshness cannot be had; the answer's `degraded` says so.
            pub fn or_degrade(mut self) -> Self {
                self.read.options.on_unavailable = v1::OnUnavailable::Degrade as i32;
                self
            }

            /// Time for the whole operation (of a scan: for each page) instead of the client's default.
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

/// Lets an operation be awaited: by its `run`.
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
pub(super) use into_future;

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
            _ => Err(mismatched().into()),
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
            _ => Err(mismatched().into()),
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
            _ => Err(mismatched().into()),
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
