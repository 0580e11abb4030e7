//! Changing the members of a group, and handing over its leadership.
//!
//! [`Running::set_members`] looks at the members as they are and takes the next step towards the target, again and again:
//! finish a joint configuration, add missing replicas as learners, wait until they have caught up, change the voters in
//! one joint step, remove what is left over. Each step is conditional on the members that it was derived from.
//!
//! Invariants:
//! * a replica votes only after it has caught up, so that no change lowers the number of live votes;
//! * a leader that is not in the target hands over first and leaves the rest to its successor;
//! * nobody becomes a member, and no voter ceases to be one, when the goal does not allow the members to be changed, or when
//!   somebody else has begun to: then they are only brought to rest, so that they can be looked at again.

use super::{
    replica::{Running, detached},
    types::{LogId, Membership, Types},
};
use crate::key::{NodeId, Replica, ReplicaId};
use openraft::{
    ChangeMembers, Precondition, ServerState,
    errors::{ClientWriteError, RaftError},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout_at};

/// A learner that lacks at most this many entries is caught up.
const LAG_MAX: u64 = 128;

/// How often progress is looked at.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// How long taking note of a transfer may take.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(5);

/// Why members or leadership were not changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MembersError {
    /// This replica does not lead, or not any more.
    #[error("not the leader")]
    NotLeader {
        /// Who does, as far as this replica knows, or will in a moment.
        leader: Option<Replica>,
    },
    /// Not before the deadline. The group may be anywhere on the way.
    #[error("not in time")]
    Timeout,
    /// The replica has stopped.
    #[error("stopped")]
    Stopped,
    /// What was asked makes no sense; says why.
    #[error("refused: {0}")]
    Refused(String),
}

/// What the members of a group should become.
#[derive(Clone, Copy)]
pub struct Goal<'a> {
    /// The voters, and nobody else.
    pub target: &'a [Replica],
    /// Only a membership written after this index will do, the same as before if need be: whoever still acts on an
    /// older one fails.
    pub after: Option<u64>,
    /// Whether this is still wanted and, given the index of a settled membership (one set of voters, nobody else), may begin
    /// there.
    pub allows: &'a (dyn Fn(Option<u64>) -> bool + Sync),
}

impl<'a> Goal<'a> {
    /// These voters, whatever the members are.
    #[must_use]
    pub fn new(target: &'a [Replica]) -> Self {
        Self { target, after: None, allows: &|_| true }
    }
}

type Changed = Result<LogId, RaftError<Types, ClientWriteError<Types>>>;

/// How far this replica, as leader, has come towards a target.
#[derive(Debug)]
pub(super) struct Way {
    /// The last membership that it wrote.
    at: LogId,
    target: Vec<Replica>,
}

/// The next step towards a target.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Done,
    /// The same members in a new entry; finishes a joint configuration.
    Flatten,
    AddLearner(Replica),
    /// Until these have caught up.
    CatchUp(BTreeSet<u64>),
    /// First to this voter of the target.
    HandOver(u64),
    SetVoters(BTreeSet<u64>),
    Remove(BTreeSet<u64>),
}

/// What the step is derived from.
struct View {
    membership: Membership,
    at: Option<LogId>,
    committed: bool,
    leader: LogId,
    /// Entries that each replica in contact lacks.
    lag: BTreeMap<u64, u64>,
}

/// What is done for a goal that is out of date: half a change is finished, and who was to become a member is let go.
fn tidy(view: &View) -> Result<Step, MembersError> {
    let voters: BTreeSet<u64> = view.membership.voter_ids().collect();
    let learners: BTreeSet<u64> =
        view.membership.nodes().map(|(id, _)| *id).filter(|id| !voters.contains(id)).collect();
    match (view.membership.get_joint_config().len() > 1, learners.is_empty()) {
        (true, _) => Ok(Step::Flatten),
        (false, false) => Ok(Step::Remove(learners)),
        (false, true) => Err(MembersError::Refused("the goal is out of date".into())),
    }
}

impl View {
    fn index(&self) -> u64 {
        self.at.map_or(0, |at| at.index)
    }

    /// Whether a replica, which may lead all the same for a moment, is no member any more.
    fn lacks(&self, replica: ReplicaId) -> bool {
        self.membership.get_node(&replica.0).is_none()
    }

    /// Whether the next step towards a goal may be taken: from where the members are settled if the goal allows that, or
    /// further on the way that `own` says this leader has gone.
    fn allowed_by(&self, goal: &Goal<'_>, own: Option<&Way>) -> bool {
        let (voters, all) = (self.membership.voter_ids().count(), self.membership.nodes().count());
        if self.membership.get_joint_config().len() == 1 && voters == all {
            return (goal.allows)(Some(self.index()));
        }
        let on_the_way = own.is_some_and(|own| Some(own.at) == self.at && own.target == goal.target);
        on_the_way && (goal.allows)(None)
    }
}

