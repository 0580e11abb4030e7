//! One partition on this node: its replica, the queue of writes that wait to be proposed, and its reads.
//!
//! Client writes that wait together are proposed together, as one Raft entry; each gets its own answer. What a write
//! means is decided by `kv` in log order; this file only stamps, batches and tells the truth about outcomes.
//!
//! Invariants:
//! * a write that was handed to Raft is answered "not applied" only on Raft's own word;
//! * at most [`ENTRIES_IN_FLIGHT_MAX`] entries of a partition are in flight, at most [`QUEUE_MAX`] writes wait.

use super::{hlc::Hlc, liveness::Liveness, machines::PartitionMachine, observed::Counters};
use crate::{
    env::{self, Clock},
    error::{Error, Outcome, Reason},
    key::PartitionId,
    kv,
    raft::{Group, LogPosition, WriteError},
    telemetry,
};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

/// Writes that may wait to be proposed, per partition.
pub const QUEUE_MAX: usize = 8192;
/// Entries of a partition that may be in flight at once.
pub const ENTRIES_IN_FLIGHT_MAX: usize = 4;
/// Writes in one entry.
pub const ENTRY_WRITES_MAX: usize = 1024;
/// Bytes of keys and values in one entry; a single larger write goes alone.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// How often a waiting entry looks whether its group has lost its quorum.
const QUORUM_CHECK: Duration = Duration::from_millis(200);

/// A write that was applied, or refused in the log.
#[derive(Debug)]
pub struct Written {
    /// Its place in the log.
    pub at: LogPosition,
    /// What `kv` answered.
    pub reply: kv::Reply,
}

struct Proposal {
    write: kv::Write,
    deadline: Instant,
    answer: oneshot::Sender<Result<Written, Error>>,
}

/// One partition on this node.
pub struct Partition {
    /// Its id.
    pub id: PartitionId,
    /// Maps below this version may not know it: it was split off here before the map said so.
    pub(super) known_from: u64,
    group: Group<PartitionMachine>,
    proposals: mpsc::Sender<Proposal>,
    counters: Counters,
}

/// What a partition needs from its node.
#[derive(Clone)]
pub struct PartitionContext {
    /// Stamps writes.
    pub hlc: Arc<Hlc>,
    /// Reads the wall time for stamps.
    pub clock: Arc<dyn Clock>,
    /// Knows who is in contact.
    pub liveness: Liveness,
}

impl Partition {
    /// Starts serving an opened group; `known_from` is the version of the map from which on it is named.
    #[must_use]
    pub fn start(
        id: PartitionId,
        known_from: u64,
        group: Group<PartitionMachine>,
        context: PartitionContext,
    ) -> Arc<Self> {
        let (proposals, waiting) = mpsc::channel(QUEUE_MAX);
        let proposer = Proposer { id, group: group.clone(), context };
        env::spawn(proposer.run(waiting));
        Arc::new(Self { id, known_from, group, proposals, counters: Counters::default() })
    }

    /// Its replica.
    #[must_use]
    pub const fn group(&self) -> &Group<PartitionMachine> {
        &self.group
    }

    /// Counts what it is asked here.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Proposes a write and waits for its place in the log.
    ///
    /// # Errors
    /// With the outcome: `not applied` when the write was refused before it was proposed, else `unknown`.
    pub async fn write(&self, write: kv::Write, deadline: Instant) -> Result<Written, Error> {
        self.counters.write(write.op.first_key(), write.bytes_max() as u64);
        let (answer, answered) = oneshot::channel();
        self.proposals.try_send(Proposal { write, deadline, answer }).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => {
                metrics::counter!(telemetry::ADMISSION_REJECTED_TOTAL, "budget" => "partition_queue").increment(1);
                let message = format!("{QUEUE_MAX} writes wait for partition {} already; slow down", self.id);
                Error::new(Reason::Overloaded, message).outcome(Outcome::NotApplied)
            }
            mpsc::error::TrySendError::Closed(_) => stopping(self.id).outcome(Outcome::NotApplied),
        })?;
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_dropped)) => Err(stopping(self.id).outcome(Outcome::Unknown)),
            Err(_late) => Err(Error::new(
                Reason::OutcomeUnknown,
                format!(
                    "partition {} gave no answer before the deadline; retry with the same session and sequence",
                    self.id
                ),
            )
            .outcome(Outcome::Unknown)),
        }
    }
}

