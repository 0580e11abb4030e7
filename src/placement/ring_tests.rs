use super::super::map::Standing;
use super::*;
use proptest::prelude::*;

fn node(id: u64, zone: &str, weight_milli: u32) -> Node {
    Node {
        id: NodeId(id),
        uuid: format!("00000000-0000-4000-8000-{id:012x}"),
        address: format!("h{id}:1"),
        zone: zone.to_owned(),
        weight_milli,
        ephemeral: false,
        standing: Standing::Active,
    }
}

fn nodes(ids: impl IntoIterator<Item = u64>, zones: u64) -> Vec<Node> {
    ids.into_iter().map(|id| node(id, &format!("z{}", id % zones), 1_000)).collect()
}

/// The ring's whole answer for `count` partitions that want `replicas`.
fn place_all(nodes: &[Node], count: u64, replicas: u32) -> Vec<Vec<NodeId>> {
    let ring = Ring::new(nodes, &BTreeSet::new());
    let mut placer = Placer::new(ring, &BTreeMap::from([(replicas, count)]));
    (1..=count).map(|id| placer.place(KeyspaceId(1), PartitionId(id), replicas)).collect()
}

fn loads(placed: &[Vec<NodeId>]) -> BTreeMap<NodeId, u64> {
    let mut loads = BTreeMap::new();
    for node in placed.iter().flatten() {
        *loads.entry(*node).or_default() += 1;
    }
    loads
}

/// Replicas of `after` on a node that does not have one in `before`.
fn moved(before: &[Vec<NodeId>], after: &[Vec<NodeId>]) -> u64 {
    let new = |(before, after): (&Vec<NodeId>, &Vec<NodeId>)| after.iter().filter(|n| !before.contains(n)).count();
    before.iter().zip(after).map(new).sum::<usize>() as u64
}

fn max_over_mean(loads: &BTreeMap<NodeId, u64>, nodes: usize) -> f64 {
    let sum: u64 = loads.values().sum();
    *loads.values().max().expect("something is placed") as f64 * nodes as f64 / sum as f64
}

#[test]
fn hashes_are_golden() {
    assert_eq!(place_of(KeyspaceId(1), PartitionId(2)), 10121370589403482978);
    assert_eq!(token_of("67e55044-10b1-426f-9247-bb680e5fe0c8", 3), 17053444986102419333);
    let placed = place_all(&nodes(1..=7, 3), 4, 3);
    let ids: Vec<Vec<u64>> = placed.iter().map(|nodes| nodes.iter().map(|node| node.0).collect()).collect();
    assert_eq!(ids, [[2, 7, 3], [6, 2, 7], [4, 6, 2], [3, 1, 5]]);
}

fn check_movement(before: &[Vec<NodeId>], after: &[Vec<NodeId>], least: u64) {
    let moved = moved(before, after);
    assert!(moved >= least / 2 && moved * 2 <= least * 3, "moved {moved}, the least possible is {least}");
}

#[test]
fn joins_and_leaves_move_little_more_than_their_share() {
    for (n, count, zones) in [(100, 5_000, 1), (100, 5_000, 3), (200, 10_000, 200)] {
        let before = place_all(&nodes(1..=n, zones), count, 3);
        let joined = place_all(&nodes(1..=n + 1, zones), count, 3);
        check_movement(&before, &joined, count * 3 / (n + 1));
        check_movement(&joined, &before, loads(&joined)[&NodeId(n + 1)]);
    }
}

#[test]
fn a_thousand_nodes_and_a_hundred_thousand_partitions() {
    let before = place_all(&nodes(1..=1_000, 5), 100_000, 3);
    let joined = place_all(&nodes(1..=1_001, 5), 100_000, 3);
    check_movement(&before, &joined, 100_000 * 3 / 1_001);
    assert!(max_over_mean(&loads(&joined), 1_001) < 1.25);
    let leaders: Vec<Vec<NodeId>> = joined.iter().map(|nodes| nodes[..1].to_vec()).collect();
    assert!(max_over_mean(&loads(&leaders), 1_001) < 1.25);
}

#[test]
fn new_partitions_move_no_old_ones_far() {
    let nodes = nodes(1..=100, 3);
    let (before, after) = (place_all(&nodes, 5_000, 3), place_all(&nodes, 5_100, 3));
    assert!(moved(&before, &after) <= 100 * 3 / 2, "moved {}", moved(&before, &after));
}

#[test]
fn load_follows_weight() {
    let mut heavy = nodes(1..=50, 1);
    heavy[0].weight_milli = 4_000;
    heavy[1].weight_milli = 250;
    let loads = loads(&place_all(&heavy, 5_000, 3));
    let mean = 15_000.0 / 52.25;
    assert!((3.0..4.9).contains(&(loads[&NodeId(1)] as f64 / mean)), "{loads:?}");
    assert!((0.1..0.4).contains(&(loads[&NodeId(2)] as f64 / mean)), "{loads:?}");
}

