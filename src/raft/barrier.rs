//! Read barriers: positions such that who has applied them misses no write acknowledged before the question.
//!
//! Questions are batched per replica: at most one round is under way, to the quorum or to the leader, and questions that
//! come meanwhile share the *next* one. Joining the current one would be wrong: it may have begun before a write that the
//! newcomer must see.
//!
//! Invariants:
//! * a round answers exactly those who asked before it began;
//! * every question ends: rounds are bounded by the leader's lease or by the deadline of a call.

use super::{
    codec::Damaged,
    group::Leadership,
    sleep::Sleeper,
    types::{LogId, Raft},
    watch,
    wire::{self, Address, Status},
    witness::Witnesses,
};
use crate::{
    env,
    key::{NodeId, PartitionId, Replica, ReplicaId},
    plant::{Bug, planted},
    transport::{
        Kind,
        endpoint::{CallError, Endpoint},
    },
};
use openraft::{
    LinearizerOption, ReadPolicy, ServerState,
    errors::{LinearizableReadError, RaftError},
};
use parking_lot::Mutex;
use std::{future::Future, sync::Arc, time::Duration};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// Questions that may wait for one round.
pub(super) const WAITERS_MAX: usize = 1 << 16;

/// Share of the lease that is trusted, in tenths: the rest is for clocks that run at different rates.
const LEASE_TENTHS: u32 = 8;

/// How a position is confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// A quorum confirms that the leader still leads. Assumes nothing of clocks.
    ReadIndex,
    /// The leader trusts its lease while it is fresh, and asks the quorum otherwise. Assumes that clocks run at about
    /// the same rate and that no machine was suspended.
    Lease,
}

/// Why there is no barrier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BarrierError {
    /// This replica knows of no leader, or the one it knows does not answer or does not lead any more.
    #[error("no leader known")]
    NoLeader {
        /// The leader, if one is known after all: ask again, or there.
        hint: Option<Replica>,
    },
    /// The leader could not confirm that it leads.
    #[error("no quorum in contact")]
    NoQuorum,
    /// Not before the deadline.
    #[error("not in time")]
    Timeout,
    /// The replica has stopped.
    #[error("stopped")]
    Stopped,
    /// Too many wait already.
    #[error("too many wait")]
    Overloaded,
}

/// The outcome of a round.
pub(super) type Confirmed = Result<LogId, BarrierError>;

/// Collects questions into rounds.
#[derive(Default)]
struct Batch(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    running: bool,
    next: Vec<oneshot::Sender<Confirmed>>,
}

impl Batch {
    /// Joins the next round; begins it if none is under way.
    fn join<F>(
        self: &Arc<Self>,
        round: impl Fn() -> F + Send + 'static,
    ) -> Result<oneshot::Receiver<Confirmed>, BarrierError>
    where
        F: Future<Output = Confirmed> + Send + 'static,
    {
        let (tx, rx) = oneshot::channel();
        let begin = {
            let mut waiting = self.0.lock();
            if waiting.next.len() >= WAITERS_MAX {
                return Err(BarrierError::Overloaded);
            }
            waiting.next.push(tx);
            !std::mem::replace(&mut waiting.running, true)
        };
        if begin {
            let batch = Arc::clone(self);
            env::spawn(async move {
                while let Some(mut these) = batch.take() {
                    let confirmed = round().await;
                    if planted(Bug::ReadJoinsRoundUnderWay) {
                        these.append(&mut batch.0.lock().next);
                    }
                    for tx in these {
                        // Some may have given up.
                        let _ = tx.send(confirmed);
                    }
                }
            });
        }
        Ok(rx)
    }

    /// Those who share the round that begins now; none ends the rounds.
    fn take(&self) -> Option<Vec<oneshot::Sender<Confirmed>>> {
        let mut waiting = self.0.lock();
        if waiting.next.is_empty() {
            waiting.running = false;
            return None;
        }
        Some(std::mem::take(&mut waiting.next))
    }
}

async fn outcome(joined: Result<oneshot::Receiver<Confirmed>, BarrierError>, deadline: Instant) -> Confirmed {
    match timeout_at(deadline, joined?).await {
        Ok(Ok(confirmed)) => confirmed,
        Ok(Err(_ended)) => Err(BarrierError::Stopped),
        Err(_elapsed) => Err(BarrierError::Timeout),
    }
}

/// The barriers of one replica.
pub(super) struct Barriers {
    raft: Raft,
    endpoint: Arc<Endpoint>,
    group: PartitionId,
    me: Replica,
    leadership: watch::Sender<Leadership>,
    lease: Duration,
    pub(super) sleeper: Arc<Sleeper>,
    witnesses: Arc<Witnesses>,
    batches: Batches,
}

/// Rounds of the leader and rounds to the leader, by level.
#[derive(Default)]
struct Batches {
    own: [Arc<Batch>; 2],
    others: [Arc<Batch>; 2],
}

impl Barriers {
    pub(super) fn new(
        raft: Raft,
        endpoint: Arc<Endpoint>,
        (group, me): (PartitionId, Replica),
        leadership: watch::Sender<Leadership>,
        lease: Duration,
        sleeper: Arc<Sleeper>,
    ) -> Self {
        let witnesses = Arc::new(Witnesses::new(raft.clone(), Arc::clone(&endpoint), group, me));
        Self { raft, endpoint, group, me, leadership, lease, sleeper, witnesses, batches: Batches::default() }
    }

