//! What runs have seen, added up; and the gates that a run of many seeds must pass, so that seeing nothing is not taken
//! for finding nothing.

use crate::{plan, run::Outcome};
use std::{collections::BTreeMap, fmt, time::Duration};

/// Of the operations fewer than this share may have an unknown outcome.
const UNKNOWN_SHARE_MAX: f64 = 0.3;

/// Figures of many runs.
#[derive(Clone, Default, serde::Serialize)]
pub(crate) struct Coverage {
    pub(crate) seeds: u64,
    pub(crate) failed: u64,
    simulated_s: u64,
    real_s: f64,
    counts: BTreeMap<String, u64>,
}

impl Coverage {
    pub(crate) fn add(&mut self, outcome: &Outcome, real: Duration) {
        self.seeds += 1;
        self.failed += u64::from(!outcome.failures.is_empty());
        self.simulated_s += outcome.simulated.as_secs();
        self.real_s += real.as_secs_f64();
        for (name, count) in &outcome.counts {
            *self.counts.entry(name.clone()).or_default() += count;
        }
    }

    pub(crate) fn join(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.failed += other.failed;
        self.simulated_s += other.simulated_s;
        self.real_s += other.real_s;
        for (name, count) in &other.counts {
            *self.counts.entry(name.clone()).or_default() += count;
        }
    }

    fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// What too little has been seen of, for so many seeds.
    pub(crate) fn gaps(&self) -> Vec<String> {
        let mut gaps = Vec::new();
        let mut want = |name: &str, least: u64| {
            if self.count(name) < least {
                gaps.push(format!("{name}: {}, not {least}", self.count(name)));
            }
        };
        for kind in plan::KINDS {
            want(&format!("fault/{kind}"), 1);
        }
        for name in ["leader-changes", "snapshot-installs", "follower-reads", "repeated", "fell-asleep", "woke"] {
            want(name, self.seeds);
        }
        for name in [
            "joined",
            "refused-to-start",
            "ended-by-disk",
            "keyspaces-created",
            "keyspaces-dropped",
            "divided",
            "merged",
            "stands/draining",
            "left",
            "lost-and-rebuilt",
            "lost-and-removed",
            "returned-late",
        ] {
            want(name, 1);
        }
        for f in ["write", "cas", "delete", "incr", "batch"] {
            want(&format!("op/{f}/ok"), self.seeds);
        }
        for mode in ["linearizable", "lease", "bounded", "session", "eventual"] {
            want(&format!("op/read/{mode}/ok"), self.seeds);
        }
        for mode in ["linearizable", "bounded", "eventual"] {
            want(&format!("op/scan/{mode}/ok"), self.seeds);
        }
        let unknown = self.count("unknown") as f64 / self.count("ended").max(1) as f64;
        if unknown >= UNKNOWN_SHARE_MAX {
            gaps.push(format!("{:.0} % of the operations have an unknown outcome", unknown * 100.0));
        }
        gaps
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hours = self.simulated_s as f64 / 3_600.0;
        let per_seed = self.real_s / (self.seeds.max(1) as f64);
        writeln!(f, "{:>12}  seeds, of which {} failed", self.seeds, self.failed)?;
        writeln!(f, "{hours:>12.2}  simulated hours, {per_seed:.2} s of a core per seed")?;
        for (name, count) in &self.counts {
            writeln!(f, "{count:>12}  {name}")?;
        }
        Ok(())
    }
}
