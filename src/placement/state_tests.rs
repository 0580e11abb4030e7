use super::super::command::{Cuts, Field};
use super::super::hex;
use super::*;
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

fn bootstrap() -> Command {
    Command::Bootstrap { cluster_id: "c1".to_owned(), node: process(1, "a"), replicas_default: 0 }
}

pub(in crate::placement) fn create(name: &str, replicas: u32, partitions: u32) -> Command {
    Command::CreateKeyspace(CreateKeyspace {
        name: name.to_owned(),
        kind: KeyKind::Integer { max: 1_000_000 },
        layout: Layout::Ordered,
        replicas,
        cuts: Cuts::Even(partitions),
        avoid: BTreeSet::new(),
    })
}

/// A cluster of `n` nodes.
pub(in crate::placement) fn cluster(n: u64) -> State {
    let mut state = State::new();
    state.apply(bootstrap()).expect("first command");
    for id in 2..=n {
        state.apply(Command::RegisterNode(process(id, "a"))).expect("new node");
    }
    state
}

pub(in crate::placement) fn changes_nothing(state: &mut State, command: Command) -> Answer {
    let before = state.encode();
    let answer = state.apply(command);
    assert_eq!(state.encode(), before);
    answer
}

#[test]
fn nothing_works_before_bootstrap() {
    let mut state = State::new();
    for command in
        [Command::RegisterNode(process(1, "")), create("x", 0, 1), Command::DropKeyspace { name: "x".to_owned() }]
    {
        assert_eq!(changes_nothing(&mut state, command), Err(Refusal::NotInitialized));
    }
    assert!(!state.is_initialized());
    assert_eq!(State::decode(&state.encode()).expect("sound").encode(), state.encode());
}

#[test]
fn bootstrap_forms_the_cluster_once() {
    let mut state = State::new();
    assert_eq!(state.apply(bootstrap()), Ok(Reply::Bootstrapped { cluster_id: "c1".to_owned(), created: true }));
    let again = Command::Bootstrap { cluster_id: "c2".to_owned(), node: process(9, "a"), replicas_default: 5 };
    let answer = changes_nothing(&mut state, again);
    assert_eq!(answer, Ok(Reply::Bootstrapped { cluster_id: "c1".to_owned(), created: false }));
    let map = state.map();
    assert_eq!((map.check(), map.version(), map.cluster_id()), (Ok(()), 1, "c1"));
    let driver = map.driver().expect("group 0");
    assert_eq!((driver.members.as_slice(), driver.phase), ([DRIVER_FIRST].as_slice(), Phase::Active));
    let default = map.keyspace_by_name("default").expect("made at once");
    assert_eq!((default.kind, default.layout, default.replicas), (KeyKind::Bytes, Layout::Ordered, 3));
    assert_eq!(map.partitions_of(default.id).count(), 1);
    assert!(map.keyspaces()[&DRIVER_KEYSPACE].is_internal() && !default.is_internal());
}

#[test]
fn a_node_that_keeps_nothing_is_gone_when_another_has_its_address() {
    let mut state = cluster(1);
    let ephemeral = |id| RegisterNode { address: "e:1".to_owned(), ephemeral: true, ..process(id, "a") };
    state.apply(Command::RegisterNode(ephemeral(2))).unwrap();
    let again = state.apply(Command::RegisterNode(ephemeral(3)));
    assert_eq!(again, Ok(Reply::Registered { node: NodeId(3), created: true }));
    let standing = |id| state.map().node(NodeId(id)).map(|node| node.standing);
    let wanted = [Standing::Active, Standing::Gone, Standing::Active].map(Some);
    assert_eq!([1, 2, 3].map(standing), wanted);
}

