//! The cluster as the commands see it: the client library, one method per call of the API, errors as [`Error`].
//!
//! Invariant: every call has a deadline; a command that reads the state of the cluster never takes longer than that.

use super::{options::Options, text::KeyText};
use crate::{
    client::Client,
    error::{Error, Reason},
    key::KeyKind,
    proto::v1::{self, reply, request},
};
use std::{future::Future, time::Duration};

/// The keyspace that always exists, with keys of bytes.
const KEYSPACE_DEFAULT: &str = "default";
/// Time to find a first node, however short the deadline of requests.
const CONNECT_MIN: Duration = Duration::from_secs(1);

/// A connection to the cluster.
#[derive(Clone, Debug)]
pub struct Remote {
    client: Client,
    deadline: Duration,
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $reply:ident = $op:ident, $result:ident;)*) => {
        impl Remote {
            $($(#[$doc])*
            ///
            /// # Errors
            /// As the cluster answered, or why it could not be asked.
            pub async fn $name(&self, request: v1::$request) -> Result<v1::$reply, Error> {
                match self.client.execute(request::Op::$op(request), self.deadline).await? {
                    reply::Result::$result(reply) => Ok(reply),
                    _ => Err(Error::new(Reason::Internal, "the answer is not one to this request")),
                }
            })*
        }
    };
}

calls! {
    /// Reads one row.
    get(GetRequest) -> GetReply = Get, Get;
    /// Writes one row.
    put(PutRequest) -> WriteReply = Put, Write;
    /// Deletes one row.
    delete(DeleteRequest) -> WriteReply = Delete, Write;
    /// Replaces or deletes a row under a condition.
    compare_and_set(CompareAndSetRequest) -> WriteReply = CompareAndSet, Write;
    /// Adds to a number.
    increment(IncrementRequest) -> WriteReply = Increment, Write;
    /// Writes many rows.
    write(BatchRequest) -> BatchReply = Write, Batch;
    /// Deletes a range.
    delete_range(DeleteRangeRequest) -> DeleteRangeReply = DeleteRange, DeleteRange;
    /// Reads a page.
    scan(ScanRequest) -> ScanReply = Scan, Scan;
    /// Counts rows.
    count(CountRequest) -> CountReply = Count, Count;
}

impl Remote {
    /// Connects through any of the endpoints.
    ///
    /// # Errors
    /// `UNREACHABLE` naming the endpoints, when none answers.
    pub async fn connect(options: &Options) -> Result<Self, Error> {
        let builder = Client::builder(options.endpoints.clone()).deadline(options.deadline);
        let client = builder.connect_deadline(options.deadline.max(CONNECT_MIN)).connect().await?;
        Ok(Self { client, deadline: options.deadline })
    }

    /// How keys of the keyspace are written.
    ///
    /// # Errors
    /// `KEYSPACE_UNKNOWN`, or why the cluster could not be asked.
    pub async fn key_text(&self, options: &Options) -> Result<KeyText, Error> {
        let kind = match options.keyspace.as_str() {
            KEYSPACE_DEFAULT => KeyKind::Bytes,
            name => kind_of(&self.keyspace(name).await?.keyspace.unwrap_or_default()),
        };
        Ok(KeyText { kind, hex: options.hex })
    }

    /// Forms the cluster.
    ///
    /// # Errors
    /// Why it could not be formed.
    pub async fn init(&self, replicas: u32) -> Result<v1::InitReply, Error> {
        Ok(self.client.admin().init(replicas).await?)
    }

    /// How the cluster is.
    ///
    /// # Errors
    /// Why it could not be asked.
    pub async fn cluster_status(&self) -> Result<v1::ClusterStatusReply, Error> {
        let admin = self.client.admin();
        self.in_time(async move { Ok(admin.status().await?) }).await
    }

