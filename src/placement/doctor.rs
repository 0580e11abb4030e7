//! What is not as it should be, and what would still work without certain nodes. Looks at the map alone, so any node
//! can answer, also when the placement driver cannot.

use super::{
    map::{Map, Partition, Phase},
    merging::Duty,
};
use crate::key::{DRIVER, NodeId, PartitionId, printable};
use std::collections::{BTreeMap, BTreeSet};

/// Partitions named in one line for people.
const SHOWN_MAX: usize = 10;

/// How much of a group works.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Service {
    /// No member lives: nothing can be read. The rows come back with the nodes.
    Nothing,
    /// No quorum: `EVENTUAL` reads are answered, `BOUNDED` and `SESSION` ones as far as a member is fresh enough;
    /// no write, no linearizable read.
    Stale,
    /// A quorum and not one member to spare.
    Fragile,
    /// Everything, and another member may fail.
    Whole,
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Diagnosis {
    /// Data partitions by how much of them works.
    pub partitions: BTreeMap<Service, Vec<PartitionId>>,
    /// Members of the placement driver: those that live, and all.
    pub driver_members: (usize, usize),
    /// Partitions with fewer members than their keyspace asks for.
    pub underreplicated: Vec<PartitionId>,
    /// Partitions whose members are changing.
    pub changing: Vec<PartitionId>,
    /// Partitions with more than one member, all in one zone, though there are other zones.
    pub in_one_zone: Vec<PartitionId>,
    /// Nodes whose loss alone would cost that many partitions their quorum.
    pub needed_nodes: BTreeMap<NodeId, usize>,
}

impl Service {
    /// Of members of whom `live` live.
    fn of(live: usize, members: usize) -> Self {
        let quorum = members / 2 + 1;
        match live {
            0 => Self::Nothing,
            live if live < quorum => Self::Stale,
            // One member alone never has one to spare, and one of many has none left.
            live if live == quorum => Self::Fragile,
            _ => Self::Whole,
        }
    }
}

/// How the cluster is if exactly `alive` of its nodes live: those that do, or fewer, to see what their loss would do.
#[must_use]
pub fn diagnose(map: &Map, alive: &BTreeSet<NodeId>) -> Diagnosis {
    let mut found = Diagnosis::default();
    let zone = |node: NodeId| map.node(node).map_or("", |node| node.zone.as_str());
    let zones: BTreeSet<&str> =
        map.nodes().values().filter(|node| node.standing.is_present()).map(|node| node.zone.as_str()).collect();
    for partition in map.partitions().values() {
        let members = partition.members.len();
        let live: Vec<NodeId> = live_of(partition, alive).collect();
        if partition.id == DRIVER {
            found.driver_members = (live.len(), members);
            continue;
        }
        let service = Service::of(live.len(), members);
        found.partitions.entry(service).or_default().push(partition.id);
        if service == Service::Fragile {
            live.iter().for_each(|node| *found.needed_nodes.entry(*node).or_default() += 1);
        }
        if map.keyspaces().get(&partition.keyspace).is_some_and(|keyspace| members < keyspace.replicas as usize) {
            found.underreplicated.push(partition.id);
        }
        if !partition.is_at_rest() {
            found.changing.push(partition.id);
        }
        let used: BTreeSet<&str> = partition.members.iter().map(|replica| zone(replica.node)).collect();
        if members > 1 && used.len() == 1 && zones.len() > 1 {
            found.in_one_zone.push(partition.id);
        }
    }
    found
}

fn live_of<'a>(partition: &'a Partition, alive: &'a BTreeSet<NodeId>) -> impl Iterator<Item = NodeId> + 'a {
    partition.members.iter().map(|replica| replica.node).filter(|node| alive.contains(node))
}

impl Diagnosis {
    /// The partitions of which so much works.
    #[must_use]
    pub fn with(&self, service: Service) -> &[PartitionId] {
        self.partitions.get(&service).map_or(&[], Vec::as_slice)
    }

    /// Whether the placement driver has a quorum.
    #[must_use]
    pub const fn driver_has_quorum(&self) -> bool {
        self.driver_members.0 > self.driver_members.1 / 2
    }

