//! Rows in key order, against a plain map.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::RangeBounds;

type Model = BTreeMap<Vec<u8>, u64>;

fn row(key: &[u8], version: u64) -> Packed {
    Packed::new(key, &version.to_be_bytes(), version)
}

fn put(rows: &mut Rows, key: &[u8], version: u64) -> bool {
    let probe = Probe::new(key);
    if let Some(found) = rows.get_mut(probe) {
        found.set(&version.to_be_bytes(), version);
        return true;
    }
    rows.insert(probe, row(key, version));
    false
}

fn content<'a>(rows: impl Iterator<Item = &'a Packed>) -> Vec<(Vec<u8>, u64)> {
    rows.map(|row| (row.key().to_vec(), row.row().version)).collect()
}

fn check(rows: &Rows, model: &Model) {
    let everything = content(rows.range((Unbounded, Unbounded)));
    assert_eq!(everything, model.clone().into_iter().collect::<Vec<_>>());
    assert_eq!(rows.len(), model.len());
    let firsts: Vec<_> = rows.leaves.keys().collect();
    for (i, (first, leaf)) in rows.leaves.iter().enumerate() {
        assert!(leaf.rows.len() <= LEAF_ROWS && leaf.prints.len() == leaf.rows.len());
        assert!(!leaf.rows.is_empty() || first.is_empty(), "an empty leaf at {first:?}");
        for (row, print) in leaf.rows.iter().zip(&leaf.prints) {
            assert_eq!(*print, Probe::new(row.key()).print());
            assert!(**first <= *row.key() && firsts.get(i + 1).is_none_or(|next| *row.key() < ***next));
        }
    }
}

fn any_key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0..4u8, 0..5)
}

fn any_bound() -> impl Strategy<Value = Bound<Vec<u8>>> {
    prop_oneof![any_key().prop_map(Included), any_key().prop_map(Excluded), Just(Unbounded)]
}

#[derive(Clone, Debug)]
enum Step {
    Put(Vec<u8>),
    Remove(Vec<u8>),
    Range(Bound<Vec<u8>>, Bound<Vec<u8>>),
    SplitOff(Vec<u8>),
    Rebuild,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        60 => any_key().prop_map(Step::Put),
        40 => any_key().prop_map(Step::Remove),
        10 => (any_bound(), any_bound()).prop_map(|(start, end)| Step::Range(start, end)),
        1 => any_key().prop_map(Step::SplitOff),
        1 => Just(Step::Rebuild),
    ]
}

/// Whether the standard map takes these bounds.
fn in_order(start: &Bound<Vec<u8>>, end: &Bound<Vec<u8>>) -> bool {
    match (start, end) {
        (Excluded(start), Excluded(end)) => start < end,
        (Included(start) | Excluded(start), Included(end) | Excluded(end)) => start <= end,
        _ => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn they_do_what_a_plain_map_does(steps in prop::collection::vec(any_step(), 1..400)) {
        let (mut rows, mut model) = (Rows::default(), Model::new());
        for (version, step) in (1..).zip(steps) {
            match step {
                Step::Put(key) => {
                    prop_assert_eq!(put(&mut rows, &key, version), model.insert(key, version).is_some());
                }
                Step::Remove(key) => {
                    let probe = Probe::new(&key);
                    prop_assert_eq!(rows.get(probe).map(|row| row.row().version), model.get(&key).copied());
                    let removed = rows.remove(probe).map(|row| row.row().version);
                    prop_assert_eq!(removed, model.remove(&key));
                }
                Step::Range(start, end) if in_order(&start, &end) => {
                    let bounds = (start.as_ref().map(Vec::as_slice), end.as_ref().map(Vec::as_slice));
                    let mut expected: Vec<_> =
                        model.iter().filter(|(key, _)| RangeBounds::<[u8]>::contains(&bounds, key.as_slice())).collect();
                    let expected_owned = |rows: &[(&Vec<u8>, &u64)]| -> Vec<(Vec<u8>, u64)> {
                        rows.iter().map(|(key, version)| ((*key).clone(), **version)).collect()
                    };
                    prop_assert_eq!(content(rows.range(bounds)), expected_owned(&expected));
                    expected.reverse();
                    prop_assert_eq!(content(rows.range(bounds).rev()), expected_owned(&expected));
                }
                Step::Range(..) => {}
                Step::SplitOff(at) => {
                    let right: Vec<_> = model.split_off(&at).into_iter().collect();
                    prop_assert_eq!(content(rows.split_off(&at).iter()), right);
                }
                Step::Rebuild => rows = Rows::from_ascending(rows.into_rows().collect()),
            }
            check(&rows, &model);
        }
    }
}

#[test]
fn rows_in_order_fill_their_leaves() {
    let mut rows = Rows::default();
    for key in 0..100 * LEAF_ROWS as u64 {
        put(&mut rows, &key.to_be_bytes(), key);
    }
    assert_eq!(rows.leaves.len(), 100);
}

#[test]
fn leaves_that_lose_their_rows_join() {
    let mut rows = Rows::default();
    let count = 100 * LEAF_ROWS as u64;
    for key in 0..count {
        put(&mut rows, &key.to_be_bytes(), key);
    }
    for key in (0..count).filter(|key| key % LEAF_ROWS as u64 != 0) {
        assert!(rows.remove(Probe::new(&key.to_be_bytes())).is_some());
    }
    assert_eq!(rows.len(), 100);
    assert!(rows.leaves.len() <= 100 * 4 / LEAF_ROWS + 1, "{} leaves of one row each", rows.leaves.len());
}

#[test]
fn a_value_of_the_same_length_is_written_over_the_one_before() {
    let mut row = Packed::new(b"key", b"one", 1);
    for (value, version) in [("two", 2), ("longer", 3), ("", 4), ("", 5)] {
        row.set(value.as_bytes(), version);
        assert_eq!((row.key(), row.row().value, row.row().version), (&b"key"[..], value.as_bytes(), version));
    }
}
