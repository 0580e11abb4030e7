//! Seeds: what the replicas of a group that begins with a state find when they are opened for the first time.
//!
//! A child of a split begins with rows that its parent's log has decided. Every member makes the same seed by itself: a
//! snapshot of that state at [`SEED_AT`], a log that begins after it, and the vote that goes with it. A group that goes on
//! without its quorum begins with the state of the replica that is left, see [`super::salvage()`].
//!
//! A group that begins with nothing begins with an entry that names its members. Who wrote it may die before anybody else
//! has it, but after the others have voted: then one of them writes it again ([`first_entry`]).
//!
//! Invariants:
//! * the snapshot is durable before the vote and the log's beginning are, so that a replica is seeded completely or not
//!   at all;
//! * a replica seeded at [`SEED_AT`] has promised nothing to anybody: it may vote and campaign at once.

use super::{
    codec,
    hub::RaftHub,
    machine::{LogPosition, Machine},
    snapshots::{CHUNK_BYTES, Vault},
    types::{Entry, Membership, Payload, SnapshotMeta, StoredMembership, Vote, log_id},
};
use crate::{
    key::{NodeId, PartitionId, Replica, ReplicaId, SEED_INDEX},
    log::{Record, Recovered},
};
use openraft::entry::RaftEntry;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

/// Term of the seed: that of no election.
const SEED_TERM: u64 = 0;

/// Where the log of a child of a split begins.
pub const SEED_AT: LogPosition = LogPosition { index: SEED_INDEX, term: SEED_TERM };

/// Makes what replica `replica` of `group` begins with durable: the state of `machine`, and `members` as the voters, of
/// which `leader` is named as the seed's author, the same on all; the log begins behind `at`. Returns what to open the
/// replica with.
///
/// # Errors
/// When it could not be made durable; to be tried again.
pub async fn seed<M: Machine>(
    hub: &Arc<RaftHub>,
    group: PartitionId,
    replica: ReplicaId,
    members: &[Replica],
    leader: ReplicaId,
    LogPosition { index, term }: LogPosition,
    machine: &mut M,
) -> io::Result<Recovered> {
    let at = log_id(term, leader.0, index);
    let last_membership = StoredMembership::new(Some(at), membership(members)?);
    let meta = SnapshotMeta { last_log_id: Some(at), last_membership };
    let vault = Vault::new(group, replica, Arc::clone(&hub.snapshots));
    machine.freeze();
    let kept = vault.keep(std::iter::from_fn(|| machine.freeze_next(CHUNK_BYTES)), &meta).await;
    machine.thaw();
    kept?;
    let vote = codec::store_vote(&Vote::new_committed(term, leader.0));
    let marker = codec::store_log_id(&at);
    hub.engine.submit(group, replica, Record::Purge { upto: index, marker: marker.clone() }, None);
    hub.keep(group, replica, Record::Vote(vote.clone())).await?;
    Ok(Recovered { vote: Some(vote), purged: Some((index, marker)), ..Recovered::default() })
}

/// Writes the entry that names the first members of a group into the empty log of a replica that is not running. openraft
/// does this only for one that has not voted.
///
/// It is safe all the same. This replica has acknowledged nothing, and its log will be the shortest that there is: if
/// anything was ever committed in the group, any quorum of these members has somebody with a longer one, who does not vote
/// for it; and whoever leads replaces the entry.
///
/// # Errors
/// When it could not be made durable; to be tried again.
pub(super) async fn first_entry(
    hub: &RaftHub,
    group: PartitionId,
    replica: ReplicaId,
    members: &[Replica],
) -> io::Result<()> {
    let entry: Entry = RaftEntry::new(log_id(SEED_TERM, replica.0, 0), Payload::Membership(membership(members)?));
    hub.keep(group, replica, Record::Append { first: 0, entries: vec![codec::store_entry(&entry)] }).await
}

fn membership(members: &[Replica]) -> io::Result<Membership> {
    let voters: BTreeSet<u64> = members.iter().map(|member| member.id.0).collect();
    let nodes: BTreeMap<u64, NodeId> = members.iter().map(|member| (member.id.0, member.node)).collect();
    Membership::new(vec![voters], nodes).map_err(io::Error::other)
}

/// Whether a replica is as it was seeded: it has heard of no leader and voted for none.
#[must_use]
pub(super) fn is_pristine(found: &Recovered) -> bool {
    let vote = found.vote.as_ref().and_then(|vote| codec::recover_vote(vote).ok());
    vote.is_some_and(|vote| vote.leader_id.term == SEED_TERM)
}
