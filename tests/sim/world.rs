//! Machines with disks, snapshots and clocks, the nodes that live on them, and the network between them.

use crate::trace::{Tap, Trace};
use meridian::{
    env::{Clock, Scope, spawn},
    key::{DRIVER, KeyKind, Layout, NodeId},
    log::{
        LogEngine as _, NodeMeta as _,
        memory::{Lose, MemoryLog, SyncTime},
        snapshots::MemorySnapshots,
    },
    node::{Node, Parts, config::Limits},
    placement::{Command, CreateKeyspace, Cuts, Map, RegisterNode, Reply},
    raft::{RaftConfig, RaftHub},
    server::Responder,
    transport::{
        endpoint::Endpoint,
        memory::{MemoryNetwork, Shape},
    },
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Virtual time that anything which has to happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Wall time at the beginning.
const WALL_BEGAN_MS: u64 = 1_700_000_000_000;
const CLUSTER: &str = "sim";

/// Time as a node's machine tells it: virtual, with a wall clock that can be set.
pub(crate) struct FakeClock {
    began: Instant,
    wall_off_ms: AtomicI64,
}

impl FakeClock {
    /// Sets the wall clock this far from the right time.
    pub(crate) fn set_wall_off(&self, ms: i64) {
        self.wall_off_ms.store(ms, Ordering::Relaxed);
    }
}

impl Clock for FakeClock {
    fn wall_ms(&self) -> u64 {
        let right = WALL_BEGAN_MS + self.elapsed().as_millis() as u64;
        right.saturating_add_signed(self.wall_off_ms.load(Ordering::Relaxed))
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// What can be chosen.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) raft: RaftConfig,
    pub(crate) replicas: u32,
    pub(crate) links: Shape,
    pub(crate) disks: SyncTime,
    pub(crate) keep_trace: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let links = Shape { delay_min: Duration::from_micros(100), delay_max: Duration::from_millis(2), ..Shape::default() };
        Self { raft: RaftConfig::default(), replicas: 3, links, disks: SyncTime::default(), keep_trace: false }
    }
}

/// What outlives a crash, and the node's life until then.
struct Machine {
    disk: Arc<MemoryLog>,
    snapshots: MemorySnapshots,
    clock: Arc<FakeClock>,
    lives: u64,
    life: Option<Life>,
}

#[derive(Clone)]
pub(crate) struct Life {
    pub(crate) scope: Arc<Scope>,
    pub(crate) node: Arc<Node>,
    pub(crate) responder: Responder,
}

/// Which frames of a node are lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Both,
    To,
    From,
}

/// Clones are the same world.
#[derive(Clone)]
pub(crate) struct World(Arc<Inner>);

