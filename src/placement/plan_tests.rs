use super::*;
use crate::key::{KeyKind, KeyspaceId, Layout, PartitionId, Replica};
use crate::placement::{Command, CreateKeyspace, Cuts, RegisterNode, Reply, state::DRIVER_FIRST};
use proptest::prelude::*;

pub(in crate::placement) fn process(id: u64, zone: &str) -> RegisterNode {
    RegisterNode {
        cluster_id: String::new(),
        uuid: format!("00000000-0000-4000-8000-{id:012x}"),
        address: format!("h{id}:7700"),
        zone: zone.to_owned(),
        weight_milli: 0,
        previous: None,
        ephemeral: false,
    }
}

/// A cluster whose nodes, n1 first, are in these zones, and whose groups have all reported.
pub(in crate::placement) fn cluster(zones: &[&str]) -> State {
    let mut state = State::new();
    let node = process(1, zones[0]);
    state.apply(Command::Bootstrap { cluster_id: "c".to_owned(), node, replicas_default: 3 }).expect("first command");
    for (id, zone) in (2..).zip(&zones[1..]) {
        state.apply(Command::RegisterNode(process(id, zone))).expect("new node");
    }
    arrive(&mut state);
    state
}

pub(in crate::placement) fn create(state: &mut State, replicas: u32, partitions: u32) -> KeyspaceId {
    let request = CreateKeyspace {
        name: format!("k{replicas}.{partitions}"),
        kind: KeyKind::Integer { max: 1 << 20 },
        layout: Layout::Ordered,
        replicas,
        cuts: Cuts::Even(partitions),
        avoid: BTreeSet::new(),
    };
    match state.apply(Command::CreateKeyspace(request)) {
        Ok(Reply::KeyspaceCreated { keyspace, .. }) => keyspace.id,
        other => panic!("{other:?}"),
    }
}

/// Every group becomes its target and says so.
pub(in crate::placement) fn arrive(state: &mut State) {
    let moving: Vec<Partition> = state.map().partitions().values().filter(|p| !p.is_at_rest()).cloned().collect();
    for partition in moving {
        let members_epoch = partition.epoch.members + 1;
        let report = Command::Report { partition: partition.id, members_epoch, members: partition.target };
        assert_eq!(state.apply(report), Ok(Reply::Reported { changed: true }));
    }
}

pub(in crate::placement) fn liveness(alive: impl IntoIterator<Item = u64>, dead: &[u64]) -> Liveness {
    let alive = alive.into_iter().map(|id| (NodeId(id), Health::Alive { for_ms: ALIVE_AFTER_MS }));
    let dead = dead.iter().map(|id| (NodeId(*id), Health::Silent { for_ms: DEAD_AFTER_MS }));
    Liveness(alive.chain(dead).collect())
}

pub(in crate::placement) fn perform(state: &mut State, decisions: &[Decision]) {
    for decision in decisions {
        assert_eq!(state.apply(Command::Step(decision.step.clone())), Ok(Reply::Stepped), "{decision:?}");
    }
}

/// Plans and performs until nothing is left to do.
pub(in crate::placement) fn settle(state: &mut State, liveness: &Liveness) {
    for _ in 0..1_000 {
        let decisions = plan(state, liveness);
        if decisions.is_empty() {
            return;
        }
        perform(state, &decisions);
        arrive(state);
    }
    panic!("the planner does not come to rest");
}

fn voters(state: &State) -> Vec<u64> {
    state.map().driver().expect("group 0").members.iter().map(|replica| replica.node.0).collect()
}

#[test]
fn the_driver_has_one_three_or_five_voters() {
    for (nodes, wanted) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (9, 5)] {
        let mut state = cluster(&vec!["a"; nodes]);
        settle(&mut state, &liveness(1..=nodes as u64, &[]));
        assert_eq!(voters(&state).len(), wanted, "{nodes} nodes");
        assert_eq!(voters(&state)[0], 1, "the leader stays");
        assert_eq!(state.map().driver().map(|driver| driver.members[0]), Some(DRIVER_FIRST));
    }
}

