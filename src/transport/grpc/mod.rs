//! Frames over gRPC: one client stream per direction, pair of nodes and lane, on a connection of its own.
//!
//! A stream sends whatever waits as one batch, so that one frame costs no message of its own under load. Connections
//! are made when the first frame wants to leave, and again, after a pause that grows, when one wants to leave later.
//! Snapshots have their own lane, so that they never delay a heartbeat.
//!
//! Invariants:
//! * the frames of a lane are never reordered, also not over reconnects: see [`FrameServer`];
//! * when a connection ends, everything that waited for it is dropped: nothing old is sent on a new connection;
//! * waiting frames are bounded in number and bytes, per lane; requests of clients and their answers leave half of it to
//!   Raft, so that they can neither fill a lane nor delay a vote by more than that.

mod serve;
#[cfg(test)]
mod tests;

pub use serve::{FrameServer, LANES_MAX};

use super::{Frame, Kind, Lost, PROTOCOL_VERSION, SendError, Transport};
use crate::{
    env,
    error::{Error, Reason},
    key::NodeId,
    proto::{self, HTTP2_FRAME_BYTES, internal},
};
use futures_util::stream;
use internal::internode_client::InternodeClient;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

/// Frames that may wait on one lane.
pub const QUEUE_FRAMES: usize = 1 << 14;

/// Bytes that may wait on one lane; a longer frame cannot be sent.
pub const QUEUE_BYTES: usize = 32 << 20;

/// Frames in one batch.
pub const BATCH_FRAMES: usize = 4096;

/// Bytes in one batch, unless one frame alone is longer.
pub const BATCH_BYTES: usize = 1 << 20;

/// Longest gRPC message between nodes: what [`QUEUE_BYTES`] lets through, and its framing.
pub const MESSAGE_BYTES_MAX: usize = QUEUE_BYTES + (1 << 20);

/// HTTP/2 flow control windows of streams and connections between nodes, for servers too.
pub const WINDOW_BYTES: u32 = 4 << 20;

/// A connection that answers no HTTP/2 ping for this long plus [`KEEPALIVE_TIMEOUT`] is given up.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// See [`KEEPALIVE_INTERVAL`].
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection that takes longer to make is given up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Shortest and longest pause after a lost connection.
pub const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Counted for a frame besides its body.
const FRAME_BYTES: usize = 32;

/// Who this process is, for hellos, and whom it tells that a stream has ended.
struct Identity {
    cluster_id: String,
    me: NodeId,
    /// Addresses that are connected to by way of others.
    dial: BTreeMap<String, String>,
    life: u64,
    streams: AtomicU64,
    lost: OnceLock<Lost>,
}

/// The lanes to one node.
struct Peer {
    /// For all frames but snapshots.
    usual: Arc<Lane>,
    /// For snapshots.
    bulk: Arc<Lane>,
}

impl Peer {
    fn new(to: NodeId) -> Self {
        let [usual, bulk] = [0, 1].map(|number| {
            Arc::new(Lane { to, number, state: Mutex::default(), filled: Notify::new(), changed: Notify::new() })
        });
        Self { usual, bulk }
    }

    fn lane(&self, kind: Kind) -> &Arc<Lane> {
        if kind.is_bulk() { &self.bulk } else { &self.usual }
    }
}

/// One stream to one node, whether it exists at the moment or not.
struct Lane {
    to: NodeId,
    number: u32,
    state: Mutex<LaneState>,
    filled: Notify,
    /// The epoch has changed under a running stream.
    changed: Notify,
}

#[derive(Default)]
struct LaneState {
    address: Option<String>,
    phase: Phase,
    /// Goes up when a stream is opened and when one must end: a stream takes frames only in its own epoch.
    epoch: u64,
    queue: VecDeque<Frame>,
    bytes: usize,
    /// Connections in a row that ended early.
    failures: u32,
    last_error: Option<Error>,
    /// The error last logged, so that a node that stays away is logged once.
    reported: Option<Error>,
}

#[derive(Default)]
enum Phase {
    /// There is no stream; the next frame opens one.
    #[default]
    Idle,
    /// There is a stream, or it is being opened.
    Open,
    /// The last stream failed; no new one before this.
    Down(Instant),
}

/// Sends frames over gRPC.
pub struct GrpcTransport {
    peers: RwLock<BTreeMap<NodeId, Arc<Peer>>>,
    /// Lanes to be opened, by a task in the scope of the transport: frames may be sent from any thread.
    opener: mpsc::UnboundedSender<(Arc<Lane>, u64)>,
    identity: Arc<Identity>,
}

