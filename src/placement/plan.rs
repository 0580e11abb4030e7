//! The planner: what to do next about what is observed.
//!
//! A pure function of the state and of who is alive. It remembers nothing, so any leader of group 0 can take over at
//! any point; its steps carry what they were decided on, so one that comes late or twice is refused.
//!
//! Invariants:
//! * a step leaves a partition at least as many live members above its quorum as before;
//! * a partition has at most one change at a time, and all together at most [`CHANGES_MAX`];
//! * a node is given replicas only once it has been alive for [`ALIVE_AFTER_MS`].

use super::{
    command::Step,
    map::{Partition, Phase},
    ring::{Placer, Ring},
    state::{DRIVER_REPLICAS_MAX, State},
};
use crate::key::{DRIVER, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// Most member changes under way at one time, in all partitions together.
pub const CHANGES_MAX: usize = 64;
/// Most steps of one call.
pub const STEPS_MAX: usize = 64;
/// A node that has been alive for so long may be given replicas.
pub const ALIVE_AFTER_MS: u64 = 200;
/// A node that has been silent for so long no longer initializes groups.
pub const DEAD_AFTER_MS: u64 = 3_000;

/// What is known of a node's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Health {
    /// It answers, and has for this long without a pause.
    Alive {
        /// Milliseconds.
        for_ms: u64,
    },
    /// It has not been heard from for this long.
    Silent {
        /// Milliseconds.
        for_ms: u64,
    },
}

/// What the planning node knows of the others' lives, itself included. A node that is not named is neither alive nor
/// dead: nothing is given to it and nothing taken from it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Liveness(pub BTreeMap<NodeId, Health>);

impl Liveness {
    /// Whether the node may be given replicas.
    #[must_use]
    pub fn is_alive(&self, node: NodeId) -> bool {
        matches!(self.0.get(&node), Some(Health::Alive { for_ms }) if *for_ms >= ALIVE_AFTER_MS)
    }

    /// Whether others should take over what the node was to do.
    #[must_use]
    pub fn is_dead(&self, node: NodeId) -> bool {
        matches!(self.0.get(&node), Some(Health::Silent { for_ms }) if *for_ms >= DEAD_AFTER_MS)
    }

    /// The nodes that are dead: what [`super::CreateKeyspace::avoid`] wants.
    #[must_use]
    pub fn dead(&self) -> BTreeSet<NodeId> {
        self.0.keys().copied().filter(|node| self.is_dead(*node)).collect()
    }
}

/// A step, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What to propose.
    pub step: Step,
    /// For people: what was seen that asks for it.
    pub why: String,
}

/// The next steps, the most urgent first; none when all is as it should be, or as good as it can be for now.
#[must_use]
pub fn plan(state: &State, liveness: &Liveness) -> Vec<Decision> {
    let mut decisions = Vec::new();
    decisions.extend(grow_driver(state, liveness));
    decisions.extend(replace_initializers(state, liveness));
    decisions.truncate(STEPS_MAX);
    let growth = grow(state, liveness, STEPS_MAX - decisions.len());
    decisions.extend(growth);
    decisions
}

/// Voters of group 0 among this many nodes: an odd number, at most [`DRIVER_REPLICAS_MAX`].
#[must_use]
pub fn driver_replicas(nodes: usize) -> usize {
    let most = nodes.min(DRIVER_REPLICAS_MAX as usize);
    if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
}

/// Group 0: one, three or five voters, as nodes allow, spread over zones. It never shrinks for want of live nodes.
fn grow_driver(state: &State, liveness: &Liveness) -> Option<Decision> {
    let driver = state.map().driver().filter(|driver| driver.is_at_rest())?;
    let kept = nodes_of(state, driver);
    let voters = driver_replicas(possible(&alive(state, liveness), &kept));
    if voters <= kept.len() && kept.len() == driver.target.len() {
        return None;
    }
    // A placer of its own: the driver's replicas are few and do not count as load.
    let ring = Ring::new(state.map().nodes().values(), &not_alive(state, liveness));
    let mut placer = Placer::new(ring, &BTreeMap::from([(voters as u32, 1)]));
    placer.occupy(kept.iter().copied());
    let placed = placer.extend(driver.keyspace, driver.id, &kept, voters as u32);
    // The leader stays: handing over the driver for the sake of the ring gains nothing.
    let added = placed.into_iter().filter(|node| !kept.contains(node));
    let nodes = kept.iter().copied().chain(added).collect();
    let why = format!("the placement driver has {} voters, {voters} are possible", kept.len());
    set_target(driver, nodes, liveness, why)
}