struct Inner {
    network: MemoryNetwork,
    trace: Arc<Trace>,
    machines: Mutex<BTreeMap<u64, Machine>>,
    rng: Mutex<StdRng>,
    seed: u64,
    settings: Settings,
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// Runs a world to the end of `run`. A panic anywhere in it is a failure of the test, also where the runtime catches it.
pub(crate) fn simulate<T>(seed: u64, settings: Settings, run: impl AsyncFnOnce(World) -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
        if let Ok(filter) = std::env::var("SIM_LOG") {
            let filter = tracing_subscriber::EnvFilter::new(filter);
            tracing_subscriber::fmt().with_env_filter(filter).without_time().with_test_writer().init();
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    PANICS.set(0);
    let outcome = runtime.block_on(async {
        let network = MemoryNetwork::new(seed);
        network.shape_all(settings.links);
        let world = World(Arc::new(Inner {
            network,
            trace: Trace::new(settings.keep_trace),
            machines: Mutex::default(),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            seed,
            settings,
        }));
        Scope::seeded(seed).run(run(world)).await
    });
    drop(runtime);
    assert_eq!(PANICS.get(), 0, "seed {seed}: something panicked and the runtime caught it; see above");
    outcome
}

/// Waits until `ready`, in virtual time.
pub(crate) async fn eventually(what: &str, mut ready: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(why) = ready() {
        assert!(Instant::now() < deadline, "in vain: {what}: {why}");
        sleep(Duration::from_millis(20)).await;
    }
}

impl World {
    /// A cluster of nodes `1..=n`, at rest.
    pub(crate) async fn form(&self, n: u64) {
        self.found().await;
        for node in 2..=n {
            assert_eq!(self.join().await, node);
        }
        self.at_rest().await;
    }

    pub(crate) fn trace(&self) -> &Trace {
        &self.0.trace
    }

    pub(crate) fn note(&self, event: impl std::fmt::Display) {
        self.0.trace.note(event);
    }

    /// A number below `end`, from the world's own randomness.
    pub(crate) fn draw(&self, end: u64) -> u64 {
        self.0.rng.lock().unwrap().random_range(0..end)
    }

    pub(crate) fn network(&self) -> &MemoryNetwork {
        &self.0.network
    }

    fn process(&self, n: u64, previous: Option<NodeId>) -> RegisterNode {
        RegisterNode {
            cluster_id: CLUSTER.to_owned(),
            uuid: format!("00000000-0000-4000-8000-{n:012}"),
            address: format!("node-{n}:7170"),
            zone: String::new(),
            weight_milli: 1_000,
            previous,
            ephemeral: false,
        }
    }

    /// Starts node 1 and lets it form the cluster.
    pub(crate) async fn found(&self) {
        let founder = NodeId(1);
        let node = self.live(1, Map::default()).node;
        let process = self.process(1, Some(founder));
        let deadline = Instant::now() + PATIENCE;
        let replicas = self.0.settings.replicas;
        let founded = self.on(1, async move { node.found(CLUSTER.to_owned(), process, replicas, deadline).await });
        founded.await.unwrap();
    }

    /// Lets one more node join through a node that runs; returns its number.
    pub(crate) async fn join(&self) -> u64 {
        let n = self.0.machines.lock().unwrap().len() as u64 + 1;
        let via = self.running()[0];
        let (node, process) = (self.node(via), self.process(n, None));
        let admitted = self.on(via, async move { node.admit(process, Instant::now() + PATIENCE).await });
        let (id, map) = admitted.await.unwrap();
        assert_eq!(id, NodeId(n));
        assert!(map.node(id).is_some(), "a process is admitted with a map that names it");
        self.live(n, Map::clone(&map));
        n
    }

    /// Starts a node's next life with this map.
    fn live(&self, n: u64, map: Map) -> Life {
        let id = NodeId(n);
        let settings = &self.0.settings;
        let mut machines = self.0.machines.lock().unwrap();
        let machine = machines.entry(n).or_insert_with(|| Machine {
            disk: Arc::new(MemoryLog::simulated()),
            snapshots: MemorySnapshots::default(),
            clock: Arc::new(FakeClock { began: Instant::now() - self.0.trace.now(), wall_off_ms: 0.into() }),
            lives: 0,
            life: None,
        });
        assert!(machine.life.is_none(), "node {n} runs already");
        machine.lives += 1;
        let scope = Scope::seeded(self.0.seed.wrapping_mul(1_000_000) + n * 1_000 + machine.lives);
        let life = scope.enter(|| {
            let port = self.0.network.port(id);
            let tap = Tap { from: id, port, trace: Arc::clone(&self.0.trace) };
            let endpoint = Endpoint::new(id, Arc::new(tap));
            let (disk, disks) = (Arc::clone(&machine.disk), settings.disks);
            spawn(async move { disk.run(disks).await });
            let snapshots = Arc::new(machine.snapshots.clone());
            let clock: Arc<dyn Clock> = Arc::clone(&machine.clock) as _;
            let (engine, config) = (Arc::clone(&machine.disk) as _, settings.raft.clone());
            let raft = RaftHub::new(Arc::clone(&endpoint), engine, snapshots, Arc::clone(&clock), config).unwrap();
            let disk = Arc::clone(&machine.disk);
            let keep_map = Box::new(move |map: &Map| disk.put_meta("map", map.encode()));
            keep_map(&map).unwrap();
            let recovered = machine.disk.recover().unwrap();
            let parts = Parts { clock, endpoint: Arc::clone(&endpoint), raft, recovered, map, keep_map };
            let node = Node::start(parts);
            let responder = Responder::start(Arc::clone(&node), Arc::new(Limits::default()), Duration::from_secs(5));
            self.0.network.attach(id, endpoint);
            Life { scope: Arc::clone(&scope), node, responder }
        });
        machine.life = Some(life.clone());
        self.note(format_args!("{id} begins life {}", machine.lives));
        life
    }

    /// Loses power: what was not synced goes as `lose` says.
    pub(crate) async fn crash(&self, n: u64, lose: Lose) {
        let (life, disk) = {
            let mut machines = self.0.machines.lock().unwrap();
            let machine = machines.get_mut(&n).unwrap();
            (machine.life.take().unwrap_or_else(|| panic!("node {n} does not run")), Arc::clone(&machine.disk))
        };
        self.note(format_args!("{} crashes: {lose:?}", NodeId(n)));
        self.0.network.remove(NodeId(n));
        life.scope.abort_all();
        while life.scope.live_tasks() > 0 {
            tokio::task::yield_now().await;
            life.scope.abort_all();
        }
        life.node.endpoint().close();
        disk.crash(lose);
    }

    /// Starts a crashed node again, from what its disk has kept.
    pub(crate) fn restart(&self, n: u64) -> Life {
        let kept = self.disk(n).get_meta("map").unwrap().unwrap();
        self.live(n, Map::decode(&kept).unwrap())
    }

    pub(crate) fn disk(&self, n: u64) -> Arc<MemoryLog> {
        Arc::clone(&self.0.machines.lock().unwrap()[&n].disk)
    }

    pub(crate) fn clock(&self, n: u64) -> Arc<FakeClock> {
        Arc::clone(&self.0.machines.lock().unwrap()[&n].clock)
    }

    pub(crate) fn life(&self, n: u64) -> Option<Life> {
        self.0.machines.lock().unwrap()[&n].life.clone()
    }

    pub(crate) fn node(&self, n: u64) -> Arc<Node> {
        self.life(n).unwrap_or_else(|| panic!("node {n} does not run")).node
    }

    /// Runs `future` on behalf of a node that runs.
    pub(crate) fn on<F: Future>(&self, n: u64, future: F) -> impl Future<Output = F::Output> + use<F> {
        self.life(n).unwrap_or_else(|| panic!("node {n} does not run")).scope.run(future)
    }

    /// Every node that was ever started.
    pub(crate) fn all(&self) -> Vec<u64> {
        self.0.machines.lock().unwrap().keys().copied().collect()
    }

    /// Nodes that run.
    pub(crate) fn running(&self) -> Vec<u64> {
        let machines = self.0.machines.lock().unwrap();
        machines.iter().filter(|(_, machine)| machine.life.is_some()).map(|(n, _)| *n).collect()
    }

    /// Cuts a node off from all others.
    pub(crate) fn isolate(&self, n: u64, way: Way) {
        self.note(format_args!("{} is cut off: {way:?}", NodeId(n)));
        for other in self.all().into_iter().filter(|other| *other != n) {
            if way != Way::From {
                self.0.network.cut(NodeId(other), NodeId(n));
            }
            if way != Way::To {
                self.0.network.cut(NodeId(n), NodeId(other));
            }
        }
    }

    /// Makes every link sound again.
    pub(crate) fn heal(&self) {
        self.note("healed");
        self.0.network.heal_all();
        self.0.network.shape_all(self.0.settings.links);
    }

    /// Has the driver do something, through a node.
    pub(crate) async fn drive(&self, n: u64, command: Command) -> Reply {
        let node = self.node(n);
        self.on(n, async move { node.drive(&command, Instant::now() + PATIENCE).await }).await.unwrap()
    }

    pub(crate) async fn create_keyspace(&self, n: u64, name: &str, layout: Layout, cuts: Cuts) {
        let (name, avoid) = (name.to_owned(), BTreeSet::new());
        let create = CreateKeyspace { name, kind: KeyKind::Bytes, layout, replicas: 0, cuts, avoid };
        let reply = self.drive(n, Command::CreateKeyspace(create)).await;
        assert!(matches!(reply, Reply::KeyspaceCreated { created: true, .. }), "{reply:?}");
    }

    /// Waits until all that run agree on the map, every partition has the members it should have and a leader that all
    /// know, and replicas of a partition are the same.
    pub(crate) async fn at_rest(&self) {
        eventually("the cluster is at rest", || self.check_rest()).await;
    }

    /// The same with clients under way: replicas may be apart at any moment.
    pub(crate) async fn at_rest_while_busy(&self) {
        eventually("the cluster is sound", || self.check_shape().map(drop)).await;
    }

    fn check_rest(&self) -> Result<(), String> {
        let map = self.check_shape()?;
        let nodes: Vec<Arc<Node>> = self.running().into_iter().map(|n| self.node(n)).collect();
        map.partitions().keys().try_for_each(|id| self.check_same(&nodes, *id))
    }

    fn check_shape(&self) -> Result<Arc<Map>, String> {
        let nodes: Vec<Arc<Node>> = self.running().into_iter().map(|n| self.node(n)).collect();
        let map = nodes[0].routing().map();
        map.check()?;
        if map.nodes().len() != self.all().len() {
            return Err(format!("{} of {} nodes are registered", map.nodes().len(), self.all().len()));
        }
        let voters = match map.nodes().len() {
            1 | 2 => 1,
            3 | 4 => 3,
            _ => 5,
        };
        let thin = map.partitions().values().find(|partition| {
            let wanted = map.keyspaces()[&partition.keyspace].replicas as usize;
            let possible = if partition.id == DRIVER { voters } else { wanted.min(map.nodes().len()) };
            !partition.is_at_rest() || partition.members.len() != possible
        });
        if let Some(partition) = thin {
            return Err(format!("not at rest: {partition:?}"));
        }
        for node in &nodes {
            let theirs = node.routing().map();
            if theirs.encode() != map.encode() {
                return Err(format!("{} has map {}, not {}", node.id(), theirs.version(), map.version()));
            }
            let health = node.health();
            if !health.driver_led || !health.leaderless.is_empty() {
                return Err(format!("{} finds: {}", node.id(), health.problems().join("; ")));
            }
            let driven = node.driver_group().map(|group| group.read(|m, _| m.state().map().version()));
            if driven.is_some_and(|version| version != map.version()) {
                return Err(format!("the driver's map on {} is {driven:?}, not {}", node.id(), map.version()));
            }
            for partition in node.partitions() {
                let expected = map.partition(partition.id).and_then(|partition| partition.replica_on(node.id()));
                if expected != Some(partition.group().replica()) {
                    return Err(format!("{} holds {} and should not", node.id(), partition.id));
                }
            }
        }
        Ok(map)
    }

    /// Whether all replicas that run have applied the same and are the same.
    fn check_same(&self, nodes: &[Arc<Node>], id: meridian::key::PartitionId) -> Result<(), String> {
        let mut states = Vec::new();
        for node in nodes {
            if id == DRIVER {
                let group = node.driver_group();
                states.extend(group.map(|group| {
                    let state = group.read(|m, at| (at, crate::trace::fnv(1, &m.state().encode())));
                    (state, group.status().last_log)
                }));
            } else {
                let partition = node.partition(id);
                states.extend(partition.map(|partition| {
                    let state = partition.group().read(|m, at| (at, m.store().digest()));
                    (state, partition.group().status().last_log)
                }));
            }
        }
        let wanted = nodes[0].routing().map().partition(id).map_or(0, |partition| {
            partition.members.iter().filter(|member| nodes.iter().any(|node| node.id() == member.node)).count()
        });
        if states.len() != wanted {
            return Err(format!("{id} has {} replicas that run, not {wanted}", states.len()));
        }
        let Some(((at, digest), last)) = states.first() else { return Ok(()) };
        if at.index != *last || states.iter().any(|((other, _), last)| other != at || *last != at.index) {
            return Err(format!("{id} has not applied the same everywhere: {states:?}"));
        }
        assert!(states.iter().all(|((_, other), _)| other == digest), "replicas of {id} differ: {states:?}");
        Ok(())
    }

    /// The node that leads a partition of `default`, as those that run say.
    pub(crate) fn leader_of(&self, id: meridian::key::PartitionId) -> Option<u64> {
        let leads = |n: &u64| match self.life(*n) {
            Some(life) if id == DRIVER => life.node.driver_group().is_some_and(|group| group.is_leader()),
            Some(life) => life.node.partition(id).is_some_and(|partition| partition.group().is_leader()),
            None => false,
        };
        self.running().into_iter().find(leads)
    }

    /// The only partition of a keyspace.
    pub(crate) fn partition_of(&self, keyspace: &str) -> meridian::key::PartitionId {
        let map = self.node(self.running()[0]).routing().map();
        let keyspace = map.keyspace_by_name(keyspace).unwrap_or_else(|| panic!("no keyspace {keyspace}"));
        map.partitions_of(keyspace.id).next().unwrap().id
    }
}
