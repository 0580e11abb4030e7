//! What a node does for the groups that it leads: it tells everybody that it leads them, brings their members to what
//! the map asks for, and reports to the placement driver what they have become.

use super::{Node, liveness, merging};
use crate::{
    error::Hint,
    key::{DRIVER, NodeId, PartitionId, Replica},
    placement::{self, Command, Map, Phase},
    raft::{Goal, Group, Machine, Role, Status},
    telemetry,
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// A group at odds with the map is looked at again after this long.
const STEWARD_EVERY: Duration = Duration::from_millis(500);
/// Patience with one change of members.
const MEMBERS_DEADLINE: Duration = Duration::from_secs(30);
/// Patience with one report.
const REPORT_DEADLINE: Duration = Duration::from_secs(3);
/// Groups whose members are changed at the same time by one node.
const CHANGES_AT_ONCE: usize = 4;
/// Groups for which anything else is done at the same time by one node.
const JOBS_AT_ONCE: usize = 64;
/// Every so many pings a node also repeats which partitions it leads, in case a notice was lost.
const NOTICE_EVERY_PINGS: u64 = 20;
/// Partitions named in one notice.
const NOTICE_MAX: usize = 4096;

/// Takes "I lead these partitions".
pub(super) struct LeaderService(pub(super) Weak<Node>);

impl Service for LeaderService {
    fn handle(&self, from: NodeId, mut body: Bytes, _reply: Reply) {
        let Some(node) = self.0.upgrade() else { return };
        while let (Ok(partition), Ok(term)) = (body.try_get_u64(), body.try_get_u64()) {
            node.learn_leader(PartitionId(partition), from, term);
        }
    }
}

/// Follows the leadership of one group for as long as it runs.
pub(super) async fn watch_leadership<M: Machine>(node: Weak<Node>, group: Group<M>) {
    let id = group.id();
    let mut leadership = group.watch_leadership();
    loop {
        let now = *leadership.borrow_and_update();
        let Some(this) = node.upgrade() else { return };
        if let Some(leader) = now.leader {
            this.learn_leader(id, leader.node, now.term);
            if leader == group.replica() {
                metrics::counter!(telemetry::RAFT_LEADER_CHANGES_TOTAL).increment(1);
                this.announce(&[(id, now.term)], None);
                this.stewarding.notify_one();
            }
        }
        if group.is_stopping() {
            // By itself, perhaps: then it has to be opened again.
            this.map_changed.notify_one();
            return;
        }
        drop(this);
        if leadership.changed().await.is_err() {
            return;
        }
    }
}

/// Pings the others, and greets those that come back with what this node leads.
pub(super) async fn ping(node: Weak<Node>) {
    let mut alive = BTreeSet::new();
    let mut ticks = interval(liveness::PING_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count: u64 = 0;
    loop {
        ticks.tick().await;
        let Some(this) = node.upgrade() else { return };
        let map = this.routing.map();
        let others =
            map.nodes().values().filter(|node| node.id != this.id() && node.standing.is_present()).map(|node| node.id);
        let others: Vec<_> = others.collect();
        this.look_at_memory();
        this.liveness.ping(others.iter().copied(), this.admission.is_full());
        let now: BTreeSet<_> = others.into_iter().filter(|id| this.liveness.is_alive(*id)).collect();
        count += 1;
        let repeat = count.is_multiple_of(NOTICE_EVERY_PINGS);
        let greeted: Vec<_> =
            if repeat { now.iter().copied().collect() } else { now.difference(&alive).copied().collect() };
        if !greeted.is_empty() {
            let led = this.led();
            for to in greeted {
                this.announce(&led, Some(to));
            }
        }
        alive = now;
        this.gauge();
    }
}

/// Brings led groups to their targets and reports them. One that takes long, as its new member is out of contact, keeps
/// none of the others waiting.
pub(super) async fn run(node: Weak<Node>) {
    let mut jobs = FuturesUnordered::new();
    let mut under_way = UnderWay::default();
    loop {
        let Some(this) = node.upgrade() else { return };
        for id in under_way.admit(this.at_odds()) {
            let this = Arc::clone(&this);
            jobs.push(async move {
                this.settle(id).await;
                id
            });
        }
        let stewarding = Arc::clone(&this.stewarding);
        drop(this);
        let idle = jobs.is_empty();
        let mut again = std::pin::pin!(async {
            let notified = stewarding.notified();
            if idle {
                notified.await;
            } else {
                let _either = timeout(STEWARD_EVERY, notified).await;
            }
        });
        // What has ended without success is not begun again at once.
        loop {
            tokio::select! {
                biased;
                Some(id) = jobs.next(), if !jobs.is_empty() => under_way.end(id),
                () = &mut again => break,
            }
        }
    }
}

/// Which groups are being seen to.
#[derive(Debug, Default)]
struct UnderWay {
    /// With true, their members are being changed.
    groups: BTreeMap<PartitionId, bool>,
    /// The last one begun: the next round begins behind it, so that those that fail again and again give way.
    last: PartitionId,
}

impl UnderWay {
    /// Which of these to begin with now; with true, a change of members.
    fn admit(&mut self, mut odds: Vec<(PartitionId, bool)>) -> Vec<PartitionId> {
        let last = self.last;
        odds.sort_by_key(|(id, _)| (*id <= last, *id));
        let mut begun = Vec::new();
        for (id, changes) in odds {
            let most = if changes { CHANGES_AT_ONCE } else { JOBS_AT_ONCE };
            let same_kind = self.groups.values().filter(|other| **other == changes).count();
            if same_kind >= most || self.groups.contains_key(&id) {
                continue;
            }
            self.groups.insert(id, changes);
            self.last = id;
            begun.push(id);
        }
        begun
    }

    fn end(&mut self, id: PartitionId) {
        self.groups.remove(&id);
    }
}

/// What a led group has to do.
enum Odds {
    /// This node should not lead it, and another can.
    HandOver(Replica),
    /// Its members are not yet what the map asks for, or may still be changed to what it no longer asks for: they have
    /// to be written again, after the index.
    Members(Vec<Replica>, Option<u64>),
    /// Its members are not what the map says they are.
    Report(u64, Vec<Replica>),
    /// The same, but they are not committed yet. Nobody says when they are: it is looked at again.
    Uncommitted,
    /// The map asks for a cut.
    Cut,
    /// It was split off this partition, and the map does not name it yet.
    Born(PartitionId),
    /// It is being merged with a neighbour, or was to be.
    Merge(merging::Step),
}

impl Node {
    /// Partitions led here, with their terms.
    pub(super) fn led(&self) -> Vec<(PartitionId, u64)> {
        let mut led: Vec<_> = self
            .partitions()
            .iter()
            .filter(|partition| partition.group().is_leader())
            .map(|partition| (partition.id, partition.group().leadership().term))
            .collect();
        if let Some(driver) = self.driver_group().filter(Group::is_leader) {
            led.push((DRIVER, driver.leadership().term));
        }
        led
    }

    /// Takes news of a leader.
    fn learn_leader(&self, partition: PartitionId, node: NodeId, term: u64) {
        self.routing.learn(&Hint { partition, leader: Some(node), term, map_version: 0 });
    }

    /// Tells one node, or every node, that this one leads these partitions.
    fn announce(&self, led: &[(PartitionId, u64)], to: Option<NodeId>) {
        let to: Vec<NodeId> = match to {
            Some(to) => vec![to],
            None => self.routing.map().nodes().keys().copied().filter(|id| *id != self.id()).collect(),
        };
        for notices in led.chunks(NOTICE_MAX) {
            let mut body = BytesMut::with_capacity(notices.len() * 16);
            for (partition, term) in notices {
                body.put_u64(partition.0);
                body.put_u64(*term);
            }
            let body = body.freeze();
            for node in &to {
                // A lost notice is repeated with a later ping, and a wrong guess is answered with a hint.
                let _lost = self.endpoint.cast(*node, Kind::Leader, body.clone());
            }
        }
    }

    /// Led groups that differ from the map; with true, their members have to be changed.
    fn at_odds(&self) -> Vec<(PartitionId, bool)> {
        let map = self.routing.map();
        let mut ids: Vec<_> = self.partitions().iter().map(|partition| partition.id).collect();
        ids.push(DRIVER);
        let odds = |id| Some((id, matches!(self.odds(&map, id)?, Odds::Members(..))));
        ids.into_iter().filter_map(odds).collect()
    }

    fn odds(&self, map: &Map, id: PartitionId) -> Option<Odds> {
        let status = self.status_of(id)?;
        if status.role != Role::Leader {
            return None;
        }
        let Some(partition) = map.partition(id) else { return Self::parent_of(map, id).map(Odds::Born) };
        if let Some(to) = self.resigns(map).then(|| self.successor(map, &status)).flatten() {
            return Some(Odds::HandOver(to));
        }
        // Before members, which may take long: clients wait for it.
        if let Some(step) = self.merge_step(map, partition) {
            return Some(Odds::Merge(step));
        }
        let set = |replicas: &[Replica]| replicas.iter().copied().collect::<BTreeSet<_>>();
        let settled = !status.joint && status.learners.is_empty();
        let reached = settled && set(&status.voters) == set(&partition.target);
        // A membership that the driver has not heard of is reported before it is changed again: see `may_change`.
        let unreported = status.members_at > partition.epoch.members || partition.phase != Phase::Active;
        if settled && unreported {
            return Some(if status.members_committed {
                Odds::Report(status.members_at, status.voters)
            } else {
                Odds::Uncommitted
            });
        }
        let doubtful = !partition.leaving.is_empty();
        if !reached || doubtful {
            return Some(Odds::Members(partition.target.clone(), doubtful.then_some(partition.epoch.members)));
        }
        self.is_to_be_cut(partition).then_some(Odds::Cut)
    }

    /// Whether the map asks for a cut that the log has not decided.
    fn is_to_be_cut(&self, partition: &placement::Partition) -> bool {
        let undecided = |here: Arc<super::Partition>| {
            here.group().read(|machine, _| machine.store().epoch()) == partition.epoch.bounds
        };
        partition.cut.is_some() && self.partition(partition.id).is_some_and(undecided)
    }

    fn status_of(&self, id: PartitionId) -> Option<Status> {
        if id == DRIVER {
            return self.driver_group().map(|group| group.status());
        }
        self.partition(id).map(|partition| partition.group().status())
    }

    /// Does the next thing for one led group.
    async fn settle(&self, id: PartitionId) {
        // What is to be done belongs to the map that it follows from.
        let map = self.routing.map();
        match self.odds(&map, id) {
            None | Some(Odds::Uncommitted) => {}
            Some(Odds::Cut) => self.propose_cut(&map, id).await,
            Some(Odds::Born(parent)) => self.report_child(parent, id).await,
            Some(Odds::Merge(step)) => self.take_step(&map, id, step).await,
            Some(Odds::HandOver(to)) => self.ask_successor(id, to).await,
            Some(Odds::Members(target, after)) => {
                tracing::info!(partition = %id, ?target, "changing members");
                let deadline = Instant::now() + MEMBERS_DEADLINE;
                let allows = |settled_at: Option<u64>| {
                    let map = self.routing.map();
                    let now = map.partition(id).filter(|now| now.target == target);
                    now.is_some_and(|now| settled_at.is_none_or(|at| now.may_change(at)))
                };
                let goal = Goal { target: &target, after, allows: &allows };
                let done = if id == DRIVER {
                    let Some(group) = self.driver_group() else { return };
                    group.set_members(goal, deadline).await
                } else {
                    let Some(partition) = self.partition(id) else { return };
                    partition.group().set_members(goal, deadline).await
                };
                match done {
                    Ok(()) => self.stewarding.notify_one(),
                    Err(error) => tracing::info!(partition = %id, %error, "members are not changed yet"),
                }
            }
            Some(Odds::Report(members_epoch, members)) => {
                let report = Command::Report { partition: id, members_epoch, members };
                if let Err(error) = self.drive(&report, Instant::now() + REPORT_DEADLINE).await {
                    tracing::info!(partition = %id, %error, "members are not reported yet");
                }
            }
        }
    }

    /// Tells the budgets how much this node holds.
    fn look_at_memory(&self) {
        let (mut rows, mut row_bytes, mut log_bytes) = (0, 0, 0);
        for partition in self.partitions() {
            let group = partition.group();
            let (more_rows, more_bytes) =
                group.read(|m, _| (m.store().rows(), m.store().bytes() + m.store().session_bytes()));
            rows += more_rows;
            row_bytes += more_bytes;
            log_bytes += group.log_held_bytes();
        }
        self.admission.holds(rows, row_bytes, log_bytes);
    }

    /// Publishes what this node holds.
    fn gauge(&self) {
        let (mut leaders, mut others, mut asleep, mut bytes, mut rows, mut lag) = (0_u32, 0_u32, 0_u32, 0, 0, 0);
        for partition in self.partitions() {
            if partition.group().is_asleep() {
                asleep += 1;
            } else if partition.group().is_leader() {
                leaders += 1;
                lag = lag.max(partition.group().status().lag.into_values().max().unwrap_or(0));
            } else {
                others += 1;
            }
            let (more_bytes, more_rows) = partition.group().read(|m, _| (m.store().bytes(), m.store().rows()));
            bytes += more_bytes;
            rows += more_rows;
        }
        metrics::gauge!(telemetry::RAFT_GROUPS, "state" => "leader").set(leaders);
        metrics::gauge!(telemetry::RAFT_GROUPS, "state" => "follower").set(others);
        metrics::gauge!(telemetry::RAFT_GROUPS, "state" => "asleep").set(asleep);
        metrics::gauge!(telemetry::MEM_BYTES, "kind" => "rows").set(bytes as f64);
        metrics::gauge!(telemetry::ROWS).set(rows as f64);
        metrics::gauge!(telemetry::RAFT_LOG_LAG_ENTRIES).set(lag as f64);
        let map = self.routing.map();
        let lost = map.partitions().values().filter(|partition| self.liveness.quorum_lost(&partition.members)).count();
        metrics::gauge!(telemetry::PARTITIONS_WITHOUT_QUORUM).set(lost as f64);
        let health = self.health();
        metrics::gauge!(telemetry::PARTITIONS_LEADERLESS).set(health.leaderless.len() as f64);
        metrics::gauge!(telemetry::PARTITIONS_UNDERREPLICATED).set(health.underreplicated.len() as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_or_fails_again_and_again_keeps_nothing_waiting() {
        let mut under_way = UnderWay::default();
        let ids = |ids: &[u64]| ids.iter().map(|id| PartitionId(*id)).collect::<Vec<_>>();
        let changes = |ids: &[u64]| ids.iter().map(|id| (PartitionId(*id), true)).collect::<Vec<_>>();
        let all = [1, 2, 3, 4, 5, 6];
        assert_eq!(under_way.admit(changes(&all)), ids(&[1, 2, 3, 4]), "so many at once");
        let mut odds = changes(&all);
        odds.push((PartitionId(7), false));
        assert_eq!(under_way.admit(odds), ids(&[7]), "a report waits for no change of members");
        under_way.end(PartitionId(1));
        under_way.end(PartitionId(7));
        assert_eq!(under_way.admit(changes(&all)), ids(&[1]), "after 7 comes 1 again");
        under_way.end(PartitionId(1));
        assert_eq!(under_way.admit(changes(&all)), ids(&[5]), "not the one that has just failed");
        for id in 2..=5 {
            under_way.end(PartitionId(id));
        }
        assert_eq!(under_way.admit(changes(&all)), ids(&[6, 1, 2, 3]));
    }
}