impl GrpcTransport {
    /// The transport of node `me`, which connects to an address in `dial` by way of the one found there. Runs in the
    /// scope, and the runtime, of the caller.
    #[must_use]
    pub fn new(cluster_id: impl Into<String>, me: NodeId, dial: BTreeMap<String, String>) -> Arc<Self> {
        let identity = Arc::new(Identity {
            cluster_id: cluster_id.into(),
            me,
            dial,
            life: env::random_u64(),
            streams: AtomicU64::new(0),
            lost: OnceLock::new(),
        });
        let shared = Arc::clone(&identity);
        // Not bounded by its type; holds each lane at most once, since only a lane that is not open is sent.
        let (opener, mut opened) = mpsc::unbounded_channel::<(Arc<Lane>, u64)>();
        env::spawn(async move {
            while let Some((lane, epoch)) = opened.recv().await {
                env::spawn(run(lane, epoch, Arc::clone(&shared)));
            }
        });
        Arc::new(Self { peers: RwLock::default(), opener, identity })
    }

    /// Why the last stream to `node` ended, if the last one failed: unreachable, or refused by name.
    #[must_use]
    pub fn last_error(&self, node: NodeId) -> Option<Error> {
        let peer = self.peers.read().get(&node).cloned()?;
        let error = peer.usual.state.lock().last_error.clone();
        error.or_else(|| peer.bulk.state.lock().last_error.clone())
    }
}

impl Transport for GrpcTransport {
    fn send(&self, to: NodeId, frame: Frame) -> Result<(), SendError> {
        let peers = self.peers.read();
        let lane = peers.get(&to).ok_or(SendError::NotConnected)?.lane(frame.kind);
        if let Some(epoch) = lane.push(frame)? {
            let opening = self.opener.send((Arc::clone(lane), epoch));
            return opening.map_err(|_| SendError::NotConnected);
        }
        Ok(())
    }

    fn set_addresses(&self, addresses: &[(NodeId, String)]) {
        let mut peers = self.peers.write();
        for (node, address) in addresses {
            let peer = peers.entry(*node).or_insert_with(|| Arc::new(Peer::new(*node)));
            for lane in [&peer.usual, &peer.bulk] {
                lane.set_address(Some(address));
            }
        }
    }

    fn on_lost(&self, lost: Lost) {
        // One endpoint, once.
        let _already_set = self.identity.lost.set(lost);
    }
}

impl Drop for GrpcTransport {
    fn drop(&mut self) {
        for peer in self.peers.write().values() {
            for lane in [&peer.usual, &peer.bulk] {
                lane.set_address(None);
            }
        }
    }
}

impl std::fmt::Debug for GrpcTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.peers.read().keys()).finish()
    }
}

impl Lane {
    /// Queues a frame. Returns the epoch of the stream that must be opened for it, if one must.
    fn push(&self, frame: Frame) -> Result<Option<u64>, SendError> {
        let mut state = self.state.lock();
        let open = match state.phase {
            Phase::Open => true,
            Phase::Down(until) if Instant::now() < until => return Err(SendError::NotConnected),
            _ if state.address.is_none() => return Err(SendError::NotConnected),
            Phase::Idle | Phase::Down(_) => false,
        };
        let bytes = state.bytes + frame.body.len() + FRAME_BYTES;
        let share = if frame.kind.is_clients() { 2 } else { 1 };
        if state.queue.len() >= QUEUE_FRAMES / share || bytes > QUEUE_BYTES / share {
            return Err(SendError::QueueFull);
        }
        state.bytes = bytes;
        state.queue.push_back(frame);
        if open {
            drop(state);
            self.filled.notify_one();
            return Ok(None);
        }
        state.phase = Phase::Open;
        state.epoch += 1;
        Ok(Some(state.epoch))
    }

    fn set_address(&self, address: Option<&String>) {
        let mut state = self.state.lock();
        if state.address.as_ref() == address {
            return;
        }
        state.address = address.cloned();
        state.epoch += 1;
        state.failures = 0;
        if let Phase::Down(_) = state.phase {
            state.phase = Phase::Idle;
        }
        drop(state);
        self.changed.notify_one();
        self.filled.notify_one();
    }

    /// What waits, up to a batch; `None` when the epoch is over.
    async fn take(&self, epoch: u64) -> Option<internal::FrameBatch> {
        loop {
            if let Some(batch) = self.try_take(epoch)? {
                return Some(batch);
            }
            self.filled.notified().await;
        }
    }

