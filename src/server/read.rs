//! Consistency: what a request asks for, and reaching the point at which a replica may answer it.

use crate::{
    client::token::SessionToken,
    error::{Error, Reason},
    key::PartitionId,
    node::{Node, Partition},
    plant::{Bug, planted},
    proto::v1,
    raft::{BarrierError, Level as BarrierLevel},
    telemetry,
};
use std::time::Duration;
use tokio::time::Instant;

/// How often a waiting read looks whether its group has lost its quorum.
const QUORUM_CHECK: Duration = Duration::from_millis(200);
/// Longest staleness that can be asked for, an hour.
pub(crate) const MAX_STALENESS_MS_MAX: u64 = 3_600_000;

/// What a read asks for, checked.
#[derive(Clone, Debug)]
pub(crate) enum Choice {
    Linearizable,
    Lease,
    Bounded(Duration),
    Session(SessionToken),
    Eventual,
}

impl Choice {
    /// Checks the options. Omission means linearizable; a value that this server does not know is refused, so that no
    /// read is weaker than was asked for.
    pub(crate) fn of(options: v1::ReadOptions) -> Result<Self, Error> {
        if v1::OnUnavailable::try_from(options.on_unavailable).is_err() {
            let message = format!("{} is no choice that this server knows", options.on_unavailable);
            return Err(Error::field("options.on_unavailable", message));
        }
        let consistency = v1::Consistency::try_from(options.consistency).map_err(|_| {
            let message = format!("{} is no consistency that this server knows", options.consistency);
            Error::field("options.consistency", message)
        })?;
        match consistency {
            v1::Consistency::Unspecified | v1::Consistency::Linearizable if planted(Bug::LinearizableWeakened) => {
                Ok(Self::Eventual)
            }
            v1::Consistency::Unspecified | v1::Consistency::Linearizable => Ok(Self::Linearizable),
            v1::Consistency::Lease => Ok(Self::Lease),
            v1::Consistency::Bounded => match options.max_staleness_ms {
                0 => Err(Error::field("options.max_staleness_ms", "is missing; BOUNDED needs 1 ms or more")),
                ms if ms > MAX_STALENESS_MS_MAX => {
                    let message = format!("is {ms}; the limit is {MAX_STALENESS_MS_MAX}");
                    Err(Error::field("options.max_staleness_ms", message))
                }
                ms => Ok(Self::Bounded(Duration::from_millis(ms))),
            },
            v1::Consistency::Session => SessionToken::decode(options.session_token).map(Self::Session),
            v1::Consistency::Eventual => Ok(Self::Eventual),
        }
    }
}

/// A point that was reached: the rows may be read now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadPoint {
    pub(crate) level: v1::Consistency,
    pub(crate) role: v1::Role,
    staleness: Stale,
}

#[derive(Clone, Copy, Debug)]
enum Stale {
    None,
    AtMost(Duration),
    Unknown,
}

impl ReadPoint {
    pub(crate) fn staleness_to_pb(self) -> v1::Staleness {
        use v1::staleness::Known;
        let known = match self.staleness {
            Stale::None => Known::None(true),
            Stale::AtMost(_) if planted(Bug::StalenessClaimedZero) => Known::AtMostUs(0),
            // Rounded up: a reply never claims less than it has.
            Stale::AtMost(at_most) => Known::AtMostUs(at_most.as_nanos().div_ceil(1_000) as u64),
            Stale::Unknown => Known::Unknown(true),
        };
        v1::Staleness { known: Some(known) }
    }

    pub(crate) const fn level_name(self) -> &'static str {
        match self.level {
            v1::Consistency::Unspecified | v1::Consistency::Linearizable => "linearizable",
            v1::Consistency::Lease => "lease",
            v1::Consistency::Bounded => "bounded",
            v1::Consistency::Session => "session",
            v1::Consistency::Eventual => "eventual",
        }
    }

    pub(crate) const fn role_name(self) -> &'static str {
        match self.role {
            v1::Role::Unspecified => "unknown",
            v1::Role::Leader => "leader",
            v1::Role::Follower => "follower",
            v1::Role::Learner => "learner",
        }
    }
}

