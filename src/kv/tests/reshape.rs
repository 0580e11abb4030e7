//! Splits and merges of one partition: rows, sessions, freezes, repetitions.

use super::*;
use crate::key::{Version, position, successor, version_at};
use crate::kv::{Action, Command, Condition, Done, Item, Op, Refusal, Session, SessionLimits, StoreConfig, Write};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const TERM: u64 = 3;

fn config(layout: Layout) -> StoreConfig {
    StoreConfig { layout, span: Span::all(), limits: SessionLimits::default() }
}

fn put(key: &str, value: &str) -> Write {
    let action = Action::Put { value: value.to_owned().into() };
    let item = Item { key: key.to_owned().into(), condition: Condition::Any, action, return_previous: false };
    Write { session: None, op: Op::Single(item) }
}

fn filled(layout: Layout, rows: u32) -> Store {
    let mut store = Store::new(config(layout));
    let writes = (0..rows).map(|n| put(&format!("k{n:04}"), &format!("v{n}"))).collect();
    store.apply(1, &Command { stamp: version_at(5), writes });
    store
}

fn split_at(at: &[u8]) -> Change {
    let member = |n| Replica { id: ReplicaId(n), node: NodeId(n) };
    Change::Split(Box::new(Split {
        at: Bytes::copy_from_slice(at),
        child: PartitionId(9),
        members: vec![member(1), member(2)],
        leader: ReplicaId(2),
        map_version: 7,
    }))
}

fn reshape(store: &mut Store, change: Change) -> Option<Birth> {
    let (index, epoch) = (store.applied() + 1, store.epoch());
    store.reshape(index, TERM, &Reshape { epoch, term: TERM, change })
}

fn keys(store: &Store) -> Vec<Vec<u8>> {
    store.table().range(&Span::all()).map(|row| row.key().to_vec()).collect()
}

#[test]
fn every_change_survives_its_encoding() {
    let changes = [
        split_at(b"m"),
        Change::Seal { map_version: 4 },
        Change::Unseal { map_version: 5 },
        Change::Absorb { state: Bytes::from_static(b"state") },
        Change::Fence,
    ];
    for change in changes {
        let reshape = Reshape { epoch: 5, term: 6, change };
        let bytes = reshape.encode();
        assert_eq!(Reshape::decode(&bytes).unwrap(), Some(reshape));
        assert!(Reshape::decode(&bytes.slice(..bytes.len() - 1)).is_err(), "cut");
        assert!(Command::decode(&bytes).is_err(), "no command begins like this");
    }
    assert_eq!(Reshape::decode(&Command { stamp: 1, writes: vec![] }.encode()).unwrap(), None);
}

#[test]
fn a_split_shares_the_rows_out_and_both_sides_refuse_the_others() {
    for layout in [Layout::Ordered, Layout::Hashed] {
        let mut left = filled(layout, 100);
        let (all, bytes) = (keys(&left), left.bytes());
        let at = left.middle().unwrap();
        let right = reshape(&mut left, split_at(&at)).unwrap().store;
        assert!(left.rows() >= 25 && right.rows() >= 25, "{layout:?}: {} and {}", left.rows(), right.rows());
        assert_eq!(left.bytes() + right.bytes(), bytes);
        assert_eq!((left.epoch(), right.epoch(), right.applied()), (2, 2, SEED_INDEX));
        assert_eq!(right.last_version(), left.last_version());
        let mut both = [keys(&left), keys(&right)].concat();
        both.sort_unstable();
        assert_eq!(both, all);
        for key in all.into_iter().map(Bytes::from) {
            let here = position(layout, &key) < at;
            assert_eq!((left.get(&key).is_ok(), right.get(&key).is_ok()), (here, !here), "{layout:?} {key:?}");
        }
    }
}

