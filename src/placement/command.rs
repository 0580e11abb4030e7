//! What the placement driver's log holds, and what it answers.
//!
//! Everything that a retry may send twice is idempotent: the same UUID is the same node, the same name with the same
//! settings is the same keyspace, a report or step that has been taken changes nothing.

use super::{
    DecodeError,
    map::{Keyspace, Standing},
    recovery::Recover,
};
use crate::{
    error::{Error, Outcome, Reason},
    key::{Epoch, KeyKind, Layout, NodeId, PartitionId, Replica, ReplicaId},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// One entry of the placement driver's log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Forms the cluster: the first command of group 0, proposed by its only member
    /// ([`super::state::DRIVER_FIRST`]). Makes the first node and the keyspace `default`. Later ones answer with the
    /// cluster that exists.
    Bootstrap {
        /// Id of the cluster, made by the proposer.
        cluster_id: String,
        /// The node that proposes it; its `cluster_id` and `previous` are not looked at.
        node: RegisterNode,
        /// Replicas of keyspaces that do not say; 0 means [`super::limits::REPLICAS_DEFAULT`].
        replicas_default: u32,
    },
    /// Makes a process a node, or updates the node that it is.
    RegisterNode(RegisterNode),
    /// Creates a keyspace.
    CreateKeyspace(CreateKeyspace),
    /// Drops a keyspace and its partitions.
    DropKeyspace {
        /// Its name.
        name: String,
    },
    /// A group's true members, told by its leader once they are committed; not while two sets of them are joint.
    Report {
        /// The group.
        partition: PartitionId,
        /// Position of this membership in the group's log (its index): what orders reports.
        members_epoch: u64,
        /// Its voters, in any order.
        members: Vec<Replica>,
    },
    /// A step of the planner.
    Step(Step),
    /// Says what a node is there for from now on. For people: to drain it, to let it leave, and to take that back; for
    /// the driver: to remove one that has left.
    SetStanding {
        /// The node.
        node: NodeId,
        /// Not [`Standing::Gone`], which only another process under its address makes of it.
        standing: Standing,
    },
    /// Asks that a partition be cut in two.
    Divide {
        /// The partition, at rest.
        partition: PartitionId,
        /// Its epoch of bounds when this was decided.
        bounds: u64,
        /// First position of the new partition.
        at: Bytes,
    },
    /// A partition has been cut, told by the leader of the child once a quorum of the child's members holds it.
    Divided {
        /// The partition that was cut.
        partition: PartitionId,
        /// The child.
        child: PartitionId,
    },
    /// Asks that two neighbours become one.
    Merge {
        /// The left one, which stays, and the right one, both at rest.
        pair: [PartitionId; 2],
        /// Their epochs of bounds when this was decided.
        bounds: [u64; 2],
    },
    /// Withdraws a merge that does not come about.
    Unmerge {
        /// The left one and the right one.
        pair: [PartitionId; 2],
    },
    /// The left one has taken in the right one, told by the leader of the left one.
    Merged {
        /// The left one and the right one.
        pair: [PartitionId; 2],
        /// Epoch of bounds of the left one since then.
        bounds: u64,
    },
    /// The left one will not take in the right one any more, told by the leader of the left one.
    Unmerged {
        /// The left one and the right one.
        pair: [PartitionId; 2],
        /// Epoch of bounds of the left one since then.
        bounds: u64,
    },
    /// Asks to go on with one replica of a partition alone, whatever the others held. For people.
    Recover(Recover),
}

/// A process that wants to be a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RegisterNode {
    /// Cluster that it says it belongs to; empty: it does not know.
    pub cluster_id: String,
    /// Its persistent UUID.
    pub uuid: String,
    /// `host:port` under which others reach it.
    pub address: String,
    /// Failure domain, or empty.
    pub zone: String,
    /// Share of load in thousandths; 0 means 1,000.
    pub weight_milli: u32,
    /// Node id that it was given earlier.
    pub previous: Option<NodeId>,
    /// It keeps nothing: whoever comes next under its address is another node, and this one is gone.
    pub ephemeral: bool,
}

/// A keyspace to be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateKeyspace {
    /// Its name.
    pub name: String,
    /// Kind of keys; the `max` of integers at least 1.
    pub kind: KeyKind,
    /// How it is cut.
    pub layout: Layout,
    /// Members per partition; 0 means the cluster's default.
    pub replicas: u32,
    /// Where it is cut at first.
    pub cuts: Cuts,
    /// Nodes believed dead by the proposer: they get no replica unless there is no other node.
    pub avoid: BTreeSet<NodeId>,
}

/// Where a new keyspace is cut.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Cuts {
    /// Into this many partitions of equal width; 0 means 1. An ordered keyspace of bytes knows no equal widths: 1 only.
    Even(u32),
    /// At these keys, strictly ascending, not empty; for an ordered keyspace of bytes.
    At(Vec<Bytes>),
}