#[test]
fn a_uuid_is_one_node_for_ever() {
    let mut state = cluster(2);
    let same = changes_nothing(&mut state, Command::RegisterNode(process(2, "a")));
    assert_eq!(same, Ok(Reply::Registered { node: NodeId(2), created: false }));
    let moved = RegisterNode { address: "new:1".to_owned(), previous: Some(NodeId(2)), ..process(2, "b") };
    let version = state.map().version();
    assert_eq!(state.apply(Command::RegisterNode(moved)), Ok(Reply::Registered { node: NodeId(2), created: false }));
    assert_eq!(state.map().version(), version + 1);
    let node = state.map().node(NodeId(2)).expect("registered");
    assert_eq!((node.address.as_str(), node.zone.as_str()), ("new:1", "b"));
    // An earlier id with another UUID, and a known UUID with another id.
    for (uuid, claimed) in [(9, 2), (2, 1)] {
        let process = RegisterNode { previous: Some(NodeId(claimed)), ..process(uuid, "a") };
        let answer = changes_nothing(&mut state, Command::RegisterNode(process));
        assert!(matches!(answer, Err(Refusal::IdentityMismatch { .. })), "{answer:?}");
    }
    // The address of another node that keeps its data.
    let wiped = RegisterNode { address: "h1:7700".to_owned(), ..process(9, "a") };
    let answer = changes_nothing(&mut state, Command::RegisterNode(wiped));
    assert!(matches!(answer, Err(Refusal::AddressTaken { node: NodeId(1), .. })), "{answer:?}");
    let stranger = RegisterNode { cluster_id: "c2".to_owned(), ..process(9, "a") };
    let answer = changes_nothing(&mut state, Command::RegisterNode(stranger));
    assert!(matches!(answer, Err(Refusal::ClusterMismatch { .. })), "{answer:?}");
}

