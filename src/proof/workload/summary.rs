//! What a history holds, counted: what the gates against vacuous runs look at.

use crate::proof::history::{Event, Kind, Mode, Process};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Counts of a history.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Operations by `f/type` or, for reads and scans, `f/mode/type`: `write/ok`, `scan/bounded/fail`.
    pub ops: BTreeMap<String, u64>,
    /// Failures by `f/code`.
    pub errors: BTreeMap<String, u64>,
    /// Reads, and pages of scans, that a replica other than the leader served.
    pub follower_reads: u64,
    /// Operations that were sent more than once.
    pub repeated: u64,
    /// Operations that ended.
    pub ended: u64,
    /// Of these, the ones whose outcome is unknown.
    pub unknown: u64,
}

impl Summary {
    /// Counts a history.
    #[must_use]
    pub fn of(events: &[Event]) -> Self {
        let mut sum = Self::default();
        for event in events {
            if event.process != Process::Nemesis && event.kind != Kind::Invoke {
                sum.add(event);
            }
        }
        sum
    }

    /// Operations that ended in this way, over all levels: `ok_of("read")`.
    #[must_use]
    pub fn ok_of(&self, f: &str) -> u64 {
        let of = |name: &str| name.split('/').next() == Some(f) && name.ends_with("/ok");
        self.ops.iter().filter(|(name, _)| of(name)).map(|(_, count)| count).sum()
    }

    /// Share of operations whose outcome is unknown.
    #[must_use]
    pub fn unknown_ratio(&self) -> f64 {
        self.unknown as f64 / self.ended.max(1) as f64
    }

    /// Adds what another history holds.
    pub fn join(&mut self, other: &Self) {
        for (to, from) in [(&mut self.ops, &other.ops), (&mut self.errors, &other.errors)] {
            for (name, count) in from {
                *to.entry(name.clone()).or_default() += count;
            }
        }
        self.follower_reads += other.follower_reads;
        self.repeated += other.repeated;
        self.ended += other.ended;
        self.unknown += other.unknown;
    }

    fn add(&mut self, event: &Event) {
        let kind = match event.kind {
            Kind::Invoke | Kind::Ok => "ok",
            Kind::Fail => "fail",
            Kind::Info => "info",
        };
        let name = match event.f.as_str() {
            "read" | "scan" => format!("{}/{}/{kind}", event.f, name_of(event.mode().mode)),
            f => format!("{f}/{kind}"),
        };
        *self.ops.entry(name).or_default() += 1;
        if let Some(error) = &event.error {
            *self.errors.entry(format!("{}/{}", event.f, error.code)).or_default() += 1;
        }
        let follows = |role: &str| matches!(role, "follower" | "learner");
        self.follower_reads += match event.f.as_str() {
            "read" => u64::from(event.srv.as_ref().and_then(|srv| srv.role.as_deref()).is_some_and(follows)),
            "scan" => {
                let pages = event.value.get("pages").and_then(|pages| pages.as_array()).into_iter().flatten();
                pages.filter(|page| page["srv"]["role"].as_str().is_some_and(follows)).count() as u64
            }
            _ => 0,
        };
        self.repeated += u64::from(event.attempts.is_some_and(|attempts| attempts > 1));
        self.ended += 1;
        self.unknown += u64::from(event.kind == Kind::Info);
    }
}

const fn name_of(mode: Mode) -> &'static str {
    match mode {
        Mode::Linearizable => "linearizable",
        Mode::Lease => "lease",
        Mode::Bounded => "bounded",
        Mode::Session => "session",
        Mode::Eventual => "eventual",
    }
}