/// A change of one partition that the planner asks for. Each names what it was decided on and is refused as
/// [`Refusal::StepOutdated`] if that has changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Step {
    /// Members should become these. A node that has a replica keeps it; every other node gets a fresh replica id. While a
    /// change is under way, only the nodes of the members as last reported are taken: that withdraws the change.
    SetTarget {
        /// Partition.
        partition: PartitionId,
        /// Its epoch when this was decided.
        epoch: Epoch,
        /// Nodes, the preferred leader first.
        nodes: Vec<NodeId>,
    },
    /// Another member's node should initialize the group.
    SetInitializer {
        /// Partition that is being created.
        partition: PartitionId,
        /// Its initializer when this was decided.
        from: ReplicaId,
        /// The new one, a member.
        to: ReplicaId,
    },
}

/// What a command did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The cluster exists.
    Bootstrapped {
        /// Its id: not the proposed one if it existed already.
        cluster_id: String,
        /// False when it existed already.
        created: bool,
    },
    /// The process is a node.
    Registered {
        /// Its id.
        node: NodeId,
        /// False when it was one already.
        created: bool,
    },
    /// The keyspace exists.
    KeyspaceCreated {
        /// As it is.
        keyspace: Keyspace,
        /// Number of its partitions.
        partitions: u64,
        /// False when it existed already.
        created: bool,
        /// What to know, a line each.
        warnings: Vec<String>,
    },
    /// The keyspace does not exist.
    KeyspaceDropped {
        /// False when there was none.
        dropped: bool,
    },
    /// The report was heard.
    Reported {
        /// False when it told nothing new.
        changed: bool,
    },
    /// The step was taken.
    Stepped,
    /// The node stands as asked, or better: one that is gone or removed has left already.
    StandingSet {
        /// How it stands.
        standing: Standing,
        /// False when it stood so already.
        changed: bool,
    },
    /// The partition will be, or has been, cut.
    Dividing {
        /// The child.
        child: PartitionId,
    },
    /// The two will become one, unless that is withdrawn.
    Merging {
        /// Version of the map that was the first to ask for it.
        since: u64,
    },
    /// The partition goes on with one replica, or has.
    Recovering {
        /// The replica.
        replica: ReplicaId,
    },
}

/// What [`super::State::apply`] says to a command.
pub type Answer = Result<Reply, Refusal>;

/// Why a command was refused; it has changed nothing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The first command has to be a bootstrap.
    #[error("the cluster has not been formed yet; run `meridian init` against one node")]
    NotInitialized,
    /// The process belongs to another cluster.
    #[error("this process belongs to the cluster {theirs}, not to {ours}; give it an empty data directory to join")]
    ClusterMismatch {
        /// Cluster asked.
        ours: String,
        /// Cluster named.
        theirs: String,
    },
    /// UUID and earlier node id do not belong together.
    #[error("this process says it was {claimed} with UUID {uuid}; the cluster knows that UUID as {known}")]
    IdentityMismatch {
        /// UUID named.
        uuid: String,
        /// Node id named.
        claimed: NodeId,
        /// Node id of that UUID here, in words when there is none.
        known: String,
    },
    /// Another node has this address, and it keeps its data.
    #[error(
        "{address} is the address of {node}, whose data directory this is not; start this process with the data directory of {node}, or under another address"
    )]
    AddressTaken {
        /// The address.
        address: String,
        /// Who has it.
        node: NodeId,
    },
    /// A field is wrong in itself.
    #[error("{why}")]
    FieldInvalid {
        /// The field.
        field: Field,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// A name is reserved or malformed.
    #[error("{0}")]
    NameInvalid(String),
    /// There is a keyspace of this name with other settings.
    #[error("keyspace {name:?} exists with other settings: {differs}")]
    KeyspaceExists {
        /// Its name.
        name: String,
        /// What differs.
        differs: String,
    },
    /// There is no room for more of something.
    #[error("{what}: the limit of {limit} is reached")]
    LimitReached {
        /// Of what.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// There is no such partition (any more): whoever serves it may retire it.
    #[error("there is no partition {0}")]
    PartitionUnknown(PartitionId),
    /// A report names replicas that were never handed out to those nodes.
    #[error("{partition} reports members that do not exist: {why}")]
    ReportInvalid {
        /// The group.
        partition: PartitionId,
        /// What is wrong.
        why: String,
    },
    /// What the step was decided on has changed since: plan again.
    #[error("{partition}: {why}")]
    StepOutdated {
        /// The partition.
        partition: PartitionId,
        /// What has changed.
        why: String,
    },
    /// There is no such node.
    #[error("there is no node {0}; `meridian node list` shows all")]
    NodeUnknown(NodeId),
    /// The node was removed, and that is final.
    #[error(
        "{0} was removed from the cluster for good; stop its process, and start it with an empty data directory if it shall join as a new node"
    )]
    NodeRemoved(NodeId),
    /// The node cannot stand like this; says why.
    #[error("{node} is {now} and cannot be {asked}: {why}")]
    StandingRefused {
        /// The node.
        node: NodeId,
        /// How it stands.
        now: Standing,
        /// How it should.
        asked: Standing,
        /// Why not.
        why: String,
    },
    /// Every node is draining, leaving or gone.
    #[error("no node takes replicas: all are draining, leaving or gone; start another, or run `meridian node resume`")]
    NoNodeForReplicas,
    /// A partition cannot be cut here.
    #[error("{partition} cannot be cut at {at}: {why}")]
    CutImpossible {
        /// The partition.
        partition: PartitionId,
        /// Where, for people.
        at: String,
        /// What is wrong.
        why: String,
    },
    /// Two partitions cannot become one.
    #[error("{left} and {right} cannot be merged: {why}")]
    MergeImpossible {
        /// The left one.
        left: PartitionId,
        /// The right one.
        right: PartitionId,
        /// What is wrong.
        why: String,
    },
    /// A partition cannot, or need not, go on without a quorum.
    #[error("{partition} is not recovered: {why}")]
    RecoverImpossible {
        /// The partition.
        partition: PartitionId,
        /// Why not, and what to do.
        why: String,
    },
}