    /// The nodes.
    ///
    /// # Errors
    /// Why the cluster could not be asked.
    pub async fn nodes(&self) -> Result<Vec<v1::NodeStatus>, Error> {
        let admin = self.client.admin();
        self.in_time(async move { Ok(admin.nodes().await?) }).await
    }

    /// Drains a node, lets it leave, or takes that back; in a dry run only says what that would mean.
    ///
    /// # Errors
    /// What was refused, or why the cluster could not be asked.
    pub async fn set_node_standing(
        &self,
        node: u64,
        standing: v1::NodeStanding,
        dry_run: bool,
    ) -> Result<v1::SetNodeStandingReply, Error> {
        Ok(self.client.admin().set_node_standing(node, standing, dry_run).await?)
    }

    /// The keyspaces by name.
    ///
    /// # Errors
    /// Why the cluster could not be asked.
    pub async fn keyspaces(&self) -> Result<Vec<v1::Keyspace>, Error> {
        let admin = self.client.admin();
        self.in_time(async move { Ok(admin.keyspaces().await?) }).await
    }

    /// One keyspace, its partitions, and what it survives.
    ///
    /// # Errors
    /// `KEYSPACE_UNKNOWN`, or why the cluster could not be asked.
    pub async fn keyspace(&self, name: &str) -> Result<v1::GetKeyspaceReply, Error> {
        let admin = self.client.admin();
        self.in_time(async move { Ok(admin.keyspace(name).await?) }).await
    }

    /// Cuts a partition in two.
    ///
    /// # Errors
    /// Why it was not cut.
    pub async fn split_partition(&self, request: v1::SplitPartitionRequest) -> Result<v1::SplitPartitionReply, Error> {
        Ok(self.client.admin().split_partition(request).await?)
    }

    /// Makes one of two neighbours.
    ///
    /// # Errors
    /// Why they were not merged.
    pub async fn merge_partition(&self, partition: u64, with: u64) -> Result<v1::MergePartitionReply, Error> {
        Ok(self.client.admin().merge_partition(partition, with).await?)
    }

    /// Goes on with a partition without its quorum, or says what that would lose.
    ///
    /// # Errors
    /// Why it was not done.
    pub async fn recover_partition(
        &self,
        request: v1::RecoverPartitionRequest,
    ) -> Result<v1::RecoverPartitionReply, Error> {
        Ok(self.client.admin().recover_partition(request).await?)
    }

    /// One partition: how it is, and why.
    ///
    /// # Errors
    /// `WRONG_PARTITION`, or why the cluster could not be asked.
    pub async fn explain_partition(&self, partition: u64) -> Result<v1::ExplainPartitionReply, Error> {
        let admin = self.client.admin();
        self.in_time(async move { Ok(admin.explain_partition(partition).await?) }).await
    }

    /// What is wrong, or would be without these nodes.
    ///
    /// # Errors
    /// Why the cluster could not be asked.
    pub async fn diagnose(&self, if_lost: &[u64]) -> Result<v1::DiagnoseReply, Error> {
        let admin = self.client.admin();
        self.in_time(async move { Ok(admin.diagnose(if_lost).await?) }).await
    }

    /// Creates a keyspace.
    ///
    /// # Errors
    /// Why it was not created.
    pub async fn create_keyspace(&self, request: v1::CreateKeyspaceRequest) -> Result<v1::CreateKeyspaceReply, Error> {
        Ok(self.client.admin().create_keyspace(request).await?)
    }

    /// Drops a keyspace; false if there was none.
    ///
    /// # Errors
    /// Why it was not dropped.
    pub async fn drop_keyspace(&self, name: &str) -> Result<bool, Error> {
        Ok(self.client.admin().drop_keyspace(name).await?)
    }

    async fn in_time<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let late =
            |_| Error::new(Reason::DeadlineExceeded, format!("no answer within {} ms", self.deadline.as_millis()));
        tokio::time::timeout(self.deadline, call).await.map_err(late)?
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
