//! The short way to confirm that a leader still leads: it asks just enough other voters whether they still follow it.
//!
//! openraft's own way is a round of heartbeats to all, each a message, an answer and three turns of openraft's core.
//! Here a leader whose lease is fresh notes what is committed, and then asks as few voters as make a quorum with it; one
//! who does not say yes in time sends the round the long way, and others are asked the next time.
//!
//! Why it holds (Raft, §6.4 of Ongaro's thesis): whoever leads a later term was voted for by a quorum, which shares a
//! member with the one that is asked here. This member had not voted yet when it said yes, or, being the leader, when it
//! noted what is committed. So what a later leader acknowledged was acknowledged after this round began.
//!
//! Invariants:
//! * what is committed is noted before anybody is asked;
//! * a voter says yes only while its vote, as openraft's core has it, is the asking leader's.

use super::{
    types::{LogId, Raft, Vote},
    wire::{self, Address, Status},
};
use crate::{
    key::{NodeId, PartitionId, Replica, ReplicaId},
    transport::{Kind, endpoint::Endpoint},
};
use openraft::{ReadPolicy, ServerState};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// How long a voter may take to answer before the round goes the long way.
pub(super) const PATIENCE: Duration = Duration::from_millis(25);

/// Who can witness that a replica leads.
pub(super) struct Witnesses {
    raft: Raft,
    endpoint: Arc<Endpoint>,
    group: PartitionId,
    me: Replica,
    /// Where to begin among the other voters.
    first: AtomicUsize,
}

impl Witnesses {
    pub(super) fn new(raft: Raft, endpoint: Arc<Endpoint>, group: PartitionId, me: Replica) -> Self {
        Self { raft, endpoint, group, me, first: AtomicUsize::new(0) }
    }

    /// What was committed when the round began; `None` if it has to go the long way.
    pub(super) async fn confirm(&self) -> Option<LogId> {
        let first = self.first.load(Ordering::Relaxed);
        let (vote, asked) = self.choose(first)?;
        let linearizer = self.raft.get_read_linearizer(ReadPolicy::LeaseRead).await.ok()?;
        let answers: Vec<_> = asked
            .into_iter()
            .map(|voter| {
                let address = Address { group: self.group, from: self.me.id, to: voter.id };
                self.endpoint.call(voter.node, Kind::Confirm, wire::confirm(address, &vote), PATIENCE)
            })
            .collect();
        for answer in answers {
            let status = answer.await.ok().and_then(|body| wire::status(body).ok());
            if !matches!(status, Some((Status::Ok, _))) {
                self.first.store(first.wrapping_add(1), Ordering::Relaxed);
                return None;
            }
        }
        Some(*linearizer.read_log_id().log_id())
    }

    /// The vote of this leader, and as many other voters as make a quorum with it. `None` while members change: then two
    /// quorums are needed.
    fn choose(&self, first: usize) -> Option<(Vote, Vec<Replica>)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let [voters] = membership.get_joint_config().as_slice() else { return None };
        if metrics.state != ServerState::Leader || !voters.contains(&self.me.id.0) {
            return None;
        }
        let others_count = voters.len() - 1;
        let others = voters.iter().filter(|id| **id != self.me.id.0).cycle().skip(first % others_count.max(1));
        let node_of = |id: &u64| -> Option<NodeId> { membership.get_node(id).copied() };
        let asked: Option<Vec<Replica>> =
            others.take(voters.len() / 2).map(|id| Some(Replica { id: ReplicaId(*id), node: node_of(id)? })).collect();
        Some((metrics.vote, asked?))
    }
}

/// Whether a replica still follows the leader with this vote.
pub(super) async fn follows(raft: &Raft, vote: Vote) -> bool {
    raft.with_raft_state(move |state| *state.vote_ref() == vote).await.unwrap_or(false)
}
