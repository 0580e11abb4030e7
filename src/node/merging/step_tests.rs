use super::*;
use crate::{
    key::{KeyKind, KeyspaceId, Layout, Span},
    placement::{CreateKeyspace, Cuts, RegisterNode, Reply, State},
};
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const TERM: u64 = 1;
const KEYS: u8 = 6;

/// The driver, three partitions and all that is under way between them. One leader per partition, in one term for ever:
/// only epochs and versions of maps protect.
struct World {
    driver: State,
    keyspace: KeyspaceId,
    /// Every version; leaders follow any of them.
    maps: Vec<Map>,
    /// What the logs have led to, of partitions that are gone too.
    stores: BTreeMap<PartitionId, kv::Store>,
    /// Proposed and not decided yet.
    proposed: Vec<(PartitionId, kv::Reshape)>,
    reports: Vec<Command>,
    written: BTreeMap<u8, i64>,
}

fn key(n: u8) -> Bytes {
    Bytes::copy_from_slice(&[b'a' + n])
}

fn increment(n: u8) -> kv::Command {
    let action = kv::Action::Increment { delta: 1 };
    let item = kv::Item { key: key(n), condition: kv::Condition::Any, action, return_previous: false };
    kv::Command { stamp: 0, writes: vec![kv::Write { session: None, op: kv::Op::Single(item) }] }
}

impl World {
    fn new() -> Self {
        let node = RegisterNode {
            cluster_id: String::new(),
            uuid: "00000000-0000-4000-8000-000000000001".to_owned(),
            address: "h:1".to_owned(),
            zone: String::new(),
            weight_milli: 0,
            previous: None,
            ephemeral: false,
        };
        let mut driver = State::new();
        let bootstrap = Command::Bootstrap { cluster_id: "c".to_owned(), node, replicas_default: 1 };
        driver.apply(bootstrap).expect("the first");
        let create = CreateKeyspace {
            name: "x".to_owned(),
            kind: KeyKind::Bytes,
            layout: Layout::Ordered,
            replicas: 1,
            cuts: Cuts::At(vec![key(2), key(4)]),
            avoid: BTreeSet::new(),
        };
        driver.apply(Command::CreateKeyspace(create)).expect("new");
        let keyspace = driver.map().keyspace_by_name("x").expect("made").id;
        let made: Vec<Partition> = driver.map().partitions_of(keyspace).cloned().collect();
        let mut stores = BTreeMap::new();
        for partition in made {
            let report =
                Command::Report { partition: partition.id, members_epoch: 1, members: partition.members.clone() };
            driver.apply(report).expect("its members");
            let (layout, span, limits) = (Layout::Ordered, partition.span, kv::SessionLimits::default());
            stores.insert(partition.id, kv::Store::new(kv::StoreConfig { layout, span, limits }));
        }
        let maps = vec![driver.map().clone()];
        let (proposed, reports, written) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { driver, keyspace, maps, stores, proposed, reports, written }
    }

    fn drive(&mut self, command: Command) {
        let _refused = self.driver.apply(command);
        assert_eq!(self.driver.map().check(), Ok(()));
        if self.maps.last().map(Map::version) != Some(self.driver.map().version()) {
            self.maps.push(self.driver.map().clone());
        }
    }

    fn partitions(&self) -> Vec<Partition> {
        self.driver.map().partitions_of(self.keyspace).cloned().collect()
    }

    fn ask_for(&mut self, what: u8, n: u8) {
        let partitions = self.partitions();
        let left = &partitions[usize::from(n) % partitions.len()];
        let right = partitions.iter().find(|right| left.span.end.as_ref() == Some(&right.span.start));
        match (what, right) {
            (0, _) => {
                let bounds = left.epoch.bounds;
                self.drive(Command::Divide { partition: left.id, bounds, at: key(n % KEYS) });
            }
            (1, Some(right)) => {
                let bounds = [left.epoch.bounds, right.epoch.bounds];
                self.drive(Command::Merge { pair: [left.id, right.id], bounds });
            }
            (_, Some(right)) => self.drive(Command::Unmerge { pair: [left.id, right.id] }),
            _ => {}
        }
    }

    /// The leader of a partition looks at one of the maps.
    fn follow(&mut self, id: PartitionId, map: &Map, of_right: &Map) {
        let Some(partition) = map.partition(id) else { return };
        let propose = |change| kv::Reshape { epoch: partition.epoch.bounds, term: TERM, change };
        match step(map.version(), partition, &self.stores[&id]) {
            Some(Step::Propose(change)) => self.proposed.push((id, propose(change))),
            Some(Step::Report(command)) => self.reports.push(command),
            Some(Step::Absorb) => {
                let merge = partition.merge.as_ref().expect("it is to absorb");
                let right = &self.stores[&merge.with];
                if right.sealed().is_some_and(|at| at >= merge.since) {
                    self.proposed.push((id, propose(kv::Change::Absorb { state: right.export() })));
                } else if let Some((known, change)) = sealing(of_right, merge.with, merge.since) {
                    let reshape = kv::Reshape { epoch: known.epoch.bounds, term: TERM, change };
                    self.proposed.push((merge.with, reshape));
                }
            }
            None => {
                let Some(cut) = &partition.cut else { return };
                let split = kv::Split {
                    at: cut.at.clone(),
                    child: cut.child,
                    members: cut.members.clone(),
                    leader: cut.members[0].id,
                    map_version: map.version(),
                };
                self.proposed.push((id, propose(kv::Change::Split(Box::new(split)))));
            }
        }
    }

