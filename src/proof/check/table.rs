//! What is known of the writes of each key, and what it says of a read: in the time of a binary search.
//!
//! Sound for any history, and near complete where the values written to a key are unique. "Certainly before" is by
//! intervals: the one was over before the other was called. A write of unknown outcome was over when the first read
//! of its value was.
//!
//! Invariant: keys that count are left out (see [`super::counter`]).

use super::ops::{Act, History, OPEN, Op, Outcome, shown};
use crate::proof::history::{Event, Mode};
use std::collections::{BTreeMap, BTreeSet};

const NS_PER_MS: u64 = 1_000_000;

/// What a read found of one key.
#[derive(Clone, Debug)]
pub(super) struct Found<'a> {
    pub(super) op: Op<'a>,
    pub(super) value: Option<String>,
    /// Version of the row found.
    pub(super) version: Option<u64>,
}

/// What is wrong with a read.
#[derive(Debug)]
pub(super) struct Wrong<'a> {
    pub(super) kind: &'static str,
    pub(super) what: String,
    pub(super) events: Vec<&'a Event>,
}

/// Writes up to a time, the one that was called last, and the one with the highest version.
#[derive(Clone, Copy, Debug)]
struct Prefix {
    time: u64,
    /// Latest call, and whose.
    call: (u64, usize),
    /// Highest version, and whose.
    version: (u64, usize),
}

#[derive(Debug)]
pub(super) struct Write<'a> {
    pub(super) op: Op<'a>,
    /// What it left; none: it deleted.
    pub(super) value: Option<String>,
    /// When it had certainly taken effect.
    pub(super) over: u64,
}

/// The writes of one key.
#[derive(Debug, Default)]
pub(super) struct Key<'a> {
    pub(super) writes: Vec<Write<'a>>,
    by_value: BTreeMap<String, Vec<usize>>,
    /// Acknowledged, by return.
    acked: Vec<Prefix>,
    /// Acknowledged or found by a strong read, by the end of the first operation that shows it.
    shown: Vec<Prefix>,
    /// As `acked` and `shown`, without deletes.
    acked_rows: Vec<Prefix>,
    shown_rows: Vec<Prefix>,
    /// By call: the latest end of the deletes called up to then.
    deletes: Vec<(u64, u64)>,
}

/// All keys.
#[derive(Debug)]
pub(super) struct Table<'a> {
    pub(super) keys: BTreeMap<&'a str, Key<'a>>,
    /// Keys that count.
    pub(super) counting: BTreeSet<&'a str>,
}

impl<'a> Table<'a> {
    /// Takes in the writes, with what else is known to have been found: rows of scans.
    pub(super) fn of(history: &History<'a>, scanned: &[(String, Found<'a>)]) -> Self {
        let mut table = Self { keys: BTreeMap::new(), counting: BTreeSet::new() };
        let mut found: BTreeMap<&str, Vec<Found<'a>>> = BTreeMap::new();
        for op in &history.ops {
            table.add_refused(op);
            for (key, act) in op.acts() {
                let value = match act {
                    Act::Set(value) | Act::Swap(_, value) => value,
                    Act::Seen(value) => {
                        let version = (op.f() == "read").then(|| op.version()).flatten();
                        found.entry(key).or_default().push(Found { op: *op, value, version });
                        continue;
                    }
                    Act::NotSeen(_) => continue,
                    Act::Add(..) => {
                        table.counting.insert(key);
                        continue;
                    }
                };
                table.keys.entry(key).or_default().writes.push(Write { op: *op, value, over: op.ret() });
            }
        }
        for (key, row) in scanned {
            if let Some((key, _)) = table.keys.get_key_value(key.as_str()) {
                found.entry(key).or_default().push(row.clone());
            }
        }
        for counting in &table.counting {
            table.keys.remove(counting);
        }
        for (key, writes) in &mut table.keys {
            writes.index(found.get(key).map(Vec::as_slice).unwrap_or_default());
        }
        table
    }

    /// Refused writes are kept: whoever finds their value has found what never was.
    fn add_refused(&mut self, op: &Op<'a>) {
        if op.outcome() != Outcome::Refused {
            return;
        }
        let invoke = op.invoke;
        let value = match op.f() {
            "write" => super::ops::text(&invoke.value),
            "cas" => invoke.value.get(1).and_then(super::ops::text),
            "batch" => {
                for (key, value) in op.batch().1 {
                    self.keys.entry(key).or_default().writes.push(Write { op: *op, value, over: OPEN });
                }
                return;
            }
            _ => return,
        };
        if let Some(key) = invoke.key.as_deref() {
            self.keys.entry(key).or_default().writes.push(Write { op: *op, value, over: OPEN });
        }
    }
}

