//! Withdrawn targets against a group that changes its members while its leaders hold old maps.

use super::tests::{arrival, cluster, create, created};
use super::*;
use proptest::prelude::*;

/// A group's committed membership, as its log has it.
#[derive(Clone, Debug)]
struct Membership {
    at: u64,
    /// One set of voters, or two while they are joint.
    voters: Vec<BTreeSet<Replica>>,
    learners: BTreeSet<Replica>,
}

impl Membership {
    fn is_settled(&self) -> bool {
        self.voters.len() == 1 && self.learners.is_empty()
    }

    fn replicas(&self) -> Vec<Replica> {
        self.voters.iter().flatten().chain(&self.learners).copied().collect()
    }

    /// One step of a leader that holds `map` and wrote the membership at `own` last, as the raft layer takes them; a report
    /// if that is what is due.
    fn step(&mut self, map: &Partition, own: &mut Option<u64>) -> Option<Command> {
        if self.is_settled() && self.at > map.epoch.members {
            let members = self.voters[0].iter().copied().collect();
            return Some(Command::Report { partition: map.id, members_epoch: self.at, members });
        }
        let target: BTreeSet<Replica> = map.target.iter().copied().collect();
        let may_change = if self.is_settled() { map.may_change(self.at) } else { *own == Some(self.at) };
        if self.voters.len() > 1 {
            self.voters.remove(0);
        } else if !may_change {
            if self.is_settled() {
                return None;
            }
            self.learners.clear();
        } else if self.voters[0] != target {
            match target.iter().find(|replica| !self.replicas().contains(replica)) {
                Some(missing) => drop(self.learners.insert(*missing)),
                None => {
                    self.learners.retain(|replica| !target.contains(replica));
                    self.voters.push(target);
                }
            }
        } else if !self.learners.is_empty() {
            self.learners.clear();
        } else if map.leaving.is_empty() {
            return None;
        }
        self.at += 1;
        *own = Some(self.at);
        None
    }
}

#[derive(Clone, Debug)]
enum Act {
    Target {
        nodes: BTreeSet<u64>,
    },
    Withdraw,
    /// The leader holds the map of so many versions ago.
    Lead {
        age: usize,
        steps: usize,
    },
    /// A report arrives, perhaps again.
    Deliver {
        which: usize,
    },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => proptest::collection::btree_set(1u64..7, 1..5).prop_map(|nodes| Act::Target { nodes }),
        2 => Just(Act::Withdraw),
        4 => (0usize..3, 1usize..6).prop_map(|(age, steps)| Act::Lead { age, steps }),
        2 => (0usize..12, 1usize..6).prop_map(|(age, steps)| Act::Lead { age, steps }),
        3 => (0usize..4).prop_map(|which| Act::Deliver { which }),
        1 => any::<usize>().prop_map(|which| Act::Deliver { which }),
    ]
}

/// More steps and reports than any change takes.
const SETTLED_AFTER: usize = 32;

struct World {
    state: State,
    group: Membership,
    /// Every copy of the partition that somebody may still hold.
    copies: Vec<Partition>,
    /// Every report ever made.
    reports: Vec<Command>,
}

impl World {
    fn new() -> Self {
        let mut state = cluster(6);
        let (keyspace, ..) = created(state.apply(create("x", 3, 1)));
        let id = state.map().partitions_of(keyspace.id).next().expect("one").id;
        state.apply(arrival(&state, id, 0)).expect("first report");
        let partition = state.map().partition(id).expect("known").clone();
        let voters = vec![partition.members.iter().copied().collect()];
        let group = Membership { at: 0, voters, learners: BTreeSet::new() };
        Self { state, group, copies: vec![partition], reports: Vec::new() }
    }

    fn now(&self) -> &Partition {
        self.copies.last().expect("the first")
    }

    fn drive(&mut self, command: Command) -> Answer {
        let answer = self.state.apply(command);
        let now = self.state.map().partition(self.now().id).expect("never dropped").clone();
        if now != *self.now() {
            self.copies.push(now);
        }
        answer
    }

    fn target(&mut self, nodes: Vec<NodeId>) -> Answer {
        let (partition, epoch) = (self.now().id, self.now().epoch);
        self.drive(Command::Step(Step::SetTarget { partition, epoch, nodes }))
    }

    fn withdraw(&mut self) -> Answer {
        self.target(self.now().members.iter().map(|replica| replica.node).collect())
    }

