//! Why things are as they are: answers of the `Admin` service about partitions, and about what would be lost.

use super::topology::partition_to_pb;
use crate::{
    error::{Error, Reason},
    key::{KeyspaceId, NodeId, PartitionId},
    node::Node,
    placement::{
        self, PartitionLoad,
        doctor::{self, Service},
        journal::{Entry, Question},
    },
    proto::v1,
};
use std::collections::{BTreeMap, BTreeSet};

fn alive(node: &Node) -> BTreeSet<NodeId> {
    let map = node.routing().map();
    map.nodes().keys().copied().filter(|id| node.liveness().is_alive(*id)).collect()
}

fn load_to_pb(load: PartitionLoad) -> v1::PartitionLoad {
    let PartitionLoad { bytes, rows, reads_per_s, writes_per_s, traffic_per_s } = load;
    v1::PartitionLoad { bytes, rows, reads_per_s, writes_per_s, traffic_per_s }
}

fn entry_to_pb(entry: Entry) -> v1::Decision {
    let Entry { wall_ms, what, why, result, times, .. } = entry;
    v1::Decision { unix_ms: wall_ms, what, why, result, times }
}

fn status(node: &Node, partition: &placement::Partition, load: Option<PartitionLoad>) -> v1::PartitionStatus {
    let leader = node.routing().leader(partition.id).map(|leader| leader.node);
    let state = doctor::state_of(&node.routing().map(), partition, &alive(node), leader);
    v1::PartitionStatus { partition: partition.id.0, state: state.to_owned(), load: load.map(load_to_pb) }
}

/// How each partition of a keyspace is, in order.
pub(super) async fn statuses(node: &Node, keyspace: KeyspaceId) -> Vec<v1::PartitionStatus> {
    let map = node.routing().map();
    let loads_of = map.partitions_of(keyspace).map(|partition| partition.id).collect();
    let told = node.ask_driver(&Question { loads_of, why: None }).await.unwrap_or_default();
    let loads: BTreeMap<PartitionId, PartitionLoad> = told.loads.into_iter().collect();
    map.partitions_of(keyspace).map(|partition| status(node, partition, loads.get(&partition.id).copied())).collect()
}

/// One partition: how it is, why, and what was decided about it.
pub(super) async fn partition(node: &Node, id: PartitionId) -> Result<v1::ExplainPartitionReply, Error> {
    let map = node.routing().map();
    let partition = map.partition(id).ok_or_else(|| {
        let message = format!("there is no partition {id}; `meridian partition list` shows those of a keyspace");
        Error::new(Reason::WrongPartition, message)
    })?;
    let told = node.ask_driver(&Question { loads_of: vec![id], why: Some(id) }).await;
    let driver_answered = told.is_some();
    let told = told.unwrap_or_default();
    let leader = node.routing().leader(id).map(|leader| leader.node);
    Ok(v1::ExplainPartitionReply {
        partition: Some(partition_to_pb(partition, node.routing())),
        keyspace: map.keyspaces().get(&partition.keyspace).map(|keyspace| keyspace.name.clone()).unwrap_or_default(),
        status: Some(status(node, partition, told.loads.first().map(|(_, load)| *load))),
        findings: doctor::explain(&map, partition, &alive(node), leader),
        decisions: told.entries.into_iter().map(entry_to_pb).collect(),
        driver_answered,
    })
}

/// What is wrong, or would be without these nodes.
pub(super) fn diagnose(node: &Node, if_lost: &[u64]) -> Result<v1::DiagnoseReply, Error> {
    let (map, mut alive) = (node.routing().map(), alive(node));
    for lost in if_lost {
        if map.node(NodeId(*lost)).is_none() {
            let message = format!("there is no node n{lost}; `meridian node list` shows all");
            return Err(Error::field("if_lost", message));
        }
        alive.remove(&NodeId(*lost));
    }
    let found = doctor::diagnose(&map, &alive);
    let ids = |partitions: &[PartitionId]| partitions.iter().map(|id| id.0).collect();
    Ok(v1::DiagnoseReply {
        problems: found.problems(),
        unreadable: ids(found.with(Service::Nothing)),
        without_quorum: ids(found.with(Service::Stale)),
        fragile: ids(found.with(Service::Fragile)),
        underreplicated: ids(&found.underreplicated),
        changing: ids(&found.changing),
        in_one_zone: ids(&found.in_one_zone),
        needed_nodes: found.needed_nodes.keys().map(|node| node.0).collect(),
        driver_live: found.driver_members.0 as u32,
        driver_members: found.driver_members.1 as u32,
    })
}