pub(in crate::placement) fn created(answer: Answer) -> (Keyspace, u64, bool, Vec<String>) {
    match answer {
        Ok(Reply::KeyspaceCreated { keyspace, partitions, created, warnings }) => {
            (keyspace, partitions, created, warnings)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn keyspaces_are_created_once() {
    let mut state = cluster(4);
    let (keyspace, partitions, new, warnings) = created(state.apply(create("orders", 3, 8)));
    assert_eq!((partitions, new, warnings.len()), (8, true, 0));
    assert_eq!(state.map().check(), Ok(()));
    for partition in state.map().partitions_of(keyspace.id) {
        assert_eq!((partition.members.len(), partition.phase), (3, Phase::Creating));
        assert_eq!((&partition.members, partition.members[0].id), (&partition.target, partition.initializer));
    }
    let (again, _, new, warnings) = created(changes_nothing(&mut state, create("orders", 0, 8)));
    assert_eq!((again, new, warnings.len()), (keyspace, false, 0));
    let (_, partitions, _, warnings) = created(changes_nothing(&mut state, create("orders", 0, 9)));
    assert_eq!((partitions, warnings.len()), (8, 1), "cuts are no setting, but a warning");
    let answer = changes_nothing(&mut state, create("orders", 5, 8));
    assert!(matches!(answer, Err(Refusal::KeyspaceExists { .. })), "{answer:?}");
}

#[test]
fn wrong_requests_change_nothing() {
    let mut state = cluster(1);
    for (command, at) in [(create("x", 10, 1), Field::Replicas), (create("x", 1, 5_000), Field::Partitions)] {
        match changes_nothing(&mut state, command) {
            Err(Refusal::FieldInvalid { field, .. }) => assert_eq!(field, at),
            other => panic!("{other:?}"),
        }
    }
    for name in ["_driver", "", "default"] {
        let answer = changes_nothing(&mut state, Command::DropKeyspace { name: name.to_owned() });
        assert!(matches!(answer, Err(Refusal::NameInvalid(_))), "{name}");
    }
    assert!(matches!(changes_nothing(&mut state, create("_x", 1, 1)), Err(Refusal::NameInvalid(_))));
}

#[test]
fn too_few_nodes_are_a_warning() {
    let (keyspace, _, new, warnings) = created(cluster(2).apply(create("orders", 3, 2)));
    assert!(new && keyspace.replicas == 3);
    assert!(warnings[0].contains("3 replicas are wanted and 2 nodes"), "{warnings:?}");
}

#[test]
fn dead_nodes_get_nothing_unless_there_are_no_others() {
    let with_avoid = |state: &mut State, name: &str, avoid: &[u64]| {
        let Command::CreateKeyspace(request) = create(name, 3, 16) else { unreachable!("it is one") };
        let avoid = avoid.iter().map(|id| NodeId(*id)).collect();
        let keyspace = created(state.apply(Command::CreateKeyspace(CreateKeyspace { avoid, ..request }))).0.id;
        let nodes = state.map().partitions_of(keyspace).flat_map(|p| p.members.iter().map(|r| r.node.0));
        nodes.collect::<BTreeSet<u64>>()
    };
    let mut state = cluster(4);
    assert_eq!(with_avoid(&mut state, "x", &[3]), BTreeSet::from([1, 2, 4]));
    assert_eq!(with_avoid(&mut state, "y", &[1, 2, 3, 4]), BTreeSet::from([1, 2, 3, 4]));
}

#[test]
fn dropped_keyspaces_leave_no_partition() {
    let mut state = cluster(3);
    let (keyspace, ..) = created(state.apply(create("x", 3, 4)));
    let version = state.map().version();
    let partitions: Vec<PartitionId> = state.map().partitions_of(keyspace.id).map(|p| p.id).collect();
    let drop = || Command::DropKeyspace { name: "x".to_owned() };
    assert_eq!(state.apply(drop()), Ok(Reply::KeyspaceDropped { dropped: true }));
    assert_eq!(changes_nothing(&mut state, drop()), Ok(Reply::KeyspaceDropped { dropped: false }));
    let delta = state.delta_since(version).expect("one change ago");
    assert_eq!((delta.partitions_removed, delta.keyspaces_removed), (partitions, vec![keyspace.id]));
    let report = Command::Report { partition: PartitionId(2), members_epoch: 1, members: vec![DRIVER_FIRST] };
    assert_eq!(changes_nothing(&mut state, report), Err(Refusal::PartitionUnknown(PartitionId(2))));
    let (again, ..) = created(state.apply(create("x", 3, 4)));
    assert!(again.id > keyspace.id);
}

/// What the group of `id` would report if it had become its target at `epoch`.
pub(in crate::placement) fn arrival(state: &State, id: PartitionId, members_epoch: u64) -> Command {
    let mut members = state.map().partition(id).expect("known").target.clone();
    members.sort();
    Command::Report { partition: id, members_epoch, members }
}

#[test]
fn reports_are_ordered_by_epoch() {
    let mut state = cluster(3);
    let p = PartitionId(1);
    let first = arrival(&state, p, 0);
    assert_eq!(state.apply(first.clone()), Ok(Reply::Reported { changed: true }));
    assert_eq!(state.map().partition(p).map(|p| p.phase), Some(Phase::Active));
    assert_eq!(changes_nothing(&mut state, first), Ok(Reply::Reported { changed: false }));

    let nodes = vec![NodeId(3), NodeId(1), NodeId(2)];
    let epoch = state.map().partition(p).expect("known").epoch;
    let grow = Command::Step(Step::SetTarget { partition: p, epoch, nodes: nodes.clone() });
    let kept = state.map().partition(p).expect("known").members[0];
    assert_eq!(state.apply(grow.clone()), Ok(Reply::Stepped));
    let answer = changes_nothing(&mut state, grow.clone());
    assert!(matches!(answer, Err(Refusal::StepOutdated { .. })), "under way: {answer:?}");
    assert_eq!(state.apply(arrival(&state, p, 7)), Ok(Reply::Reported { changed: true }));
    let partition = state.map().partition(p).expect("known");
    assert!(partition.is_at_rest() && partition.members.contains(&kept), "the replica on n1 is kept");
    assert_eq!(partition.members.iter().map(|r| r.node).collect::<Vec<_>>(), nodes, "preferred leader first");
    let answer = changes_nothing(&mut state, grow);
    assert!(matches!(answer, Err(Refusal::StepOutdated { .. })), "decided on an old epoch: {answer:?}");
    let old = Command::Report { partition: p, members_epoch: 6, members: vec![kept] };
    assert_eq!(changes_nothing(&mut state, old), Ok(Reply::Reported { changed: false }));
}

#[test]
fn impossible_reports_are_refused() {
    let mut state = cluster(2);
    let real = DRIVER_FIRST;
    for members in [
        vec![],
        vec![real, Replica { id: ReplicaId(2), node: real.node }],
        vec![Replica { id: ReplicaId(99), node: NodeId(2) }],
        vec![Replica { id: ReplicaId(1), node: NodeId(9) }],
    ] {
        let report = Command::Report { partition: DRIVER, members_epoch: 5, members };
        assert!(matches!(changes_nothing(&mut state, report), Err(Refusal::ReportInvalid { .. })));
    }
}

#[test]
fn impossible_targets_are_refused() {
    let mut state = cluster(2);
    let epoch = state.map().driver().expect("group 0").epoch;
    for nodes in [vec![], vec![NodeId(1), NodeId(1)], vec![NodeId(1), NodeId(9)]] {
        let step = Command::Step(Step::SetTarget { partition: DRIVER, epoch, nodes });
        assert!(matches!(changes_nothing(&mut state, step), Err(Refusal::StepOutdated { .. })));
    }
    let step = Step::SetTarget { partition: PartitionId(77), epoch, nodes: vec![NodeId(1)] };
    let answer = changes_nothing(&mut state, Command::Step(step));
    assert_eq!(answer, Err(Refusal::PartitionUnknown(PartitionId(77))));
}

#[test]
fn initializers_change_only_while_creating() {
    let mut state = cluster(3);
    let (keyspace, ..) = created(state.apply(create("x", 3, 1)));
    let partition = state.map().partitions_of(keyspace.id).next().expect("one").clone();
    let (a, b) = (partition.members[0].id, partition.members[1].id);
    let step = |from, to| Command::Step(Step::SetInitializer { partition: partition.id, from, to });
    assert!(matches!(changes_nothing(&mut state, step(b, a)), Err(Refusal::StepOutdated { .. })));
    assert!(matches!(changes_nothing(&mut state, step(a, ReplicaId(1))), Err(Refusal::StepOutdated { .. })));
    assert_eq!(state.apply(step(a, b)), Ok(Reply::Stepped));
    let now = state.map().partition(partition.id).expect("known");
    assert_eq!((now.initializer, &now.members), (b, &partition.members), "members stay while creating");
    state.apply(arrival(&state, partition.id, 0)).expect("first report");
    assert!(matches!(changes_nothing(&mut state, step(b, a)), Err(Refusal::StepOutdated { .. })));
}

#[test]
fn history_is_bounded_and_says_so() {
    let mut state = cluster(1);
    let old = state.map().version();
    for round in 0..20 {
        state.apply(create("x", 1, 1_000)).expect("new");
        assert!(state.delta_since(state.map().version()).is_some_and(|delta| delta.partitions.is_empty()));
        state.apply(Command::DropKeyspace { name: "x".to_owned() }).expect("there");
        assert!(state.history_ids <= HISTORY_IDS_MAX, "round {round}");
    }
    assert_eq!(state.delta_since(old), None);
    assert!(state.delta_since(state.map().version() - 1).is_some());
    assert_eq!(state.delta_since(state.map().version() + 1), None, "not of this past");
    let restored = State::decode(&state.encode()).expect("sound");
    assert_eq!(restored.delta_since(state.map().version() - 1), None, "the history is no part of the state");
    assert!(restored.delta_since(state.map().version()).is_some());
}

#[test]
fn damaged_state_is_told() {
    let mut state = cluster(2);
    let bytes = state.encode();
    for cut in 0..bytes.len() {
        assert!(State::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    state.next.replica = 1;
    assert!(State::decode(&state.encode()).is_err(), "r1 would be handed out again");
}

#[test]
fn state_bytes_are_golden() {
    let mut state = cluster(2);
    state.apply(create("x", 2, 2)).expect("new");
    let golden = [
        "03026331000302012430303030303030302d303030302d343030302d383030302d3030303030303030303030310768313a373730",
        "300161e8070000022430303030303030302d303030302d343030302d383030302d3030303030303030303030320768323a373730",
        "300161e80700000300075f647269766572000005010764656661756c7400000302017801c0843d00020400000000010001010101",
        "010101010000000000010100000100010201010201000200000000000202000108000000000007a1200100020301040202030104",
        "02000300000108000000000007a1200000030208000000000007a1200001000205020601020502060100050008000000000007a1",
        "2000000000000303030407",
    ];
    assert_eq!(hex(&state.encode()), golden.concat());
}

/// What a test may do; ids are chosen among those that exist.
#[derive(Clone, Debug)]
enum Act {
    Register { uuid: u64, zone: u64 },
    Create { name: u8, replicas: u32, partitions: u32 },
    Drop { name: u8 },
    Arrive { partition: usize },
    Retarget { partition: usize, nodes: Vec<u64> },
    Initialize { partition: usize, member: usize },
    Restart,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (1u64..12, 0u64..3).prop_map(|(uuid, zone)| Act::Register { uuid, zone }),
        3 => (0u8..4, 0u32..6, 0u32..5).prop_map(|(name, replicas, partitions)| Act::Create { name, replicas, partitions }),
        1 => (0u8..4).prop_map(|name| Act::Drop { name }),
        6 => any::<usize>().prop_map(|partition| Act::Arrive { partition }),
        6 => (any::<usize>(), proptest::collection::vec(1u64..12, 1..5))
            .prop_map(|(partition, nodes)| Act::Retarget { partition, nodes }),
        1 => (any::<usize>(), 0usize..4).prop_map(|(partition, member)| Act::Initialize { partition, member }),
        1 => Just(Act::Restart),
    ]
}

fn command(state: &State, act: &Act) -> Option<Command> {
    let pick = |i: &usize| state.map().partitions().values().nth(i % state.map().partitions().len()).expect("in range");
    Some(match act {
        Act::Register { uuid, zone } => Command::RegisterNode(process(*uuid, &format!("z{zone}"))),
        Act::Create { name, replicas, partitions } => create(&format!("k{name}"), *replicas, *partitions),
        Act::Drop { name } => Command::DropKeyspace { name: format!("k{name}") },
        Act::Arrive { partition } => arrival(state, pick(partition).id, pick(partition).epoch.members + 1),
        Act::Retarget { partition, nodes } => {
            let nodes = nodes.iter().map(|node| NodeId(*node)).collect();
            Command::Step(Step::SetTarget { partition: pick(partition).id, epoch: pick(partition).epoch, nodes })
        }
        Act::Initialize { partition, member } => {
            let partition = pick(partition);
            let to = partition.members[member % partition.members.len()].id;
            Command::Step(Step::SetInitializer { partition: partition.id, from: partition.initializer, to })
        }
        Act::Restart => return None,
    })
}

/// Every id ever seen and what it was given to.
#[derive(Default)]
struct Seen {
    replicas: BTreeMap<ReplicaId, (PartitionId, NodeId)>,
    partitions: BTreeMap<PartitionId, KeyspaceId>,
    keyspaces: BTreeMap<KeyspaceId, String>,
    nodes: BTreeMap<NodeId, String>,
}

impl Seen {
    /// Each id means what it has always meant.
    fn check(&mut self, map: &Map) {
        for partition in map.partitions().values() {
            assert_eq!(*self.partitions.entry(partition.id).or_insert(partition.keyspace), partition.keyspace);
            for replica in partition.replicas() {
                let given = (partition.id, replica.node);
                assert_eq!(*self.replicas.entry(replica.id).or_insert(given), given, "{replica:?}");
            }
        }
        for keyspace in map.keyspaces().values() {
            assert_eq!(self.keyspaces.entry(keyspace.id).or_insert_with(|| keyspace.name.clone()), &keyspace.name);
        }
        for node in map.nodes().values() {
            assert_eq!(self.nodes.entry(node.id).or_insert_with(|| node.uuid.clone()), &node.uuid);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn any_history_keeps_the_invariants(acts in proptest::collection::vec(act(), 1..60)) {
        let (mut state, mut seen) = (cluster(1), Seen::default());
        // A twin that never restarts, and followers that are brought up to date now and then.
        let mut twin = state.clone();
        let (mut eager, mut lazy) = (state.map().clone(), Map::default());
        for (i, act) in acts.iter().enumerate() {
            let Some(command) = command(&state, act) else {
                state = State::decode(&state.encode()).expect("sound");
                continue;
            };
            let before = (state.encode(), state.map().version());
            let answer = state.apply(command.clone());
            prop_assert_eq!(&answer, &twin.apply(Command::decode(&command.encode()).expect("ours")));
            prop_assert_eq!(state.map().check(), Ok(()));
            seen.check(state.map());
            if answer.is_err() {
                prop_assert_eq!(&before.0, &state.encode());
            }
            let changed = before.0 != state.encode();
            prop_assert_eq!(state.map().version(), before.1 + u64::from(changed));
            let followers: &mut [&mut Map] = if i % 7 == 0 { &mut [&mut eager, &mut lazy] } else { &mut [&mut eager] };
            for follower in followers {
                let delta = state.delta_since(follower.version()).unwrap_or_else(|| state.map().full());
                let _ = follower.apply(MapDelta::decode(&delta.encode()).expect("ours"));
                prop_assert_eq!(&**follower, state.map());
            }
        }
        prop_assert_eq!(state.encode(), twin.encode());
    }
}