/// Creating partitions whose initializer's node is dead get another initializer.
fn replace_initializers<'a>(state: &'a State, liveness: &'a Liveness) -> impl Iterator<Item = Decision> + 'a {
    let creating = state.map().partitions().values().filter(|partition| partition.phase == Phase::Creating);
    creating.filter_map(|partition| {
        let from = partition.members.iter().find(|replica| replica.id == partition.initializer)?;
        let to = partition.members.iter().find(|replica| liveness.is_alive(replica.node))?;
        liveness.is_dead(from.node).then(|| Decision {
            step: Step::SetInitializer { partition: partition.id, from: from.id, to: to.id },
            why: format!("{}, which was to initialize {}, is dead", from.node, partition.id),
        })
    })
}

/// Partitions with fewer members than they want get the missing ones, as far as there are nodes.
fn grow(state: &State, liveness: &Liveness, steps_max: usize) -> Vec<Decision> {
    let map = state.map();
    // A change that waits for a dead node costs nobody anything.
    let moves = |partition: &&Partition| {
        partition.phase == Phase::Active
            && !partition.is_at_rest()
            && !partition.target.iter().any(|replica| liveness.is_dead(replica.node))
    };
    let moving = map.partitions().values().filter(moves).count();
    let steps_max = steps_max.min(CHANGES_MAX.saturating_sub(moving));
    let alive = alive(state, liveness);
    let mut decisions = Vec::new();
    // Dear at a thousand nodes: only made when somebody needs it.
    let mut placer = None;
    for partition in map.partitions().values().filter(|partition| partition.id != DRIVER && partition.is_at_rest()) {
        if decisions.len() >= steps_max {
            break;
        }
        let wanted = map.keyspaces()[&partition.keyspace].replicas;
        let kept = nodes_of(state, partition);
        let replicas = possible(&alive, &kept).min(wanted as usize).max(kept.len());
        if replicas == kept.len() && kept.len() == partition.target.len() {
            continue;
        }
        let placer = placer.get_or_insert_with(|| state.placer(&not_alive(state, liveness), None));
        // Counted on all of its target, which may have begun with a node that is gone for good.
        placer.vacate(partition.target.iter().map(|replica| replica.node));
        placer.occupy(kept.iter().copied());
        let nodes = placer.extend(partition.keyspace, partition.id, &kept, replicas as u32);
        let why = format!("{} has {} of {wanted} replicas, {replicas} are possible", partition.id, kept.len());
        decisions.extend(set_target(partition, nodes, liveness, why));
    }
    decisions
}

/// Nodes that keep their replica: all but those that are gone for good.
fn nodes_of(state: &State, partition: &Partition) -> Vec<NodeId> {
    let gone = |node: &NodeId| state.map().node(*node).is_some_and(|node| node.gone);
    partition.target.iter().map(|replica| replica.node).filter(|node| !gone(node)).collect()
}

/// How many members there can be: those kept, dead or not, and every node alive.
fn possible(alive: &BTreeSet<NodeId>, kept: &[NodeId]) -> usize {
    alive.len() + kept.iter().filter(|node| !alive.contains(node)).count()
}

fn alive(state: &State, liveness: &Liveness) -> BTreeSet<NodeId> {
    state
        .map()
        .nodes()
        .values()
        .filter(|node| !node.gone)
        .map(|node| node.id)
        .filter(|id| liveness.is_alive(*id))
        .collect()
}

fn not_alive(state: &State, liveness: &Liveness) -> BTreeSet<NodeId> {
    state.map().nodes().keys().copied().filter(|node| !liveness.is_alive(*node)).collect()
}

/// The decision for `nodes`, unless it would leave fewer live members above the quorum, or cannot commit for want of
/// one.
pub(super) fn set_target(
    partition: &Partition,
    nodes: Vec<NodeId>,
    liveness: &Liveness,
    why: String,
) -> Option<Decision> {
    let members: Vec<NodeId> = partition.members.iter().map(|replica| replica.node).collect();
    let spare = |nodes: &[NodeId]| {
        let live = nodes.iter().filter(|node| liveness.is_alive(**node)).count();
        live.checked_sub(nodes.len() / 2 + 1)
    };
    let before = spare(&members)?;
    spare(&nodes).filter(|after| *after >= before)?;
    let step = Step::SetTarget { partition: partition.id, epoch: partition.epoch, nodes };
    Some(Decision { step, why })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;
