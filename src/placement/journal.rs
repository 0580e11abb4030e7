//! What the driver's leader has decided lately, and what became of it: for people who ask why.
//!
//! Soft state: bounded, in memory, gone with the leader. What counts is in the map; what must not be forgotten, that data
//! was given up, is in the driver's state ([`super::Recovery`]).

use super::{Decision, DecodeError, PartitionLoad, Step};
use crate::key::PartitionId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Decisions remembered.
pub const ENTRIES_MAX: usize = 4_096;
/// Decisions in one answer.
pub const ENTRIES_PER_ANSWER_MAX: usize = 64;

/// One decision, and what became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// When it was last made, milliseconds since 1970.
    pub wall_ms: u64,
    /// Whom it concerns.
    pub partition: PartitionId,
    /// What was to be done.
    pub what: String,
    /// What was seen that asked for it.
    pub why: String,
    /// "done", or why not.
    pub result: String,
    /// How often in a row it was made with the same result.
    pub times: u32,
}

/// The latest decisions.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    entries: VecDeque<Entry>,
}

impl Journal {
    /// Remembers a step of the planner and its result.
    pub fn note_step(&mut self, wall_ms: u64, decision: &Decision, result: String) {
        let (partition, what) = told(&decision.step);
        self.note(wall_ms, partition, what, &decision.why, result);
    }

    /// Remembers what was to be done with a partition, why, and the result; a repetition counts up.
    pub fn note(&mut self, wall_ms: u64, partition: PartitionId, what: String, why: &str, result: String) {
        let same = |entry: &&mut Entry| entry.partition == partition && entry.what == what && entry.result == result;
        if let Some(entry) = self.entries.iter_mut().rev().find(|entry| entry.partition == partition).filter(same) {
            entry.wall_ms = wall_ms;
            entry.times = entry.times.saturating_add(1);
            why.clone_into(&mut entry.why);
            return;
        }
        if self.entries.len() >= ENTRIES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(Entry { wall_ms, partition, what, why: why.to_owned(), result, times: 1 });
    }

    /// The latest decisions about a partition, the oldest first, with those that are `kept` elsewhere.
    #[must_use]
    pub fn with(&self, partition: PartitionId, mut kept: Vec<Entry>) -> Vec<Entry> {
        kept.extend(self.of(partition));
        kept.sort_by_key(|entry| entry.wall_ms);
        kept
    }

    /// The latest decisions about a partition, the oldest first.
    #[must_use]
    pub fn of(&self, partition: PartitionId) -> Vec<Entry> {
        let mut entries: Vec<Entry> = self
            .entries
            .iter()
            .rev()
            .filter(|entry| entry.partition == partition)
            .take(ENTRIES_PER_ANSWER_MAX)
            .cloned()
            .collect();
        entries.reverse();
        entries
    }
}

/// A step in words, and whom it concerns.
fn told(step: &Step) -> (PartitionId, String) {
    match step {
        Step::SetTarget { partition, nodes, .. } => {
            let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
            (*partition, format!("members become {}, the first of them preferred as leader", nodes.join(", ")))
        }
        Step::SetInitializer { partition, from, to } => {
            (*partition, format!("{to} initializes the group instead of {from}"))
        }
    }
}

/// What a node asks the driver's leader.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Question {
    /// The loads of these.
    pub loads_of: Vec<PartitionId>,
    /// The decisions about this one.
    pub why: Option<PartitionId>,
}

/// What it is told.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// Loads of those that somebody has told of.
    pub loads: Vec<(PartitionId, PartitionLoad)>,
    /// Decisions, the oldest first.
    pub entries: Vec<Entry>,
}

impl Question {
    /// Versioned bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        super::encode(self)
    }

    /// The question behind these bytes.
    ///
    /// # Errors
    /// When they are none of ours or of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        super::decode("question to the driver", bytes)
    }
}

impl Told {
    /// Versioned bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        super::encode(self)
    }

    /// The answer behind these bytes.
    ///
    /// # Errors
    /// When they are none of ours or of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        super::decode("answer of the driver", bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Epoch, NodeId};

    fn decision(partition: u64, node: u64) -> Decision {
        let nodes = vec![NodeId(node), NodeId(9)];
        let step = Step::SetTarget { partition: PartitionId(partition), epoch: Epoch::default(), nodes };
        Decision { step, why: "n5 is down".to_owned() }
    }

    #[test]
    fn repetitions_count_and_the_oldest_go() {
        let mut journal = Journal::default();
        for wall_ms in 1..=3 {
            journal.note_step(wall_ms, &decision(1, 2), "refused".to_owned());
        }
        journal.note_step(4, &decision(2, 2), "done".to_owned());
        journal.note_step(5, &decision(1, 2), "done".to_owned());
        let of_one = journal.of(PartitionId(1));
        let told: Vec<_> = of_one.iter().map(|entry| (entry.wall_ms, entry.times, entry.result.as_str())).collect();
        assert_eq!(told, [(3, 3, "refused"), (5, 1, "done")]);
        assert_eq!(of_one[0].what, "members become n2, n9, the first of them preferred as leader");
        for i in 0..ENTRIES_MAX as u64 {
            journal.note_step(i, &decision(3, i), "done".to_owned());
        }
        assert_eq!(journal.of(PartitionId(1)), []);
        assert_eq!(journal.of(PartitionId(3)).len(), ENTRIES_PER_ANSWER_MAX);
        assert_eq!(journal.entries.len(), ENTRIES_MAX);
    }

    #[test]
    fn questions_and_answers_come_back() {
        let question = Question { loads_of: vec![PartitionId(4)], why: Some(PartitionId(7)) };
        assert_eq!(Question::decode(&question.encode()), Ok(question));
        let mut journal = Journal::default();
        journal.note_step(1, &decision(1, 2), "done".to_owned());
        let loads = vec![(PartitionId(4), PartitionLoad { bytes: 9, ..PartitionLoad::default() })];
        let told = Told { loads, entries: journal.of(PartitionId(1)) };
        assert_eq!(Told::decode(&told.encode()), Ok(told));
    }
}
