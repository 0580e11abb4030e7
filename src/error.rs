//! The catalogue of errors: one [`Reason`] per cause, one [`Error`] that carries it from where it arises to the user.
//!
//! Pure. A reason fixes the gRPC code, whether waiting helps, and what is known of a write that met it, so that no
//! layer above has to guess. An unmet condition and an absent key are results, not errors.
//!
//! Invariant: an error says [`Outcome::NotApplied`] only when the write has not happened and will not; everything
//! that may have been proposed says [`Outcome::Unknown`].

use crate::key::{NodeId, PartitionId};
use std::{borrow::Cow, fmt};

/// What is known of a failed write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The write has happened.
    Applied,
    /// The write has not happened and will not.
    NotApplied,
    /// The write may have happened or may still happen.
    Unknown,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Applied => "applied",
            Self::NotApplied => "not applied",
            Self::Unknown => "unknown",
        })
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $code:ident, $retry:literal;)*) => {
        /// Why a request failed. The text is part of the API.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum Reason { $($(#[$doc])* $name),* }

        impl Reason {
            /// Every reason, for documents and tests.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The stable text, `UPPER_SNAKE`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// The canonical gRPC code.
            #[must_use]
            pub const fn code(self) -> Code {
                match self { $(Self::$name => Code::$code),* }
            }

            /// Whether the same request may succeed later or elsewhere.
            #[must_use]
            pub const fn is_retryable(self) -> bool {
                match self { $(Self::$name => $retry),* }
            }

            /// The reason with this text.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$name),)* _ => None }
            }
        }
    };
}

/// Canonical gRPC codes in use, with their numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum Code {
    /// Outcome or cause not known.
    Unknown = 2,
    /// The request is wrong in itself.
    InvalidArgument = 3,
    /// The deadline passed.
    DeadlineExceeded = 4,
    /// No such thing.
    NotFound = 5,
    /// There is one already, and it differs.
    AlreadyExists = 6,
    /// A budget is used up.
    ResourceExhausted = 8,
    /// Not in this state of the system.
    FailedPrecondition = 9,
    /// Begin again.
    Aborted = 10,
    /// A bug.
    Internal = 13,
    /// Not now.
    Unavailable = 14,
    /// Stored bytes are damaged.
    DataLoss = 15,
}

reasons! {
    /// This node's replica does not lead the partition. Handled by the client library.
    NotLeader = "NOT_LEADER", FailedPrecondition, true;
    /// This node's replica does not own the key, or the node has no replica of the partition. Handled by the library.
    WrongPartition = "WRONG_PARTITION", FailedPrecondition, true;
    /// The partition has no leader at the moment, though a quorum is in contact: an election is going on.
    LeaderUnknown = "LEADER_UNKNOWN", Unavailable, true;
    /// Too few members of the partition are in contact for a quorum.
    NoQuorum = "NO_QUORUM", Unavailable, true;
    /// The node could not be reached, or closed the connection.
    Unreachable = "UNREACHABLE", Unavailable, true;
    /// The node is stopping.
    Stopping = "STOPPING", Unavailable, true;
    /// The write was proposed and no answer came in time: it may have happened.
    OutcomeUnknown = "OUTCOME_UNKNOWN", Unknown, true;
    /// The deadline passed before the request was proposed or answered.
    DeadlineExceeded = "DEADLINE_EXCEEDED", DeadlineExceeded, false;
    /// No replica could answer within the staleness asked for.
    TooStale = "TOO_STALE", FailedPrecondition, true;
    /// A budget of queued requests or bytes is used up.
    Overloaded = "OVERLOADED", ResourceExhausted, true;
    /// A node holds as many bytes as it may: only what deletes is taken.
    MemoryFull = "MEMORY_FULL", ResourceExhausted, true;
    /// The key is longer than the limit.
    KeyTooLarge = "KEY_TOO_LARGE", InvalidArgument, false;
    /// The value is longer than the limit.
    ValueTooLarge = "VALUE_TOO_LARGE", InvalidArgument, false;
    /// The batch has too many items or bytes.
    BatchTooLarge = "BATCH_TOO_LARGE", InvalidArgument, false;
    /// The lower bound lies above the upper bound.
    RangeInverted = "RANGE_INVERTED", InvalidArgument, false;
    /// The key is not an integer in `[0, M)`.
    KeyOutOfDomain = "KEY_OUT_OF_DOMAIN", InvalidArgument, false;
    /// A field is missing, out of its limits, or of an unknown value.
    InvalidField = "INVALID_FIELD", InvalidArgument, false;
    /// The page token is damaged or belongs to another query.
    PageTokenInvalid = "PAGE_TOKEN_INVALID", InvalidArgument, false;
    /// The keys of an atomic batch lie in more than one partition.
    CrossPartition = "CROSS_PARTITION", FailedPrecondition, false;
    /// The same client id and sequence came with another request.
    SequenceReused = "SEQUENCE_REUSED", InvalidArgument, false;
    /// The partition has forgotten this session, or an answer of it; it will not guess.
    SessionExpired = "SESSION_EXPIRED", Aborted, false;
    /// The session was opened by a node whose clock is far ahead of the partition's time.
    SessionAhead = "SESSION_AHEAD", FailedPrecondition, false;
    /// `must_exist` was asked and there is no such row.
    NotFound = "NOT_FOUND", NotFound, false;
    /// The value is not a decimal 64-bit number.
    NotANumber = "NOT_A_NUMBER", FailedPrecondition, false;
    /// The sum does not fit 64 bits.
    NumberOverflow = "NUMBER_OVERFLOW", FailedPrecondition, false;
    /// There is no keyspace of this name.
    KeyspaceUnknown = "KEYSPACE_UNKNOWN", NotFound, false;
    /// There is one of this name with other settings.
    KeyspaceExists = "KEYSPACE_EXISTS", AlreadyExists, false;
    /// The name is reserved or malformed.
    NameInvalid = "NAME_INVALID", InvalidArgument, false;
    /// The cluster has not been formed yet.
    NotInitialized = "NOT_INITIALIZED", Unavailable, true;
    /// The caller belongs to another cluster.
    ClusterMismatch = "CLUSTER_MISMATCH", FailedPrecondition, false;
    /// The caller's identity does not match what the cluster knows.
    IdentityMismatch = "IDENTITY_MISMATCH", FailedPrecondition, false;
    /// There is no node of this id.
    NodeUnknown = "NODE_UNKNOWN", NotFound, false;
    /// The node was removed from the cluster, which is final.
    NodeRemoved = "NODE_REMOVED", FailedPrecondition, false;
    /// The node cannot be spared, or cannot stand as asked.
    NodeNeeded = "NODE_NEEDED", FailedPrecondition, false;
    /// The caller speaks another wire version.
    VersionMismatch = "VERSION_MISMATCH", FailedPrecondition, false;
    /// Stored bytes are damaged.
    Corrupt = "CORRUPT", DataLoss, false;
    /// A bug in Meridian.
    Internal = "INTERNAL", Internal, false;
}

