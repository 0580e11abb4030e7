//! One replica of one group, with the type of its machine: what the rest of Meridian sees of Raft.

use super::{
    barrier::{BarrierError, Level},
    hub::RaftHub,
    machine::{Cell, GateError, LogPosition, Machine},
    members::{Goal, MembersError},
    replica::{Running, detached},
    snapshots::position,
    types::{self, Cmd, Share, Slot, StoredMembership},
    watch,
};
use crate::{
    error::Outcome,
    key::{NodeId, PartitionId, Replica, ReplicaId},
    log::Recovered,
    plant::{Bug, planted},
};
use bytes::Bytes;
use openraft::{
    ServerState,
    errors::{ClientWriteError, ForwardReason, InitializeError, RaftError},
};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

/// Why a replica could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It was destroyed; its id is never used again.
    #[error("the replica was destroyed")]
    Destroyed,
    /// The group has a replica running on this node.
    #[error("the group has a replica running on this node")]
    AlreadyOpen,
    /// Its log is damaged.
    #[error("the log is damaged: {0}")]
    Log(#[source] io::Error),
    /// Its log and its snapshot do not make a state.
    #[error("the state cannot be restored: {0}")]
    State(String),
}

/// Why a write has no reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WriteError {
    /// This replica does not lead. It was not proposed.
    #[error("not the leader")]
    NotLeader {
        /// Who does, as far as this replica knows.
        leader: Option<Replica>,
    },
    /// This replica leads, but no quorum has confirmed that of late, as right after an election or without a quorum. It
    /// was not proposed.
    #[error("the leader has no quorum")]
    NoQuorum,
    /// Too many bytes are proposed. It was not proposed.
    #[error("too many bytes are proposed")]
    Overloaded,
    /// Leadership changed after it was proposed.
    #[error("proposed, then leadership changed")]
    Discarded,
    /// The replica is stopping.
    #[error("stopped")]
    Stopped {
        /// Whether it may have been proposed.
        proposed: bool,
    },
    /// The deadline passed after it was proposed.
    #[error("proposed, but not applied in time")]
    Timeout,
}

impl WriteError {
    /// What is known of the write.
    #[must_use]
    pub const fn effect(&self) -> Outcome {
        match self {
            Self::NotLeader { .. } | Self::NoQuorum | Self::Overloaded | Self::Stopped { proposed: false } => {
                Outcome::NotApplied
            }
            Self::Discarded | Self::Stopped { proposed: true } | Self::Timeout => Outcome::Unknown,
        }
    }
}

/// What a replica is in its group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It leads.
    Leader,
    /// It votes and follows.
    Follower,
    /// It would like to lead.
    Candidate,
    /// It follows and does not vote; also a replica that belongs to no group yet.
    Learner,
    /// It has stopped.
    Stopped,
}

/// Who leads a group, as far as a replica knows. The higher term is right.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Leadership {
    /// Latest term seen.
    pub term: u64,
    /// Who was elected in it.
    pub leader: Option<Replica>,
}

/// What a read may rely on after a barrier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadPoint {
    /// This index is applied here, and every write acknowledged before the barrier began is at or below it.
    pub index: u64,
    /// Term of the leader that confirmed it.
    pub term: u64,
    /// What this replica is.
    pub role: Role,
}

/// A replica's view of its group and of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// What it is.
    pub role: Role,
    /// Latest term seen.
    pub term: u64,
    /// Who leads.
    pub leader: Option<Replica>,
    /// Members with a vote, in order of id; those of both configurations while members change.
    pub voters: Vec<Replica>,
    /// Members without a vote, in order of id.
    pub learners: Vec<Replica>,
    /// Members are being changed.
    pub joint: bool,
    /// Index at which the members were last changed; they may not be committed yet.
    pub members_at: u64,
    /// Whether that change is committed.
    pub members_committed: bool,
    /// Last index in the log.
    pub last_log: u64,
    /// Last index known to be committed.
    pub committed: u64,
    /// What is applied.
    pub applied: LogPosition,
    /// Last index in the snapshot, 0 if there is none.
    pub snapshot: u64,
    /// Last index cut from the log, 0 if none was.
    pub purged: u64,
    /// Measure of the log, in bytes.
    pub log_bytes: u64,
    /// About how many bytes the state takes.
    pub state_bytes: u64,
    /// Its group is idle: it sends no heartbeats and runs no timers until somebody asks or is missing.
    pub asleep: bool,
    /// On the leader: time since a quorum last confirmed it.
    pub quorum_acked: Option<Duration>,
    /// On the leader: entries that each other member lacks.
    pub lag: BTreeMap<ReplicaId, u64>,
}

