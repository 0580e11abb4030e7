//! Sleep: a group that nobody asks anything sends no heartbeats and runs no timers on any of its replicas.
//!
//! A leader whose group has been idle for a while names it in a message that goes from its node to each other node a few
//! times per second, one for all such groups. A replica that follows this leader and lacks nothing stops its timers and
//! agrees. When all have agreed, the leader stops its own. From then on these messages are all there is: whoever misses
//! them for one lease wakes and campaigns, and a leader that misses an agreement wakes and sends heartbeats, which wake
//! the others. What anybody asks of the leader wakes it, too.
//!
//! Safety does not rest on any of this: a sleeping leader's lease lapses as any other does, so it has to hear from a
//! quorum again before it answers anything, and votes are counted as ever.
//!
//! Invariants:
//! * a replica sleeps only while it hears from the leader, by these messages, or, as the leader, from all the others;
//! * a group sleeps only with settled members who have applied the same;
//! * a sleeping replica that hears of its leader promises nobody a vote, so that one that was away for a moment does
//!   not depose the leaders of all groups that sleep.

use super::{
    codec::{self, Damaged, Reader},
    config::RaftConfig,
    hub::{RaftHub, Sleepers},
    quiet::Quiet,
    types::{Raft, Types},
    watch,
};
use crate::{
    key::{NodeId, PartitionId, Replica, ReplicaId},
    plant::{Bug, planted},
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::join_all;
use openraft::{RaftMetrics, ServerState};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    sync::{
        Weak,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Messages per lease: so many less one may be lost in a row without anybody waking.
const MESSAGES_PER_LEASE: u32 = 4;

/// Groups named in one message.
const GROUPS_MAX: usize = 4096;

/// A group that may sleep, as its leader names it to another member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Named {
    group: PartitionId,
    leader: ReplicaId,
    to: ReplicaId,
    term: u64,
    /// Everything up to here is applied by all, and there is nothing after it.
    last: u64,
}

/// How awake a replica is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum State {
    Awake = 0,
    /// It leads, and its lease may have lapsed while it slept.
    Waking = 1,
    Asleep = 2,
}

struct Times {
    /// Nothing was asked since.
    idle_since: Instant,
    /// Until when the last message of the leader counts.
    heard_until: Instant,
    /// When the others last agreed, as this leader asked them.
    agreed: BTreeMap<u64, Instant>,
}

/// One replica's sleep.
pub(super) struct Sleeper {
    group: PartitionId,
    me: Replica,
    raft: Raft,
    quiet: Quiet,
    metrics: watch::Receiver<RaftMetrics<Types>>,
    lease: Duration,
    state: AtomicU8,
    touched: AtomicBool,
    times: Mutex<Times>,
}

impl Sleeper {
    pub(super) fn new(group: PartitionId, me: Replica, raft: &Raft, quiet: Quiet, lease: Duration) -> Self {
        let now = Instant::now();
        let times = Times { idle_since: now, heard_until: now, agreed: BTreeMap::new() };
        Self {
            group,
            me,
            raft: raft.clone(),
            quiet,
            metrics: raft.metrics(),
            lease,
            state: AtomicU8::new(State::Awake as u8),
            touched: AtomicBool::new(false),
            times: Mutex::new(times),
        }
    }

    fn is(&self, state: State) -> bool {
        self.state.load(Ordering::Acquire) == state as u8
    }

    pub(super) fn is_asleep(&self) -> bool {
        self.is(State::Asleep)
    }