/// A request field that can be wrong in itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Field {
    /// Cluster id.
    ClusterId,
    /// UUID of a node.
    Uuid,
    /// Address of a node.
    Address,
    /// Zone of a node.
    Zone,
    /// Weight of a node.
    Weight,
    /// Number of replicas.
    Replicas,
    /// Upper end of integer keys.
    Max,
    /// Number of partitions.
    Partitions,
    /// Split points.
    SplitAt,
}

impl Field {
    /// Its name in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ClusterId => "cluster_id",
            Self::Uuid => "uuid",
            Self::Address => "address",
            Self::Zone => "zone",
            Self::Weight => "weight",
            Self::Replicas => "replicas",
            Self::Max => "max",
            Self::Partitions => "partitions",
            Self::SplitAt => "split_at",
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let error = match &refusal {
            Refusal::NotInitialized => Self::new(Reason::NotInitialized, message),
            Refusal::ClusterMismatch { ours, theirs } => {
                Self::new(Reason::ClusterMismatch, message).with("ours", ours).with("theirs", theirs)
            }
            Refusal::IdentityMismatch { uuid, claimed, known } => Self::new(Reason::IdentityMismatch, message)
                .with("uuid", uuid)
                .with("claimed", claimed)
                .with("known", known),
            Refusal::AddressTaken { address, node } => {
                Self::new(Reason::IdentityMismatch, message).with("address", address).with("node", node)
            }
            Refusal::FieldInvalid { field, .. } => Self::field(field.as_str(), message),
            Refusal::NameInvalid(_) => Self::new(Reason::NameInvalid, message).in_field("name"),
            Refusal::KeyspaceExists { .. } => Self::new(Reason::KeyspaceExists, message).in_field("name"),
            // Waiting frees nothing here, unlike with other budgets.
            Refusal::LimitReached { limit, .. } => {
                Self::new(Reason::Overloaded, message).with("limit", limit).retry_after(0)
            }
            Refusal::PartitionUnknown(partition) | Refusal::StepOutdated { partition, .. } => {
                Self::new(Reason::WrongPartition, message).with("partition", partition)
            }
            Refusal::NodeUnknown(node) => Self::new(Reason::NodeUnknown, message).with("node", node),
            Refusal::NodeRemoved(node) => Self::new(Reason::NodeRemoved, message).with("node", node),
            Refusal::StandingRefused { node, .. } => Self::new(Reason::NodeNeeded, message).with("node", node),
            Refusal::NoNodeForReplicas => Self::new(Reason::NodeNeeded, message),
            Refusal::CutImpossible { partition, .. } => Self::field("at", message).with("partition", partition),
            Refusal::MergeImpossible { left, right, .. } => {
                Self::field("with", message).with("left", left).with("right", right)
            }
            Refusal::RecoverImpossible { partition, .. } => {
                Self::field("partition", message).with("partition", partition)
            }
            Refusal::ReportInvalid { partition, .. } => {
                Self::new(Reason::Internal, message).with("partition", partition)
            }
        };
        error.outcome(Outcome::NotApplied)
    }
}

impl Command {
    /// Versioned bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        super::encode(self)
    }

    /// The command behind these bytes.
    ///
    /// # Errors
    /// When they are none of ours or of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        super::decode("driver command", bytes)
    }
}

/// Versioned bytes of an answer, for the node that forwarded the command.
#[must_use]
pub fn encode_answer(answer: &Answer) -> Bytes {
    super::encode(answer)
}

/// The answer behind these bytes.
///
/// # Errors
/// When they are none of ours or of another format.
pub fn decode_answer(bytes: &[u8]) -> Result<Answer, DecodeError> {
    super::decode("driver answer", bytes)
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
