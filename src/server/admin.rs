//! The `Admin` service: forming the cluster, its state, and keyspaces.

use super::{
    Core,
    exec::keyspace_unknown,
    explain, recover,
    topology::{keyspace_to_pb, node_to_pb, partition_to_pb, standing_to_pb, visible},
};
use crate::{
    client::query,
    error::{Error, Outcome, Reason},
    key::{DRIVER, KeyKind, Layout, NodeId, PartitionId, position},
    node::{CutAt, Node},
    placement::{Assessment, Blocker, Command, CreateKeyspace, Cuts, Refusal, Reply, Standing, assess, sizing::Halve},
    proto::{status_of, v1},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};
use tonic::{Request, Response, Status};
use v1::admin_server::Admin;

/// Patience with the placement driver.
const DRIVER_DEADLINE: Duration = Duration::from_secs(10);
/// How long an answer waits for the change to reach this node's own map.
const MAP_DEADLINE: Duration = Duration::from_secs(5);

/// How long a node waits for a map that lets another drain or leave, before it refuses that.
const REFUSED_AFTER: Duration = Duration::from_secs(2);
/// Most partitions named in one answer about a node.
const BLOCKERS_MAX: usize = 20;

/// The service.
#[derive(Clone)]
pub(crate) struct AdminService(pub(crate) Arc<Core>);

impl AdminService {
    fn node(&self) -> Result<Arc<Node>, Error> {
        Ok(Arc::clone(self.0.running()?.responder.node()))
    }