    /// What is wrong, the worst first, a line each, for people; none when all is well.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let (live, members) = self.driver_members;
        if !self.driver_has_quorum() {
            problems.push(format!(
                "the placement driver has {live} of {members} members and no quorum: nothing is repaired, moved, \
                 created or admitted; reads and writes go on where partitions have a quorum"
            ));
        }
        let mut tell = |partitions: &[PartitionId], what: &str| {
            if !partitions.is_empty() {
                let noun = if partitions.len() == 1 { "partition" } else { "partitions" };
                problems.push(format!("{} {noun} {what}: {}", partitions.len(), shown(partitions)));
            }
        };
        tell(self.with(Service::Nothing), "without a live member: nothing can be read or written");
        tell(
            self.with(Service::Stale),
            "without a quorum: EVENTUAL reads only, BOUNDED and SESSION ones while a member is fresh enough; if its nodes \
             never come back, `meridian partition recover ID` says what can be saved",
        );
        tell(&self.underreplicated, "with fewer members than the keyspace asks for");
        tell(&self.changing, "whose members are changing");
        tell(&self.in_one_zone, "with all members in one zone, though there are others");
        if !self.needed_nodes.is_empty() {
            let nodes: Vec<String> =
                self.needed_nodes.iter().take(SHOWN_MAX).map(|(node, count)| format!("{node} ({count})")).collect();
            let more = if self.needed_nodes.len() > SHOWN_MAX { ", …" } else { "" };
            problems.push(format!(
                "the loss of one of these nodes would cost partitions (so many) their quorum: {}{more}",
                nodes.join(", ")
            ));
        }
        problems
    }
}

/// Some ids, and that there are more.
fn shown(ids: &[PartitionId]) -> String {
    let list: Vec<String> = ids.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    let more = if ids.len() > SHOWN_MAX { ", …" } else { "" };
    format!("{}{more}", list.join(", "))
}

/// A partition's state in a word or two.
#[must_use]
pub fn state_of(map: &Map, partition: &Partition, alive: &BTreeSet<NodeId>, leader: Option<NodeId>) -> &'static str {
    let live = live_of(partition, alive).count();
    let wanted = map.keyspaces().get(&partition.keyspace).map_or(0, |keyspace| keyspace.replicas as usize);
    match partition.phase {
        Phase::Creating => "creating",
        Phase::Recovering(..) => "recovering",
        Phase::Active if Service::of(live, partition.members.len()) < Service::Fragile => "no quorum",
        Phase::Active if leader.is_none_or(|leader| !alive.contains(&leader)) => "no leader",
        Phase::Active if !partition.is_at_rest() => "changing",
        Phase::Active if live < wanted => "under-replicated",
        Phase::Active => "active",
    }
}

