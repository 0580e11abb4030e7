//! Which partitions to cut in two: those that hold too much, and those that are asked too much.
//!
//! A partition is too large by its bytes alone. It is too hot when, for a while, the work of leaders could not be spread
//! evenly over the nodes however the balancer moved them, and it is a good part of a node's share: many small partitions
//! cost more than few large ones, because what each does at once is less.
//! Where to cut is the leader's to say: it holds the rows and knows what is asked for. It may also say that no cut would
//! help, as it has CPU to spare or the work is for one key; then the partition is left alone for long.
//!
//! What is remembered here is only to keep calm and may be lost.
//!
//! Invariants:
//! * only partitions at rest are cut, and none twice within [`AGAIN_MS`];
//! * work cuts nothing where there is only one node to do it, and nothing below [`super::balance::WORK_MIN`].

use super::{
    balance::WORK_MIN,
    load::{Loads, PartitionLoad},
    map::{Map, Partition},
    plan::Liveness,
};
use crate::key::{DRIVER, PartitionId, Span};
use bytes::Bytes;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

/// Bytes of rows from which on a partition is cut. Small enough to be moved in a second or two.
pub const SPLIT_BYTES_DEFAULT: u64 = 64 << 20;
/// Work is spread evenly enough when no node would do more than this, in shares.
pub const SPREAD_MAX: f64 = 1.2;
/// Where it is not, partitions above this part of a node's share are too hot.
pub const SHARE_MAX: f64 = 0.25;
/// A partition has to be too hot for so long.
pub const HOT_MS: u64 = 5_000;
/// A partition is not cut again sooner: what it holds and does now has to be told first.
pub const AGAIN_MS: u64 = 6_000;
/// Where no cut would help, none is tried for so long.
pub const FUTILE_MS: u64 = 30_000;
/// Cuts asked for by one call.
pub const CUTS_PER_CALL_MAX: usize = 4;
/// Requests that say where the work is: the latest of those that were noted.
pub const SAMPLES_MAX: usize = 128;
/// With fewer of them nothing is said.
pub const SAMPLES_MIN: usize = 48;
/// Least part of the work on either side of a cut, in the older and in the newer half of the samples alike: a cut
/// behind which the work has wandered helps nobody.
pub const SIDE_MIN: f64 = 0.2;

/// What a cut is to halve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Halve {
    /// Bytes.
    Bytes,
    /// Work.
    Work,
}

/// A partition to be cut, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Which one.
    pub partition: PartitionId,
    /// What for.
    pub halve: Halve,
    /// For people: what was seen that asks for it.
    pub why: String,
}

/// Proposes cuts.
#[derive(Clone, Debug)]
pub struct Sizing {
    split_bytes: u64,
    /// Since when partitions have been too hot.
    hot_ms: BTreeMap<PartitionId, u64>,
    /// Until when partitions are left alone: for bytes, for work.
    calm_ms: BTreeMap<PartitionId, [u64; 2]>,
}

impl Sizing {
    /// Cuts partitions from so many bytes on.
    #[must_use]
    pub const fn new(split_bytes: u64) -> Self {
        Self { split_bytes, hot_ms: BTreeMap::new(), calm_ms: BTreeMap::new() }
    }

    /// The cuts to ask for at `now_ms` of any steady clock, the largest and hottest first.
    pub fn plan(&mut self, map: &Map, liveness: &Liveness, loads: &Loads, now_ms: u64) -> Vec<Wish> {
        self.calm_ms.retain(|_, until| until.iter().any(|until| *until > now_ms));
        self.hot_ms.retain(|id, _| map.partition(*id).is_some());
        let known = |id: &PartitionId| map.partition(*id).filter(|known| known.id != DRIVER);
        let all: Vec<(&Partition, &PartitionLoad)> =
            loads.0.iter().filter_map(|(id, load)| Some((known(id)?, load))).collect();
        let nodes = map.nodes().values().filter(|node| node.standing.takes_replicas() && liveness.is_alive(node.id));
        let nodes = nodes.count();
        let (share, overfull) = spread(all.iter().map(|(_, load)| work(load)), nodes);
        let work_max = if overfull == 0 { f64::INFINITY } else { (share * SHARE_MAX).max(WORK_MIN) };
        let mut wishes: Vec<(f64, Wish)> = Vec::new();
        for (partition, load) in all {
            let wish = self.wish(partition.id, load, work_max, now_ms);
            wishes.extend(wish.filter(|_| partition.is_at_rest()));
        }
        wishes.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        // One piece more for each node that would have too much; whether that is enough shows before the next ones.
        let mut left = overfull;
        let mut wishes: Vec<Wish> = wishes.into_iter().map(|(_, wish)| wish).collect();
        wishes.retain(|wish| {
            let granted = wish.halve == Halve::Bytes || left > 0;
            left -= usize::from(granted && wish.halve == Halve::Work);
            granted
        });
        wishes.truncate(CUTS_PER_CALL_MAX);
        for wish in &wishes {
            self.calm_ms.entry(wish.partition).or_default()[wish.halve as usize] = now_ms + AGAIN_MS;
        }
        wishes
    }

