//! Pages, and that they stitch together by what they covered.

use super::*;
use crate::key::{Tokens, token};

fn abc() -> Log {
    let mut log = Log::new(Layout::Ordered, span("a", Some("m")));
    for key in ["a", "b", "c", "d"] {
        log.single(put(key, "12345"));
    }
    log
}

fn keys(seen: &Seen) -> Vec<&str> {
    seen.rows.iter().map(|(key, _)| std::str::from_utf8(key).unwrap()).collect()
}

#[test]
fn a_page_ends_right_after_its_last_row() {
    let log = abc();
    let seen = look(&log.store, &ScanSpec { rows_max: 2, ..everything(span("a", None)) }).unwrap();
    assert_eq!(keys(&seen), ["a", "b"]);
    assert!(seen.page.more);
    assert_eq!(seen.page.covered, Span::new("a".into(), Some("b\0".into())));
    let seen = look(&log.store, &ScanSpec { rows_max: 2, reverse: true, ..everything(span("a", Some("d"))) }).unwrap();
    assert_eq!(keys(&seen), ["c", "b"]);
    assert!(seen.page.more);
    assert_eq!(seen.page.covered, span("b", Some("d")));
}

#[test]
fn the_last_page_covers_up_to_the_partitions_end_and_says_so() {
    let log = abc();
    let seen = look(&log.store, &ScanSpec { rows_max: 4, ..everything(span("a", None)) }).unwrap();
    assert_eq!((seen.page.more, seen.page.count), (false, 4));
    assert_eq!(seen.page.covered, span("a", Some("m")));
    let seen = look(&log.store, &ScanSpec { reverse: true, ..everything(span("", Some("m"))) }).unwrap();
    assert_eq!(keys(&seen), ["d", "c", "b", "a"]);
    assert_eq!(seen.page.covered, span("a", Some("m")));
}

#[test]
fn bytes_cut_a_page_but_never_the_first_row() {
    let log = abc();
    let keys_at = |bytes_max, keys_only| {
        look(&log.store, &ScanSpec { bytes_max, keys_only, ..everything(span("a", None)) }).unwrap().rows.len()
    };
    assert_eq!(keys_at(12, false), 2);
    assert_eq!(keys_at(11, false), 1);
    assert_eq!(keys_at(0, false), 1);
    assert_eq!(keys_at(3, true), 3);
}

#[test]
fn a_leading_edge_that_lies_elsewhere_is_refused() {
    let log = abc();
    let scan = |span, reverse| look(&log.store, &ScanSpec { reverse, ..everything(span) });
    assert!(scan(span("", None), false).is_err());
    assert!(scan(span("m", None), false).is_err());
    assert!(scan(span("b", None), true).is_err());
    assert!(scan(span("b", Some("n")), true).is_err());
    assert!(scan(span("", Some("a")), true).is_err());
    assert!(scan(span("", Some("a\0")), true).is_ok());
    assert!(scan(span("l", Some("z")), false).is_ok());
    let empty = scan(span("z", Some("z")), false).unwrap();
    assert!(empty.rows.is_empty() && !empty.page.more && empty.page.covered == span("z", Some("z")));
    let inverted = scan(Span { start: "c".into(), end: Some("b".into()) }, true).unwrap();
    assert!(inverted.rows.is_empty());
}

#[test]
fn counting_counts_and_moves_nothing() {
    let log = abc();
    let count = |span| look(&log.store, &ScanSpec { count_only: true, ..everything(span) }).unwrap();
    let whole = count(span("a", None));
    assert_eq!((whole.page.count, whole.rows.len(), whole.page.more), (4, 0, false));
    assert_eq!(whole.page.covered, span("a", Some("m")));
    assert_eq!(count(span("b", Some("d"))).page.count, 2);
    let cut = look(&log.store, &ScanSpec { count_only: true, rows_max: 1, ..everything(span("b", None)) }).unwrap();
    assert_eq!((cut.page.count, cut.page.more, cut.page.covered), (1, true, Span::new("b".into(), Some("b\0".into()))));
}

#[test]
fn a_page_that_finds_nothing_still_gets_on() {
    let mut log = Log::new(Layout::Hashed, Span::all());
    let write = |n: u64| Write { session: None, op: Op::Single(put(n.to_be_bytes().to_vec(), "")) };
    log.command((0..SCAN_LOOKED_MAX + 10).map(write).collect());
    let only = Tokens { first: 5, last: 5 };
    let mut spec = ScanSpec { tokens: Some(only), ..everything(Span::all()) };
    let seen = look(&log.store, &spec).unwrap();
    assert!(seen.rows.is_empty() && seen.page.more);
    spec.span.start = seen.page.covered.end.unwrap();
    assert!(!look(&log.store, &spec).unwrap().page.more);
}

