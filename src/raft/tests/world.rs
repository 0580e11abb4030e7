//! A few nodes in one runtime, and a machine that is easy to look at.

use crate::{
    env::{Clock, Scope},
    key::{NodeId, PartitionId, Replica, ReplicaId},
    log::{
        LogEngine as _, Recovered,
        memory::{Lose, MemoryLog, SyncTime},
        snapshots::MemorySnapshots,
    },
    raft::{Group, LogPosition, Machine, RaftConfig, RaftHub, Restorer, WriteError},
    transport::{endpoint::Endpoint, memory::MemoryNetwork},
};
use bytes::Bytes;
use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

pub(super) const GROUP: PartitionId = PartitionId(7);

/// Key-value pairs; a command is `key=value`, its reply the value before.
#[derive(Default, Clone, Debug, PartialEq, Eq)]
pub(super) struct Pairs {
    pub(super) pairs: BTreeMap<String, String>,
    pub(super) applied: u64,
    frozen: Option<Vec<String>>,
}

impl Machine for Pairs {
    type Reply = Option<String>;

    fn apply(&mut self, _at: LogPosition, command: Bytes) -> Option<String> {
        let text = String::from_utf8(command.to_vec()).unwrap();
        let (key, value) = text.split_once('=').unwrap();
        assert_ne!(key, "panic", "as told");
        self.applied += 1;
        self.pairs.insert(key.to_owned(), value.to_owned())
    }

    fn freeze(&mut self) {
        let mut chunks: Vec<_> = self.pairs.iter().rev().map(|(key, value)| format!("{key}={value}")).collect();
        chunks.push(self.applied.to_string());
        self.frozen = Some(chunks);
    }

    fn freeze_next(&mut self, _bytes_max: usize) -> Option<Bytes> {
        self.frozen.as_mut().expect("frozen").pop().map(Into::into)
    }

    fn thaw(&mut self) {
        self.frozen = None;
    }

    fn restorer(&self) -> Box<dyn Restorer<Self>> {
        Box::new(PairsRestorer(None))
    }

    fn bytes(&self) -> u64 {
        self.pairs.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
    }
}

struct PairsRestorer(Option<Pairs>);

