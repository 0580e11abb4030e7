use super::*;

#[test]
fn names_are_as_documented() {
    for good in ["a", "default", "a.b_c-9", &"x".repeat(NAME_BYTES_MAX)] {
        assert_eq!(check_name(good), Ok(()), "{good}");
    }
    for bad in ["", "_driver", "A", "9a", ".a", "a b", "a/b", "é", "aé", &"x".repeat(NAME_BYTES_MAX + 1)] {
        assert!(matches!(check_name(bad), Err(Refusal::NameInvalid(_))), "{bad}");
    }
}

fn process(uuid: &str, address: &str, zone: &str, weight_milli: u32) -> RegisterNode {
    RegisterNode {
        cluster_id: String::new(),
        uuid: uuid.to_owned(),
        address: address.to_owned(),
        zone: zone.to_owned(),
        weight_milli,
        previous: None,
    }
}

const UUID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

#[test]
fn nodes_are_checked_and_made_canonical() {
    let upper = UUID.to_uppercase();
    let made = node(NodeId(7), &process(&upper, "[::1]:7700", "a", 0)).expect("all fields are right");
    assert_eq!((made.uuid.as_str(), made.weight_milli), (UUID, 1_000));
    let wrong = [
        (process("nonsense", "h:1", "", 0), Field::Uuid),
        (process(UUID, "", "", 0), Field::Address),
        (process(UUID, "host", "", 0), Field::Address),
        (process(UUID, ":7700", "", 0), Field::Address),
        (process(UUID, "h:0", "", 0), Field::Address),
        (process(UUID, "h:70000", "", 0), Field::Address),
        (process(UUID, "h h:7700", "", 0), Field::Address),
        (process(UUID, "h:1", "a b", 0), Field::Zone),
        (process(UUID, "h:1", &"z".repeat(65), 0), Field::Zone),
        (process(UUID, "h:1", "", 9), Field::Weight),
        (process(UUID, "h:1", "", 10_001), Field::Weight),
    ];
    for (process, at) in wrong {
        match node(NodeId(1), &process) {
            Err(Refusal::FieldInvalid { field, .. }) => assert_eq!(field, at, "{process:?}"),
            other => panic!("{process:?}: {other:?}"),
        }
    }
}

#[test]
fn weights_are_thousandths() {
    assert_eq!(weight_milli(0.0), Ok(1_000));
    assert_eq!(weight_milli(2.5), Ok(2_500));
    assert_eq!(weight_milli(0.01), Ok(10));
    for bad in [-1.0, 0.001, 11.0, f64::NAN, f64::INFINITY] {
        assert!(weight_milli(bad).is_err(), "{bad}");
    }
}

#[test]
fn replicas_have_a_default_and_bounds() {
    assert_eq!((replicas(0, 3), replicas(1, 3), replicas(9, 3)), (Ok(3), Ok(1), Ok(9)));
    assert!(replicas(10, 3).is_err());
}

fn starts(kind: KeyKind, layout: Layout, cuts: &Cuts) -> Vec<Bytes> {
    let spans = spans(kind, layout, cuts).expect("possible");
    for pair in spans.windows(2) {
        assert_eq!(pair[0].end.as_ref(), Some(&pair[1].start));
        assert!(!pair[0].is_empty());
    }
    assert_eq!(spans.last().expect("one at least").end, None);
    spans.into_iter().map(|span| span.start).collect()
}

#[test]
fn even_cuts_have_equal_widths() {
    let integer = |max, count| starts(KeyKind::Integer { max }, Layout::Ordered, &Cuts::Even(count));
    assert_eq!(integer(10, 4), [Bytes::new(), integer_key(2), integer_key(5), integer_key(7)]);
    assert_eq!(integer(3, 3), [Bytes::new(), integer_key(1), integer_key(2)]);
    assert_eq!(integer(u64::MAX, 2)[1], integer_key(u64::MAX / 2));
    assert_eq!(integer(5, 0), [Bytes::new()]);
    let hashed = starts(KeyKind::Bytes, Layout::Hashed, &Cuts::Even(4));
    assert_eq!(hashed[1..], [1u64 << 62, 2 << 62, 3 << 62].map(position_of_token));
    assert_eq!(starts(KeyKind::Bytes, Layout::Hashed, &Cuts::Even(1_024)).len(), 1_024);
}

#[test]
fn impossible_cuts_name_the_field() {
    let (bytes, integer) = (KeyKind::Bytes, KeyKind::Integer { max: 3 });
    let at = |keys: &[&'static str]| Cuts::At(keys.iter().map(|key| Bytes::from_static(key.as_bytes())).collect());
    let wrong = [
        (bytes, Layout::Ordered, Cuts::Even(2), Field::Partitions),
        (integer, Layout::Ordered, Cuts::Even(4), Field::Partitions),
        (bytes, Layout::Hashed, Cuts::Even(1_025), Field::Partitions),
        (KeyKind::Integer { max: 0 }, Layout::Ordered, Cuts::Even(1), Field::Max),
        (bytes, Layout::Hashed, at(&["a"]), Field::SplitAt),
        (integer, Layout::Ordered, at(&["a"]), Field::SplitAt),
        (bytes, Layout::Ordered, at(&["b", "a"]), Field::SplitAt),
        (bytes, Layout::Ordered, at(&["a", "a"]), Field::SplitAt),
        (bytes, Layout::Ordered, at(&["", "a"]), Field::SplitAt),
        (bytes, Layout::Ordered, Cuts::At(vec![vec![1; 1_025].into()]), Field::SplitAt),
        (bytes, Layout::Ordered, Cuts::At((0..1_024).map(integer_key).collect()), Field::SplitAt),
    ];
    for (kind, layout, cuts, at) in wrong {
        match spans(kind, layout, &cuts) {
            Err(Refusal::FieldInvalid { field, .. }) => assert_eq!(field, at, "{cuts:?}"),
            other => panic!("{cuts:?}: {other:?}"),
        }
    }
    assert_eq!(starts(bytes, Layout::Ordered, &at(&["a", "b"])).len(), 3);
    assert_eq!(starts(integer, Layout::Hashed, &at(&[])).len(), 1);
}
