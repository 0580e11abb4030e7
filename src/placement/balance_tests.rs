use super::*;
use crate::{
    key::NodeId,
    placement::{
        Command, PartitionLoad, Phase, Reply, Step,
        plan::{
            plan,
            tests::{arrive, cluster, create, liveness, perform, process, settle, spare},
        },
    },
};
use proptest::prelude::*;

/// Random enough, and the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

const MIB: u64 = 1 << 20;

fn even_loads(state: &State, bytes: u64) -> Loads {
    let load = PartitionLoad { bytes, ..PartitionLoad::default() };
    Loads(state.map().partitions().keys().map(|id| (*id, load)).collect())
}

/// Bytes of each node's replicas in shares of the mean, the most first.
fn max_over_mean(state: &State, loads: &Loads, leaders: bool) -> f64 {
    let mut held: BTreeMap<NodeId, u64> = state.map().nodes().keys().map(|id| (*id, 0)).collect();
    for partition in state.map().partitions().values().filter(|partition| partition.id != DRIVER) {
        let load = loads.of(partition.id);
        for replica in partition.target.iter().take(if leaders { 1 } else { usize::MAX }) {
            *held.get_mut(&replica.node).expect("known") += if leaders { load.leader_work() } else { load.bytes };
        }
    }
    let sum: u64 = held.values().sum();
    *held.values().max().expect("a node") as f64 * held.len() as f64 / sum as f64
}

/// Calls the balancer until it is calm; answers with its decisions.
fn calm(
    state: &mut State,
    balancer: &mut Balancer,
    liveness: &Liveness,
    loads: &Loads,
    now_ms: &mut u64,
) -> Vec<Decision> {
    let (mut all, mut idle_ms) = (Vec::new(), 0);
    while idle_ms <= COOLDOWN_MS + HOLD_MS {
        *now_ms += HOLD_MS;
        let decisions = balancer.plan(state, liveness, loads, *now_ms);
        idle_ms = if decisions.is_empty() { idle_ms + HOLD_MS } else { 0 };
        perform(state, &decisions);
        arrive(state);
        all.extend(decisions);
        assert!(all.len() < 10_000, "never calm");
    }
    all
}

/// Replicas that went to another node.
fn moves(decisions: &[Decision]) -> usize {
    decisions.iter().filter(|decision| decision.why.contains(" moves to ")).count()
}

#[test]
fn a_node_that_joins_gets_its_share_and_little_more_is_moved() {
    let mut state = cluster(&["a", "b", "c", "a", "b"]);
    create(&mut state, 3, 40);
    arrive(&mut state);
    let five = liveness(1..=5, &[]);
    settle(&mut state, &five);
    let (loads, mut balancer, mut now_ms) = (even_loads(&state, 64 * MIB), Balancer::default(), 0);
    calm(&mut state, &mut balancer, &five, &loads, &mut now_ms);
    state.apply(Command::RegisterNode(process(6, "c"))).expect("new node");
    let six = liveness(1..=6, &[]);
    let moved = moves(&calm(&mut state, &mut balancer, &six, &loads, &mut now_ms));
    let ideal = 41.0 * 3.0 / 6.0;
    assert!((0.8 * ideal..=1.2 * ideal).contains(&(moved as f64)), "{moved} moves, {ideal} are ideal");
    assert!(max_over_mean(&state, &loads, false) <= 1.25, "{}", max_over_mean(&state, &loads, false));
    assert!(max_over_mean(&state, &loads, true) <= 1.3, "{}", max_over_mean(&state, &loads, true));
    assert_eq!(state.map().check(), Ok(()));
}

#[test]
fn nothing_is_moved_while_a_member_is_dead_or_a_node_is_off_for_a_moment() {
    let mut state = cluster(&["a", "a", "a"]);
    create(&mut state, 3, 12);
    arrive(&mut state);
    let three = liveness(1..=3, &[]);
    settle(&mut state, &three);
    state.apply(Command::RegisterNode(process(4, "a"))).expect("new node");
    let loads = even_loads(&state, 64 * MIB);
    let mut balancer = Balancer::default();
    assert_eq!(balancer.plan(&state, &liveness([1, 2, 4], &[3]), &loads, 0), []);
    assert_eq!(balancer.plan(&state, &liveness([1, 2, 4], &[3]), &loads, HOLD_MS), [], "n3 has a replica of each");
    let without = balancer.plan(&state, &liveness([1, 2, 3], &[4]), &loads, 2 * HOLD_MS);
    assert_eq!(moves(&without), 0, "n4 is not there: {without:?}");
    let (four, mut balancer) = (liveness(1..=4, &[]), Balancer::default());
    let first = balancer.plan(&state, &four, &loads, 3 * HOLD_MS);
    assert_eq!(moves(&first), 0, "it may be for a moment: {first:?}");
    let decisions = balancer.plan(&state, &four, &loads, 4 * HOLD_MS);
    assert_eq!(moves(&decisions), MOVES_PER_NODE_MAX, "{decisions:?}");
    assert!(decisions[0].why.contains("of its share of bytes and n4 0.00"), "{}", decisions[0].why);
}

