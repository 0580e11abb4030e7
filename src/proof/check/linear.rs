//! Linearizability, key by key: an order of the operations of a key exists in which each takes effect within its interval.
//!
//! Judged are strong reads (linearizable and lease), writes, deletes, `cas`, `incr`, and batches, each of their keys by
//! itself. Linearizability is local: a history is linearizable if each key's part is.
//!
//! Invariants:
//! * an operation of unknown outcome may take effect at any time after its call, or never; a refused one does not; a
//!   `cas` that found another value is a read of that value;
//! * of a key that has no order, the shortest prefix without one is found, and everything left out of it that does not
//!   bear on it: what remains has no order by itself;
//! * past [`CONFIGURATIONS_MAX`] the answer is unknown.

use super::{
    Findings, Verdict,
    ops::{Act, History, OPEN, Op, shown},
    search::{Entry, Found, Role, search},
};
use crate::proof::history::Event;
use std::collections::{BTreeMap, BTreeSet};

/// Configurations visited for one key at most: some seconds, some hundred megabytes.
pub const CONFIGURATIONS_MAX: u64 = 1_000_000;
/// Configurations visited for one history at most.
const CONFIGURATIONS_ALL_MAX: u64 = 8_000_000;
/// Searches spent on making a counterexample smaller.
const SHRINKS_MAX: usize = 3_000;

/// State of a key that is absent.
const ABSENT: i64 = i64::MIN;
/// State left by writes that nobody observes.
const UNSEEN: i64 = i64::MIN + 1;
/// States below are texts that are no numbers, of keys that count.
const TEXTS: i64 = i64::MIN + 2;

/// An act with values as numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Code {
    Seen(i64),
    NotSeen(i64),
    Set(i64),
    Swap(i64, i64),
    Add(i64, Option<i64>),
}

/// One operation of a key.
#[derive(Clone, Copy, Debug)]
struct Step<'a> {
    call: u64,
    ret: u64,
    code: Code,
    op: Op<'a>,
}

/// Judges every key.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let mut findings = Findings::default();
    let mut left = CONFIGURATIONS_ALL_MAX;
    for (key, acts) in by_key(history) {
        let steps = encode(&acts);
        findings.count("keys", 1);
        findings.count("operations", steps.len() as u64);
        findings.count("unknown outcomes", steps.iter().filter(|step| step.ret == OPEN).count() as u64);
        let observing = |step: &&Step<'_>| !matches!(step.code, Code::Set(_) | Code::Add(_, None));
        findings.count("observations", steps.iter().filter(observing).count() as u64);
        let given = left.min(CONFIGURATIONS_MAX);
        let mut budget = given;
        let found = order(&steps, &mut budget);
        left -= given - budget;
        findings.count("configurations", given - budget);
        match found {
            Found::Order => {}
            Found::NoOrder => explain(key, steps, &mut findings),
            Found::GaveUp => {
                let what = format!("gave up after {given} configurations of {} operations", steps.len());
                findings.unknown("gave-up", Some(key), what);
            }
        }
    }
    findings.verdict("linear", &["observations"])
}

/// What bears on the order of each key: everything that writes, and the reads that promise to be in order.
fn by_key<'a>(history: &History<'a>) -> BTreeMap<&'a str, Vec<(Op<'a>, Act)>> {
    let mut keys: BTreeMap<&str, Vec<(Op<'_>, Act)>> = BTreeMap::new();
    for op in &history.ops {
        for (key, act) in op.acts() {
            if !matches!(act, Act::Seen(_)) || op.f() != "read" || op.is_strong() {
                keys.entry(key).or_default().push((*op, act));
            }
        }
    }
    keys
}

/// Values as numbers: those of a key that counts as they are, others in the order of their appearance.
fn encode<'a>(acts: &[(Op<'a>, Act)]) -> Vec<Step<'a>> {
    let counts = acts.iter().any(|(_, act)| matches!(act, Act::Add(..)));
    let mut texts: BTreeMap<String, i64> = BTreeMap::new();
    let mut code = |value: &Option<String>| {
        let Some(text) = value else { return ABSENT };
        if let Some(number) = text.parse().ok().filter(|_| counts) {
            return number;
        }
        let next = texts.len() as i64 + if counts { TEXTS } else { 0 };
        *texts.entry(text.clone()).or_insert(next)
    };
    acts.iter()
        .map(|(op, act)| {
            let code = match act {
                Act::Seen(value) => Code::Seen(code(value)),
                Act::NotSeen(value) => Code::NotSeen(code(value)),
                Act::Set(value) => Code::Set(code(value)),
                Act::Swap(old, new) => Code::Swap(code(old), code(new)),
                Act::Add(by, result) => Code::Add(*by, *result),
            };
            Step { call: op.call(), ret: op.ret(), code, op: *op }
        })
        .collect()
}