impl Restorer<Pairs> for PairsRestorer {
    fn feed(&mut self, chunk: Bytes) -> Result<(), String> {
        let text = String::from_utf8(chunk.to_vec()).map_err(|error| error.to_string())?;
        match &mut self.0 {
            None => self.0 = Some(Pairs { applied: text.parse().map_err(|_| "no count")?, ..Pairs::default() }),
            Some(machine) => {
                let (key, value) = text.split_once('=').ok_or("no pair")?;
                machine.pairs.insert(key.to_owned(), value.to_owned());
            }
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Pairs, String> {
        self.0.ok_or_else(|| "empty".to_owned())
    }
}

/// Paused time.
pub(super) struct VirtualClock(Instant);

impl Clock for VirtualClock {
    fn wall_ms(&self) -> u64 {
        self.elapsed().as_millis() as u64
    }

    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn cpu(&self) -> Duration {
        Duration::ZERO
    }
}

/// What survives a crash of a node, and what does not.
pub(super) struct Node {
    pub(super) disk: Arc<MemoryLog>,
    pub(super) snapshots: MemorySnapshots,
    lives: u64,
    pub(super) life: Option<Life>,
}

pub(super) struct Life {
    scope: Arc<Scope>,
    endpoint: Arc<Endpoint>,
    pub(super) hub: Arc<RaftHub>,
}

pub(super) struct World {
    pub(super) network: MemoryNetwork,
    seed: u64,
    pub(super) nodes: BTreeMap<u64, Node>,
    pub(super) groups: BTreeMap<u64, Group<Pairs>>,
    pub(super) config: RaftConfig,
}

/// The replica of node `n` in its first incarnation.
pub(super) fn replica(n: u64) -> Replica {
    Replica { id: ReplicaId(n), node: NodeId(n) }
}

pub(super) fn within(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

pub(super) fn pair(key: &str, value: impl std::fmt::Display) -> Bytes {
    format!("{key}={value}").into()
}

/// Waits until `ready`, for 20 virtual seconds at most.
pub(super) async fn eventually(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = within(20_000);
    while !ready() {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

impl World {
    pub(super) fn new(seed: u64, config: RaftConfig) -> Self {
        Self { network: MemoryNetwork::new(seed), seed, nodes: BTreeMap::new(), groups: BTreeMap::new(), config }
    }

    /// A world whose nodes `1..=n` carry one group, led.
    pub(super) async fn with_group(n: u64, config: RaftConfig) -> Self {
        Self::with_group_seeded(n, 0, config).await
    }

    /// The same, with other randomness.
    pub(super) async fn with_group_seeded(n: u64, seed: u64, config: RaftConfig) -> Self {
        let mut world = Self::new(seed, config);
        for node in 1..=n {
            world.start(node);
            world.open(replica(node)).await;
        }
        let members: Vec<Replica> = (1..=n).map(replica).collect();
        world.groups[&1].initialize(&members).await.unwrap();
        world.leader().await;
        world
    }

    /// Starts a node, or starts it again.
    pub(super) fn start(&mut self, n: u64) {
        let node = self.nodes.entry(n).or_insert_with(|| Node {
            disk: Arc::new(MemoryLog::simulated()),
            snapshots: MemorySnapshots::default(),
            lives: 0,
            life: None,
        });
        node.lives += 1;
        let scope = Scope::seeded(self.seed * 1_000_000 + n * 1000 + node.lives);
        let life = scope.enter(|| {
            let endpoint = Endpoint::new(NodeId(n), self.network.port(NodeId(n)));
            let clock = Arc::new(VirtualClock(Instant::now()));
            let disk = Arc::clone(&node.disk);
            crate::env::spawn(async move {
                let time = SyncTime {
                    min: Duration::ZERO,
                    max: Duration::from_millis(1),
                    slow_share: 0.0,
                    ..Default::default()
                };
                disk.run(time).await;
            });
            let snapshots = Arc::new(node.snapshots.clone());
            let hub =
                RaftHub::new(Arc::clone(&endpoint), Arc::clone(&node.disk) as _, snapshots, clock, self.config.clone());
            self.network.attach(NodeId(n), Arc::clone(&endpoint) as _);
            Life { scope: Arc::clone(&scope), endpoint, hub: hub.unwrap() }
        });
        node.life = Some(life);
    }

    /// Runs `future` on behalf of node `n`.
    pub(super) fn on<F: Future>(&self, n: u64, future: F) -> impl Future<Output = F::Output> + use<F> {
        self.nodes[&n].life.as_ref().expect("alive").scope.run(future)
    }

    pub(super) fn found(&self, replica: Replica) -> Recovered {
        self.nodes[&replica.node.0].disk.recover().unwrap().remove(&(GROUP, replica.id)).unwrap_or_default()
    }

    /// Opens a replica of [`GROUP`] as its node's disk remembers it.
    pub(super) async fn open(&mut self, replica: Replica) {
        let n = replica.node.0;
        let hub = Arc::clone(&self.nodes[&n].life.as_ref().expect("alive").hub);
        let found = self.found(replica);
        let opened = self.on(n, async move { Group::open(&hub, GROUP, replica.id, &found, Pairs::default()).await });
        let group = opened.await.unwrap();
        self.groups.insert(n, group);
    }

    /// Kills a node: what was not synced is lost.
    pub(super) async fn crash(&mut self, n: u64) {
        self.network.remove(NodeId(n));
        self.groups.remove(&n);
        let node = self.nodes.get_mut(&n).expect("known");
        let life = node.life.take().expect("alive");
        life.scope.abort_all();
        life.endpoint.close();
        while life.scope.live_tasks() > 0 {
            tokio::task::yield_now().await;
        }
        node.disk.crash(Lose::All);
    }

    pub(super) async fn restart(&mut self, n: u64) {
        self.start(n);
        self.open(replica(n)).await;
    }

    /// Cuts node `n` off from all others, both ways.
    pub(super) fn isolate(&self, n: u64) {
        for other in self.nodes.keys().filter(|other| **other != n) {
            self.network.cut(NodeId(n), NodeId(*other));
            self.network.cut(NodeId(*other), NodeId(n));
        }
    }

    /// The node whose replica leads and takes writes; waits for one.
    pub(super) async fn leader(&self) -> u64 {
        let deadline = within(20_000);
        loop {
            assert!(
                Instant::now() < deadline,
                "no leader: {:?}",
                self.groups.values().map(Group::status).collect::<Vec<_>>()
            );
            for (n, group) in &self.groups {
                if group.is_leader() && group.write(pair("leader", n), within(1000)).await.is_ok() {
                    return *n;
                }
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Writes through whoever leads, until it is acknowledged.
    pub(super) async fn write(&self, key: &str, value: impl std::fmt::Display) -> u64 {
        let command = pair(key, value);
        let deadline = within(20_000);
        loop {
            assert!(Instant::now() < deadline, "no write got through");
            for group in self.groups.values().filter(|group| group.is_leader()) {
                if let Ok((at, _)) = group.write(command.clone(), within(2000)).await {
                    return at.index;
                }
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until all replicas have applied `index`, and checks that they agree.
    pub(super) async fn agree(&self, index: u64) {
        eventually("all replicas apply the same", || {
            let applied: Vec<u64> = self.groups.values().map(|group| group.applied().index).collect();
            applied.iter().all(|at| *at >= index && *at == applied[0])
        })
        .await;
        let states: Vec<_> =
            self.groups.values().map(|group| group.read(|m, _| (m.pairs.clone(), m.applied))).collect();
        for state in &states {
            assert_eq!(*state, states[0]);
        }
    }

    pub(super) fn get(&self, n: u64, key: &str) -> Option<String> {
        self.groups[&n].read(|machine, _| machine.pairs.get(key).cloned())
    }
}

/// Whether the write is known not to have happened.
pub(super) fn definite(error: WriteError) -> bool {
    error.effect() == crate::error::Outcome::NotApplied
}
