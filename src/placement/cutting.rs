//! Cutting partitions in two, as the placement driver sees it.
//!
//! The driver hands out the ids and says where ([`Command::Divide`](super::Command::Divide)); the partition's own log
//! decides when; the child's leader reports that it has happened ([`Command::Divided`](super::Command::Divided)). From
//! the first to the last the members of the partition do not change.
//!
//! Invariant: a cut that was handed out is never taken back: the partition's log may hold it already.

use super::{
    command::{Answer, Refusal, Reply},
    limits,
    map::{Cut, Partition},
    state::{Change, State},
};
use crate::key::{DRIVER, PartitionId, Span, printable};
use bytes::Bytes;

impl State {
    pub(super) fn divide(&mut self, id: PartitionId, bounds: u64, at: Bytes, change: &mut Change) -> Answer {
        let known = self.map().partition(id).ok_or(Refusal::PartitionUnknown(id))?.clone();
        if let Some(cut) = &known.cut {
            if cut.at == at {
                return Ok(Reply::Dividing { child: cut.child });
            }
            return Err(Refusal::StepOutdated { partition: id, why: "it is being cut already".to_owned() });
        }
        if known.epoch.bounds != bounds {
            let why = format!("decided at epoch {bounds} of its bounds, now it is {}", known.epoch.bounds);
            return Err(Refusal::StepOutdated { partition: id, why });
        }
        let impossible =
            |why: &str| Err(Refusal::CutImpossible { partition: id, at: printable(&at), why: why.to_owned() });
        if id == DRIVER {
            return impossible("it is the placement driver's own");
        }
        if at <= known.span.start || !known.span.contains(&at) {
            return impossible("that does not lie between its first and its last position");
        }
        if !known.is_at_rest() {
            return Err(Refusal::StepOutdated { partition: id, why: "another change of it is under way".to_owned() });
        }
        if self.map().partitions().len() >= limits::PARTITIONS_MAX {
            let what = "partitions".to_owned();
            return Err(Refusal::LimitReached { what, limit: limits::PARTITIONS_MAX as u64 });
        }
        let child = self.fresh_partition();
        let members = known.target.iter().map(|replica| self.fresh_replica(replica.node)).collect();
        self.put_partition(Partition { cut: Some(Cut { at, child, members }), ..known }, change);
        Ok(Reply::Dividing { child })
    }

    pub(super) fn divided(&mut self, id: PartitionId, child: PartitionId, change: &mut Change) -> Answer {
        if self.map().partition(child).is_some() {
            return Ok(Reply::Dividing { child });
        }
        let known = self.map().partition(id).ok_or(Refusal::PartitionUnknown(id))?.clone();
        let born = known
            .child()
            .filter(|born| born.id == child)
            .ok_or_else(|| Refusal::StepOutdated { partition: id, why: format!("it is not being cut into {child}") })?;
        let mut left = known;
        left.span = Span { start: left.span.start, end: Some(born.span.start.clone()) };
        left.epoch.bounds = born.epoch.bounds;
        left.cut = None;
        self.put_partitions(vec![left, born], change);
        Ok(Reply::Dividing { child })
    }
}

#[cfg(test)]
#[path = "cutting_tests.rs"]
mod tests;
