//! Merging neighbours, as the placement driver sees it.
//!
//! The driver marks both ([`Command::Merge`](super::Command::Merge)); the right one is sealed in its own log, the left
//! one's log takes it in, and the left one's leader reports that ([`Command::Merged`](super::Command::Merged)), with which
//! the right one is gone. A merge that does not come about is withdrawn ([`Command::Unmerge`](super::Command::Unmerge)):
//! the left one's log is fenced, so that nothing that was decided before takes effect any more, and its leader reports that
//! ([`Command::Unmerged`](super::Command::Unmerged)). Members and bounds of neither side change in between.
//!
//! Invariants:
//! * both sides are marked and unmarked together, each naming the other;
//! * marks are taken away only once the left one's log has decided: it has taken the right one in, or never will. So whoever
//!   is sealed, and sees in a newer map that it has no mark, may serve again.

use super::{
    command::{Answer, Refusal, Reply},
    map::{Map, Partition},
    state::{Change, State},
};
use crate::key::{DRIVER, PartitionId, Span};
use serde::{Deserialize, Serialize};

/// A merge that is under way, as one of the two takes part in it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Merge {
    /// The neighbour.
    pub with: PartitionId,
    /// What this one has to do.
    pub duty: Duty,
    /// Version of the map that was the first to ask for it. No two merges have the same.
    pub since: u64,
}

/// What one of two partitions that are being merged has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Duty {
    /// The left one: take in the right one, once that is sealed.
    Absorb,
    /// The left one, when the merge is withdrawn: see to it that the right one is not taken in any more.
    Fence,
    /// The right one: be sealed when the left one asks, and stay so.
    Yield,
}

impl State {
    /// Marks two neighbours; `bounds` are their epochs when this was decided.
    pub(super) fn merge(&mut self, pair: [PartitionId; 2], bounds: [u64; 2], change: &mut Change) -> Answer {
        let known = |id| self.map().partition(id).ok_or(Refusal::PartitionUnknown(id));
        let (mut left, mut right) = (known(pair[0])?.clone(), known(pair[1])?.clone());
        let impossible =
            |why: &str| Err(Refusal::MergeImpossible { left: left.id, right: right.id, why: why.to_owned() });
        if left.id == DRIVER || right.id == DRIVER {
            return impossible("one of them is the placement driver's own");
        }
        if left.keyspace != right.keyspace {
            return impossible("they belong to different keyspaces");
        }
        if left.span.end.as_ref() != Some(&right.span.start) {
            return impossible("the second does not begin where the first ends");
        }
        if let Some(merge) = left.merge.as_ref().filter(|merge| merge.with == right.id && merge.duty == Duty::Absorb) {
            return Ok(Reply::Merging { since: merge.since });
        }
        for (partition, bounds) in [(&left, bounds[0]), (&right, bounds[1])] {
            let outdated = |why| Err(Refusal::StepOutdated { partition: partition.id, why });
            if partition.epoch.bounds != bounds {
                let now = partition.epoch.bounds;
                return outdated(format!("decided at epoch {bounds} of its bounds, now it is {now}"));
            }
            if !partition.is_at_rest() {
                return outdated("another change of it is under way".to_owned());
            }
        }
        let since = self.map().version() + 1;
        left.merge = Some(Merge { with: right.id, duty: Duty::Absorb, since });
        right.merge = Some(Merge { with: left.id, duty: Duty::Yield, since });
        self.put_partitions(vec![left, right], change);
        Ok(Reply::Merging { since })
    }

    /// Withdraws a merge; it may take place all the same, if the left one's log has decided it.
    pub(super) fn unmerge(&mut self, pair: [PartitionId; 2], change: &mut Change) -> Answer {
        let left = self.map().partition(pair[0]).ok_or(Refusal::PartitionUnknown(pair[0]))?;
        let merge = left.merge.clone().filter(|merge| merge.with == pair[1] && merge.duty == Duty::Absorb);
        let Some(merge) = merge else { return Ok(Reply::Reported { changed: false }) };
        let left = Partition { merge: Some(Merge { duty: Duty::Fence, ..merge }), ..left.clone() };
        self.put_partition(left, change);
        Ok(Reply::Reported { changed: true })
    }

    /// The left one's log has decided; `bounds` is its epoch since, and `absorbed` what it decided.
    pub(super) fn end_merge(
        &mut self,
        pair: [PartitionId; 2],
        bounds: u64,
        absorbed: bool,
        change: &mut Change,
    ) -> Answer {
        let known = |id| self.map().partition(id).ok_or(Refusal::PartitionUnknown(id));
        let mut left = known(pair[0])?.clone();
        let decided = |merge: &Merge| merge.with == pair[1] && (absorbed || merge.duty == Duty::Fence);
        if !left.merge.as_ref().is_some_and(decided) || bounds != left.epoch.bounds + 1 {
            // Told again, perhaps by somebody who knows an old map.
            return Ok(Reply::Reported { changed: false });
        }
        let mut right = known(pair[1])?.clone();
        left.epoch.bounds = bounds;
        left.merge = None;
        if absorbed {
            left.span = Span { start: left.span.start, end: right.span.end };
            self.remove_partition(right.id, change);
            self.put_partition(left, change);
        } else {
            right.merge = None;
            self.put_partitions(vec![left, right], change);
        }
        Ok(Reply::Reported { changed: true })
    }
}

impl Map {
    /// Whether the other side of a merge knows of it, and is where it should be.
    pub(super) fn check_merge(&self, partition: &Partition) -> Result<(), String> {
        let Some(merge) = &partition.merge else { return Ok(()) };
        let fits = |other: &Partition| {
            let (left, right) = if merge.duty == Duty::Yield { (other, partition) } else { (partition, other) };
            let mutual = other.merge.as_ref().is_some_and(|theirs| {
                theirs.with == partition.id
                    && theirs.since == merge.since
                    && (theirs.duty == Duty::Yield) != (merge.duty == Duty::Yield)
            });
            mutual && left.keyspace == right.keyspace && left.span.end.as_ref() == Some(&right.span.start)
        };
        if self.partition(merge.with).is_some_and(fits) {
            return Ok(());
        }
        Err(format!("{}: it is to be merged with {}, which does not fit: {merge:?}", partition.id, merge.with))
    }
}

#[cfg(test)]
#[path = "merging_tests.rs"]
mod tests;