#[test]
fn the_driver_spreads_over_zones() {
    let mut state = cluster(&["a", "a", "a", "a", "b", "b", "c"]);
    settle(&mut state, &liveness(1..=7, &[]));
    let zones: Vec<&str> = voters(&state).iter().map(|id| state.map().nodes()[&NodeId(*id)].zone.as_str()).collect();
    let count = |zone| zones.iter().filter(|z| **z == zone).count();
    assert_eq!((count("a"), count("b"), count("c")), (2, 2, 1));
}

#[test]
fn the_driver_never_shrinks_and_passes_over_the_dead() {
    let mut state = cluster(&["a"; 5]);
    settle(&mut state, &liveness([1, 2, 3], &[4, 5]));
    assert_eq!(voters(&state).into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([1, 2, 3]));
    // One voter dead and two new nodes: five voters, four of them alive.
    settle(&mut state, &liveness([1, 2, 4, 5], &[3]));
    assert_eq!(voters(&state).len(), 5);
    assert_eq!(plan(&state, &liveness([1, 2], &[3, 4, 5])), []);
}

#[test]
fn partitions_grow_as_nodes_join() {
    let mut state = cluster(&["a"]);
    let keyspace = create(&mut state, 3, 12);
    arrive(&mut state);
    assert_eq!(plan(&state, &liveness([1], &[])), []);
    for (id, members) in [(2, 2), (3, 3), (4, 3)] {
        state.apply(Command::RegisterNode(process(id, "a"))).expect("new node");
        settle(&mut state, &liveness(1..=id, &[]));
        for partition in state.map().partitions_of(keyspace) {
            assert_eq!(partition.members.len(), members, "{id} nodes");
        }
    }
    let first: BTreeSet<NodeId> = state.map().partitions_of(keyspace).map(|p| p.members[0].node).collect();
    assert!(first.len() > 1, "preferred leaders are shared out: {first:?}");
}

#[test]
fn all_missing_members_come_in_one_step() {
    let mut state = cluster(&["a"]);
    let keyspace = create(&mut state, 3, 1);
    arrive(&mut state);
    for id in [2, 3] {
        state.apply(Command::RegisterNode(process(id, "a"))).expect("new node");
    }
    let decisions = plan(&state, &liveness(1..=3, &[]));
    let partition = state.map().partitions_of(keyspace).next().expect("one").id;
    let grown = decisions.iter().find_map(|decision| match &decision.step {
        Step::SetTarget { partition: id, nodes, .. } if *id == partition => Some(nodes.len()),
        Step::SetTarget { .. } | Step::SetInitializer { .. } => None,
    });
    assert_eq!(grown, Some(3));
    assert!(decisions.iter().any(|decision| decision.why.contains("has 1 of 3 replicas that stay, 3 are possible")));
}

#[test]
fn newcomers_wait_until_they_have_been_alive_for_a_while() {
    let state = cluster(&["a"; 3]);
    let mut liveness = liveness([1], &[]);
    assert_eq!(plan(&state, &liveness), [], "unknown nodes get nothing");
    for id in [2, 3] {
        liveness.0.insert(NodeId(id), Health::Alive { for_ms: ALIVE_AFTER_MS - 1 });
    }
    assert_eq!(plan(&state, &liveness), []);
    liveness.0.insert(NodeId(2), Health::Alive { for_ms: ALIVE_AFTER_MS });
    assert_eq!(plan(&state, &liveness).len(), 1, "`default` grows to n2; the driver waits for a third");
}