#[test]
fn leaders_of_what_is_asked_for_most_are_spread() {
    let mut state = cluster(&["a", "a", "a"]);
    create(&mut state, 3, 12);
    arrive(&mut state);
    let all = liveness(1..=3, &[]);
    settle(&mut state, &all);
    let mut loads = even_loads(&state, 64 * MIB);
    // What n1 is to lead is asked for ten times as much.
    for (id, load) in &mut loads.0 {
        let first = state.map().partition(*id).expect("known").target[0].node;
        load.reads_per_s = if first == NodeId(1) { 2_000 } else { 200 };
    }
    let before = max_over_mean(&state, &loads, true);
    let decisions = calm(&mut state, &mut Balancer::default(), &all, &loads, &mut 0);
    let after = max_over_mean(&state, &loads, true);
    assert!(before > 2.0 && after < 1.3, "{before} before, {after} after");
    assert_eq!(moves(&decisions), 0, "leaders move without data");
}

#[test]
fn replicas_that_are_written_to_most_are_spread() {
    let mut state = cluster(&["a", "a", "a"]);
    create(&mut state, 3, 24);
    arrive(&mut state);
    settle(&mut state, &liveness(1..=3, &[]));
    for id in 4..=6 {
        state.apply(Command::RegisterNode(process(id, "a"))).expect("new node");
    }
    let all = liveness(1..=6, &[]);
    let (mut loads, mut balancer, mut now_ms) = (even_loads(&state, 64 * MIB), Balancer::default(), 0);
    calm(&mut state, &mut balancer, &all, &loads, &mut now_ms);
    let on_n1 = |state: &State, id: &PartitionId| {
        state.map().partition(*id).is_some_and(|partition| partition.replica_on(NodeId(1)).is_some())
    };
    for (id, load) in &mut loads.0 {
        load.writes_per_s = if on_n1(&state, id) { 2_000 } else { 100 };
    }
    let work = |state: &State| {
        let held = |(id, load): (&PartitionId, &PartitionLoad)| if on_n1(state, id) { load.member_work() } else { 0 };
        let all: u64 = loads.0.values().map(PartitionLoad::member_work).sum();
        loads.0.iter().map(held).sum::<u64>() as f64 * 6.0 / (3 * all) as f64
    };
    let before = work(&state);
    calm(&mut state, &mut balancer, &all, &loads, &mut now_ms);
    let after = work(&state);
    assert!(before > 1.5 && after < 1.3, "{before} before, {after} after");
    assert!(max_over_mean(&state, &loads, false) < 1.25);
}

#[test]
fn zones_that_come_later_get_a_replica_of_everything() {
    let mut state = cluster(&["a", "a", "a"]);
    create(&mut state, 3, 6);
    arrive(&mut state);
    settle(&mut state, &liveness(1..=3, &[]));
    for (id, zone) in [(4, "b"), (5, "c"), (6, "c")] {
        state.apply(Command::RegisterNode(process(id, zone))).expect("new node");
    }
    let all = liveness(1..=6, &[]);
    let loads = even_loads(&state, MIB);
    calm(&mut state, &mut Balancer::default(), &all, &loads, &mut 0);
    for partition in state.map().partitions().values().filter(|partition| partition.id != DRIVER) {
        let zone = |replica: &crate::key::Replica| state.map().node(replica.node).expect("known").zone.clone();
        let zones: BTreeSet<String> = partition.members.iter().map(zone).collect();
        assert_eq!(zones.len(), 3, "{partition:?}");
    }
}