/// Waits until the replica may answer.
pub(crate) async fn reach(
    node: &Node,
    partition: &Partition,
    choice: &Choice,
    deadline: Instant,
) -> Result<ReadPoint, Error> {
    let group = partition.group();
    let (level, staleness) = match choice {
        Choice::Linearizable => {
            barrier(node, partition, BarrierLevel::ReadIndex, deadline).await?;
            (v1::Consistency::Linearizable, Stale::None)
        }
        Choice::Lease => {
            barrier(node, partition, BarrierLevel::Lease, deadline).await?;
            (v1::Consistency::Lease, Stale::None)
        }
        Choice::Bounded(bound) => {
            let staleness = while_quorum(node, partition, group.fresh_within(*bound, deadline)).await;
            let staleness = staleness.map_err(|error| too_stale(partition.id, *bound, &error))?;
            metrics::histogram!(telemetry::READ_STALENESS_SECONDS).record(staleness.as_secs_f64());
            (v1::Consistency::Bounded, Stale::AtMost(staleness))
        }
        Choice::Session(token) => {
            let seen = token.seen(partition.id).filter(|_| !planted(Bug::SessionTokenIgnored));
            let index = seen.map_or(0, |seen| seen.index);
            group.wait_applied(index, deadline).await.map_err(|_| {
                let applied = group.applied().index;
                let message = format!(
                    "this replica of partition {} has applied {applied}, the session has seen {index}; ask another replica",
                    partition.id
                );
                Error::new(Reason::TooStale, message).with("applied", applied).with("wanted", index)
            })?;
            (v1::Consistency::Session, Stale::Unknown)
        }
        Choice::Eventual => (v1::Consistency::Eventual, Stale::Unknown),
    };
    Ok(ReadPoint { level, role: role_to_pb(group.role()), staleness })
}

/// Waits, but not for a quorum that is not there.
async fn while_quorum<T>(
    node: &Node,
    partition: &Partition,
    waiting: impl Future<Output = Result<T, BarrierError>>,
) -> Result<T, BarrierError> {
    let mut waiting = std::pin::pin!(waiting);
    loop {
        match tokio::time::timeout(QUORUM_CHECK, &mut waiting).await {
            Ok(done) => return done,
            Err(_waiting) if node.liveness().quorum_lost(&partition.group().status().voters) => {
                return Err(BarrierError::NoQuorum);
            }
            Err(_waiting) => {}
        }
    }
}

async fn barrier(node: &Node, partition: &Partition, level: BarrierLevel, deadline: Instant) -> Result<(), Error> {
    let group = partition.group();
    let quorum_lost = || node.liveness().quorum_lost(&group.status().voters);
    match while_quorum(node, partition, group.barrier(level, deadline)).await {
        Ok(_) => Ok(()),
        Err(BarrierError::Timeout) if !quorum_lost() => {
            Err(Error::new(Reason::DeadlineExceeded, format!("partition {} confirmed no leader in time", partition.id)))
        }
        Err(BarrierError::NoLeader { hint: Some(leader) }) if leader != group.replica() && !quorum_lost() => {
            let message = format!("partition {} is led by node {}", partition.id, leader.node);
            Err(Error::new(Reason::NotLeader, message).hint(node.hint(partition.id)))
        }
        Err(_) => Err(node.liveness().no_leader(partition.id, &group.status().voters, None)),
    }
}

fn too_stale(id: PartitionId, bound: Duration, error: &BarrierError) -> Error {
    let message = format!(
        "this replica of partition {id} cannot show that it is at most {} ms stale: {error}; ask for a larger bound, or \
         EVENTUAL",
        bound.as_millis()
    );
    Error::new(Reason::TooStale, message).with("max_staleness_ms", bound.as_millis())
}

pub(crate) const fn role_to_pb(role: crate::raft::Role) -> v1::Role {
    match role {
        crate::raft::Role::Leader => v1::Role::Leader,
        crate::raft::Role::Follower | crate::raft::Role::Candidate => v1::Role::Follower,
        crate::raft::Role::Learner => v1::Role::Learner,
        crate::raft::Role::Stopped => v1::Role::Unspecified,
    }
}
