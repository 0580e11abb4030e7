//! Which replicas run here: those that the map names and those that splits make here. One that stops by itself is opened
//! again.

use super::{DriverMachine, Node, Partition, PartitionMachine, driver, steward};
use crate::{
    env,
    error::{Error, Reason},
    key::{DRIVER, PartitionId, Replica},
    kv,
    placement::{self, Map, Phase},
    plant::{Bug, planted},
    raft::{Group, Machine, OpenError},
};
use std::{
    collections::BTreeSet,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::sleep;

/// Pause before a replica that could not be opened, or a map that could not be kept, is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// Follows the map: keeps it, then creates and retires replicas. One task, so that no two of these race.
pub(super) async fn run(node: Weak<Node>) {
    loop {
        let Some(this) = node.upgrade() else { return };
        let settled = follow(&this).await;
        if settled {
            let changed = this.map_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // What changed since `follow` began has left a permit behind, so nothing is missed.
            changed.await;
        } else {
            drop(this);
            sleep(RETRY_EVERY).await;
        }
    }
}

/// One pass; false when something has to be tried again.
async fn follow(node: &Arc<Node>) -> bool {
    let map = node.routing.map();
    if map.version() == 0 || node.is_stopping() {
        return true;
    }
    if *node.kept.borrow() < map.version() || map.version() == 0 {
        if !planted(Bug::MapNotKept)
            && let Err(error) = (node.keep_map)(&map)
        {
            tracing::error!(%error, "the map could not be kept; no replica is created or retired until it is");
            return false;
        }
        node.kept.send_replace(map.version());
    }
    let mut settled = node.deliver(&map).await;
    let wanted = wanted(&map, node);
    for (partition, replica) in &wanted {
        if let Err(error) = node.host(&map, partition, *replica).await {
            tracing::error!(partition = %partition.id, %replica.id, %error, "the replica could not be opened");
            settled = false;
        }
    }
    node.retire_unwanted(&wanted.iter().map(|(partition, _)| partition.id).collect(), map.version()).await;
    settled
}

/// What should run here: what the map names, and children that it does not name yet but whose seed is here.
fn wanted(map: &Map, node: &Node) -> Vec<(placement::Partition, Replica)> {
    let mine = |partition: &placement::Partition| partition.replica_on(node.id());
    let named = || map.partitions().values().filter_map(|partition| Some((partition, mine(partition)?)));
    let children = named().filter_map(|(parent, _)| {
        let child = parent.child()?;
        let replica = mine(&child).filter(|replica| node.holds(child.id, *replica))?;
        Some((child, replica))
    });
    named().map(|(partition, replica)| (partition.clone(), replica)).chain(children).collect()
}

impl Node {
    /// Whether this replica runs here, or has something in the log.
    pub(super) fn holds(&self, id: PartitionId, replica: Replica) -> bool {
        self.partition(id).is_some_and(|here| here.group().replica() == replica)
            || self.recovered.lock().contains_key(&(id, replica.id))
    }

    async fn host(
        self: &Arc<Self>,
        map: &Map,
        partition: &placement::Partition,
        replica: Replica,
    ) -> Result<(), Error> {
        let id = partition.id;
        if id == DRIVER {
            self.host_driver(replica).await?;
            return Ok(());
        }
        if let Some(here) = self.partition(id).filter(|here| here.group().replica() == replica) {
            if here.group().is_stopping() {
                self.partitions.write().remove(&id);
                return self.find_again(here.group()).await;
            }
            return self.initialize_if_asked(partition, replica).await;
        }
        let Some(keyspace) = map.keyspaces().get(&partition.keyspace) else {
            return Err(Error::new(Reason::Internal, format!("the map names no keyspace {}", partition.keyspace)));
        };
        // With the positions of its birth: if the log is replayed from its beginning, it cuts them itself.
        let config = kv::StoreConfig {
            layout: keyspace.layout,
            span: partition.birth.clone(),
            limits: kv::SessionLimits::default(),
        };
        // An older incarnation goes first: one group runs one replica here.
        self.succeed(map, partition, replica, config.clone()).await?;
        self.retire(id).await;
        self.open_partition(id, replica, config, map.version()).await?;
        self.initialize_if_asked(partition, replica).await
    }

    /// Opens a replica of a partition from what the log and the snapshots hold of it.
    pub(super) async fn open_partition(
        self: &Arc<Self>,
        id: PartitionId,
        replica: Replica,
        config: kv::StoreConfig,
        known_from: u64,
    ) -> Result<Group<PartitionMachine>, Error> {
        let machine = PartitionMachine::new(kv::Store::new(config), Arc::clone(&self.births));
        let group = self.open(id, replica, machine).await?;
        env::spawn(steward::watch_leadership(Arc::downgrade(self), group.clone()));
        let hosted = Partition::start(id, known_from, group.clone(), self.partition_context());
        self.partitions.write().insert(id, hosted);
        Ok(group)
    }

    async fn open<M: Machine>(&self, id: PartitionId, replica: Replica, machine: M) -> Result<Group<M>, Error> {
        let found = self.recovered.lock().remove(&(id, replica.id)).unwrap_or_default();
        let opened = Group::open(&self.raft, id, replica.id, &found, machine).await;
        if opened.is_err() {
            // The next try must find it too: a replica opened without its vote and its log has forgotten its promises.
            self.recovered.lock().insert((id, replica.id), found);
        }
        opened.map_err(explain)
    }

    /// After a replica has stopped by itself (a snapshot that could not be kept, a defect): puts back what the log holds
    /// of it, so that the next pass opens it again. Always an error, which makes that pass come after a pause.
    async fn find_again<M: Machine>(&self, group: &Group<M>) -> Result<(), Error> {
        group.shutdown().await;
        let replica = group.replica().id;
        let found = self.raft.recover(group.id(), replica).map_err(|error| explain(OpenError::Log(error)))?;
        self.recovered.lock().insert((group.id(), replica), found);
        Err(Error::new(Reason::Internal, "it has stopped by itself and is opened again"))
    }

    /// While a partition is being created, its initializer's node gives the group its first members.
    async fn initialize_if_asked(&self, partition: &placement::Partition, replica: Replica) -> Result<(), Error> {
        if partition.phase != Phase::Creating || partition.initializer != replica.id {
            return Ok(());
        }
        let Some(here) = self.partition(partition.id) else { return Ok(()) };
        here.group().initialize(&partition.members).await.map_err(|error| {
            Error::new(Reason::Internal, format!("partition {} could not be initialized: {error}", partition.id))
        })
    }

    /// Runs this node's member of the placement driver.
    pub(super) async fn host_driver(self: &Arc<Self>, replica: Replica) -> Result<Group<DriverMachine>, Error> {
        if let Some(group) = self.driver_group().filter(|group| group.replica() == replica) {
            if group.is_stopping() {
                *self.driver.write() = None;
                self.find_again(&group).await?;
            }
            return Ok(group);
        }
        self.retire(DRIVER).await;
        let group = self.open(DRIVER, replica, DriverMachine::default()).await?;
        *self.driver.write() = Some(group.clone());
        env::spawn(steward::watch_leadership(Arc::downgrade(self), group.clone()));
        env::spawn(driver::run(Arc::downgrade(self), group.clone()));
        Ok(group)
    }

    /// Retires what runs here and a map of this version does not name any more.
    async fn retire_unwanted(&self, wanted: &BTreeSet<PartitionId>, version: u64) {
        let gone = |hosted: &&Arc<Partition>| !wanted.contains(&hosted.id) && version >= hosted.known_from;
        let unwanted: Vec<_> = self.partitions.read().values().filter(gone).map(|hosted| hosted.id).collect();
        for id in unwanted {
            if planted(Bug::ReplacedReplicaKept) {
                continue;
            }
            tracing::info!(partition = %id, "the map no longer gives this node a replica; it is destroyed");
            self.retire(id).await;
        }
        if !wanted.contains(&DRIVER) && self.driver_group().is_some() {
            tracing::info!("this node is no longer a member of the placement driver");
            self.retire(DRIVER).await;
        }
    }

    /// Stops and destroys the replica of a group, if one runs here.
    async fn retire(&self, id: PartitionId) {
        if id == DRIVER {
            let group = self.driver.write().take();
            if let Some(group) = group {
                destroy(&group).await;
            }
            return;
        }
        let hosted = self.partitions.write().remove(&id);
        if let Some(hosted) = hosted {
            destroy(hosted.group()).await;
        }
    }
}

/// What cannot be destroyed now is not opened again either: the map no longer names it.
async fn destroy<M: Machine>(group: &Group<M>) {
    if let Err(error) = group.destroy().await {
        tracing::error!(partition = %group.id(), replica = %group.replica().id, %error, "a replica was not removed");
    }
}

fn explain(error: OpenError) -> Error {
    Error::new(Reason::Corrupt, error.to_string())
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::Parts, *};
    use crate::{
        env::{Scope, SystemClock},
        key::{NodeId, ReplicaId},
        log::{
            LogEngine as _,
            memory::MemoryLog,
            snapshots::{MemorySnapshots, SnapshotHandle, SnapshotStore, SnapshotWriter},
        },
        placement::RegisterNode,
        raft::{RaftConfig, RaftHub},
        transport::{endpoint::Endpoint, memory::MemoryNetwork},
    };
    use std::{
        io,
        sync::atomic::{AtomicU32, Ordering},
    };
    use tokio::time::Instant;

    /// A store that cannot be read a few times.
    pub(in crate::node) struct Moody(pub MemorySnapshots, pub AtomicU32);

    impl SnapshotStore for Moody {
        fn create(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Box<dyn SnapshotWriter>> {
            self.0.create(group, replica)
        }

        fn latest(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Option<SnapshotHandle>> {
            let left = self.1.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if left.is_ok() { Err(io::Error::other("too many open files")) } else { self.0.latest(group, replica) }
        }

        fn remove(&self, group: PartitionId, replica: ReplicaId) -> io::Result<()> {
            self.0.remove(group, replica)
        }

        fn list(&self) -> io::Result<Vec<(PartitionId, ReplicaId)>> {
            self.0.list()
        }

        fn blocking(&self) -> bool {
            false
        }
    }

    pub(in crate::node) fn start(log: &Arc<MemoryLog>, snapshots: Moody, map: Map) -> Arc<Node> {
        let network = MemoryNetwork::new(1);
        let endpoint = Endpoint::new(NodeId(1), network.port(NodeId(1)));
        network.attach(NodeId(1), Arc::clone(&endpoint) as _);
        let clock = Arc::new(SystemClock);
        let (engine, config) = (Arc::clone(log) as _, RaftConfig::default());
        let raft =
            RaftHub::new(Arc::clone(&endpoint), engine, Arc::new(snapshots), Arc::clone(&clock) as _, config).unwrap();
        let recovered = log.recover().unwrap();
        let (down_after, merge_after, split_bytes) = (Duration::from_secs(300), Duration::from_secs(3_600), u64::MAX);
        let keep_map: crate::node::KeepMap = Box::new(|_| Ok(()));
        let budgets = crate::node::Budgets::default();
        Node::start(Parts {
            clock,
            endpoint,
            raft,
            recovered,
            map,
            keep_map,
            down_after,
            split_bytes,
            busy_cores: 1.0,
            merge_after,
            budgets,
        })
    }

    pub(in crate::node) fn founder() -> RegisterNode {
        RegisterNode {
            cluster_id: "c".into(),
            uuid: "00000000-0000-4000-8000-000000000001".into(),
            address: "node-1:7170".into(),
            zone: String::new(),
            weight_milli: 1_000,
            previous: Some(NodeId(1)),
            ephemeral: false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_stops_by_itself_is_opened_again_with_all_it_had() {
        let log = Arc::new(MemoryLog::immediate());
        let alone = async move {
            let node = start(&log, Moody(MemorySnapshots::default(), 0.into()), Map::default());
            let deadline = Instant::now() + Duration::from_secs(30);
            node.found("c".into(), founder(), 1, deadline).await.unwrap();
            node.map_at_least(1).await;
            let item = kv::Item {
                key: "a".into(),
                condition: kv::Condition::Any,
                action: kv::Action::Put { value: "1".into() },
                return_previous: false,
            };
            let write = kv::Write { session: None, op: kv::Op::Single(item) };
            let here = node.partitions().remove(0);
            here.write_all(vec![write], here.ticket(deadline)).await.remove(0).unwrap();
            let last = node.driver_group().unwrap().status().last_log;
            // As if they had stopped by themselves: nobody takes them off the node.
            node.driver_group().unwrap().shutdown().await;
            node.partitions()[0].group().shutdown().await;
            sleep(5 * RETRY_EVERY).await;
            let (driver, partition) = (node.driver_group().unwrap(), node.partitions()[0].clone());
            assert!(driver.is_leader() && driver.status().last_log > last, "the only member leads");
            assert!(partition.group().is_leader());
            assert_eq!(partition.group().read(|machine, _| machine.store().rows()), 1);
        };
        Scope::seeded(3).run(alone).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_cannot_be_opened_at_once_has_forgotten_nothing_when_it_can() {
        let log = Arc::new(MemoryLog::immediate());
        let scope = Scope::seeded(1);
        let log_here = Arc::clone(&log);
        let first = async move {
            let node = start(&log_here, Moody(MemorySnapshots::default(), 0.into()), Map::default());
            let deadline = Instant::now() + Duration::from_secs(30);
            node.found("c".into(), founder(), 1, deadline).await.unwrap();
            node.map_at_least(1).await;
            let last = node.driver_group().unwrap().status().last_log;
            (Map::clone(&node.routing().map()), last)
        };
        let (map, last) = scope.run(first).await;
        scope.abort_all();
        while scope.live_tasks() > 0 {
            tokio::task::yield_now().await;
        }
        let second = async move {
            let node = start(&log, Moody(MemorySnapshots::default(), 3.into()), map);
            sleep(5 * RETRY_EVERY).await;
            let group = node.driver_group().expect("opened in the end");
            assert!(group.status().last_log >= last, "{:?}", group.status());
            assert!(group.is_leader(), "the only member leads");
        };
        Scope::seeded(2).run(second).await;
    }
}