/// Hours of loads that waver, some by half: after the first hour nothing moves.
#[test]
fn wavering_loads_move_nothing_for_hours() {
    let mut state = cluster(&["a", "b", "c", "a", "b", "c"]);
    create(&mut state, 3, 60);
    arrive(&mut state);
    let all = liveness(1..=6, &[]);
    settle(&mut state, &all);
    let (mut dice, mut balancer) = (Dice(7), Balancer::default());
    let base: Loads = Loads(
        state
            .map()
            .partitions()
            .keys()
            .map(|id| {
                let hot = 1 << dice.roll(7);
                let (bytes, reads_per_s) = (MIB << dice.roll(7), 20 * hot);
                (*id, PartitionLoad { bytes, rows: 0, reads_per_s, writes_per_s: 10 * hot, traffic_per_s: 0 })
            })
            .collect(),
    );
    let (mut moves_of_hour, mut loads, hours) = (Vec::new(), base.clone(), 6);
    for hour in 0..hours {
        moves_of_hour.push(0);
        for step in 0..1_800 {
            let mut report = base.clone();
            for load in report.0.values_mut() {
                load.bytes = load.bytes * (95 + dice.roll(11)) / 100;
                load.reads_per_s = load.reads_per_s * (50 + dice.roll(101) as u32) / 100;
                load.writes_per_s = load.writes_per_s * (50 + dice.roll(101) as u32) / 100;
            }
            loads.take(&report, 2_000);
            let decisions = balancer.plan(&state, &all, &loads, (hour * 1_800 + step) * 2_000);
            perform(&mut state, &decisions);
            if step % 5 == 0 {
                arrive(&mut state);
            }
            *moves_of_hour.last_mut().expect("pushed") += decisions.len();
        }
    }
    assert!(moves_of_hour[1..].iter().all(|moves| *moves == 0), "moves of each hour: {moves_of_hour:?}");
    assert!(moves_of_hour[0] < 60, "{moves_of_hour:?}");
    assert!(max_over_mean(&state, &base, false) <= 1.3);
}

/// Whether the majority of each set of members that has a say is alive.
fn has_quorum(partition: &Partition, liveness: &Liveness) -> bool {
    spare(&partition.members, liveness) >= 0
        && (partition.phase == Phase::Creating || spare(&partition.target, liveness) >= 0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_steps_costs_a_quorum(
        seed in any::<u64>(),
        zones in 1u64..4,
        nodes in 3u64..8,
        rounds in 20usize..60,
    ) {
        let mut dice = Dice(seed);
        let zone = |id: u64| format!("z{}", id % zones);
        let zone_names: Vec<String> = (1..=nodes).map(zone).collect();
        let mut state = cluster(&zone_names.iter().map(String::as_str).collect::<Vec<_>>());
        create(&mut state, 3, 8);
        create(&mut state, 5, 3);
        arrive(&mut state);
        settle(&mut state, &liveness(1..=nodes, &[]));
        let (mut balancer, mut count, mut dead) = (Balancer::default(), nodes, None::<u64>);
        for round in 0..rounds as u64 {
            // One node at a time is dead: no group may ever lack a quorum then, whatever is under way.
            match dice.roll(6) {
                0 => dead = Some(1 + dice.roll(count)),
                1 => dead = None,
                2 if count < 12 => {
                    count += 1;
                    state.apply(Command::RegisterNode(process(count, &zone(count)))).expect("new node");
                }
                _ => {}
            }
            let alive = liveness((1..=count).filter(|id| Some(*id) != dead), dead.as_slice());
            let loads = Loads(state.map().partitions().keys().map(|id| {
                let (bytes, reads_per_s) = (MIB << dice.roll(9), dice.roll(20_000) as u32);
                (*id, PartitionLoad { bytes, reads_per_s, writes_per_s: reads_per_s / 2, ..PartitionLoad::default() })
            }).collect());
            let mut decisions = plan(&state, &alive);
            decisions.extend(balancer.plan(&state, &alive, &loads, round * (COOLDOWN_MS / 8)));
            for decision in decisions {
                let Step::SetTarget { partition: id, .. } = decision.step else { continue };
                let before = state.map().partition(id).expect("known").clone();
                // The planner and the balancer may want the same partition: the second comes too late.
                if state.apply(Command::Step(decision.step.clone())) != Ok(Reply::Stepped) {
                    continue;
                }
                let after = state.map().partition(id).expect("known");
                prop_assert!(spare(&after.target, &alive) >= spare(&before.members, &alive), "{:?}", decision);
                let zones = |replicas: &[crate::key::Replica]| {
                    let zone = |replica: &crate::key::Replica| replica.node.0 % zones;
                    replicas.iter().map(zone).collect::<BTreeSet<_>>().len()
                };
                prop_assert!(zones(&after.target) >= zones(&before.target), "{:?}", decision);
            }
            for partition in state.map().partitions().values() {
                prop_assert!(has_quorum(partition, &alive), "{:?} with {:?} dead", partition, dead);
            }
            // Some groups become their targets: those whose new members live.
            let arriving: Vec<Partition> = state.map().partitions().values()
                .filter(|p| !p.is_at_rest() && p.target.iter().all(|replica| alive.is_alive(replica.node)))
                .cloned().collect();
            for partition in arriving {
                if dice.roll(2) == 0 {
                    let members_epoch = partition.epoch.members + 1;
                    let report = Command::Report { partition: partition.id, members_epoch, members: partition.target };
                    state.apply(report).expect("sound");
                }
            }
            prop_assert_eq!(state.map().check(), Ok(()));
        }
    }
}
