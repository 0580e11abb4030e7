//! Whether a history is one: single-threaded processes, intervals, errors that say what they must.
//!
//! Invariant: what the reader of the file refuses already ([`crate::proof::history::read`]) is not repeated here, except
//! for what a history that was never a file can break.

use super::{
    Findings, Verdict,
    ops::{History, Outcome},
};
use crate::proof::history::{Kind, Process};

/// Judges the form of a history.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let mut findings = Findings::default();
    findings.count("events", history.events.len() as u64);
    findings.count("operations", history.ops.len() as u64);
    for pair in history.events.windows(2) {
        if pair[1].index != pair[0].index + 1 {
            findings.wrong(
                "index-gap",
                None,
                format!("{} follows {}", pair[1].index, pair[0].index),
                &[&pair[0], &pair[1]],
            );
        }
        if pair[1].time < pair[0].time {
            findings.wrong("time-went-back", None, "time goes back".to_owned(), &[&pair[0], &pair[1]]);
        }
    }
    for event in history.events {
        if event.process == Process::Nemesis && event.kind != Kind::Info {
            findings.wrong("not-well-formed", None, "the nemesis only ever says \"info\"".to_owned(), &[event]);
        }
    }
    for (what, events) in &history.faults {
        findings.wrong("not-well-formed", None, what.clone(), events);
    }
    for op in &history.ops {
        if op.done.is_some_and(|done| done.kind == Kind::Fail) && !op.is_definite() {
            let what = "a \"fail\" whose error is not definite".to_owned();
            findings.wrong("fail-not-definite", op.invoke.key.as_deref(), what, &op.events());
        }
        if ["read", "write", "cas", "delete", "incr"].contains(&op.f()) && op.invoke.key.is_none() {
            findings.wrong("no-key", None, format!("a {:?} without a key", op.f()), &op.events());
        }
        match op.outcome() {
            Outcome::Done => findings.count("ok", 1),
            Outcome::Refused => findings.count("fail", 1),
            Outcome::Unknown => findings.count("info", 1),
        }
    }
    findings.verdict("format", &["operations"])
}