fn next_step(view: &View, me: u64, target: &BTreeMap<u64, NodeId>) -> Step {
    let configs = view.membership.get_joint_config();
    let wanted: BTreeSet<u64> = target.keys().copied().collect();
    if configs.len() > 1 {
        return Step::Flatten;
    }
    let voters = configs.first().cloned().unwrap_or_default();
    let known: BTreeSet<u64> = view.membership.nodes().map(|(id, _)| *id).collect();
    if voters != wanted {
        if let Some((id, node)) = target.iter().find(|(id, _)| !known.contains(id)) {
            return Step::AddLearner(Replica { id: ReplicaId(*id), node: *node });
        }
        let behind = |id: &&u64| view.lag.get(id).is_none_or(|lag| *lag > LAG_MAX);
        let newcomers: BTreeSet<u64> = wanted.difference(&voters).filter(behind).copied().collect();
        if !newcomers.is_empty() {
            return Step::CatchUp(newcomers);
        }
        let caught_up = |id: &&u64| view.lag.get(id) == Some(&0);
        return match wanted.intersection(&voters).find(caught_up) {
            Some(successor) if !wanted.contains(&me) => Step::HandOver(*successor),
            _ => Step::SetVoters(wanted),
        };
    }
    let left_over: BTreeSet<u64> = known.difference(&wanted).copied().collect();
    if left_over.is_empty() { Step::Done } else { Step::Remove(left_over) }
}

impl Running {
    fn view(&self) -> Result<View, MembersError> {
        if self.is_stopping() {
            return Err(MembersError::Stopped);
        }
        let view = self.metrics(|metrics| {
            let replication = metrics.replication.as_ref().filter(|_| metrics.state == ServerState::Leader)?;
            let last = metrics.last_log_index.unwrap_or(0);
            let heard = |id: &u64| {
                let at = metrics.heartbeat.as_ref().and_then(|heard| *heard.get(id)?);
                at.is_some_and(|at| openraft::Instant::elapsed(&at.into_inner()) < self.hub.config.lease())
            };
            Some(View {
                membership: metrics.membership_config.membership().clone(),
                at: *metrics.membership_config.log_id(),
                committed: metrics.membership_config.log_id() == metrics.committed_membership_config.log_id(),
                leader: LogId::new(metrics.vote.leader_id, 0),
                // Whoever has never answered, or not of late, lacks everything.
                lag: replication
                    .iter()
                    .filter(|(id, _)| **id == self.me.id.0 || heard(id))
                    .filter_map(|(id, at)| Some((*id, last.saturating_sub((*at)?.index))))
                    .collect(),
            })
        });
        view.ok_or_else(|| self.not_leader())
    }

    fn not_leader(&self) -> MembersError {
        let leader = self.leadership.borrow().leader;
        MembersError::NotLeader { leader: leader.filter(|leader| *leader != self.me) }
    }

    /// See [`super::Group::set_members`].
    pub(super) async fn set_members(&self, goal: Goal<'_>, deadline: Instant) -> Result<(), MembersError> {
        let nodes: BTreeMap<u64, NodeId> = goal.target.iter().map(|replica| (replica.id.0, replica.node)).collect();
        if nodes.is_empty() || nodes.len() != goal.target.len() {
            return Err(MembersError::Refused("the target is empty or names a replica twice".into()));
        }
        loop {
            self.rouse(deadline).await;
            let view = self.view()?;
            let step = match next_step(&view, self.me.id.0, &nodes) {
                _ if !view.committed => None,
                Step::Done if goal.after.is_none_or(|after| view.index() > after) => return Ok(()),
                // Its successor goes on: it steps down by itself, and may not change members until then.
                _ if view.lacks(self.me.id) => None,
                _ if !view.allowed_by(&goal, self.changing.lock().as_ref()) => Some(tidy(&view)?),
                Step::Done => Some(Step::Flatten),
                step => Some(step),
            };
            let conditions = [
                Precondition::LastMembershipLogId { last_membership_log_id: view.at },
                Precondition::CommittedLeaderId { committed_leader_id: view.leader.leader_id },
            ];
            let change = match step {
                // The change of before has to be committed first.
                None | Some(Step::Done) | Some(Step::CatchUp(_)) => {
                    if Instant::now() >= deadline {
                        return Err(MembersError::Timeout);
                    }
                    sleep(POLL_EVERY).await;
                    continue;
                }
                Some(Step::HandOver(to)) => {
                    self.transfer(ReplicaId(to)).await?;
                    let leader = nodes.get(&to).map(|node| Replica { id: ReplicaId(to), node: *node });
                    return Err(MembersError::NotLeader { leader });
                }
                Some(Step::Flatten) => ChangeMembers::AddVoterIds(BTreeSet::new()),
                Some(Step::AddLearner(replica)) => ChangeMembers::AddNodes([(replica.id.0, replica.node)].into()),
                Some(Step::SetVoters(voters)) => ChangeMembers::ReplaceAllVoters(voters),
                Some(Step::Remove(replicas)) => ChangeMembers::RemoveNodes(replicas),
            };
            let raft = self.raft.clone();
            let changed =
                detached(
                    async move { raft.change_membership_if(change, false, conditions).await.map(|done| done.log_id) },
                );
            match timeout_at(deadline, changed).await {
                Err(_elapsed) => return Err(MembersError::Timeout),
                Ok(changed) => {
                    let way = changed.as_ref().ok().map(|at| Way { at: *at, target: goal.target.to_vec() });
                    *self.changing.lock() = way;
                    self.judge(changed, deadline).await?;
                }
            }
        }
    }

