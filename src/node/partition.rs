//! One partition on this node: its replica, the queue of writes that wait to be proposed, and its reads.
//!
//! Client writes that wait together are proposed together, as one Raft entry; each gets its own answer. What a write
//! means is decided by `kv` in log order; this file only stamps, batches and tells the truth about outcomes.
//!
//! Writes that came together wait together, as one proposal with one answer: what it costs to hand over, to wait and to
//! be woken is shared.
//!
//! Invariants:
//! * a write that was handed to Raft is answered "not applied" only on Raft's own word;
//! * at most [`ENTRIES_IN_FLIGHT_MAX`] entries of a partition are in flight, at most [`QUEUE_MAX`] writes wait.

use super::{
    admission::{Admission, Entrance, Ticket},
    hlc::Hlc,
    liveness::Liveness,
    machines::PartitionMachine,
    observed::Counters,
};
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
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};

/// Writes that may wait to be proposed, per partition.
pub const QUEUE_MAX: usize = 16_384;
/// Entries of a partition that may be in flight at once.
pub const ENTRIES_IN_FLIGHT_MAX: usize = 4;
/// Writes in one entry.
pub const ENTRY_WRITES_MAX: usize = 1024;
/// Bytes of keys and values in one entry; a single larger write goes alone.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Writes go out beside those that are under way if they are at least one to so many of them.
const UNDER_WAY_PER_WRITE_MAX: usize = 4;
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

/// What became of the writes of a proposal: one reply for each.
type Decided = Result<(LogPosition, Vec<kv::Reply>), Error>;

/// Writes that go into one entry, perhaps with others.
struct Proposal {
    writes: Vec<kv::Write>,
    bytes: usize,
    deadline: Instant,
    answer: Waiter,
    /// Its place among those that wait.
    place: OwnedSemaphorePermit,
}

/// Who waits for an answer, and the ticket by which the writes were let in.
struct Waiter {
    to: oneshot::Sender<Decided>,
    _ticket: Arc<Ticket>,
}

/// One partition on this node.
pub struct Partition {
    /// Its id.
    pub id: PartitionId,
    /// Maps below this version may not know it: it was split off here before the map said so.
    pub(super) known_from: u64,
    group: Group<PartitionMachine>,
    proposals: mpsc::Sender<Proposal>,
    places: Arc<Semaphore>,
    entrance: Entrance,
    liveness: Liveness,
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
    /// What the node lets in.
    pub admission: Arc<Admission>,
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
        let (entrance, liveness) = (context.admission.entrance(id), context.liveness.clone());
        let proposer = Proposer { id, group: group.clone(), context };
        env::spawn(proposer.run(waiting));
        let places = Arc::new(Semaphore::new(QUEUE_MAX));
        let counters = Counters::default();
        Arc::new(Self { id, known_from, group, proposals, places, entrance, liveness, counters })
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

    /// A ticket for writes that have to be answered by `deadline`.
    #[must_use]
    pub fn ticket(&self, deadline: Instant) -> Ticket {
        let members = || self.group.status().voters;
        self.entrance.ticket(deadline, self.liveness.full_among(members))
    }

    /// Proposes writes that were let in, each on its own though in few entries, and waits for their places in the log: one result for each,
    /// in order.
    ///
    /// An error tells the outcome: `not applied` when the write was refused before it was proposed, else `unknown`.
    pub async fn write_all(&self, writes: Vec<kv::Write>, ticket: Ticket) -> Vec<Result<Written, Error>> {
        let (deadline, ticket) = (ticket.deadline(), Arc::new(ticket));
        let mut results = Vec::with_capacity(writes.len());
        let mut parts = Vec::with_capacity(1);
        for (writes, bytes) in cut(writes) {
            parts.push((writes.len(), self.enqueue(writes, bytes, deadline, &ticket)));
        }
        for (count, waiting) in parts {
            let decided = match waiting {
                Ok(answered) => self.decided(answered, deadline).await,
                Err(error) => Err(error),
            };
            match decided {
                Ok((at, replies)) => results.extend(replies.into_iter().map(|reply| Ok(Written { at, reply }))),
                Err(error) => results.extend(std::iter::repeat_n(error, count).map(Err)),
            }
        }
        results
    }

