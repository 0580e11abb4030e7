//! The history format `kvhist/1`: what clients asked and were told, one JSON object per line.
//!
//! A superset of Jepsen's operation maps. A folder holds `run.json` ([`RunInfo`]) and `history.jsonl` ([`Event`]s of one
//! workload).
//!
//! Invariants of a history:
//! * `index` is dense from 0; `time` does not go back; intervals are closed: equal times are concurrent;
//! * a process has at most one operation open, and none after an `info`: it goes on under a fresh number;
//! * `fail` means "certainly has not happened and will not"; whatever may have happened is `info`;
//! * values written are unique per key, so that a value read names the write it comes from.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::{
    collections::BTreeMap,
    io::{self, BufRead, Write},
};

/// Name of the format.
pub const SCHEMA: &str = "kvhist/1";
/// Longest line that is written or read, in bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// Who did something.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Process {
    /// A client: does one thing at a time.
    Client(u64),
    /// Whoever makes things fail.
    Nemesis,
}

/// What an event says of its operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It begins.
    Invoke,
    /// It has happened.
    Ok,
    /// It has not happened and will not.
    Fail,
    /// It may have happened, or may still happen. Also: everything that the nemesis says.
    Info,
}

/// Part of a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Initial values are written.
    Load,
    /// Faults come and go.
    #[default]
    Main,
    /// Faults are over; the cluster must become sound.
    Heal,
    /// Every key is read, after the heal and after a restart of everything.
    Final,
}

/// A consistency level.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Sees every write acknowledged before.
    #[default]
    Linearizable,
    /// The same, from the leader's lease.
    Lease,
    /// Misses no write acknowledged more than the bound before.
    Bounded,
    /// Sees at least what its session has seen.
    Session,
    /// Some past state.
    Eventual,
}

impl Mode {
    /// Whether it sees every write acknowledged before.
    #[must_use]
    pub fn is_strong(self) -> bool {
        matches!(self, Self::Linearizable | Self::Lease)
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linearizable => "linearizable",
            Self::Lease => "lease",
            Self::Bounded => "bounded",
            Self::Session => "session",
            Self::Eventual => "eventual",
        }
    }
}

/// How a read was to be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReadMode {
    /// Level.
    pub mode: Mode,
    /// For [`Mode::Bounded`]: the bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound_ms: Option<u64>,
}

/// Who served an operation, from the answer itself. What is not known is left out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Served {
    /// Node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Partition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<u64>,
    /// Its epoch: bounds version (what changes ownership).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Raft term.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    /// Log index: of the write, or applied when the state was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<u64>,
    /// `leader`, `follower` or `learner`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// How stale the answer says it may be, in milliseconds, rounded up; left out when it does not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<u64>,
    /// The row's version, of a write or of a row found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// The level really served, when the reply names another than was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degraded: Option<bool>,
}

/// Why an operation did not succeed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Failure {
    /// Reason of the catalogue, or `cas-mismatch`.
    pub code: String,
    /// Certainly not applied.
    pub definite: bool,
    /// The message.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub msg: String,
}

/// One line of a history.
///
/// Shapes of `value`: `write` v; `read` null → v or null; `cas` `[old, new]` (old null: absent; new null: deletes);
/// `delete` null; `incr` n → the number after it; `scan` `{"from","to","limit","page","reverse"}` →
/// `{"kvs":[[k,v]…],"more":bool,"pages":[{"n","srv"}]}`; `batch` `[["r",k,v]…,["w",k,v]…]`: applied as a whole if every
/// `r` still holds; the nemesis: `{"state":"installed"|"skipped"|"healed", …}`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Position in the file.
    pub index: u64,
    /// Nanoseconds since the run began, by one monotonic clock.
    pub time: u64,
    /// Who.
    pub process: Process,
    /// What it says.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Operation: `read`, `write`, `cas`, `delete`, `incr`, `scan`, `batch`, or what the nemesis did.
    pub f: String,
    /// Key: as text, or `b64:` and its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Argument, and result.
    #[serde(default)]
    pub value: Json,
    /// Level of a read; missing means linearizable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<ReadMode>,
    /// Session: operations of one session see what earlier ones of it saw and wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Identity of a write: `client/sequence`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub req: Option<String>,
    /// Times it was sent, when more than once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// Node asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Who served it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub srv: Option<Served>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// Value found by a `cas` that did not match; null if the row was absent, which is not the same as unknown.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub observed: Option<Json>,
    /// Part of the run.
    #[serde(default)]
    pub phase: Phase,
}