fn stopping(id: PartitionId) -> Error {
    Error::new(Reason::Stopping, format!("the replica of partition {id} on this node is stopping; ask another node"))
}

/// The task that turns waiting writes into entries.
struct Proposer {
    id: PartitionId,
    group: Group<PartitionMachine>,
    context: PartitionContext,
}

impl Proposer {
    async fn run(self, mut waiting: mpsc::Receiver<Proposal>) {
        let mut in_flight = FuturesUnordered::new();
        let mut batch = Vec::new();
        loop {
            let room = in_flight.len() < ENTRIES_IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                Some(()) = in_flight.next(), if !in_flight.is_empty() => {}
                received = waiting.recv_many(&mut batch, ENTRY_WRITES_MAX), if room => {
                    if received == 0 {
                        return;
                    }
                    for entry in cut(std::mem::take(&mut batch)) {
                        in_flight.push(self.propose(entry));
                    }
                }
            }
        }
    }

    /// Proposes one entry and answers each of its writes.
    async fn propose(&self, entry: Vec<Proposal>) {
        let now = Instant::now();
        let (live, late): (Vec<_>, Vec<_>) = entry.into_iter().partition(|proposal| proposal.deadline > now);
        for proposal in late {
            let message = "the deadline passed while the write waited; it was not proposed";
            answer(proposal.answer, Err(Error::new(Reason::DeadlineExceeded, message).outcome(Outcome::NotApplied)));
        }
        let Some(deadline) = live.iter().map(|proposal| proposal.deadline).max() else { return };
        let (writes, answers): (Vec<_>, Vec<_>) = live.into_iter().map(|p| (p.write, p.answer)).unzip();
        metrics::histogram!(telemetry::WRITE_BATCH_ITEMS).record(writes.len() as f64);
        let command = kv::Command { stamp: self.context.hlc.stamp(self.context.clock.wall_ms()), writes };
        match self.decide(command.encode(), deadline).await {
            Ok((at, replies)) => {
                metrics::histogram!(telemetry::RAFT_PROPOSE_TO_APPLY_SECONDS).record(now.elapsed().as_secs_f64());
                assert_eq!(replies.len(), answers.len(), "kv answers every write of a command");
                for (to, reply) in answers.into_iter().zip(replies) {
                    answer(to, Ok(Written { at, reply }));
                }
            }
            Err(error) => {
                for to in answers {
                    answer(to, Err(error.clone()));
                }
            }
        }
    }

    /// Waits for the entry, but not for a quorum that is not there.
    async fn decide(&self, command: bytes::Bytes, deadline: Instant) -> Result<(LogPosition, Vec<kv::Reply>), Error> {
        let mut write = std::pin::pin!(self.group.write(command, deadline));
        loop {
            match tokio::time::timeout(QUORUM_CHECK, &mut write).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) => return Err(self.explain(&error)),
                Err(_waiting) => {
                    let members = self.group.status().voters;
                    if self.context.liveness.quorum_lost(&members) {
                        return Err(self.context.liveness.no_leader(self.id, &members, Some(Outcome::Unknown)));
                    }
                }
            }
        }
    }

    fn explain(&self, error: &WriteError) -> Error {
        super::explain_write(self.id, error, &self.group.status(), &self.context.liveness)
    }
}

/// The caller may have given up: then nobody wants the answer.
fn answer(to: oneshot::Sender<Result<Written, Error>>, result: Result<Written, Error>) {
    let _given_up = to.send(result);
}

/// Cuts waiting writes into entries of bounded size.
fn cut(waiting: Vec<Proposal>) -> Vec<Vec<Proposal>> {
    let mut entries = Vec::with_capacity(1);
    let (mut entry, mut bytes) = (Vec::new(), 0);
    for proposal in waiting {
        let size = proposal.write.bytes_max();
        if bytes + size > ENTRY_BYTES_MAX && !entry.is_empty() {
            entries.push(std::mem::take(&mut entry));
            bytes = 0;
        }
        bytes += size;
        entry.push(proposal);
    }
    if !entry.is_empty() {
        entries.push(entry);
    }
    entries
}