    /// Whether to cut one partition, and how urgent it is.
    fn wish(&mut self, id: PartitionId, load: &PartitionLoad, work_max: f64, now_ms: u64) -> Option<(f64, Wish)> {
        let calm_ms = self.calm_ms.get(&id).copied().unwrap_or_default();
        let may = |halve: Halve| now_ms >= calm_ms[halve as usize];
        if load.bytes >= self.split_bytes {
            let why = format!("it holds {} bytes, and is cut from {} on", load.bytes, self.split_bytes);
            let wish = Wish { partition: id, halve: Halve::Bytes, why };
            return may(Halve::Bytes).then_some((load.bytes as f64 / self.split_bytes as f64, wish));
        }
        let work = work(load) as f64;
        if work <= work_max {
            self.hot_ms.remove(&id);
            return None;
        }
        let since_ms = *self.hot_ms.entry(id).or_insert(now_ms);
        let why = format!(
            "leading it is the work of {work:.0} requests a second; leaders' work is uneven, and it is cut above {work_max:.0}"
        );
        let wish = Wish { partition: id, halve: Halve::Work, why };
        (now_ms - since_ms >= HOT_MS && may(Halve::Work)).then_some((work / work_max, wish))
    }

    /// A cut was made: both sides have to tell what they hold and do now.
    pub fn done(&mut self, partition: PartitionId, child: PartitionId, now_ms: u64) {
        for id in [partition, child] {
            self.calm_ms.insert(id, [now_ms + AGAIN_MS; 2]);
            self.hot_ms.remove(&id);
        }
    }

    /// No cut helps.
    pub fn futile(&mut self, partition: PartitionId, halve: Halve, now_ms: u64) {
        self.calm_ms.entry(partition).or_default()[halve as usize] = now_ms + FUTILE_MS;
    }
}

/// What the leader of a partition does.
const fn work(load: &PartitionLoad) -> u64 {
    load.leader_work() + load.member_work()
}

/// A node's share of all work, and how many nodes would do more than [`SPREAD_MAX`] of it if leaders were placed as well
/// as a simple rule can: each to the node that has least so far, the largest first (R. L. Graham, "Bounds on
/// multiprocessing timing anomalies", 1969).
fn spread(works: impl Iterator<Item = u64>, nodes: usize) -> (f64, usize) {
    let mut works: Vec<u64> = works.collect();
    works.sort_unstable_by_key(|work| Reverse(*work));
    let share = works.iter().sum::<u64>() as f64 / nodes.max(1) as f64;
    let mut held: BinaryHeap<Reverse<u64>> = std::iter::repeat_n(Reverse(0), nodes).collect();
    for work in works {
        if let Some(mut least) = held.peek_mut() {
            least.0 += work;
        }
    }
    let overfull = held.iter().filter(|held| held.0 as f64 > share * SPREAD_MAX).count();
    (share, if nodes < 2 { 0 } else { overfull })
}

/// Why no cut halves the work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Futile {
    /// Too little is known.
    #[error("too few of its requests were seen")]
    Unknown,
    /// Most of it is for one position.
    #[error("most of its work is for a single key")]
    SingleKey,
    /// It wanders, or lies at one end.
    #[error("it has no split point: no cut leaves a part of its work on either side for long")]
    NoPoint,
}

/// Where to cut `span` so that the work is halved best, by the positions that requests were for, the oldest first.
///
/// # Errors
/// When no cut would help.
pub fn halve_work(span: &Span, samples: &[Bytes]) -> Result<Bytes, Futile> {
    if samples.len() < SAMPLES_MIN {
        return Err(Futile::Unknown);
    }
    let sorted = |part: &[Bytes]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part
    };
    let (older, newer) = samples.split_at(samples.len() / 2);
    let (all, parts) = (sorted(samples), [sorted(older), sorted(newer)]);
    // What the smaller side of a cut would have got, in the part where it got least.
    let side = |at: &Bytes| {
        let smaller = |part: &Vec<Bytes>| {
            let below = part.partition_point(|position| position < at);
            below.min(part.len() - below) as f64 / part.len() as f64
        };
        parts.iter().map(smaller).fold(f64::INFINITY, f64::min)
    };
    let inside = all.iter().filter(|at| **at > span.start && span.contains(at));
    let best = inside.map(|at| (side(at), at)).max_by(|(a, _), (b, _)| a.total_cmp(b));
    if let Some((_, at)) = best.filter(|(side, _)| *side >= SIDE_MIN) {
        return Ok(at.clone());
    }
    let most = all.chunk_by(|a, b| a == b).map(<[Bytes]>::len).max().unwrap_or(0);
    Err(if most * 2 >= all.len() { Futile::SingleKey } else { Futile::NoPoint })
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