/// What a state becomes; none when the act does not fit.
fn step(state: i64, code: &Code) -> Option<i64> {
    match *code {
        Code::Seen(value) => (state == value).then_some(state),
        Code::NotSeen(value) => (state != value).then_some(state),
        Code::Set(value) => Some(value),
        Code::Swap(old, new) => (state == old).then_some(new),
        Code::Add(by, result) => {
            let before = if state == ABSENT { 0 } else { state };
            before.checked_add(by).filter(|after| result.is_none_or(|result| result == *after))
        }
    }
}

/// What a code observes.
fn observed(code: Code) -> Option<i64> {
    match code {
        Code::Seen(value) | Code::Swap(value, _) => Some(value),
        Code::Set(_) | Code::NotSeen(_) | Code::Add(..) => None,
    }
}

/// What a code leaves.
fn left(code: Code) -> Option<i64> {
    match code {
        Code::Set(value) | Code::Swap(_, value) => Some(value),
        Code::Seen(_) | Code::NotSeen(_) | Code::Add(..) => None,
    }
}

/// Searches an order.
fn order(steps: &[Step<'_>], budget: &mut u64) -> Found {
    search(entries(steps), ABSENT, step, budget)
}

/// The operations as the search takes them. Where only one operation leaves a value, whoever found it is a witness that
/// this operation has taken effect by then; one of unknown outcome whose value nobody finds makes no difference.
fn entries(steps: &[Step<'_>]) -> Vec<Entry<Code>> {
    // An increment finds whatever is there, and so does a `cas` of which only is known what it did not find.
    let is_any_found = |step: &Step<'_>| matches!(step.code, Code::Add(..) | Code::NotSeen(_));
    let every_value_counts = steps.iter().any(is_any_found);
    let mut writers: BTreeMap<i64, usize> = BTreeMap::new();
    let mut witnesses: BTreeMap<i64, u64> = BTreeMap::new();
    for step in steps {
        if let Some(value) = left(step.code) {
            *writers.entry(value).or_default() += 1;
        }
        if let Some(value) = observed(step.code) {
            let first = witnesses.entry(value).or_insert(OPEN);
            *first = step.ret.min(*first);
        }
    }
    let entry = |step: &Step<'_>| {
        let mut entry = Entry { call: step.call, ret: step.ret, act: step.code, role: role(step.code) };
        let Some(value) = left(step.code).filter(|_| !every_value_counts) else { return Some(entry) };
        match witnesses.get(&value) {
            Some(witness) if value != ABSENT && writers[&value] == 1 => entry.ret = step.ret.min(*witness),
            Some(_) => {}
            None if step.ret == OPEN => return None,
            None => match step.code {
                Code::Swap(old, _) => entry.act = Code::Swap(old, UNSEEN),
                _ => (entry.act, entry.role) = (Code::Set(UNSEEN), Role::Unseen),
            },
        }
        Some(entry)
    };
    steps.iter().filter_map(entry).collect()
}

fn role(code: Code) -> Role {
    match code {
        Code::Seen(_) | Code::NotSeen(_) => Role::Observer,
        Code::Set(_) => Role::Blind,
        Code::Swap(..) | Code::Add(..) => Role::Conditional,
    }
}

/// The history of a key as it was known at a time.
fn until<'a>(steps: &[Step<'a>], time: u64) -> Vec<Step<'a>> {
    let known = steps.iter().filter(|step| step.call <= time);
    let known = known.map(|step| if step.ret <= time { *step } else { forgotten(*step) });
    known.filter(|step| step.ret != OPEN || !matches!(step.code, Code::Seen(_) | Code::NotSeen(_))).collect()
}