    fn try_take(&self, epoch: u64) -> Option<Option<internal::FrameBatch>> {
        let mut state = self.state.lock();
        if state.epoch != epoch {
            return None;
        }
        let (mut frames, mut bytes) = (Vec::new(), 0);
        while let Some(frame) = state.queue.front() {
            let more = bytes + frame.body.len() + FRAME_BYTES;
            if !frames.is_empty() && (more > BATCH_BYTES || frames.len() >= BATCH_FRAMES) {
                break;
            }
            bytes = more;
            frames.extend(state.queue.pop_front().map(frame_to_pb));
        }
        state.bytes -= bytes;
        Some((!frames.is_empty()).then_some(internal::FrameBatch { hello: None, frames }))
    }

    /// Returns when the epoch is over.
    async fn superseded(&self, epoch: u64) {
        while self.state.lock().epoch == epoch {
            self.changed.notified().await;
        }
    }

    /// A stream has ended: drops what waited for it and sets the pause. Returns the calls that had not left.
    fn closed(&self, epoch: u64, lived: Duration, outcome: Result<(), Error>) -> Vec<u64> {
        let mut state = self.state.lock();
        let unsent = state.queue.drain(..).filter(|frame| !frame.reply && frame.call != 0).map(|frame| frame.call);
        let unsent = unsent.collect();
        state.bytes = 0;
        if state.epoch != epoch {
            state.phase = Phase::Idle; // Its address has changed: nothing is wrong with the new one yet.
            return unsent;
        }
        let early = lived < BACKOFF.1;
        state.failures = if early { state.failures.saturating_add(1) } else { 1 };
        state.phase = Phase::Down(Instant::now() + backoff(state.failures));
        let error = outcome.err();
        if !early {
            state.reported = None;
        }
        if let Some(error) = error.as_ref().filter(|error| state.reported.as_ref() != Some(error)) {
            let address = state.address.as_deref().unwrap_or_default();
            tracing::warn!(to = %self.to, address, lane = self.number, %error, "no connection to a node");
            state.reported = Some(error.clone());
        }
        state.last_error = error;
        unsent
    }
}

/// The pause after this many failures in a row: doubles, with a random part so that nodes do not return all at once.
fn backoff(failures: u32) -> Duration {
    let whole = BACKOFF.0.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF.1);
    let half = whole / 2;
    half + half.mul_f64(env::random_u64() as f64 / u64::MAX as f64)
}

/// Runs one stream from its opening to its end.
async fn run(lane: Arc<Lane>, epoch: u64, identity: Arc<Identity>) {
    let start = Instant::now();
    let outcome = tokio::select! {
        biased;
        () = lane.superseded(epoch) => Ok(()),
        outcome = stream_frames(&lane, epoch, &identity) => outcome,
    };
    let unsent = lane.closed(epoch, start.elapsed(), outcome);
    if let Some(lost) = identity.lost.get() {
        lost(lane.to, if lane.number == 1 { Kind::is_bulk } else { |kind| !kind.is_bulk() }, &unsent);
    }
}

async fn stream_frames(lane: &Arc<Lane>, epoch: u64, identity: &Identity) -> Result<(), Error> {
    let address = lane.state.lock().address.clone().unwrap_or_default();
    let unreachable = |error| Error::new(Reason::Unreachable, format!("{address}: {error:?}"));
    let via = identity.dial.get(&address).unwrap_or(&address);
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{via}"))
        .map_err(unreachable)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect()
        .await
        .map_err(unreachable)?;
    lane.state.lock().last_error = None;
    let hello = internal::Hello {
        protocol_version: PROTOCOL_VERSION,
        cluster_id: identity.cluster_id.clone(),
        from: identity.me.0,
        to: lane.to.0,
        life: identity.life,
        stream: identity.streams.fetch_add(1, Ordering::Relaxed) + 1,
        lane: lane.number,
    };
    let first = internal::FrameBatch { hello: Some(hello), frames: Vec::new() };
    let source = Arc::clone(lane);
    let batches = stream::unfold(Some(first), move |first| {
        let lane = Arc::clone(&source);
        async move {
            match first {
                Some(first) => Some((first, None)),
                None => lane.take(epoch).await.map(|batch| (batch, None)),
            }
        }
    });
    let mut client = InternodeClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX);
    match client.frames(batches).await {
        Ok(_end) => Ok(()),
        Err(status) => Err(proto::error_of(&status)),
    }
}

fn frame_to_pb(frame: Frame) -> internal::Frame {
    internal::Frame { kind: frame.kind as u32, call: frame.call, reply: frame.reply, body: frame.body }
}
