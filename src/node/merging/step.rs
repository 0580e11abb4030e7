//! What the leader of a partition has to do for a merge: pure functions of a map and of what its log has decided.
//!
//! Invariant: whatever maps, old and new, leaders follow, and whatever becomes of their proposals and reports, late,
//! repeated or lost, nobody owns a key beside another, and no write is lost.

use crate::{
    key::PartitionId,
    kv,
    placement::{Command, Duty, Map, Partition},
};

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::node) enum Step {
    /// Have the right one sealed and take it in.
    Absorb,
    /// Propose this change of what is owned.
    Propose(kv::Change),
    /// Tell the driver.
    Report(Command),
}

/// What a map of this version asks of the leader of `partition`, whose log has led to `store`.
pub(in crate::node) fn step(map_version: u64, partition: &Partition, store: &kv::Store) -> Option<Step> {
    let merge = partition.merge.as_ref();
    if merge.is_some_and(|merge| merge.duty == Duty::Yield) {
        return None;
    }
    if let Some(at) = store.sealed() {
        return (at < map_version).then_some(Step::Propose(kv::Change::Unseal { map_version }));
    }
    let merge = merge?;
    let (pair, bounds) = ([partition.id, merge.with], store.epoch());
    match merge.duty {
        _ if bounds > partition.epoch.bounds && store.span().end != partition.span.end => {
            Some(Step::Report(Command::Merged { pair, bounds }))
        }
        _ if bounds > partition.epoch.bounds => Some(Step::Report(Command::Unmerged { pair, bounds })),
        Duty::Fence => Some(Step::Propose(kv::Change::Fence)),
        Duty::Absorb | Duty::Yield => Some(Step::Absorb),
    }
}

/// The partition as this map knows it and how to seal it, if the map asks for the merge that began with version `since`.
pub(in crate::node) fn sealing(map: &Map, id: PartitionId, since: u64) -> Option<(&Partition, kv::Change)> {
    let partition = map.partition(id)?;
    let merge = partition.merge.as_ref()?;
    let asked = merge.since == since && merge.duty == Duty::Yield;
    asked.then_some((partition, kv::Change::Seal { map_version: map.version() }))
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
