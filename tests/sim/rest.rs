//! What a cluster is when nothing is wrong with it.

use crate::{
    trace::fnv,
    world::{World, eventually},
};
use meridian::{
    key::{DRIVER, NodeId, PartitionId},
    node::Node,
    placement::{Map, Partition},
};
use serde_json::{Value as Json, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

impl World {
    /// Waits until all that run agree on the map, every partition has the members it should have and a leader that all
    /// know, and replicas of a partition are the same.
    pub(crate) async fn at_rest(&self) {
        eventually("the cluster is at rest", || self.check_rest()).await;
    }

    /// The same with clients under way: replicas may be apart at any moment.
    pub(crate) async fn at_rest_while_busy(&self) {
        eventually("the cluster is sound", || self.check_shape().map(drop)).await;
    }

    pub(crate) fn check_rest(&self) -> Result<(), String> {
        let map = self.check_shape()?;
        let nodes: Vec<Arc<Node>> = self.running().into_iter().map(|n| self.node(n)).collect();
        map.partitions().keys().try_for_each(|id| self.check_same(&nodes, *id))
    }

    pub(crate) fn check_shape(&self) -> Result<Arc<Map>, String> {
        let nodes: Vec<Arc<Node>> = self.running().into_iter().map(|n| self.node(n)).collect();
        let map = nodes[0].routing().map();
        map.check()?;
        if map.nodes().len() != self.all().len() {
            return Err(format!("{} of {} nodes are registered", map.nodes().len(), self.all().len()));
        }
        let staying: BTreeSet<NodeId> =
            map.nodes().values().filter(|node| node.standing.is_present()).map(|node| node.id).collect();
        let voters = match staying.len() {
            1 | 2 => 1,
            3 | 4 => 3,
            _ => 5,
        };
        // Those that were removed are named by no partition, as the map has checked.
        let lost: Vec<NodeId> = self.lost().into_iter().map(NodeId).filter(|id| staying.contains(id)).collect();
        let whole = |partition: &&Partition| partition.replicas().all(|replica| !lost.contains(&replica.node));
        // Nobody can replace the replicas of a node that is gone and still counts.
        let thin = map.partitions().values().filter(whole).find(|partition| {
            let wanted = map.keyspaces()[&partition.keyspace].replicas as usize;
            let possible = if partition.id == DRIVER { voters } else { wanted.min(staying.len()) };
            !partition.is_at_rest() || (lost.is_empty() && partition.members.len() != possible)
        });
        if let Some(partition) = thin {
            return Err(format!("not at rest: {partition:?}"));
        }
        for node in &nodes {
            let theirs = node.routing().map();
            if theirs.encode() != map.encode() {
                return Err(format!("{} has map {}, not {}", node.id(), theirs.version(), map.version()));
            }
            let health = node.health();
            if !health.driver_led || !health.leaderless.is_empty() {
                return Err(format!("{} finds: {}", node.id(), health.problems().join("; ")));
            }
            let driven = node.driver_group().map(|group| group.read(|m, _| m.state().map().version()));
            if driven.is_some_and(|version| version != map.version()) {
                return Err(format!("the driver's map on {} is {driven:?}, not {}", node.id(), map.version()));
            }
            for partition in node.partitions() {
                let expected = map.partition(partition.id).and_then(|partition| partition.replica_on(node.id()));
                if expected != Some(partition.group().replica()) {
                    return Err(format!("{} holds {} and should not", node.id(), partition.id));
                }
            }
        }
        Ok(map)
    }

    /// The digests of a keyspace's replicas, as histories note them.
    pub(crate) fn digests(&self, keyspace: &str) -> Vec<Json> {
        let nodes: Vec<Arc<Node>> = self.running().into_iter().map(|n| self.node(n)).collect();
        let map = nodes[0].routing().map();
        let Some(keyspace) = map.keyspace_by_name(keyspace) else { return Vec::new() };
        let of = |partition: &Partition| {
            let (mut applied, mut digests) = (BTreeMap::new(), BTreeMap::new());
            for node in &nodes {
                let Some(here) = node.partition(partition.id) else { continue };
                let (at, digest) = here.group().read(|m, at| (at.index, m.store().digest()));
                applied.insert(node.id().to_string(), at);
                digests.insert(node.id().to_string(), format!("{digest:016x}"));
            }
            let (part, epoch) = (partition.id.0, partition.epoch.bounds);
            json!({"part": part, "epoch": epoch, "applied": applied, "digests": digests})
        };
        map.partitions_of(keyspace.id).map(of).collect()
    }

    /// Whether all replicas that run have applied the same, are the same and own what the map says.
    fn check_same(&self, nodes: &[Arc<Node>], id: PartitionId) -> Result<(), String> {
        let map = nodes[0].routing().map();
        let shape = |node: &Node| {
            let owned = node.partition(id)?.group().read(|m, _| {
                let store = m.store();
                (store.sealed(), store.epoch(), store.span().clone())
            });
            let named = map.partition(id).map(|named| (None, named.epoch.bounds, named.span.clone()));
            (named.as_ref() != Some(&owned)).then_some((owned, named))
        };
        if let Some((owned, named)) = nodes.iter().find_map(|node| shape(node)) {
            return Err(format!("{id} owns {owned:?}, and the map says {named:?}"));
        }
        let mut states = Vec::new();
        for node in nodes {
            if id == DRIVER {
                let group = node.driver_group();
                states.extend(group.map(|group| {
                    let state = group.read(|m, at| (at, fnv(1, &m.state().encode())));
                    (state, group.status().last_log)
                }));
            } else {
                let partition = node.partition(id);
                states.extend(partition.map(|partition| {
                    let state = partition.group().read(|m, at| (at, m.store().digest()));
                    (state, partition.group().status().last_log)
                }));
            }
        }
        let wanted = map.partition(id).map_or(0, |partition| {
            // A change that waits for a node that is lost has added the others already.
            partition.replicas().filter(|replica| nodes.iter().any(|node| node.id() == replica.node)).count()
        });
        if states.len() != wanted {
            return Err(format!("{id} has {} replicas that run, not {wanted}", states.len()));
        }
        let Some(((at, digest), last)) = states.first() else { return Ok(()) };
        if at.index != *last || states.iter().any(|((other, _), last)| other != at || *last != at.index) {
            return Err(format!("{id} has not applied the same everywhere: {states:?}"));
        }
        assert!(states.iter().all(|((_, other), _)| other == digest), "replicas of {id} differ: {states:?}");
        Ok(())
    }
}
