//! What a caller knows of where partitions live: a map and the leaders heard of.
//!
//! Invariants:
//! * the map's version never goes back, and a map of another cluster is never taken;
//! * of two leaders of a partition the one of the higher term is believed; one term can have several, one after the
//!   other, each of a higher replica id than the one before.

use crate::{
    error::Hint,
    key::{Epoch, KeyKind, KeyspaceId, Layout, NodeId, PartitionId, Replica, ReplicaId, Span},
    placement::{Fit, Keyspace, Map, MapDelta, Node, Partition, Phase, Standing},
    proto::v1,
};
use arc_swap::ArcSwap;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::Notify;

/// Who leads a partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leader {
    /// Its node.
    pub node: NodeId,
    /// The term in which it leads.
    pub term: u64,
}

/// The routing table: read by every request, without waiting.
#[derive(Debug, Default)]
pub struct Routing {
    map: ArcSwap<Map>,
    leaders: RwLock<BTreeMap<PartitionId, Leader>>,
    /// Serializes changes of the map.
    changing: Mutex<()>,
    /// Counts changes of the map and of leaders.
    changes: AtomicU64,
    /// Wakes in the order of waiting, unlike a watch channel: two runs under one seed must not differ.
    changed: Notify,
}

impl Routing {
    /// A table that knows nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A table that begins with this map.
    #[must_use]
    pub fn of(map: Map) -> Self {
        Self { map: ArcSwap::from_pointee(map), ..Self::default() }
    }

    /// Every leader last heard of.
    #[must_use]
    pub fn leaders(&self) -> BTreeMap<PartitionId, Leader> {
        self.leaders.read().clone()
    }

    /// How often the map or a leader has changed: what to hand to [`Self::changed_since`].
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Waits until the map or a leader has changed after [`Self::changes`] was `seen`.
    pub async fn changed_since(&self, seen: u64) {
        self.wait(|| self.changes() != seen).await;
    }

    /// The newest map.
    #[must_use]
    pub fn map(&self) -> Arc<Map> {
        self.map.load_full()
    }

    /// The newest map, for the duration of a look.
    pub(crate) fn look(&self) -> arc_swap::Guard<Arc<Map>> {
        self.map.load()
    }

    /// Takes a map if it is newer than the one held and of the same cluster. Returns whether it was taken.
    pub fn set_map(&self, map: Arc<Map>) -> bool {
        let _changing = self.changing.lock();
        let held = self.map.load();
        let foreign = held.version() > 0 && held.cluster_id() != map.cluster_id();
        if foreign || map.version() <= held.version() {
            return false;
        }
        self.put(map);
        true
    }

    /// Applies a change of the map.
    pub fn apply(&self, delta: MapDelta) -> Fit {
        let _changing = self.changing.lock();
        let mut map = Map::clone(&self.map.load());
        let fit = map.apply(delta);
        if fit == Fit::Applied {
            self.put(Arc::new(map));
        }
        fit
    }

    fn put(&self, map: Arc<Map>) {
        // Who leads a partition may be heard before a map names it: a child's leader knows that it leads before anybody.
        let held = self.look();
        self.leaders.write().retain(|id, _| map.partition(*id).is_some() || held.partition(*id).is_none());
        drop(held);
        self.map.store(map);
        self.tell();
    }

    /// Applies one message of `Topology.Watch`; `from_version` is the version of the message before on the same stream.
    pub fn apply_update(&self, update: v1::TopologyUpdate, from_version: u64) -> Fit {
        let hints: Vec<Hint> = update.leaders.iter().map(|hint| Hint::from(*hint)).collect();
        let carried: Vec<Hint> = update.partitions.iter().map(|p| hint_of(p, update.map_version)).collect();
        let only_leaders = !update.full && update.map_version <= from_version;
        let fit = if only_leaders { Fit::Old } else { self.apply(delta_of(update, from_version)) };
        if fit != Fit::OtherCluster {
            carried.iter().chain(&hints).for_each(|hint| {
                self.learn(hint);
            });
        }
        fit
    }

    /// Takes a hint about a leader. Returns whether it was news.
    pub fn learn(&self, hint: &Hint) -> bool {
        let Some(node) = hint.leader else { return false };
        let news = Leader { node, term: hint.term };
        let is_news =
            |held: Leader| held != news && self.order(hint.partition, held) <= self.order(hint.partition, news);
        if !self.leader(hint.partition).is_none_or(is_news) {
            return false;
        }
        let mut leaders = self.leaders.write();
        if !leaders.get(&hint.partition).copied().is_none_or(is_news) {
            return false;
        }
        leaders.insert(hint.partition, news);
        drop(leaders);
        self.tell();
        true
    }

