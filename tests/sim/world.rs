//! Machines with disks, snapshots and clocks, the nodes that live on them, and the network between them.

use crate::{
    faults::Way,
    plan::{NodeClock, Sizing, stream, usual_down_after_ms},
    trace::{Tap, Trace},
};
use meridian::{
    env::{Clock, Scope, spawn},
    key::{DRIVER, KeyKind, KeyspaceId, Layout, NodeId, PartitionId, Span},
    log::{
        LogEngine as _, NodeMeta as _,
        memory::{Lose, MemoryLog, SyncTime},
        snapshots::MemorySnapshots,
    },
    node::{
        Budgets, Node, Parts,
        config::{Limits, NodeConfig},
    },
    placement::{Command, CreateKeyspace, Cuts, Map, RegisterNode, Reply},
    raft::{RaftConfig, RaftHub},
    server::Responder,
    transport::{
        endpoint::Endpoint,
        memory::{MemoryNetwork, Shape},
    },
};
use rand::{RngExt as _, rngs::StdRng};
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::AbortHandle,
    time::{Instant, sleep},
};

/// Virtual time that anything which has to happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Wall time at the beginning.
const WALL_BEGAN_MS: u64 = 1_700_000_000_000;
/// Patience of a process with one node that may let it join.
const JOIN_DEADLINE: Duration = Duration::from_secs(5);
const CLUSTER: &str = "sim";

/// Time as a node's machine tells it: virtual, with a wall clock that can be set, both with a rate that can be wrong.
pub(crate) struct FakeClock {
    wall_off_ms: AtomicI64,
    rate: Mutex<Rate>,
}

/// Since `since` the clock has gone on from `at` by 1 + `ppm`/1,000,000 for each second.
struct Rate {
    since: Instant,
    at: Duration,
    ppm: i64,
}

impl FakeClock {
    fn new(began: Instant, clock: NodeClock) -> Self {
        let rate = Rate { since: began, at: Duration::ZERO, ppm: clock.rate_ppm };
        Self { wall_off_ms: clock.wall_off_ms.into(), rate: Mutex::new(rate) }
    }

    /// Sets the wall clock this far from the right time.
    pub(crate) fn set_wall_off(&self, ms: i64) {
        self.wall_off_ms.store(ms, Ordering::Relaxed);
    }

    /// Makes the clocks go faster, or slower, by so many millionths.
    pub(crate) fn set_rate(&self, ppm: i64) {
        let at = self.elapsed();
        *self.rate.lock().unwrap() = Rate { since: Instant::now(), at, ppm };
    }
}

impl Clock for FakeClock {
    fn wall_ms(&self) -> u64 {
        let right = WALL_BEGAN_MS + self.elapsed().as_millis() as u64;
        right.saturating_add_signed(self.wall_off_ms.load(Ordering::Relaxed))
    }

    fn elapsed(&self) -> Duration {
        let rate = self.rate.lock().unwrap();
        rate.at + rate.since.elapsed().mul_f64(1.0 + rate.ppm as f64 / 1e6)
    }

    fn cpu(&self) -> Duration {
        Duration::ZERO
    }
}

/// What can be chosen.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) raft: RaftConfig,
    pub(crate) replicas: u32,
    pub(crate) links: Shape,
    pub(crate) disks: SyncTime,
    /// Of node 1, 2, …
    pub(crate) clocks: Vec<NodeClock>,
    /// Silence after which a node's replicas are built anew.
    pub(crate) down_after: Duration,
    /// When partitions are cut and merged by themselves, if they are.
    pub(crate) sizing: Option<Sizing>,
    pub(crate) keep_trace: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let links =
            Shape { delay_min: Duration::from_micros(100), delay_max: Duration::from_millis(2), ..Shape::default() };
        Self {
            raft: RaftConfig::default(),
            replicas: 3,
            links,
            disks: SyncTime::default(),
            clocks: Vec::new(),
            down_after: Duration::from_millis(usual_down_after_ms()),
            sizing: None,
            keep_trace: false,
        }
    }
}

/// What outlives a crash, and the node's life until then.
struct Machine {
    disk: Arc<MemoryLog>,
    snapshots: MemorySnapshots,
    clock: Arc<FakeClock>,
    /// How fast the disk is.
    pace: SyncTime,
    lives: u64,
    life: Option<Life>,
    /// Its tasks are being ended.
    crashing: bool,
    /// It never comes back.
    lost: bool,
}

