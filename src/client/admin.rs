//! Running the cluster from the library. Any node answers; every call here may safely be made again.

use super::{Client, Error, pipeline, router::Caller as _};
use crate::proto::v1::{self, admin_client::AdminClient, topology_client::TopologyClient};
use std::{future::Future, time::Duration};
use tokio::time::{Instant, timeout_at};
use tonic::transport::Channel;

/// Creating and dropping keyspaces travels through the placement driver: at least this long, whatever the client's
/// deadline.
const DEADLINE_MIN: Duration = Duration::from_secs(10);
/// How long a new keyspace is waited for in this client's own map.
const SEEN_MAX: Duration = Duration::from_secs(2);

/// Running the cluster.
#[derive(Clone, Debug)]
pub struct Admin {
    client: Client,
}

impl Admin {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Forms the cluster, once; asked again it answers with the cluster that exists. `replicas` is for keyspaces that do
    /// not say otherwise; 0 means 3.
    ///
    /// # Errors
    /// Of the catalogue.
    pub async fn init(&self, replicas: u32) -> Result<v1::InitReply, Error> {
        self.call(|channel| async move { admin(channel).init(v1::InitRequest { replicas }).await }).await
    }

    /// How the cluster is.
    ///
    /// # Errors
    /// Of the catalogue.
    pub async fn status(&self) -> Result<v1::ClusterStatusReply, Error> {
        self.call(|channel| async move { admin(channel).cluster_status(v1::ClusterStatusRequest {}).await }).await
    }

    /// The nodes and their load.
    ///
    /// # Errors
    /// Of the catalogue.
    pub async fn nodes(&self) -> Result<Vec<v1::NodeStatus>, Error> {
        let reply =
            self.call(|channel| async move { admin(channel).list_nodes(v1::ListNodesRequest {}).await }).await?;
        Ok(reply.nodes)
    }

    /// Drains a node, lets it leave, or takes that back; in a dry run only says what stands in the way and what is left.
    ///
    /// # Errors
    /// `NODE_UNKNOWN`; `NODE_REMOVED`; `NODE_NEEDED` with the partitions that cannot do without it.
    pub async fn set_node_standing(
        &self,
        node: u64,
        standing: v1::NodeStanding,
        dry_run: bool,
    ) -> Result<v1::SetNodeStandingReply, Error> {
        let request = v1::SetNodeStandingRequest { node, standing: standing.into(), dry_run };
        self.call(|channel| async move { admin(channel).set_node_standing(request).await }).await
    }

    /// Creates a keyspace, and waits until this client can use it. Asked again with the same settings it answers with the
    /// one that exists.
    ///
    /// # Errors
    /// `KEYSPACE_EXISTS` if there is one with other settings; `NAME_INVALID`; `INVALID_FIELD`.
    pub async fn create_keyspace(&self, request: v1::CreateKeyspaceRequest) -> Result<v1::CreateKeyspaceReply, Error> {
        let request = &request;
        let reply = self.call(|channel| async move { admin(channel).create_keyspace(request.clone()).await }).await?;
        self.wait_seen(&request.name).await;
        Ok(reply)
    }

    /// The keyspaces by name.
    ///
    /// # Errors
    /// Of the catalogue.
    pub async fn keyspaces(&self) -> Result<Vec<v1::Keyspace>, Error> {
        let request = v1::ListKeyspacesRequest {};
        let reply = self.call(|channel| async move { admin(channel).list_keyspaces(request).await }).await?;
        Ok(reply.keyspaces)
    }

    /// One keyspace with its partitions and what it survives.
    ///
    /// # Errors
    /// `KEYSPACE_UNKNOWN`.
    pub async fn keyspace(&self, name: &str) -> Result<v1::GetKeyspaceReply, Error> {
        let request = v1::GetKeyspaceRequest { name: name.to_owned() };
        let request = &request;
        self.call(|channel| async move { admin(channel).get_keyspace(request.clone()).await }).await
    }