    fn perform(&mut self, act: &Act) {
        match act {
            Act::Target { nodes } => drop(self.target(nodes.iter().map(|node| NodeId(*node)).collect())),
            Act::Withdraw => drop(self.withdraw()),
            Act::Lead { age, steps } => {
                let copy = self.copies[self.copies.len().saturating_sub(1 + age)].clone();
                let mut own = None;
                for _ in 0..*steps {
                    self.reports.extend(self.group.step(&copy, &mut own));
                }
            }
            Act::Deliver { which } => {
                let report = self.reports.iter().rev().nth(which % self.reports.len().max(1)).cloned();
                let _ = report.map(|report| self.drive(report));
            }
        }
    }

    /// Voters that no host would keep.
    fn homeless(&self) -> Vec<Replica> {
        let known: BTreeSet<Replica> = self.now().replicas().collect();
        self.group.voters.iter().flatten().filter(|voter| !known.contains(voter)).copied().collect()
    }

    /// What the newest copy asks for is done, and reported.
    fn settle(&mut self) {
        let mut own = None;
        for _ in 0..SETTLED_AFTER {
            let copy = self.now().clone();
            let _ = self.group.step(&copy, &mut own).map(|report| self.drive(report));
        }
        assert!(self.now().is_at_rest() && self.group.is_settled(), "{:?} {:?}", self.now(), self.group);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]
    #[test]
    fn no_voter_is_ever_off_the_map(acts in proptest::collection::vec(act(), 1..80)) {
        let mut world = World::new();
        for act in &acts {
            world.perform(act);
            prop_assert_eq!(world.homeless(), [], "{:?} {:?}", world.now(), world.group);
            prop_assert_eq!(world.state.map().check(), Ok(()));
        }
        world.settle();
        prop_assert_eq!(world.homeless(), []);
        let voters: BTreeSet<Replica> = world.now().members.iter().copied().collect();
        prop_assert_eq!(&world.group.voters, &[voters]);
    }
}

#[test]
fn a_withdrawn_replica_stays_until_the_group_has_said_what_became_of_it() {
    for steps_before in 0..4 {
        let mut world = World::new();
        let members = world.now().members.clone();
        let others: Vec<NodeId> = (1..=6).map(NodeId).filter(|n| members.iter().all(|r| r.node != *n)).collect();
        let nodes = vec![members[0].node, members[1].node, others[0]];
        assert_eq!(world.target(nodes.clone()), Ok(Reply::Stepped));
        let added = *world.now().target.last().expect("three");
        let old = world.now().clone();
        let mut own = None;
        for _ in 0..steps_before {
            assert_eq!(world.group.step(&old, &mut own), None);
        }
        let mut elsewhere = nodes;
        elsewhere[2] = others[1];
        let answer = world.target(elsewhere);
        assert!(matches!(answer, Err(Refusal::StepOutdated { .. })), "under way: {answer:?}");
        assert_eq!(world.withdraw(), Ok(Reply::Stepped));
        assert_eq!((&world.now().leaving, world.now().is_at_rest()), (&vec![added], false));
        assert_eq!(world.now().replica_on(others[0]), Some(added), "its host keeps it");
        world.settle();
        // From the joint membership on there is no way back: the withdrawal came too late.
        let late = steps_before >= 2;
        assert!(world.now().leaving.is_empty());
        assert_eq!(world.now().replica_on(others[0]).is_some(), late, "after {steps_before} steps");
        assert_eq!(world.now().members == members, !late, "after {steps_before} steps");
        let at = world.group.at;
        assert_eq!(
            world.group.clone().step(&old, &mut None),
            world.group.step(&old, &mut own),
            "an old map only reports"
        );
        assert_eq!(world.group.at, at);
    }
}

#[test]
fn who_left_before_the_withdrawal_was_heard_does_not_come_back_under_the_same_id() {
    let mut world = World::new();
    let only = |node| Act::Target { nodes: BTreeSet::from([node]) };
    let lead = |age, steps| Act::Lead { age, steps };
    let deliver = || Act::Deliver { which: 0 };
    let begun = [only(2), Act::Withdraw, lead(0, 2), deliver(), only(5), Act::Withdraw];
    // The group shrinks all the same, grows back as asked, and then an old leader makes a voter of the first one withdrawn.
    let late = [lead(1, 4), deliver(), lead(0, 1), lead(5, 2), lead(5, 2)];
    for act in begun.into_iter().chain(late) {
        world.perform(&act);
        assert_eq!(world.homeless(), [], "{:?} {:?}", world.now(), world.group);
    }
    world.settle();
}
