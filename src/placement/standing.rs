//! How a node comes to drain, to leave and to be removed, and what stands in its way.
//!
//! Invariants:
//! * a removed node is named by no partition and stays removed;
//! * a node is asked to drain or leave only if every partition can do without it, as far as is known.

use super::{
    command::{Answer, Refusal, Reply},
    map::{Map, Node, Partition, Standing},
    plan::Liveness,
    state::{Change, State},
};
use crate::key::{DRIVER, NodeId, PartitionId};
use std::collections::BTreeSet;

/// A partition, and why it holds something up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blocker {
    /// The partition.
    pub partition: PartitionId,
    /// For people.
    pub why: String,
}

/// What a node still has, and what keeps it from draining or leaving.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Assessment {
    /// Partitions that it has a replica of.
    pub replicas: u64,
    /// Partitions that it leads.
    pub leaders: u64,
    /// What forbids it to begin.
    pub refused: Vec<Blocker>,
    /// What it is waiting for once it has begun.
    pub waiting: Vec<Blocker>,
}

impl State {
    pub(super) fn set_standing(&mut self, id: NodeId, asked: Standing, change: &mut Change) -> Answer {
        let node = self.map().node(id).ok_or(Refusal::NodeUnknown(id))?.clone();
        let now = node.standing;
        let refuse = |why: String| Err(Refusal::StandingRefused { node: id, now, asked, why });
        let to = match (now, asked) {
            (now, asked) if now == asked => now,
            (Standing::Removed, _) => return Err(Refusal::NodeRemoved(id)),
            (_, Standing::Gone) => return refuse("only another process under its address says so".to_owned()),
            // It is being replaced already, and only its own process can say that it is back.
            (Standing::Gone, Standing::Active | Standing::Leaving) => now,
            (Standing::Gone, Standing::Draining) => return refuse("it will not come back".to_owned()),
            (Standing::Active | Standing::Draining, Standing::Removed) => {
                return refuse("it has to leave first, see `meridian node decommission`".to_owned());
            }
            (Standing::Leaving, Standing::Draining) => return refuse("resume it first".to_owned()),
            (Standing::Leaving | Standing::Gone, Standing::Removed) => match held_by(self.map(), id).next() {
                Some(partition) => return refuse(format!("it still has a replica of {}", partition.id)),
                None => asked,
            },
            (Standing::Active | Standing::Draining | Standing::Leaving, _) => asked,
        };
        if to != now {
            self.put_node(Node { standing: to, ..node }, change);
        }
        Ok(Reply::StandingSet { standing: to, changed: to != now })
    }
    /// Nodes that were asked to leave and have nothing left: the driver removes them.
    #[must_use]
    pub fn departed(&self) -> Vec<NodeId> {
        let leaving = || self.map().nodes().values().filter(|node| node.standing == Standing::Leaving);
        if leaving().next().is_none() {
            return Vec::new();
        }
        let partitions = self.map().partitions().values();
        let held: BTreeSet<NodeId> = partitions.flat_map(Partition::replicas).map(|replica| replica.node).collect();
        leaving().map(|node| node.id).filter(|node| !held.contains(node)).collect()
    }
}

/// Partitions that name a replica on this node.
fn held_by(map: &Map, node: NodeId) -> impl Iterator<Item = &Partition> {
    map.partitions().values().filter(move |partition| partition.replica_on(node).is_some())
}

/// What `node` has left, and what keeps it from standing as `asked`; `leads` says whether it leads a partition.
#[must_use]
pub fn assess(
    map: &Map,
    node: NodeId,
    asked: Standing,
    liveness: &Liveness,
    leads: impl Fn(PartitionId) -> bool,
) -> Assessment {
    let mut assessment = Assessment::default();
    for partition in held_by(map, node) {
        let leads = leads(partition.id);
        assessment.replicas += 1;
        assessment.leaders += u64::from(leads);
        let blocker = |why| Blocker { partition: partition.id, why };
        assessment.refused.extend(obstacle(map, partition, node, asked, liveness).map(blocker));
        assessment.waiting.extend(pending(partition, node, asked, leads).map(blocker));
    }
    assessment
}

/// Why a partition cannot do without `node`.
fn obstacle(map: &Map, partition: &Partition, node: NodeId, asked: Standing, liveness: &Liveness) -> Option<String> {
    let members = partition.members.len();
    let quorum = members / 2 + 1;
    let standing = |node| map.node(node).map_or(Standing::Gone, |node: &Node| node.standing);
    let live = || partition.members.iter().map(|member| member.node).filter(|node| liveness.is_alive(*node));
    // Another one that drains is about to be stopped too.
    let others = live().filter(|other| *other != node && standing(*other) != Standing::Draining).count();
    let is_member = partition.members.iter().any(|member| member.node == node);
    match asked {
        Standing::Draining if is_member && others < quorum => Some(format!(
            "it needs {quorum} of its {members} members, and without {node} {others} are in contact and not draining"
        )),
        Standing::Leaving if live().count() < quorum => Some(format!(
            "it needs {quorum} of its {members} members to change them, and {} are in contact",
            live().count()
        )),
        Standing::Leaving if partition.id != DRIVER => {
            let stays = |other: &&Node| {
                let holds = partition.replica_on(other.id).is_some();
                let standing = other.standing;
                other.id != node
                    && liveness.is_alive(other.id)
                    && (standing.takes_replicas() || (holds && standing.keeps_replicas()))
            };
            let left = map.nodes().values().filter(stays).count();
            let wanted = members.min(map.keyspaces()[&partition.keyspace].replicas as usize);
            (left < wanted).then(|| {
                format!("it has {wanted} members, and without {node} {left} nodes are left for them; add a node first")
            })
        }
        _ => None,
    }
}

/// What `node` still waits for in a partition, once it drains or leaves.
fn pending(partition: &Partition, node: NodeId, asked: Standing, leads: bool) -> Option<String> {
    let moving = !partition.target.iter().any(|replica| replica.node == node);
    match asked {
        Standing::Draining | Standing::Leaving if leads => Some("its leadership is being handed over".to_owned()),
        Standing::Leaving if moving => {
            let added = partition.target.iter().filter(|replica| !partition.members.contains(replica));
            let added: Vec<String> = added.map(|replica| replica.node.to_string()).collect();
            Some(if added.is_empty() {
                "its replica is being removed".to_owned()
            } else {
                format!("{} is being brought up to date", added.join(", "))
            })
        }
        Standing::Leaving => Some("its turn has not come yet".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "standing_tests.rs"]
mod tests;
