use super::super::plan::{ALIVE_AFTER_MS, Health};
use super::super::state::tests::{cluster, create, created};
use super::super::{Command, Step};
use super::*;

fn alive(ids: &[u64]) -> Liveness {
    Liveness(ids.iter().map(|id| (NodeId(*id), Health::Alive { for_ms: ALIVE_AFTER_MS })).collect())
}

fn set(state: &mut State, node: u64, standing: Standing) -> Answer {
    state.apply(Command::SetStanding { node: NodeId(node), standing })
}

fn stands(state: &State, node: u64) -> Option<Standing> {
    state.map().node(NodeId(node)).map(|node| node.standing)
}

/// Four nodes and a keyspace of three replicas, its groups formed.
fn formed() -> State {
    let mut state = cluster(4);
    created(state.apply(create("x", 3, 8)));
    let partitions: Vec<Partition> = state.map().partitions().values().filter(|p| p.id != DRIVER).cloned().collect();
    for partition in partitions {
        let report = Command::Report { partition: partition.id, members_epoch: 0, members: partition.target };
        state.apply(report).expect("first report");
    }
    state
}

#[test]
fn standings_change_as_asked_and_twice_is_once() {
    use Standing::{Active, Draining, Gone, Leaving, Removed};
    let mut state = formed();
    assert_eq!(set(&mut state, 9, Draining), Err(Refusal::NodeUnknown(NodeId(9))));
    for (asked, changed) in [
        (Active, false),
        (Draining, true),
        (Draining, false),
        (Active, true),
        (Leaving, true),
        (Leaving, false),
        (Active, true),
        (Draining, true),
        (Leaving, true),
    ] {
        let version = state.map().version();
        assert_eq!(set(&mut state, 2, asked), Ok(Reply::StandingSet { standing: asked, changed }), "{asked}");
        assert_eq!((stands(&state, 2), state.map().version()), (Some(asked), version + u64::from(changed)));
    }
    for (node, asked) in [(2, Draining), (2, Gone), (2, Removed), (3, Removed), (3, Gone)] {
        let answer = set(&mut state, node, asked);
        assert!(matches!(answer, Err(Refusal::StandingRefused { .. })), "n{node} {asked}: {answer:?}");
    }
}

#[test]
fn a_restart_leaves_a_standing_as_it_is() {
    let mut state = formed();
    for (node, standing) in [(2, Standing::Draining), (3, Standing::Leaving)] {
        set(&mut state, node, standing).expect("possible");
        state.apply(Command::RegisterNode(super::super::state::tests::process(node, "b"))).expect("known");
        assert_eq!(stands(&state, node), Some(standing));
    }
}

#[test]
fn with_no_node_for_replicas_no_keyspace_is_created() {
    let mut state = cluster(1);
    set(&mut state, 1, Standing::Draining).expect("possible");
    assert_eq!(state.apply(create("y", 1, 1)), Err(Refusal::NoNodeForReplicas));
    set(&mut state, 1, Standing::Active).expect("possible");
    created(state.apply(create("y", 1, 1)));
}

fn holders(map: &Map, node: u64) -> Vec<PartitionId> {
    map.partitions().values().filter(|p| p.replica_on(NodeId(node)).is_some()).map(|p| p.id).collect()
}

#[test]
fn what_cannot_do_without_a_node_is_named() {
    let state = formed();
    let held = holders(state.map(), 2);
    let judge = |asked, live: &[u64]| assess(state.map(), NodeId(2), asked, &alive(live), |id| id == held[0]);
    let named = |blockers: &[Blocker]| blockers.iter().map(|blocker| blocker.partition).collect::<Vec<_>>();

    let calm = judge(Standing::Draining, &[1, 2, 3, 4]);
    assert_eq!((calm.replicas, calm.leaders, calm.refused), (held.len() as u64, 1, vec![]));
    assert_eq!(named(&calm.waiting), held[..1], "its leadership");
    assert_eq!(judge(Standing::Leaving, &[1, 2, 3, 4]).refused, []);

    // With n3 away, whatever is on both cannot spare n2.
    let both: Vec<PartitionId> = held.iter().copied().filter(|id| holders(state.map(), 3).contains(id)).collect();
    assert!(!both.is_empty() && both.len() < held.len());
    assert_eq!(named(&judge(Standing::Draining, &[1, 2, 4]).refused), both);
    // Three nodes would be needed for its replicas, and n1 and n4 are left.
    let few = judge(Standing::Leaving, &[1, 2, 4]);
    assert_eq!(named(&few.refused), held);
    assert!(few.refused[0].why.contains("without n2 2 nodes are left"), "{:?}", few.refused);
}

#[test]
fn what_a_leaving_node_waits_for_is_told() {
    let mut state = formed();
    set(&mut state, 2, Standing::Leaving).expect("possible");
    let held = holders(state.map(), 2);
    let why = |state: &State| {
        let assessment = assess(state.map(), NodeId(2), Standing::Leaving, &alive(&[1, 2, 3, 4]), |_| false);
        assessment.waiting.into_iter().find(|blocker| blocker.partition == held[0]).map(|blocker| blocker.why)
    };
    assert_eq!(why(&state).as_deref(), Some("its turn has not come yet"));
    let partition = state.map().partition(held[0]).expect("known").clone();
    let other = (1..=4).map(NodeId).find(|node| partition.replica_on(*node).is_none()).expect("four nodes");
    let mut nodes: Vec<NodeId> = partition.members.iter().map(|m| m.node).filter(|n| *n != NodeId(2)).collect();
    nodes.push(other);
    let step = Step::SetTarget { partition: partition.id, epoch: partition.epoch, nodes };
    state.apply(Command::Step(step)).expect("at rest");
    assert_eq!(why(&state), Some(format!("{other} is being brought up to date")));
}