/// When a replica was last known to be up to date.
#[derive(Default)]
struct Freshness {
    /// On the node's clock: it has applied everything acknowledged before.
    at: Mutex<Option<Duration>>,
    refreshing: AtomicBool,
}

struct Inner<M> {
    running: Arc<Running>,
    cell: Arc<Cell<M>>,
    fresh: Arc<Freshness>,
}

/// One replica of one group. Clones are the same replica; dropping them does not stop it, [`Group::shutdown`] does.
pub struct Group<M>(Arc<Inner<M>>);

impl<M> Clone for Group<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M> std::fmt::Debug for Group<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Group({} {} on {})", self.0.running.group, self.0.running.me.id, self.0.running.me.node)
    }
}

impl<M: Machine> Group<M> {
    /// Opens replica `replica` of `group` with what was `found` of it at start, nothing for a new one, and lets it take
    /// part. `machine` is the empty machine: its state is restored from snapshot and log.
    ///
    /// A new replica waits to be contacted by a leader, or for [`Self::initialize`]. One that has voted in an earlier
    /// life neither votes nor campaigns for one lease.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing was changed.
    pub async fn open(
        hub: &Arc<RaftHub>,
        group: PartitionId,
        replica: ReplicaId,
        found: &Recovered,
        machine: M,
    ) -> Result<Self, OpenError> {
        let cell = Arc::new(Cell::new(machine));
        let running = Running::open(hub, group, replica, found, Arc::clone(&cell) as _).await?;
        Ok(Self(Arc::new(Inner { running, cell, fresh: Arc::default() })))
    }

    /// Asks the others for the leadership, if nobody holds it.
    pub async fn campaign(&self) {
        let running = Arc::clone(&self.0.running);
        detached(async move { running.campaign().await }).await;
    }

    /// The group.
    #[must_use]
    pub fn id(&self) -> PartitionId {
        self.0.running.group
    }

    /// This replica.
    #[must_use]
    pub fn replica(&self) -> Replica {
        self.0.running.me
    }

