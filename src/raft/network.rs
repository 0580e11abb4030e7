//! What a replica asks of the other replicas of its group, over the node's [`Endpoint`].
//!
//! Invariants:
//! * every wait has a deadline;
//! * append requests of one session leave in order, and the session ends with the first that is not an unqualified
//!   success: what was sent after it says nothing;
//! * a replica that is not where it should be counts as unreachable, so that openraft backs off;
//! * a leader that no quorum answers sends nothing during its silent turns (`super::quiet`).

use super::{
    pace::Pace,
    quiet::Quiet,
    snapshots::{CHUNK_BYTES, Content, Snapshot, Vault},
    types::{Entry, LogId, Types, Vote},
    wire::{self, Address, Piece, Status, Turn},
};
use crate::{
    key::{NodeId, PartitionId, ReplicaId},
    plant::{Bug, planted},
    transport::{
        Kind,
        endpoint::{CallError, Endpoint},
    },
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use openraft::{
    OptionalSend, RPCTypes, RaftNetworkFactory, RaftNetworkV2,
    base::{BoxFuture, BoxStream},
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
        VoteRequest, VoteResponse,
    },
};
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

/// Append requests of one session that may wait for an answer; each carries up to
/// [`super::storage::APPEND_BYTES`].
const APPEND_WINDOW: usize = 16;

/// A piece of a snapshot that is not answered for this long is sent again.
const PIECE_DEADLINE: Duration = Duration::from_secs(2);

/// After so many pieces in a row without an answer, the transfer is given up.
const PIECE_TRIES: u32 = 3;

/// How long storing and installing a snapshot may take after its last piece has come.
const INSTALL_DEADLINE: Duration = Duration::from_secs(60);

/// How often the sender asks whether it is done.
const INSTALL_POLL: Duration = Duration::from_millis(200);

/// How long a commit may wait for entries to go with to the others, which apply what is committed only then.
const COMMIT_NOTICE_DELAY: Duration = Duration::from_millis(1);

/// Bytes of one piece of a snapshot.
const PIECE_BYTES: usize = 4 * CHUNK_BYTES;

/// What all connections of one replica share.
#[derive(Clone)]
pub(super) struct Network {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) group: PartitionId,
    pub(super) me: ReplicaId,
    pub(super) vault: Arc<Vault>,
    /// Numbers sessions and transfers, from a random number on, so that those of an earlier life match nothing.
    pub(super) numbers: Arc<AtomicU64>,
    /// Of the snapshots that the node sends.
    pub(super) pace: Arc<Pace>,
    /// How long an append request may take.
    pub(super) append_deadline: Duration,
    /// When append requests wait.
    pub(super) quiet: Quiet,
}

/// The way to one other replica. Cheap: openraft makes one per election and voter.
pub(super) struct Link {
    network: Network,
    to: ReplicaId,
    node: NodeId,
    heartbeat: bool,
    since: Instant,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &NodeId) -> Link {
        Link { network: self.clone(), to: ReplicaId(target), node: *node, heartbeat: false, since: Instant::now() }
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &NodeId) -> Link {
        Link { heartbeat: true, ..self.new_client(target, node).await }
    }
}

impl Network {
    fn next_number(&self) -> u64 {
        // 0 means "stands alone".
        self.numbers.fetch_add(1, Ordering::Relaxed).max(1)
    }
}

impl Link {
    fn address(&self) -> Address {
        Address { group: self.network.group, from: self.network.me, to: self.to }
    }

    /// Asks at once; the future waits for the answer.
    fn ask(
        &self,
        kind: Kind,
        body: Bytes,
        deadline: Duration,
    ) -> impl Future<Output = Result<super::codec::Reader, RPCError<Types>>> + Send + use<> {
        let (id, target) = (self.network.me.0, self.to.0);
        let answer = self.network.endpoint.call(self.node, kind, body, deadline);
        async move {
            let body = answer.await.map_err(|error| match error {
                CallError::Timeout => {
                    RPCError::Timeout(Timeout { action: action(kind), id, target, timeout: deadline })
                }
                error => RPCError::Unreachable(Unreachable::new(&error)),
            })?;
            match wire::status(body).map_err(|damaged| NetworkError::new(&damaged))? {
                (Status::Ok, reader) => Ok(reader),
                (Status::Gap, _) => Err(NetworkError::from_string("a request before this one was lost").into()),
                (status, _) => Err(Unreachable::from_string(format!("{status:?}")).into()),
            }
        }
    }

    fn ask_append(
        &self,
        turn: Turn,
        request: &AppendEntriesRequest<Types>,
    ) -> impl Future<Output = Result<AppendEntriesResponse<Types>, RPCError<Types>>> + Send + use<> {
        let answer = (!self.network.quiet.is_due(self.since)).then(|| {
            let body = wire::append(self.address(), turn, request);
            self.ask(Kind::RaftAppend, body, self.network.append_deadline)
        });
        async move {
            let Some(answer) = answer else {
                return Err(Unreachable::from_string("no quorum answers; keeping quiet for the others to elect").into());
            };
            wire::read_appended(answer.await?).map_err(|damaged| NetworkError::new(&damaged).into())
        }
    }

