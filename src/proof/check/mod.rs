//! Checkers: pure functions from a history to a verdict.
//!
//! | checker | the promise | time |
//! |---|---|---|
//! | [`format`](mod@format) | the history is one: it can be judged at all | linear |
//! | [`linear`] | each key behaves like one register, or one counter, at moments inside the intervals | search, see there |
//! | [`levels`] | each read is as fresh as its level and its answer say; sessions and versions do not go back | n log n |
//! | [`counter`] | each increment happened exactly once | n log n |
//! | [`rows`] | scans are in order and whole: nothing lost, doubled, resurrected or from nowhere | rows returned · log n |
//! | [`bank`] | batches are seen whole or not at all | linear, and a search |
//! | [`durable`] | what was acknowledged is there at the end | n log n |
//! | [`replicas`] | replicas at the same point are equal | linear |
//!
//! [`judge`] runs those that apply to a workload.
//!
//! Invariants:
//! * no false alarm: a violation follows from the history, whatever the clocks and the network did;
//! * [`Valid::Unknown`] is not a pass: whoever could not finish, or had nothing to judge, says so;
//! * a violation names the events that show it, few enough for a person to follow.

pub mod bank;
pub mod counter;
pub mod durable;
pub mod format;
pub mod levels;
pub mod linear;
mod ops;
pub mod replicas;
pub mod rows;
mod search;
mod table;
#[cfg(test)]
mod tests;

use super::history::{Event, Phase, Process};
pub use ops::History;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Whether a history keeps a promise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Valid {
    /// It does.
    True,
    /// It does not.
    False,
    /// The checker gave up, or had nothing to judge.
    Unknown,
}

/// One broken promise.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Violation {
    /// What is wrong, in a sentence with the values.
    pub what: String,
    /// A short name of the kind of violation that stays the same while a run is shrunk: `stale-read`, `lost-write`, …
    pub kind: String,
    /// Key concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Indexes of the events that show it.
    pub events: Vec<u64>,
    /// From when to when it happened, in nanoseconds since the run began.
    pub window_ns: (u64, u64),
}

/// What one checker says of one history.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// Name of the checker.
    pub checker: String,
    /// Whether the promise was kept.
    pub valid: Valid,
    /// Why not, or why unknown; at most [`VIOLATIONS_MAX`].
    pub violations: Vec<Violation>,
    /// What was looked at: counts by name.
    pub looked_at: BTreeMap<String, u64>,
}

/// Violations that a verdict lists.
pub const VIOLATIONS_MAX: usize = 20;

/// A checker: its name, and how it judges.
pub type Checker = (&'static str, fn(&History<'_>) -> Verdict);

/// Names of the workloads that [`judge`] knows.
pub const WORKLOADS: &[&str] = &["register", "levels", "counter", "rows", "bank"];

/// The checkers that apply to a history of a workload; of an unknown workload, only whether it is a history.
///
/// [`durable`] applies when there is a final phase, and [`replicas`] when digests were compared: that there must be some
/// is for whoever planned the run to demand.
#[must_use]
pub fn checkers(workload: &str, events: &[Event]) -> Vec<Checker> {
    let mut checkers: Vec<Checker> = vec![("format", format::check)];
    let strong = || events.iter().any(|event| event.f == "read" && event.mode().mode.is_strong());
    match workload {
        "register" => {
            checkers.extend([("linear", linear::check as fn(&History<'_>) -> Verdict), ("levels", levels::check)])
        }
        // Reads of the weaker levels only leave nothing to order.
        "levels" if !strong() => checkers.push(("levels", levels::check)),
        "levels" => {
            checkers.extend([("linear", linear::check as fn(&History<'_>) -> Verdict), ("levels", levels::check)])
        }
        "counter" => {
            checkers.extend([("linear", linear::check as fn(&History<'_>) -> Verdict), ("counter", counter::check)])
        }
        "rows" => checkers.push(("rows", rows::check)),
        "bank" => checkers.push(("bank", bank::check)),
        _ => return checkers,
    }
    if events.iter().any(|event| event.phase == Phase::Final && event.process != Process::Nemesis) && workload != "bank"
    {
        checkers.push(("durable", durable::check));
    }
    if events.iter().any(|event| event.process == Process::Nemesis && event.f == replicas::F) {
        checkers.push(("replicas", replicas::check));
    }
    checkers
}

/// Judges a history of a workload by every checker that applies.
#[must_use]
pub fn judge(workload: &str, events: &[Event]) -> Vec<Verdict> {
    let history = History::of(events);
    checkers(workload, events).into_iter().map(|(_, check)| check(&history)).collect()
}

/// The workload that a history must be of, by its operations; none when they are of none.
#[must_use]
pub fn infer(events: &[Event]) -> Option<&'static str> {
    let clients = || events.iter().filter(|event| event.process != Process::Nemesis);
    let has = |f: &str| clients().any(|event| event.f == f);
    if has("batch") {
        Some("bank")
    } else if has("scan") {
        Some("rows")
    } else if has("incr") {
        Some("counter")
    } else if clients().any(|event| event.f == "read" && !event.mode().mode.is_strong()) {
        Some("levels")
    } else {
        ["read", "write", "cas", "delete"].into_iter().any(has).then_some("register")
    }
}

/// A verdict in the making.
#[derive(Default)]
struct Findings {
    violations: Vec<Violation>,
    /// Why nothing can be said, if nothing is wrong.
    unknown: Vec<Violation>,
    looked_at: BTreeMap<String, u64>,
}

impl Findings {
    fn count(&mut self, name: &str, more: u64) {
        *self.looked_at.entry(name.to_owned()).or_default() += more;
    }

    fn looked_at(&self, name: &str) -> u64 {
        self.looked_at.get(name).copied().unwrap_or_default()
    }

    /// Something is wrong, as these events show.
    fn wrong(&mut self, kind: &str, key: Option<&str>, what: String, events: &[&Event]) {
        self.count("violations", 1);
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(violation(kind, key, what, events));
        }
    }

    /// Something cannot be judged.
    fn unknown(&mut self, kind: &str, key: Option<&str>, what: String) {
        self.count("unknown", 1);
        if self.unknown.len() < VIOLATIONS_MAX {
            self.unknown.push(violation(kind, key, what, &[]));
        }
    }

    /// The verdict; unknown when none of the named counts is above zero.
    fn verdict(mut self, checker: &str, needed: &[&str]) -> Verdict {
        if needed.iter().all(|name| self.looked_at(name) == 0) {
            self.unknown("nothing-to-judge", None, format!("nothing to judge: no {}", needed.join(", no ")));
        }
        let (valid, violations) = if !self.violations.is_empty() {
            (Valid::False, self.violations)
        } else if !self.unknown.is_empty() {
            (Valid::Unknown, self.unknown)
        } else {
            (Valid::True, Vec::new())
        };
        Verdict { checker: checker.to_owned(), valid, violations, looked_at: self.looked_at }
    }
}

fn violation(kind: &str, key: Option<&str>, what: String, events: &[&Event]) -> Violation {
    let mut indexes: Vec<u64> = events.iter().map(|event| event.index).collect();
    indexes.sort_unstable();
    indexes.dedup();
    let from = events.iter().map(|event| event.time).min().unwrap_or_default();
    let to = events.iter().map(|event| event.time).max().unwrap_or_default();
    Violation { what, kind: kind.to_owned(), key: key.map(str::to_owned), events: indexes, window_ns: (from, to) }
}
