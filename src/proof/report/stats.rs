//! Figures of a run: counts, latencies, and both over time.
//!
//! Invariants:
//! * latencies are those of answered operations; whoever was never told does not make them look better or worse, and is
//!   counted apart;
//! * a percentile is the latency of an operation that took place (nearest rank), never a mean of two.

use super::ops::{Class, Op, Outcome};
use serde::Serialize;
use std::collections::BTreeMap;

/// Most points that a curve over time has.
pub const BUCKETS_MAX: u64 = 240;

/// Operations of one kind at one level, by how they ended.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Count {
    /// Workload.
    pub workload: String,
    /// Operation.
    pub f: String,
    /// Level, of reads and scans.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<&'static str>,
    /// Happened.
    pub ok: u64,
    /// Did not happen, those with a condition that did not hold included.
    pub fail: u64,
    /// Of these: the condition did not hold.
    pub mismatch: u64,
    /// Nobody knows.
    pub info: u64,
}

/// Latency of one class, in microseconds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Latency {
    /// Class.
    pub class: Class,
    /// Answered operations.
    pub answered: u64,
    /// Half took at most this.
    pub p50_us: u64,
    /// 90 % did.
    pub p90_us: u64,
    /// 99 % did.
    pub p99_us: u64,
    /// 99.9 % did.
    pub p999_us: u64,
    /// All did.
    pub max_us: u64,
}

/// One class over time: one number for each bucket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Series {
    /// Class.
    pub class: Class,
    /// Answered in the bucket.
    pub answered: Vec<u64>,
    /// Failed or unknown, by the time at which that was said.
    pub bad: Vec<u64>,
    /// Median latency; none without an answer.
    pub p50_us: Vec<Option<u64>>,
    /// 99th percentile; none without an answer.
    pub p99_us: Vec<Option<u64>>,
}

/// Counts by workload, operation and level.
#[must_use]
pub fn counts(workload: &str, ops: &[Op<'_>]) -> Vec<Count> {
    let mut counts: BTreeMap<(&str, Option<&'static str>), Count> = BTreeMap::new();
    for op in ops {
        let mode = match op.class {
            Class::Writes => None,
            Class::Reads(mode) | Class::Scans(mode) => Some(mode.name()),
        };
        let new = || Count { workload: workload.to_owned(), f: op.asked.f.clone(), mode, ..Count::default() };
        let count = counts.entry((&op.asked.f, mode)).or_insert_with(new);
        match op.outcome {
            Outcome::Ok => count.ok += 1,
            Outcome::Mismatch => {
                count.fail += 1;
                count.mismatch += 1;
            }
            Outcome::Fail => count.fail += 1,
            Outcome::Info => count.info += 1,
        }
    }
    counts.into_values().collect()
}

/// Latencies by class.
#[must_use]
pub fn latencies(ops: &[Op<'_>]) -> Vec<Latency> {
    let mut took: BTreeMap<Class, Vec<u64>> = BTreeMap::new();
    for op in ops.iter().filter(|op| op.outcome.answered()) {
        took.entry(op.class).or_default().push(op.took_ns() / 1_000);
    }
    let of_class = |(class, mut us): (Class, Vec<u64>)| {
        us.sort_unstable();
        Some(Latency {
            class,
            answered: us.len() as u64,
            p50_us: percentile(&us, 500)?,
            p90_us: percentile(&us, 900)?,
            p99_us: percentile(&us, 990)?,
            p999_us: percentile(&us, 999)?,
            max_us: *us.last()?,
        })
    };
    took.into_iter().filter_map(of_class).collect()
}

/// The smallest value that at least `per_mille` of all are not above.
#[must_use]
pub fn percentile(sorted: &[u64], per_mille: usize) -> Option<u64> {
    let rank = (sorted.len() * per_mille).div_ceil(1_000).max(1);
    sorted.get(rank - 1).copied()
}

/// Width of a bucket: a round number of milliseconds, so that at most [`BUCKETS_MAX`] cover the run.
#[must_use]
pub fn bucket_ns(duration_ns: u64) -> u64 {
    const MS: u64 = 1_000_000;
    let mut decade = 10 * MS;
    loop {
        for step in [1, 2, 5] {
            if duration_ns < decade.saturating_mul(step * BUCKETS_MAX) {
                return decade * step;
            }
        }
        decade = decade.saturating_mul(10);
    }
}

/// Every class over time.
#[must_use]
pub fn series(ops: &[Op<'_>], duration_ns: u64) -> Vec<Series> {
    let width = bucket_ns(duration_ns);
    let buckets = usize::try_from(duration_ns / width + 1).expect("at most BUCKETS_MAX");
    let mut classes: BTreeMap<Class, (Vec<Vec<u64>>, Vec<u64>)> = BTreeMap::new();
    for op in ops {
        let (took, bad) = classes.entry(op.class).or_insert_with(|| (vec![Vec::new(); buckets], vec![0; buckets]));
        let bucket = usize::try_from(op.end_ns / width).map_or(buckets - 1, |at| at.min(buckets - 1));
        if op.outcome.answered() {
            took[bucket].push(op.took_ns() / 1_000);
        } else {
            bad[bucket] += 1;
        }
    }
    let of_class = |(class, (mut took, bad)): (Class, (Vec<Vec<u64>>, Vec<u64>))| {
        took.iter_mut().for_each(|us| us.sort_unstable());
        let at = |per_mille| took.iter().map(|us| percentile(us, per_mille)).collect();
        let answered = took.iter().map(|us| us.len() as u64).collect();
        Series { class, answered, bad, p50_us: at(500), p99_us: at(990) }
    };
    classes.into_iter().map(of_class).collect()
}