/// Better knowledge of who leads a partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hint {
    /// The partition.
    pub partition: PartitionId,
    /// Its leader's node, if known.
    pub leader: Option<NodeId>,
    /// Term in which that node leads; a higher term is right.
    pub term: u64,
    /// Version of the map that the answering node holds.
    pub map_version: u64,
}

/// Why a request failed, with what a person needs to act on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// The cause.
    pub reason: Reason,
    /// What was wrong, with which value, what the limit is, what to do next.
    pub message: Cow<'static, str>,
    /// Facts behind the message.
    pub metadata: Vec<(Cow<'static, str>, String)>,
    /// For writes.
    pub outcome: Option<Outcome>,
    /// When to try again; 0: waiting will not help.
    pub retry_after_ms: u32,
    /// The request field at fault, or empty.
    pub field: Cow<'static, str>,
    /// Where to go instead.
    pub hint: Option<Hint>,
}

impl Error {
    /// An error of this reason.
    pub fn new(reason: Reason, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            reason,
            message: message.into(),
            metadata: Vec::new(),
            outcome: None,
            retry_after_ms: if reason.is_retryable() { 50 } else { 0 },
            field: Cow::Borrowed(""),
            hint: None,
        }
    }

    /// A wrong or missing request field.
    pub fn field(field: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { field: Cow::Borrowed(field), ..Self::new(Reason::InvalidField, message) }
    }

    /// The same, naming the field.
    #[must_use]
    pub fn in_field(self, field: &'static str) -> Self {
        Self { field: Cow::Borrowed(field), ..self }
    }

    /// The same, with a fact.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.metadata.push((Cow::Borrowed(name), value.to_string()));
        self
    }

    /// The same, with what is known of the write.
    #[must_use]
    pub fn outcome(self, outcome: Outcome) -> Self {
        Self { outcome: Some(outcome), ..self }
    }

    /// The same, saying when to try again.
    #[must_use]
    pub fn retry_after(self, retry_after_ms: u32) -> Self {
        Self { retry_after_ms, ..self }
    }

    /// The same, saying where to go.
    #[must_use]
    pub fn hint(self, hint: Hint) -> Self {
        Self { hint: Some(hint), ..self }
    }

    /// Whether the same request may succeed later or elsewhere. A write whose outcome is unknown is safe to retry
    /// only under its session and sequence.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        self.reason.is_retryable()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.message)?;
        if let Some(outcome) = self.outcome {
            write!(f, " (write: {outcome})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_round_trip_and_are_distinct() {
        let mut seen = std::collections::BTreeSet::new();
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
            assert!(seen.insert(reason.as_str()));
        }
    }
}
