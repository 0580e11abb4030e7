//! The types that openraft is instantiated with, exactly once for every kind of machine.
//!
//! Commands are bytes and replies are type-erased, so that groups of different machines share one instantiation of
//! openraft: it costs most of a minute to compile and would double the binary.

use super::runtime::Rt;
use crate::key::{NodeId, Replica, ReplicaId};
use bytes::Bytes;
use openraft::{
    alias,
    raft::{ClientWriteResult, responder::Responder},
};
use std::{
    any::Any,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::oneshot;

/// A machine's command, as it stands in the log.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Cmd(pub Bytes);

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0.len())
    }
}

impl fmt::Debug for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A machine's reply, of a type that only [`super::Group`] knows; none for entries that are not commands.
pub(super) struct Answer(pub Option<Box<dyn Any + Send + Sync>>);

/// The instantiation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Types;

impl openraft::RaftTypeConfig for Types {
    type D = Cmd;
    type R = Answer;
    type NodeId = u64;
    type Node = NodeId;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type AsyncRuntime = Rt;
    type Responder<T>
        = Slot<T>
    where
        T: Send + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: Send + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// Term and replica of a leader; replica ids stand in for openraft's node ids.
pub(super) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
/// A vote.
pub(super) type Vote = openraft::impls::Vote<LeaderId>;
/// What an entry carries.
pub(super) type Payload = openraft::EntryPayload<Cmd, u64, NodeId>;
/// A log entry.
pub(super) type Entry = openraft::Entry<LeaderId, Payload>;
/// Position of an entry, with the leader that proposed it.
pub(super) type LogId = openraft::LogId<LeaderId>;
/// Voters and learners.
pub(super) type Membership = openraft::Membership<u64, NodeId>;
/// Membership with its position.
pub(super) type StoredMembership = alias::StoredMembershipOf<Types>;
/// What is known of a snapshot besides its bytes.
pub(super) type SnapshotMeta = alias::SnapshotMetaOf<Types>;
/// One replica of one group.
pub(super) type Raft = openraft::Raft<Types, super::replicated::Replicated>;

/// The position `index` proposed by `replica` as leader of `term`.
#[must_use]
pub(super) fn log_id(term: u64, replica: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: replica }, index)
}

/// Every replica of a membership.
pub(super) fn replicas(membership: &Membership) -> impl Iterator<Item = Replica> {
    membership.nodes().map(|(id, node)| Replica { id: ReplicaId(*id), node: *node })
}

/// Where openraft puts the outcome of a write. Dropping it unfilled means that the outcome is unknown.
pub(super) struct Slot<T> {
    outcome: oneshot::Sender<T>,
    /// Counted as long as the proposal is alive in openraft.
    _share: Option<Share>,
}

/// The part of a group's budget of proposed bytes that one proposal holds.
pub(super) struct Share {
    used_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Share {
    /// Takes `bytes` of a budget of `max_bytes`; none if too little is left. An empty budget admits anything, so that
    /// a single large command gets through.
    #[must_use]
    pub(super) fn take(used_bytes: &Arc<AtomicU64>, bytes: u64, max_bytes: u64) -> Option<Self> {
        let admit =
            |used: u64| (used == 0 || used.saturating_add(bytes) <= max_bytes).then(|| used.saturating_add(bytes));
        used_bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).ok()?;
        Some(Self { used_bytes: Arc::clone(used_bytes), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.used_bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Receives the outcome of a write.
pub(super) type Outcome = oneshot::Receiver<ClientWriteResult<Types>>;

impl Slot<ClientWriteResult<Types>> {
    /// A slot and where its content arrives.
    #[must_use]
    pub(super) fn new(share: Share) -> (Self, Outcome) {
        let (outcome, receiver) = oneshot::channel();
        (Self { outcome, _share: Some(share) }, receiver)
    }
}

impl<T: Send + 'static> Responder<Types, T> for Slot<T> {
    fn on_complete(self, result: T) {
        // The writer may have given up waiting; the outcome then concerns nobody.
        let _ = self.outcome.send(result);
    }
}