    /// Orders the leaders of a partition in time, as the votes of their replicas do.
    fn order(&self, partition: PartitionId, leader: Leader) -> (u64, Option<ReplicaId>) {
        let replica = self.look().partition(partition).and_then(|partition| partition.replica_on(leader.node));
        (leader.term, replica.map(|replica| replica.id))
    }

    /// The leader last heard of.
    #[must_use]
    pub fn leader(&self, partition: PartitionId) -> Option<Leader> {
        self.leaders.read().get(&partition).copied()
    }

    /// Waits until the map is newer than `version`.
    pub async fn newer_than(&self, version: u64) {
        self.wait(|| self.look().version() > version).await;
    }

    fn tell(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    async fn wait(&self, reached: impl Fn() -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if reached() {
                return;
            }
            changed.await;
        }
    }
}

fn hint_of(partition: &v1::Partition, map_version: u64) -> Hint {
    Hint {
        partition: PartitionId(partition.id),
        leader: (partition.leader != 0).then_some(NodeId(partition.leader)),
        term: partition.term,
        map_version,
    }
}

/// An update as a change of the map. What clients are not told (targets, phases) is filled with the state at rest.
fn delta_of(update: v1::TopologyUpdate, from_version: u64) -> MapDelta {
    MapDelta {
        cluster_id: update.cluster_id,
        from_version: (!update.full).then_some(from_version),
        to_version: update.map_version,
        nodes: update.nodes.into_iter().map(node_of).collect(),
        keyspaces: update.keyspaces.into_iter().map(keyspace_of).collect(),
        partitions: update.partitions.into_iter().map(partition_of).collect(),
        keyspaces_removed: update.keyspaces_removed.into_iter().map(KeyspaceId).collect(),
        partitions_removed: update.partitions_removed.into_iter().map(PartitionId).collect(),
    }
}

fn node_of(node: v1::Node) -> Node {
    let weight_milli = (node.weight * 1_000.0).round() as u32;
    Node {
        id: NodeId(node.id),
        uuid: node.uuid,
        address: node.address,
        zone: node.zone,
        weight_milli,
        ephemeral: false,
        standing: Standing::Active,
    }
}

fn keyspace_of(keyspace: v1::Keyspace) -> Keyspace {
    let kind = match keyspace.keys() {
        v1::KeyKind::Integer => KeyKind::Integer { max: keyspace.max },
        v1::KeyKind::Unspecified | v1::KeyKind::Bytes => KeyKind::Bytes,
    };
    let layout = match keyspace.layout() {
        v1::Layout::Hashed => Layout::Hashed,
        v1::Layout::Unspecified | v1::Layout::Ordered => Layout::Ordered,
    };
    Keyspace { id: KeyspaceId(keyspace.id), name: keyspace.name, kind, layout, replicas: keyspace.replicas }
}

