//! The planner: what to do next about what is observed.
//!
//! A pure function of the state and of who is alive. It remembers nothing, so any leader of group 0 can take over at
//! any point; its steps carry what they were decided on, so one that comes late or twice is refused.
//!
//! Invariants:
//! * a step leaves a partition at least as many live members above its quorum as before, but for the driver's group
//!   when nodes leave for good and fewer stay than it has voters;
//! * a partition has at most one change at a time, all together at most [`CHANGES_MAX`], and at most [`RECEIVING_MAX`]
//!   that bring a replica to the same node;
//! * a node is given replicas only once it has been alive for [`ALIVE_AFTER_MS`].

use super::{
    command::Step,
    map::{Node, Partition, Phase, Standing},
    ring::{Placer, Ring},
    state::{DRIVER_REPLICAS_MAX, State},
};
use crate::key::{DRIVER, NodeId, Replica};
use std::collections::{BTreeMap, BTreeSet};

/// Most member changes under way at one time, in all partitions together.
pub const CHANGES_MAX: usize = 64;
/// Most of them that bring a replica to the same node: so many snapshots arrive there at one time.
pub const RECEIVING_MAX: usize = 8;
/// Most steps of one call.
pub const STEPS_MAX: usize = 64;
/// Most partitions that one call places for nothing, because their nodes receive enough already.
const DEFERRED_MAX: usize = 256;
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
    /// It has been silent for so long that its replicas are to be built anew elsewhere.
    Down,
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
        match self.0.get(&node) {
            Some(Health::Silent { for_ms }) => *for_ms >= DEAD_AFTER_MS,
            Some(Health::Down) => true,
            Some(Health::Alive { .. }) | None => false,
        }
    }

    /// Whether its replicas are to be built anew elsewhere.
    #[must_use]
    pub fn is_down(&self, node: NodeId) -> bool {
        self.0.get(&node) == Some(&Health::Down)
    }

    /// All that a plan asks of it: whether each node is alive, dead, down. Two plans of one state differ only if this does.
    #[must_use]
    pub fn judged(&self) -> BTreeMap<NodeId, [bool; 3]> {
        let judge = |node: &NodeId| (*node, [self.is_alive(*node), self.is_dead(*node), self.is_down(*node)]);
        self.0.keys().map(judge).collect()
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
    decisions.extend(withdraw(state, liveness));
    decisions.truncate(STEPS_MAX);
    let repairs = repair(state, liveness, STEPS_MAX - decisions.len());
    decisions.extend(repairs);
    decisions
}

/// Voters of group 0 among this many nodes: an odd number, at most [`DRIVER_REPLICAS_MAX`].
#[must_use]
pub fn driver_replicas(nodes: usize) -> usize {
    let most = nodes.min(DRIVER_REPLICAS_MAX as usize);
    if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
}