    /// Notes that this replica is asked something as the leader. True if it may have slept, so that a quorum has to
    /// confirm it before it can do anything.
    pub(super) fn touch(&self) -> bool {
        // Most often it is set: a look is cheaper than a write that other cores have to hear of.
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Relaxed);
        }
        if self.is(State::Awake) {
            return false;
        }
        self.wake();
        self.is(State::Waking)
    }

    /// A quorum was asked for its confirmation.
    pub(super) fn confirmed(&self) {
        let _was =
            self.state.compare_exchange(State::Waking as u8, State::Awake as u8, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Takes part again, if it slept.
    pub(super) fn wake(&self) {
        if !self.is_asleep() {
            return;
        }
        let mut times = self.times.lock();
        if !self.is_asleep() {
            return;
        }
        times.idle_since = Instant::now();
        times.agreed.clear();
        self.quiet.restart();
        let leads = self.metrics.borrow().state == ServerState::Leader;
        let state = if leads { State::Waking } else { State::Awake };
        self.state.store(state as u8, Ordering::Release);
        self.raft.runtime_config().tick(true);
    }

    fn sleep(&self) {
        if !self.is_asleep() {
            self.state.store(State::Asleep as u8, Ordering::Release);
            self.raft.runtime_config().tick(false);
        }
    }

    /// Whether somebody who asks for the promise of a vote is to be ignored: the leader is there. One that sleeps itself
    /// wakes to say so.
    pub(super) fn keeps_leader(&self) -> bool {
        if !self.is_asleep() {
            return false;
        }
        let leads = self.metrics.borrow().state == ServerState::Leader;
        let heard = leads || Instant::now() < self.times.lock().heard_until;
        if leads || !heard {
            self.wake();
        }
        heard
    }

    /// Follows the leader's message: sleeps if there is nothing to wait for.
    fn follow(&self, named: &Named) -> bool {
        let ready = named.to == self.me.id && {
            let metrics = self.metrics.borrow();
            let index = Some(named.last);
            metrics.current_term == named.term
                && metrics.current_leader == Some(named.leader.0)
                && metrics.state == ServerState::Follower
                && metrics.last_log_index == index
                && metrics.local_committed.map(|at| at.index) == index
                && metrics.last_applied.map(|at| at.index) == index
        };
        if !ready {
            self.wake();
            return false;
        }
        let mut times = self.times.lock();
        times.heard_until = Instant::now() + self.lease;
        self.sleep();
        true
    }

    /// Wakes a follower that has not heard of its leader for too long.
    fn wake_unheard(&self) {
        if self.is_asleep() && self.times.lock().heard_until <= Instant::now() && !planted(Bug::SleepsOnAlone) {
            self.wake();
        }
    }

    /// As the leader: whom to tell that the group may sleep, none if it may not. Follows what the others agreed to.
    fn lead(&self, sleep_after: Duration) -> Vec<(NodeId, Named)> {
        let asked = self.touched.swap(false, Ordering::Relaxed);
        let Some(others) = self.settled() else {
            self.wake();
            self.times.lock().idle_since = Instant::now();
            return Vec::new();
        };
        let mut times = self.times.lock();
        let now = Instant::now();
        if asked {
            times.idle_since = now;
        }
        if now - times.idle_since < sleep_after && !self.is_asleep() {
            return Vec::new();
        }
        let agreed = |(_, named): &(NodeId, Named)| {
            times.agreed.get(&named.to.0).is_some_and(|at| now.duration_since(*at) < self.lease)
        };
        if others.iter().all(agreed) {
            self.sleep();
        } else if self.is_asleep() {
            drop(times);
            self.wake();
            return Vec::new();
        }
        others
    }

    /// As the leader: the others, if there is nothing left to do for any of them and all have answered of late. One that is
    /// heard and hears nothing must not keep the others from electing.
    fn settled(&self) -> Option<Vec<(NodeId, Named)>> {
        let metrics = self.metrics.borrow();
        let membership = metrics.membership_config.membership();
        let last = metrics.last_log_index?;
        let same = |at: Option<u64>| at == Some(last);
        let settled = metrics.state == ServerState::Leader
            && membership.get_joint_config().len() == 1
            && membership.voter_ids().count() == membership.nodes().count()
            && metrics.membership_config.log_id() == metrics.committed_membership_config.log_id()
            && same(metrics.local_committed.map(|at| at.index))
            && same(metrics.last_applied.map(|at| at.index));
        let replication = metrics.replication.as_ref().filter(|_| settled)?;
        let term = metrics.current_term;
        let answers = |id: &u64| {
            let at = metrics.heartbeat.as_ref().and_then(|heard| *heard.get(id)?);
            self.is_asleep() || at.is_some_and(|at| openraft::Instant::elapsed(&at.into_inner()) < self.lease)
        };
        let mut others = Vec::new();
        for (id, node) in membership.nodes().filter(|(id, _)| **id != self.me.id.0) {
            replication.get(id).filter(|at| same(at.map(|at| at.index)) && answers(id))?;
            let (group, leader, to) = (self.group, self.me.id, ReplicaId(*id));
            others.push((*node, Named { group, leader, to, term, last }));
        }
        Some(others)
    }

    fn take_answer(&self, named: &Named, agrees: bool) {
        let mut times = self.times.lock();
        if agrees {
            times.agreed.insert(named.to.0, Instant::now());
        } else {
            times.agreed.remove(&named.to.0);
            drop(times);
            self.wake();
        }
    }
}

/// Tells the other nodes which groups may sleep, and wakes those that should not, for as long as there is the hub.
pub(super) async fn run(hub: Weak<RaftHub>, config: RaftConfig) {
    let period = config.lease() / MESSAGES_PER_LEASE;
    let sleep_after = Duration::from_millis(config.sleep_after_ms);
    if sleep_after.is_zero() {
        return;
    }
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(hub) = hub.upgrade() else { return };
        let mut messages: BTreeMap<NodeId, Vec<Named>> = BTreeMap::new();
        for sleeper in hub.sleepers.read().values() {
            if sleeper.metrics.borrow().state == ServerState::Leader {
                for (node, named) in sleeper.lead(sleep_after) {
                    messages.entry(node).or_default().push(named);
                }
            } else {
                sleeper.wake_unheard();
            }
        }
        let calls = messages.iter().flat_map(|(node, all)| all.chunks(GROUPS_MAX).map(move |named| (*node, named)));
        let answers = calls.map(|(node, named)| {
            let answer = hub.endpoint.call(node, Kind::Sleep, encode(named), period);
            async move { (named, answer.await.unwrap_or_default()) }
        });
        for (named, answer) in join_all(answers).await {
            let sleepers = hub.sleepers.read();
            // Without an answer nothing is said; the agreements of before count for a while.
            for (named, agrees) in named.iter().zip(answer) {
                if let Some(sleeper) = sleepers.get(&named.group).filter(|sleeper| sleeper.me.id == named.leader) {
                    sleeper.take_answer(named, agrees == 1);
                }
            }
        }
    }
}

