//! Questions to one node of a drill, over a connection of their own, each within [`PATIENCE`].

use crate::{
    client::pipeline,
    proto::{
        internal::{DigestsRequest, ReplicaDigest, internode_client::InternodeClient},
        v1::{self, admin_client::AdminClient, topology_client::TopologyClient},
    },
};
use std::{future::Future, time::Duration};
use tokio::time::timeout;
use tonic::transport::Channel;

/// Patience with one answer.
pub const PATIENCE: Duration = Duration::from_secs(3);

async fn ask<T, F>(address: &str, patience: Duration, call: impl FnOnce(Channel) -> F) -> Result<T, String>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    let asked = async {
        let channel = pipeline::connect(address).await.map_err(|error| error.to_string())?;
        let reply = call(channel).await.map_err(|status| format!("{address}: {}", status.message()))?;
        Ok(reply.into_inner())
    };
    timeout(patience, asked).await.unwrap_or_else(|_| Err(format!("{address} gave no answer in {patience:?}")))
}

/// How the cluster is, as this node sees it.
///
/// # Errors
/// Why it did not answer.
pub async fn status(address: &str) -> Result<v1::ClusterStatusReply, String> {
    ask(address, PATIENCE, |channel| async move {
        AdminClient::new(channel).cluster_status(v1::ClusterStatusRequest {}).await
    })
    .await
}

/// Forms the cluster.
///
/// # Errors
/// Why it could not be formed.
pub async fn init(address: &str, replicas: u32) -> Result<v1::InitReply, String> {
    ask(
        address,
        PATIENCE * 5,
        |channel| async move { AdminClient::new(channel).init(v1::InitRequest { replicas }).await },
    )
    .await
}

/// Every partition, as this node sees them.
///
/// # Errors
/// Why it did not answer.
pub async fn partitions(address: &str) -> Result<Vec<v1::Partition>, String> {
    let request = v1::ListPartitionsRequest::default();
    let list = |channel| async move { TopologyClient::new(channel).list_partitions(request).await };
    Ok(ask(address, PATIENCE, list).await?.partitions)
}

/// What the replicas on this node hold.
///
/// # Errors
/// Why it did not answer.
pub async fn digests(address: &str) -> Result<Vec<ReplicaDigest>, String> {
    let digests = |channel| async move { InternodeClient::new(channel).digests(DigestsRequest {}).await };
    Ok(ask(address, PATIENCE, digests).await?.replicas)
}
