//! Batches are seen whole or not at all: money moves between accounts by batches, so the sum over the accounts is the
//! same in every scan, at every level.
//!
//! Two checks: the sum of each scan that saw one moment (one page), and one order of all batches, strong scans and strong
//! reads over the state of all accounts together.
//!
//! Invariants:
//! * the accounts and their sum are those written in the load phase; a balance is `AMOUNT`, or `AMOUNT#ANYTHING` to be
//!   unique, which makes the search sharper;
//! * a scan put together from several pages saw several moments: its sum proves nothing, and is only counted.

use super::{
    Findings, Verdict,
    linear::CONFIGURATIONS_MAX,
    ops::{Act, History, Op, Outcome},
    rows::{Scan, scans},
    search::{Entry, Found, Role, search},
};
use crate::proof::history::Phase;
use std::collections::BTreeMap;

/// What an account holds, as text; none: it is absent.
type Balance = Option<String>;

/// What is found in accounts and left in accounts, by the number of the account.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Transfer {
    found: Vec<(usize, Balance)>,
    left: Vec<(usize, Balance)>,
}

/// The amount of a balance: up to a `#`, after which may follow what makes it unique.
fn amount(balance: &str) -> Option<i64> {
    balance.split('#').next()?.parse().ok()
}

/// Judges every scan, and all of it together.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let mut findings = Findings::default();
    let (accounts, loaded_ns) = accounts(history);
    if accounts.is_empty() {
        findings.unknown("nothing-to-judge", None, "no account was written in the load phase".to_owned());
        return findings.verdict("bank", &[]);
    }
    let total: i64 = accounts.values().sum();
    findings.count("accounts", accounts.len() as u64);
    let scans = scans(history);
    for scan in &scans {
        judge_scan(scan, &accounts, total, loaded_ns, &mut findings);
    }
    let done = history.ops.iter().filter(|op| op.f() == "batch" && op.outcome() == Outcome::Done).count();
    findings.count("batches", done as u64);
    judge_order(history, &scans, &accounts, &mut findings);
    findings.verdict("bank", &["scans of one moment"])
}

/// Accounts as they were loaded, and when the last one was acknowledged.
fn accounts<'a>(history: &History<'a>) -> (BTreeMap<&'a str, i64>, u64) {
    let mut accounts = BTreeMap::new();
    let mut loaded_ns = 0;
    for op in history.ops.iter().filter(|op| op.invoke.phase == Phase::Load && op.outcome() == Outcome::Done) {
        for (key, act) in op.acts() {
            if let Act::Set(Some(value)) | Act::Swap(_, Some(value)) = act
                && let Some(balance) = amount(&value)
            {
                accounts.insert(key, balance);
                loaded_ns = loaded_ns.max(op.ret());
            }
        }
    }
    (accounts, loaded_ns)
}

fn judge_scan(scan: &Scan<'_>, accounts: &BTreeMap<&str, i64>, total: i64, loaded_ns: u64, findings: &mut Findings) {
    let events = scan.op.events();
    let mut sum = 0;
    for (key, value) in scan.rows.iter().filter(|(key, _)| accounts.contains_key(key.as_str())) {
        match value.as_deref().and_then(amount) {
            Some(balance) => sum += balance,
            None => findings.wrong("not-a-balance", Some(key), format!("an account holds {value:?}"), &events),
        }
    }
    let seen: BTreeMap<&str, ()> = scan.rows.iter().map(|(key, _)| (key.as_str(), ())).collect();
    let missing = accounts.keys().find(|key| !seen.contains_key(*key));
    let is_whole = scan.op.invoke.value["limit"].is_null();
    match missing {
        Some(key) if is_whole && scan.op.is_strong() && scan.op.call() > loaded_ns => {
            findings.wrong("missing-row", Some(key), format!("a scan did not return account {key:?}"), &events);
        }
        Some(_) => findings.count("scans of some accounts", 1),
        None if scan.pages > 1 => findings.count("scans of several moments", 1),
        None => {
            findings.count("scans of one moment", 1);
            if sum != total {
                let what = format!("the accounts of a scan add up to {sum} and not to {total}");
                findings.wrong("broken-sum", None, what, &events);
            }
        }
    }
}

/// Searches one order of everything over all accounts.
fn judge_order(history: &History<'_>, scans: &[Scan<'_>], accounts: &BTreeMap<&str, i64>, findings: &mut Findings) {
    let numbers: BTreeMap<&str, usize> = accounts.keys().enumerate().map(|(at, key)| (*key, at)).collect();
    let mut entries: Vec<Entry<Transfer>> = Vec::new();
    for op in history.ops.iter().filter(|op| op.f() != "read" || op.is_strong()) {
        entries.extend(entry(op, transfer(op, &numbers)));
    }
    for scan in scans.iter().filter(|scan| scan.pages <= 1 && scan.op.is_strong()) {
        let balance = |(key, value): &(String, Option<String>)| Some((*numbers.get(key.as_str())?, value.clone()));
        let found = scan.rows.iter().filter_map(balance).collect();
        entries.extend(entry(&scan.op, Transfer { found, left: Vec::new() }));
    }
    let mut states: Vec<Vec<Balance>> = vec![vec![None; numbers.len()]];
    let mut known: BTreeMap<Vec<Balance>, i64> = BTreeMap::from([(states[0].clone(), 0)]);
    let step = |state: i64, transfer: &Transfer| {
        let now = &states[usize::try_from(state).ok()?];
        if transfer.found.iter().any(|(at, balance)| now[*at] != *balance) {
            return None;
        }
        if transfer.left.is_empty() {
            return Some(state);
        }
        let mut after = now.clone();
        for (at, balance) in &transfer.left {
            after[*at].clone_from(balance);
        }
        let next = known.len() as i64;
        Some(*known.entry(after).or_insert_with_key(|after| {
            states.push(after.clone());
            next
        }))
    };
    let mut budget = CONFIGURATIONS_MAX;
    match search(entries, 0, step, &mut budget) {
        Found::Order => {}
        Found::NoOrder => {
            let what =
                "no order of the batches explains what strong scans and reads found, and what batches found".to_owned();
            findings.wrong("not-linearizable", None, what, &[]);
        }
        Found::GaveUp => {
            let what = format!("gave up the search for an order after {CONFIGURATIONS_MAX} configurations");
            findings.unknown("gave-up", None, what);
        }
    }
    findings.count("configurations", CONFIGURATIONS_MAX - budget);
}

fn entry(op: &Op<'_>, act: Transfer) -> Option<Entry<Transfer>> {
    let role = if act.left.is_empty() { Role::Observer } else { Role::Conditional };
    let empty = act.found.is_empty() && act.left.is_empty();
    (!empty).then(|| Entry { call: op.call(), ret: op.ret(), act, role })
}

/// What an operation found in accounts and left in them.
fn transfer(op: &Op<'_>, numbers: &BTreeMap<&str, usize>) -> Transfer {
    let mut transfer = Transfer::default();
    for (key, act) in op.acts() {
        let Some(at) = numbers.get(key).copied() else { continue };
        match act {
            Act::Seen(found) => transfer.found.push((at, found)),
            Act::Set(left) => transfer.left.push((at, left)),
            Act::Swap(found, left) => {
                transfer.found.push((at, found));
                transfer.left.push((at, left));
            }
            Act::NotSeen(_) | Act::Add(..) => {}
        }
    }
    transfer
}