impl<'a> Key<'a> {
    fn index(&mut self, found: &[Found<'a>]) {
        for (at, write) in self.writes.iter().enumerate() {
            if let Some(value) = &write.value {
                self.by_value.entry(value.clone()).or_default().push(at);
            }
        }
        let mut shown: Vec<(u64, usize)> = Vec::new();
        for row in found {
            let Some(at) = row.value.as_deref().and_then(|value| self.writer(value)) else { continue };
            self.writes[at].over = self.writes[at].over.min(row.op.ret());
            if row.op.is_strong() {
                shown.push((row.op.ret(), at));
            }
        }
        let is_acked = |at: &usize| self.writes[*at].op.outcome() == Outcome::Done;
        let acked: Vec<(u64, usize)> =
            (0..self.writes.len()).filter(is_acked).map(|at| (self.writes[at].op.ret(), at)).collect();
        shown.extend(&acked);
        let is_row = |(_, at): &(u64, usize)| self.writes[*at].value.is_some();
        let rows = |of: &[(u64, usize)]| of.iter().copied().filter(is_row).collect::<Vec<_>>();
        let (acked_rows, shown_rows) = (rows(&acked), rows(&shown));
        self.acked_rows = self.prefixes(acked_rows);
        self.shown_rows = self.prefixes(shown_rows);
        self.acked = self.prefixes(acked);
        self.shown = self.prefixes(shown);
        let deletes =
            self.writes.iter().filter(|write| write.value.is_none() && write.op.outcome() != Outcome::Refused);
        let mut deletes: Vec<(u64, u64)> = deletes.map(|write| (write.op.call(), write.over)).collect();
        deletes.sort_unstable();
        let mut latest = 0;
        for delete in &mut deletes {
            latest = latest.max(delete.1);
            delete.1 = latest;
        }
        self.deletes = deletes;
    }

    fn prefixes(&self, mut of: Vec<(u64, usize)>) -> Vec<Prefix> {
        of.sort_unstable();
        let (mut call, mut version) = ((0, usize::MAX), (0, usize::MAX));
        let mut prefix = |(time, at): (u64, usize)| {
            let op = self.writes[at].op;
            if call.1 == usize::MAX || op.call() > call.0 {
                call = (op.call(), at);
            }
            if op.version().is_some_and(|found| found > version.0) {
                version = (op.version().unwrap_or_default(), at);
            }
            Prefix { time, call, version }
        };
        of.into_iter().map(&mut prefix).collect()
    }

    /// The one write of a value, if it is the only one.
    pub(super) fn writer(&self, value: &str) -> Option<usize> {
        match self.by_value.get(value)?.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }

    /// Whether a delete can have come after something called at `call`, and be seen by what ended at `ret`.
    pub(super) fn may_be_deleted(&self, call: u64, ret: u64) -> bool {
        let before = self.deletes.partition_point(|(called, _)| *called <= ret);
        before > 0 && self.deletes[before - 1].1 >= call
    }

    /// Whether a write of this value can have come after something called at `call`.
    pub(super) fn may_follow(&self, value: &str, call: u64) -> bool {
        self.by_value.get(value).is_none_or(|writers| writers.iter().any(|at| self.writes[*at].over >= call))
    }

    /// What is wrong with what a read found, if something is. `bound_ns` none: the read may be as old as it likes.
    pub(super) fn judge(&self, found: &Found<'a>, bound_ns: Option<u64>) -> Option<Wrong<'a>> {
        let ret = found.op.ret();
        if let Some(value) = found.value.as_deref() {
            let wrong = self.judge_origin(value, found);
            if wrong.is_some() {
                return wrong;
            }
        }
        let strong = found.op.is_strong();
        let time = found.op.call().checked_sub(bound_ns?)?;
        let newer = match found.value.as_deref() {
            Some(value) => {
                let prefix = before(if strong { &self.shown } else { &self.acked }, time)?;
                let version = found.version.or_else(|| self.writes[self.writer(value)?].op.version());
                if !self.may_follow(value, prefix.call.0) {
                    prefix.call.1
                } else if version.is_some_and(|version| version < prefix.version.0) {
                    prefix.version.1
                } else {
                    return None;
                }
            }
            None => {
                let prefix = before(if strong { &self.shown_rows } else { &self.acked_rows }, time)?;
                if self.may_be_deleted(prefix.call.0, ret) {
                    return None;
                }
                prefix.call.1
            }
        };
        Some(self.stale(found, newer, bound_ns.unwrap_or_default()))
    }

    /// Whether the value comes from a write that can have happened.
    fn judge_origin(&self, value: &str, found: &Found<'a>) -> Option<Wrong<'a>> {
        let none = Vec::new();
        let writers = self.by_value.get(value).unwrap_or(&none);
        let (kind, what) = if writers.is_empty() {
            ("phantom-read", "which nobody has written")
        } else if writers.iter().all(|at| self.writes[*at].op.outcome() == Outcome::Refused) {
            ("aborted-read", "whose write was refused")
        } else if writers.iter().all(|at| self.writes[*at].op.call() > found.op.ret()) {
            ("future-read", "before its write was called")
        } else {
            return None;
        };
        let events =
            writers.iter().take(1).flat_map(|at| self.writes[*at].op.events()).chain(found.op.events()).collect();
        Some(Wrong { kind, what: format!("found {value:?}, {what}"), events })
    }

    fn stale(&self, found: &Found<'a>, newer: usize, bound_ns: u64) -> Wrong<'a> {
        let newer = &self.writes[newer];
        let seen = found.value.as_deref();
        let kind = match (&newer.value, seen) {
            _ if bound_ns > 0 => "stale-beyond-bound",
            (None, Some(_)) => "resurrected",
            (Some(_), None) => "lost-write",
            _ => "stale-read",
        };
        let known = newer.over.min(newer.op.ret());
        let mut what = format!(
            "found {}, though {} was in effect {} ms before the read was called",
            shown(seen),
            newer.value.as_deref().map_or_else(|| "a delete".to_owned(), |value| format!("{value:?}")),
            found.op.call().saturating_sub(known) / NS_PER_MS
        );
        if bound_ns > 0 {
            what += &format!(", beyond its bound of {} ms", bound_ns / NS_PER_MS);
        }
        let older = seen.and_then(|value| self.writer(value)).map(|at| self.writes[at].op);
        let ops = older.into_iter().chain([newer.op, found.op]);
        Wrong { kind, what, events: ops.flat_map(|op| op.events()).collect() }
    }
}

/// What was known strictly before a time.
fn before(prefixes: &[Prefix], time: u64) -> Option<Prefix> {
    let count = prefixes.partition_point(|prefix| prefix.time < time);
    count.checked_sub(1).map(|last| prefixes[last])
}

/// How stale a read may be, by the level asked for and by what the answer says (of a scan: by what the stalest of its
/// answers says); none: as it likes.
pub(super) fn bound_ns(op: &Op<'_>) -> Option<u64> {
    let mode = op.invoke.mode();
    let asked = match mode.mode {
        _ if op.is_degraded() => None,
        Mode::Linearizable | Mode::Lease => Some(0),
        Mode::Bounded => mode.bound_ms.map(|bound_ms| bound_ms.saturating_mul(NS_PER_MS)),
        Mode::Session | Mode::Eventual => None,
    };
    let said = op.done.and_then(|done| done.srv.as_ref()?.lag_ms);
    let said = said.map(|lag_ms| lag_ms.saturating_mul(NS_PER_MS));
    asked.into_iter().chain(said).min()
}