/// What is to be said of one partition, a line each: what is not as it should be, and what that waits for.
#[must_use]
pub fn explain(map: &Map, partition: &Partition, alive: &BTreeSet<NodeId>, leader: Option<NodeId>) -> Vec<String> {
    let mut found = Vec::new();
    let list = |nodes: &[NodeId]| nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let members: Vec<NodeId> = partition.members.iter().map(|replica| replica.node).collect();
    let target: Vec<NodeId> = partition.target.iter().map(|replica| replica.node).collect();
    let (live, dead): (Vec<NodeId>, Vec<NodeId>) = members.iter().copied().partition(|node| alive.contains(node));
    if partition.phase == Phase::Creating {
        found.push(format!("its group has not reported yet; {} initializes it", partition.initializer));
    }
    if let Phase::Recovering(from, _) = partition.phase {
        found.push(format!(
            "it goes on without a quorum, from what {from} on {} holds, which makes that",
            list(&members)
        ));
    }
    if Service::of(live.len(), members.len()) < Service::Fragile {
        found.push(format!(
            "{} of its {} members are out of contact: nothing can be written or changed until one of {} is back; if none \
             ever comes back, `meridian partition recover {}` says what can be saved",
            dead.len(),
            members.len(),
            list(&dead),
            partition.id
        ));
    } else if !dead.is_empty() {
        let dead = list(&dead);
        found.push(format!("{dead} out of contact: what was there is built anew elsewhere after `down_after`"));
    }
    if let Some(cut) = &partition.cut {
        let (child, at) = (cut.child, printable(&cut.at));
        found.push(format!("it is to be cut at {at}, into itself and {child}; its leader does that"));
    } else if let Some(merge) = &partition.merge {
        let with = merge.with;
        found.push(match merge.duty {
            Duty::Absorb => format!("it is to take in {with}; its leader does that"),
            Duty::Fence => format!("it was to take in {with}, and that is being withdrawn; its leader does that"),
            Duty::Yield => format!("{with} is to take it in; until that is done or withdrawn, requests wait"),
        });
    } else if partition.phase == Phase::Active && !partition.is_at_rest() {
        let (from, to) = (list(&members), list(&target));
        found.push(format!("its members are to change from {from} to {to}; its leader does that"));
    }
    let wanted = map.keyspaces().get(&partition.keyspace).map_or(0, |keyspace| keyspace.replicas as usize);
    if partition.id != DRIVER && target.len() < wanted {
        let (have, nodes) = (target.len(), alive.len());
        found.push(format!("{wanted} members are asked for, {have} are planned, and {nodes} nodes are in contact"));
    }
    match (leader, target.first()) {
        (None, _) => found.push("no leader is known".to_owned()),
        (Some(leader), Some(first)) if leader != *first && partition.id != DRIVER => {
            found.push(format!("{leader} leads it and {first} is preferred: that takes over once it is steady"));
        }
        _ => {}
    }
    if found.is_empty() {
        found.push(format!("nothing is to be done: its members {} are as they should be", list(&members)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{
        State,
        plan::tests::{arrive, cluster, create, liveness, settle},
    };

    fn five() -> State {
        let mut state = cluster(&["a", "a", "b", "b", "c"]);
        create(&mut state, 3, 4);
        create(&mut state, 1, 2);
        arrive(&mut state);
        settle(&mut state, &liveness(1..=5, &[]));
        state
    }

    fn nodes(ids: impl IntoIterator<Item = u64>) -> BTreeSet<NodeId> {
        ids.into_iter().map(NodeId).collect()
    }

    #[test]
    fn what_would_be_lost_is_what_lacks_a_majority() {
        let state = five();
        for lost in [vec![], vec![1], vec![2, 5], vec![1, 2, 3], vec![1, 2, 3, 4, 5]] {
            let alive = nodes((1..=5).filter(|id| !lost.contains(id)));
            let found = diagnose(state.map(), &alive);
            let data = state.map().partitions().values().filter(|partition| partition.id != DRIVER);
            for partition in data {
                let live = partition.members.iter().filter(|replica| alive.contains(&replica.node)).count();
                let service = match (live, live * 2 > partition.members.len()) {
                    (0, _) => Service::Nothing,
                    (_, false) => Service::Stale,
                    (live, true) if (live - 1) * 2 > partition.members.len() => Service::Whole,
                    (_, true) => Service::Fragile,
                };
                assert!(found.with(service).contains(&partition.id), "{partition:?} without {lost:?}: {found:?}");
            }
            assert_eq!(found.driver_has_quorum(), alive.len() >= 3, "{lost:?}");
            assert_eq!(found.partitions.values().map(Vec::len).sum::<usize>(), state.map().partitions().len() - 1);
        }
        let without = diagnose(state.map(), &nodes([4, 5])).problems();
        assert!(without[0].contains("driver has 2 of 5"), "{without:?}");
        assert!(without.iter().any(|line| line.contains("EVENTUAL reads only")), "{without:?}");
    }

    #[test]
    fn single_members_name_the_nodes_that_are_needed() {
        let found = diagnose(five().map(), &nodes(1..=5));
        assert_eq!((found.with(Service::Fragile).len(), found.with(Service::Whole).len()), (2, 5));
        assert_eq!(found.needed_nodes.values().sum::<usize>(), 2);
        assert_eq!((found.underreplicated.len(), found.in_one_zone.len(), found.changing.len()), (0, 0, 0));
    }

    #[test]
    fn young_partitions_lack_members_and_zones() {
        let mut state = cluster(&["a", "a", "b"]);
        create(&mut state, 5, 1);
        let found = diagnose(state.map(), &nodes(1..=3));
        let id = *state.map().partitions().keys().next_back().expect("one");
        assert!(found.underreplicated.contains(&id) && found.changing.contains(&id), "{found:?}");
        let mut one_zone = cluster(&["a", "a"]);
        create(&mut one_zone, 2, 1);
        arrive(&mut one_zone);
        let late = crate::placement::Command::RegisterNode(crate::placement::plan::tests::process(3, "b"));
        one_zone.apply(late).expect("new node");
        assert_eq!(diagnose(one_zone.map(), &nodes(1..=3)).in_one_zone.len(), 1);
    }
}
