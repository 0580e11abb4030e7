use super::*;
use crate::placement::{
    Phase,
    plan::tests::{arrive, cluster, create, liveness},
    state::State,
};

const MIB: u64 = 1 << 20;

fn loads(of: &[(PartitionId, PartitionLoad)]) -> Loads {
    Loads(of.iter().copied().collect())
}

fn bytes(bytes: u64) -> PartitionLoad {
    PartitionLoad { bytes, ..PartitionLoad::default() }
}

fn reads(reads_per_s: u32) -> PartitionLoad {
    PartitionLoad { reads_per_s, ..PartitionLoad::default() }
}

/// Three nodes, and some partitions at rest.
fn world(nodes: usize) -> (State, Vec<PartitionId>) {
    let mut state = cluster(&["a", "b", "c"][..nodes]);
    create(&mut state, 3, 4);
    arrive(&mut state);
    let known = state.map().partitions().values().filter(|known| known.id != DRIVER && known.phase == Phase::Active);
    let ids = known.map(|known| known.id).collect();
    (state, ids)
}

fn partitions(wishes: &[Wish]) -> Vec<(PartitionId, Halve)> {
    wishes.iter().map(|wish| (wish.partition, wish.halve)).collect()
}

#[test]
fn what_holds_too_much_is_cut_at_once_the_largest_first_and_not_again_before_it_has_told() {
    let (state, ids) = world(1);
    let (mut sizing, one) = (Sizing::new(64 * MIB), liveness(1..=1, &[]));
    let told = loads(&[(ids[0], bytes(64 * MIB)), (ids[1], bytes(64 * MIB - 1)), (ids[2], bytes(200 * MIB))]);
    let wishes = sizing.plan(state.map(), &one, &told, 0);
    assert_eq!(partitions(&wishes), [(ids[2], Halve::Bytes), (ids[0], Halve::Bytes)]);
    assert_eq!(wishes[1].why, "it holds 67108864 bytes, and is cut from 67108864 on");
    assert_eq!(sizing.plan(state.map(), &one, &told, 1_000), [], "asked for already");
    sizing.done(ids[2], ids[3], 2_000);
    sizing.futile(ids[0], Halve::Bytes, 2_000);
    assert_eq!(sizing.plan(state.map(), &one, &told, 2_000 + AGAIN_MS - 1), []);
    assert_eq!(partitions(&sizing.plan(state.map(), &one, &told, 2_000 + AGAIN_MS)), [(ids[2], Halve::Bytes)]);
    let later = sizing.plan(state.map(), &one, &told, 2_000 + FUTILE_MS);
    assert_eq!(partitions(&later), [(ids[2], Halve::Bytes), (ids[0], Halve::Bytes)]);
}

#[test]
fn what_is_asked_too_much_for_a_while_is_cut_if_there_is_another_node() {
    let (state, ids) = world(3);
    let (mut sizing, three) = (Sizing::new(64 * MIB), liveness(1..=3, &[]));
    let told = loads(&[(ids[0], reads(30_000)), (ids[1], reads(4_000)), (ids[2], reads(11_000))]);
    assert_eq!(sizing.plan(state.map(), &three, &told, 0), [], "it may be for a moment");
    let calm = loads(&[(ids[0], reads(30_000)), (ids[2], reads(100))]);
    assert_eq!(sizing.plan(state.map(), &three, &calm, HOT_MS / 2), []);
    let wishes = sizing.plan(state.map(), &three, &told, HOT_MS);
    assert_eq!(partitions(&wishes), [(ids[0], Halve::Work)], "the other was calm in between");
    assert_eq!(
        wishes[0].why,
        "leading it is the work of 30010 requests a second; leaders' work is uneven, and it is cut above 5000"
    );
    sizing.done(ids[0], ids[3], HOT_MS);
    let later = sizing.plan(state.map(), &three, &told, HOT_MS + AGAIN_MS - 1);
    assert_eq!(partitions(&later), [(ids[2], Halve::Work)]);

    let (mut sizing, alone) = (Sizing::new(64 * MIB), liveness(1..=1, &[2, 3]));
    sizing.plan(state.map(), &alone, &told, 0);
    assert_eq!(sizing.plan(state.map(), &alone, &told, HOT_MS), [], "nobody could take a part of it");
}

