//! What is wrong with a run: under a short name that stays the same while its plan is shrunk, and in a sentence.

use meridian::proof::{
    check::{Valid, Verdict, judge},
    history::Event,
    workload::Workload,
};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

/// Of one kind so many are kept.
const OF_A_KIND_MAX: usize = 5;

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub(crate) struct Failure {
    pub(crate) kind: String,
    pub(crate) what: String,
}

impl Failure {
    pub(crate) fn new(kind: impl Into<String>, what: impl Into<String>) -> Self {
        Self { kind: kind.into(), what: what.into() }
    }

    /// Something that was to happen once all was sound again, and did not.
    pub(crate) fn liveness(demand: &str, why: &str) -> Self {
        Self::new(format!("liveness: {demand}"), format!("in vain: {demand}: {why}"))
    }

    /// A panic: its first line, without the numbers, which differ from run to run.
    pub(crate) fn panic(message: &str) -> Self {
        let first = message.lines().next().unwrap_or_default();
        let kind: String = first.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).take(120).collect();
        Self::new(format!("panic: {kind}"), message)
    }
}

/// All of a run, gathered from wherever they are noticed.
#[derive(Default)]
pub(crate) struct Failures(Mutex<Vec<Failure>>);

impl Failures {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn add(&self, failure: Failure) {
        let mut all = self.0.lock().unwrap();
        if all.iter().filter(|known| known.kind == failure.kind).count() < OF_A_KIND_MAX {
            all.push(failure);
        }
    }

    pub(crate) fn take(&self) -> Vec<Failure> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// What two runs have in common that fail in the same way.
pub(crate) fn signature(failures: &[Failure]) -> BTreeSet<String> {
    failures.iter().map(|failure| failure.kind.clone()).collect()
}

/// What the checkers say of a history, and what is wrong with it. A checker that could not decide is as bad as one that
/// found something.
pub(crate) fn judged(workload: Workload, events: &[Event]) -> (Vec<Verdict>, Vec<Failure>) {
    let verdicts = judge(workload.name(), events);
    let mut failures = Vec::new();
    for verdict in &verdicts {
        match verdict.valid {
            Valid::True => {}
            Valid::Unknown => {
                let what = format!("{workload}: {} could not decide: {:?}", verdict.checker, verdict.violations);
                failures.push(Failure::new(format!("undecided: {}", verdict.checker), what));
            }
            Valid::False => failures.extend(
                verdict.violations.iter().map(|it| Failure::new(it.kind.clone(), format!("{workload}: {}", it.what))),
            ),
        }
    }
    (verdicts, failures)
}
