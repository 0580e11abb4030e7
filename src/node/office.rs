//! Handing over: a node that drains, leaves or stops passes the leadership of its groups on to others.
//!
//! Invariants:
//! * leadership goes to a voter that is in contact; the group itself refuses one that has not caught up;
//! * a node that drains or leaves passes nothing on to another that does: it would come back.

use super::Node;
use crate::{
    key::{DRIVER, PartitionId, Replica},
    placement::{Map, Standing},
    raft::{Group, Machine, MembersError, Status},
};
use futures_util::{StreamExt as _, stream};
use std::{sync::atomic::Ordering, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// Patience with handing over everything before a stop.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a successor may take to be elected.
const TAKE_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// Pause before a successor that lacks entries is asked again.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// Groups handed over at the same time.
const HANDOVERS_AT_ONCE: usize = 32;

impl Node {
    /// Whether this node should lead nothing.
    pub(super) fn resigns(&self, map: &Map) -> bool {
        let standing = map.node(self.id()).map(|node| node.standing);
        self.retiring.load(Ordering::Acquire) || matches!(standing, Some(Standing::Draining | Standing::Leaving))
    }

    /// Who should lead a group instead of this node; none if nobody can.
    pub(super) fn successor(&self, map: &Map, status: &Status) -> Option<Replica> {
        let standing = |replica: &Replica| map.node(replica.node).map(|node| node.standing);
        let leads_on = |replica: &Replica| standing(replica).is_some_and(Standing::takes_replicas);
        let last_resort = self.retiring.load(Ordering::Acquire);
        let fit = |replica: &&Replica| {
            replica.node != self.id() && self.liveness().is_alive(replica.node) && (leads_on(replica) || last_resort)
        };
        let lag = |replica: &Replica| status.lag.get(&replica.id).copied().unwrap_or(u64::MAX);
        status.voters.iter().filter(fit).min_by_key(|replica| (!leads_on(replica), lag(replica), replica.id)).copied()
    }

    /// Hands over the leadership of every group led here, for as long as that makes sense before a stop. From now on this
    /// node passes on whatever it is elected to.
    pub async fn hand_over(&self) {
        self.retiring.store(true, Ordering::Release);
        let deadline = Instant::now() + HAND_OVER_DEADLINE;
        let jobs = self.led().into_iter().map(|(id, _term)| self.pass_on(id, deadline));
        stream::iter(jobs).buffer_unordered(HANDOVERS_AT_ONCE).collect::<Vec<()>>().await;
    }

    async fn pass_on(&self, id: PartitionId, deadline: Instant) {
        if id == DRIVER {
            let Some(group) = self.driver_group() else { return };
            return self.pass_on_group(&group, deadline).await;
        }
        let Some(partition) = self.partition(id) else { return };
        self.pass_on_group(partition.group(), deadline).await;
    }

    async fn pass_on_group<M: Machine>(&self, group: &Group<M>, deadline: Instant) {
        let mut leadership = group.watch_leadership();
        while group.is_leader() && Instant::now() < deadline {
            let Some(to) = self.successor(&self.routing().map(), &group.status()) else { return };
            match group.transfer(to.id).await {
                // Or somebody asked before: then it is under way.
                Ok(()) | Err(MembersError::NotLeader { .. }) => break,
                // It lacks entries yet.
                Err(MembersError::Refused(_)) => sleep(ASK_EVERY).await,
                Err(_) => return,
            }
        }
        // Also when the steward has asked before: whoever comes here is to be told where to go.
        let taken = async {
            while leadership.borrow_and_update().leader.is_none_or(|leader| leader == group.replica()) {
                if leadership.changed().await.is_err() {
                    return;
                }
            }
        };
        let _late = timeout(TAKE_OVER_DEADLINE, taken).await;
    }

    /// Asks one successor to take over a group; whether it does is looked at again.
    pub(super) async fn ask_successor(&self, id: PartitionId, to: Replica) {
        tracing::info!(partition = %id, to = %to.node, "handing over its leadership");
        let asked = if id == DRIVER {
            let Some(group) = self.driver_group() else { return };
            group.transfer(to.id).await
        } else {
            let Some(partition) = self.partition(id) else { return };
            partition.group().transfer(to.id).await
        };
        if let Err(error) = asked {
            tracing::info!(partition = %id, %error, "its leadership is not handed over yet");
        }
    }
}