impl Event {
    /// An event of a client in the main phase, with nothing filled in.
    #[must_use]
    pub fn new(process: Process, kind: Kind, f: impl Into<String>) -> Self {
        Self {
            index: 0,
            time: 0,
            process,
            kind,
            f: f.into(),
            key: None,
            value: Json::Null,
            read: None,
            session: None,
            req: None,
            attempts: None,
            node: None,
            srv: None,
            error: None,
            observed: None,
            phase: Phase::Main,
        }
    }

    /// Level of a read.
    #[must_use]
    pub fn mode(&self) -> ReadMode {
        self.read.unwrap_or_default()
    }
}

/// What a run was: `run.json`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RunInfo {
    /// [`SCHEMA`].
    pub schema: String,
    /// `sim` or `drill`.
    pub tool: String,
    /// Version and commit of the binary.
    pub version: String,
    /// Seed that the run follows from.
    pub seed: u64,
    /// Hash of the plan.
    pub plan_hash: String,
    /// When it began: milliseconds since 1970.
    pub started_wall_ms: u64,
    /// Length of the run, in nanoseconds.
    pub duration_ns: u64,
    /// Clock behind `time`.
    pub clock: String,
    /// Nodes.
    pub nodes: Vec<String>,
    /// Workload of this history.
    pub workload: String,
    /// What the histories of this workload promise, by operation: `{"scan": "each partition at its own moment"}`.
    pub promises: BTreeMap<String, String>,
    /// Whether the store was empty at the start.
    pub empty_at_start: bool,
    /// Everything else that shaped the run.
    pub config: Json,
}

/// Why a history cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Reading failed.
    #[error("reading: {0}")]
    Io(#[from] io::Error),
    /// A line is not an event.
    #[error("line {line}: {error}")]
    Line {
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        error: String,
    },
}

/// Reads a history. A last line that is cut short is left out, as after a crash of whoever wrote it.
///
/// # Errors
/// When a line is no event, or breaks an invariant of the format; names the line.
pub fn read(from: impl BufRead) -> Result<Vec<Event>, Unreadable> {
    let mut events: Vec<Event> = Vec::new();
    let mut faulty: Option<Unreadable> = None;
    for (at, line) in from.split(b'\n').enumerate() {
        let line = line?;
        if line.is_empty() {
            continue;
        }
        // Only the last line may be cut short.
        if let Some(faulty) = faulty {
            return Err(faulty);
        }
        let refuse = |error: String| Unreadable::Line { line: at + 1, error };
        faulty = match serde_json::from_slice::<Event>(&line) {
            Ok(event) => {
                admit(&events, &event).map_err(refuse)?;
                events.push(event);
                None
            }
            Err(error) => Some(refuse(error.to_string())),
        };
    }
    match faulty {
        // Complete but wrong is not cut short.
        Some(Unreadable::Line { line, error }) if !error.contains("EOF") => Err(Unreadable::Line { line, error }),
        _ => Ok(events),
    }
}

fn admit(before: &[Event], event: &Event) -> Result<(), String> {
    if event.index != before.len() as u64 {
        return Err(format!("index {} where {} is due", event.index, before.len()));
    }
    if before.last().is_some_and(|last| last.time > event.time) {
        return Err(format!("time {} goes back", event.time));
    }
    if event.process == Process::Nemesis && event.kind != Kind::Info {
        return Err("the nemesis only ever says \"info\"".to_owned());
    }
    Ok(())
}

/// Writes one event as a line.
///
/// # Errors
/// When writing fails, or the line would be longer than [`LINE_BYTES_MAX`].
pub fn write(to: &mut impl Write, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(io::Error::other(format!("event {} takes {} bytes", event.index, line.len())));
    }
    to.write_all(&line)
}

/// What is there, also if it is null.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Json>, D::Error> {
    Json::deserialize(deserializer).map(Some)
}

impl Serialize for Process {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Client(number) => serializer.serialize_u64(*number),
            Self::Nemesis => serializer.serialize_str("nemesis"),
        }
    }
}

impl<'de> Deserialize<'de> for Process {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Json::deserialize(deserializer)? {
            Json::Number(number) => number.as_u64().map(Self::Client),
            Json::String(name) if name == "nemesis" => Some(Self::Nemesis),
            _ => None,
        }
        .ok_or_else(|| serde::de::Error::custom("a process is a number or \"nemesis\""))
    }
}
