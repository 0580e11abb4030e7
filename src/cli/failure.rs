//! How a command ends when it does not end well: its exit code, and what stderr says.
//!
//! Invariant: the exit code depends on what happened, not on the command: scripts may rely on it.
//! A write whose outcome is not known is always [`OUTCOME_UNKNOWN`], whatever else is true of its error.

use crate::{
    error::{Code, Error, Outcome, Reason},
    server::StartError,
};
use std::{fmt, io};

/// The command did what was asked.
pub const OK: u8 = 0;
/// It failed for a reason that has no code of its own.
pub const ERROR: u8 = 1;
/// The request is wrong in itself: repeating it cannot help.
pub const USAGE: u8 = 2;
/// There is no such key, keyspace or row.
pub const NOT_FOUND: u8 = 3;
/// The condition of a write did not hold.
pub const CONDITION_NOT_MET: u8 = 4;
/// Not now: no leader, no quorum, unreachable, overloaded, or out of time. Nothing was written.
pub const UNAVAILABLE: u8 = 5;
/// A write may or may not have happened.
pub const OUTCOME_UNKNOWN: u8 = 6;

/// A drill could not find out whether the cluster keeps its promises.
pub const INCONCLUSIVE: u8 = 7;

/// Why a command ends with another exit code than 0.
#[derive(Debug)]
pub enum Failure {
    /// An error of the cluster, or one found on the way to it.
    Api(Error),
    /// Wrong arguments or configuration.
    Usage(String),
    /// There is no such thing.
    NotFound(String),
    /// A condition did not hold.
    ConditionNotMet(String),
    /// A drill that says nothing of the cluster.
    Inconclusive(String),
    /// The reader of stdout has gone away: nothing to say, and no one to say it to.
    OutputClosed,
    /// Anything else.
    Other(anyhow::Error),
}

impl Failure {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Api(error) => exit_code_of(error),
            Self::Usage(_) => USAGE,
            Self::NotFound(_) => NOT_FOUND,
            Self::ConditionNotMet(_) => CONDITION_NOT_MET,
            Self::Inconclusive(_) => INCONCLUSIVE,
            Self::OutputClosed => OK,
            Self::Other(_) => ERROR,
        }
    }
}

/// Exit code of an error of the cluster.
#[must_use]
pub fn exit_code_of(error: &Error) -> u8 {
    if error.outcome == Some(Outcome::Unknown) || error.reason == Reason::OutcomeUnknown {
        return OUTCOME_UNKNOWN;
    }
    match error.reason.code() {
        Code::InvalidArgument => USAGE,
        Code::NotFound => NOT_FOUND,
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => UNAVAILABLE,
        _ if error.is_retryable() => UNAVAILABLE,
        _ => ERROR,
    }
}