    fn decide(&mut self, id: PartitionId, reshape: &kv::Reshape) {
        let store = self.stores.get_mut(&id).expect("it has a log");
        let index = store.applied() + 1;
        if let Some(birth) = store.reshape(index, TERM, reshape) {
            let child = birth.split.child;
            self.stores.insert(child, birth.store);
            self.reports.push(Command::Divided { partition: id, child });
        }
    }

    /// Writes and reads where it is owned, which is in one place at most.
    fn write(&mut self, n: u8) {
        let owners: Vec<PartitionId> =
            self.stores.iter().filter(|(_, store)| store.get(&key(n)).is_ok()).map(|(id, _)| *id).collect();
        assert!(owners.len() <= 1, "{} is owned by {owners:?}", n);
        let Some(store) = owners.first().and_then(|owner| self.stores.get_mut(owner)) else { return };
        let index = store.applied() + 1;
        store.apply(index, &increment(n));
        let written = self.written.entry(n).or_default();
        *written += 1;
        let row = store.get(&key(n)).expect("it is owned").expect("it was written");
        assert_eq!(row.value, written.to_string(), "a write of {n} is lost");
    }

    /// Nothing is late any more and everybody knows the newest map: all that was asked for comes to its end.
    fn come_to_rest(&mut self) {
        for _ in 0..20 {
            let newest = self.driver.map().clone();
            for id in self.stores.keys().copied().collect::<Vec<_>>() {
                self.follow(id, &newest, &newest);
            }
            for (id, reshape) in std::mem::take(&mut self.proposed) {
                self.decide(id, &reshape);
            }
            for report in std::mem::take(&mut self.reports) {
                self.drive(report);
            }
        }
        for partition in self.partitions() {
            assert!(partition.is_at_rest(), "{partition:?}");
            let store = &self.stores[&partition.id];
            assert_eq!((store.sealed(), store.epoch(), store.span()), (None, partition.epoch.bounds, &partition.span));
        }
        (0..KEYS).for_each(|n| {
            let before = self.written.get(&n).copied();
            self.write(n);
            assert_ne!(self.written.get(&n).copied(), before, "{n} is owned by nobody");
        });
    }
}

fn at(n: u8, len: usize) -> usize {
    usize::from(n) * len / 256
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn nothing_is_owned_twice_or_lost_whatever_is_late(
        steps in prop::collection::vec((0u8..16, any::<u8>(), any::<u8>(), any::<u8>()), 1..200)
    ) {
        let mut world = World::new();
        for (what, a, b, c) in steps {
            match what {
                0..=2 => world.ask_for(what, a),
                3..=6 => {
                    let ids: Vec<PartitionId> = world.stores.keys().copied().collect();
                    // Mostly the newest.
                    let pick = |n: u8| if n < 160 { world.maps.len() - 1 } else { at(n.wrapping_mul(3), world.maps.len()) };
                    let (map, of_right) = (world.maps[pick(b)].clone(), world.maps[pick(c)].clone());
                    world.follow(ids[at(a, ids.len())], &map, &of_right);
                }
                7..=10 if !world.proposed.is_empty() => {
                    let (id, reshape) = world.proposed.remove(at(a, world.proposed.len()));
                    if b > 20 {
                        world.decide(id, &reshape);
                    }
                }
                11 | 12 if !world.reports.is_empty() => {
                    let place = at(a, world.reports.len());
                    let report = if b < 60 { world.reports[place].clone() } else { world.reports.remove(place) };
                    world.drive(report);
                }
                _ => world.write(a % KEYS),
            }
        }
        world.come_to_rest();
    }
}

#[test]
fn a_merge_goes_its_way() {
    let mut world = World::new();
    (0..KEYS).for_each(|n| world.write(n));
    world.ask_for(1, 0);
    world.come_to_rest();
    world.ask_for(1, 0);
    assert!(matches!(world.driver.apply(Command::Unmerge { pair: [PartitionId(0); 2] }), Ok(Reply::Reported { .. })));
    world.come_to_rest();
    assert_eq!(world.partitions().iter().map(|p| p.span.clone()).collect::<Vec<_>>(), [Span::all()]);
}