    fn enqueue(
        &self,
        writes: Vec<kv::Write>,
        bytes: usize,
        deadline: Instant,
        ticket: &Arc<Ticket>,
    ) -> Result<oneshot::Receiver<Decided>, Error> {
        for write in &writes {
            self.counters.write(write.op.first_key(), write.bytes_max() as u64);
        }
        let full = || {
            metrics::counter!(telemetry::ADMISSION_REJECTED_TOTAL, "budget" => "partition_queue").increment(1);
            let message = format!("{QUEUE_MAX} writes wait for partition {} already; slow down", self.id);
            Error::new(Reason::Overloaded, message).outcome(Outcome::NotApplied)
        };
        let places = Arc::clone(&self.places).try_acquire_many_owned(writes.len() as u32);
        let place = places.map_err(|_| full())?;
        let (to, answered) = oneshot::channel();
        let answer = Waiter { to, _ticket: Arc::clone(ticket) };
        let proposal = Proposal { writes, bytes, deadline, answer, place };
        self.proposals.try_send(proposal).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => full(),
            mpsc::error::TrySendError::Closed(_) => stopping(self.id).outcome(Outcome::NotApplied),
        })?;
        Ok(answered)
    }

    async fn decided(&self, answered: oneshot::Receiver<Decided>, deadline: Instant) -> Decided {
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(Ok(decided)) => decided,
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
        // Writes in the entries in flight.
        let mut under_way = 0;
        loop {
            let room = in_flight.len() < ENTRIES_IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                Some(decided) = in_flight.next(), if !in_flight.is_empty() => under_way -= decided,
                received = waiting.recv_many(&mut batch, ENTRY_WRITES_MAX), if room && batch.len() < ENTRY_WRITES_MAX => {
                    if received == 0 {
                        return;
                    }
                }
            }
            if in_flight.len() < ENTRIES_IN_FLIGHT_MAX && is_worth_an_entry(writes_in(&batch), under_way) {
                for entry in gather(std::mem::take(&mut batch)) {
                    let count = writes_in(&entry);
                    under_way += count;
                    let proposed = self.propose(entry);
                    in_flight.push(async move {
                        proposed.await;
                        count
                    });
                }
            }
        }
    }

    /// Proposes one entry and answers each of its proposals.
    async fn propose(&self, entry: Vec<Proposal>) {
        let now = Instant::now();
        let (live, late): (Vec<_>, Vec<_>) = entry.into_iter().partition(|proposal| proposal.deadline > now);
        for proposal in late {
            let message = "the deadline passed while the write waited; it was not proposed";
            answer(proposal.answer, Err(Error::new(Reason::DeadlineExceeded, message).outcome(Outcome::NotApplied)));
        }
        let Some(deadline) = live.iter().map(|proposal| proposal.deadline).max() else { return };
        let mut writes = Vec::with_capacity(live.iter().map(|proposal| proposal.writes.len()).sum());
        let mut answers = Vec::with_capacity(live.len());
        for proposal in live {
            answers.push((proposal.writes.len(), proposal.answer));
            writes.extend(proposal.writes);
            drop(proposal.place);
        }
        metrics::histogram!(telemetry::WRITE_BATCH_ITEMS).record(writes.len() as f64);
        let command = kv::Command { stamp: self.context.hlc.stamp(self.context.clock.wall_ms()), writes };
        match self.decide(command.encode(), deadline).await {
            Ok((at, replies)) => {
                metrics::histogram!(telemetry::RAFT_PROPOSE_TO_APPLY_SECONDS).record(now.elapsed().as_secs_f64());
                let count: usize = answers.iter().map(|(count, _)| count).sum();
                assert_eq!(replies.len(), count, "kv answers every write of a command");
                let mut replies = replies.into_iter();
                for (count, to) in answers {
                    answer(to, Ok((at, replies.by_ref().take(count).collect())));
                }
            }
            Err(error) => {
                for (_, to) in answers {
                    answer(to, Err(error.clone()));
                }
            }
        }
    }

    /// Waits for the entry, but not for a quorum that is not there.
    async fn decide(&self, command: bytes::Bytes, deadline: Instant) -> Decided {
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
fn answer(waiter: Waiter, result: Decided) {
    let _given_up = waiter.to.send(result);
}

/// Cuts writes into what fits into an entry, with the bytes of each part; a single larger write goes alone.
fn cut(writes: Vec<kv::Write>) -> Vec<(Vec<kv::Write>, usize)> {
    let mut parts: Vec<(Vec<kv::Write>, usize)> = Vec::with_capacity(1);
    let room = writes.len();
    for write in writes {
        let size = write.bytes_max();
        match parts.last_mut().filter(|(part, bytes)| fits(part.len(), *bytes, 1, size)) {
            Some((part, bytes)) => {
                part.push(write);
                *bytes += size;
            }
            None => {
                let mut part = Vec::with_capacity(room.min(ENTRY_WRITES_MAX));
                part.push(write);
                parts.push((part, size));
            }
        }
    }
    parts
}

/// Gathers waiting proposals into entries.
fn gather(waiting: Vec<Proposal>) -> Vec<Vec<Proposal>> {
    let mut entries: Vec<Vec<Proposal>> = Vec::with_capacity(1);
    let (mut count, mut bytes) = (0, 0);
    for proposal in waiting {
        let more = proposal.writes.len();
        match entries.last_mut().filter(|_| fits(count, bytes, more, proposal.bytes)) {
            Some(entry) => {
                (count, bytes) = (count + more, bytes + proposal.bytes);
                entry.push(proposal);
            }
            None => {
                (count, bytes) = (more, proposal.bytes);
                entries.push(vec![proposal]);
            }
        }
    }
    entries
}

fn writes_in(proposals: &[Proposal]) -> usize {
    proposals.iter().map(|proposal| proposal.writes.len()).sum()
}

/// Whether so many writes go out while so many are under way. An entry costs about as much as a hundred writes: the first
/// few clients that hear of theirs and write again wait for the others, at most until something is decided.
const fn is_worth_an_entry(waiting: usize, under_way: usize) -> bool {
    waiting > 0 && waiting * UNDER_WAY_PER_WRITE_MAX >= under_way
}

/// Whether an entry has room for more.
const fn fits(count: usize, bytes: usize, more: usize, more_bytes: usize) -> bool {
    count + more <= ENTRY_WRITES_MAX && bytes + more_bytes <= ENTRY_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_writes_wait_while_many_are_under_way() {
        assert!(!is_worth_an_entry(0, 0), "an entry of nothing");
        assert!(is_worth_an_entry(1, 0), "nobody waits for nothing");
        assert!(is_worth_an_entry(1, 4) && !is_worth_an_entry(1, 5));
        assert!(is_worth_an_entry(50, 200) && !is_worth_an_entry(2, 250));
    }
}
