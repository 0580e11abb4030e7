use super::super::hex;
use super::*;
use proptest::prelude::*;

const K: KeyspaceId = KeyspaceId(3);

fn partition(id: u64, start: &'static str, end: Option<&'static str>) -> Partition {
    let members = vec![Replica { id: ReplicaId(id * 10), node: NodeId(1) }];
    Partition {
        id: PartitionId(id),
        keyspace: K,
        span: Span::new(start.into(), end.map(Into::into)),
        epoch: Epoch { bounds: 1, members: 2 },
        target: members.clone(),
        initializer: members[0].id,
        members,
        phase: Phase::Active,
        leaving: Vec::new(),
        birth: Span::all(),
        cut: None,
        merge: None,
    }
}

/// A map of one node and one keyspace, cut at `d` and `m`.
fn map() -> Map {
    let mut map = Map::default();
    let fit = map.apply(MapDelta {
        cluster_id: "c".to_owned(),
        from_version: None,
        to_version: 4,
        nodes: vec![Node {
            id: NodeId(1),
            uuid: "u".to_owned(),
            address: "h:1".to_owned(),
            zone: "z".to_owned(),
            weight_milli: 1_000,
            ephemeral: false,
            standing: Standing::Active,
        }],
        keyspaces: vec![Keyspace {
            id: K,
            name: "users".to_owned(),
            kind: KeyKind::Bytes,
            layout: Layout::Ordered,
            replicas: 1,
        }],
        partitions: vec![partition(2, "d", Some("m")), partition(3, "m", None), partition(1, "", Some("d"))],
        ..MapDelta::default()
    });
    assert_eq!(fit, Fit::Applied);
    map
}

fn change(from: u64, to: u64) -> MapDelta {
    MapDelta { cluster_id: "c".to_owned(), from_version: Some(from), to_version: to, ..MapDelta::default() }
}

#[test]
fn locates_by_position() {
    let map = map();
    assert_eq!(map.check(), Ok(()));
    for (key, at) in [("", 1), ("c~", 1), ("d", 2), ("lzz", 2), ("m", 3), ("zzz", 3)] {
        assert_eq!(map.locate(K, key.as_bytes()).map(|p| p.id), Some(PartitionId(at)), "{key}");
    }
    assert_eq!(map.locate(KeyspaceId(4), b"a"), None);
    assert_eq!(map.keyspace_by_name("users").map(|k| k.id), Some(K));
    assert_eq!(map.keyspace_by_name("user"), None);
}

#[test]
fn overlapping_goes_in_order_from_both_ends() {
    let map = map();
    let ids = |start: &'static str, end: Option<&'static str>| -> Vec<u64> {
        map.overlapping(K, &Span::new(start.into(), end.map(Into::into))).map(|p| p.id.0).collect()
    };
    assert_eq!(ids("", None), [1, 2, 3]);
    assert_eq!(ids("a", Some("d")), [1]);
    assert_eq!(ids("d", Some("m")), [2]);
    assert_eq!(ids("d", Some("m\0")), [2, 3]);
    assert_eq!(ids("e", Some("e")), [0; 0]);
    assert_eq!(ids("x", None), [3]);
    let backwards: Vec<u64> = map.overlapping(K, &Span::all()).rev().map(|p| p.id.0).collect();
    assert_eq!(backwards, [3, 2, 1]);
    assert_eq!(map.overlapping(KeyspaceId(9), &Span::all()).count(), 0);
}

#[test]
fn a_hole_is_found_by_everyone() {
    let mut map = map();
    map.remove_partition(PartitionId(2));
    assert_eq!(map.locate(K, b"f"), None);
    let ids: Vec<u64> = map.overlapping(K, &Span::new("f".into(), Some("x".into()))).map(|p| p.id.0).collect();
    assert_eq!(ids, [3]);
    assert!(map.check().is_err());
}

#[test]
fn unsound_maps_are_told() {
    type Break = fn(&mut Partition);
    let breaks: [(&str, Break); 7] = [
        ("overlap", |p| p.span = Span::new("c".into(), Some("m".into()))),
        ("gap at the end", |p| p.span = Span::new("d".into(), Some("l".into()))),
        ("unknown keyspace", |p| p.keyspace = KeyspaceId(9)),
        ("no members", |p| p.members.clear()),
        ("two on a node", |p| p.target.push(Replica { id: ReplicaId(99), node: NodeId(1) })),
        ("unknown node", |p| p.target[0].node = NodeId(9)),
        ("replica id of another partition", |p| p.target[0].id = ReplicaId(10)),
    ];
    for (what, break_it) in breaks {
        let mut map = map();
        let mut partition = map.partitions[&PartitionId(2)].clone();
        break_it(&mut partition);
        map.put_partitions(vec![partition]);
        assert!(map.check().is_err(), "{what}");
        assert!(Map::decode(&map.encode()).is_err(), "{what}");
    }
}

