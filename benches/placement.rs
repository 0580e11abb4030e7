//! The planner, the ring and the balancer at 1,000 nodes and 100,000 partitions: times, bytes, movement.
//!
//! `cargo bench --bench placement`; figures are kept in benches/README.md.

use meridian::{
    key::{KeyKind, KeyspaceId, Layout, NodeId, PartitionId},
    placement::{
        Balancer, Command, CreateKeyspace, Cuts, Decision, Health, Liveness, Loads, Map, PartitionLoad, Placer,
        RegisterNode, Ring, State, Step,
        balance::{HOLD_MS, Pace},
        plan,
    },
};
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, BTreeSet};

const NODES: u64 = 1_000;
const ZONES: u64 = 5;
const PARTITIONS: u64 = 100_000;
const PARTITIONS_PER_KEYSPACE: u64 = 1_000;
const REPLICAS: u32 = 3;
/// No limit: the whole of what a change asks for at once.
const ALL_AT_ONCE: Pace = Pace { moves_max: usize::MAX, moves_per_node_max: usize::MAX, leaders_max: usize::MAX };

fn main() {
    let resident_before = resident_kib();
    let mut state = timed("form the cluster (commands applied)", cluster);
    println!("  resident memory of the state: {} MiB", (resident_kib() - resident_before) / 1024);
    let map = timed("encode the map", || state.map().encode());
    println!("  bytes of the map: {} ({} per partition)", map.len(), map.len() as u64 / PARTITIONS);
    let _map = timed("decode and check the map", || Map::decode(&map).expect("ours"));
    report_loads();
    timed("plan, nothing to do", || assert_eq!(plan(&state, &all_alive(&state)), []));

    println!("even loads");
    let loads = Loads(state.map().partitions().keys().map(|id| (*id, load(64 << 20, 100))).collect());
    rest(&mut state, &loads);
    join(&mut state, &loads);
    lose("leave of one node", &state, |node| node == NodeId(500));
    lose("loss of one zone", &state, |node| node.0 % ZONES == 3);

    println!("skewed sizes (1 to 512 MiB) and loads (1 to 5,000 requests per second)");
    let mut dice = Dice(11);
    let mut skewed = |id: &PartitionId| (*id, load(1 << (20 + dice.roll(10)), 5_000 / (1 + dice.roll(5_000)) as u32));
    let loads = Loads(state.map().partitions().keys().map(&mut skewed).collect());
    rest(&mut state, &loads);
    join(&mut state, &loads);
}

fn load(bytes: u64, reads_per_s: u32) -> PartitionLoad {
    PartitionLoad { bytes, rows: bytes / 256, reads_per_s, writes_per_s: reads_per_s / 4, traffic_per_s: 0 }
}

/// Random enough, and the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// CPU time of this process: other work on the machine does not count.
fn cpu_ms() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let started_ms = cpu_ms();
    let done = work();
    println!("  {what}: {:.1} ms", cpu_ms() - started_ms);
    done
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn process(id: u64) -> RegisterNode {
    RegisterNode {
        cluster_id: String::new(),
        uuid: format!("00000000-0000-4000-8000-{id:012x}"),
        address: format!("h{id}:7700"),
        zone: format!("z{}", id % ZONES),
        weight_milli: 0,
        previous: None,
        ephemeral: false,
    }
}

fn cluster() -> State {
    let mut state = State::new();
    let bootstrap = Command::Bootstrap { cluster_id: "bench".to_owned(), node: process(1), replicas_default: REPLICAS };
    state.apply(bootstrap).expect("the first command");
    for id in 2..=NODES {
        state.apply(Command::RegisterNode(process(id))).expect("a new node");
    }
    for i in 0..PARTITIONS / PARTITIONS_PER_KEYSPACE {
        let request = CreateKeyspace {
            name: format!("k{i}"),
            kind: KeyKind::Bytes,
            layout: Layout::Hashed,
            replicas: REPLICAS,
            cuts: Cuts::Even(PARTITIONS_PER_KEYSPACE as u32),
            avoid: BTreeSet::new(),
        };
        state.apply(Command::CreateKeyspace(request)).expect("a new keyspace");
    }
    arrive(&mut state);
    // The first partition of all was made when there was one node.
    loop {
        let decisions = plan(&state, &all_alive(&state));
        if decisions.is_empty() {
            return state;
        }
        perform(&mut state, decisions);
    }
}

fn all_alive(state: &State) -> Liveness {
    Liveness(state.map().nodes().keys().map(|id| (*id, Health::Alive { for_ms: 60_000 })).collect())
}

/// Every group becomes its target and says so.
fn arrive(state: &mut State) {
    let moving = state.map().partitions().values().filter(|partition| !partition.is_at_rest());
    for partition in moving.cloned().collect::<Vec<_>>() {
        let members_epoch = partition.epoch.members + 1;
        let report = Command::Report { partition: partition.id, members_epoch, members: partition.target };
        state.apply(report).expect("a sound report");
    }
}

fn perform(state: &mut State, decisions: Vec<Decision>) {
    for decision in decisions {
        state.apply(Command::Step(decision.step)).expect("decided on this state");
    }
    arrive(state);
}

