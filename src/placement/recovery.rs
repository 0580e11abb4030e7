//! Going on with a partition whose quorum is lost for good: a person accepts that data may be lost.
//!
//! One replica that is left, the survivor, is taken ([`choose`]); the driver gives every replica of the partition up and
//! names a fresh one on the survivor's node as the only member ([`Command::Recover`](super::Command::Recover)). That node
//! makes it of all that the survivor holds, and when it leads it reports, as every group does. What was done stays in the
//! driver's state ([`Recovery`]).
//!
//! Invariants:
//! * a partition that may have a quorum is not recovered, nor one that is being cut or merged;
//! * the log of the fresh replica begins far above whatever the old group can have written, in index and in term: a
//!   report, a leader's notice or a session's token of the old group never counts for newer than one of the new.

use super::{
    command::{Answer, Refusal, Reply},
    journal::Entry,
    map::{Partition, Phase},
    state::{Change, State},
};
use crate::key::{DRIVER, Epoch, NodeId, PartitionId, Replica, ReplicaId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{cmp::Reverse, collections::BTreeMap};

/// How far above the survivor's log the new one begins: entries that nobody has heard of, and that an old group writes
/// before it hears that it is given up, are fewer.
const INDEX_GAP: u64 = 1 << 32;
/// The same, for terms.
const TERM_GAP: u64 = 1 << 20;
/// Recoveries remembered; the oldest are forgotten first.
pub const RECOVERIES_MAX: usize = 1_024;
/// A node that nobody asked has heard of for this long counts as out of contact.
pub const SILENT_AFTER_MS: u64 = 1_000;

/// What one node knows of a partition whose quorum may be lost.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Account {
    /// Its own replica, if one runs there.
    pub held: Option<Held>,
    /// For each node with a replica, how long ago it was heard from; none: never.
    pub silence_ms: BTreeMap<NodeId, Option<u64>>,
}

/// What a replica holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Held {
    /// The replica.
    pub replica: ReplicaId,
    /// Term of the last entry of its log.
    pub last_term: u64,
    /// Index of that entry.
    pub last_index: u64,
    /// Index of the last entry that it has applied, so knew to be committed.
    pub applied: u64,
    /// Latest term that it has seen.
    pub term: u64,
    /// Epoch of the bounds that it knows.
    pub bounds: u64,
    /// It leads, and a quorum has confirmed that lately.
    pub confirmed: bool,
}

/// Asks to go on with one replica of a partition alone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recover {
    /// The partition.
    pub partition: PartitionId,
    /// Its epoch when this was decided.
    pub epoch: Epoch,
    /// The replica to go on with.
    pub survivor: ReplicaId,
    /// Term of the last entry of its log.
    pub last_term: u64,
    /// Index of that entry.
    pub last_index: u64,
    /// Latest term that anybody asked has seen.
    pub term: u64,
    /// When this was decided, milliseconds since 1970.
    pub wall_ms: u64,
}

/// What was done, for people who ask later.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recovery {
    /// What was asked.
    pub asked: Recover,
    /// Node of the survivor.
    pub node: NodeId,
    /// The replica that the partition went on with.
    pub fresh: ReplicaId,
    /// The other replicas, which were given up.
    pub lost: Vec<Replica>,
}

/// The replica to go on with, what it holds, and the latest term that anybody asked has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The replica.
    pub survivor: Replica,
    /// What it holds.
    pub held: Held,
    /// The term.
    pub term: u64,
}

/// Chooses the replica to go on with: the one with the longest log, or the one on `from`.
///
/// # Errors
/// [`Refusal::RecoverImpossible`] when the partition may have a quorum, when no replica of it is left, or none on `from`.
pub fn choose(
    partition: &Partition,
    accounts: &BTreeMap<NodeId, Account>,
    from: Option<NodeId>,
) -> Result<Choice, Refusal> {
    let impossible = |why: String| Err(Refusal::RecoverImpossible { partition: partition.id, why });
    let why_not = obstacle(partition);
    if !why_not.is_empty() {
        return impossible(why_not.to_owned());
    }
    let runs = |replica: Replica| {
        let held = accounts.get(&replica.node)?.held.filter(|held| held.replica == replica.id)?;
        Some((replica, held))
    };
    let left: Vec<(Replica, Held)> = partition.replicas().filter_map(runs).collect();
    // A node that answers has its disk: a replica that does not run there yet, or cannot be opened, is not lost for that.
    let in_contact = |node: NodeId| silence_ms(accounts, node).is_some_and(|silence| silence < SILENT_AFTER_MS);
    let live: Vec<NodeId> =
        partition.members.iter().map(|member| member.node).filter(|node| in_contact(*node)).collect();
    let members = partition.members.len();
    if live.len() > members / 2 || left.iter().any(|(_, held)| held.confirmed) {
        return impossible(format!(
            "{} of its {members} members are in contact ({}), so it has a quorum or will have, and recovering it would lose \
             data for nothing; nodes that are gone are replaced by themselves after `down_after`, or with `meridian node \
             decommission`; a node that runs and cannot open its replica has to be stopped first",
            live.len(),
            shown(&live)
        ));
    }
    let nodes: Vec<NodeId> = partition.replicas().map(|replica| replica.node).collect();
    let running: Vec<NodeId> = left.iter().map(|(replica, _)| replica.node).collect();
    let wanted = left.iter().filter(|(replica, _)| from.is_none_or(|from| from == replica.node));
    let best = wanted.max_by_key(|(replica, held)| (held.last_term, held.last_index, Reverse(replica.id)));
    let term = left.iter().map(|(_, held)| held.term).max().unwrap_or(0);
    match (best, from) {
        (Some((survivor, held)), _) => Ok(Choice { survivor: *survivor, held: *held, term }),
        (None, Some(from)) if !left.is_empty() => impossible(format!(
            "no replica of it runs on {from}; one does on {}: name that node, or none",
            shown(&running)
        )),
        (None, _) => impossible(format!(
            "no replica of it is left that runs, and nothing else holds its rows; start one of {} again, with its data \
             directory, or drop the keyspace",
            shown(&nodes)
        )),
    }
}

