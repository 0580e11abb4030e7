//! Operations: an invocation with its completion, and what it says of each key.
//!
//! Invariants:
//! * an operation ends only when its outcome is certain: whatever may still happen has [`OPEN`] as its end;
//! * what is not well formed is taken as knowing less (see [`super::format`] for who complains of it).

use crate::proof::history::{Event, Kind, Process};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// End of an operation that may still take effect.
pub(super) const OPEN: u64 = u64::MAX;

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// It took effect between its call and its return.
    Done,
    /// It did not take effect and will not.
    Refused,
    /// It may have taken effect, or may still.
    Unknown,
}

/// An invocation and its completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op<'a> {
    pub(super) invoke: &'a Event,
    pub(super) done: Option<&'a Event>,
}

/// What an operation did to a key, or learned of it. Values are as text; none: absent.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Act {
    /// It found this.
    Seen(Option<String>),
    /// It found something else than this.
    NotSeen(Option<String>),
    /// It left this.
    Set(Option<String>),
    /// It found the one and left the other.
    Swap(Option<String>, Option<String>),
    /// It added the one, and the other came out, if known.
    Add(i64, Option<i64>),
}

/// Value as the store holds it: text; none: absent.
pub(super) fn text(value: &Json) -> Option<String> {
    match value {
        Json::Null => None,
        Json::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// A value as people read it.
pub(super) fn shown(value: Option<&str>) -> String {
    value.map_or_else(|| "nothing".to_owned(), |text| format!("{text:?}"))
}

/// A number, also when it is written as text.
pub(super) fn number(value: &Json) -> Option<i64> {
    match value {
        Json::String(text) => text.parse().ok(),
        other => other.as_i64(),
    }
}

impl<'a> Op<'a> {
    pub(super) fn outcome(&self) -> Outcome {
        match self.done {
            Some(done) if done.kind == Kind::Ok => Outcome::Done,
            Some(done) if done.kind == Kind::Fail && self.is_definite() => Outcome::Refused,
            _ => Outcome::Unknown,
        }
    }

    /// Whether a `fail` is one: an error that says that it is not definite makes it unknown.
    pub(super) fn is_definite(&self) -> bool {
        self.done.is_some_and(|done| done.error.as_ref().is_none_or(|error| error.definite || self.is_mismatch()))
    }

    /// Whether a condition did not hold.
    pub(super) fn is_mismatch(&self) -> bool {
        let code = |done: &'a Event| done.error.as_ref().map(|error| error.code.as_str());
        self.done.is_some_and(|done| done.kind == Kind::Fail && code(done) == Some("cas-mismatch"))
    }

    pub(super) fn call(&self) -> u64 {
        self.invoke.time
    }

    /// When it was over; [`OPEN`] when it may still take effect.
    pub(super) fn ret(&self) -> u64 {
        self.done.filter(|_| self.outcome() != Outcome::Unknown).map_or(OPEN, |done| done.time)
    }

    pub(super) fn f(&self) -> &'a str {
        &self.invoke.f
    }

    /// Whether it was served at a level that sees every write acknowledged before.
    pub(super) fn is_strong(&self) -> bool {
        self.invoke.mode().mode.is_strong() && !self.is_degraded()
    }

    /// Whether the answer says that it is weaker than was asked for.
    pub(super) fn is_degraded(&self) -> bool {
        self.done.and_then(|done| done.srv.as_ref()).is_some_and(|srv| srv.degraded == Some(true))
    }

    /// Version of the row written or found.
    pub(super) fn version(&self) -> Option<u64> {
        self.done.and_then(|done| done.srv.as_ref()).and_then(|srv| srv.version).filter(|version| *version > 0)
    }

    /// Its two events.
    pub(super) fn events(&self) -> Vec<&'a Event> {
        std::iter::once(self.invoke).chain(self.done).collect()
    }

    /// What it did or learned, key by key. Scans are left out: [`super::rows`] knows them.
    pub(super) fn acts(&self) -> Vec<(&'a str, Act)> {
        let outcome = self.outcome();
        if self.f() == "batch" {
            return if outcome == Outcome::Refused { Vec::new() } else { self.batch_acts(outcome) };
        }
        let Some(key) = self.invoke.key.as_deref() else { return Vec::new() };
        let pair = |at: usize| self.invoke.value.get(at).and_then(text);
        let act = match (self.f(), outcome) {
            ("read", Outcome::Done) => self.done.map(|done| Act::Seen(text(&done.value))),
            ("write", Outcome::Done | Outcome::Unknown) => Some(Act::Set(text(&self.invoke.value))),
            ("delete", Outcome::Done | Outcome::Unknown) => Some(Act::Set(None)),
            ("cas", Outcome::Done | Outcome::Unknown) => Some(Act::Swap(pair(0), pair(1))),
            ("cas", Outcome::Refused) if self.is_mismatch() => {
                let observed = self.done.and_then(|done| done.observed.as_ref());
                Some(observed.map_or_else(|| Act::NotSeen(pair(0)), |found| Act::Seen(text(found))))
            }
            ("incr", Outcome::Done) => {
                let result = self.done.and_then(|done| number(&done.value));
                number(&self.invoke.value).map(|by| Act::Add(by, result))
            }
            ("incr", Outcome::Unknown) => number(&self.invoke.value).map(|by| Act::Add(by, None)),
            _ => None,
        };
        act.map(|act| (key, act)).into_iter().collect()
    }

    /// A batch, one key at a time: what holds of all holds of each.
    fn batch_acts(&self, outcome: Outcome) -> Vec<(&'a str, Act)> {
        let (found, left) = self.batch();
        let mut acts = Vec::new();
        for (key, new) in &left {
            let act = found.get(key).map_or_else(|| Act::Set(new.clone()), |old| Act::Swap(old.clone(), new.clone()));
            acts.push((*key, act));
        }
        let only_read = found.into_iter().filter(|(key, _)| outcome == Outcome::Done && !left.contains_key(key));
        acts.extend(only_read.map(|(key, old)| (key, Act::Seen(old))));
        acts
    }

    /// What a batch asks to be so, and what it leaves.
    #[allow(clippy::type_complexity, reason = "two maps of the same kind")]
    pub(super) fn batch(&self) -> (BTreeMap<&'a str, Option<String>>, BTreeMap<&'a str, Option<String>>) {
        let mut parts = (BTreeMap::new(), BTreeMap::new());
        for item in self.invoke.value.as_array().into_iter().flatten() {
            let (Some(what), Some(key), Some(value)) = (item[0].as_str(), item[1].as_str(), item.get(2)) else {
                continue;
            };
            let part = if what == "r" { &mut parts.0 } else { &mut parts.1 };
            part.insert(key, text(value));
        }
        parts
    }
}