#[test]
fn a_part_of_a_share_is_not_too_hot() {
    let (state, ids) = world(3);
    let (mut sizing, three) = (Sizing::new(64 * MIB), liveness(1..=3, &[]));
    // 100,000 for each of three nodes: a quarter of that may stay in one piece.
    let told: Vec<_> = ids.iter().map(|id| (*id, reads(24_000))).collect();
    let mut told = loads(&told);
    told.0.insert(ids[0], reads(228_000));
    sizing.plan(state.map(), &three, &told, 0);
    assert_eq!(partitions(&sizing.plan(state.map(), &three, &told, HOT_MS)), [(ids[0], Halve::Work)]);
}

#[test]
fn work_that_can_be_spread_as_it_is_cuts_nothing() {
    let even = |parts: &[u64], nodes| spread(parts.iter().copied(), nodes).1;
    assert_eq!(even(&[100], 3), 1);
    assert_eq!(even(&[50, 50], 3), 2, "two nodes would do everything");
    assert_eq!(even(&[50, 25, 25], 3), 1);
    assert_eq!(even(&[25; 4], 3), 1, "one would lead two of four");
    assert_eq!(even(&[25, 25, 25, 13, 12], 3), 0, "three eighths are 1.125 shares");
    assert_eq!(even(&[33, 33, 34], 3), 0);
    assert_eq!(even(&[100], 1), 0, "nobody could take a part of it");
    assert_eq!((even(&[], 3), even(&[], 0)), (0, 0));

    let (state, ids) = world(3);
    let (mut sizing, three) = (Sizing::new(64 * MIB), liveness(1..=3, &[]));
    let told = loads(&[(ids[0], reads(50_000)), (ids[1], reads(50_000)), (ids[2], reads(50_000))]);
    sizing.plan(state.map(), &three, &told, 0);
    assert_eq!(sizing.plan(state.map(), &three, &told, HOT_MS), [], "each node can lead one of them");
    let told =
        loads(&[(ids[0], reads(50_000)), (ids[1], reads(50_000)), (ids[2], reads(49_000)), (ids[3], reads(49_500))]);
    sizing.plan(state.map(), &three, &told, 2 * HOT_MS);
    let wishes = sizing.plan(state.map(), &three, &told, 3 * HOT_MS);
    assert_eq!(partitions(&wishes), [(ids[0], Halve::Work)], "one of four is enough for the one node with two");
}

#[test]
fn partitions_that_change_or_are_gone_and_the_drivers_own_are_left_alone() {
    let (mut state, ids) = world(3);
    let three = liveness(1..=3, &[]);
    let told = loads(&[(DRIVER, bytes(100 * MIB)), (PartitionId(999), bytes(100 * MIB)), (ids[0], bytes(100 * MIB))]);
    let known = state.map().partition(ids[0]).expect("just made").clone();
    let (at, bounds) = (Bytes::from_static(b"m"), known.epoch.bounds);
    let at =
        if known.span.contains(&at) && at > known.span.start { at } else { crate::key::successor(&known.span.start) };
    state.apply(crate::placement::Command::Divide { partition: ids[0], bounds, at }).expect("it is at rest");
    assert_eq!(Sizing::new(64 * MIB).plan(state.map(), &three, &told, 0), []);
}

fn positions(keys: impl IntoIterator<Item = u32>) -> Vec<Bytes> {
    keys.into_iter().map(|key| Bytes::copy_from_slice(&key.to_be_bytes())).collect()
}

/// Numbers that look random, the same every time.
fn mixed(i: u32) -> u32 {
    i.wrapping_mul(2_654_435_761) >> 16
}

#[test]
fn even_work_is_cut_in_its_middle() {
    let samples = positions((0..128).map(|i| mixed(i) % 1_000));
    let at = halve_work(&Span::all(), &samples).expect("there is a middle");
    let below = samples.iter().filter(|sample| **sample < at).count();
    assert!((44..=84).contains(&below), "{below} of 128");
    let right = Span::new(samples.iter().max().expect("some").clone(), None);
    assert_eq!(halve_work(&right, &samples), Err(Futile::NoPoint), "what lies outside is not cut at");
}

#[test]
fn work_that_no_cut_halves_is_told_apart() {
    assert_eq!(halve_work(&Span::all(), &positions(0..SAMPLES_MIN as u32 - 1)), Err(Futile::Unknown));
    let single = positions((0..128).map(|i| if i % 8 == 0 { mixed(i) } else { 70_000 }));
    assert_eq!(halve_work(&Span::all(), &single), Err(Futile::SingleKey));
    assert_eq!(halve_work(&Span::all(), &positions([7; 128])), Err(Futile::SingleKey));
    assert_eq!(halve_work(&Span::all(), &positions(0..128)), Err(Futile::NoPoint), "it goes up and up");
}