#[test]
fn deltas_fit_or_say_why_not() {
    let mut map = map();
    assert_eq!(map.apply(change(4, 4)), Fit::Old);
    assert_eq!(map.apply(change(1, 3)), Fit::Old);
    assert_eq!(map.apply(change(5, 6)), Fit::Gap);
    assert_eq!(map.apply(MapDelta { cluster_id: "d".to_owned(), ..change(4, 5) }), Fit::OtherCluster);
    assert_eq!(map.apply(MapDelta { from_version: None, ..change(0, 4) }), Fit::Old);
    assert_eq!(map, self::map(), "what does not fit changes nothing");
    assert_eq!(map.apply(change(2, 5)), Fit::Applied);
    assert_eq!(map.version(), 5);
}

#[test]
fn partitions_can_trade_their_bounds_in_one_delta() {
    let mut map = map();
    // A split of the first, a merge of the others into the one on the right.
    let delta = MapDelta {
        partitions: vec![partition(1, "", Some("b")), partition(4, "b", Some("d")), partition(3, "d", None)],
        partitions_removed: vec![PartitionId(2)],
        ..change(4, 5)
    };
    assert_eq!(map.apply(delta), Fit::Applied);
    assert_eq!(map.check(), Ok(()));
    assert_eq!(map.partitions_of(K).map(|p| p.id.0).collect::<Vec<_>>(), [1, 4, 3]);
    assert_eq!(map.locate(K, b"d").map(|p| p.id.0), Some(3));
}

#[test]
fn renamed_and_removed_keyspaces_leave_no_name_behind() {
    let mut map = map();
    let renamed = Keyspace { name: "people".to_owned(), ..map.keyspaces[&K].clone() };
    map.put_keyspace(renamed);
    assert!(map.keyspace_by_name("users").is_none() && map.keyspace_by_name("people").is_some());
    map.remove_keyspace(K);
    assert!(map.keyspace_by_name("people").is_none());
}

#[test]
fn a_map_survives_its_bytes() {
    let map = map();
    assert_eq!(Map::decode(&map.encode()), Ok(map.clone()));
    assert_eq!(Map::decode(&Map::default().encode()), Ok(Map::default()));
    assert!(Map::decode(&change(4, 5).encode()).is_err(), "a change is not a map");
    let bytes = map.encode();
    for cut in 0..bytes.len() {
        assert!(Map::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    assert!(Map::decode(&[&bytes[..], &[0]].concat()).is_err(), "bytes too many");
    assert!(Map::decode(&[&[9], &bytes[1..]].concat()).is_err(), "another format");
}

#[test]
fn delta_bytes_are_golden() {
    let delta = MapDelta { keyspaces_removed: vec![K], partitions_removed: vec![PartitionId(300)], ..change(4, 5) };
    let full = map().full();
    assert_eq!(hex(&delta.encode()), "030163010405000000010301ac02");
    assert_eq!(
        hex(&full.encode()),
        [
            "03016300040101017503683a31017ae80700000103057573657273000001030103000101640102010a01",
            "010a01010a00000000000203016401016d0102011401011401011400000000000303016d000102011e01",
            "011e01011e00000000000000",
        ]
        .concat()
    );
}

proptest! {
    #[test]
    fn locate_and_overlapping_agree_with_a_plain_search(
        cuts in proptest::collection::btree_set(proptest::collection::vec(any::<u8>(), 1..3), 0..12),
        a in proptest::collection::vec(any::<u8>(), 0..3),
        b in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..3)),
    ) {
        let mut map = map();
        (1..=3).for_each(|id| map.remove_partition(PartitionId(id)));
        let starts: Vec<Bytes> = [Bytes::new()].into_iter().chain(cuts.into_iter().map(Bytes::from)).collect();
        let ends = starts.iter().skip(1).cloned().map(Some).chain([None]);
        let put = (1..).zip(starts.iter().zip(ends)).map(|(id, (start, end))| Partition {
            span: Span::new(start.clone(), end),
            ..partition(id, "", None)
        });
        map.put_partitions(put.collect());
        prop_assert_eq!(map.check(), Ok(()));
        let (position, span) = (Bytes::from(a.clone()), Span::new(a.into(), b.map(Bytes::from)));
        let holder = map.partitions.values().find(|p| p.span.contains(&position));
        prop_assert_eq!(map.locate(K, &position), holder);
        let found: Vec<PartitionId> = map.overlapping(K, &span).map(|p| p.id).collect();
        let plain: Vec<PartitionId> = map.partitions.values().filter(|p| p.span.overlaps(&span)).map(|p| p.id).collect();
        prop_assert_eq!(found, plain);
    }
}
