//! What the page carries: figures, and operations by column, each text once.
//!
//! Invariants:
//! * the page stays of a size that a browser opens at once: a bounded number of operations, texts cut at a length;
//! * operations of a violation are always there, in full; then come failed, unknown and slow ones, then a fair sample of the rest;
//!   the page says how many it leaves out.

use super::{
    Figures, Report,
    faults::text,
    leaders::{Reign, leaders},
    ops::{Op, Outcome},
    stats::bucket_ns,
};
use crate::proof::{
    check::{Valid, Verdict},
    history::{Event, Served},
};
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, BTreeSet};

/// Operations that the timeline holds.
pub(super) const OPS_MAX: usize = 60_000;
/// Events that a violation lists.
const SHOWN_EVENTS_MAX: usize = 200;
/// Characters of a value, of an ordinary operation.
const TEXT_CHARS_MAX: usize = 120;
/// The same, of an operation that a violation names.
const SHOWN_TEXT_CHARS_MAX: usize = 4_000;
/// Partitions whose leaders are drawn: those with most changes.
const STRIPS_MAX: usize = 24;

/// Everything, as the page's scripts read it.
pub(super) fn data(report: &Report, figures: &Figures<'_>) -> Json {
    let named: Vec<BTreeSet<u64>> = report.workloads.iter().map(|workload| named(&workload.verdicts)).collect();
    let kept = keep(&figures.ops, &named, bucket_ns(figures.duration_ns), OPS_MAX);
    let mut columns = Columns::default();
    let mut lane_base = 0;
    let mut workloads = Vec::new();
    for (at, workload) in report.workloads.iter().enumerate() {
        let ops = &figures.ops[at];
        let lanes = ops.iter().map(|op| op.lane + 1).max().unwrap_or(0);
        let mut position: BTreeMap<u64, usize> = BTreeMap::new();
        for op in kept[at].iter().map(|kept| &ops[*kept]) {
            let in_full = is_named(op, &named[at]);
            if in_full {
                position.insert(op.asked.index, columns.len());
                position.extend(op.done.map(|done| (done.index, columns.len())));
            }
            columns.push(op, lane_base + op.lane, in_full);
        }
        workloads.push(json!({
            "name": workload.run.workload,
            "lanes": lanes,
            "asked": ops.len(),
            "promises": workload.run.promises,
            "verdicts": workload.verdicts.iter().map(|verdict| judged(verdict, &workload.events, &position)).collect::<Vec<_>>(),
        }));
        lane_base += lanes;
    }
    let shown: usize = kept.iter().map(Vec::len).sum();
    json!({
        "verdict": report.outcome(),
        "run": report.run,
        "reproduce": report.reproduce,
        "duration_us": figures.duration_ns / 1_000,
        "workloads": workloads,
        "gates": report.gates,
        "counts": figures.counts,
        "latency": figures.latencies,
        "bucket_us": bucket_ns(figures.duration_ns) / 1_000,
        "series": figures.series,
        "nodes": nodes(report, figures),
        "faults": figures.faults,
        "outages": figures.outages,
        "leaders": strips(figures),
        "shown": shown,
        "asked": figures.all.len(),
        "ops": columns.json(),
    })
}

/// Indexes of all events that violations name.
fn named(verdicts: &[Verdict]) -> BTreeSet<u64> {
    let violations = verdicts.iter().flat_map(|verdict| &verdict.violations);
    violations.flat_map(|violation| violation.events.iter().take(SHOWN_EVENTS_MAX)).copied().collect()
}

fn is_named(op: &Op<'_>, named: &BTreeSet<u64>) -> bool {
    named.contains(&op.asked.index) || op.done.is_some_and(|done| named.contains(&done.index))
}

