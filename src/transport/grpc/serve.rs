//! The receiving end of streams of frames.

use super::super::{Frame, Inbox, Kind, PROTOCOL_VERSION};
use crate::{
    error::{Error, Reason},
    key::NodeId,
    proto::{self, internal},
};
use futures_util::{Stream, StreamExt as _};
use parking_lot::Mutex;
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;
use tonic::Status;

/// Lanes, of all nodes together, whose last stream is remembered.
pub const LANES_MAX: usize = 1 << 16;

/// Number of lanes between two nodes.
const LANES: u32 = 2;

/// A stream: the sender's life, and the number of the stream in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct StreamId {
    life: u64,
    number: u64,
}

/// The valid stream of a lane; locked while a batch is delivered, so that streams never mix.
type Valid = Arc<Mutex<StreamId>>;

/// A stream that has said hello.
struct Greeted {
    from: NodeId,
    id: StreamId,
    valid: Valid,
}

/// Takes streams of frames and delivers them to one inbox.
///
/// A lane has one valid stream: the one opened last. When a node reconnects, frames may still be on their way to us in
/// the old connection; they are dropped, since they would arrive after newer ones.
pub struct FrameServer {
    cluster_id: String,
    me: NodeId,
    inbox: Arc<dyn Inbox>,
    lanes: Mutex<BTreeMap<(NodeId, u32), Valid>>,
    stopped: watch::Sender<bool>,
}

impl FrameServer {
    /// Serves node `me` of the cluster.
    #[must_use]
    pub fn new(cluster_id: impl Into<String>, me: NodeId, inbox: Arc<dyn Inbox>) -> Self {
        let stopped = watch::Sender::new(false);
        Self { cluster_id: cluster_id.into(), me, inbox, lanes: Mutex::default(), stopped }
    }

    /// Ends all streams, and every later one at once.
    pub fn stop(&self) {
        self.stopped.send_replace(true);
    }

    /// The lanes on which a stream has come in.
    #[must_use]
    pub fn lanes(&self) -> Vec<(NodeId, u32)> {
        self.lanes.lock().keys().copied().collect()
    }

    /// Takes one stream to its end: what `Internode.frames` does.
    ///
    /// # Errors
    /// When the caller belongs to another cluster, looked for another node, speaks another version, or breaks the
    /// protocol; when the connection fails.
    pub async fn serve<S>(&self, mut batches: S) -> Result<internal::FramesEnd, Status>
    where
        S: Stream<Item = Result<internal::FrameBatch, Status>> + Unpin,
    {
        let mut stopped = self.stopped.subscribe();
        let mut greeted = None;
        loop {
            let batch = tokio::select! {
                biased;
                _ = stopped.wait_for(|stopped| *stopped) => break,
                batch = batches.next() => batch,
            };
            let Some(batch) = batch.transpose()? else { break };
            let stream = match greeted.take() {
                Some(stream) => stream,
                None => self.greet(batch.hello.as_ref()).map_err(|error| proto::status_of(&error))?,
            };
            if !self.deliver(&stream, batch.frames) {
                break;
            }
            greeted = Some(stream);
        }
        Ok(internal::FramesEnd {})
    }

    /// Delivers a batch, unless a later stream has taken over.
    fn deliver(&self, stream: &Greeted, frames: Vec<internal::Frame>) -> bool {
        let valid = stream.valid.lock();
        if *valid != stream.id {
            return false;
        }
        for frame in frames {
            match Kind::from_wire(frame.kind) {
                Some(kind) => {
                    let frame = Frame { kind, call: frame.call, reply: frame.reply, body: frame.body };
                    self.inbox.deliver(stream.from, frame);
                }
                None => tracing::debug!(from = %stream.from, kind = frame.kind, "frame of an unknown kind"),
            }
        }
        true
    }

    /// Checks a hello and makes its stream the valid one of its lane.
    fn greet(&self, hello: Option<&internal::Hello>) -> Result<Greeted, Error> {
        let Some(hello) = hello else {
            return Err(Error::field("hello", "the first message of a stream of frames must say who is calling"));
        };
        let from = NodeId(hello.from);
        if hello.protocol_version != PROTOCOL_VERSION {
            let theirs = hello.protocol_version;
            let message =
                format!("node {from} speaks version {theirs} between nodes, {} speaks {PROTOCOL_VERSION}", self.me);
            return Err(Error::new(Reason::VersionMismatch, message));
        }
        if hello.cluster_id != self.cluster_id {
            let (theirs, ours) = (&hello.cluster_id, &self.cluster_id);
            let message =
                format!("node {from} belongs to cluster \"{theirs}\", this is node {} of \"{ours}\"", self.me);
            return Err(Error::new(Reason::ClusterMismatch, message));
        }
        if hello.to != self.me.0 {
            let message = format!("node {from} looks for node {} here, this is node {}", NodeId(hello.to), self.me);
            return Err(Error::new(Reason::IdentityMismatch, message));
        }
        if from == self.me || from.0 == 0 {
            return Err(Error::new(
                Reason::IdentityMismatch,
                format!("this is node {}, and so says the caller", self.me),
            ));
        }
        if hello.lane >= LANES {
            return Err(Error::field("hello.lane", format!("there is no lane {}", hello.lane)));
        }
        let valid = {
            let mut lanes = self.lanes.lock();
            if lanes.len() >= LANES_MAX && !lanes.contains_key(&(from, hello.lane)) {
                return Err(Error::new(Reason::Overloaded, format!("more than {LANES_MAX} lanes")));
            }
            Arc::clone(lanes.entry((from, hello.lane)).or_default())
        };
        let id = StreamId { life: hello.life, number: hello.stream };
        let mut last = valid.lock();
        if last.life == id.life && id.number <= last.number {
            return Err(Error::new(Reason::Unreachable, "a later stream of this lane is there already"));
        }
        *last = id;
        drop(last);
        Ok(Greeted { from, id, valid })
    }
}

impl std::fmt::Debug for FrameServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameServer").field("me", &self.me).finish_non_exhaustive()
    }
}
