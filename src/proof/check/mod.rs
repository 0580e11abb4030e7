//! Checkers: pure functions from a history to a verdict.
//!
//! Invariants:
//! * [`Valid::Unknown`] is not a pass: whoever could not finish says so;
//! * a violation names the events that show it, few enough for a person to follow.

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