#[test]
fn what_was_decided_earlier_or_elsewhere_changes_nothing() {
    let mut store = filled(Layout::Ordered, 10);
    let split = |epoch, term| Reshape { epoch, term, change: split_at(b"k0005") };
    assert!(store.reshape(2, TERM, &split(2, TERM)).is_none(), "another epoch");
    assert!(store.reshape(3, TERM, &split(1, TERM - 1)).is_none(), "another term");
    assert_eq!(store.rows(), 10);
    assert!(store.reshape(4, TERM, &split(1, TERM)).is_some());
    assert!(store.reshape(5, TERM, &split(1, TERM)).is_none(), "the same once more");
    assert!(reshape(&mut store, split_at(b"k0007")).is_none(), "outside");
    assert!(reshape(&mut store, split_at(b"")).is_none(), "nothing would be left");
    assert_eq!((store.rows(), store.epoch()), (5, 2));
    reshape(&mut store, Change::Fence);
    assert_eq!((store.rows(), store.epoch()), (5, 3));
}

#[test]
fn a_freeze_that_is_running_still_gives_the_state_before_the_split() {
    for layout in [Layout::Ordered, Layout::Hashed] {
        let mut store = filled(layout, 300);
        let before = store.export();
        store.freeze();
        let mut state = store.freeze_next(64).unwrap().to_vec();
        state.extend_from_slice(&store.freeze_next(64).unwrap());
        let at = store.middle().unwrap();
        reshape(&mut store, split_at(&at)).unwrap();
        while let Some(chunk) = store.freeze_next(64) {
            state.extend_from_slice(&chunk);
        }
        let restored = |bytes: &[u8]| {
            let mut restore = Restore::new();
            restore.feed(bytes).unwrap();
            restore.finish().unwrap()
        };
        assert_eq!(keys(&restored(&state)), keys(&restored(&before)), "{layout:?}");
        assert_eq!(restored(&state).digest(), restored(&before).digest());
    }
}

#[test]
fn a_sealed_partition_answers_nobody_and_says_so_after_a_snapshot() {
    let mut store = filled(Layout::Ordered, 10);
    reshape(&mut store, Change::Seal { map_version: 12 });
    assert!(store.get(&"k0001".into()).is_err());
    let reply = store.apply(3, &Command { stamp: 0, writes: vec![put("k0001", "x")] }).remove(0);
    assert!(matches!(reply.answer, Err(Refusal::NotOwned(_))));
    assert!(reshape(&mut store, split_at(b"k0005")).is_none());
    let mut restore = Restore::new();
    restore.feed(&store.export()).unwrap();
    let mut restored = restore.finish().unwrap();
    assert_eq!((restored.sealed(), restored.epoch(), restored.digest()), (Some(12), 1, store.digest()));
    reshape(&mut restored, Change::Unseal { map_version: 12 });
    assert_eq!(restored.sealed(), Some(12), "that map wants the seal");
    reshape(&mut restored, Change::Seal { map_version: 14 });
    reshape(&mut restored, Change::Unseal { map_version: 13 });
    assert_eq!(restored.sealed(), Some(14), "a newer map asked for it again");
    reshape(&mut restored, Change::Unseal { map_version: 15 });
    assert!(restored.get(&"k0001".into()).unwrap().is_some());
}

#[test]
fn a_merge_undoes_a_split() {
    for layout in [Layout::Ordered, Layout::Hashed] {
        let mut left = filled(layout, 100);
        let all = keys(&left);
        let at = left.middle().unwrap();
        let mut right = reshape(&mut left, split_at(&at)).unwrap().store;
        right.apply(2, &Command { stamp: version_at(9), writes: vec![] });
        let state = right.export();
        reshape(&mut left, Change::Absorb { state: state.clone() });
        assert_eq!((keys(&left), left.epoch(), left.span()), (all, 3, &Span::all()));
        assert_eq!(left.last_version(), right.last_version());
        reshape(&mut left, Change::Absorb { state });
        assert_eq!(left.epoch(), 3, "what does not adjoin is not absorbed");
    }
}

#[test]
fn there_is_no_middle_without_two_rows() {
    assert_eq!(filled(Layout::Ordered, 0).middle(), None);
    assert_eq!(filled(Layout::Ordered, 2).middle(), Some(Bytes::from_static(b"k0001")));
}

/// Partitions of one keyspace in order, and what clients have seen of their writes.
struct World {
    stores: Vec<Store>,
    at: Version,
    applied: BTreeSet<(u128, u64)>,
}

impl World {
    fn store_of(&mut self, key: &Bytes) -> &mut Store {
        self.stores.iter_mut().find(|store| store.span().contains(key)).unwrap()
    }