/// A history as operations.
#[derive(Debug)]
pub struct History<'a> {
    /// As it was given.
    pub events: &'a [Event],
    /// In the order of their calls.
    pub(super) ops: Vec<Op<'a>>,
    /// What is not well formed, and the events.
    pub(super) faults: Vec<(String, Vec<&'a Event>)>,
}

/// What a process is at.
enum State {
    Idle,
    /// Within the operation of this number.
    Busy(usize),
    /// An operation of it ended unknown: it should not go on.
    Over,
}

impl<'a> History<'a> {
    /// Finds the completion of each invocation.
    #[must_use]
    pub fn of(events: &'a [Event]) -> Self {
        let mut history = Self { events, ops: Vec::new(), faults: Vec::new() };
        let mut states: BTreeMap<u64, State> = BTreeMap::new();
        for event in events {
            let Process::Client(process) = event.process else { continue };
            let state = states.entry(process).or_insert(State::Idle);
            *state = history.take(event, state);
        }
        history
    }

    fn take(&mut self, event: &'a Event, state: &State) -> State {
        let process = match event.process {
            Process::Client(process) => process,
            Process::Nemesis => return State::Idle,
        };
        let open = match state {
            State::Busy(at) => Some(*at),
            State::Idle | State::Over => None,
        };
        if event.kind == Kind::Invoke {
            match (state, open.map(|at| self.ops[at].invoke)) {
                (State::Over, _) => {
                    self.faults.push((format!("process {process} goes on after an \"info\""), vec![event]));
                }
                (_, Some(first)) => {
                    self.faults.push((format!("process {process} is busy already"), vec![first, event]))
                }
                _ => {}
            }
            self.ops.push(Op { invoke: event, done: None });
            return State::Busy(self.ops.len() - 1);
        }
        let Some(at) = open else {
            self.faults.push((format!("process {process} completes what it has not begun"), vec![event]));
            return State::Idle;
        };
        let invoke = self.ops[at].invoke;
        if (&invoke.f, &invoke.key) != (&event.f, &event.key) {
            let what = format!("process {process} began {:?} and completes {:?}", invoke.f, event.f);
            self.faults.push((what, vec![invoke, event]));
            return State::Over;
        }
        self.ops[at].done = Some(event);
        if event.kind == Kind::Info { State::Over } else { State::Idle }
    }
}
