//! The seam between nodes: frames, in order, batched; gRPC in production, a seeded network in memory for the embedded
//! cluster's tests and the simulation.
//!
//! A [`Transport`] only moves frames. [`endpoint::Endpoint`] makes calls with deadlines out of them and hands incoming
//! ones to the [`endpoint::Service`] registered for their kind.
//!
//! Invariants:
//! * frames from one node to another arrive in the order sent, or not at all (a gap is possible, a swap is not); only
//!   kinds that may be long ([`Kind::is_bulk`]) may overtake and be overtaken by others;
//! * sending never blocks: a full queue or a lost connection drops frames, and every call has a deadline.

pub mod endpoint;
pub mod grpc;
pub mod memory;

use crate::key::NodeId;
use bytes::Bytes;

/// Version of the frames and of every body in them. Nodes of different versions refuse each other by name.
pub const PROTOCOL_VERSION: u32 = 1;

/// What a frame's body is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u32)]
pub enum Kind {
    /// Empty: "I am alive".
    Ping = 1,
    /// Raft: append entries (also heartbeats).
    RaftAppend = 2,
    /// Raft: request a vote.
    RaftVote = 3,
    /// Raft: would you vote for me?
    RaftPreVote = 4,
    /// Raft: take over leadership.
    RaftTransfer = 5,
    /// Raft: a chunk of a snapshot.
    RaftSnapshot = 6,
    /// Raft: a quorum-confirmed read index from the leader.
    ReadIndex = 7,
    /// A client's request, forwarded (`meridian.v1.Request` answered by `meridian.v1.Reply`).
    Kv = 8,
    /// A node's call to the placement driver.
    Driver = 9,
    /// A change of the map, from the placement driver to a node.
    MapPush = 10,
    /// "I lead this partition now."
    Leader = 11,
    /// What the partitions that a node leads hold and are asked, to the placement driver's leader.
    Load = 12,
    /// A question to the placement driver's leader about what it knows beyond its log.
    Ask = 13,
    /// A question to a partition's leader where it would be cut.
    Cut = 14,
    /// A question to a partition's leader how much it holds; to be merged, it is sealed and answers with all of it.
    Merge = 15,
    /// Groups that may sleep, to replicas that follow the leaders on the sending node.
    Sleep = 16,
    /// A question to a node what it knows of a partition that may have lost its quorum.
    Survey = 17,
    /// Raft: does this replica still follow the leader that asks?
    Confirm = 18,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 18] = [
        Self::Ping,
        Self::RaftAppend,
        Self::RaftVote,
        Self::RaftPreVote,
        Self::RaftTransfer,
        Self::RaftSnapshot,
        Self::ReadIndex,
        Self::Kv,
        Self::Driver,
        Self::MapPush,
        Self::Leader,
        Self::Load,
        Self::Ask,
        Self::Cut,
        Self::Merge,
        Self::Sleep,
        Self::Survey,
        Self::Confirm,
    ];

    /// Whether frames of this kind have a lane of their own, apart from all others: they may be long.
    #[must_use]
    pub const fn is_bulk(self) -> bool {
        matches!(self, Self::RaftSnapshot | Self::Merge)
    }

    /// Whether frames of this kind carry what clients ask: they leave half of every queue to the nodes' own.
    #[must_use]
    pub const fn is_clients(self) -> bool {
        matches!(self, Self::Kv)
    }

    /// The kind with this number on the wire.
    #[must_use]
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// One message between nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What the body is.
    pub kind: Kind,
    /// Matches an answer with its call, unique per calling node; 0 for a frame that wants no answer.
    pub call: u64,
    /// True for an answer.
    pub reply: bool,
    /// Body.
    pub body: Bytes,
}

/// Why a frame was not queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// No address is known for the node, or there is no connection to it at the moment.
    #[error("not connected")]
    NotConnected,
    /// The queue to the node is full.
    #[error("queue full")]
    QueueFull,
}

/// Told of a node whose connection has ended, of which kinds of frames that connection carried, and of the calls that had
/// not left.
pub type Lost = Box<dyn Fn(NodeId, fn(Kind) -> bool, &[u64]) + Send + Sync>;

/// Moves frames.
pub trait Transport: Send + Sync + 'static {
    /// Queues a frame. Never blocks.
    ///
    /// # Errors
    /// When the frame was dropped at once. `Ok` promises nothing.
    fn send(&self, to: NodeId, frame: Frame) -> Result<(), SendError>;

    /// Tells where nodes are; known nodes that are not named stay known.
    fn set_addresses(&self, addresses: &[(NodeId, String)]);

    /// Has `lost` called whenever a connection has ended: frames sent over it may not have arrived. Set once, by the
    /// endpoint. A transport that cannot tell never calls it.
    fn on_lost(&self, _lost: Lost) {}
}

/// Takes frames that arrived, in order per sender.
pub trait Inbox: Send + Sync + 'static {
    /// Takes one frame. Must not block.
    fn deliver(&self, from: NodeId, frame: Frame);
}
