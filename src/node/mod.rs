//! One process: the replicas it hosts, its part in the placement driver, and what it knows of the others.
//!
//! A node is started with everything it needs from the world handed in ([`Parts`]): clock, transport, log, snapshots.
//! It keeps the replicas that the map gives it, reports what the groups it leads have become, and while it leads the
//! placement driver it plans and pushes the map.
//!
//! Invariants:
//! * a replica is created only because the map names it, and only after that map is durable here, or because the log of
//!   its parent was cut; but for children, a map on disk is never older than the replicas beside it;
//! * a replica is destroyed only when a map that is new enough to know it no longer names it, and leaves a tombstone: its
//!   id never returns;
//! * the members that a group's leader reports are committed and uniform.

mod admission;
pub mod config;
mod cutting;
mod driver;
mod health;
mod hlc;
mod hosting;
pub mod identity;
mod liveness;
mod machines;
mod merging;
mod observed;
mod office;
pub mod partition;
mod prefer;
mod recovery;
mod steward;

pub use admission::{Admission, Budgets, Ticket};
pub use cutting::CutAt;
pub use health::Health;
pub use liveness::{CONTACT_LOST_AFTER, Liveness};
pub use machines::{Births, DriverMachine, PartitionMachine};
pub use partition::{Partition, Written};
pub use recovery::Survey;

use crate::{
    client::routing::Routing,
    env::{self, Clock},
    error::{Error, Hint, Outcome, Reason},
    key::{NodeId, PartitionId, Replica, ReplicaId},
    log::Recovered,
    placement::{self, Command, Fit, Map, MapDelta, RegisterNode, Reply, Standing},
    raft::{Group, RaftHub, Status, WriteError},
    telemetry,
    transport::{Kind, endpoint::Endpoint},
};
use hlc::Hlc;
use parking_lot::{Mutex, RwLock};
use partition::PartitionContext;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

/// Keeps the map for the next start. Durable on return; may block.
pub type KeepMap = Box<dyn Fn(&Map) -> std::io::Result<()> + Send + Sync>;

/// What a node is made of.
pub struct Parts {
    /// Its time.
    pub clock: Arc<dyn Clock>,
    /// Its end of the transport.
    pub endpoint: Arc<Endpoint>,
    /// Its log, snapshots and Raft settings.
    pub raft: Arc<RaftHub>,
    /// What the log held at start.
    pub recovered: BTreeMap<(PartitionId, ReplicaId), Recovered>,
    /// The map that it held before, or was given when it joined; empty on a founder's first start.
    pub map: Map,
    /// Keeps the map.
    pub keep_map: KeepMap,
    /// While it leads the placement driver: silence after which a node is down and its replicas are built anew.
    pub down_after: Duration,
    /// While it leads the placement driver: bytes of rows from which on a partition is cut in two.
    pub split_bytes: u64,
    /// Cores in use from which on it is short of CPU, and a cut takes work off it.
    pub busy_cores: f64,
    /// While it leads the placement driver: how long neighbours have to be small and idle until they are merged.
    pub merge_after: Duration,
    /// How much it lets in and holds.
    pub budgets: Budgets,
}

/// One node.
pub struct Node {
    clock: Arc<dyn Clock>,
    endpoint: Arc<Endpoint>,
    raft: Arc<RaftHub>,
    recovered: Mutex<BTreeMap<(PartitionId, ReplicaId), Recovered>>,
    routing: Arc<Routing>,
    liveness: Liveness,
    hlc: Arc<Hlc>,
    admission: Arc<Admission>,
    partitions: RwLock<BTreeMap<PartitionId, Arc<Partition>>>,
    driver: RwLock<Option<Group<DriverMachine>>>,
    map_changed: Arc<Notify>,
    births: Arc<Births>,
    kept: watch::Sender<u64>,
    keep_map: KeepMap,
    down_after: Duration,
    split_bytes: u64,
    busy_cores: f64,
    /// Thousandths of a core that were in use lately.
    cores_used_milli: AtomicU64,
    merge_after: Duration,
    stewarding: Arc<Notify>,
    observed: Mutex<observed::Observed>,
    /// It is about to stop and leads nothing any more if it can help it.
    retiring: AtomicBool,
    stopping: AtomicBool,
}

