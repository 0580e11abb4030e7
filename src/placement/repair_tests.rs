//! Repair, drain and decommission as the planner sees them.

use super::tests::{arrive, cluster, create, perform, process, settle};
use super::*;
use crate::key::PartitionId;
use crate::placement::{Command, RegisterNode, Reply, command::Refusal};
use proptest::prelude::*;

/// Nodes `1..=count`: those in `down` are, the others are alive.
fn health(count: u64, down: &[u64]) -> Liveness {
    let health = |id| if down.contains(&id) { Health::Down } else { Health::Alive { for_ms: ALIVE_AFTER_MS } };
    Liveness((1..=count).map(|id| (NodeId(id), health(id))).collect())
}

fn stand(state: &mut State, node: u64, standing: Standing) {
    let answer = state.apply(Command::SetStanding { node: NodeId(node), standing });
    assert!(matches!(answer, Ok(Reply::StandingSet { .. })), "{answer:?}");
}

/// Nodes of every partition's members, group 0 first.
fn placed(state: &State) -> Vec<BTreeSet<u64>> {
    let members = |partition: &Partition| partition.members.iter().map(|replica| replica.node.0).collect();
    state.map().partitions().values().map(members).collect()
}

fn is_clear_of(state: &State, node: u64) -> bool {
    placed(state).iter().all(|nodes| !nodes.contains(&node))
}

/// A cluster at rest with `nodes` nodes and some partitions of three replicas.
fn at_rest(nodes: usize, partitions: u32) -> State {
    let mut state = cluster(&vec!["a"; nodes]);
    create(&mut state, 3, partitions);
    arrive(&mut state);
    settle(&mut state, &health(nodes as u64, &[]));
    state
}

#[test]
fn a_node_that_is_down_is_replaced_and_one_that_is_silent_is_not() {
    let mut state = at_rest(5, 12);
    let before = placed(&state);
    let mut silent = health(5, &[]);
    silent.0.insert(NodeId(2), Health::Silent { for_ms: 10 * DEAD_AFTER_MS });
    assert_eq!(plan(&state, &silent), []);
    settle(&mut state, &health(5, &[2]));
    for (before, after) in before.iter().zip(placed(&state)).skip(1) {
        assert!(!after.contains(&2) && after.len() == 3, "{after:?}");
        assert!(before.difference(&after).all(|node| *node == 2), "only the lost one is replaced");
    }
    assert_eq!(placed(&state)[0], before[0], "five voters of five nodes: nobody can take the place of n2");
    settle(&mut state, &health(5, &[]));
    assert_eq!(placed(&state)[0].len(), 5);
}

#[test]
fn without_a_node_for_it_a_lost_member_stays_a_member() {
    let mut state = at_rest(3, 4);
    let before = placed(&state);
    settle(&mut state, &health(3, &[2]));
    assert_eq!(placed(&state), before);
    assert_eq!(plan(&state, &health(3, &[2, 3])), [], "no quorum: nothing can be changed");
    state.apply(Command::RegisterNode(process(4, "a"))).expect("new node");
    settle(&mut state, &health(4, &[2]));
    assert!(is_clear_of(&state, 2));
}

#[test]
fn those_that_can_lose_the_fewest_come_first_and_no_node_receives_too_much() {
    let mut state = at_rest(3, 40);
    state.apply(Command::RegisterNode(process(4, "a"))).expect("new node");
    let decisions = plan(&state, &health(4, &[3]));
    assert_eq!(decisions.len(), RECEIVING_MAX + 1, "and group 0");
    perform(&mut state, &decisions);
    assert_eq!(plan(&state, &health(4, &[3])), []);
    arrive(&mut state);
    settle(&mut state, &health(4, &[3]));
    assert!(is_clear_of(&state, 3));

    let state = at_rest(5, 24);
    let lost = |state: &State, id: PartitionId| {
        let members = &state.map().partition(id).expect("known").members;
        members.iter().filter(|member| [4, 5].contains(&member.node.0)).count()
    };
    let mut silent = health(5, &[5]);
    silent.0.insert(NodeId(4), Health::Silent { for_ms: DEAD_AFTER_MS });
    let order: Vec<usize> = plan(&state, &silent)
        .iter()
        .filter_map(|decision| match decision.step {
            Step::SetTarget { partition, .. } if partition != DRIVER => Some(lost(&state, partition)),
            _ => None,
        })
        .collect();
    assert!(order.len() > 1 && order.is_sorted_by(|a, b| a >= b), "{order:?}");
}