#[test]
fn dead_initializers_are_replaced() {
    let mut state = cluster(&["a"; 3]);
    settle(&mut state, &liveness(1..=3, &[]));
    create(&mut state, 3, 9);
    let dead_ones = |state: &State| -> Vec<PartitionId> {
        let creating = state.map().partitions().values().filter(|p| p.phase == Phase::Creating);
        let on_2 = |p: &&Partition| p.members.iter().any(|r| r.id == p.initializer && r.node == NodeId(2));
        creating.filter(on_2).map(|p| p.id).collect()
    };
    assert!(!dead_ones(&state).is_empty() && dead_ones(&state).len() < 9);
    let mut silent = liveness([1, 3], &[]);
    silent.0.insert(NodeId(2), Health::Silent { for_ms: DEAD_AFTER_MS - 1 });
    assert_eq!(plan(&state, &silent), []);
    let decisions = plan(&state, &liveness([1, 3], &[2]));
    assert_eq!(decisions.len(), dead_ones(&state).len());
    perform(&mut state, &decisions);
    assert_eq!(dead_ones(&state), []);
    assert_eq!(plan(&state, &liveness([1, 3], &[2])), []);
    assert_eq!(plan(&state, &liveness([], &[1, 2, 3])), [], "nobody is left to do it");
}

#[test]
fn steps_and_changes_are_bounded() {
    let mut state = cluster(&["a"]);
    create(&mut state, 3, 200);
    arrive(&mut state);
    for id in [2, 3] {
        state.apply(Command::RegisterNode(process(id, "a"))).expect("new node");
    }
    let alive = liveness(1..=3, &[]);
    let decisions = plan(&state, &alive);
    assert_eq!(decisions.len(), RECEIVING_MAX + 1, "as many as each of the two receives, and group 0");
    perform(&mut state, &decisions);
    assert_eq!(plan(&state, &alive), [], "enough is under way");
    // Those that wait for a dead node do not hold up the others.
    let moving = |state: &State| state.map().partitions().values().filter(|p| !p.is_at_rest()).count();
    let before = moving(&state);
    let decisions = plan(&state, &liveness([1, 2], &[3]));
    assert!(!decisions.is_empty());
    perform(&mut state, &decisions);
    assert_eq!(moving(&state), before + decisions.len());
    arrive(&mut state);
    settle(&mut state, &alive);
    assert!(state.map().partitions().values().all(|p| p.members.len() == 3));
}

#[test]
fn a_target_that_would_cost_live_members_is_no_decision() {
    let mut state = cluster(&["a"; 5]);
    settle(&mut state, &liveness(1..=3, &[]));
    let driver = state.map().driver().expect("group 0");
    let nodes = |ids: &[u64]| ids.iter().map(|id| NodeId(*id)).collect::<Vec<_>>();
    let decided = |ids: &[u64], liveness: &Liveness| set_target(driver, nodes(ids), liveness, String::new()).is_some();
    let one_dead = liveness([1, 2, 4], &[3, 5]);
    assert!(decided(&[1, 2, 3, 4], &one_dead));
    assert!(decided(&[1, 2, 4], &one_dead), "the dead one is replaced");
    assert!(!decided(&[1, 2, 3, 5], &one_dead), "four, of which two live");
    assert!(!decided(&[1, 3], &one_dead));
    assert!(!decided(&[1, 2, 5], &liveness([1, 2, 3], &[5])), "three live ones, and then two");
    assert!(!decided(&[1, 4, 5], &liveness([1, 4, 5], &[2, 3])), "there is no quorum to decide it");
}

#[test]
fn nothing_is_planned_before_there_is_a_cluster() {
    assert_eq!(plan(&State::new(), &liveness([1], &[])), []);
}