impl Node {
    /// Starts a node inside the scope of the caller: its replicas open, its tasks run.
    #[must_use]
    pub fn start(parts: Parts) -> Arc<Self> {
        let liveness = Liveness::new(Arc::clone(&parts.endpoint));
        let kept = watch::Sender::new(parts.map.version());
        let (map_changed, stewarding) = <(Arc<Notify>, Arc<Notify>)>::default();
        let node = Arc::new(Self {
            clock: parts.clock,
            liveness,
            endpoint: parts.endpoint,
            raft: parts.raft,
            recovered: Mutex::new(parts.recovered),
            routing: Arc::new(Routing::of(parts.map)),
            hlc: Arc::default(),
            admission: Admission::new(parts.budgets),
            partitions: RwLock::default(),
            driver: RwLock::default(),
            births: Births::new(Arc::clone(&map_changed), Arc::clone(&stewarding)),
            map_changed,
            kept,
            keep_map: parts.keep_map,
            down_after: parts.down_after,
            split_bytes: parts.split_bytes,
            busy_cores: parts.busy_cores,
            cores_used_milli: AtomicU64::new(0),
            merge_after: parts.merge_after,
            stewarding,
            observed: Mutex::new(observed::Observed::new(parts.split_bytes, parts.merge_after)),
            retiring: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        });
        node.set_addresses();
        let weak = Arc::downgrade(&node);
        node.endpoint.register(Kind::Driver, Arc::new(driver::DriverService(Weak::clone(&weak))));
        node.endpoint.register(Kind::MapPush, Arc::new(driver::MapService(Weak::clone(&weak))));
        node.endpoint.register(Kind::Leader, Arc::new(steward::LeaderService(Weak::clone(&weak))));
        node.endpoint.register(Kind::Ping, Arc::new(liveness::PingService(node.liveness.clone())));
        node.endpoint.register(Kind::Cut, Arc::new(cutting::CutService(Weak::clone(&weak))));
        node.endpoint.register(Kind::Merge, Arc::new(merging::MergeService(Weak::clone(&weak))));
        node.endpoint.register(Kind::Survey, Arc::new(recovery::SurveyService(Weak::clone(&weak))));
        for kind in [Kind::Load, Kind::Ask] {
            node.endpoint.register(kind, Arc::new(observed::ObservedService(Weak::clone(&weak), kind)));
        }
        env::spawn(observed::report(Weak::clone(&weak)));
        env::spawn(prefer::run(Weak::clone(&weak)));
        env::spawn(hosting::run(Weak::clone(&weak)));
        env::spawn(steward::run(Weak::clone(&weak)));
        env::spawn(steward::ping(weak));
        node
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.endpoint.me()
    }

    /// The routing table: the map and the leaders.
    #[must_use]
    pub const fn routing(&self) -> &Arc<Routing> {
        &self.routing
    }

    /// Who is in contact.
    #[must_use]
    pub const fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// Its end of the transport.
    #[must_use]
    pub const fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Its time.
    #[must_use]
    pub const fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// A hybrid logical time, above every one that this node gave before.
    #[must_use]
    pub fn stamp(&self) -> crate::key::Version {
        self.hlc.stamp(self.clock.wall_ms())
    }

    /// The partition of this id, if a replica of it runs here.
    #[must_use]
    pub fn partition(&self, id: PartitionId) -> Option<Arc<Partition>> {
        self.partitions.read().get(&id).cloned()
    }

    /// Every partition with a replica here.
    #[must_use]
    pub fn partitions(&self) -> Vec<Arc<Partition>> {
        self.partitions.read().values().cloned().collect()
    }

    /// This node's member of the placement driver, if it has one.
    #[must_use]
    pub fn driver_group(&self) -> Option<Group<DriverMachine>> {
        self.driver.read().clone()
    }

    /// Members of the placement driver as the map tells; this node's own member on a founder without a map.
    #[must_use]
    pub fn driver_members(&self) -> Vec<Replica> {
        let map = self.routing.map();
        map.driver().map_or_else(
            || self.driver_group().map(|group| group.status().voters).unwrap_or_default(),
            |driver| driver.members.clone(),
        )
    }

    /// Forms the cluster: makes this node the first member of the placement driver. Repeating it is harmless.
    ///
    /// # Errors
    /// When the driver refuses or gives no answer in time.
    pub async fn found(
        self: &Arc<Self>,
        cluster_id: String,
        node: RegisterNode,
        replicas_default: u32,
        deadline: Instant,
    ) -> Result<(), Error> {
        let first = placement::state::DRIVER_FIRST;
        let group = self.host_driver(first).await?;
        group.initialize(&[first]).await.map_err(|error| {
            Error::new(Reason::Internal, format!("the placement driver could not be initialized: {error}"))
        })?;
        let command = Command::Bootstrap { cluster_id, node, replicas_default };
        self.drive(&command, deadline).await.map(|_| ())
    }