/// Takes the messages of leaders.
pub(super) struct SleepService(pub(super) Sleepers);

impl Service for SleepService {
    fn handle(&self, from: NodeId, body: Bytes, reply: Reply) {
        let named = match decode(body) {
            Ok(named) => named,
            Err(damaged) => {
                tracing::warn!(%from, %damaged, "message refused");
                return;
            }
        };
        let sleepers = self.0.read();
        let agrees = |named: &Named| sleepers.get(&named.group).is_some_and(|sleeper| sleeper.follow(named));
        reply.send(named.iter().map(|named| u8::from(agrees(named))).collect());
    }
}

fn encode(all: &[Named]) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + 4 + 40 * all.len());
    out.put_u8(codec::FORMAT);
    out.put_u32(u32::try_from(all.len()).expect("as many as GROUPS_MAX"));
    for named in all {
        for number in [named.group.0, named.leader.0, named.to.0, named.term, named.last] {
            out.put_u64(number);
        }
    }
    out.freeze()
}

fn decode(body: Bytes) -> Result<Vec<Named>, Damaged> {
    let mut reader = Reader::versioned("groups that may sleep", body)?;
    let count = reader.u32()?;
    let mut next = || -> Result<Named, Damaged> {
        Ok(Named {
            group: PartitionId(reader.u64()?),
            leader: ReplicaId(reader.u64()?),
            to: ReplicaId(reader.u64()?),
            term: reader.u64()?,
            last: reader.u64()?,
        })
    };
    let all = (0..count).map(|_| next()).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let named = |n| Named {
            group: PartitionId(n),
            leader: ReplicaId(n + 1),
            to: ReplicaId(n + 2),
            term: n + 3,
            last: n + 4,
        };
        let all = [named(1), named(10)];
        assert_eq!(decode(encode(&all)).unwrap(), all);
        assert!(decode(encode(&all).slice(..60)).is_err());
    }
}