/// Positions of the operations to show, at most `max`, by workload.
pub(super) fn keep(ops: &[Vec<Op<'_>>], named: &[BTreeSet<u64>], slow_ns: u64, max: usize) -> Vec<Vec<usize>> {
    let rank = |workload: usize, op: &Op<'_>| match op.outcome {
        _ if is_named(op, &named[workload]) => 0,
        Outcome::Fail | Outcome::Info => 1,
        // Left out, it would look as if its client had done nothing.
        _ if op.took_ns() >= slow_ns => 1,
        Outcome::Ok | Outcome::Mismatch => 2,
    };
    let mut ranks: [Vec<(usize, usize)>; 3] = [Vec::new(), Vec::new(), Vec::new()];
    for (workload, ops) in ops.iter().enumerate() {
        for (at, op) in ops.iter().enumerate() {
            ranks[rank(workload, op)].push((workload, at));
        }
    }
    let mut kept: Vec<Vec<usize>> = vec![Vec::new(); ops.len()];
    let mut left = max;
    for found in ranks {
        let take = found.len().min(left);
        left -= take;
        // Evenly over all of them, so that no part of the run looks empty.
        for nth in 0..take {
            let (workload, at) = found[nth * found.len() / take];
            kept[workload].push(at);
        }
    }
    kept.iter_mut().for_each(|kept| kept.sort_unstable());
    kept
}

/// A verdict whose violations point at operations of the timeline.
fn judged(verdict: &Verdict, events: &[Event], position: &BTreeMap<u64, usize>) -> Json {
    let violations = verdict.violations.iter().map(|violation| {
        let listed = || violation.events.iter().take(SHOWN_EVENTS_MAX);
        let ops: BTreeSet<usize> = listed().filter_map(|index| position.get(index)).copied().collect();
        let others = listed().filter(|index| !position.contains_key(index));
        let others: Vec<Json> = others.map(|index| other(*index, events)).collect();
        json!({
            "kind": violation.kind,
            "what": violation.what,
            "key": violation.key,
            "from_us": violation.window_ns.0 / 1_000,
            "to_us": violation.window_ns.1 / 1_000,
            "ops": ops,
            "others": others,
            "left_out": violation.events.len().saturating_sub(SHOWN_EVENTS_MAX),
        })
    });
    json!({
        "checker": verdict.checker,
        "valid": match verdict.valid { Valid::True => "true", Valid::False => "false", Valid::Unknown => "unknown" },
        "looked_at": verdict.looked_at,
        "violations": violations.collect::<Vec<_>>(),
    })
}

/// An event that is no client's: a fault, or one that is not in the history at all.
fn other(index: u64, events: &[Event]) -> Json {
    let event = usize::try_from(index).ok().and_then(|at| events.get(at));
    let said = event.map(|event| format!("{} {}", event.f, cut(&text(&event.value), TEXT_CHARS_MAX)));
    json!({ "index": index, "time_us": event.map(|event| event.time / 1_000), "said": said })
}

fn cut(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((at, _)) => format!("{}… ({} bytes)", &text[..at], text.len()),
        None => text.to_owned(),
    }
}

/// Names of all nodes that the run knows of.
fn nodes(report: &Report, figures: &Figures<'_>) -> BTreeSet<String> {
    let runs = report.workloads.iter().map(|workload| &workload.run).chain([&report.run]);
    let mut nodes: BTreeSet<String> = runs.flat_map(|run| run.nodes.iter().cloned()).collect();
    nodes.extend(figures.faults.iter().flat_map(|fault| fault.nodes.iter().cloned()));
    nodes
}

fn strips(figures: &Figures<'_>) -> Vec<Json> {
    let mut strips: Vec<(u64, Vec<Reign>)> = leaders(&figures.all).into_iter().collect();
    strips.sort_by_key(|(_, reigns)| std::cmp::Reverse(reigns.len()));
    strips.truncate(STRIPS_MAX);
    strips.sort_by_key(|(part, _)| *part);
    strips.into_iter().map(|(part, reigns)| json!({ "part": part, "reigns": reigns })).collect()
}