/// Partitions that tile the order, cut at these positions.
fn tiles(layout: Layout, mut cuts: Vec<Bytes>) -> Vec<Log> {
    cuts.retain(|cut| !cut.is_empty());
    cuts.sort();
    cuts.dedup();
    let starts = std::iter::once(Bytes::new()).chain(cuts.clone());
    let ends = cuts.into_iter().map(Some).chain([None]);
    starts.zip(ends).map(|(start, end)| Log::new(layout, Span::new(start, end))).collect()
}

fn fill(tiles: &mut [Log], keys: &[Bytes]) -> std::collections::BTreeSet<Bytes> {
    for key in keys {
        let owners = tiles.iter_mut().filter_map(|log| log.op(Op::Single(put(key.clone(), key.clone()))).ok());
        assert_eq!(owners.count(), 1, "{key:?} has one owner");
    }
    keys.iter().cloned().collect()
}

/// Reads `span` page by page, each beginning where the one before ended.
fn stitch(mut next: impl FnMut(&Span) -> Seen, span: &Span, reverse: bool) -> Vec<Bytes> {
    let (mut found, mut left) = (Vec::new(), span.clone());
    while !left.is_empty() {
        let seen = next(&left);
        assert!(left.contains_span(&seen.page.covered) && !seen.page.covered.is_empty(), "{left:?} {seen:?}");
        assert!(seen.rows.iter().all(|(key, row)| seen.page.covered.contains(key) && row.value == *key));
        found.extend(seen.rows.into_iter().map(|(key, _)| key));
        if reverse {
            assert_eq!(seen.page.covered.end, left.end);
            left = Span::new(left.start, Some(seen.page.covered.start));
        } else {
            assert_eq!(seen.page.covered.start, left.start);
            match seen.page.covered.end {
                Some(end) => left = Span::new(end, left.end),
                None => break,
            }
        }
    }
    found
}

fn any_keys() -> impl Strategy<Value = Vec<Bytes>> {
    prop::collection::vec(prop::collection::vec(prop::sample::select(vec![0u8, 1, b'a', 0xFF]), 0..4), 0..60)
        .prop_map(|keys| keys.into_iter().map(Bytes::from).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn ordered_pages_stitch_to_the_range(
        keys in any_keys(),
        cuts in prop::collection::vec(any_key(), 0..4),
        span in any_span(),
        reverse in any::<bool>(),
        rows_max in 0..5u64,
        bytes_max in 0..20u64,
    ) {
        let mut tiles = tiles(Layout::Ordered, cuts);
        let model = fill(&mut tiles, &keys);
        let page = |left: &Span| {
            let spec = ScanSpec { reverse, rows_max, bytes_max, ..everything(left.clone()) };
            let mut pages = tiles.iter().filter_map(|log| look(&log.store, &spec).ok());
            let seen = pages.next().expect("a partition owns the leading edge");
            assert!(pages.next().is_none(), "only one does");
            seen
        };
        let found = stitch(page, &span, reverse);
        let mut expected: Vec<_> = model.into_iter().filter(|key| span.contains(key)).collect();
        if reverse {
            expected.reverse();
        }
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn hashed_pages_of_all_partitions_make_the_range(
        keys in any_keys(),
        cuts in prop::collection::vec(any::<u64>(), 0..4),
        span in any_span(),
        tokens in any_tokens(),
        reverse in any::<bool>(),
        rows_max in 0..5u64,
        bytes_max in 0..20u64,
    ) {
        let mut tiles = tiles(Layout::Hashed, cuts.into_iter().map(position_of_token).collect());
        let model = fill(&mut tiles, &keys);
        let asked = tokens.unwrap_or(Tokens::ALL);
        let (mut found, mut spoken_for) = (Vec::new(), 0u128);
        for log in &tiles {
            let owned = Tokens::of_span(log.store.span()).unwrap();
            let spec = ScanSpec { reverse, rows_max, bytes_max, tokens, ..everything(span.clone()) };
            let Some(both) = owned.intersect(&asked) else {
                prop_assert!(look(&log.store, &spec).is_err());
                continue;
            };
            spoken_for += u128::from(both.last - both.first) + 1;
            let page = |left: &Span| {
                let seen = look(&log.store, &ScanSpec { span: left.clone(), ..spec.clone() }).unwrap();
                assert_eq!(seen.page.covered_tokens, Some(both));
                seen
            };
            let part = stitch(page, &span, reverse);
            let in_order = if reverse { part.iter().rev().is_sorted() } else { part.is_sorted() };
            prop_assert!(in_order);
            found.extend(part);
        }
        prop_assert_eq!(spoken_for, u128::from(asked.last - asked.first) + 1);
        found.sort();
        let expected: Vec<_> =
            model.into_iter().filter(|key| span.contains(key) && asked.contains(token(key))).collect();
        prop_assert_eq!(found, expected);
    }
}