    /// Makes this replica the first of a new group with these voters. To be called on one replica, once; calling it again
    /// is harmless. On another one it is called when the first has died too early for the others to know of the group.
    ///
    /// # Errors
    /// When this replica is not among `members`, or has stopped; it has also stopped when it had voted already, and has
    /// to be opened again.
    pub async fn initialize(&self, members: &[Replica]) -> Result<(), MembersError> {
        let nodes: BTreeMap<u64, NodeId> = members.iter().map(|member| (member.id.0, member.node)).collect();
        let raft = self.0.running.raft.clone();
        match detached(async move { raft.initialize(nodes).await }).await {
            // It has voted for somebody who never came to send it anything.
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) if self.0.running.is_blank() => {
                let begun = self.0.running.begin_anew(members).await;
                Err(begun.map_or_else(|error| MembersError::Refused(error.to_string()), |()| MembersError::Stopped))
            }
            // Not allowed: there is a log, so it was initialized before.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(error)) => Err(MembersError::Refused(error.to_string())),
            Err(RaftError::Fatal(_)) => Err(MembersError::Stopped),
        }
    }

    /// Replicates `command` and applies it; returns where it stands and the machine's reply.
    ///
    /// # Errors
    /// See [`WriteError`]; [`WriteError::effect`] says whether it may have happened. Dropping the future leaves it
    /// unknown.
    pub async fn write(&self, command: Bytes, deadline: Instant) -> Result<(LogPosition, M::Reply), WriteError> {
        let running = &self.0.running;
        if running.is_stopping() {
            return Err(WriteError::Stopped { proposed: false });
        }
        let budget = running.hub.config.proposed_bytes_max;
        let share = Share::take(&running.proposed_bytes, command.len() as u64, budget).ok_or(WriteError::Overloaded)?;
        running.rouse(deadline).await;
        let (slot, outcome) = Slot::new(share);
        let raft = running.raft.clone();
        // When it fails, the slot is dropped and the outcome says so.
        let proposed = detached(async move { raft.client_write_ff(Cmd(command), Some(slot)).await });
        let outcome = timeout_at(deadline, async {
            let _ = proposed.await;
            outcome.await
        });
        let response = match outcome.await {
            Err(_elapsed) => return Err(WriteError::Timeout),
            Ok(Err(_dropped)) => return Err(WriteError::Stopped { proposed: true }),
            Ok(Ok(Err(error))) => return Err(refused(error)),
            Ok(Ok(Ok(response))) => response,
        };
        let reply = response.data.0.and_then(|reply| reply.downcast::<M::Reply>().ok());
        let reply = *reply.expect("an applied command has a reply of its machine's type");
        Ok((position(Some(&response.log_id)), reply))
    }

    /// Lets `read` look at the state and at the position that it was applied to. Promises nothing of how recent it is.
    /// Commands wait while it looks: it should be quick.
    pub fn read<T>(&self, read: impl FnOnce(&M, LogPosition) -> T) -> T {
        self.0.cell.read(read)
    }

    /// Waits until this replica has applied every write acknowledged before this call, on any replica.
    ///
    /// # Errors
    /// See [`BarrierError`].
    pub async fn barrier(&self, level: Level, deadline: Instant) -> Result<ReadPoint, BarrierError> {
        let running = &self.0.running;
        if running.is_stopping() {
            return Err(BarrierError::Stopped);
        }
        let at = running.barriers.point(level, deadline).await?;
        if !planted(Bug::ReadBeforeApplied) {
            self.wait_applied(at.index, deadline).await?;
        }
        Ok(ReadPoint { index: at.index, term: at.leader_id.term, role: self.role() })
    }

    /// Waits until this replica misses no write acknowledged more than `bound` before this call; returns how stale it
    /// is at most, at the return.
    ///
    /// Costs a barrier only if the last one is too long ago; one that is half as long ago is repeated in the background.
    ///
    /// # Errors
    /// See [`BarrierError`].
    pub async fn fresh_within(&self, bound: Duration, deadline: Instant) -> Result<Duration, BarrierError> {
        let clock = &self.0.running.hub.clock;
        let began = clock.elapsed();
        let fresh = *self.0.fresh.at.lock();
        if let Some(at) = fresh.filter(|at| *at + bound >= began) {
            if at + bound / 2 < began && !self.0.fresh.refreshing.swap(true, Ordering::AcqRel) {
                let group = self.clone();
                crate::env::spawn(async move {
                    // If it fails, the next read finds out for itself.
                    let lease = group.0.running.hub.config.lease();
                    let _ = group.refresh(Instant::now() + lease).await;
                    group.0.fresh.refreshing.store(false, Ordering::Release);
                });
            }
            return Ok(clock.elapsed().saturating_sub(at));
        }
        let at = self.refresh(deadline).await?;
        Ok(clock.elapsed().saturating_sub(at))
    }

    /// Notes the time, passes a barrier, and knows then that nothing acknowledged before that time is missing.
    async fn refresh(&self, deadline: Instant) -> Result<Duration, BarrierError> {
        let mut at = self.0.running.hub.clock.elapsed();
        if !planted(Bug::FreshWithoutProof) {
            self.barrier(Level::ReadIndex, deadline).await?;
        }
        if planted(Bug::FreshNotedLate) {
            at = self.0.running.hub.clock.elapsed();
        }
        let mut fresh = self.0.fresh.at.lock();
        *fresh = (*fresh).max(Some(at));
        Ok(at)
    }

    /// Waits until `index` is applied here.
    ///
    /// # Errors
    /// [`BarrierError::Timeout`] or [`BarrierError::Stopped`].
    pub async fn wait_applied(&self, index: u64, deadline: Instant) -> Result<(), BarrierError> {
        self.0.cell.gate.reached(index, deadline).await.map_err(|error| match error {
            GateError::Timeout => BarrierError::Timeout,
            GateError::Stopped => BarrierError::Stopped,
        })
    }

    /// What is applied here.
    #[must_use]
    pub fn applied(&self) -> LogPosition {
        self.0.cell.read(|_, at| at)
    }

    /// The last entry of its log, committed or not.
    #[must_use]
    pub fn last_log(&self) -> LogPosition {
        position(self.0.running.log.last().as_ref())
    }

    /// Who leads, as far as this replica knows, and a note at every change.
    #[must_use]
    pub fn watch_leadership(&self) -> watch::Receiver<Leadership> {
        self.0.running.leadership.subscribe()
    }

    /// Who leads, as far as this replica knows.
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        *self.0.running.leadership.borrow()
    }

    /// Whether this replica believes that it leads.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.leadership().leader == Some(self.replica())
    }

    /// What this replica is.
    #[must_use]
    pub fn role(&self) -> Role {
        // From where the leadership is published: whoever is told of a new leader finds it leading.
        let state = || self.0.running.raft.server_metrics().borrow().state;
        if self.0.running.is_stopping() { Role::Stopped } else { role(state()) }
    }

    /// Whether its group is idle and it does nothing until somebody asks or is missing.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.0.running.barriers.sleeper.is_asleep()
    }

    /// This replica's view of the group and of itself.
    #[must_use]
    pub fn status(&self) -> Status {
        let running = &self.0.running;
        let Leadership { leader, .. } = self.leadership();
        let (applied, state_bytes) = self.read(|machine, at| (at, machine.bytes()));
        let index = |at: &Option<types::LogId>| at.map_or(0, |at| at.index);
        let role = self.role();
        running.metrics(|metrics| {
            let effective: &StoredMembership = &metrics.membership_config;
            let membership = effective.membership();
            let voters: Vec<u64> = membership.voter_ids().collect();
            let (voters, learners) = types::replicas(membership).partition(|replica| voters.contains(&replica.id.0));
            let last_log = metrics.last_log_index.unwrap_or(0);
            let others = metrics.replication.iter().flatten().filter(|(id, _)| **id != running.me.id.0);
            Status {
                role,
                term: metrics.current_term,
                leader,
                voters,
                learners,
                joint: membership.get_joint_config().len() > 1,
                members_at: index(effective.log_id()),
                members_committed: effective.log_id() == metrics.committed_membership_config.log_id(),
                last_log,
                committed: index(&metrics.local_committed),
                applied,
                snapshot: index(&metrics.snapshot),
                purged: index(&metrics.purged),
                log_bytes: running.log.bytes(),
                state_bytes,
                asleep: self.is_asleep(),
                quorum_acked: metrics.last_quorum_acked.map(|at| openraft::Instant::elapsed(&at.into_inner())),
                lag: others.map(|(id, at)| (ReplicaId(*id), last_log.saturating_sub(index(at)))).collect(),
            }
        })
    }

    /// Measure of what of the log is in memory, in bytes.
    #[must_use]
    pub fn log_held_bytes(&self) -> u64 {
        self.0.running.log.held_bytes()
    }

    /// Changes the members to the goal, step by step; see the module `members`. Idempotent: after an error, or when
    /// another replica leads, the same call goes on from wherever the group is.
    ///
    /// # Errors
    /// See [`MembersError`].
    pub async fn set_members(&self, goal: Goal<'_>, deadline: Instant) -> Result<(), MembersError> {
        self.0.running.set_members(goal, deadline).await
    }

    /// Hands leadership to `to`, a voter that lacks nothing. Returns when `to` was asked to take over; whether it did
    /// shows in [`Self::watch_leadership`].
    ///
    /// # Errors
    /// See [`MembersError`].
    pub async fn transfer(&self, to: ReplicaId) -> Result<(), MembersError> {
        self.0.running.transfer(to).await
    }

    /// Takes a snapshot now and cuts the log; returns the snapshot's index, none if there was nothing to take or not
    /// before `deadline`.
    pub async fn snapshot_now(&self, deadline: Instant) -> Option<u64> {
        let running = Arc::clone(&self.0.running);
        let taken = detached(async move {
            let index = running.take_snapshot(deadline).await?;
            running.cut_log().await;
            Some(index)
        });
        taken.await
    }

    /// Whether it is stopping, or has stopped, by itself or because it was told to.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.running.is_stopping()
    }

    /// Stops taking part, in good order. Idempotent; what is stored stays.
    pub async fn shutdown(&self) {
        self.0.running.shutdown().await;
    }

    /// Stops, removes everything stored, and makes sure that this replica id is never opened again.
    ///
    /// # Errors
    /// When that could not be made durable.
    pub async fn destroy(&self) -> io::Result<()> {
        self.0.running.destroy().await
    }
}

/// What openraft says of a write without a response. Only a refusal before appending is definite.
fn refused(error: ClientWriteError<types::Types>) -> WriteError {
    match error {
        ClientWriteError::ForwardToLeader(to) if to.reason == ForwardReason::LeaseExpired => WriteError::NoQuorum,
        ClientWriteError::ForwardToLeader(to) => WriteError::NotLeader {
            leader: to.leader_id.zip(to.leader_node).map(|(id, node)| Replica { id: ReplicaId(id), node }),
        },
        ClientWriteError::LogEntryDiscarded(_)
        | ClientWriteError::ChangeMembershipError(_)
        | ClientWriteError::PreconditionFailed(_) => WriteError::Discarded,
    }
}

fn role(state: ServerState) -> Role {
    match state {
        ServerState::Leader => Role::Leader,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Learner => Role::Learner,
        ServerState::Shutdown => Role::Stopped,
    }
}