#[derive(Clone)]
pub(crate) struct Life {
    pub(crate) scope: Arc<Scope>,
    pub(crate) node: Arc<Node>,
    pub(crate) responder: Responder,
    /// Syncs the disk.
    syncing: AbortHandle,
}

/// Clones are the same world.
#[derive(Clone)]
pub(crate) struct World(Arc<Inner>);

struct Inner {
    network: MemoryNetwork,
    trace: Arc<Trace>,
    machines: Mutex<BTreeMap<u64, Machine>>,
    /// What has happened, by name.
    counts: Mutex<BTreeMap<String, u64>>,
    /// What maps have given to partitions, also to those that are gone.
    owned: Mutex<BTreeMap<(KeyspaceId, PartitionId), Vec<Span>>>,
    rng: Mutex<StdRng>,
    seed: u64,
    settings: Settings,
}

thread_local! {
    /// What panicked on this thread, which runs one world at a time.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Runs a world to the end of `run`. A panic anywhere in it is a failure of the test, also where the runtime catches it.
pub(crate) fn simulate<T>(seed: u64, settings: Settings, run: impl AsyncFnOnce(World) -> T) -> T {
    let (outcome, panics) = simulate_noting_panics(seed, settings, run);
    assert!(panics.is_empty(), "seed {seed}: something panicked and the runtime caught it: {panics:?}");
    outcome
}

/// The same, and what panicked.
pub(crate) fn simulate_noting_panics<T>(
    seed: u64,
    settings: Settings,
    run: impl AsyncFnOnce(World) -> T,
) -> (T, Vec<String>) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let payload = info.payload();
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            let at = info.location().map_or_else(String::new, |at| format!("\nat {at}"));
            PANICS.with_borrow_mut(|panics| panics.push(format!("{text}{at}")));
            before(info);
        }));
        if let Ok(filter) = std::env::var("SIM_LOG") {
            let filter = tracing_subscriber::EnvFilter::new(filter);
            tracing_subscriber::fmt().with_env_filter(filter).without_time().with_test_writer().init();
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    PANICS.take();
    let outcome = runtime.block_on(async {
        let network = MemoryNetwork::new(seed);
        network.shape_all(settings.links);
        let world = World(Arc::new(Inner {
            network,
            trace: Trace::new(settings.keep_trace),
            machines: Mutex::default(),
            counts: Mutex::default(),
            owned: Mutex::default(),
            rng: Mutex::new(stream(seed, "world")),
            seed,
            settings,
        }));
        Scope::seeded(seed).run(run(world)).await
    });
    drop(runtime);
    (outcome, PANICS.take())
}

/// Ends a life when its disk fails, as the process does.
async fn end_with_the_disk(world: World, n: u64, life: u64) {
    let why = world.disk(n).failed().await;
    if world.lives(n) == life && world.life(n).is_some() {
        world.note(format_args!("{} ends: {why}", NodeId(n)));
        world.count("ended-by-disk");
        world.crash(n, Lose::All).await;
    }
}