/// How long ago anybody asked last heard from a node; zero if it answers itself, none if nobody ever did.
#[must_use]
pub fn silence_ms(accounts: &BTreeMap<NodeId, Account>, node: NodeId) -> Option<u64> {
    if accounts.contains_key(&node) {
        return Some(0);
    }
    accounts.values().filter_map(|account| account.silence_ms.get(&node).copied().flatten()).min()
}

/// Why a partition is not one that can be recovered at all, or nothing.
const fn obstacle(partition: &Partition) -> &'static str {
    if partition.id.0 == DRIVER.0 {
        return "it is the placement driver's own, which alone could decide about that; bring its nodes back";
    }
    if partition.cut.is_some() {
        return "it is being cut in two, which cannot be taken back; bring one of its nodes back";
    }
    if partition.merge.is_some() {
        return "it is being merged with a neighbour; bring one of its nodes back, which ends that or withdraws it";
    }
    ""
}

fn shown<T: ToString>(ids: &[T]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl State {
    pub(super) fn recover(&mut self, asked: Recover, change: &mut Change) -> Answer {
        if let Some(done) = self.recoveries.iter().find(|done| done.asked == asked) {
            return Ok(Reply::Recovering { replica: done.fresh });
        }
        let id = asked.partition;
        let known = self.map().partition(id).ok_or(Refusal::PartitionUnknown(id))?.clone();
        let why_not = obstacle(&known);
        if !why_not.is_empty() {
            return Err(Refusal::RecoverImpossible { partition: id, why: why_not.to_owned() });
        }
        let outdated = |why: String| Err(Refusal::StepOutdated { partition: id, why });
        if known.epoch != asked.epoch {
            return outdated(format!("decided at {:?}, now it is {:?}", asked.epoch, known.epoch));
        }
        let Some(survivor) = known.replicas().find(|replica| replica.id == asked.survivor) else {
            return outdated(format!("{} is no replica of it", asked.survivor));
        };
        let fresh = self.fresh_replica(survivor.node);
        let lost = known.replicas().filter(|replica| *replica != survivor).collect();
        let begins = known.epoch.members.max(asked.last_index).saturating_add(INDEX_GAP);
        let recovered = Partition {
            epoch: Epoch { members: begins, ..known.epoch },
            members: vec![fresh],
            target: vec![fresh],
            phase: Phase::Recovering(survivor.id, asked.term.saturating_add(TERM_GAP)),
            initializer: fresh.id,
            leaving: Vec::new(),
            ..known
        };
        self.put_partition(recovered, change);
        if self.recoveries.len() >= RECOVERIES_MAX {
            self.recoveries.remove(0);
        }
        self.recoveries.push(Recovery { asked, node: survivor.node, fresh: fresh.id, lost });
        Ok(Reply::Recovering { replica: fresh.id })
    }

    /// The recoveries of a partition, the oldest first, as the journal tells of decisions.
    #[must_use]
    pub fn recoveries_of(&self, id: PartitionId) -> Vec<Entry> {
        self.recoveries.iter().filter(|done| done.asked.partition == id).map(Recovery::entry).collect()
    }
}

impl Recovery {
    fn entry(&self) -> Entry {
        let Self { asked, node, fresh, lost } = self;
        let Recover { survivor, last_term, last_index, wall_ms, partition, .. } = asked;
        let lost: Vec<String> = lost.iter().map(|replica| format!("{} on {}", replica.id, replica.node)).collect();
        Entry {
            wall_ms: *wall_ms,
            partition: *partition,
            what: format!("it goes on without a quorum, from {survivor} on {node} alone, as {fresh}"),
            why: format!("somebody accepted the loss of data and gave up {}", lost.join(", ")),
            result: format!(
                "done: {survivor} held the log up to {last_index} of term {last_term}; writes that were acknowledged and \
                 that it did not hold are lost"
            ),
            times: 1,
        }
    }
}

impl Account {
    /// Versioned bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        super::encode(self)
    }

    /// The account behind these bytes.
    ///
    /// # Errors
    /// When they are none of ours or of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, super::DecodeError> {
        super::decode("account of a partition", bytes)
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
