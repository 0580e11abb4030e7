//! The client, its keyspace handles and its sessions.

use super::{
    Admin, Error,
    keys::{IntegerKeys, IntoBytes, IntoKey, IntoRange, KeyType, RawKeys},
    reads::{Count, Get, GetMany, ReadChoice, Scan},
    remote::Remote,
    router::Router,
    token::SessionToken,
    writes::{Batch, CompareAndSet, Delete, DeleteRange, Expected, Increment, Put, SingleWrite, Write},
};
use crate::{
    env,
    proto::v1::{self, reply, request},
};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};
use tokio::{task::JoinHandle, time::Instant};

/// Time for an operation when nothing else is said.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(5);

/// A connection to a cluster. Cheap to clone; the clones share everything. Must be used inside a Tokio runtime.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    router: Router<Arc<Remote>>,
    watching: JoinHandle<()>,
    deadline: Duration,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("deadline", &self.shared.deadline).finish_non_exhaustive()
    }
}

/// Settings of a [`Client`].
#[derive(Clone, Debug)]
#[must_use = "nothing happens before connect()"]
pub struct Builder {
    addresses: Vec<String>,
    deadline: Duration,
    connect_deadline: Duration,
}

impl Builder {
    /// Time for an operation (of a scan: for each page) that does not say; 5 s by default.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Time for a first node to answer; 5 s by default.
    pub fn connect_deadline(mut self, deadline: Duration) -> Self {
        self.connect_deadline = deadline;
        self
    }

    /// Connects: waits until one of the nodes has answered. A cluster that has not been formed yet answers too, so that
    /// [`Admin::init`] can form it.
    ///
    /// # Errors
    /// `INVALID_FIELD` for a malformed address or none; `UNREACHABLE` when no node answered in time.
    pub async fn connect(self) -> Result<Client, Error> {
        if self.addresses.is_empty() {
            return Err(crate::error::Error::field("addresses", "give the address of at least one node").into());
        }
        for address in &self.addresses {
            super::pipeline::endpoint(address)?;
        }
        let remote = Remote::new(self.addresses);
        let shared = Shared {
            watching: env::spawn(Arc::clone(&remote).watch()),
            router: Router::new(Arc::clone(&remote)),
            deadline: self.deadline,
        };
        let client = Client { shared: Arc::new(shared) };
        remote.wait_contact(Instant::now() + self.connect_deadline).await?;
        Ok(client)
    }
}

impl Client {
    /// Connects through any of these nodes (`host:port`); the others are learned.
    ///
    /// # Errors
    /// As of [`Builder::connect`].
    pub async fn connect<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self, Error> {
        Self::builder(addresses).connect().await
    }

    /// Settings for a connection through any of these nodes.
    pub fn builder<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Builder {
        let addresses = addresses.into_iter().map(Into::into).collect();
        Builder { addresses, deadline: DEADLINE_DEFAULT, connect_deadline: DEADLINE_DEFAULT }
    }

    /// A keyspace whose keys are bytes. Nothing is asked of the cluster yet.
    #[must_use]
    pub fn keyspace(&self, name: impl Into<String>) -> Keyspace<RawKeys> {
        Keyspace { client: self.clone(), name: Arc::new(name.into()), kind: PhantomData }
    }

    /// A keyspace whose keys are integers in `[0, M)`. Nothing is asked of the cluster yet.
    #[must_use]
    pub fn integer_keyspace(&self, name: impl Into<String>) -> Keyspace<IntegerKeys> {
        Keyspace { client: self.clone(), name: Arc::new(name.into()), kind: PhantomData }
    }

    /// A session that has seen nothing yet.
    #[must_use]
    pub fn session(&self) -> Session {
        Session::default()
    }

    /// Running the cluster.
    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// Executes a request of the API as it is: for tools that speak it themselves.
    ///
    /// # Errors
    /// Of the catalogue.
    pub async fn execute(&self, mut op: request::Op, deadline: Duration) -> Result<reply::Result, Error> {
        Ok(self.shared.router.execute_op(&mut op, Instant::now() + deadline).await?)
    }

    pub(crate) fn router(&self) -> &Router<Arc<Remote>> {
        &self.shared.router
    }

    pub(super) fn remote(&self) -> &Remote {
        self.shared.router.caller()
    }

    pub(super) fn deadline(&self) -> Duration {
        self.shared.deadline
    }
}

/// A handle to one keyspace. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keyspace<K: KeyType = RawKeys> {
    client: Client,
    name: Arc<String>,
    kind: PhantomData<K>,
}

impl<K: KeyType> Keyspace<K> {
    /// Reads one row.
    pub fn get(&self, key: impl IntoKey<K>) -> Get<K> {
        let (key, read) = (key.into_key(), ReadChoice::default());
        Get { keyspace: self.clone(), key, read, deadline: self.client.deadline() }
    }

