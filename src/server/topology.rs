//! The `Topology` service: the routing table, at once and as it changes.

use super::{Core, exec::keyspace_unknown};
use crate::{
    client::{
        query,
        routing::{Leader, Routing},
    },
    error::Error,
    key::{self, DRIVER, KeyspaceId},
    node::Node,
    placement::{self, Map, Standing},
    proto::{status_of, v1},
};
use futures_util::Stream;
use std::{pin::Pin, sync::Arc};
use tonic::{Request, Response, Status};
use v1::topology_server::Topology;

/// The service.
#[derive(Clone)]
pub(crate) struct TopologyService(pub(crate) Arc<Core>);

#[tonic::async_trait]
impl Topology for TopologyService {
    async fn list_partitions(
        &self,
        request: Request<v1::ListPartitionsRequest>,
    ) -> Result<Response<v1::ListPartitionsReply>, Status> {
        let running = self.0.running().map_err(|error| status_of(&error))?;
        let routing = running.responder.node().routing();
        let map = routing.map();
        let name = request.into_inner().keyspace;
        let keyspaces: Vec<&placement::Keyspace> = if name.is_empty() {
            map.keyspaces().values().filter(|keyspace| !keyspace.is_internal()).collect()
        } else {
            vec![visible(&map, &name).map_err(|error| status_of(&error))?]
        };
        let partitions =
            keyspaces.iter().flat_map(|keyspace| map.partitions_of(keyspace.id)).map(|p| partition_to_pb(p, routing));
        Ok(Response::new(v1::ListPartitionsReply {
            map_version: map.version(),
            partitions: partitions.collect(),
            keyspaces: keyspaces.iter().map(|keyspace| keyspace_to_pb(keyspace, &map)).collect(),
        }))
    }

