//! The cluster as the commands see it: one method per call of the API, errors as [`Error`].
//!
//! Invariant: every call has a deadline, and an error of a write always carries its outcome.

use super::{options::Options, text::KeyText};
use crate::{
    error::{Error, Outcome, Reason},
    key::KeyKind,
    proto::{self, v1},
};
use std::{future::Future, time::Duration};
use tonic::transport::{Channel, Endpoint};

/// Time for one attempt to connect.
const CONNECT_MS_MAX: u64 = 1_000;
/// Largest message accepted: a page is cut at 1 MiB, one row may lie above.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// A connection to the cluster.
#[derive(Clone, Debug)]
pub struct Remote {
    channel: Channel,
    deadline: Duration,
}

type Answer<T> = Result<tonic::Response<T>, tonic::Status>;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $reply:ident = $client:ty, $write:literal;)*) => {
        impl Remote {
            $($(#[$doc])*
            ///
            /// # Errors
            /// As the cluster answered, or why it could not be asked.
            pub async fn $name(&self, request: v1::$request) -> Result<v1::$reply, Error> {
                let mut client = <$client>::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
                self.within(client.$name(request), $write).await
            })*
        }
    };
}

type Kv = v1::kv_client::KvClient<Channel>;
type Admin = v1::admin_client::AdminClient<Channel>;
type Topology = v1::topology_client::TopologyClient<Channel>;

calls! {
    /// Reads one row.
    get(GetRequest) -> GetReply = Kv, false;
    /// Writes one row.
    put(PutRequest) -> WriteReply = Kv, true;
    /// Deletes one row.
    delete(DeleteRequest) -> WriteReply = Kv, true;
    /// Replaces or deletes a row under a condition.
    compare_and_set(CompareAndSetRequest) -> WriteReply = Kv, true;
    /// Adds to a number.
    increment(IncrementRequest) -> WriteReply = Kv, true;
    /// Writes many rows.
    write(BatchRequest) -> BatchReply = Kv, true;
    /// Deletes a range.
    delete_range(DeleteRangeRequest) -> DeleteRangeReply = Kv, true;
    /// Reads a page.
    scan(ScanRequest) -> ScanReply = Kv, false;
    /// Counts rows.
    count(CountRequest) -> CountReply = Kv, false;
    /// Forms the cluster.
    init(InitRequest) -> InitReply = Admin, false;
    /// How the cluster is.
    cluster_status(ClusterStatusRequest) -> ClusterStatusReply = Admin, false;
    /// The nodes.
    list_nodes(ListNodesRequest) -> ListNodesReply = Admin, false;
    /// Creates a keyspace.
    create_keyspace(CreateKeyspaceRequest) -> CreateKeyspaceReply = Admin, false;
    /// The keyspaces.
    list_keyspaces(ListKeyspacesRequest) -> ListKeyspacesReply = Admin, false;
    /// One keyspace.
    get_keyspace(GetKeyspaceRequest) -> GetKeyspaceReply = Admin, false;
    /// Drops a keyspace.
    drop_keyspace(DropKeyspaceRequest) -> DropKeyspaceReply = Admin, false;
    /// The partitions of a keyspace.
    list_partitions(ListPartitionsRequest) -> ListPartitionsReply = Topology, false;
    /// The partition of a key.
    locate(LocateRequest) -> LocateReply = Topology, false;
}

impl Remote {
    /// Connects to the first endpoint that answers.
    ///
    /// # Errors
    /// `UNREACHABLE` naming every endpoint and why it failed.
    pub async fn connect(options: &Options) -> Result<Self, Error> {
        let mut faults = Vec::new();
        for address in &options.endpoints {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| Error::new(Reason::Unreachable, format!("{address}: {error}")))?
                .connect_timeout(Duration::from_millis(CONNECT_MS_MAX))
                .tcp_nodelay(true);
            match endpoint.connect().await {
                Ok(channel) => return Ok(Self { channel, deadline: options.deadline }),
                Err(error) => faults.push(format!("{address}: {}", root_cause(&error))),
            }
        }
        Err(Error::new(Reason::Unreachable, format!("no endpoint could be reached: {}", faults.join("; "))))
    }

    /// How keys of this keyspace are written.
    ///
    /// # Errors
    /// `KEYSPACE_UNKNOWN`, or why the cluster could not be asked.
    pub async fn key_text(&self, options: &Options) -> Result<KeyText, Error> {
        let name = options.keyspace.clone();
        let keyspace = self.get_keyspace(v1::GetKeyspaceRequest { name }).await?.keyspace.unwrap_or_default();
        Ok(KeyText { kind: kind_of(&keyspace), hex: options.hex })
    }

    async fn within<T>(&self, call: impl Future<Output = Answer<T>>, write: bool) -> Result<T, Error> {
        let outcome = |error: Error| match (write, error.outcome) {
            (true, None) => error.outcome(Outcome::Unknown),
            _ => error,
        };
        match tokio::time::timeout(self.deadline, call).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(outcome(proto::error_of(&status))),
            Err(_) => Err(outcome(Error::new(
                Reason::DeadlineExceeded,
                format!("no answer within {} ms", self.deadline.as_millis()),
            ))),
        }
    }
}

/// Kind of a keyspace's keys.
#[must_use]
pub fn kind_of(keyspace: &v1::Keyspace) -> KeyKind {
    match keyspace.keys() {
        v1::KeyKind::Integer => KeyKind::Integer { max: keyspace.max },
        v1::KeyKind::Bytes | v1::KeyKind::Unspecified => KeyKind::Bytes,
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