    /// Admits a process to the cluster, as a new node or as the node that it is: its id, and a map that names it.
    ///
    /// # Errors
    /// When the driver refuses it or gives no answer in time. Asking again, here or elsewhere, is harmless.
    pub async fn admit(&self, process: RegisterNode, deadline: Instant) -> Result<(NodeId, Arc<Map>), Error> {
        let id = match self.drive(&Command::RegisterNode(process), deadline).await? {
            Reply::Registered { node, .. } => node,
            other => return Err(Error::new(Reason::Internal, format!("the placement driver answered {other:?}"))),
        };
        loop {
            let map = self.routing.map();
            if map.node(id).is_some() {
                return Ok((id, map));
            }
            // Registered, but this node has not been told yet: it would send the process off with a map of before.
            timeout_at(deadline, self.routing.newer_than(map.version())).await.map_err(|_elapsed| {
                Error::new(
                    Reason::LeaderUnknown,
                    format!("node {id} is registered; the map that names it is not here yet"),
                )
            })?;
        }
    }

    /// Waits until the map has at least this version.
    pub async fn map_at_least(&self, version: u64) {
        if let Some(below) = version.checked_sub(1) {
            self.routing.newer_than(below).await;
        }
    }

    /// Takes a change of the map, in memory at once and on disk soon; replicas follow once it is on disk.
    pub(crate) fn take_map(&self, delta: MapDelta) -> Fit {
        let standing = || self.routing.map().node(self.id()).map(|node| node.standing);
        let before = standing();
        let fit = self.routing.apply(delta);
        if fit == Fit::Applied {
            if standing() == Some(Standing::Removed) && before != standing() {
                tracing::warn!(node = %self.id(), "this node was removed from the cluster; its process can be stopped");
            }
            self.set_addresses();
            self.map_changed.notify_one();
            self.stewarding.notify_one();
        }
        fit
    }

    fn set_addresses(&self) {
        let map = self.routing.map();
        let addresses: Vec<_> = map.nodes().values().map(|node| (node.id, node.address.clone())).collect();
        self.endpoint.transport().set_addresses(&addresses);
    }

    fn partition_context(&self) -> PartitionContext {
        PartitionContext {
            hlc: Arc::clone(&self.hlc),
            clock: Arc::clone(&self.clock),
            liveness: self.liveness.clone(),
            admission: Arc::clone(&self.admission),
        }
    }

    /// Better knowledge of who leads a partition, for a client that came to the wrong node.
    #[must_use]
    pub fn hint(&self, partition: PartitionId) -> Hint {
        let leader = self.routing.leader(partition);
        Hint {
            partition,
            leader: leader.map(|leader| leader.node),
            term: leader.map_or(0, |leader| leader.term),
            map_version: self.routing.map().version(),
        }
    }

    /// Whether it is stopping or has stopped.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Stops every replica in order. Hands over nothing, see [`Node::hand_over`]: the others elect new leaders.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let partitions = std::mem::take(&mut *self.partitions.write());
        for partition in partitions.into_values() {
            partition.group().shutdown().await;
        }
        let driver = self.driver.write().take();
        if let Some(driver) = driver {
            driver.shutdown().await;
        }
        self.endpoint.close();
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// A write error of Raft as an error for users: what is known of the write, and where to go.
#[must_use]
pub fn explain_write(id: PartitionId, error: &WriteError, status: &Status, liveness: &Liveness) -> Error {
    let members = &status.voters;
    let unknown = |message: String| Error::new(Reason::OutcomeUnknown, message).outcome(Outcome::Unknown);
    match error {
        // A replica that cannot be elected goes on naming the leader that it had.
        WriteError::NotLeader { leader: Some(leader) } if !liveness.quorum_lost(members) => {
            let hint = Hint { partition: id, leader: Some(leader.node), term: status.term, map_version: 0 };
            Error::new(Reason::NotLeader, format!("partition {id} is led by node {}", leader.node))
                .outcome(Outcome::NotApplied)
                .hint(hint)
        }
        WriteError::NotLeader { .. } | WriteError::NoQuorum => {
            liveness.no_leader(id, members, Some(Outcome::NotApplied))
        }
        WriteError::Overloaded => {
            metrics::counter!(telemetry::ADMISSION_REJECTED_TOTAL, "budget" => "proposed_bytes").increment(1);
            Error::new(Reason::Overloaded, format!("too many bytes are proposed to partition {id}; slow down"))
                .outcome(Outcome::NotApplied)
        }
        WriteError::Stopped { proposed: false } => {
            Error::new(Reason::Stopping, format!("the replica of partition {id} is stopping; ask another node"))
                .outcome(Outcome::NotApplied)
        }
        WriteError::Discarded => unknown(format!("partition {id} changed its leader while the write was under way")),
        WriteError::Stopped { proposed: true } => {
            unknown(format!("the replica of partition {id} stopped while the write was under way"))
        }
        WriteError::Timeout if liveness.quorum_lost(members) => liveness.no_leader(id, members, Some(Outcome::Unknown)),
        WriteError::Timeout => unknown(format!("partition {id} gave no answer before the deadline")),
    }
}