    async fn locate(&self, request: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        let running = self.0.running().map_err(|error| status_of(&error))?;
        let request = request.into_inner();
        let routing = running.responder.node().routing();
        let map = routing.map();
        let name = query::keyspace_name(&request.keyspace);
        let located = || {
            let keyspace = visible(&map, name)?;
            let rules = super::convert::Rules::new(keyspace, running.responder.limits());
            let key = rules.key(request.key.clone())?;
            Ok(map.locate(keyspace.id, &key::position(keyspace.layout, &key)))
        };
        let partition = located().map_err(|error: Error| status_of(&error))?;
        Ok(Response::new(v1::LocateReply { partition: partition.map(|p| partition_to_pb(p, routing)) }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::TopologyUpdate, Status>> + Send>>;

    async fn watch(&self, _request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let running = self.0.running().map_err(|error| status_of(&error))?;
        let node = Arc::clone(running.responder.node());
        let watcher = Watcher { node, sent: None };
        let updates = futures_util::stream::unfold(watcher, |mut watcher| async move {
            let update = watcher.next().await;
            Some((Ok(update), watcher))
        });
        Ok(Response::new(Box::pin(updates)))
    }
}

/// What one watching client has been sent.
struct Watcher {
    node: Arc<Node>,
    sent: Option<Sent>,
}

struct Sent {
    map: Arc<Map>,
    leaders: std::collections::BTreeMap<key::PartitionId, Leader>,
}

impl Watcher {
    /// The whole at first, then what differs from what was sent, as soon as anything does.
    async fn next(&mut self) -> v1::TopologyUpdate {
        loop {
            let routing = self.node.routing();
            let seen = routing.changes();
            let now = Sent { map: routing.map(), leaders: routing.leaders() };
            let update = match &self.sent {
                None => Some(self.whole(&now)),
                Some(sent) => self.difference(sent, &now),
            };
            self.sent = Some(now);
            if let Some(update) = update {
                return update;
            }
            routing.changed_since(seen).await;
        }
    }

    fn whole(&self, now: &Sent) -> v1::TopologyUpdate {
        let routing = self.node.routing();
        let map = &now.map;
        v1::TopologyUpdate {
            map_version: map.version(),
            full: true,
            cluster_id: map.cluster_id().to_owned(),
            nodes: map.nodes().values().map(|node| node_to_pb(node, &self.node)).collect(),
            keyspaces: visible_keyspaces(map).map(|keyspace| keyspace_to_pb(keyspace, map)).collect(),
            partitions: map
                .partitions()
                .values()
                .filter(|partition| partition.id != DRIVER)
                .map(|partition| partition_to_pb(partition, routing))
                .collect(),
            leaders: now.leaders.iter().map(|(id, leader)| leader_to_pb(*id, *leader)).collect(),
            ..v1::TopologyUpdate::default()
        }
    }

    fn difference(&self, sent: &Sent, now: &Sent) -> Option<v1::TopologyUpdate> {
        let routing = self.node.routing();
        let (old, new) = (&sent.map, &now.map);
        let leaders: Vec<_> = now
            .leaders
            .iter()
            .filter(|(id, leader)| sent.leaders.get(id) != Some(leader))
            .map(|(id, leader)| leader_to_pb(*id, *leader))
            .collect();
        if old.version() == new.version() {
            return (!leaders.is_empty()).then(|| v1::TopologyUpdate {
                map_version: new.version(),
                cluster_id: new.cluster_id().to_owned(),
                leaders,
                ..v1::TopologyUpdate::default()
            });
        }
        let changed_nodes = new.nodes().values().filter(|node| old.node(node.id) != Some(node));
        let changed_keyspaces =
            visible_keyspaces(new).filter(|keyspace| old.keyspaces().get(&keyspace.id) != Some(keyspace));
        let changed_partitions = new
            .partitions()
            .values()
            .filter(|partition| partition.id != DRIVER && old.partition(partition.id) != Some(partition));
        let gone = |id: &&key::PartitionId| new.partition(**id).is_none();
        let gone_keyspace = |id: &&KeyspaceId| !new.keyspaces().contains_key(id);
        Some(v1::TopologyUpdate {
            map_version: new.version(),
            full: false,
            cluster_id: new.cluster_id().to_owned(),
            nodes: changed_nodes.map(|node| node_to_pb(node, &self.node)).collect(),
            keyspaces: changed_keyspaces.map(|keyspace| keyspace_to_pb(keyspace, new)).collect(),
            partitions: changed_partitions.map(|partition| partition_to_pb(partition, routing)).collect(),
            partitions_removed: old.partitions().keys().filter(gone).map(|id| id.0).collect(),
            keyspaces_removed: old.keyspaces().keys().filter(gone_keyspace).map(|id| id.0).collect(),
            leaders,
        })
    }
}

fn visible_keyspaces(map: &Map) -> impl Iterator<Item = &placement::Keyspace> {
    map.keyspaces().values().filter(|keyspace| !keyspace.is_internal())
}

/// A keyspace that users may see.
pub(crate) fn visible<'a>(map: &'a Map, name: &str) -> Result<&'a placement::Keyspace, Error> {
    map.keyspace_by_name(name).filter(|keyspace| !keyspace.is_internal()).ok_or_else(|| keyspace_unknown(name))
}

fn leader_to_pb(id: key::PartitionId, leader: Leader) -> v1::RouteHint {
    v1::RouteHint { partition: id.0, leader: leader.node.0, term: leader.term, map_version: 0 }
}

pub(crate) fn node_to_pb(node: &placement::Node, here: &Node) -> v1::Node {
    v1::Node {
        id: node.id.0,
        uuid: node.uuid.clone(),
        address: node.address.clone(),
        zone: node.zone.clone(),
        weight: node.weight(),
        alive: here.liveness().is_alive(node.id),
        last_contact_ms: here.liveness().contact(node.id).map(|silence| silence.as_millis() as u64),
        standing: standing_to_pb(node.standing).into(),
    }
}

pub(crate) fn standing_to_pb(standing: Standing) -> v1::NodeStanding {
    match standing {
        Standing::Active => v1::NodeStanding::Active,
        Standing::Draining => v1::NodeStanding::Draining,
        Standing::Leaving => v1::NodeStanding::Leaving,
        Standing::Removed => v1::NodeStanding::Removed,
        Standing::Gone => v1::NodeStanding::Gone,
    }
}

pub(crate) fn keyspace_to_pb(keyspace: &placement::Keyspace, map: &Map) -> v1::Keyspace {
    let (keys, max) = match keyspace.kind {
        key::KeyKind::Bytes => (v1::KeyKind::Bytes, 0),
        key::KeyKind::Integer { max } => (v1::KeyKind::Integer, max),
    };
    let layout = match keyspace.layout {
        key::Layout::Ordered => v1::Layout::Ordered,
        key::Layout::Hashed => v1::Layout::Hashed,
    };
    v1::Keyspace {
        id: keyspace.id.0,
        name: keyspace.name.clone(),
        keys: keys as i32,
        max,
        layout: layout as i32,
        replicas: keyspace.replicas,
        partitions: map.partitions_of(keyspace.id).count() as u64,
    }
}

pub(crate) fn partition_to_pb(partition: &placement::Partition, routing: &Routing) -> v1::Partition {
    let leader = routing.leader(partition.id);
    let replica = |replica: &key::Replica| v1::Replica { replica: replica.id.0, node: replica.node.0 };
    v1::Partition {
        id: partition.id.0,
        keyspace: partition.keyspace.0,
        start: partition.span.start.clone(),
        end: partition.span.end.clone().unwrap_or_default(),
        epoch: Some(v1::Epoch { bounds: partition.epoch.bounds, members: partition.epoch.members }),
        replicas: partition.members.iter().map(replica).collect(),
        leader: leader.map_or(0, |leader| leader.node.0),
        term: leader.map_or(0, |leader| leader.term),
    }
}