pub(in crate::placement) fn spare(members: &[Replica], liveness: &Liveness) -> i64 {
    let live = members.iter().filter(|replica| liveness.is_alive(replica.node)).count() as i64;
    live - (members.len() as i64 / 2 + 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn planning_comes_to_rest_with_all_that_is_possible(
        rounds in proptest::collection::vec((1u64..4, 1u32..6, 1u32..6, proptest::collection::btree_set(1u64..12, 0..4)), 1..5),
    ) {
        let mut state = cluster(&["z0"]);
        let mut nodes = 1;
        for (joining, replicas, partitions, dead) in rounds {
            for id in nodes + 1..=nodes + joining {
                state.apply(Command::RegisterNode(process(id, &format!("z{}", id % 3)))).expect("new node");
            }
            nodes += joining;
            create(&mut state, replicas, partitions);
            arrive(&mut state);
            let dead: Vec<u64> = dead.into_iter().filter(|id| *id <= nodes).collect();
            let liveness = liveness((1..=nodes).filter(|id| !dead.contains(id)), &dead);
            for decision in plan(&state, &liveness) {
                let before = state.clone();
                prop_assert_eq!(state.apply(Command::Step(decision.step.clone())), Ok(Reply::Stepped));
                prop_assert_ne!(before.encode(), state.encode(), "a step that does nothing: {:?}", decision);
                if let Step::SetTarget { partition, .. } = decision.step {
                    let partition = state.map().partition(partition).expect("known");
                    prop_assert!(spare(&partition.target, &liveness) >= spare(&partition.members, &liveness));
                    prop_assert!(partition.members.iter().all(|replica| partition.target.contains(replica)));
                }
            }
            arrive(&mut state);
            settle(&mut state, &liveness);
            prop_assert_eq!(state.map().check(), Ok(()));
        }
        let all = liveness(1..=nodes, &[]);
        settle(&mut state, &all);
        for partition in state.map().partitions().values() {
            let wanted = state.map().keyspaces()[&partition.keyspace].replicas as usize;
            let possible = wanted.min(nodes as usize);
            let odd = if partition.id == DRIVER { possible - usize::from(possible.is_multiple_of(2)) } else { possible };
            prop_assert_eq!(partition.members.len(), odd, "{}", partition.id);
        }
    }
}

#[test]
fn replicas_of_a_node_that_is_gone_are_replaced() {
    let mut state = cluster(&["a", "a", "a"]);
    let keyspace = create(&mut state, 3, 4);
    arrive(&mut state);
    settle(&mut state, &liveness(1..=3, &[]));
    let ephemeral =
        |id, address: &str| RegisterNode { address: address.to_owned(), ephemeral: true, ..process(id, "a") };
    state.apply(Command::RegisterNode(RegisterNode { ephemeral: true, ..process(3, "a") })).unwrap();
    state.apply(Command::RegisterNode(ephemeral(4, "h3:7700"))).unwrap();
    settle(&mut state, &liveness([1, 2, 4], &[3]));
    for partition in state.map().partitions_of(keyspace).chain(state.map().driver()) {
        let nodes: BTreeSet<_> = partition.members.iter().map(|member| member.node).collect();
        assert_eq!(nodes, BTreeSet::from([NodeId(1), NodeId(2), NodeId(4)]), "{partition:?}");
    }
}

#[test]
fn a_partition_whose_first_node_is_gone_gets_another_in_its_place() {
    for gone in 1..=3 {
        // One partition, so that all but one of the nodes are first of none.
        let mut state = cluster(&["a", "a", "a"]);
        settle(&mut state, &liveness(1..=3, &[]));
        let ephemeral = |id| RegisterNode { ephemeral: true, ..process(id, "a") };
        state.apply(Command::RegisterNode(ephemeral(gone))).unwrap();
        let address = process(gone, "a").address;
        state.apply(Command::RegisterNode(RegisterNode { address, ..ephemeral(4) })).unwrap();
        settle(&mut state, &liveness((1..=4).filter(|id| *id != gone), &[gone]));
        for partition in state.map().partitions().values() {
            let nodes: BTreeSet<_> = partition.members.iter().map(|member| member.node).collect();
            assert_eq!(nodes, (1..=4).filter(|id| *id != gone).map(NodeId).collect(), "{partition:?}");
        }
    }
}
