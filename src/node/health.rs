//! How the cluster is, as one node sees it.

use super::Node;
use crate::{
    key::{DRIVER, NodeId, PartitionId},
    placement,
};

/// What is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Health {
    /// Partitions without a known leader in contact.
    pub leaderless: Vec<PartitionId>,
    /// Partitions with fewer members that stay than their keyspace asks for, or whose members are changing.
    pub underreplicated: Vec<PartitionId>,
    /// Nodes out of contact, other than those that are gone for good or removed.
    pub silent: Vec<NodeId>,
    /// Whether the placement driver has a known leader in contact.
    pub driver_led: bool,
    /// Whether the placement driver has as many members as the nodes allow, all on nodes that stay. Until then the
    /// loss of one node can be the loss of its quorum.
    pub driver_whole: bool,
}

impl Health {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.problems().is_empty()
    }

    /// What is wrong, a line each, for people.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let list = |ids: &[PartitionId]| {
            let shown: Vec<_> = ids.iter().take(10).map(ToString::to_string).collect();
            let more = if ids.len() > shown.len() { ", …" } else { "" };
            format!("{}{more}", shown.join(", "))
        };
        if !self.driver_led {
            problems.push("the placement driver has no leader in contact: no keyspace can be created".to_owned());
        }
        if !self.driver_whole {
            problems
                .push("the placement driver has fewer members than the nodes allow, or they are changing".to_owned());
        }
        if !self.leaderless.is_empty() {
            problems.push(format!("{} partitions without a leader: {}", self.leaderless.len(), list(&self.leaderless)));
        }
        if !self.underreplicated.is_empty() {
            let count = self.underreplicated.len();
            problems
                .push(format!("{count} partitions with fewer members than asked for: {}", list(&self.underreplicated)));
        }
        if !self.silent.is_empty() {
            let silent: Vec<_> = self.silent.iter().map(ToString::to_string).collect();
            problems.push(format!("nodes out of contact: {}", silent.join(", ")));
        }
        problems
    }
}

impl Node {
    /// How the cluster is, as this node sees it.
    #[must_use]
    pub fn health(&self) -> Health {
        let map = self.routing.map();
        let led = |id| self.routing.leader(id).is_some_and(|leader| self.liveness.is_alive(leader.node));
        let data = || map.partitions().values().filter(|partition| partition.id != DRIVER);
        let wanted = |partition: &placement::Partition| {
            map.keyspaces().get(&partition.keyspace).map_or(0, |keyspace| keyspace.replicas as usize)
        };
        let stays = |node: &NodeId| map.node(*node).is_some_and(|node| node.standing.keeps_replicas());
        let staying =
            |partition: &placement::Partition| partition.members.iter().filter(|member| stays(&member.node)).count();
        Health {
            leaderless: data().map(|partition| partition.id).filter(|id| !led(*id)).collect(),
            underreplicated: data()
                .filter(|partition| !partition.is_at_rest() || staying(partition) < wanted(partition))
                .map(|partition| partition.id)
                .collect(),
            silent: map
                .nodes()
                .values()
                .filter(|node| node.standing.is_present() && !self.liveness.is_alive(node.id))
                .map(|node| node.id)
                .collect(),
            driver_led: led(DRIVER),
            driver_whole: map.driver().is_some_and(|driver| {
                let nodes = map.nodes().keys().filter(|node| stays(node)).count();
                driver.is_at_rest()
                    && driver.members.iter().all(|member| stays(&member.node))
                    && driver.members.len() >= placement::driver_replicas(nodes)
            }),
        }
    }
}