/// Waits until `ready`, in virtual time.
pub(crate) async fn eventually(what: &str, mut ready: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(why) = ready() {
        assert!(Instant::now() < deadline, "in vain: {what}: {why}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn sync(disk: &Arc<MemoryLog>, pace: SyncTime) -> AbortHandle {
    let disk = Arc::clone(disk);
    spawn(async move { disk.run(pace).await }).abort_handle()
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
        let node = self.live(1, Map::default()).unwrap().node;
        let process = self.process(1, Some(founder));
        let deadline = Instant::now() + PATIENCE;
        let replicas = self.0.settings.replicas;
        let founded = self.on(1, async move { node.found(CLUSTER.to_owned(), process, replicas, deadline).await });
        founded.await.unwrap();
    }

    /// Lets one more node join through any that runs; returns its number.
    pub(crate) async fn join(&self) -> u64 {
        let n = self.all().len() as u64 + 1;
        let deadline = Instant::now() + PATIENCE;
        let (id, map) = loop {
            let awake = self.awake();
            if let Some(via) = awake.get(self.draw(awake.len().max(1) as u64) as usize) {
                let (life, process) = (self.life(*via).unwrap(), self.process(n, None));
                let node = Arc::clone(&life.node);
                let admitted = life
                    .scope
                    .enter(|| spawn(async move { node.admit(process, Instant::now() + JOIN_DEADLINE).await }));
                match admitted.await {
                    Ok(Ok(admitted)) => break admitted,
                    Ok(Err(error)) => assert!(error.is_retryable() && Instant::now() < deadline, "{error:?}"),
                    Err(ended) => assert!(ended.is_cancelled(), "{ended}"),
                }
            }
            sleep(Duration::from_millis(100)).await;
        };
        assert_eq!(id, NodeId(n));
        assert!(map.node(id).is_some(), "a process is admitted with a map that names it");
        self.live(n, Map::clone(&map)).unwrap();
        n
    }

    /// Starts a node's next life with this map. One whose log is damaged refuses.
    fn live(&self, n: u64, map: Map) -> io::Result<Life> {
        let id = NodeId(n);
        let settings = &self.0.settings;
        let mut machines = self.0.machines.lock().unwrap();
        let machine = machines.entry(n).or_insert_with(|| Machine {
            disk: Arc::new(MemoryLog::simulated()),
            snapshots: MemorySnapshots::default(),
            clock: Arc::new(FakeClock::new(
                Instant::now() - self.0.trace.now(),
                settings.clocks.get(n as usize - 1).copied().unwrap_or_default(),
            )),
            pace: settings.disks,
            lives: 0,
            life: None,
            crashing: false,
            lost: false,
        });
        assert!(machine.life.is_none() && !machine.crashing, "node {n} runs already");
        let recovered = machine.disk.recover()?;
        if let Err(full) = machine.disk.put_meta("map", map.encode()) {
            // The failure was that of a process which has ended by it.
            machine.disk.crash(Lose::All);
            return Err(full);
        }
        machine.lives += 1;
        let scope = Scope::seeded(self.0.seed.wrapping_mul(1_000_000).wrapping_add(n * 1_000 + machine.lives));
        let life = scope.enter(|| {
            let port = self.0.network.port(id);
            let tap = Tap { from: id, port, trace: Arc::clone(&self.0.trace) };
            let endpoint = Endpoint::new(id, Arc::new(tap));
            let syncing = sync(&machine.disk, machine.pace);
            let snapshots = Arc::new(machine.snapshots.clone());
            let clock: Arc<dyn Clock> = Arc::clone(&machine.clock) as _;
            let (engine, config) = (Arc::clone(&machine.disk) as _, settings.raft.clone());
            let raft = RaftHub::new(Arc::clone(&endpoint), engine, snapshots, Arc::clone(&clock), config).unwrap();
            let disk = Arc::clone(&machine.disk);
            let keep_map = Box::new(move |map: &Map| disk.put_meta("map", map.encode()));
            let usual = NodeConfig::default();
            let usual = Sizing { split_bytes: usual.split_bytes, merge_after_ms: usual.merge_after_ms };
            let Sizing { split_bytes, merge_after_ms } = settings.sizing.unwrap_or(usual);
            let node = Node::start(Parts {
                clock,
                endpoint: Arc::clone(&endpoint),
                raft,
                recovered,
                map,
                keep_map,
                down_after: settings.down_after,
                split_bytes,
                // Nothing costs CPU time here: work is cut however little was used.
                busy_cores: 0.0,
                merge_after: Duration::from_millis(merge_after_ms),
                budgets: Budgets::default(),
            });
            let responder = Responder::start(Arc::clone(&node), Arc::new(Limits::default()), Duration::from_secs(5));
            self.0.network.attach(id, endpoint);
            Life { scope: Arc::clone(&scope), node, responder, syncing }
        });
        machine.life = Some(life.clone());
        spawn(end_with_the_disk(self.clone(), n, machine.lives));
        self.note(format_args!("{id} begins life {}", machine.lives));
        Ok(life)
    }

    /// Loses power: what was not synced goes as `lose` says.
    pub(crate) async fn crash(&self, n: u64, lose: Lose) {
        let (life, disk) = {
            let mut machines = self.0.machines.lock().unwrap();
            let machine = machines.get_mut(&n).unwrap();
            machine.crashing = true;
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
        self.0.machines.lock().unwrap().get_mut(&n).unwrap().crashing = false;
    }

    /// Waits until a node runs, or is down with nothing of it left.
    pub(crate) async fn settled(&self, n: u64) {
        while self.0.machines.lock().unwrap()[&n].crashing {
            tokio::task::yield_now().await;
        }
    }

    /// Starts a crashed node again, from what its disk has kept.
    pub(crate) fn restart(&self, n: u64) -> Life {
        self.try_restart(n).unwrap()
    }

    /// The same with a disk that may be damaged.
    pub(crate) fn try_restart(&self, n: u64) -> io::Result<Life> {
        let kept = self.disk(n).get_meta("map")?.expect("it is kept before anything else");
        self.live(n, Map::decode(&kept).map_err(io::Error::other)?)
    }

    /// Makes the disk of a node faster or slower.
    pub(crate) fn set_pace(&self, n: u64, pace: SyncTime) {
        let mut machines = self.0.machines.lock().unwrap();
        let machine = machines.get_mut(&n).unwrap();
        machine.pace = pace;
        if let Some(life) = &mut machine.life {
            life.syncing.abort();
            life.syncing = life.scope.enter(|| sync(&machine.disk, pace));
        }
    }

    /// Nodes that never come back.
    pub(crate) fn lost(&self) -> Vec<u64> {
        let machines = self.0.machines.lock().unwrap();
        machines.iter().filter(|(_, machine)| machine.lost).map(|(n, _)| *n).collect()
    }

    pub(crate) fn set_lost(&self, n: u64) {
        self.0.machines.lock().unwrap().get_mut(&n).unwrap().lost = true;
    }

    /// Ends the process of a node that never comes back.
    pub(crate) async fn retire(&self, n: u64) {
        self.set_lost(n);
        if self.life(n).is_some() {
            self.crash(n, Lose::All).await;
        }
        self.settled(n).await;
    }

    /// The newest map that a node that runs has; none if none runs.
    pub(crate) fn map(&self) -> Option<Arc<Map>> {
        let maps = self.running().into_iter().map(|n| self.node(n).routing().map());
        maps.max_by_key(|map| map.version())
    }

    /// How often a node has started.
    pub(crate) fn lives(&self, n: u64) -> u64 {
        self.0.machines.lock().unwrap()[&n].lives
    }

    /// Notes that something has happened.
    pub(crate) fn count(&self, what: &str) {
        *self.0.counts.lock().unwrap().entry(what.to_owned()).or_default() += 1;
    }

    /// Notes what a map gives to its partitions.
    pub(crate) fn note_owned(&self, map: &Map) {
        let mut owned = self.0.owned.lock().unwrap();
        for partition in map.partitions().values() {
            let spans = owned.entry((partition.keyspace, partition.id)).or_default();
            if !spans.contains(&partition.span) {
                spans.push(partition.span.clone());
            }
        }
    }

    /// Whether a map has ever given this position to a partition.
    pub(crate) fn has_owned(&self, keyspace: KeyspaceId, partition: PartitionId, position: &[u8]) -> bool {
        let owned = self.0.owned.lock().unwrap();
        owned.get(&(keyspace, partition)).is_some_and(|spans| spans.iter().any(|span| span.contains(position)))
    }

    /// What has happened.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        self.0.counts.lock().unwrap().clone()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(crate) fn disk(&self, n: u64) -> Arc<MemoryLog> {
        Arc::clone(&self.0.machines.lock().unwrap()[&n].disk)
    }

    pub(crate) fn snapshots(&self, n: u64) -> MemorySnapshots {
        self.0.machines.lock().unwrap()[&n].snapshots.clone()
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

    /// Nodes that run and are not paused.
    pub(crate) fn awake(&self) -> Vec<u64> {
        let asleep = |n: &u64| self.life(*n).is_none_or(|life| life.scope.is_paused());
        self.all().into_iter().filter(|n| !asleep(n)).collect()
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

    /// Makes every link sound again: nothing is lost any more, what is to come to rest does not wait for luck. Delays stay.
    pub(crate) fn heal(&self) {
        self.note("healed");
        self.0.network.heal_all();
        self.0.network.shape_all(Shape { loss: 0.0, ..self.0.settings.links });
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

    /// The node that leads a partition of `default`, as those that run say.
    pub(crate) fn leader_of(&self, id: PartitionId) -> Option<u64> {
        let leads = |n: &u64| match self.life(*n) {
            Some(life) if id == DRIVER => life.node.driver_group().is_some_and(|group| group.is_leader()),
            Some(life) => life.node.partition(id).is_some_and(|partition| partition.group().is_leader()),
            None => false,
        };
        self.running().into_iter().find(leads)
    }

    /// The only partition of a keyspace.
    pub(crate) fn partition_of(&self, keyspace: &str) -> PartitionId {
        let map = self.node(self.running()[0]).routing().map();
        let keyspace = map.keyspace_by_name(keyspace).unwrap_or_else(|| panic!("no keyspace {keyspace}"));
        map.partitions_of(keyspace.id).next().unwrap().id
    }
}
