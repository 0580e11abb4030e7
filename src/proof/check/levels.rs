//! Reads of every level: each is as fresh as its level promises and as its own answer says, comes from a write that can
//! have happened, and does not go back behind what its session has seen or written. Versions go up with the writes.
//!
//! An operation with a `session` gives the session's token and takes the new one, whatever its level: leave the session
//! out where no token was given.
//!
//! Invariants:
//! * a violation is certain: by intervals, by versions, or by log positions of one partition;
//! * complete for reads of a value whose only write was acknowledged; otherwise what cannot be ruled out is let pass
//!   ([`super::linear`] rules out the rest for strong reads).

use super::{
    Findings, Verdict,
    ops::{Act, History, Op, Outcome, shown, text},
    table::{Found, Key, Table, bound_ns},
};
use crate::proof::history::Event;
use std::collections::BTreeMap;

/// Judges every read.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let table = Table::of(history, &[]);
    let mut findings = Findings::default();
    // Before the reads: where versions go back, so many seem stale that nothing else would be listed.
    versions(history, &table, &mut findings);
    for op in history.ops.iter().filter(|op| op.f() == "read") {
        judge_read(&table, op, &mut findings);
    }
    sessions(history, &table, &mut findings);
    findings.verdict("levels", &["reads"])
}

/// Judges a read by itself; says whether there was something to judge.
pub(super) fn judge_read<'a>(table: &Table<'a>, op: &Op<'a>, findings: &mut Findings) -> bool {
    let Some((key, Act::Seen(value))) = op.acts().into_iter().next() else { return false };
    if table.counting.contains(key) {
        return false;
    }
    findings.count("reads", 1);
    findings.count(&format!("{:?} reads", op.invoke.mode().mode).to_lowercase(), 1);
    let bound_ns = bound_ns(op);
    findings.count("reads that say how stale they are", u64::from(!op.is_strong() && bound_ns.is_some()));
    let found = Found { op: *op, version: op.version(), value };
    let none = Key::default();
    if let Some(wrong) = table.keys.get(key).unwrap_or(&none).judge(&found, bound_ns) {
        findings.wrong(wrong.kind, Some(key), format!("{} read {}", level(op), wrong.what), &wrong.events);
    }
    true
}

/// The level of a read, in a word.
fn level(op: &Op<'_>) -> String {
    format!("{:?}", op.invoke.mode().mode).to_lowercase()
}

/// What a session knows of a key: the latest call among the writes that it has seen or done, and the highest version.
#[derive(Clone, Copy, Default)]
struct Floor<'a> {
    write: Option<Op<'a>>,
    is_row: bool,
    version: u64,
}

/// What a session knows.
#[derive(Default)]
struct Known<'a> {
    keys: BTreeMap<&'a str, Floor<'a>>,
    /// By partition: the highest log position, and whose.
    logs: BTreeMap<u64, (u64, Option<Op<'a>>)>,
}

/// An operation of a session, and what the session knew when it was called.
struct Asked<'a> {
    op: Op<'a>,
    floor: Floor<'a>,
    log: BTreeMap<u64, (u64, Option<Op<'a>>)>,
}

/// What a session sees does not go back.
fn sessions<'a>(history: &History<'a>, table: &Table<'a>, findings: &mut Findings) {
    let mut sessions: BTreeMap<&str, Known<'a>> = BTreeMap::new();
    let mut asked: BTreeMap<u64, Asked<'a>> = BTreeMap::new();
    let mut ops: BTreeMap<u64, (Op<'a>, bool)> = BTreeMap::new();
    for op in history.ops.iter().filter(|op| op.invoke.session.is_some() && op.outcome() == Outcome::Done) {
        ops.insert(op.invoke.index, (*op, true));
        if let Some(done) = op.done {
            ops.insert(done.index, (*op, false));
        }
    }
    for (op, begins) in ops.values() {
        let session = sessions.entry(op.invoke.session.as_deref().unwrap_or_default()).or_default();
        if *begins {
            let floor = op.invoke.key.as_deref().and_then(|key| session.keys.get(key)).copied().unwrap_or_default();
            asked.insert(op.invoke.index, Asked { op: *op, floor, log: session.logs.clone() });
        } else if let Some(before) = asked.remove(&op.invoke.index) {
            findings.count("session operations", 1);
            judge_session(table, &before, findings);
            learn(table, session, op);
        }
    }
}

/// What the session knows after an operation.
fn learn<'a>(table: &Table<'a>, session: &mut Known<'a>, op: &Op<'a>) {
    if let Some(srv) = op.done.and_then(|done| done.srv.as_ref())
        && let (Some(part), Some(log)) = (srv.part, srv.log)
    {
        let known = session.logs.entry(part).or_default();
        if log > known.0 {
            *known = (log, Some(*op));
        }
    }
    for (key, act) in op.acts() {
        let (write, is_row) = match &act {
            Act::Set(value) | Act::Swap(_, value) => (Some(*op), value.is_some()),
            Act::Seen(Some(value)) => {
                let key = table.keys.get(key);
                (key.and_then(|key| Some(key.writes[key.writer(value)?].op)), true)
            }
            Act::Seen(None) | Act::NotSeen(_) | Act::Add(..) => (None, false),
        };
        let floor = session.keys.entry(key).or_default();
        floor.version = floor.version.max(op.version().unwrap_or_default());
        if let Some(write) = write
            && floor.write.is_none_or(|known| known.call() < write.call())
        {
            (floor.write, floor.is_row) = (Some(write), is_row);
        }
    }
}

