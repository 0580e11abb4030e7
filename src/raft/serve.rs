//! What a replica answers to the other replicas of its group.
//!
//! One task per replica takes questions in the order in which they arrived and begins each at once; answers are sent when
//! they are ready. Calls into openraft are therefore never cancelled, which openraft does not survive while it stops.
//!
//! Invariants:
//! * append requests of one session reach openraft in order and without a gap;
//! * a replica that had voted before it was opened neither votes nor promises to before its lease of then is over,
//!   except for a leader who hands over and has given up its lease itself;
//! * one snapshot is received at a time, and one that stalls is forgotten; a piece that comes again is not taken again.

use super::{
    barrier::{BarrierError, Barriers, Level},
    codec::{Damaged, Reader},
    machine::AnyCell,
    snapshots::{Incoming, Snapshot, Vault},
    types::{LogId, Raft, SnapshotMeta, Vote},
    wire::{self, Address, Piece, Status, Turn},
    witness,
};
use crate::{
    key::ReplicaId,
    transport::{Kind, endpoint::Reply},
};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use std::{collections::BTreeMap, future::Future, io, sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, mpsc},
    task::coop::{Unconstrained, unconstrained},
    time::Instant,
};

/// Questions that may wait to be begun.
pub(super) const QUEUE_QUESTIONS: usize = 4096;

/// Questions that may be under way.
const RUNNING_MAX: usize = 4096;

/// A transfer of a snapshot is forgotten when nothing came of it for this long.
pub(super) const TRANSFER_IDLE: Duration = Duration::from_secs(30);

/// How long the leader's confirmation may take for a question from elsewhere, which has a deadline of its own.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(5);

/// One question to a replica.
pub(super) struct Question {
    /// What is asked.
    pub kind: Kind,
    /// By whom.
    pub address: Address,
    /// The rest of the question.
    pub body: Reader,
    /// Where the answer goes.
    pub reply: Reply,
}

/// What it takes to answer.
pub(super) struct Server {
    pub(super) raft: Raft,
    pub(super) cell: Arc<dyn AnyCell>,
    pub(super) vault: Arc<Vault>,
    pub(super) barriers: Arc<Barriers>,
    /// No votes before, unless leadership is handed over.
    pub(super) votes_from: Instant,
    pub(super) incoming: Mutex<Option<Transfer>>,
}

/// The snapshot that is being received, or was received last.
pub(super) struct Transfer {
    from: ReplicaId,
    number: u64,
    /// When the latest piece came.
    at: Instant,
    stage: Stage,
}

enum Stage {
    Receiving(Incoming),
    Installing,
    /// With the vote that this replica answered.
    Installed(Vote),
}

/// Next request expected of the current session of each sender.
type Sessions = BTreeMap<ReplicaId, Turn>;

/// Whether `turn` comes right after the last one of its session, or begins one.
fn is_next(sessions: &mut Sessions, from: ReplicaId, turn: Turn) -> bool {
    if turn.session == 0 {
        return true;
    }
    let expected = sessions.get(&from).filter(|expected| expected.session == turn.session).map_or(0, |e| e.number);
    if turn.number != expected {
        return false;
    }
    sessions.insert(from, Turn { number: turn.number + 1, ..turn });
    true
}

/// Answers questions until the queue is closed, and those that were begun by then.
pub(super) async fn run(server: Arc<Server>, mut queue: mpsc::Receiver<Question>) {
    let mut running = Begun::default();
    let mut sessions = Sessions::new();
    loop {
        tokio::select! {
            biased;
            question = queue.recv(), if running.len() < RUNNING_MAX => {
                let Some(question) = question else { break };
                if let Some(question) = in_order(&mut sessions, question) {
                    running.begin(answer(Arc::clone(&server), question));
                }
            }
            Some(()) = running.0.next(), if running.len() > 0 => {}
        }
    }
    while running.0.next().await.is_some() {}
}

/// Futures of one task that reach their first wait in the order in which they were begun: that is the order in which
/// openraft gets the questions.
///
/// They are exempt from tokio's cooperative budget. A task that has used it up has its wake-ups deferred, and those come
/// in reverse: two appends would change places, and openraft takes the second, which comes first, for a follower that
/// has lost its log.
struct Begun<F>(FuturesUnordered<Unconstrained<F>>);

impl<F> Default for Begun<F> {
    fn default() -> Self {
        Self(FuturesUnordered::new())
    }
}