    async fn create(&self, request: v1::CreateKeyspaceRequest) -> Result<v1::CreateKeyspaceReply, Error> {
        let node = self.node()?;
        let create = create_of(request, &node)?;
        let command = Command::CreateKeyspace(create);
        match node.drive(&command, Instant::now() + DRIVER_DEADLINE).await? {
            Reply::KeyspaceCreated { keyspace, created, warnings, .. } => {
                // The caller's next request may come to this node: let it know the keyspace, and its leaders.
                let known = async {
                    let mut seen = node.routing().changes();
                    while !is_led(&node, &keyspace.name) {
                        node.routing().changed_since(seen).await;
                        seen = node.routing().changes();
                    }
                };
                let _late = timeout(MAP_DEADLINE, known).await;
                let map = node.routing().map();
                let keyspace = keyspace_to_pb(&keyspace, &map);
                Ok(v1::CreateKeyspaceReply { keyspace: Some(keyspace), created, warnings })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn set_standing(&self, request: v1::SetNodeStandingRequest) -> Result<v1::SetNodeStandingReply, Error> {
        let node = self.node()?;
        let (id, asked) = (NodeId(request.node), standing_of(request.standing)?);
        let (mut now, mut found) = assessed(&node, id, asked)?;
        if !request.dry_run && now != asked && !found.refused.is_empty() {
            // Perhaps this node has not heard yet that another one was resumed.
            let heard = async {
                while !found.refused.is_empty() {
                    node.routing().newer_than(node.routing().map().version()).await;
                    (now, found) = assessed(&node, id, asked)?;
                }
                Ok::<(), Error>(())
            };
            timeout(REFUSED_AFTER, heard).await.unwrap_or(Ok(()))?;
        }
        let reply = v1::SetNodeStandingReply {
            standing: standing_to_pb(now).into(),
            changed: false,
            replicas: found.replicas,
            leaders: found.leaders,
            refused: blockers(&found.refused),
            waiting: blockers(&found.waiting),
        };
        if request.dry_run {
            return Ok(reply);
        }
        // One that stands so already has been found dispensable before.
        if now != asked && !found.refused.is_empty() {
            return Err(needed(id, asked, &found.refused));
        }
        let command = Command::SetStanding { node: id, standing: asked };
        match node.drive(&command, Instant::now() + DRIVER_DEADLINE).await? {
            Reply::StandingSet { standing, changed } => {
                let standing = standing_to_pb(standing).into();
                Ok(v1::SetNodeStandingReply { standing, changed, refused: Vec::new(), ..reply })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn drop(&self, name: String) -> Result<v1::DropKeyspaceReply, Error> {
        let node = self.node()?;
        let command = Command::DropKeyspace { name: name.clone() };
        match node.drive(&command, Instant::now() + DRIVER_DEADLINE).await? {
            Reply::KeyspaceDropped { dropped } => {
                let gone = async {
                    let mut version = node.routing().map().version();
                    while node.routing().map().keyspace_by_name(&name).is_some() {
                        node.routing().newer_than(version).await;
                        version = node.routing().map().version();
                    }
                };
                let _late = timeout(MAP_DEADLINE, gone).await;
                Ok(v1::DropKeyspaceReply { dropped })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn split(&self, request: v1::SplitPartitionRequest) -> Result<v1::SplitPartitionReply, Error> {
        let node = self.node()?;
        let map = node.routing().map();
        let name = query::keyspace_name(&request.keyspace);
        let keyspace = map.keyspace_by_name(name).filter(|keyspace| !keyspace.is_internal());
        let keyspace = keyspace.ok_or_else(|| keyspace_unknown(name))?;
        let at = (!request.at.is_empty()).then(|| position(keyspace.layout, &request.at));
        let named = match (request.partition, &at) {
            (0, None) => return Err(Error::field("partition", "name a partition, or a key to cut at")),
            (0, Some(at)) => map.locate(keyspace.id, at),
            (id, _) => map.partition(PartitionId(id)).filter(|partition| partition.keyspace == keyspace.id),
        };
        let id = named.map(|partition| partition.id).ok_or_else(|| {
            let message = format!(
                "keyspace {name:?} has no partition {}; `meridian partition list` shows them",
                request.partition
            );
            Error::field("partition", message)
        })?;
        let at = at.map_or(CutAt::Middle(Halve::Bytes), CutAt::Position);
        let child = node.divide(id, at, Instant::now() + DRIVER_DEADLINE).await?;
        Ok(v1::SplitPartitionReply { partition: id.0, child: child.0 })
    }

    async fn merge(&self, request: v1::MergePartitionRequest) -> Result<v1::MergePartitionReply, Error> {
        if request.partition == 0 {
            return Err(Error::field("partition", "name a partition; `meridian partition list` shows all"));
        }
        let with = (request.with != 0).then_some(PartitionId(request.with));
        let deadline = Instant::now() + DRIVER_DEADLINE;
        let [left, right] = self.node()?.merge(PartitionId(request.partition), with, deadline).await?;
        Ok(v1::MergePartitionReply { partition: left.0, absorbed: right.0 })
    }
}

/// How a node stands, and what stands in its way, as this node sees it now.
fn assessed(node: &Node, id: NodeId, asked: Standing) -> Result<(Standing, Assessment), Error> {
    let map = node.routing().map();
    let now = map.node(id).ok_or(Refusal::NodeUnknown(id))?.standing;
    let leads = |partition| node.routing().leader(partition).is_some_and(|leader| leader.node == id);
    let liveness = node.liveness().known(map.nodes().keys().copied());
    Ok((now, assess(&map, id, asked, &liveness, leads)))
}

fn standing_of(standing: i32) -> Result<Standing, Error> {
    match v1::NodeStanding::try_from(standing) {
        Ok(v1::NodeStanding::Active) => Ok(Standing::Active),
        Ok(v1::NodeStanding::Draining) => Ok(Standing::Draining),
        Ok(v1::NodeStanding::Leaving) => Ok(Standing::Leaving),
        _ => Err(Error::field("standing", "can be set to ACTIVE, DRAINING or LEAVING only")),
    }
}

fn blockers(blockers: &[Blocker]) -> Vec<v1::NodeBlocker> {
    let blocker = |blocker: &Blocker| v1::NodeBlocker { partition: blocker.partition.0, why: blocker.why.clone() };
    blockers.iter().take(BLOCKERS_MAX).map(blocker).collect()
}

/// A node that cannot be spared, with the partitions that say so.
fn needed(node: NodeId, asked: Standing, refused: &[Blocker]) -> Error {
    let lines: Vec<String> =
        refused.iter().take(BLOCKERS_MAX).map(|blocker| format!("{}: {}", blocker.partition, blocker.why)).collect();
    let more = refused.len().saturating_sub(lines.len());
    let more = if more == 0 { String::new() } else { format!("; and {more} more partitions") };
    Error::new(Reason::NodeNeeded, format!("{node} cannot be {asked}: {}{more}", lines.join("; ")))
        .with("node", node)
        .outcome(Outcome::NotApplied)
}

/// Whether every partition of a keyspace has a known leader.
fn is_led(node: &Node, name: &str) -> bool {
    let map = node.routing().map();
    map.keyspace_by_name(name).is_some_and(|keyspace| {
        map.partitions_of(keyspace.id).all(|partition| node.routing().leader(partition.id).is_some())
    })
}

fn unexpected(reply: &Reply) -> Error {
    Error::new(Reason::Internal, format!("the placement driver answered {reply:?}"))
}

fn create_of(request: v1::CreateKeyspaceRequest, node: &Node) -> Result<CreateKeyspace, Error> {
    let kind = match v1::KeyKind::try_from(request.keys) {
        Ok(v1::KeyKind::Unspecified | v1::KeyKind::Bytes) if request.max != 0 => {
            return Err(Error::field("max", "is for integer keys only"));
        }
        Ok(v1::KeyKind::Unspecified | v1::KeyKind::Bytes) => KeyKind::Bytes,
        Ok(v1::KeyKind::Integer) => KeyKind::Integer { max: if request.max == 0 { u64::MAX } else { request.max } },
        Err(_) => return Err(Error::field("keys", format!("{} is no kind that this server knows", request.keys))),
    };
    let layout = match v1::Layout::try_from(request.layout) {
        Ok(v1::Layout::Unspecified | v1::Layout::Ordered) => Layout::Ordered,
        Ok(v1::Layout::Hashed) => Layout::Hashed,
        Err(_) => {
            return Err(Error::field("layout", format!("{} is no layout that this server knows", request.layout)));
        }
    };
    if request.partitions > 1 && !request.split_at.is_empty() {
        return Err(Error::field("partitions", "give a number of partitions or the keys to split at, not both"));
    }
    let cuts = if request.split_at.is_empty() { Cuts::Even(request.partitions) } else { Cuts::At(request.split_at) };
    let map = node.routing().map();
    let avoid = map.nodes().keys().copied().filter(|id| !node.liveness().is_alive(*id)).collect();
    Ok(CreateKeyspace { name: request.name, kind, layout, replicas: request.replicas, cuts, avoid })
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn init(&self, request: Request<v1::InitRequest>) -> Result<Response<v1::InitReply>, Status> {
        let reply = self.0.init(request.into_inner().replicas).await;
        reply.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn cluster_status(
        &self,
        _request: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatusReply>, Status> {
        let Ok(node) = self.node() else {
            return Ok(Response::new(v1::ClusterStatusReply {
                problems: vec!["the cluster has not been formed yet; run `meridian init`".to_owned()],
                ..v1::ClusterStatusReply::default()
            }));
        };
        let map = node.routing().map();
        let health = node.health();
        let replica = |replica: &crate::key::Replica| v1::Replica { replica: replica.id.0, node: replica.node.0 };
        Ok(Response::new(v1::ClusterStatusReply {
            cluster_id: map.cluster_id().to_owned(),
            node: node.id().0,
            driver_leader: node.routing().leader(DRIVER).map_or(0, |leader| leader.node.0),
            driver_members: node.driver_members().iter().map(replica).collect(),
            map_version: map.version(),
            nodes: map.nodes().values().map(|other| node_to_pb(other, &node)).collect(),
            partitions: map.partitions().keys().filter(|id| **id != DRIVER).count() as u64,
            partitions_leaderless: health.leaderless.iter().map(|id| id.0).collect(),
            partitions_underreplicated: health.underreplicated.iter().map(|id| id.0).collect(),
            healthy: health.is_good(),
            problems: health.problems(),
        }))
    }

    async fn list_nodes(
        &self,
        _request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesReply>, Status> {
        let node = self.node().map_err(|error| status_of(&error))?;
        let map = node.routing().map();
        let (mut replicas, mut leaders) = (BTreeMap::<NodeId, u64>::new(), BTreeMap::<NodeId, u64>::new());
        for partition in map.partitions().values().filter(|partition| partition.id != DRIVER) {
            for member in &partition.members {
                *replicas.entry(member.node).or_default() += 1;
            }
            if let Some(leader) = node.routing().leader(partition.id) {
                *leaders.entry(leader.node).or_default() += 1;
            }
        }
        let status = |other: &crate::placement::Node| v1::NodeStatus {
            node: Some(node_to_pb(other, &node)),
            replicas: replicas.get(&other.id).copied().unwrap_or(0),
            leaders: leaders.get(&other.id).copied().unwrap_or(0),
        };
        Ok(Response::new(v1::ListNodesReply { nodes: map.nodes().values().map(status).collect() }))
    }

    async fn set_node_standing(
        &self,
        request: Request<v1::SetNodeStandingRequest>,
    ) -> Result<Response<v1::SetNodeStandingReply>, Status> {
        self.set_standing(request.into_inner()).await.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn create_keyspace(
        &self,
        request: Request<v1::CreateKeyspaceRequest>,
    ) -> Result<Response<v1::CreateKeyspaceReply>, Status> {
        self.create(request.into_inner()).await.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn list_keyspaces(
        &self,
        _request: Request<v1::ListKeyspacesRequest>,
    ) -> Result<Response<v1::ListKeyspacesReply>, Status> {
        let node = self.node().map_err(|error| status_of(&error))?;
        let map = node.routing().map();
        let mut keyspaces: Vec<_> = map
            .keyspaces()
            .values()
            .filter(|keyspace| !keyspace.is_internal())
            .map(|keyspace| keyspace_to_pb(keyspace, &map))
            .collect();
        keyspaces.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(v1::ListKeyspacesReply { keyspaces }))
    }

    async fn get_keyspace(
        &self,
        request: Request<v1::GetKeyspaceRequest>,
    ) -> Result<Response<v1::GetKeyspaceReply>, Status> {
        let node = self.node().map_err(|error| status_of(&error))?;
        let map = node.routing().map();
        let keyspace = visible(&map, &request.into_inner().name).map_err(|error| status_of(&error))?;
        let partitions = map.partitions_of(keyspace.id).map(|partition| partition_to_pb(partition, node.routing()));
        Ok(Response::new(v1::GetKeyspaceReply {
            keyspace: Some(keyspace_to_pb(keyspace, &map)),
            partitions: partitions.collect(),
            failures_tolerated_strong: (keyspace.replicas - 1) / 2,
            failures_tolerated_eventual: keyspace.replicas - 1,
            statuses: explain::statuses(&node, keyspace.id).await,
        }))
    }

    async fn split_partition(
        &self,
        request: Request<v1::SplitPartitionRequest>,
    ) -> Result<Response<v1::SplitPartitionReply>, Status> {
        self.split(request.into_inner()).await.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn merge_partition(
        &self,
        request: Request<v1::MergePartitionRequest>,
    ) -> Result<Response<v1::MergePartitionReply>, Status> {
        self.merge(request.into_inner()).await.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn recover_partition(
        &self,
        request: Request<v1::RecoverPartitionRequest>,
    ) -> Result<Response<v1::RecoverPartitionReply>, Status> {
        let node = self.node().map_err(|error| status_of(&error))?;
        let reply = recover::partition(&node, request.into_inner(), Instant::now() + DRIVER_DEADLINE).await;
        reply.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn explain_partition(
        &self,
        request: Request<v1::ExplainPartitionRequest>,
    ) -> Result<Response<v1::ExplainPartitionReply>, Status> {
        let node = self.node().map_err(|error| status_of(&error))?;
        let reply = explain::partition(&node, PartitionId(request.into_inner().partition)).await;
        reply.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn diagnose(&self, request: Request<v1::DiagnoseRequest>) -> Result<Response<v1::DiagnoseReply>, Status> {
        let node = self.node().map_err(|error| status_of(&error))?;
        let reply = explain::diagnose(&node, &request.into_inner().if_lost);
        reply.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn drop_keyspace(
        &self,
        request: Request<v1::DropKeyspaceRequest>,
    ) -> Result<Response<v1::DropKeyspaceReply>, Status> {
        self.drop(request.into_inner().name).await.map(Response::new).map_err(|error| status_of(&error))
    }
}
