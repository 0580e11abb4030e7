//! Sets of rows and scans of them: each scan is in order, without doubles, inside its range and its limit, and finds the
//! rows that it must find and no others.
//!
//! A scan is judged as a read of every key in the part of its range that it covers: up to its last row when it says that
//! there is more, else all of it. Each of these reads happened at some moment within the scan, which is what is promised
//! while pages and partitions are read one after the other.
//!
//! Invariant: keys are ordered by their bytes, those written `b64:…` by the bytes that they stand for.

use super::{
    Findings, Verdict,
    levels::judge_read,
    ops::{History, Op, Outcome, text},
    table::{Found, Key, Table, bound_ns},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::Value as Json;
use std::{collections::BTreeMap, ops::Bound};

/// A scan that was answered.
#[derive(Debug)]
pub(super) struct Scan<'a> {
    pub(super) op: Op<'a>,
    /// As returned.
    pub(super) rows: Vec<(String, Option<String>)>,
    /// How many answers it was put together from.
    pub(super) pages: usize,
    from: Vec<u8>,
    to: Option<Vec<u8>>,
    is_reverse: bool,
    limit: Option<u64>,
    /// Whether there may be more than it returned.
    has_more: bool,
}

/// Bytes of a key.
fn bytes(key: &str) -> Vec<u8> {
    let decoded = key.strip_prefix("b64:").and_then(|coded| BASE64.decode(coded).ok());
    decoded.unwrap_or_else(|| key.as_bytes().to_vec())
}

/// The scans that were answered.
pub(super) fn scans<'a>(history: &History<'a>) -> Vec<Scan<'a>> {
    let answered = history.ops.iter().filter(|op| op.f() == "scan" && op.outcome() == Outcome::Done);
    answered.filter_map(|op| scan(op, &op.invoke.value, &op.done?.value)).collect()
}

fn scan<'a>(op: &Op<'a>, asked: &Json, answer: &Json) -> Option<Scan<'a>> {
    let row = |row: &Json| Some((row.get(0)?.as_str()?.to_owned(), row.get(1).and_then(text)));
    let rows: Vec<_> = answer["kvs"].as_array()?.iter().filter_map(row).collect();
    let limit = asked["limit"].as_u64();
    Some(Scan {
        op: *op,
        pages: answer["pages"].as_array().map_or(1, Vec::len),
        from: asked["from"].as_str().map(bytes).unwrap_or_default(),
        to: asked["to"].as_str().map(bytes),
        is_reverse: asked["reverse"].as_bool().unwrap_or_default(),
        limit,
        has_more: answer["more"].as_bool().unwrap_or_else(|| limit.is_some_and(|limit| rows.len() as u64 >= limit)),
        rows,
    })
}

/// Keys of a history in the order of their bytes.
pub(super) fn ordered<'a>(table: &Table<'a>) -> BTreeMap<Vec<u8>, &'a str> {
    table.keys.keys().map(|key| (bytes(key), *key)).collect()
}

/// Everything that scans found, row by row.
pub(super) fn found<'a>(scans: &[Scan<'a>]) -> Vec<(String, Found<'a>)> {
    let rows = scans.iter().flat_map(|scan| scan.rows.iter().map(move |row| (scan.op, row)));
    rows.map(|(op, (key, value))| (key.clone(), Found { op, value: value.clone(), version: None })).collect()
}

impl<'a> Scan<'a> {
    /// Whether a key is in the range asked for.
    fn asks_for(&self, key: &[u8]) -> bool {
        key >= self.from.as_slice() && self.to.as_ref().is_none_or(|to| key < to.as_slice())
    }

