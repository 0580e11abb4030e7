//! The replicas of a node: what they share, and the way of messages to them.
//!
//! Invariants:
//! * a message reaches a replica only if group and replica id match: another incarnation never answers in its place;
//! * a message never creates a replica;
//! * delivering never blocks: a replica whose queue is full says so.

use super::{
    config::RaftConfig,
    pace::Pace,
    serve::Question,
    sleep::{self, SleepService, Sleeper},
    wire::{self, Status},
};
use crate::{
    env::{self, Clock},
    key::{NodeId, PartitionId, ReplicaId},
    log::{LogEngine, Record, Recovered, snapshots::SnapshotStore},
    transport::{
        Kind,
        endpoint::{Endpoint, Reply, Service},
    },
};
use bytes::Bytes;
use openraft::Config;
use parking_lot::RwLock;
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, atomic::AtomicU64},
};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// The kinds of frames that concern replicas.
const KINDS: [Kind; 7] = [
    Kind::RaftAppend,
    Kind::RaftVote,
    Kind::RaftPreVote,
    Kind::RaftTransfer,
    Kind::RaftSnapshot,
    Kind::ReadIndex,
    Kind::Confirm,
];

type Routes = Arc<RwLock<BTreeMap<PartitionId, (ReplicaId, mpsc::Sender<Question>)>>>;

/// The sleep of the replicas that run here.
pub(super) type Sleepers = Arc<RwLock<BTreeMap<PartitionId, Arc<Sleeper>>>>;

/// What the replicas of a node share.
pub struct RaftHub {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) engine: Arc<dyn LogEngine>,
    pub(super) snapshots: Arc<dyn SnapshotStore>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) config: RaftConfig,
    /// For new replicas, and for those that must wait before they campaign.
    pub(super) openraft: [Arc<Config>; 2],
    pub(super) snapshot_slots: Semaphore,
    pub(super) snapshot_pace: Arc<Pace>,
    pub(super) numbers: Arc<AtomicU64>,
    pub(super) sleepers: Sleepers,
    routes: Routes,
}

impl std::fmt::Debug for RaftHub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftHub").field("node", &self.node()).finish_non_exhaustive()
    }
}

impl RaftHub {
    /// The hub of a node, which takes the frames of replicas from `endpoint` from now on. Belongs to the scope of the
    /// caller.
    ///
    /// # Errors
    /// When the settings do not fit each other.
    pub fn new(
        endpoint: Arc<Endpoint>,
        engine: Arc<dyn LogEngine>,
        snapshots: Arc<dyn SnapshotStore>,
        clock: Arc<dyn Clock>,
        config: RaftConfig,
    ) -> Result<Arc<Self>, String> {
        let openraft = [Arc::new(config.openraft(true)?), Arc::new(config.openraft(false)?)];
        let routes = Routes::default();
        for kind in KINDS {
            endpoint.register(kind, Arc::new(Door { kind, routes: Arc::clone(&routes) }));
        }
        let sleepers = Sleepers::default();
        endpoint.register(Kind::Sleep, Arc::new(SleepService(Arc::clone(&sleepers))));
        let hub = Arc::new(Self {
            endpoint,
            engine,
            snapshots,
            clock,
            openraft,
            snapshot_pace: Arc::new(Pace::new(config.snapshot_bytes_per_s)),
            snapshot_slots: Semaphore::new(config.snapshots_at_a_time.max(1)),
            config,
            numbers: Arc::new(AtomicU64::new(env::random_u64() >> 1)),
            sleepers,
            routes,
        });
        env::spawn(sleep::run(Arc::downgrade(&hub), hub.config.clone()));
        Ok(hub)
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.endpoint.me()
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &RaftConfig {
        &self.config
    }

    /// The groups with a replica running here, in order.
    #[must_use]
    pub fn groups(&self) -> Vec<(PartitionId, ReplicaId)> {
        self.routes.read().iter().map(|(group, (replica, _))| (*group, *replica)).collect()
    }

    /// What the log holds of a replica that does not run any more, with all that it submitted. Reads the whole log of the
    /// node and blocks meanwhile: for rare cases.
    ///
    /// # Errors
    /// When the stored bytes are damaged or cannot be read.
    pub fn recover(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Recovered> {
        Ok(self.engine.recover()?.remove(&(group, replica)).unwrap_or_default())
    }

    /// Makes a record of a replica durable, and all that was submitted of it before.
    pub(super) async fn keep(&self, group: PartitionId, replica: ReplicaId, record: Record) -> io::Result<()> {
        let (durable, kept) = oneshot::channel();
        self.engine.submit(group, replica, record, Some(Box::new(move |result| drop(durable.send(result)))));
        kept.await.unwrap_or_else(|_| Err(io::Error::other("the log engine has stopped")))
    }

    /// Sends the messages for a replica to `queue`; false if the group has a replica here already.
    pub(super) fn add(&self, group: PartitionId, replica: ReplicaId, queue: mpsc::Sender<Question>) -> bool {
        let mut routes = self.routes.write();
        if routes.contains_key(&group) {
            return false;
        }
        routes.insert(group, (replica, queue));
        true
    }

    /// Sends no more messages to a replica.
    pub(super) fn remove(&self, group: PartitionId, replica: ReplicaId) {
        let mut routes = self.routes.write();
        if routes.get(&group).is_some_and(|(running, _)| *running == replica) {
            routes.remove(&group);
            self.sleepers.write().remove(&group);
        }
    }
}

/// Takes the frames of one kind.
struct Door {
    kind: Kind,
    routes: Routes,
}

impl Service for Door {
    fn handle(&self, from: NodeId, body: Bytes, reply: Reply) {
        let (address, body) = match wire::address(body) {
            Ok(read) => read,
            Err(damaged) => {
                tracing::warn!(%from, kind = ?self.kind, %damaged, "message refused");
                return;
            }
        };
        let queue = match self.routes.read().get(&address.group) {
            Some((replica, queue)) if *replica == address.to => queue.clone(),
            _ => return reply.send(Status::Unknown.body()),
        };
        let refused = match queue.try_send(Question { kind: self.kind, address, body, reply }) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(question)) => (question, Status::Busy),
            Err(mpsc::error::TrySendError::Closed(question)) => (question, Status::Unknown),
        };
        refused.0.reply.send(refused.1.body());
    }
}