/// Texts of an operation, each at most `chars_max` long.
fn texts(op: &Op<'_>, chars_max: usize) -> [(&'static str, Option<String>); 13] {
    let (asked, done) = (op.asked, op.done);
    let srv = done.and_then(|done| done.srv.as_ref());
    let read = asked.read.map(|read| match read.bound_ms {
        Some(bound_ms) => format!("{} ≤ {bound_ms} ms", read.mode.name()),
        None => read.mode.name().to_owned(),
    });
    let answer = done.filter(|_| op.outcome.answered()).map(|done| done.observed.as_ref().unwrap_or(&done.value));
    // What only repeats the question says nothing; that a read found nothing is an answer.
    let answer = answer.filter(|answer| **answer != asked.value || asked.f == "read");
    let said = done.and_then(|done| done.error.as_ref()).map(|error| match error.msg.as_str() {
        "" => error.code.clone(),
        msg => format!("{}: {msg}", error.code),
    });
    [
        ("f", Some(asked.f.clone())),
        ("class", Some(op.class.to_string())),
        ("read", read),
        ("key", asked.key.as_ref().map(|key| cut(key, chars_max))),
        ("arg", (!asked.value.is_null()).then(|| cut(&text(&asked.value), chars_max))),
        ("res", answer.map(|answer| cut(&text(answer), chars_max))),
        ("error", said.map(|said| cut(&said, chars_max))),
        ("session", asked.session.clone()),
        ("req", asked.req.clone()),
        ("asked_node", asked.node.clone()),
        ("node", srv.and_then(|srv| srv.node.clone())),
        ("role", srv.and_then(|srv| srv.role.clone())),
        // Wider than a number of JavaScript.
        ("version", srv.and_then(|srv| srv.version).map(|version| version.to_string())),
    ]
}

/// Numbers of an operation.
fn numbers(op: &Op<'_>) -> [(&'static str, Option<i64>); 12] {
    let done = op.done;
    let srv = done.and_then(|done| done.srv.as_ref());
    let of_srv = |field: fn(&Served) -> Option<u64>| srv.and_then(field).map(u64::cast_signed);
    [
        ("took", Some((op.took_ns() / 1_000).cast_signed())),
        ("process", Some(op.process.cast_signed())),
        ("outcome", Some(op.outcome as i64)),
        ("index", Some(op.asked.index.cast_signed())),
        ("done", done.map(|done| done.index.cast_signed())),
        ("attempts", done.and_then(|done| done.attempts).map(i64::from)),
        ("part", of_srv(|srv| srv.part)),
        ("epoch", of_srv(|srv| srv.epoch)),
        ("term", of_srv(|srv| srv.term)),
        ("log", of_srv(|srv| srv.log)),
        ("lag_ms", of_srv(|srv| srv.lag_ms)),
        ("degraded", of_srv(|srv| srv.degraded.filter(|degraded| *degraded).map(u64::from))),
    ]
}

/// Operations, one list for each field. A text is an index into `texts`; 0 is none.
#[derive(Default)]
struct Columns {
    texts: Vec<String>,
    index_of: BTreeMap<String, usize>,
    columns: BTreeMap<&'static str, Vec<Json>>,
    last_start_us: u64,
}

impl Columns {
    fn len(&self) -> usize {
        self.columns.get("start").map_or(0, Vec::len)
    }

    fn text(&mut self, text: Option<String>) -> usize {
        let Some(text) = text else { return 0 };
        if let Some(index) = self.index_of.get(&text) {
            return *index;
        }
        self.texts.push(text.clone());
        self.index_of.insert(text, self.texts.len());
        self.texts.len()
    }

    fn push(&mut self, op: &Op<'_>, lane: usize, in_full: bool) {
        for (name, text) in texts(op, if in_full { SHOWN_TEXT_CHARS_MAX } else { TEXT_CHARS_MAX }) {
            let index = self.text(text);
            self.columns.entry(name).or_default().push(index.into());
        }
        let start_us = op.asked.time / 1_000;
        // As differences: shorter.
        let start = Some(start_us.wrapping_sub(self.last_start_us).cast_signed());
        self.last_start_us = start_us;
        let placed = [("start", start), ("lane", Some(lane as i64))];
        for (name, number) in placed.into_iter().chain(numbers(op)) {
            self.columns.entry(name).or_default().push(number.map_or_else(|| Json::from(""), Json::from));
        }
    }

    /// A column in which every operation says the same is left as that one value.
    fn json(self) -> Json {
        let length = self.len();
        let columns = self.columns.into_iter().map(|(name, column)| {
            let all_same = column.windows(2).all(|pair| pair[0] == pair[1]);
            let value = match column.first() {
                Some(first) if all_same && length > 1 => first.clone(),
                _ => Json::from(column),
            };
            (name.to_owned(), value)
        });
        json!({ "length": length, "columns": columns.collect::<serde_json::Map<_, _>>(), "texts": self.texts })
    }
}