#[test]
fn small_zones_hold_a_replica_of_everything() {
    // z0 has 8 nodes, z1 and z2 one each: load has to yield to the spread over zones.
    let nodes: Vec<Node> = (1..=10).map(|id| node(id, ["z1", "z2", "z0"][(id as usize - 1).min(2)], 1_000)).collect();
    for placed in place_all(&nodes, 500, 3) {
        assert!(placed.contains(&NodeId(1)) && placed.contains(&NodeId(2)), "{placed:?}");
    }
}

#[test]
fn shares_add_up_and_respect_zones() {
    let two_zones: Vec<Node> = (1..=5).map(|id| node(id, if id == 1 { "a" } else { "b" }, 1_000)).collect();
    let shares = |replicas| Ring::new(&two_zones, &BTreeSet::new()).shares(replicas);
    assert_eq!(shares(2), [1.0, 0.25, 0.25, 0.25, 0.25]);
    assert_eq!(shares(3), [1.0, 0.5, 0.5, 0.5, 0.5]);
    assert_eq!(shares(9), [1.0; 5]);
    // One replica: by weight of the zones.
    assert_eq!(shares(1), [0.2; 5]);
}

#[test]
fn avoided_nodes_get_nothing_new_and_keep_what_they_have() {
    let nodes = nodes(1..=6, 3);
    let avoid = BTreeSet::from([NodeId(1), NodeId(2)]);
    let mut placer = Placer::new(Ring::new(&nodes, &avoid), &BTreeMap::from([(3, 50)]));
    for id in 1..50 {
        let placed = placer.place(KeyspaceId(1), PartitionId(id), 3);
        assert!(placed.len() == 3 && placed.iter().all(|node| !avoid.contains(node)), "{placed:?}");
    }
    placer.occupy([NodeId(1)]);
    let grown = placer.extend(KeyspaceId(1), PartitionId(50), &[NodeId(1)], 3);
    assert!(grown.contains(&NodeId(1)) && grown[0] != NodeId(1), "an avoided node is not to lead: {grown:?}");
    assert!(!grown.contains(&NodeId(4)), "n4 is in the zone of n1: {grown:?}");
}

#[test]
fn growing_partitions_share_out_their_leaders() {
    let nodes = nodes(1..=3, 1);
    let mut placer = Placer::new(Ring::new(&nodes, &BTreeSet::new()), &BTreeMap::from([(3, 30)]));
    (0..30).for_each(|_| placer.occupy([NodeId(1)]));
    let leaders: Vec<Vec<NodeId>> =
        (1..=30).map(|id| placer.extend(KeyspaceId(1), PartitionId(id), &[NodeId(1)], 3)[..1].to_vec()).collect();
    assert!(loads(&leaders).values().all(|leads| (6..=12).contains(leads)), "{:?}", loads(&leaders));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_cluster_gets_distinct_nodes_spread_over_its_zones(
        zone_of in proptest::collection::vec((0u64..5, 100u32..4_000), 1..20),
        replicas in 1u32..=9,
        count in 1u64..60,
        rotation in 0usize..20,
    ) {
        let mut nodes: Vec<Node> =
            (1..).zip(&zone_of).map(|(id, (zone, weight))| node(id, &format!("z{zone}"), *weight)).collect();
        let placed = place_all(&nodes, count, replicas);
        let mut of_zone: BTreeMap<&str, usize> = BTreeMap::new();
        for node in &nodes {
            *of_zone.entry(&node.zone).or_default() += 1;
        }
        for chosen in &placed {
            let distinct: BTreeSet<&NodeId> = chosen.iter().collect();
            prop_assert_eq!(distinct.len(), chosen.len());
            prop_assert_eq!(chosen.len(), nodes.len().min(replicas as usize));
            let zone = |id: &NodeId| nodes[id.0 as usize - 1].zone.as_str();
            let zones: BTreeSet<&str> = chosen.iter().map(zone).collect();
            prop_assert_eq!(zones.len(), of_zone.len().min(chosen.len()), "{:?}", chosen);
        }
        nodes.rotate_left(rotation % zone_of.len());
        prop_assert_eq!(place_all(&nodes, count, replicas), placed, "the order in which nodes are named is nothing");
    }

    #[test]
    fn loads_stay_below_their_bound(zones in 1u64..6, n in 10u64..40, replicas in 1u32..=5) {
        let nodes = nodes(1..=n * zones, zones);
        let count = 20 * n * zones;
        let placed = place_all(&nodes, count, replicas);
        let most = (count * u64::from(replicas)) as f64 / nodes.len() as f64 * (1.0 + LOAD_SLACK);
        for (node, load) in loads(&placed) {
            prop_assert!(load as f64 <= most.ceil() + 1.0, "{node} has {load} of at most {most}");
        }
    }
}