    /// Cuts a partition in two, at a key or in its middle, and waits until that is done.
    ///
    /// # Errors
    /// `INVALID_FIELD` when it cannot be cut there; `DEADLINE_EXCEEDED` when it goes on.
    pub async fn split_partition(&self, request: v1::SplitPartitionRequest) -> Result<v1::SplitPartitionReply, Error> {
        let request = &request;
        self.call(|channel| async move { admin(channel).split_partition(request.clone()).await }).await
    }

    /// Makes one of two neighbours, and waits until that is done; `with` 0 is the one after `partition`.
    ///
    /// # Errors
    /// `INVALID_FIELD` when they cannot be merged; `OVERLOADED` when that was withdrawn; `DEADLINE_EXCEEDED` when it goes on.
    pub async fn merge_partition(&self, partition: u64, with: u64) -> Result<v1::MergePartitionReply, Error> {
        let request = v1::MergePartitionRequest { partition, with };
        self.call(|channel| async move { admin(channel).merge_partition(request).await }).await
    }

    /// Goes on with a partition whose quorum is lost for good, from one replica that is left, and waits until that leads;
    /// without `accept_data_loss` it only says what would be done and what may be lost.
    ///
    /// # Errors
    /// `INVALID_FIELD` when the partition may have a quorum or nothing of it is left; `NO_QUORUM` when the placement driver
    /// has none; `DEADLINE_EXCEEDED` when it goes on.
    pub async fn recover_partition(
        &self,
        request: v1::RecoverPartitionRequest,
    ) -> Result<v1::RecoverPartitionReply, Error> {
        self.call(|channel| async move { admin(channel).recover_partition(request).await }).await
    }

    /// One partition: how it is, what was decided about it lately, and why.
    ///
    /// # Errors
    /// `WRONG_PARTITION` when there is no such partition.
    pub async fn explain_partition(&self, partition: u64) -> Result<v1::ExplainPartitionReply, Error> {
        let request = v1::ExplainPartitionRequest { partition };
        self.call(|channel| async move { admin(channel).explain_partition(request).await }).await
    }

    /// What is not as it should be, and what would still work if these nodes were lost as well.
    ///
    /// # Errors
    /// `INVALID_FIELD` for a node that does not exist.
    pub async fn diagnose(&self, if_lost: &[u64]) -> Result<v1::DiagnoseReply, Error> {
        let request = v1::DiagnoseRequest { if_lost: if_lost.to_vec() };
        let request = &request;
        self.call(|channel| async move { admin(channel).diagnose(request.clone()).await }).await
    }

    /// Drops a keyspace and all its rows; false if there was none.
    ///
    /// # Errors
    /// `NAME_INVALID` for a keyspace that cannot be dropped.
    pub async fn drop_keyspace(&self, name: &str) -> Result<bool, Error> {
        let request = v1::DropKeyspaceRequest { name: name.to_owned() };
        let request = &request;
        let reply = self.call(|channel| async move { admin(channel).drop_keyspace(request.clone()).await }).await?;
        Ok(reply.dropped)
    }

    /// The partitions of a keyspace (of every one, for an empty name), in order.
    ///
    /// # Errors
    /// `KEYSPACE_UNKNOWN`.
    pub async fn partitions(&self, keyspace: &str) -> Result<v1::ListPartitionsReply, Error> {
        let request = v1::ListPartitionsRequest { keyspace: keyspace.to_owned() };
        let request = &request;
        self.call(|channel| async move { topology(channel).list_partitions(request.clone()).await }).await
    }

    async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let deadline = Instant::now() + self.client.deadline().max(DEADLINE_MIN);
        Ok(self.client.remote().any(deadline, call).await?)
    }

    async fn wait_seen(&self, name: &str) {
        let routing = self.client.router().caller().routing();
        let seen = async {
            loop {
                let map = routing.map();
                if map.keyspace_by_name(name).is_some() {
                    return;
                }
                routing.newer_than(map.version()).await;
            }
        };
        // Later than that it will still be found: an unknown name asks for a newer map first.
        let _ = timeout_at(Instant::now() + SEEN_MAX, seen).await;
    }
}

fn admin(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel).max_decoding_message_size(pipeline::ANSWER_BYTES_MAX)
}

fn topology(channel: Channel) -> TopologyClient<Channel> {
    TopologyClient::new(channel).max_decoding_message_size(pipeline::ANSWER_BYTES_MAX)
}