impl<F: Future> Begun<F> {
    fn begin(&self, future: F) {
        self.0.push(unconstrained(future));
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

fn in_order(sessions: &mut Sessions, mut question: Question) -> Option<Question> {
    if question.kind != Kind::RaftAppend {
        return Some(question);
    }
    let status = match wire::read_turn(&mut question.body) {
        Ok(turn) if is_next(sessions, question.address.from, turn) => return Some(question),
        Ok(_) => Status::Gap,
        Err(_) => Status::Failed,
    };
    question.reply.send(status.body());
    None
}

async fn answer(server: Arc<Server>, question: Question) {
    let Question { kind, address, body, reply } = question;
    if !matches!(kind, Kind::RaftPreVote | Kind::ReadIndex) {
        server.barriers.sleeper.wake();
    }
    let answered = match kind {
        Kind::RaftAppend => server.append(body, reply).await,
        Kind::RaftVote => server.vote(body, reply).await,
        Kind::RaftPreVote => server.pre_vote(body, reply).await,
        Kind::RaftTransfer => server.transfer(body, reply).await,
        Kind::RaftSnapshot => server.piece(address.from, body, reply).await,
        Kind::ReadIndex => server.read_index(body, reply).await,
        Kind::Confirm => server.confirm(body, reply).await,
        _ => Ok(()),
    };
    if let Err(damaged) = answered {
        tracing::warn!(group = %address.group, from = %address.from, ?kind, %damaged, "message refused");
    }
}

impl Server {
    async fn append(&self, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let request = wire::read_append(body)?;
        reply.send(match self.raft.append_entries(request).await {
            Ok(response) => wire::appended(&response),
            Err(_stopped) => Status::Failed.body(),
        });
        Ok(())
    }

    fn may_vote(&self, leadership_transfer: bool) -> bool {
        leadership_transfer || Instant::now() >= self.votes_from
    }

    async fn vote(&self, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let request = wire::read_vote(body)?;
        if self.may_vote(request.leadership_transfer) {
            reply.send(match self.raft.vote(request).await {
                Ok(response) => wire::voted(&response),
                Err(_stopped) => Status::Failed.body(),
            });
        }
        Ok(())
    }

    async fn pre_vote(&self, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let request = wire::read_vote(body)?;
        if self.may_vote(request.leadership_transfer) && !self.barriers.sleeper.keeps_leader() {
            reply.send(match self.raft.pre_vote(request).await {
                Ok(response) => wire::voted(&response),
                Err(_stopped) => Status::Failed.body(),
            });
        }
        Ok(())
    }

    async fn transfer(&self, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let request = wire::read_transfer(body)?;
        reply.send(match self.raft.handle_transfer_leader(request).await {
            Ok(Ok(())) => Status::Ok.body(),
            Ok(Err(_)) | Err(_) => Status::Failed.body(),
        });
        Ok(())
    }

    async fn read_index(&self, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let level = if wire::read_read_index(body)? { Level::Lease } else { Level::ReadIndex };
        reply.send(match self.barriers.confirm(level, Instant::now() + CONFIRM_DEADLINE).await {
            Ok(at) => wire::confirmed(&at),
            Err(BarrierError::Overloaded) => Status::Busy.body(),
            Err(BarrierError::NoQuorum | BarrierError::Timeout) => Status::Failed.body(),
            Err(BarrierError::NoLeader { .. } | BarrierError::Stopped) => Status::NotLeader.body(),
        });
        Ok(())
    }

    async fn confirm(&self, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let vote = wire::read_confirm(body)?;
        let status = if witness::follows(&self.raft, vote).await { Status::Ok } else { Status::NotLeader };
        reply.send(status.body());
        Ok(())
    }

    async fn piece(&self, from: ReplicaId, body: Reader, reply: Reply) -> Result<(), Damaged> {
        let piece = wire::read_piece(body)?;
        reply.send(match self.take_piece(from, piece).await {
            Ok(body) => body,
            Err(error) => {
                tracing::warn!(%from, %error, "snapshot refused");
                Status::Failed.body()
            }
        });
        Ok(())
    }

    /// Takes a piece, or says how far a transfer is when a piece of it comes again: its answer was lost, or is still to
    /// come.
    async fn take_piece(&self, from: ReplicaId, piece: Piece) -> io::Result<bytes::Bytes> {
        let mut incoming = self.incoming.lock().await;
        let number = piece.transfer;
        let known = incoming.as_mut().filter(|transfer| (transfer.from, transfer.number) == (from, number));
        match known.map(|transfer| &transfer.stage) {
            Some(Stage::Installing) => return Ok(wire::received(None)),
            Some(Stage::Installed(vote)) => return Ok(wire::received(Some(vote))),
            Some(Stage::Receiving(begun)) if begun.offset == piece.end() && begun.offset > piece.offset => {
                return Ok(wire::received(None));
            }
            Some(Stage::Receiving(begun)) if begun.offset == piece.offset => {}
            None if piece.offset == 0 => {
                let stage = Stage::Receiving(Incoming::begin(&*self.cell, &self.vault).await?);
                *incoming = Some(Transfer { from, number, at: Instant::now(), stage });
            }
            _ => return Ok(Status::Gap.body()),
        }
        let at = Instant::now();
        let Some(Transfer { stage: Stage::Receiving(mut begun), .. }) = incoming.take() else {
            return Ok(Status::Gap.body());
        };
        // If this fails, the transfer is over.
        begun.feed(piece.content).await?;
        if !piece.last {
            *incoming = Some(Transfer { from, number, at, stage: Stage::Receiving(begun) });
            return Ok(wire::received(None));
        }
        *incoming = Some(Transfer { from, number, at, stage: Stage::Installing });
        drop(incoming);
        let installed = self.install(piece.vote, piece.meta, begun).await;
        let mut incoming = self.incoming.lock().await;
        if incoming.as_ref().is_some_and(|transfer| (transfer.from, transfer.number) == (from, number)) {
            *incoming =
                installed.as_ref().ok().map(|vote| Transfer { from, number, at, stage: Stage::Installed(*vote) });
        }
        installed.map(|vote| wire::received(Some(&vote)))
    }

    async fn install(&self, vote: Vote, meta: SnapshotMeta, received: Incoming) -> io::Result<Vote> {
        let snapshot = Snapshot { meta, snapshot: received.finish()? };
        if self.holds(vote, snapshot.meta.last_log_id).await? {
            return Ok(vote);
        }
        let response = self.raft.install_full_snapshot(vote, snapshot).await.map_err(io::Error::other)?;
        Ok(response.vote)
    }

    /// Whether the log of this replica durably holds what a snapshot of `vote`'s leader ends with; if so, it is known to
    /// be committed from now on, and the snapshot has nothing to add.
    ///
    /// A leader that takes too long to hear of its appends sends a snapshot that ends before them. openraft would take it
    /// for a step back of the log, and asserts that there is none.
    async fn holds(&self, vote: Vote, upto: Option<LogId>) -> io::Result<bool> {
        let append = AppendEntriesRequest { vote, prev_log_id: upto, entries: Vec::new(), leader_commit: upto };
        let response = self.raft.append_entries(append).await.map_err(io::Error::other)?;
        Ok(matches!(response, AppendEntriesResponse::Success))
    }

    /// Forgets a transfer that has stalled.
    pub(super) fn forget_stalled(&self) {
        if let Ok(mut incoming) = self.incoming.try_lock() {
            let stalled = |transfer: &mut Transfer| {
                matches!(transfer.stage, Stage::Receiving(_)) && transfer.at.elapsed() > TRANSFER_IDLE
            };
            incoming.take_if(stalled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn questions_keep_their_order_in_a_task_that_has_used_up_its_turn() {
        let (to_raft, mut taken) = mpsc::channel(1_000);
        let serving = crate::env::spawn(async move {
            while tokio::task::coop::has_budget_remaining() {
                to_raft.send(0).await.unwrap();
            }
            let mut running = Begun::default();
            for number in 1..=9 {
                let to_raft = to_raft.clone();
                running.begin(async move { to_raft.send(number).await.unwrap() });
            }
            while running.0.next().await.is_some() {}
        });
        serving.await.unwrap();
        let mut order = Vec::new();
        while let Some(number) = taken.recv().await {
            order.extend((number > 0).then_some(number));
        }
        assert_eq!(order, (1..=9).collect::<Vec<_>>());
    }

    #[test]
    fn a_session_goes_on_in_order_or_not_at_all() {
        let mut sessions = Sessions::new();
        let mut next = |session, number| is_next(&mut sessions, ReplicaId(1), Turn { session, number });
        assert!(next(7, 0) && next(7, 1));
        assert!(!next(7, 3), "2 was lost");
        assert!(!next(7, 0), "nothing is taken twice");
        assert!(next(7, 2), "a late one would still be in order");
        assert!(!next(8, 1), "a session begins at its beginning");
        assert!(next(8, 0) && next(8, 1));
        assert!(!next(7, 3), "the session of before is over");
        assert!(next(0, 0) && next(0, 0), "what stands alone has no order");
    }
}
