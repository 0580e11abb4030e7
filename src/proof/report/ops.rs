//! Operations of a history: each question with its answer, its class, and the lane of the client that asked.
//!
//! Invariants:
//! * every `invoke` of a client is one operation, also when nobody ever answered it;
//! * a lane is one client: whoever goes on under a fresh process number after an `info` keeps its lane.

use crate::proof::history::{Event, Kind, Mode, Process};
use serde::{Serialize, Serializer};
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

/// Code of a `fail` that is an answer: the condition did not hold.
const MISMATCH: &str = "cas-mismatch";

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// It happened.
    Ok,
    /// It was answered: its condition did not hold.
    Mismatch,
    /// It certainly did not happen.
    Fail,
    /// Nobody knows whether it happened.
    Info,
}

impl Outcome {
    /// Whether the cluster did what it is for.
    #[must_use]
    pub fn answered(self) -> bool {
        matches!(self, Self::Ok | Self::Mismatch)
    }
}

/// Kinds of operations that wait for the same things, and so share a plot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    /// Everything that changes something.
    Writes,
    /// Reads of a key.
    Reads(Mode),
    /// Reads of a range.
    Scans(Mode),
}

impl Class {
    fn of(asked: &Event) -> Self {
        match asked.f.as_str() {
            "read" => Self::Reads(asked.mode().mode),
            "scan" => Self::Scans(asked.mode().mode),
            _ => Self::Writes,
        }
    }
}

/// Name of a level, as in a history.
impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Writes => f.write_str("writes"),
            Self::Reads(mode) => write!(f, "{} reads", mode.name()),
            Self::Scans(mode) => write!(f, "{} scans", mode.name()),
        }
    }
}

impl Serialize for Class {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Op<'a> {
    /// The question.
    pub asked: &'a Event,
    /// The answer, if any.
    pub done: Option<&'a Event>,
    /// When it was over: at the end of the history, if it was never answered.
    pub end_ns: u64,
    /// What it is.
    pub class: Class,
    /// How it ended.
    pub outcome: Outcome,
    /// Client, from 0.
    pub lane: usize,
    /// Number that the client went under.
    pub process: u64,
}

impl Op<'_> {
    /// How long it took.
    #[must_use]
    pub fn took_ns(&self) -> u64 {
        self.end_ns - self.asked.time
    }
}

/// All operations of a history, in the order in which they were asked.
#[must_use]
pub fn ops(events: &[Event]) -> Vec<Op<'_>> {
    let end_ns = events.last().map_or(0, |last| last.time);
    let mut found: Vec<Op<'_>> = Vec::with_capacity(events.len() / 2);
    let mut open: BTreeMap<u64, usize> = BTreeMap::new();
    let mut lanes = Lanes::default();
    for event in events {
        let Process::Client(process) = event.process else { continue };
        if event.kind == Kind::Invoke {
            open.insert(process, found.len());
            let lane = lanes.lane(process);
            let class = Class::of(event);
            found.push(Op { asked: event, done: None, end_ns, class, outcome: Outcome::Info, lane, process });
        } else if let Some(at) = open.remove(&process) {
            let op = &mut found[at];
            op.done = Some(event);
            op.end_ns = event.time;
            op.outcome = outcome(event);
            if event.kind == Kind::Info {
                lanes.retire(process);
            }
        }
    }
    found
}

fn outcome(done: &Event) -> Outcome {
    match done.kind {
        Kind::Ok => Outcome::Ok,
        Kind::Fail if done.error.as_ref().is_some_and(|error| error.code == MISMATCH) => Outcome::Mismatch,
        Kind::Fail => Outcome::Fail,
        Kind::Info | Kind::Invoke => Outcome::Info,
    }
}

/// Which client goes under which number.
#[derive(Default)]
struct Lanes {
    of: BTreeMap<u64, usize>,
    /// Lanes whose number is used up, the one that waits longest first.
    free: VecDeque<usize>,
    count: usize,
}

impl Lanes {
    fn lane(&mut self, process: u64) -> usize {
        if let Some(lane) = self.of.get(&process) {
            return *lane;
        }
        let lane = self.free.pop_front().unwrap_or_else(|| {
            self.count += 1;
            self.count - 1
        });
        self.of.insert(process, lane);
        lane
    }

    fn retire(&mut self, process: u64) {
        if let Some(lane) = self.of.remove(&process) {
            self.free.push_back(lane);
        }
    }
}