fn partition_of(partition: v1::Partition) -> Partition {
    let members: Vec<Replica> = partition
        .replicas
        .iter()
        .map(|replica| Replica { id: ReplicaId(replica.replica), node: NodeId(replica.node) })
        .collect();
    let epoch = partition.epoch.unwrap_or_default();
    let span = Span::new(partition.start, (!partition.end.is_empty()).then_some(partition.end));
    Partition {
        id: PartitionId(partition.id),
        keyspace: KeyspaceId(partition.keyspace),
        birth: span.clone(),
        span,
        cut: None,
        merge: None,
        epoch: Epoch { bounds: epoch.bounds, members: epoch.members },
        initializer: members.first().map_or(ReplicaId(0), |replica| replica.id),
        target: members.clone(),
        members,
        phase: Phase::Active,
        leaving: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(version: u64, partitions: &[(u64, &str, &str)]) -> v1::TopologyUpdate {
        v1::TopologyUpdate {
            map_version: version,
            full: true,
            cluster_id: "c".into(),
            keyspaces: vec![v1::Keyspace { id: 1, name: "default".into(), ..Default::default() }],
            partitions: partitions
                .iter()
                .map(|(id, start, end)| v1::Partition {
                    id: *id,
                    keyspace: 1,
                    start: start.to_string().into(),
                    end: end.to_string().into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }

    fn hint(leader: u64, term: u64) -> Hint {
        Hint { partition: PartitionId(1), leader: Some(NodeId(leader)), term, map_version: 0 }
    }

    #[test]
    fn a_split_seen_by_watch_moves_keys() {
        let routing = Routing::new();
        assert_eq!(routing.apply_update(update(1, &[(1, "", "")]), 0), Fit::Applied);
        let split = v1::TopologyUpdate { full: false, ..update(2, &[(1, "", "m"), (2, "m", "")]) };
        assert_eq!(routing.apply_update(split, 1), Fit::Applied);
        let map = routing.map();
        assert_eq!(map.locate(KeyspaceId(1), b"a").unwrap().id, PartitionId(1));
        assert_eq!(map.locate(KeyspaceId(1), b"z").unwrap().id, PartitionId(2));
        assert_eq!(routing.apply_update(update(1, &[(1, "", "")]), 0), Fit::Old, "the map does not go back");
        let foreign = v1::TopologyUpdate { cluster_id: "d".into(), ..update(9, &[(1, "", "")]) };
        assert_eq!(routing.apply_update(foreign, 0), Fit::OtherCluster);
    }

    #[test]
    fn the_leader_of_the_higher_term_is_believed() {
        let routing = Routing::new();
        assert!(routing.learn(&hint(1, 5)));
        assert!(!routing.learn(&hint(2, 4)));
        assert!(routing.learn(&hint(3, 6)));
        assert_eq!(routing.leader(PartitionId(1)), Some(Leader { node: NodeId(3), term: 6 }));
        assert!(!routing.learn(&Hint { leader: None, ..hint(0, 9) }));
    }

    #[test]
    fn of_the_leaders_of_one_term_the_one_of_the_higher_replica_came_last() {
        let replica = |replica, node| v1::Replica { replica, node };
        let partition =
            v1::Partition { id: 1, keyspace: 1, replicas: vec![replica(7, 1), replica(8, 2)], ..Default::default() };
        let routing = Routing::new();
        let _ = routing.apply_update(v1::TopologyUpdate { partitions: vec![partition], ..update(1, &[]) }, 0);
        assert!(routing.learn(&hint(1, 5)));
        assert!(routing.learn(&hint(2, 5)));
        assert!(!routing.learn(&hint(1, 5)), "its notice is late");
        assert!(!routing.learn(&hint(9, 5)), "it is no member any more");
        assert_eq!(routing.leader(PartitionId(1)), Some(Leader { node: NodeId(2), term: 5 }));
        assert!(routing.learn(&hint(1, 6)));
    }

    #[test]
    fn a_leader_heard_of_before_the_map_is_kept_and_one_of_a_partition_that_is_gone_is_not() {
        let routing = Routing::new();
        let _ = routing.apply_update(update(1, &[(2, "", "")]), 0);
        assert!(routing.learn(&hint(7, 1)), "of a partition that no map has named yet");
        let _ = routing.apply_update(update(2, &[(2, "", "")]), 0);
        assert_eq!(routing.leader(PartitionId(1)).unwrap().node, NodeId(7));
        let _ = routing.apply_update(update(3, &[(2, "", "m"), (1, "m", "")]), 0);
        assert_eq!(routing.leader(PartitionId(1)).unwrap().node, NodeId(7));
        let _ = routing.apply_update(update(4, &[(2, "", "")]), 0);
        assert_eq!(routing.leader(PartitionId(1)), None);
    }

    #[test]
    fn leaders_travel_without_a_new_map() {
        let routing = Routing::new();
        let _ = routing.apply_update(update(3, &[(1, "", "")]), 0);
        let leaders = vec![v1::RouteHint { partition: 1, leader: 4, term: 2, map_version: 3 }];
        let only = v1::TopologyUpdate { map_version: 3, cluster_id: "c".into(), leaders, ..Default::default() };
        assert_eq!(routing.apply_update(only, 3), Fit::Old);
        assert_eq!(routing.leader(PartitionId(1)).unwrap().node, NodeId(4));
    }

    #[tokio::test]
    async fn waiting_for_a_newer_map_ends_when_it_comes() {
        let routing = Arc::new(Routing::new());
        let waiting = crate::env::spawn({
            let routing = Arc::clone(&routing);
            async move { routing.newer_than(1).await }
        });
        let _ = routing.apply_update(update(1, &[(1, "", "")]), 0);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let _ = routing.apply_update(update(2, &[(1, "", "")]), 1);
        waiting.await.unwrap();
    }
}
