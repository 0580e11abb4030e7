//! A running replica without the type of its machine: opening, watching over it, stopping and destroying it.
//!
//! Its one task publishes who leads, lets it campaign when its lease of before is over, and keeps its log short: a
//! snapshot is taken when the log has grown by enough bytes, then the log is cut, sparing replicas that are behind as
//! long as it stays below its bound.
//!
//! Invariants:
//! * the log is cut only up to a stored snapshot;
//! * nothing of a replica is stored after its tombstone.

use super::{
    barrier::{Barriers, Level},
    group::{Leadership, OpenError},
    hub::RaftHub,
    machine::AnyCell,
    members::Way,
    network::Network,
    quiet::Quiet,
    replicated::Replicated,
    salvage, seed,
    serve::{self, Server},
    sleep::Sleeper,
    snapshots::Vault,
    storage::Log,
    types::{Raft, Types},
    watch,
};
use crate::{
    env,
    key::{NodeId, PartitionId, Replica, ReplicaId},
    log::Recovered,
};
use openraft::{RaftMetrics, ServerState, async_runtime::watch::WatchReceiver as _};
use parking_lot::Mutex;
use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout, timeout_at},
};

/// How often the log is looked at although nothing happened.
const MAINTENANCE_EVERY: Duration = Duration::from_secs(5);

/// How long a snapshot may take before its slot is given to another replica.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(600);

/// How long openraft may take to know of a snapshot that has been taken; it never does of one that could not be.
const KNOWN_DEADLINE: Duration = Duration::from_secs(5);

/// How long openraft may take to let go of a machine once its core has stopped.
const RELEASE_DEADLINE: Duration = Duration::from_secs(10);

/// A running replica.
pub(super) struct Running {
    pub(super) hub: Arc<RaftHub>,
    pub(super) group: PartitionId,
    pub(super) me: Replica,
    pub(super) raft: Raft,
    pub(super) log: Log,
    pub(super) cell: Arc<dyn AnyCell>,
    pub(super) vault: Arc<Vault>,
    pub(super) barriers: Arc<Barriers>,
    pub(super) leadership: watch::Sender<Leadership>,
    pub(super) stopping: AtomicBool,
    pub(super) proposed_bytes: Arc<AtomicU64>,
    /// The change of members that this replica is carrying out.
    pub(super) changing: Mutex<Option<Way>>,
    snapshotting: AtomicBool,
    server: Arc<Server>,
    /// Ends when openraft has let go of the machine.
    released: Mutex<Option<oneshot::Receiver<()>>>,
}

impl Running {
    /// Opens the replica and lets it take part in its group.
    pub(super) async fn open(
        hub: &Arc<RaftHub>,
        group: PartitionId,
        replica: ReplicaId,
        found: &Recovered,
        cell: Arc<dyn AnyCell>,
    ) -> Result<Arc<Self>, OpenError> {
        if found.tombstone {
            return Err(OpenError::Destroyed);
        }
        let (questions, queue) = mpsc::channel(serve::QUEUE_QUESTIONS);
        if !hub.add(group, replica, questions) {
            return Err(OpenError::AlreadyOpen);
        }
        let built = Self::build(hub, group, replica, found, cell).await;
        let running = built.inspect_err(|_| hub.remove(group, replica))?;
        // From here on questions are answered; before, they waited.
        running.raft.run();
        hub.sleepers.write().insert(group, Arc::clone(&running.barriers.sleeper));
        env::spawn(serve::run(Arc::clone(&running.server), queue));
        env::spawn(Arc::clone(&running).watch_over());
        Ok(running)
    }

    async fn build(
        hub: &Arc<RaftHub>,
        group: PartitionId,
        replica: ReplicaId,
        found: &Recovered,
        cell: Arc<dyn AnyCell>,
    ) -> Result<Arc<Self>, OpenError> {
        let me = Replica { id: replica, node: hub.node() };
        let log = Log::open(&hub.engine, (group, replica), found, hub.config.log_keep_bytes).map_err(OpenError::Log)?;
        let vault = Arc::new(Vault::new(group, replica, Arc::clone(&hub.snapshots)));
        // Raised to the size of the state when it is reached.
        vault.mark.store(hub.config.snapshot_bytes, Ordering::Release);
        let (machine, released) = Replicated::new(Arc::clone(&cell), Arc::clone(&vault), log.clone());
        let quiet = Quiet::new(hub.config.lease(), hub.config.quiet_period());
        let network = Network {
            endpoint: Arc::clone(&hub.endpoint),
            group,
            me: replica,
            vault: Arc::clone(&vault),
            numbers: Arc::clone(&hub.numbers),
            pace: Arc::clone(&hub.snapshot_pace),
            append_deadline: hub.config.append_deadline(),
            quiet: quiet.clone(),
        };
        // What has voted may have promised a lease to a leader that still counts on it. A seed has voted for nobody.
        let has_voted = found.vote.is_some() && !seed::is_pristine(found);
        let config = Arc::clone(&hub.openraft[usize::from(has_voted)]);
        let votes_from = Instant::now() + if has_voted { hub.config.lease() } else { Duration::ZERO };
        let raft = Raft::build(replica.0, config, network, log.clone(), machine)
            .await
            .map_err(|fatal| OpenError::State(fatal.to_string()))?;
        quiet.watch(raft.metrics());
        let sleeper = Arc::new(Sleeper::new(group, me, &raft, quiet, hub.config.lease()));
        let (leadership, _) = watch::channel(Leadership::default());
        let (endpoint, lease) = (Arc::clone(&hub.endpoint), hub.config.lease());
        let barriers = Arc::new(Barriers::new(raft.clone(), endpoint, (group, me), leadership.clone(), lease, sleeper));
        let server = Arc::new(Server {
            raft: raft.clone(),
            cell: Arc::clone(&cell),
            vault: Arc::clone(&vault),
            barriers: Arc::clone(&barriers),
            votes_from,
            incoming: Default::default(),
        });
        Ok(Arc::new(Self {
            hub: Arc::clone(hub),
            group,
            me,
            raft,
            log,
            cell,
            vault,
            barriers,
            leadership,
            stopping: AtomicBool::new(false),
            proposed_bytes: Arc::default(),
            changing: Mutex::default(),
            snapshotting: AtomicBool::new(false),
            server,
            released: Mutex::new(Some(released)),
        }))
    }

