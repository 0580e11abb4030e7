//! Which neighbours to merge: those that came of cuts, hold little, and have been asked little for long.
//!
//! What nobody has cut since its keyspace was created stays as it was created: whoever asked for so many partitions had a
//! reason, and may not have written to them yet.
//!
//! What is remembered here is only to keep calm and may be lost: then it takes as long again.
//!
//! Invariants:
//! * only neighbours at rest are merged, and only if what they hold together is a small part of what is cut in two: a
//!   merge is never undone by its own result;
//! * what nobody has told of lately is not merged.

use super::{
    limits::MERGE_BYTES_MAX,
    load::{Loads, PartitionLoad},
    map::{Map, Partition},
};
use crate::key::{DRIVER, PartitionId};
use std::collections::BTreeMap;

/// How long two neighbours have to be small and idle.
pub const MERGE_AFTER_MS_DEFAULT: u64 = 3_600_000;
/// What two neighbours may hold together is what is cut, divided by this.
pub const SMALL_PART: u64 = 4;
/// Requests per second up to which a partition is idle.
pub const IDLE_REQUESTS: u32 = 10;
/// Merges asked for by one call: each makes the clients of one partition wait for a moment.
pub const MERGES_PER_CALL_MAX: usize = 2;
/// The epoch of bounds of a partition that nobody has cut or merged.
const AS_CREATED: u64 = 1;

/// Two neighbours to be merged, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Union {
    /// The left one, which stays.
    pub left: PartitionId,
    /// Its neighbour.
    pub right: PartitionId,
    /// For people: what was seen that asks for it.
    pub why: String,
}

/// Proposes merges.
#[derive(Clone, Debug)]
pub struct Uniting {
    bytes_max: u64,
    after_ms: u64,
    /// By the left one: its neighbour, and since when both have been small and idle.
    idle: BTreeMap<PartitionId, (PartitionId, u64)>,
}

impl Uniting {
    /// Merges what has been small and idle for `after_ms`, where partitions are cut from `split_bytes` on.
    #[must_use]
    pub fn new(split_bytes: u64, after_ms: u64) -> Self {
        Self { bytes_max: (split_bytes / SMALL_PART).min(MERGE_BYTES_MAX), after_ms, idle: BTreeMap::new() }
    }

    /// The merges to ask for at `now_ms` of any steady clock. Each is asked for once; if it does not come about, the two
    /// have to be idle as long again.
    pub fn plan(&mut self, map: &Map, loads: &Loads, now_ms: u64) -> Vec<Union> {
        let before = std::mem::take(&mut self.idle);
        let mut unions: Vec<Union> = Vec::new();
        let lists = map.keyspaces().keys().map(|keyspace| map.partitions_of(*keyspace));
        for partitions in lists {
            let mut last: Option<(&Partition, PartitionLoad)> = None;
            for right in partitions {
                let now = idle_load(right, loads).map(|load| (right, load));
                let pair = last.zip(now).filter(|((_, a), (_, b))| a.bytes + b.bytes <= self.bytes_max);
                last = now;
                let Some(((left, left_load), (_, right_load))) = pair else { continue };
                let known = before.get(&left.id).filter(|(with, _)| *with == right.id);
                let since_ms = known.map_or(now_ms, |(_, since_ms)| *since_ms);
                let idle_ms = now_ms - since_ms;
                if idle_ms < self.after_ms || unions.len() >= MERGES_PER_CALL_MAX {
                    self.idle.insert(left.id, (right.id, since_ms));
                    continue;
                }
                let bytes = left_load.bytes + right_load.bytes;
                let why = format!("they hold {bytes} bytes together, and were asked little for {} s", idle_ms / 1_000);
                unions.push(Union { left: left.id, right: right.id, why });
                // Not with the next one at the same time.
                last = None;
            }
        }
        unions
    }
}

/// The load of a partition that may be merged.
fn idle_load(partition: &Partition, loads: &Loads) -> Option<PartitionLoad> {
    let load = *loads.0.get(&partition.id)?;
    let idle = load.reads_per_s.saturating_add(load.writes_per_s) <= IDLE_REQUESTS;
    let cut = partition.epoch.bounds > AS_CREATED && partition.id != DRIVER;
    (idle && cut && partition.is_at_rest()).then_some(load)
}

#[cfg(test)]
#[path = "uniting_tests.rs"]
mod tests;