/// Group 0: one, three or five voters, as nodes allow, spread over zones. It never shrinks for want of live nodes, only
/// with the nodes that leave.
fn grow_driver(state: &State, liveness: &Liveness) -> Option<Decision> {
    let driver = state.map().driver().filter(|driver| driver.is_at_rest())?;
    let kept = kept(state, driver, liveness);
    let lost = driver.target.len() - kept.len();
    let voters = driver_replicas(possible(&takers(state, liveness), &kept));
    if lost == 0 && voters <= kept.len() {
        return None;
    }
    // A placer of its own: the driver's replicas are few and do not count as load.
    let ring = Ring::new(state.map().nodes().values(), &not_alive(state, liveness));
    let mut placer = Placer::new(ring, &BTreeMap::from([(voters as u32, 1)]));
    placer.occupy(kept.iter().copied());
    let placed = placer.extend(driver.keyspace, driver.id, &kept, voters as u32);
    // The leader stays: handing over the driver for the sake of the ring gains nothing.
    let added = placed.into_iter().filter(|node| !kept.contains(node));
    let mut nodes: Vec<NodeId> = kept.iter().copied().chain(added).collect();
    let leaving = driver.target.iter().any(|replica| standing(state, replica.node) == Standing::Leaving);
    let can = |node: &&Node| node.standing.takes_replicas() || kept.contains(&node.id);
    let staying = state.map().nodes().values().filter(can).count();
    if leaving && nodes.len() < driver.target.len() && driver_replicas(staying) <= nodes.len() {
        // Fewer nodes, fewer voters: this is what was asked for. Dead ones go first.
        nodes.sort_by_key(|node| !liveness.is_alive(*node));
        nodes.truncate(driver_replicas(staying));
        let all_live = nodes.iter().all(|node| liveness.is_alive(*node));
        let why = format!("{staying} nodes can be voters: the placement driver has {} then", nodes.len());
        let step = Step::SetTarget { partition: DRIVER, epoch: driver.epoch, nodes };
        return (all_live && has_quorum(driver, liveness)).then_some(Decision { step, why });
    }
    fill_up(state, driver, &mut nodes, liveness);
    let why = format!("the placement driver has {} voters that stay, {voters} are possible", kept.len());
    are_others(driver, &nodes).then(|| set_target(driver, nodes, liveness, why)).flatten()
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

/// Changes that cannot be completed, because a node that was to take part is down or going, are withdrawn.
fn withdraw<'a>(state: &'a State, liveness: &'a Liveness) -> impl Iterator<Item = Decision> + 'a {
    let under_way = |partition: &&Partition| partition.phase == Phase::Active && !partition.is_at_rest();
    let withdrawn = move |partition: &Partition| {
        let mut added = partition.target.iter().filter(|replica| !partition.members.contains(replica));
        let lost = added.find(|replica| !stays(state, replica.node, liveness))?;
        let nodes = partition.members.iter().map(|replica| replica.node).collect();
        Some(Decision {
            step: Step::SetTarget { partition: partition.id, epoch: partition.epoch, nodes },
            why: format!("{} was to become a member of {} and will not", lost.node, partition.id),
        })
    };
    state.map().partitions().values().filter(under_way).filter_map(withdrawn)
}

/// Partitions with fewer members than they want, or with members on nodes that are down or going, get others, as far as
/// there are nodes: those that can lose the fewest first.
fn repair(state: &State, liveness: &Liveness, steps_max: usize) -> Vec<Decision> {
    let map = state.map();
    let mut under_way = UnderWay::of(state, liveness);
    let steps_max = steps_max.min(CHANGES_MAX.saturating_sub(under_way.changes));
    let takers = takers(state, liveness);
    let mut wanting: Vec<(Option<usize>, &Partition, Vec<NodeId>, usize)> = Vec::new();
    for partition in map.partitions().values().filter(|partition| partition.id != DRIVER && partition.is_at_rest()) {
        let wanted = map.keyspaces()[&partition.keyspace].replicas as usize;
        let kept = kept(state, partition, liveness);
        let replicas = possible(&takers, &kept).min(wanted).max(kept.len());
        if replicas > kept.len() || kept.len() < partition.target.len() {
            wanting.push((spare(&nodes_of(&partition.members), liveness), partition, kept, replicas));
        }
    }
    wanting.sort_by_key(|(spare, partition, ..)| (*spare, partition.id));
    // Dear at a thousand nodes: only made when somebody needs it.
    let mut placer = None;
    let (mut decisions, mut deferred) = (Vec::new(), 0);
    for (_, partition, kept, replicas) in wanting {
        if decisions.len() >= steps_max || deferred >= DEFERRED_MAX {
            break;
        }
        let placer = placer.get_or_insert_with(|| state.placer(&not_alive(state, liveness), None));
        // Counted on all of its target, which may have begun with a node that goes.
        placer.vacate(partition.target.iter().map(|replica| replica.node));
        placer.occupy(kept.iter().copied());
        let mut nodes = placer.extend(partition.keyspace, partition.id, &kept, replicas as u32);
        fill_up(state, partition, &mut nodes, liveness);
        let wanted = map.keyspaces()[&partition.keyspace].replicas;
        let why =
            format!("{} has {} of {wanted} replicas that stay, {replicas} are possible", partition.id, kept.len());
        if !are_others(partition, &nodes) {
            continue;
        }
        let Some(decision) = set_target(partition, nodes.clone(), liveness, why) else { continue };
        if under_way.admit(nodes.into_iter().filter(|node| partition.replica_on(*node).is_none())) {
            decisions.push(decision);
        } else {
            deferred += 1;
        }
    }
    decisions
}

/// Changes that have begun.
struct UnderWay {
    changes: usize,
    /// How many of them bring a replica to a node.
    receiving: BTreeMap<NodeId, usize>,
}

impl UnderWay {
    fn of(state: &State, liveness: &Liveness) -> Self {
        let mut under_way = Self { changes: 0, receiving: BTreeMap::new() };
        // A change that waits for a dead node costs nobody anything.
        let moves = |partition: &&Partition| {
            partition.phase == Phase::Active
                && !partition.is_at_rest()
                && !partition.target.iter().any(|replica| liveness.is_dead(replica.node))
        };
        for partition in state.map().partitions().values().filter(moves) {
            under_way.changes += 1;
            for replica in partition.target.iter().filter(|replica| !partition.members.contains(replica)) {
                *under_way.receiving.entry(replica.node).or_default() += 1;
            }
        }
        under_way
    }

    /// Counts one more change that brings replicas to `nodes`, unless one of these receives enough already.
    fn admit(&mut self, nodes: impl Iterator<Item = NodeId>) -> bool {
        let nodes: Vec<NodeId> = nodes.collect();
        if nodes.iter().any(|node| self.receiving.get(node).is_some_and(|count| *count >= RECEIVING_MAX)) {
            return false;
        }
        for node in nodes {
            *self.receiving.entry(node).or_default() += 1;
        }
        true
    }
}

fn standing(state: &State, node: NodeId) -> Standing {
    state.map().node(node).map_or(Standing::Gone, |node| node.standing)
}

/// Whether a node keeps its replicas: it is not down, and not on its way out.
fn stays(state: &State, node: NodeId, liveness: &Liveness) -> bool {
    standing(state, node).keeps_replicas() && !liveness.is_down(node)
}

fn nodes_of(replicas: &[Replica]) -> Vec<NodeId> {
    replicas.iter().map(|replica| replica.node).collect()
}

/// Nodes of the target that keep their replica.
fn kept(state: &State, partition: &Partition, liveness: &Liveness) -> Vec<NodeId> {
    nodes_of(&partition.target).into_iter().filter(|node| stays(state, *node, liveness)).collect()
}

/// Gives places that nobody can take back to those who had them: the living first, and none to who is gone.
fn fill_up(state: &State, partition: &Partition, nodes: &mut Vec<NodeId>, liveness: &Liveness) {
    let mut lost = nodes_of(&partition.target);
    lost.retain(|node| !nodes.contains(node) && standing(state, *node).is_present());
    lost.sort_by_key(|node| !liveness.is_alive(*node));
    lost.truncate(partition.target.len().saturating_sub(nodes.len()));
    nodes.extend(lost);
}

/// How many members there can be: those kept, dead or not, and every node that takes replicas.
fn possible(takers: &BTreeSet<NodeId>, kept: &[NodeId]) -> usize {
    takers.len() + kept.iter().filter(|node| !takers.contains(node)).count()
}

/// Nodes that may be given replicas.
fn takers(state: &State, liveness: &Liveness) -> BTreeSet<NodeId> {
    let nodes = state.map().nodes().values().filter(|node| node.standing.takes_replicas());
    nodes.map(|node| node.id).filter(|id| liveness.is_alive(*id)).collect()
}

fn not_alive(state: &State, liveness: &Liveness) -> BTreeSet<NodeId> {
    state.map().nodes().keys().copied().filter(|node| !liveness.is_alive(*node)).collect()
}

/// Whether these are other nodes than the target's, in whatever order.
fn are_others(partition: &Partition, nodes: &[NodeId]) -> bool {
    let set = |nodes: &[NodeId]| nodes.iter().copied().collect::<BTreeSet<_>>();
    set(nodes) != set(&nodes_of(&partition.target))
}

/// How many live members there are above the quorum; none without a quorum.
fn spare(nodes: &[NodeId], liveness: &Liveness) -> Option<usize> {
    let live = nodes.iter().filter(|node| liveness.is_alive(**node)).count();
    live.checked_sub(nodes.len() / 2 + 1)
}

fn has_quorum(partition: &Partition, liveness: &Liveness) -> bool {
    spare(&nodes_of(&partition.members), liveness).is_some()
}

/// The decision for `nodes`, unless it would leave fewer live members above the quorum, or cannot commit for want of
/// one.
pub(super) fn set_target(
    partition: &Partition,
    nodes: Vec<NodeId>,
    liveness: &Liveness,
    why: String,
) -> Option<Decision> {
    let before = spare(&nodes_of(&partition.members), liveness)?;
    spare(&nodes, liveness).filter(|after| *after >= before)?;
    let step = Step::SetTarget { partition: partition.id, epoch: partition.epoch, nodes };
    Some(Decision { step, why })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;

#[cfg(test)]
#[path = "repair_tests.rs"]
mod repair_tests;