    async fn ask_vote(
        &self,
        kind: Kind,
        request: &VoteRequest<Types>,
        option: &RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let answer = self.ask(kind, wire::vote(self.address(), request), option.hard_ttl());
        wire::read_voted(answer.await?).map_err(|damaged| NetworkError::new(&damaged).into())
    }

    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let Content::Stored(handle) = snapshot.snapshot else {
            return Err(NetworkError::from_string("a received snapshot is not sent on").into());
        };
        let transfer = self.network.next_number();
        let mut offset = 0;
        loop {
            let content = self
                .network
                .vault
                .read(&handle, offset, PIECE_BYTES)
                .await
                .map_err(|error| NetworkError::new(&error))?;
            self.network.pace.take(content.len()).await;
            let end = offset + content.len() as u64;
            let last = end >= handle.len || content.is_empty();
            let piece = Piece { transfer, offset, last, vote, meta: snapshot.meta.clone(), content };
            match self.send_piece(&piece).await? {
                Some(vote) => return Ok(SnapshotResponse::new(vote)),
                None if last => return self.wait_installed(piece).await,
                None => offset = end,
            }
        }
    }

    /// Sends a piece until it is answered. A frame that was lost costs its deadline, not the transfer.
    async fn send_piece(&self, piece: &Piece) -> Result<Option<Vote>, RPCError<Types>> {
        let body = wire::piece(self.address(), piece);
        let mut tries = 1;
        let reader = loop {
            match self.ask(Kind::RaftSnapshot, body.clone(), PIECE_DEADLINE).await {
                Err(RPCError::Timeout(_)) if tries < PIECE_TRIES => tries += 1,
                answered => break answered?,
            }
        };
        wire::read_received(reader).map_err(|damaged| NetworkError::new(&damaged).into())
    }

    /// The last piece has come and its answer takes long: asks for it, by the same piece without its content.
    async fn wait_installed(&self, last: Piece) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let until = Instant::now() + INSTALL_DEADLINE;
        let again = Piece { content: Bytes::new(), ..last };
        while Instant::now() < until {
            tokio::time::sleep(INSTALL_POLL).await;
            if let Some(vote) = self.send_piece(&again).await? {
                return Ok(SnapshotResponse::new(vote));
            }
        }
        Err(NetworkError::from_string("the snapshot was not installed in time").into())
    }
}

fn action(kind: Kind) -> RPCTypes {
    match kind {
        Kind::RaftVote | Kind::RaftPreVote => RPCTypes::Vote,
        Kind::RaftSnapshot => RPCTypes::InstallSnapshot,
        Kind::RaftTransfer => RPCTypes::TransferLeader,
        _ => RPCTypes::AppendEntries,
    }
}

/// What openraft wants to hear of an append request, and whether its session goes on.
fn judge(
    response: AppendEntriesResponse<Types>,
    prev: Option<LogId>,
    last: Option<LogId>,
) -> (Result<StreamAppendResult<Types>, RPCError<Types>>, bool) {
    let goes_on = match &response {
        AppendEntriesResponse::Success => true,
        AppendEntriesResponse::PartialSuccess(upto) => *upto == last,
        AppendEntriesResponse::Conflict if prev.is_none() => {
            let why = "the replica reports a conflict with the beginning of the log";
            return (Err(NetworkError::from_string(why).into()), false);
        }
        AppendEntriesResponse::Conflict | AppendEntriesResponse::HigherVote(_) => false,
    };
    (Ok(response.into_stream_result(prev, last)), goes_on)
}

/// Lets requests that only tell of a commit wait for the next entries, which tell of it as well: under load that halves
/// the messages. One that went with another has no answer of its own; openraft counts positions, not answers.
fn with_company<S>(input: S) -> impl Stream<Item = AppendEntriesRequest<Types>>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
{
    stream::unfold(input.fuse(), |mut input| async move {
        let mut request = input.next().await?;
        let alone_at = Instant::now() + COMMIT_NOTICE_DELAY;
        while request.entries.is_empty()
            && let Ok(Some(next)) = timeout_at(alone_at, input.next()).await
        {
            request = next;
        }
        Some((request, input))
    })
}

impl RaftNetworkV2<Types> for Link {
    type SnapshotData = Content;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.ask_append(Turn { session: 0, number: 0 }, &request).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let session = if self.heartbeat { 0 } else { self.network.next_number() };
        let link: &'s Self = self;
        let mut number = 0;
        let asked = with_company(input).map(move |request| {
            let turn = Turn { session, number };
            number += 1;
            let (prev, last) = (request.prev_log_id, request.entries.last().map(|entry: &Entry| entry.log_id));
            // Leaves here, in order; only the answer is waited for later.
            let answer = link.ask_append(turn, &request);
            async move {
                match answer.await {
                    Ok(response) => judge(response, prev, last.or(prev)),
                    Err(RPCError::Timeout(_)) if planted(Bug::TimeoutCountsAsAck) => {
                        judge(AppendEntriesResponse::Success, prev, last.or(prev))
                    }
                    Err(error) => (Err(error), false),
                }
            }
        });
        let answers = Box::pin(asked.buffered(APPEND_WINDOW));
        let until_failure = stream::unfold((answers, true), |(mut answers, goes_on)| async move {
            if !goes_on {
                return None;
            }
            let (result, goes_on) = answers.next().await?;
            Some((result, (answers, goes_on)))
        });
        Box::pin(async move { Ok(Box::pin(until_failure) as BoxStream<'s, _>) })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask_vote(Kind::RaftVote, &request, &option).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask_vote(Kind::RaftPreVote, &request, &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        tokio::select! {
            biased;
            closed = cancel => Err(closed.into()),
            sent = self.send_snapshot(vote, snapshot) => sent,
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<openraft::raft::TransferLeaderResponse<Types>, RPCError<Types>> {
        let body = wire::transfer(self.address(), &request);
        self.ask(Kind::RaftTransfer, body, option.hard_ttl()).await?;
        Ok(Ok(()))
    }
}