    fn write(&mut self, client: u128, opened: Version, sequence: u64, key: u8) {
        self.at += 1;
        let (at, key) = (self.at, Bytes::copy_from_slice(&[key]));
        let item = Item {
            key: key.clone(),
            condition: Condition::Any,
            action: Action::Increment { delta: 1 },
            return_previous: false,
        };
        let session = Session { client, opened, sequence, acknowledged_below: 0 };
        let write = Write { session: Some(session), op: Op::Single(item) };
        let store = self.store_of(&key);
        let index = store.applied() + 1;
        let reply = store.apply(index, &Command { stamp: at, writes: vec![write] }).remove(0);
        if let (Ok(Done::Single(_)), false) = (&reply.answer, reply.replayed) {
            assert!(self.applied.insert((client, sequence)), "{client} {sequence} was applied twice");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Few clients, tight limits: whatever is forgotten, split and merged, nothing is applied twice.
    #[test]
    fn no_write_is_applied_twice_through_splits_and_merges(
        steps in prop::collection::vec((0u8..10, 0u128..4, 1u64..6, 0u8..8), 1..120)
    ) {
        let limits = SessionLimits { sessions_max: 2, replies_per_session_max: 3, ..SessionLimits::default() };
        let whole = Store::new(StoreConfig { limits, ..config(Layout::Ordered) });
        let mut world = World { stores: vec![whole], at: version_at(1), applied: BTreeSet::new() };
        // A sequence belongs to one key.
        let mut opened: BTreeMap<u128, Version> = BTreeMap::new();
        for (what, client, sequence, key) in steps {
            match what {
                0 => {
                    let at = Bytes::copy_from_slice(&[key]);
                    let place = world.stores.iter().position(|store| store.span().contains(&at)).unwrap();
                    if let Some(birth) = reshape(&mut world.stores[place], split_at(&at)) {
                        world.stores.insert(place + 1, birth.store);
                    }
                }
                1 if world.stores.len() > 1 => {
                    let left = usize::from(key) % (world.stores.len() - 1);
                    let mut right = world.stores.remove(left + 1);
                    reshape(&mut right, Change::Seal { map_version: 1 });
                    reshape(&mut world.stores[left], Change::Absorb { state: right.export() });
                }
                _ => {
                    let opened = *opened.entry(client).or_insert(world.at);
                    world.write(client, opened, sequence, (sequence + client as u64) as u8 % 8);
                }
            }
            let mut next = Some(Bytes::new());
            for store in &world.stores {
                prop_assert_eq!(next.as_ref(), Some(&store.span().start));
                next.clone_from(&store.span().end);
                prop_assert!(keys(store).iter().all(|key| store.span().contains(key)));
            }
            prop_assert_eq!(next, None);
        }
    }
}

#[test]
fn a_cut_between_two_keys_is_the_right_ones() {
    let mut store = filled(Layout::Ordered, 4);
    let right = reshape(&mut store, split_at(&successor(b"k0001"))).unwrap().store;
    assert_eq!((store.rows(), right.rows()), (2, 2));
}

#[test]
fn a_store_that_has_missed_a_cut_is_confined_to_what_is_still_its_own() {
    for layout in [Layout::Ordered, Layout::Hashed] {
        let mut store = filled(layout, 40);
        let at = position(layout, &Bytes::from_static(b"k0015"));
        reshape(&mut store, Change::Seal { map_version: 4 });
        let middle = Span { start: at.clone(), end: None };
        let inside: BTreeSet<Vec<u8>> = keys(&store)
            .into_iter()
            .filter(|key| middle.contains(&position(layout, &Bytes::copy_from_slice(key))))
            .collect();
        assert!(!inside.is_empty() && inside.len() < 40);
        store.confine(1_000, middle.clone(), 7);
        assert_eq!(keys(&store).into_iter().collect::<BTreeSet<_>>(), inside, "{layout:?}");
        assert_eq!((store.span(), store.epoch(), store.sealed(), store.applied()), (&middle, 7, None, 1_000));
        let below = Span { start: Bytes::new(), end: Some(at) };
        store.confine(1_001, below, 8);
        assert_eq!(store.rows(), 0, "nothing of its own is below");
    }
}