/// A step before it has returned.
fn forgotten(mut step: Step<'_>) -> Step<'_> {
    step.ret = OPEN;
    if let Code::Add(_, result) = &mut step.code {
        *result = None;
    }
    step
}

fn has_no_order(steps: &[Step<'_>], budget: &mut u64) -> bool {
    *budget > 0 && order(steps, budget) == Found::NoOrder
}

/// Reports the smallest part of a key's history that was found to have no order.
fn explain(key: &str, steps: Vec<Step<'_>>, findings: &mut Findings) {
    let mut rets: Vec<u64> = steps.iter().map(|step| step.ret).filter(|ret| *ret != OPEN).collect();
    rets.sort_unstable();
    rets.dedup();
    let mut budget = CONFIGURATIONS_MAX;
    // The first return at which there is no order any more.
    let at = rets.partition_point(|ret| !has_no_order(&until(&steps, *ret), &mut budget));
    let time = rets.get(at).copied().unwrap_or(OPEN);
    let prefix = until(&steps, time);
    let prefix = if has_no_order(&prefix, &mut budget) { prefix } else { steps };
    let placed = prefix.iter().filter(|step| step.ret < time).count();
    let kept = shrink(prefix, &mut budget);
    let last = kept.iter().find(|step| step.ret == time).or_else(|| kept.last());
    let what = last.map_or_else(String::new, |step| {
        let others = kept.len() - 1;
        format!(
            "{} cannot take effect within its interval, after {placed} operations that can: it contradicts {others} of them",
            describe(step)
        )
    });
    let events: Vec<&Event> = kept.iter().flat_map(|step| step.op.events()).collect();
    findings.wrong("not-linearizable", Some(key), what, &events);
}

/// Leaves out what does not bear on there being no order.
///
/// Left out are observations (of a `cas`, that part), whole values with everything that leaves or finds them, and writes
/// of what nobody finds: all of it only takes demands away, so what has no order without them has none with them either.
fn shrink<'a>(steps: Vec<Step<'a>>, budget: &mut u64) -> Vec<Step<'a>> {
    let mut shrink = Shrink { steps, budget, tries: SHRINKS_MAX };
    if shrink.steps.iter().any(|step| matches!(step.code, Code::Add(..) | Code::NotSeen(_))) {
        shrink.drop_each(|_, step| matches!(step.code, Code::Seen(_) | Code::NotSeen(_)));
        return shrink.steps;
    }
    let blind = |step: &Step<'a>| match step.code {
        Code::Swap(_, new) => Step { code: Code::Set(new), ..*step },
        _ => *step,
    };
    shrink.attempt(shrink.steps.iter().map(blind).collect());
    for at in 0..shrink.steps.len() {
        if matches!(shrink.steps[at].code, Code::Swap(..)) {
            let mut rest = shrink.steps.clone();
            rest[at] = blind(&rest[at]);
            shrink.attempt(rest);
        }
    }
    let values: BTreeSet<i64> = shrink.steps.iter().filter_map(|step| left(step.code)).collect();
    for value in values.into_iter().filter(|value| *value != ABSENT) {
        let group = connected(&shrink.steps, value);
        let is_of = |value: Option<i64>| value.is_some_and(|value| group.contains(&value));
        let touches = |step: &&Step<'a>| is_of(left(step.code)) || is_of(observed(step.code));
        if !group.contains(&ABSENT) {
            shrink.attempt(shrink.steps.iter().filter(|step| !touches(step)).copied().collect());
        }
    }
    shrink.drop_each(|_, step| matches!(step.code, Code::Seen(_)));
    shrink.drop_each(|steps, step| match step.code {
        Code::Set(value) => steps.iter().all(|step| observed(step.code) != Some(value)),
        _ => false,
    });
    shrink.steps
}

/// A part of a history without an order, getting smaller.
struct Shrink<'a, 'b> {
    steps: Vec<Step<'a>>,
    budget: &'b mut u64,
    tries: usize,
}

impl<'a> Shrink<'a, '_> {
    /// Goes on with less, if that has no order either.
    fn attempt(&mut self, rest: Vec<Step<'a>>) {
        if self.tries > 0 {
            self.tries -= 1;
            if has_no_order(&rest, self.budget) {
                self.steps = rest;
            }
        }
    }

    /// Attempts it without each of these, the last one first.
    fn drop_each(&mut self, which: impl Fn(&[Step<'a>], &Step<'a>) -> bool) {
        for at in (0..self.steps.len()).rev() {
            if which(&self.steps, &self.steps[at]) {
                let mut rest = self.steps.clone();
                rest.remove(at);
                self.attempt(rest);
            }
        }
    }
}

/// Values that a value is tied to by `cas`.
fn connected(steps: &[Step<'_>], value: i64) -> BTreeSet<i64> {
    let mut group = BTreeSet::from([value]);
    loop {
        let before = group.len();
        for step in steps {
            if let Code::Swap(old, new) = step.code
                && (group.contains(&old) || group.contains(&new))
            {
                group.extend([old, new]);
            }
        }
        if group.len() == before {
            return group;
        }
    }
}

fn describe(step: &Step<'_>) -> String {
    let process = match step.op.invoke.process {
        crate::proof::history::Process::Client(number) => number,
        crate::proof::history::Process::Nemesis => 0,
    };
    let what = step.op.acts().into_iter().next().map(|(_, act)| match act {
        Act::Seen(value) => format!("finds {}", shown(value.as_deref())),
        Act::NotSeen(value) => format!("does not find {}", shown(value.as_deref())),
        Act::Set(value) => format!("leaves {}", shown(value.as_deref())),
        Act::Swap(old, new) => format!("finds {} and leaves {}", shown(old.as_deref()), shown(new.as_deref())),
        Act::Add(by, Some(result)) => format!("adds {by} and gets {result}"),
        Act::Add(by, None) => format!("adds {by}"),
    });
    format!("the {} of process {process}, which {},", step.op.f(), what.unwrap_or_default())
}