#[test]
fn a_draining_node_keeps_what_it_has_and_gets_nothing() {
    let mut state = at_rest(4, 6);
    let before = placed(&state);
    stand(&mut state, 4, Standing::Draining);
    create(&mut state, 3, 9);
    arrive(&mut state);
    settle(&mut state, &health(4, &[]));
    let after = placed(&state);
    assert_eq!(after[..before.len()], before);
    assert!(after[before.len()..].iter().all(|nodes| !nodes.contains(&4)));
}

#[test]
fn a_leaving_node_loses_everything_and_is_removed_for_good() {
    let mut state = at_rest(5, 12);
    stand(&mut state, 1, Standing::Leaving);
    assert_eq!(state.departed(), []);
    let early = Command::SetStanding { node: NodeId(1), standing: Standing::Removed };
    assert!(matches!(state.apply(early.clone()), Err(Refusal::StandingRefused { .. })));
    settle(&mut state, &health(5, &[]));
    assert!(is_clear_of(&state, 1));
    assert_eq!(placed(&state)[0].len(), 3, "four nodes stay: three voters");
    assert_eq!(state.departed(), [NodeId(1)]);
    assert_eq!(state.apply(early), Ok(Reply::StandingSet { standing: Standing::Removed, changed: true }));
    assert_eq!(state.departed(), []);
    let back = state.apply(Command::RegisterNode(RegisterNode { previous: Some(NodeId(1)), ..process(1, "a") }));
    assert_eq!(back, Err(Refusal::NodeRemoved(NodeId(1))));
    state.apply(Command::RegisterNode(RegisterNode { address: "h1:7700".to_owned(), ..process(6, "a") })).expect("new");
}

#[test]
fn a_dead_node_that_leaves_is_replaced_at_once() {
    let mut state = at_rest(4, 6);
    let mut silent = health(4, &[]);
    silent.0.insert(NodeId(3), Health::Silent { for_ms: DEAD_AFTER_MS });
    assert_eq!(plan(&state, &silent), []);
    stand(&mut state, 3, Standing::Leaving);
    settle(&mut state, &silent);
    assert_eq!(state.departed(), [NodeId(3)]);
}

#[test]
fn a_target_that_lost_its_new_node_is_withdrawn() {
    let mut state = at_rest(5, 1);
    let partition = state.map().partitions().values().next_back().expect("one").clone();
    let lost = partition.members[1].node;
    let decisions = plan(&state, &health(5, &[lost.0]));
    perform(&mut state, &decisions);
    let now = |state: &State| state.map().partition(partition.id).expect("known").clone();
    let added = now(&state).target.into_iter().find(|r| !partition.members.contains(r)).expect("a new one").node;
    let both = health(5, &[lost.0, added.0]);
    assert_eq!(plan(&state, &health(5, &[lost.0])), [], "under way");
    let withdrawals = plan(&state, &both);
    perform(&mut state, &withdrawals);
    assert_eq!(now(&state).leaving.len(), 1);
    assert_eq!(plan(&state, &both), [], "until the group has said that it is back where it was");
    arrive(&mut state);
    settle(&mut state, &both);
    let nodes: BTreeSet<NodeId> = now(&state).members.iter().map(|member| member.node).collect();
    assert!(nodes.len() == 3 && !nodes.contains(&lost) && !nodes.contains(&added), "{nodes:?}");
}