    /// Keys of a history that it speaks of, with what it says of each.
    pub(super) fn reads(&self, order: &BTreeMap<Vec<u8>, &'a str>) -> Vec<(String, Found<'a>)> {
        let mut said: BTreeMap<&str, Option<String>> =
            self.rows.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let last = self.rows.last().map(|(key, _)| bytes(key));
        let (mut from, mut to) = (Bound::Included(self.from.clone()), Bound::Unbounded);
        if let Some(end) = &self.to {
            to = Bound::Excluded(end.clone());
        }
        match (self.has_more, last, self.is_reverse) {
            (false, ..) => {}
            (true, Some(last), false) => to = Bound::Included(last),
            (true, Some(last), true) => from = Bound::Included(last),
            (true, None, _) => to = Bound::Excluded(self.from.clone()),
        }
        let is_empty = match (&from, &to) {
            (Bound::Included(from), Bound::Included(to)) => from > to,
            (Bound::Included(from), Bound::Excluded(to)) => from >= to,
            _ => false,
        };
        if !is_empty {
            for key in order.range((from, to)).map(|(_, key)| *key) {
                said.entry(key).or_insert(None);
            }
        }
        let found = |(key, value): (&str, _)| (key.to_owned(), Found { op: self.op, value, version: None });
        said.into_iter().map(found).collect()
    }
}

/// Judges every scan.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let scans = scans(history);
    let table = Table::of(history, &found(&scans));
    let mut findings = Findings::default();
    let order = ordered(&table);
    for scan in &scans {
        findings.count("scans", 1);
        findings.count("rows", scan.rows.len() as u64);
        findings.count("pages", scan.pages as u64);
        judge_shape(scan, &mut findings);
        judge_rows(scan, &table, &order, &mut findings);
    }
    for op in history.ops.iter().filter(|op| op.f() == "read") {
        judge_read(&table, op, &mut findings);
    }
    findings.verdict("rows", &["scans"])
}

/// Order, doubles, range and limit.
fn judge_shape(scan: &Scan<'_>, findings: &mut Findings) {
    let events = scan.op.events();
    for pair in scan.rows.windows(2) {
        let (one, two) = (bytes(&pair[0].0), bytes(&pair[1].0));
        if one == two {
            findings.wrong(
                "duplicate-row",
                Some(&pair[1].0),
                format!("a scan returned {:?} twice", pair[1].0),
                &events,
            );
        } else if (one > two) != scan.is_reverse {
            let what = format!("a scan returned {:?} before {:?}", pair[0].0, pair[1].0);
            findings.wrong("out-of-order", Some(&pair[1].0), what, &events);
        }
    }
    for (key, _) in scan.rows.iter().filter(|(key, _)| !scan.asks_for(&bytes(key))) {
        let what = format!("a scan returned {key:?}, which is not in the range asked for");
        findings.wrong("out-of-range", Some(key), what, &events);
    }
    if let Some(limit) = scan.limit.filter(|limit| scan.rows.len() as u64 > *limit) {
        let what = format!("a scan returned {} rows with a limit of {limit}", scan.rows.len());
        findings.wrong("over-limit", None, what, &events);
    }
}

/// What must be there, and what must not.
pub(super) fn judge_rows<'a>(
    scan: &Scan<'a>,
    table: &Table<'a>,
    order: &BTreeMap<Vec<u8>, &'a str>,
    findings: &mut Findings,
) {
    let bound_ns = bound_ns(&scan.op);
    let none = Key::default();
    for (name, found) in scan.reads(order) {
        if table.counting.contains(name.as_str()) {
            continue;
        }
        findings.count("keys judged", 1);
        let key = table.keys.get(name.as_str()).unwrap_or(&none);
        if let Some(wrong) = key.judge(&found, bound_ns) {
            let kind = match wrong.kind {
                "phantom-read" => "phantom-row",
                "aborted-read" => "aborted-row",
                "future-read" => "future-row",
                "lost-write" => "missing-row",
                "resurrected" => "resurrected-row",
                "stale-read" => "stale-row",
                other => other,
            };
            findings.wrong(kind, Some(&name), format!("a scan {}", wrong.what), &wrong.events);
        }
    }
}