/// What one node tells of the partitions that it leads, and what the driver's leader makes of it.
fn report_loads() {
    let led = PARTITIONS / NODES;
    let report = Loads((0..led).map(|i| (PartitionId(1 + i * NODES), load(64 << 20, 1_000))).collect());
    let mut known = Loads((1..=PARTITIONS).map(|id| (PartitionId(id), load(1, 1))).collect());
    let bytes = report.encode();
    let started_ms = cpu_ms();
    for _ in 0..NODES {
        known.take(&Loads::decode(&bytes).expect("ours"), 2_000);
    }
    let each = (cpu_ms() - started_ms) * 1e3 / NODES as f64;
    println!("  a node's report of {led} loads: {} bytes, {each:.1} µs to decode and take", bytes.len());
}

/// Bytes of each node's replicas.
fn bytes_held(state: &State, loads: &Loads) -> BTreeMap<NodeId, u64> {
    let mut held: BTreeMap<NodeId, u64> = state.map().nodes().keys().map(|id| (*id, 0)).collect();
    for partition in state.map().partitions().values().filter(|partition| partition.id.0 > 0) {
        for replica in &partition.target {
            *held.get_mut(&replica.node).expect("a node of the map") += loads.of(partition.id).size();
        }
    }
    held
}

fn max_over_mean(state: &State, loads: &Loads) -> f64 {
    let held = bytes_held(state, loads);
    *held.values().max().expect("there are nodes") as f64 * held.len() as f64 / held.values().sum::<u64>() as f64
}

/// Bytes that the decisions copy.
fn bytes_moved(state: &State, loads: &Loads, decisions: &[Decision]) -> u64 {
    let added = |decision: &Decision| {
        let Step::SetTarget { partition, nodes, .. } = &decision.step else { return 0 };
        let known = state.map().partition(*partition).expect("a partition of the map");
        let added = nodes.iter().filter(|node| known.replica_on(**node).is_none()).count() as u64;
        added * loads.of(*partition).size()
    };
    decisions.iter().map(added).sum()
}

/// Lets the balancer do all it wants at once.
fn rest(state: &mut State, loads: &Loads) {
    let (liveness, before) = (all_alive(state), max_over_mean(state, loads));
    let mut balancer = Balancer::with_pace(ALL_AT_ONCE);
    let started_ms = cpu_ms();
    balancer.plan(state, &liveness, loads, 0);
    let decisions = balancer.plan(state, &liveness, loads, HOLD_MS);
    let took_ms = cpu_ms() - started_ms;
    let (moved, all) = (bytes_moved(state, loads, &decisions), bytes_held(state, loads).values().sum::<u64>());
    let steps = decisions.len();
    perform(state, decisions);
    println!(
        "  balance: {steps} steps in {took_ms:.1} ms move {:.2} % of all bytes; max/mean of bytes {before:.3} -> {:.3}",
        moved as f64 * 100.0 / all as f64,
        max_over_mean(state, loads)
    );
}

/// One node more, whole and step by step.
fn join(state: &mut State, loads: &Loads) {
    let id = state.map().nodes().len() as u64 + 1;
    state.apply(Command::RegisterNode(process(id))).expect("a new node");
    let liveness = all_alive(state);
    let mut balancer = Balancer::with_pace(ALL_AT_ONCE);
    timed("balancer, one call", || assert!(balancer.plan(state, &liveness, loads, 0).is_empty()));
    let decisions = timed("join, all of its moves planned", || balancer.plan(state, &liveness, loads, HOLD_MS));
    let (moved, all) = (bytes_moved(state, loads, &decisions), bytes_held(state, loads).values().sum::<u64>());
    let share = all / id;
    perform(state, decisions);
    println!(
        "  join: moved {:.3} of the node's share, it holds {:.3} of it; max/mean of bytes {:.3}",
        moved as f64 / share as f64,
        bytes_held(state, loads)[&NodeId(id)] as f64 / share as f64,
        max_over_mean(state, loads)
    );
}

/// Nodes that go: their replicas are placed again, all others stay.
fn lose(what: &str, state: &State, lost: impl Fn(NodeId) -> bool) {
    let gone: BTreeSet<NodeId> = state.map().nodes().keys().copied().filter(|node| lost(*node)).collect();
    let data = || state.map().partitions().values().filter(|partition| partition.id.0 > 0);
    let started_ms = cpu_ms();
    let demand = BTreeMap::from([(REPLICAS, data().count() as u64)]);
    let mut placer = Placer::new(Ring::new(state.map().nodes().values(), &gone), &demand);
    data().for_each(|partition| placer.occupy(partition.target.iter().map(|replica| replica.node)));
    let (mut held, mut rebuilt, mut needed) = (BTreeMap::<NodeId, u64>::new(), 0, 0);
    for partition in data() {
        let was: Vec<NodeId> = partition.target.iter().map(|replica| replica.node).collect();
        let kept: Vec<NodeId> = was.iter().copied().filter(|node| !gone.contains(node)).collect();
        let now = if kept.len() == was.len() {
            kept.clone()
        } else {
            placer.vacate(was.iter().copied());
            placer.occupy(kept.iter().copied());
            placer.extend(KeyspaceId(partition.keyspace.0), partition.id, &kept, REPLICAS)
        };
        needed += was.len() - kept.len();
        rebuilt += now.iter().filter(|node| !was.contains(node)).count();
        now.into_iter().for_each(|node| *held.entry(node).or_default() += 1);
    }
    let took_ms = cpu_ms() - started_ms;
    let mean = held.values().sum::<u64>() as f64 / held.len() as f64;
    let most = held.values().copied().max().unwrap_or(0) as f64;
    println!("  {what}: {rebuilt} replicas placed in {took_ms:.1} ms, {needed} are lost; max/mean {:.3}", most / mean);
}