    /// A position that who applies it may read at, from whoever leads.
    pub(super) async fn point(&self, level: Level, deadline: Instant) -> Confirmed {
        let mut asked_again = false;
        loop {
            let leader = self.leadership.borrow().leader;
            let confirmed = match leader {
                None => return Err(BarrierError::NoLeader { hint: None }),
                Some(leader) if leader == self.me => self.confirm(level, deadline).await,
                Some(_) => self.ask(level, deadline).await,
            };
            match confirmed {
                // The round had begun under a leader of before, or the news came just now: once more, at most.
                Err(BarrierError::NoLeader { hint }) if !asked_again => {
                    let now = self.leadership.borrow().leader;
                    if now.is_none() || now == leader {
                        return Err(BarrierError::NoLeader { hint });
                    }
                    asked_again = true;
                }
                confirmed => return confirmed,
            }
        }
    }

    /// Confirms as the leader.
    pub(super) async fn confirm(&self, level: Level, deadline: Instant) -> Confirmed {
        let option = match level {
            Level::ReadIndex => ReadPolicy::ReadIndex.into(),
            Level::Lease => LinearizerOption::new(Some(self.lease * LEASE_TENTHS / 10), true),
        };
        let trusted = match level {
            Level::ReadIndex => planted(Bug::ReadIndexUnconfirmed),
            Level::Lease => planted(Bug::LeaseNeverExpires),
        };
        if trusted && let Some(at) = committed_as_leader(&self.raft) {
            return Ok(at);
        }
        let slept = self.sleeper.touch();
        let (raft, witnesses) = (self.raft.clone(), Arc::clone(&self.witnesses));
        let round = move || {
            let (raft, witnesses, option) = (raft.clone(), Arc::clone(&witnesses), option.clone());
            async move {
                if level == Level::ReadIndex
                    && let Some(at) = witnesses.confirm().await
                {
                    return Ok(at);
                }
                confirm_once(&raft, option).await
            }
        };
        let confirmed = outcome(self.batches.own[level as usize].join(round), deadline).await;
        if slept {
            self.sleeper.confirmed();
        }
        confirmed
    }

    /// Asks whoever leads when the round begins.
    async fn ask(&self, level: Level, deadline: Instant) -> Confirmed {
        let (group, me) = (self.group, self.me);
        // The leader answers within its lease, or says that it cannot.
        let (endpoint, leadership, ask_deadline) =
            (Arc::clone(&self.endpoint), self.leadership.clone(), self.lease * 2);
        let round = move || {
            let leader = leadership.borrow().leader;
            let answer = leader.map(|leader| {
                let address = Address { group, from: me.id, to: leader.id };
                let body = wire::read_index(address, level == Level::Lease);
                endpoint.call(leader.node, Kind::ReadIndex, body, ask_deadline)
            });
            async move {
                match answer {
                    Some(answer) => confirmed_by(answer.await),
                    None => Err(BarrierError::NoLeader { hint: None }),
                }
            }
        };
        outcome(self.batches.others[level as usize].join(round), deadline).await
    }
}

/// What is committed, as whoever believes that it leads knows.
fn committed_as_leader(raft: &Raft) -> Option<LogId> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow();
    metrics.local_committed.filter(|_| metrics.state == ServerState::Leader)
}

async fn confirm_once(raft: &Raft, option: LinearizerOption) -> Confirmed {
    match raft.get_read_linearizer(option).await {
        Ok(linearizer) => Ok(*linearizer.read_log_id().log_id()),
        Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => Err(BarrierError::NoLeader {
            hint: to.leader_id.zip(to.leader_node).map(|(id, node): (u64, NodeId)| Replica { id: ReplicaId(id), node }),
        }),
        Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => Err(BarrierError::NoQuorum),
        Err(RaftError::Fatal(_)) => Err(BarrierError::Stopped),
    }
}

fn confirmed_by(answer: Result<bytes::Bytes, CallError>) -> Confirmed {
    let no_leader = Err(BarrierError::NoLeader { hint: None });
    let read = |body| -> Result<Confirmed, Damaged> {
        Ok(match wire::status(body)? {
            (Status::Ok, reader) => Ok(wire::read_confirmed(reader)?),
            (Status::NotLeader | Status::Unknown, _) => no_leader,
            (Status::Failed, _) => Err(BarrierError::NoQuorum),
            (Status::Busy | Status::Gap, _) => Err(BarrierError::Overloaded),
        })
    };
    match answer {
        Ok(body) => read(body).unwrap_or_else(|damaged| {
            tracing::warn!(%damaged, "read index");
            no_leader
        }),
        Err(CallError::Timeout) => Err(BarrierError::Timeout),
        Err(_) => no_leader,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::log_id;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_shares_the_next_round_and_never_the_current_one() {
        let batch = Arc::new(Batch::default());
        let rounds = Arc::new(AtomicU64::new(0));
        let join = || {
            let rounds = Arc::clone(&rounds);
            batch.join(move || {
                let round = rounds.fetch_add(1, Ordering::Relaxed);
                async move {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    Ok(log_id(1, 1, round))
                }
            })
        };
        let first = join().unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(rounds.load(Ordering::Relaxed), 1, "the first round is under way");
        let later: Vec<_> = (0..5).map(|_| join().unwrap()).collect();
        assert_eq!(first.await.unwrap().unwrap().index, 0);
        for joined in later {
            assert_eq!(joined.await.unwrap().unwrap().index, 1);
        }
        assert_eq!(rounds.load(Ordering::Relaxed), 2, "the newcomers shared one round");
        assert_eq!(join().unwrap().await.unwrap().unwrap().index, 2);
    }
}