/// What to do about an error, if something can be said in general.
#[must_use]
pub fn advice(error: &Error) -> Option<&'static str> {
    if exit_code_of(error) == OUTCOME_UNKNOWN {
        return Some(
            "read the key before writing it again: the write may have happened; for writes that are safe to repeat \
             use conditions (--if-absent, --if-version)",
        );
    }
    Some(match error.reason {
        Reason::NoQuorum | Reason::LeaderUnknown => {
            "see `meridian cluster status`; reads still work with --consistency eventual"
        }
        Reason::Unreachable => {
            "check that a node runs at one of the --endpoints (or MERIDIAN_ENDPOINTS); `meridian dev` starts a cluster"
        }
        Reason::NotInitialized => "form the cluster once with `meridian init`",
        Reason::DeadlineExceeded => "try again, with a longer --deadline if it keeps happening",
        Reason::TooStale => "try again, allow more staleness, or read with --consistency linearizable",
        Reason::Overloaded => "send less at once, or try again later",
        Reason::MemoryFull => "delete rows, add nodes, or give the nodes more memory (memory.bytes_max)",
        Reason::KeyspaceUnknown => "see `meridian keyspace list`, or create it with `meridian keyspace create`",
        Reason::KeyspaceExists => "see `meridian keyspace show`; choose another name or the same settings",
        Reason::RangeInverted => "swap --from and --to; for descending order use --reverse",
        Reason::NotANumber => "`kv incr` works on decimal numbers only; see the value with `kv get`",
        Reason::CrossPartition => "write the keys one by one, or in batches within one partition",
        Reason::SessionExpired => "run the command again: it opens a new session",
        Reason::SessionAhead => "ask through another node, and set the clock of this one right",
        Reason::Corrupt => "see the log of the node that answered; other replicas can still serve",
        Reason::Internal => "this is a bug in Meridian; please report it with the node's log",
        _ => return None,
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Api(error) => {
                write!(f, "error: {}: {}", error.reason.as_str(), error.message)?;
                for (name, value) in &error.metadata {
                    write!(f, "\n  {name}: {value}")?;
                }
                if let Some(outcome) = error.outcome {
                    write!(f, "\n  the write: {outcome}")?;
                }
                advice(error).map_or(Ok(()), |advice| write!(f, "\n  next: {advice}"))
            }
            Self::Usage(message)
            | Self::NotFound(message)
            | Self::ConditionNotMet(message)
            | Self::Inconclusive(message) => f.write_str(message),
            Self::OutputClosed => Ok(()),
            Self::Other(error) => write!(f, "error: {error:#}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Api(error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Error>() {
            Ok(error) => Self::Api(error),
            Err(error) => Self::Other(error),
        }
    }
}

impl From<StartError> for Failure {
    /// Its text names its causes itself; as a chain they would be printed twice.
    fn from(error: StartError) -> Self {
        Self::Other(anyhow::Error::msg(error.to_string()))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Other(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(reason: Reason) -> u8 {
        exit_code_of(&Error::new(reason, ""))
    }

    #[test]
    fn exit_codes_follow_the_reason() {
        assert_eq!(code(Reason::KeyOutOfDomain), USAGE);
        assert_eq!(code(Reason::RangeInverted), USAGE);
        assert_eq!(code(Reason::KeyspaceUnknown), NOT_FOUND);
        assert_eq!(code(Reason::NotFound), NOT_FOUND);
        assert_eq!(code(Reason::NoQuorum), UNAVAILABLE);
        assert_eq!(code(Reason::DeadlineExceeded), UNAVAILABLE);
        assert_eq!(code(Reason::Overloaded), UNAVAILABLE);
        assert_eq!(code(Reason::TooStale), UNAVAILABLE);
        assert_eq!(code(Reason::OutcomeUnknown), OUTCOME_UNKNOWN);
        assert_eq!(code(Reason::KeyspaceExists), ERROR);
        assert_eq!(code(Reason::Internal), ERROR);
    }

    #[test]
    fn an_unknown_outcome_wins_over_every_other_code() {
        for reason in Reason::ALL {
            let error = Error::new(*reason, "").outcome(Outcome::Unknown);
            assert_eq!(exit_code_of(&error), OUTCOME_UNKNOWN, "{reason:?}");
            assert!(advice(&error).is_some_and(|advice| advice.contains("read the key")));
            let error = Error::new(*reason, "").outcome(Outcome::NotApplied);
            assert_eq!(exit_code_of(&error) == OUTCOME_UNKNOWN, *reason == Reason::OutcomeUnknown, "{reason:?}");
        }
    }

    #[test]
    fn a_report_names_reason_facts_outcome_and_the_next_step() {
        let error = Error::new(Reason::NoQuorum, "1 of 3 members of p4 is in contact")
            .with("members", "n1 (here), n2 (silent 4 s), n3 (silent 4 s)")
            .outcome(Outcome::NotApplied);
        assert_eq!(
            Failure::from(error).to_string(),
            "error: NO_QUORUM: 1 of 3 members of p4 is in contact\n  \
             members: n1 (here), n2 (silent 4 s), n3 (silent 4 s)\n  the write: not applied\n  \
             next: see `meridian cluster status`; reads still work with --consistency eventual"
        );
    }

    #[test]
    fn a_closed_pipe_is_a_quiet_success() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(failure.exit_code(), OK);
        assert_eq!(failure.to_string(), "");
    }
}
