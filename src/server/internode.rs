//! The internal service: joining, and the streams of frames between nodes.

use super::Core;
use crate::{
    error::{Error, Reason},
    key::NodeId,
    node::{Node, Partition},
    placement::RegisterNode,
    proto::{internal as pb, status_of},
    transport::PROTOCOL_VERSION,
};
use pb::internode_server::Internode;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

/// Patience with the placement driver when a process joins.
const JOIN_DEADLINE: Duration = Duration::from_secs(5);

/// The service.
#[derive(Clone)]
pub(crate) struct InternodeService(pub(crate) Arc<Core>);

impl InternodeService {
    async fn admit(&self, request: pb::JoinRequest) -> Result<pb::JoinReply, Error> {
        if request.protocol_version != PROTOCOL_VERSION {
            let message = format!(
                "the caller speaks wire version {}, this node {PROTOCOL_VERSION}; run the same release on every node",
                request.protocol_version
            );
            return Err(Error::new(Reason::VersionMismatch, message));
        }
        let running = self.0.running()?;
        let node = running.responder.node();
        learn_address(node, &request);
        let process = RegisterNode {
            cluster_id: request.cluster_id,
            uuid: request.uuid,
            address: request.address,
            zone: request.zone,
            weight_milli: (request.weight * 1_000.0).round() as u32,
            previous: (request.node != 0).then_some(NodeId(request.node)),
            ephemeral: request.ephemeral,
        };
        let (id, map) = node.admit(process, Instant::now() + JOIN_DEADLINE).await?;
        Ok(pb::JoinReply { cluster_id: map.cluster_id().to_owned(), node: id.0, map: map.encode() })
    }
}

/// A node of this cluster says where it is now. The driver shall hear it too, but may be out of reach for want of just
/// this address.
fn learn_address(node: &Node, request: &pb::JoinRequest) {
    let (id, map) = (NodeId(request.node), node.routing().map());
    if request.cluster_id == map.cluster_id() && map.node(id).is_some_and(|known| known.uuid == request.uuid) {
        node.endpoint().transport().set_addresses(&[(id, request.address.clone())]);
    }
}

#[tonic::async_trait]
impl Internode for InternodeService {
    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::JoinReply>, Status> {
        self.admit(request.into_inner()).await.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn frames(&self, request: Request<Streaming<pb::FrameBatch>>) -> Result<Response<pb::FramesEnd>, Status> {
        let running = self.0.running().map_err(|error| status_of(&error))?;
        running.frames.serve(request.into_inner()).await.map(Response::new)
    }

    async fn digests(&self, _request: Request<pb::DigestsRequest>) -> Result<Response<pb::DigestsReply>, Status> {
        let running = self.0.running().map_err(|error| status_of(&error))?;
        let digest = |partition: &Arc<Partition>| {
            let (applied, digest) = partition.group().read(|machine, at| (at.index, machine.store().digest()));
            pb::ReplicaDigest { partition: partition.id.0, applied, digest }
        };
        let replicas = running.responder.node().partitions().iter().map(digest).collect();
        Ok(Response::new(pb::DigestsReply { replicas }))
    }
}
