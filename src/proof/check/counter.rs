//! Exactly once: what counters say follows from increments that each happened once, whatever was repeated.
//!
//! A number found, after an increment or by a read, is the sum of every increment that certainly came before, and of some
//! of those that may have. Two acknowledged increments of a key never give the same number.
//!
//! Invariants: increments are positive (a negative one makes its key unknown); what is written to the key in the load
//! phase is where it begins.

use super::{
    Findings, Verdict,
    ops::{Act, History, Op, Outcome, number},
    table::bound_ns,
};
use crate::proof::history::{Event, Phase};
use std::collections::BTreeMap;

/// The increments of one key, and what was found of it.
#[derive(Default)]
struct Counter<'a> {
    begins_at: i64,
    /// Increment, and by how much.
    adds: Vec<(Op<'a>, i64)>,
    /// Who found what (none: the key was absent), and how much of it is its own.
    found: Vec<(Op<'a>, Option<i64>, i64)>,
    /// What the checker does not understand.
    strange: Option<Op<'a>>,
}

/// Judges every counter.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let mut findings = Findings::default();
    judge(history, |_| true, &mut findings);
    findings.verdict("counter", &["increments"])
}

/// Judges what some operations found.
pub(super) fn judge(history: &History<'_>, of: impl Fn(&Op<'_>) -> bool, findings: &mut Findings) {
    for (key, mut counter) in counters(history) {
        counter.found.retain(|(op, _, _)| of(op));
        judge_counter(key, &counter, findings);
    }
}

fn counters<'a>(history: &History<'a>) -> BTreeMap<&'a str, Counter<'a>> {
    let mut counters: BTreeMap<&str, Counter<'a>> = BTreeMap::new();
    for op in &history.ops {
        for (key, act) in op.acts() {
            let counter = counters.entry(key).or_default();
            match act {
                Act::Add(by, found) => {
                    if by <= 0 {
                        counter.strange = Some(*op);
                    }
                    counter.adds.push((*op, by));
                    if let Some(found) = found {
                        counter.found.push((*op, Some(found), by));
                    }
                }
                Act::Set(Some(value)) if op.invoke.phase == Phase::Load && op.outcome() == Outcome::Done => {
                    match value.parse() {
                        Ok(value) => counter.begins_at = value,
                        Err(_) => counter.strange = Some(*op),
                    }
                }
                Act::Seen(None) => counter.found.push((*op, None, 0)),
                Act::Seen(Some(text)) => match number(&text.into()) {
                    Some(found) => counter.found.push((*op, Some(found), 0)),
                    None => counter.strange = Some(*op),
                },
                Act::Set(_) | Act::Swap(..) | Act::NotSeen(_) => counter.strange = Some(*op),
            }
        }
    }
    counters.retain(|_, counter| !counter.adds.is_empty());
    counters
}

/// Sums of increments up to each time.
fn sums(mut of: Vec<(u64, i64)>) -> Vec<(u64, i64)> {
    of.sort_unstable();
    let mut sum = 0;
    of.into_iter()
        .map(|(time, by)| {
            sum += by;
            (time, sum)
        })
        .collect()
}

fn sum_until(sums: &[(u64, i64)], included: impl Fn(u64) -> bool) -> i64 {
    sums.partition_point(|(time, _)| included(*time)).checked_sub(1).map_or(0, |last| sums[last].1)
}

fn judge_counter(key: &str, counter: &Counter<'_>, findings: &mut Findings) {
    if let Some(op) = counter.strange {
        findings.unknown("not-a-counter", Some(key), format!("{:?} is not what a counter takes", op.f()));
        return;
    }
    let acked = counter.adds.iter().filter(|(op, _)| op.outcome() == Outcome::Done);
    let acked = sums(acked.map(|(op, by)| (op.ret(), *by)).collect());
    let called = sums(counter.adds.iter().map(|(op, by)| (op.call(), *by)).collect());
    findings.count("increments", counter.adds.len() as u64);
    findings.count("reads", counter.found.iter().filter(|(op, _, _)| op.f() == "read").count() as u64);
    let mut results: BTreeMap<i64, Op<'_>> = BTreeMap::new();
    for (op, found, by) in &counter.found {
        let is_add = op.f() == "incr";
        let value = found.unwrap_or(counter.begins_at);
        let events = op.events();
        if is_add && let Some(other) = results.insert(value, *op) {
            let what = format!("two increments were both told {value}: one of them is lost");
            let events: Vec<&Event> = other.events().into_iter().chain(events.iter().copied()).collect();
            findings.wrong("lost-increment", Some(key), what, &events);
        }
        let most = counter.begins_at + sum_until(&called, |time| time <= op.ret());
        if value > most {
            let what = format!("{} {value}, but at most {most} had been called for: one was applied twice", told(op));
            findings.wrong("applied-twice", Some(key), what, &events);
        }
        let Some(time) = bound_ns(op).and_then(|bound_ns| op.call().checked_sub(bound_ns)) else { continue };
        let least = counter.begins_at + by + sum_until(&acked, |ret| ret < time);
        if value < least {
            let what = format!("{} {value}, but at least {least} had been acknowledged", told(op));
            findings.wrong("lost-increment", Some(key), what, &events);
        }
    }
    order(key, counter, findings);
}

fn told(op: &Op<'_>) -> String {
    format!("a {} was told", op.f())
}

/// What strong operations find never goes down, nor what one session finds.
fn order(key: &str, counter: &Counter<'_>, findings: &mut Findings) {
    let strong = counter.found.iter().filter(|(op, _, _)| op.is_strong());
    let strong: Vec<_> = strong.map(|(op, found, _)| (*op, *found)).collect();
    order_of(key, "went-back", &strong, findings);
    let mut sessions: BTreeMap<&str, Vec<(Op<'_>, Option<i64>)>> = BTreeMap::new();
    for (op, found, _) in counter.found.iter().filter(|(op, _, _)| !op.is_degraded()) {
        if let Some(session) = op.invoke.session.as_deref() {
            sessions.entry(session).or_default().push((*op, *found));
        }
    }
    for found in sessions.values() {
        order_of(key, "session-went-back", found, findings);
    }
}

fn order_of(key: &str, kind: &str, found: &[(Op<'_>, Option<i64>)], findings: &mut Findings) {
    let (mut calls, mut rets) = (found.to_vec(), found.to_vec());
    calls.sort_by_key(|(op, _)| op.call());
    rets.sort_by_key(|(op, _)| op.ret());
    let mut rets = rets.into_iter().peekable();
    let mut highest: Option<(Op<'_>, Option<i64>)> = None;
    for (op, found) in calls {
        while let Some(earlier) = rets.next_if(|(earlier, _)| earlier.ret() < op.call()) {
            if highest.is_none_or(|(_, highest)| highest < earlier.1) {
                highest = Some(earlier);
            }
        }
        // An increment gives more than what was there before.
        if let Some((earlier, before)) = highest
            && (found < before || (found == before && op.f() == "incr"))
        {
            let show = |found: Option<i64>| found.map_or_else(|| "nothing".to_owned(), |found| found.to_string());
            let what = format!("{} {} after {}", told(&op), show(found), show(before));
            let events: Vec<&Event> = earlier.events().into_iter().chain(op.events()).collect();
            findings.wrong(kind, Some(key), what, &events);
        }
    }
}