    /// Asks the others for the leadership, if nobody holds it.
    pub(super) async fn campaign(&self) {
        // A core that has stopped does not campaign.
        let _ = self.raft.trigger().elect(true).await;
    }

    /// Before this replica does anything as the leader: one that has slept asks the others whether it still is.
    pub(super) async fn rouse(&self, deadline: Instant) {
        if self.barriers.sleeper.touch() {
            // If it fails, what is to be done fails as well, and says how.
            let _ = self.barriers.confirm(Level::ReadIndex, deadline).await;
        }
    }

    /// Whether the replica is stopping or has stopped.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    async fn watch_over(self: Arc<Self>) {
        let mut server = self.raft.server_metrics();
        let mut campaigns_from = Some(self.server.votes_from);
        let mut maintenance = Instant::now() + MAINTENANCE_EVERY;
        let mut grown = 0;
        self.publish(&server);
        while !self.is_stopping() {
            let campaign_at = campaigns_from.unwrap_or(maintenance);
            tokio::select! {
                biased;
                changed = server.changed() => {
                    self.publish(&server);
                    if changed.is_err() {
                        break;
                    }
                }
                () = self.vault.grown.notified() => self.consider_snapshot(false),
                () = sleep_until(campaign_at), if campaigns_from.is_some() => {
                    campaigns_from = None;
                    self.raft.runtime_config().elect(true);
                }
                () = sleep_until(maintenance) => {
                    maintenance = Instant::now() + MAINTENANCE_EVERY;
                    self.server.forget_stalled();
                    let before = std::mem::replace(&mut grown, self.vault.since.load(Ordering::Acquire));
                    self.consider_snapshot(grown == before);
                    if !self.snapshotting.load(Ordering::Acquire) {
                        self.cut_log().await;
                    }
                }
            }
        }
        if !self.stopping.swap(true, Ordering::AcqRel) {
            tracing::error!(group = %self.group, replica = %self.me.id, "replica has stopped by itself");
        }
        self.cell.gate().close();
        self.leadership.set(Leadership::default());
    }

    fn publish(&self, server: &watch::Receiver<openraft::metrics::RaftServerMetrics<Types>>) {
        let now = {
            let server = server.borrow();
            let membership = server.membership_config.membership();
            let leader = server.current_leader.and_then(|id| {
                // A leader that is only now being added, or removed, is known by itself at least.
                let node = membership.get_node(&id).copied().or_else(|| (id == self.me.id.0).then_some(self.me.node));
                node.map(|node: NodeId| Replica { id: ReplicaId(id), node })
            });
            let leader = leader.filter(|_| server.state != ServerState::Shutdown);
            Leadership { term: server.vote.leader_id.term, leader }
        };
        let changed = self.leadership.modify(|current| {
            let changed = *current != now;
            *current = now;
            changed
        });
        if changed {
            self.barriers.sleeper.wake();
        }
    }

    /// Looks at openraft's view of the group, quickly.
    pub(super) fn metrics<T>(&self, look: impl FnOnce(&RaftMetrics<Types>) -> T) -> T {
        look(&self.raft.metrics().borrow_watched())
    }

    /// Takes a snapshot if the log has grown enough. One that has come to rest need not have grown as much as the state
    /// takes: its entries would hold their memory until somebody writes again.
    fn consider_snapshot(self: &Arc<Self>, rests: bool) {
        let since = self.vault.since.load(Ordering::Acquire);
        let least = self.hub.config.snapshot_bytes;
        if !rests {
            if since < self.vault.mark.load(Ordering::Acquire) {
                return;
            }
            // The state may have grown since the mark was set; taking it more often than it is rewritten gains nothing.
            self.vault.mark.store(least.max(self.cell.bytes()), Ordering::Release);
        }
        let mark = if rests { least } else { self.vault.mark.load(Ordering::Acquire) };
        if since < mark || self.snapshotting.swap(true, Ordering::AcqRel) {
            return;
        }
        let running = Arc::clone(self);
        env::spawn(async move {
            running.snapshot_and_cut().await;
            running.snapshotting.store(false, Ordering::Release);
        });
    }

    async fn snapshot_and_cut(&self) {
        let Ok(_slot) = self.hub.snapshot_slots.acquire().await else { return };
        let deadline = Instant::now() + SNAPSHOT_DEADLINE;
        if self.take_snapshot(deadline).await.is_some() {
            self.cut_log().await;
        }
    }

    /// Takes a snapshot now; returns its index when openraft knows it.
    pub(super) async fn take_snapshot(&self, deadline: Instant) -> Option<u64> {
        let at_least = self.cell.gate().applied();
        let settled = self.vault.settled.notified();
        tokio::pin!(settled);
        settled.as_mut().enable();
        self.raft.trigger().snapshot().await.ok()?;
        timeout_at(deadline, settled).await.ok()?;
        let mut metrics = self.raft.metrics();
        let known = async {
            loop {
                let index = metrics.borrow().snapshot.map(|at| at.index);
                if index >= Some(at_least) {
                    return index;
                }
                metrics.changed().await.ok()?;
            }
        };
        timeout_at(deadline.min(Instant::now() + KNOWN_DEADLINE), known).await.ok()?
    }

    /// Cuts what is both in the snapshot and not worth keeping.
    pub(super) async fn cut_log(&self) {
        let config = &self.hub.config;
        let Some(keep_from) = self.log.index_before_last(config.log_keep_bytes) else { return };
        let (snapshot, purged, slowest) = self.metrics(|metrics| {
            let slowest = metrics.replication.as_ref().and_then(|replication| {
                replication
                    .iter()
                    .filter(|(id, _)| **id != self.me.id.0)
                    .map(|(_, at)| at.map_or(0, |at| at.index))
                    .min()
            });
            (metrics.snapshot.map(|at| at.index), metrics.purged.map(|at| at.index), slowest)
        });
        let spare = slowest.filter(|_| self.log.bytes() < config.log_bytes_max).unwrap_or(u64::MAX);
        let Some(upto) = snapshot.map(|snapshot| snapshot.min(keep_from).min(spare)) else { return };
        if purged < Some(upto) {
            // A core that has stopped has no log to cut.
            let _ = self.raft.trigger().purge_log(upto).await;
        }
    }

    /// Stops taking part. Idempotent; returns when openraft has let go of log and machine, or has failed to in time.
    pub(super) async fn shutdown(self: &Arc<Self>) {
        self.stopping.store(true, Ordering::Release);
        self.hub.remove(self.group, self.me.id);
        let running = Arc::clone(self);
        // In a task of its own: openraft does not survive a cancelled shutdown.
        let stopped = env::spawn(async move {
            if running.raft.shutdown().await.is_err() {
                tracing::warn!(group = %running.group, "the core ended badly");
            }
            running.vault.close().await;
            let released = running.released.lock().take();
            if let Some(released) = released
                && timeout(RELEASE_DEADLINE, released).await.is_err()
            {
                tracing::warn!(group = %running.group, "the machine is still in use");
            }
            running.cell.gate().close();
        });
        // Fails only when the node itself is being torn down.
        let _ = stopped.await;
    }

    /// Stops, removes everything stored and makes sure that this replica id is never opened again.
    pub(super) async fn destroy(self: &Arc<Self>) -> io::Result<()> {
        self.shutdown().await;
        salvage::bury(&self.hub, self.group, self.me.id).await
    }

    /// Whether it has no log, not even the entry that names the first members, and knows nobody who would send it one.
    pub(super) fn is_blank(&self) -> bool {
        self.leadership.borrow().leader.is_none() && self.log.is_empty()
    }

    /// Stops, and gives the group its first members in a log that is empty. To be opened again.
    pub(super) async fn begin_anew(self: &Arc<Self>, members: &[Replica]) -> io::Result<()> {
        self.shutdown().await;
        if self.log.is_empty() {
            seed::first_entry(&self.hub, self.group, self.me.id, members).await?;
        }
        Ok(())
    }
}

/// A future that goes on by itself when it is dropped unfinished.
pub(super) struct Detached<T: Send + 'static>(Option<Pin<Box<dyn Future<Output = T> + Send>>>);

/// Makes `future` go on by itself when it is dropped unfinished.
pub(super) fn detached<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Detached<T> {
    Detached(Some(Box::pin(future)))
}

impl<T: Send + 'static> Future for Detached<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let future = self.0.as_mut().expect("a finished future is not polled");
        let output = std::task::ready!(future.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(output)
    }
}

impl<T: Send + 'static> Drop for Detached<T> {
    fn drop(&mut self) {
        // Outside of a runtime everything is being torn down anyway.
        if let Some(future) = self.0.take()
            && tokio::runtime::Handle::try_current().is_ok()
        {
            env::spawn(async move {
                future.await;
            });
        }
    }
}

impl<T: Send + 'static> std::fmt::Debug for Detached<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detached").field("finished", &self.0.is_none()).finish()
    }
}
