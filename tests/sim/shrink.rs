//! Makes a failing plan small: takes away whatever it fails in the same way without.
//!
//! A run follows from its plan alone, so one run decides about one smaller plan. What counts as the same way is the set
//! of kinds of failures ([`signature`]).

use crate::{
    faults::Fault,
    plan::{Disks, Links, Plan, Raft, usual_down_after_ms},
    run::run,
    verdict::signature,
};
use std::{collections::BTreeSet, time::Duration};
use tokio::time::Instant; // Real time: no runtime is entered here.

/// How much may be tried.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    runs: u32,
    time: Duration,
}

impl Budget {
    /// In passing.
    pub(crate) const QUICK: Self = Self { runs: 120, time: Duration::from_secs(180) };
    /// When asked to.
    pub(crate) const PATIENT: Self = Self { runs: 600, time: Duration::from_secs(600) };
}

struct Shrinker {
    wanted: BTreeSet<String>,
    best: Plan,
    runs_left: u32,
    until: Instant,
}

/// A smaller plan that fails in the same way; none if the plan does not fail.
pub(crate) fn shrink(plan: &Plan, budget: Budget) -> Option<Plan> {
    let wanted = signature(&run(plan, false).failures);
    if wanted.is_empty() {
        return None;
    }
    let until = Instant::now() + budget.time;
    let mut shrinker = Shrinker { wanted, best: plan.clone(), runs_left: budget.runs, until };
    loop {
        let before = shrinker.best.clone();
        shrinker.drop_faults();
        shrinker.cut_the_tail();
        shrinker.drop_workloads();
        shrinker.simplify();
        shrinker.shorten();
        if shrinker.best == before || shrinker.is_over() {
            return Some(shrinker.best);
        }
    }
}

impl Shrinker {
    fn is_over(&self) -> bool {
        self.runs_left == 0 || Instant::now() >= self.until
    }

    /// Takes a smaller plan if it still fails in the same way.
    fn take(&mut self, smaller: Plan) -> bool {
        if smaller == self.best || self.is_over() {
            return false;
        }
        self.runs_left -= 1;
        let same = signature(&run(&smaller, false).failures) == self.wanted;
        if same {
            let size = |plan: &Plan| (plan.faults.len(), plan.workloads.len(), plan.nodes, plan.chaos_ms);
            println!("  smaller: {:?} (faults, workloads, nodes, ms)", size(&smaller));
            self.best = smaller;
        }
        same
    }

    fn attempt(&mut self, change: impl FnOnce(&mut Plan)) -> bool {
        let mut smaller = self.best.clone();
        change(&mut smaller);
        self.take(smaller)
    }

    /// Leaves out half of the faults, a quarter, …, single ones.
    fn drop_faults(&mut self) {
        let mut size = self.best.faults.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < self.best.faults.len() {
                let end = (at + size).min(self.best.faults.len());
                if !self.attempt(|plan| drop(plan.faults.drain(at..end))) {
                    at = end;
                }
            }
            size /= 2;
        }
    }

    fn cut_the_tail(&mut self) {
        let last = self.best.faults.iter().map(|planned| planned.at_ms + planned.for_ms).max().unwrap_or(0);
        self.attempt(|plan| plan.chaos_ms = (last + 100).min(plan.chaos_ms));
        while self.best.chaos_ms > 500 && self.attempt(|plan| plan.chaos_ms = plan.chaos_ms * 3 / 4) {}
    }

    /// Faults name workloads by number: what was aimed at another workload then hits something else, or nothing.
    fn drop_workloads(&mut self) {
        for at in (0..self.best.workloads.len()).rev() {
            if self.best.workloads.len() > 1 {
                self.attempt(|plan| {
                    plan.workloads.remove(at);
                });
            }
        }
        for at in 0..self.best.workloads.len() {
            self.attempt(|plan| plan.workloads[at].clients = 1);
            self.attempt(|plan| plan.workloads[at].clients = 2);
            self.attempt(|plan| plan.workloads[at].keys = 1.max(plan.workloads[at].keys / 4));
            self.attempt(|plan| plan.workloads[at].partitions = 1);
            self.attempt(|plan| plan.workloads[at].hashed = false);
            self.attempt(|plan| plan.workloads[at].routers = 0);
            self.attempt(|plan| plan.workloads[at].drop_replies = 0.0);
        }
    }

    fn simplify(&mut self) {
        self.attempt(|plan| (plan.nodes, plan.replicas) = (3, 3));
        self.attempt(|plan| plan.clocks.clear());
        self.attempt(|plan| plan.down_after_ms = usual_down_after_ms());
        let quiet = Links { delay_min_us: 100, delay_max_us: 2_000, loss: 0.0, duplicate: 0.0, reorder: 0.0 };
        self.attempt(|plan| plan.links = quiet);
        self.attempt(|plan| plan.disks = Disks { min_us: 300, max_us: 3_000, slow_share: 0.0, slow_max_us: 3_000 });
        self.attempt(|plan| plan.raft = Raft { heartbeat_ms: 150, election_ms: (600, 900), ..plan.raft.clone() });
        let (snapshot_bytes, log_keep_bytes, log_bytes_max) = (16 << 20, 4 << 20, 128 << 20);
        self.attempt(|plan| plan.raft = Raft { snapshot_bytes, log_keep_bytes, log_bytes_max, ..plan.raft.clone() });
        for at in 0..self.best.faults.len() {
            self.attempt(|plan| match &mut plan.faults[at].fault {
                Fault::Crash { torn, .. } | Fault::PowerLoss { torn } => *torn = false,
                _ => {}
            });
        }
    }

    /// Shortens faults, and brings them together.
    fn shorten(&mut self) {
        for at in 0..self.best.faults.len() {
            while self.best.faults[at].for_ms > 20 && self.attempt(|plan| plan.faults[at].for_ms /= 2) {}
        }
        let first = self.best.faults.iter().map(|planned| planned.at_ms).min().unwrap_or(0);
        self.attempt(|plan| {
            plan.faults.iter_mut().for_each(|planned| planned.at_ms -= first.saturating_sub(100));
            plan.chaos_ms -= first.saturating_sub(100);
        });
    }
}
