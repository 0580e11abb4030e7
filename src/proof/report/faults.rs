//! Faults of a run, and what each cost: how long nobody was answered.
//!
//! Invariants:
//! * `installed` and `healed` with the same id make one fault; what was never healed lasts to the end of the run;
//! * an outage is measured from the later of the fault's begin and the last answer, to the next answer, wherever that is:
//!   an outage that outlasts its fault is counted whole;
//! * where nobody asked there is no outage.

use super::ops::{Class, Op};
use crate::proof::{
    check::replicas,
    history::{Event, Process},
};
use serde::Serialize;
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};

/// One fault.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Fault {
    /// Name that the nemesis gave it.
    pub id: String,
    /// Kind: `kill`, `partition`, …
    pub f: String,
    /// Nodes that it hit; none: all of them.
    pub nodes: Vec<String>,
    /// Text for people.
    pub what: String,
    /// It could not be installed: it did nothing.
    pub skipped: bool,
    /// From when.
    pub from_ns: u64,
    /// Until when; none: it was never healed.
    pub to_ns: Option<u64>,
}

/// What one fault did to one class of operations.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Outage {
    /// Position of the fault in [`faults`]; none: of all the time without a fault, to compare with.
    pub fault: Option<usize>,
    /// Class.
    pub class: Class,
    /// Operations asked, or waiting, during the fault.
    pub asked: u64,
    /// Answers during the fault.
    pub answered: u64,
    /// Longest time without an answer, in microseconds.
    pub longest_gap_us: u64,
    /// That gap ends with the run: there was no further answer.
    pub never_ended: bool,
    /// From the begin of the fault to the first answer to a question asked after it, in microseconds.
    pub first_ok_us: Option<u64>,
}

/// All faults, in order of their begin. The same fault in the histories of several workloads is one.
#[must_use]
pub fn faults<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<Fault> {
    // A comparison of replicas hurts nobody.
    let hurts = |event: &&Event| event.process == Process::Nemesis && event.f != replicas::F;
    let mut said: Vec<&Event> = events.into_iter().filter(hurts).collect();
    said.sort_by_key(|event| event.time);
    let mut found: Vec<Fault> = Vec::new();
    let mut seen = BTreeSet::new();
    for event in said {
        let field = |name| event.value.get(name).map(text).unwrap_or_default();
        let (id, state) = (field("id"), field("state"));
        if !id.is_empty() && !seen.insert((id.clone(), state.clone())) {
            continue;
        }
        if state == "healed" {
            let healed = found.iter_mut().find(|fault| fault.id == id && !fault.skipped && fault.to_ns.is_none());
            if let Some(fault) = healed {
                fault.to_ns = Some(event.time);
            }
            continue;
        }
        let nodes = event.value.get("nodes").and_then(Json::as_array);
        found.push(Fault {
            id,
            f: event.f.clone(),
            nodes: nodes.map(|nodes| nodes.iter().map(text).collect()).unwrap_or_default(),
            what: field("what"),
            skipped: state == "skipped",
            from_ns: event.time,
            // Whoever says no state did something that is over at once.
            to_ns: (state != "installed").then_some(event.time),
        });
    }
    found
}

/// A JSON value as people write it: strings without quotes.
pub(super) fn text(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What every fault did to every class, and the longest gaps without any fault.
#[must_use]
pub fn outages(faults: &[Fault], ops: &[Op<'_>]) -> Vec<Outage> {
    let mut classes: BTreeMap<Class, Vec<&Op<'_>>> = BTreeMap::new();
    for op in ops {
        classes.entry(op.class).or_default().push(op);
    }
    let mut found = Vec::new();
    for (class, mut ops) in classes {
        ops.sort_by_key(|op| op.end_ns);
        let answers: Vec<(u64, u64)> =
            ops.iter().filter(|op| op.outcome.answered()).map(|op| (op.asked.time, op.end_ns)).collect();
        let calm = calm(faults, &answers);
        found.push(Outage { asked: ops.len() as u64, answered: answers.len() as u64, ..nothing(None, class, calm) });
        for (at, fault) in faults.iter().enumerate().filter(|(_, fault)| !fault.skipped) {
            found.push(outage(at, fault, class, &ops, &answers));
        }
    }
    found.sort_by_key(|outage| (outage.fault, outage.class));
    found
}

fn nothing(fault: Option<usize>, class: Class, longest_gap_ns: u64) -> Outage {
    let longest_gap_us = longest_gap_ns / 1_000;
    Outage { fault, class, asked: 0, answered: 0, longest_gap_us, never_ended: false, first_ok_us: None }
}

/// Longest time between two answers that no fault touches.
fn calm(faults: &[Fault], answers: &[(u64, u64)]) -> u64 {
    let touched = |from: u64, to: u64| {
        let touches = |fault: &Fault| fault.from_ns <= to && fault.to_ns.is_none_or(|end| from <= end);
        faults.iter().any(|fault| !fault.skipped && touches(fault))
    };
    let pairs = answers.windows(2).map(|pair| (pair[0].1, pair[1].1));
    pairs.filter(|(from, to)| !touched(*from, *to)).map(|(from, to)| to - from).max().unwrap_or(0)
}

/// `ops` and `answers` are of one class, in order of their end.
fn outage(at: usize, fault: &Fault, class: Class, ops: &[&Op<'_>], answers: &[(u64, u64)]) -> Outage {
    let from = fault.from_ns;
    let to = fault.to_ns.unwrap_or(u64::MAX);
    let mut outage = nothing(Some(at), class, 0);
    outage.asked = ops.iter().filter(|op| op.end_ns >= from && op.asked.time <= to).count() as u64;
    if outage.asked == 0 {
        return outage;
    }
    let after = &answers[answers.partition_point(|(_, end)| *end <= from)..];
    outage.first_ok_us = after.iter().find(|(asked, _)| *asked >= from).map(|(_, end)| (end - from) / 1_000);
    let mut since = from;
    let mut longest = 0;
    for (_, end) in after {
        longest = longest.max(end - since);
        since = *end;
        if *end > to {
            break;
        }
        outage.answered += 1;
    }
    // Nobody was answered after this; how long did they go on asking?
    let last = ops.iter().map(|op| op.end_ns).max().unwrap_or(0);
    if since <= to && last.saturating_sub(since) > longest {
        longest = last - since;
        outage.never_ended = true;
    }
    outage.longest_gap_us = longest / 1_000;
    outage
}
