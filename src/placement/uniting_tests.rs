use super::*;
use crate::{
    key::integer_key,
    placement::{
        Command, Reply,
        plan::tests::{arrive, cluster, create},
        state::State,
    },
};

const MIB: u64 = 1 << 20;
const HOUR_MS: u64 = MERGE_AFTER_MS_DEFAULT;

/// A keyspace whose one partition was cut twice, and one of three that are as created.
fn world() -> (State, Vec<PartitionId>) {
    let mut state = cluster(&["a", "b", "c"]);
    let keyspace = create(&mut state, 3, 1);
    create(&mut state, 3, 3);
    arrive(&mut state);
    for at in [1 << 18, 3 << 18].map(integer_key) {
        let partition = state.map().locate(keyspace, &at).expect("a map has no gaps").clone();
        let (id, bounds) = (partition.id, partition.epoch.bounds);
        let divided = state.apply(Command::Divide { partition: id, bounds, at }).expect("at rest");
        let Reply::Dividing { child } = divided else { panic!("{divided:?}") };
        state.apply(Command::Divided { partition: id, child }).expect("asked for");
    }
    let ids = state.map().partitions_of(keyspace).map(|partition| partition.id).collect();
    (state, ids)
}

fn all_idle(state: &State) -> Loads {
    let load = PartitionLoad { bytes: MIB, reads_per_s: 1, ..PartitionLoad::default() };
    Loads(state.map().partitions().keys().map(|id| (*id, load)).collect())
}

fn pairs(unions: &[Union]) -> Vec<[PartitionId; 2]> {
    unions.iter().map(|union| [union.left, union.right]).collect()
}

#[test]
fn small_neighbours_that_came_of_cuts_are_merged_after_long_and_one_pair_at_a_time() {
    let (state, ids) = world();
    assert_eq!(ids.len(), 3);
    let (mut uniting, loads) = (Uniting::new(64 * MIB, HOUR_MS), all_idle(&state));
    assert_eq!(uniting.plan(state.map(), &loads, 7), []);
    assert_eq!(uniting.plan(state.map(), &loads, 7 + HOUR_MS - 1), []);
    let unions = uniting.plan(state.map(), &loads, 7 + HOUR_MS);
    assert_eq!(pairs(&unions), [[ids[0], ids[1]]], "the third waits, and what is as created stays");
    assert_eq!(unions[0].why, "they hold 2097152 bytes together, and were asked little for 3600 s");
}

#[test]
fn what_works_or_is_large_or_not_told_of_stays() {
    let (state, ids) = world();
    let hold = |loads: &dyn Fn(u64) -> Loads| {
        let mut uniting = Uniting::new(64 * MIB, HOUR_MS);
        (0..=4).flat_map(|n| uniting.plan(state.map(), &loads(n), n * HOUR_MS / 2)).collect::<Vec<_>>()
    };
    let with = |load: Option<PartitionLoad>| {
        let mut loads = all_idle(&state);
        loads.0.remove(&ids[1]);
        loads.0.extend(load.map(|load| (ids[1], load)));
        loads
    };
    let idle = PartitionLoad { bytes: MIB, ..PartitionLoad::default() };
    assert_eq!(pairs(&hold(&|_| with(Some(idle))))[0], [ids[0], ids[1]]);
    assert_eq!(hold(&|_| with(None)), []);
    assert_eq!(hold(&|_| with(Some(PartitionLoad { reads_per_s: 6, writes_per_s: 5, ..idle }))), []);
    assert_eq!(hold(&|_| with(Some(PartitionLoad { bytes: 16 * MIB, ..idle }))), [], "cut soon after");
    let now_and_then = |n: u64| with(Some(PartitionLoad { reads_per_s: if n % 2 == 1 { 90 } else { 0 }, ..idle }));
    assert_eq!(hold(&now_and_then), [], "not idle for so long");
}