    /// Whether to look again after a change.
    async fn judge(&self, changed: Changed, deadline: Instant) -> Result<(), MembersError> {
        match changed {
            Ok(_) => Ok(()),
            Err(RaftError::Fatal(_)) => Err(MembersError::Stopped),
            // Without a quorum of late, as after an election: wait for it. The view says if another leads.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_) | ClientWriteError::LogEntryDiscarded(_)))
            // Somebody else changes the members: see what became of it.
            | Err(RaftError::APIError(ClientWriteError::PreconditionFailed(_) | ClientWriteError::ChangeMembershipError(_)))
                if Instant::now() < deadline =>
            {
                sleep(POLL_EVERY).await;
                Ok(())
            }
            Err(RaftError::APIError(error)) => {
                tracing::debug!(group = %self.group, %error, "members not changed");
                Err(MembersError::Timeout)
            }
        }
    }

    /// See [`super::Group::transfer`].
    pub(super) async fn transfer(&self, to: ReplicaId) -> Result<(), MembersError> {
        self.rouse(Instant::now() + TRANSFER_DEADLINE).await;
        let view = self.view()?;
        if to == self.me.id {
            return Ok(());
        }
        if !view.membership.voter_ids().any(|voter| voter == to.0) {
            return Err(MembersError::Refused(format!("{to} is not a voter")));
        }
        // There is no way back from a transfer but an election.
        if view.lag.get(&to.0).is_none_or(|lag| *lag > LAG_MAX) {
            return Err(MembersError::Refused(format!("{to} has not caught up")));
        }
        let raft = self.raft.clone();
        let asked = detached(async move { raft.trigger().transfer_leader(to.0).await });
        match timeout_at(Instant::now() + TRANSFER_DEADLINE, asked).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_stopped)) => Err(MembersError::Stopped),
            Err(_elapsed) => Err(MembersError::Timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::log_id;

    fn view(configs: &[&[u64]], learners: &[u64], lag: &[(u64, u64)]) -> View {
        let configs: Vec<BTreeSet<u64>> = configs.iter().map(|config| config.iter().copied().collect()).collect();
        let ids = configs.iter().flatten().chain(learners).copied();
        let nodes: BTreeMap<u64, NodeId> = ids.map(|id| (id, NodeId(id))).collect();
        let membership = Membership::new(configs, nodes).unwrap();
        View { membership, at: None, committed: true, leader: log_id(1, 1, 0), lag: lag.iter().copied().collect() }
    }

    fn step(view: &View, target: &[u64]) -> Step {
        next_step(view, 1, &target.iter().map(|id| (*id, NodeId(*id))).collect())
    }

    #[test]
    fn steps_lead_from_one_replica_to_three_and_to_others() {
        let set = |ids: &[u64]| ids.iter().copied().collect::<BTreeSet<u64>>();
        let three = Replica { id: ReplicaId(2), node: NodeId(2) };
        assert_eq!(step(&view(&[&[1]], &[], &[]), &[1]), Step::Done);
        assert_eq!(step(&view(&[&[1]], &[], &[]), &[1, 2]), Step::AddLearner(three));
        assert_eq!(step(&view(&[&[1]], &[2], &[]), &[1, 2]), Step::CatchUp(set(&[2])));
        assert_eq!(step(&view(&[&[1]], &[2], &[(2, LAG_MAX + 1)]), &[1, 2]), Step::CatchUp(set(&[2])));
        assert_eq!(step(&view(&[&[1]], &[2], &[(2, LAG_MAX)]), &[1, 2]), Step::SetVoters(set(&[1, 2])));
        assert_eq!(step(&view(&[&[1], &[1, 2]], &[], &[]), &[1, 2]), Step::Flatten);
        assert_eq!(step(&view(&[&[1, 2]], &[9], &[]), &[1, 2]), Step::Remove(set(&[9])));
        assert_eq!(step(&view(&[&[1, 2]], &[], &[(2, 0)]), &[2]), Step::HandOver(2), "the leader leaves last");
        assert_eq!(
            step(&view(&[&[1]], &[2], &[(2, 0)]), &[2]),
            Step::SetVoters(set(&[2])),
            "nobody to hand over to yet"
        );
    }
}