/// Something happens between two rounds of planning.
#[derive(Clone, Debug)]
enum Event {
    Down(u64),
    Up(u64),
    Join,
    Stand(u64, Standing),
    /// Groups that can, reach their target: every so-manieth.
    Arrive(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let standing = prop_oneof![Just(Standing::Active), Just(Standing::Draining), Just(Standing::Leaving)];
    prop_oneof![
        3 => (1u64..9).prop_map(Event::Down),
        3 => (1u64..9).prop_map(Event::Up),
        1 => Just(Event::Join),
        2 => (1u64..9, standing).prop_map(|(node, standing)| Event::Stand(node, standing)),
        5 => (1usize..4).prop_map(Event::Arrive),
    ]
}

struct World {
    state: State,
    nodes: u64,
    down: BTreeSet<u64>,
}

impl World {
    fn liveness(&self) -> Liveness {
        health(self.nodes, &self.down.iter().copied().collect::<Vec<_>>())
    }

    /// As far as a group can: with a quorum before and after, and new members alive.
    fn arrive(&mut self, every: usize) {
        let liveness = self.liveness();
        let moving: Vec<Partition> =
            self.state.map().partitions().values().filter(|p| !p.is_at_rest()).cloned().collect();
        for partition in moving.into_iter().step_by(every) {
            let (members, target) = (nodes_of(&partition.members), nodes_of(&partition.target));
            let mut added = target.iter().filter(|node| !members.contains(node));
            let possible = spare(&members, &liveness).is_some()
                && spare(&target, &liveness).is_some()
                && added.all(|node| liveness.is_alive(*node));
            if possible {
                let members_epoch = partition.epoch.members + 1;
                let report = Command::Report { partition: partition.id, members_epoch, members: partition.target };
                self.state.apply(report).expect("sound");
            }
        }
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Down(node) => drop(self.down.insert(*node)),
            Event::Up(node) => drop(self.down.remove(node)),
            Event::Join => {
                self.nodes += 1;
                self.state.apply(Command::RegisterNode(process(self.nodes, "a"))).expect("new node");
            }
            Event::Stand(node, standing) => {
                let takers = self.state.map().nodes().values().filter(|n| n.standing.takes_replicas()).count();
                if takers > 3 || *standing == Standing::Active {
                    let _ = self.state.apply(Command::SetStanding { node: NodeId(*node), standing: *standing });
                }
            }
            Event::Arrive(every) => self.arrive(*every),
        }
    }

    /// Plans and performs; no step costs a live member above the quorum.
    fn plan(&mut self) {
        let liveness = self.liveness();
        for decision in plan(&self.state, &liveness) {
            self.state.apply(Command::Step(decision.step.clone())).expect("planned on this state");
            let Step::SetTarget { partition, .. } = decision.step else { continue };
            let partition = self.state.map().partition(partition).expect("known");
            let (before, after) = (nodes_of(&partition.members), nodes_of(&partition.target));
            let shrinks = partition.id == DRIVER && after.len() < before.len();
            let least = if shrinks { Some(0) } else { spare(&before, &liveness) };
            assert!(spare(&after, &liveness) >= least, "{decision:?}");
        }
        for node in self.state.departed() {
            stand(&mut self.state, node.0, Standing::Removed);
        }
        assert_eq!(self.state.map().check(), Ok(()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn random_failures_cost_no_quorum_and_end_at_rest(events in proptest::collection::vec(event(), 1..60)) {
        let mut world = World { state: at_rest(5, 6), nodes: 5, down: BTreeSet::new() };
        for event in &events {
            world.happen(event);
            world.plan();
        }
        // Failures stop.
        world.down.clear();
        for _ in 0..20 {
            world.plan();
            world.arrive(1);
        }
        prop_assert_eq!(plan(&world.state, &world.liveness()), []);
        let nodes = world.state.map().nodes().clone();
        prop_assert!(nodes.values().all(|node| node.standing != Standing::Leaving), "all that leave have left");
        for partition in world.state.map().partitions().values() {
            prop_assert!(partition.is_at_rest(), "{:?}", partition);
            prop_assert!(partition.members.iter().all(|member| nodes[&member.node].standing.keeps_replicas()));
            prop_assert!(partition.id == DRIVER || partition.members.len() == 3, "{:?}", partition);
        }
    }
}