    /// Reads many rows, each at its own moment.
    pub fn get_many<Q: IntoKey<K>>(&self, keys: impl IntoIterator<Item = Q>) -> GetMany<K> {
        let (keys, read) = (keys.into_iter().map(IntoKey::into_key).collect(), ReadChoice::default());
        GetMany { keyspace: self.clone(), keys, read, deadline: self.client.deadline() }
    }

    /// Sets a value.
    pub fn put(&self, key: impl IntoKey<K>, value: impl IntoBytes) -> Put<K> {
        let (key, value) = (key.into_key(), value.into_bytes());
        self.write(v1::PutRequest { key, value, ..Default::default() })
    }

    /// Deletes a row.
    pub fn delete(&self, key: impl IntoKey<K>) -> Delete<K> {
        self.write(v1::DeleteRequest { key: key.into_key(), ..Default::default() })
    }

    /// Sets a value if something holds of the row.
    pub fn compare_and_set(&self, key: impl IntoKey<K>, expected: Expected, value: impl IntoBytes) -> CompareAndSet<K> {
        CompareAndSet::new(self.clone(), key.into_key(), expected, Some(value.into_bytes()))
    }

    /// Deletes a row if something holds of it.
    pub fn compare_and_delete(&self, key: impl IntoKey<K>, expected: Expected) -> CompareAndSet<K> {
        CompareAndSet::new(self.clone(), key.into_key(), expected, None)
    }

    /// Adds to a number kept as decimal text; an absent row counts as 0.
    pub fn increment(&self, key: impl IntoKey<K>, delta: i64) -> Increment<K> {
        self.write(v1::IncrementRequest { key: key.into_key(), delta, ..Default::default() })
    }

    /// Begins a batch.
    pub fn batch(&self) -> Batch<K> {
        let request = v1::BatchRequest::default();
        Batch { keyspace: self.clone(), request, session: None, deadline: self.client.deadline() }
    }

    /// Deletes every row of a range.
    pub fn delete_range(&self, range: impl IntoRange<K>) -> DeleteRange<K> {
        let (range, deadline) = (range.into_range(), self.client.deadline());
        DeleteRange { keyspace: self.clone(), range, session: None, deadline }
    }

    /// Reads a range in key order.
    pub fn scan(&self, range: impl IntoRange<K>) -> Scan<K> {
        self.scan_of(v1::ScanRequest { range: Some(range.into_range()), ..Default::default() })
    }

    /// Counts the rows of a range.
    pub fn count(&self, range: impl IntoRange<K>) -> Count<K> {
        let (range, read) = (range.into_range(), ReadChoice::default());
        Count { keyspace: self.clone(), range, read, deadline: self.client.deadline() }
    }

    pub(super) fn write<W: SingleWrite>(&self, write: W) -> Write<K, W> {
        Write { keyspace: self.clone(), write, session: None, deadline: self.client.deadline() }
    }

    fn scan_of(&self, request: v1::ScanRequest) -> Scan<K> {
        let (read, deadline) = (ReadChoice::default(), self.client.deadline());
        Scan { keyspace: self.clone(), request, read, deadline }
    }

    pub(super) fn name(&self) -> String {
        self.name.as_str().to_owned()
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) async fn execute(&self, op: request::Op, deadline: Duration) -> Result<reply::Result, Error> {
        self.client.execute(op, deadline).await
    }
}

impl Keyspace<RawKeys> {
    /// Reads every row whose key begins with these bytes, in key order.
    pub fn scan_prefix(&self, prefix: impl IntoBytes) -> Scan<RawKeys> {
        self.scan_of(v1::ScanRequest { prefix: prefix.into_bytes(), ..Default::default() })
    }
}

/// What one user of the data has seen, so that its reads from any replica never go back behind its own writes and
/// earlier reads. Cheap to clone; the clones share what was seen.
#[derive(Clone, Debug, Default)]
pub struct Session {
    seen: Arc<Mutex<SessionToken>>,
}

impl Session {
    /// A session that has seen what a token says, e.g. one handed over by another process.
    ///
    /// # Errors
    /// When the token is damaged.
    pub fn from_token(token: impl IntoBytes) -> Result<Self, Error> {
        let seen = SessionToken::decode(token.into_bytes())?;
        Ok(Self { seen: Arc::new(Mutex::new(seen)) })
    }

    /// What was seen, to be handed to another process.
    #[must_use]
    pub fn token(&self) -> Bytes {
        self.seen.lock().encode()
    }

    pub(super) fn see(&self, token: &Bytes) -> Result<(), Error> {
        let news = SessionToken::decode(token.clone())?;
        self.seen.lock().join(&news);
        Ok(())
    }
}