fn judge_session<'a>(table: &Table<'a>, asked: &Asked<'a>, findings: &mut Findings) {
    let op = &asked.op;
    if op.is_degraded() || op.f() != "read" {
        return;
    }
    let srv = op.done.and_then(|done| done.srv.as_ref());
    if let Some((part, log)) = srv.and_then(|srv| Some((srv.part?, srv.log?)))
        && let Some((known, Some(by))) = asked.log.get(&part)
        && log < *known
    {
        let what = format!("read p{part} at {log} after its session had seen it at {known}");
        let events: Vec<&Event> = by.events().into_iter().chain(op.events()).collect();
        findings.wrong("session-went-back", op.invoke.key.as_deref(), what, &events);
        return;
    }
    let Some((name, Act::Seen(value))) = op.acts().into_iter().next() else { return };
    let Some((key, write)) = table.keys.get(name).zip(asked.floor.write) else { return };
    let is_older = match value.as_deref() {
        Some(value) => {
            let version = op.version().is_some_and(|version| version < asked.floor.version);
            version || !key.may_follow(value, write.call())
        }
        None => asked.floor.is_row && !key.may_be_deleted(write.call(), op.ret()),
    };
    if is_older {
        let what = format!(
            "{} read found {} after its session had seen or written {}",
            level(op),
            shown(value.as_deref()),
            written(&write, name)
        );
        let older = value.as_deref().and_then(|value| key.writer(value)).map(|at| key.writes[at].op);
        let ops = older.into_iter().chain([write, *op]);
        let events: Vec<&Event> = ops.flat_map(|op| op.events()).collect();
        findings.wrong("session-went-back", Some(name), what, &events);
    }
}

fn written(op: &Op<'_>, key: &str) -> String {
    let left = op.acts().into_iter().find_map(|(of, act)| match act {
        Act::Set(value) | Act::Swap(_, value) if of == key => Some(value),
        _ => None,
    });
    left.map_or_else(|| text(&op.invoke.value).unwrap_or_default(), |value| shown(value.as_deref()))
}

/// Versions of a key go up in the order of its writes, and one version is one value.
fn versions<'a>(history: &History<'a>, table: &Table<'a>, findings: &mut Findings) {
    for (name, key) in &table.keys {
        let versioned = key.writes.iter().filter(|write| write.op.outcome() == Outcome::Done);
        let mut calls: Vec<Op<'a>> = versioned.map(|write| write.op).filter(|op| op.version().is_some()).collect();
        let mut rets = calls.clone();
        calls.sort_by_key(Op::call);
        rets.sort_by_key(Op::ret);
        findings.count("versions", calls.len() as u64);
        let mut rets = rets.into_iter().peekable();
        let mut highest: Option<Op<'a>> = None;
        for op in calls {
            while let Some(earlier) = rets.next_if(|earlier| earlier.ret() < op.call()) {
                if highest.is_none_or(|highest| highest.version() < earlier.version()) {
                    highest = Some(earlier);
                }
            }
            if let Some(earlier) = highest.filter(|earlier| earlier.version() >= op.version()) {
                let (before, after) = (earlier.version().unwrap_or_default(), op.version().unwrap_or_default());
                let what = format!("version {after} was given after version {before}");
                let events: Vec<&Event> = earlier.events().into_iter().chain(op.events()).collect();
                findings.wrong("version-went-back", Some(name), what, &events);
            }
        }
    }
    one_value_each(history, table, findings);
}

fn one_value_each<'a>(history: &History<'a>, table: &Table<'a>, findings: &mut Findings) {
    let mut values: BTreeMap<(&str, u64), (String, Op<'a>)> = BTreeMap::new();
    for op in history.ops.iter().filter(|op| op.outcome() == Outcome::Done && op.f() != "batch") {
        let Some(version) = op.version() else { continue };
        for (key, act) in op.acts() {
            let (Act::Set(Some(value)) | Act::Swap(_, Some(value)) | Act::Seen(Some(value))) = act else { continue };
            if table.counting.contains(key) {
                continue;
            }
            let (known, by) = values.entry((key, version)).or_insert_with(|| (value.clone(), *op));
            if *known != value {
                let what = format!("version {version} is of {known:?} and of {value:?}");
                let events: Vec<&Event> = by.events().into_iter().chain(op.events()).collect();
                findings.wrong("version-of-two-values", Some(key), what, &events);
            }
        }
    }
}
