//! What was acknowledged is there at the end: the reads of the final phase, after the heal and after restarts.
//!
//! Invariant: a key that something acknowledged was written to and that no strong read or scan of the final phase looked
//! at makes the verdict unknown.

use super::{
    Findings, Verdict, counter,
    levels::judge_read,
    ops::{Act, History, Op, Outcome},
    rows::{found, judge_rows, ordered, scans},
    table::Table,
};
use crate::proof::history::Phase;
use std::collections::BTreeSet;

fn is_final(op: &Op<'_>) -> bool {
    op.invoke.phase == Phase::Final && op.is_strong() && op.outcome() == Outcome::Done
}

/// Judges what the final phase found.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let scans = scans(history);
    let table = Table::of(history, &found(&scans));
    let order = ordered(&table);
    let mut findings = Findings::default();
    let mut looked_at: BTreeSet<String> = BTreeSet::new();
    for op in history.ops.iter().filter(|op| op.f() == "read" && is_final(op)) {
        looked_at.extend(op.invoke.key.clone());
        judge_read(&table, op, &mut findings);
    }
    for scan in scans.iter().filter(|scan| is_final(&scan.op)) {
        looked_at.extend(scan.reads(&order).into_iter().map(|(key, _)| key));
        judge_rows(scan, &table, &order, &mut findings);
    }
    counter::judge(history, |op| op.f() == "read" && is_final(op), &mut findings);
    let mut written: BTreeSet<&str> = BTreeSet::new();
    for op in history.ops.iter().filter(|op| op.outcome() == Outcome::Done) {
        let writes = |act: &Act| matches!(act, Act::Set(_) | Act::Swap(..) | Act::Add(..));
        written.extend(op.acts().into_iter().filter(|(_, act)| writes(act)).map(|(key, _)| key));
    }
    findings.count("keys written", written.len() as u64);
    findings.count("keys looked at", looked_at.len() as u64);
    for key in written.into_iter().filter(|key| !looked_at.contains(*key)) {
        findings.unknown("not-looked-at", Some(key), "no strong read of the final phase looked at it".to_owned());
    }
    findings.verdict("durable", &["keys looked at"])
}
