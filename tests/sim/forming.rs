//! Forming a cluster and joining it, without gRPC.

use crate::{
    client::{DEADLINE, Level, Writer, get, scan},
    world::{PATIENCE, Settings, World, eventually, simulate},
};
use meridian::{
    key::{DRIVER, Layout},
    placement::Cuts,
};
use tokio::time::Instant;

crate::scenarios! {
    a_cluster_of_three_forms_and_answers_through_every_node,
    a_cluster_of_five_forms_and_answers_through_every_node,
    a_cluster_of_one_answers_and_grows_with_what_it_holds,
    forming_again_is_harmless_and_joining_at_once_gets_a_map,
    the_driver_grows_while_one_of_its_members_is_down,
}

/// Writes through one node after the other, and reads and scans through every one.
async fn answers_everywhere(world: &World, keyspace: &str) {
    let mut writer = Writer::open(world, "writer").await;
    let key = |i: u64| format!("{}{i:03}", if i.is_multiple_of(2) { "a" } else { "z" });
    for i in 0..30 {
        writer.put(keyspace, &key(i), &format!("value {i}")).await;
    }
    let mut expected: Vec<_> = (0..30).map(|i| (key(i), format!("value {i}"))).collect();
    expected.sort();
    for n in world.all() {
        for level in [Level::Linearizable, Level::Lease, Level::Eventual] {
            let reply = get(world, n, keyspace, &key(7), &level, DEADLINE).await.unwrap();
            assert!(reply.found || level == Level::Eventual, "{level:?} through {n}");
        }
        for page_rows in [7, 0] {
            let rows = scan(world, n, keyspace, page_rows).await.unwrap();
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let rows: Vec<_> = rows.iter().map(|row| (text(&row.key), text(&row.value))).collect();
            assert_eq!(rows, expected, "through {n}");
        }
    }
}

async fn forms(world: &World, nodes: u64, voters: usize) {
    world.form(nodes).await;
    let map = world.node(1).routing().map();
    assert_eq!(map.driver().unwrap().members.len(), voters);
    for n in world.all() {
        assert_eq!(world.node(n).routing().map().encode(), map.encode(), "the map reaches node {n}");
        let voting = world.node(n).driver_group().is_some_and(|group| group.status().voters.len() == voters);
        let member = map.driver().unwrap().replica_on(world.node(n).id()).is_some();
        assert_eq!(voting, member, "node {n}");
    }
    answers_everywhere(world, "default").await;
    world.create_keyspace(1, "cut", Layout::Ordered, Cuts::At(vec!["b".into(), "m".into()])).await;
    world.create_keyspace(nodes, "spread", Layout::Hashed, Cuts::Even(4)).await;
    world.at_rest().await;
    answers_everywhere(world, "cut").await;
    answers_everywhere(world, "spread").await;
    world.at_rest().await;
}

fn a_cluster_of_three_forms_and_answers_through_every_node() {
    simulate(1, Settings::default(), async |world| forms(&world, 3, 3).await);
}

fn a_cluster_of_five_forms_and_answers_through_every_node() {
    simulate(2, Settings::default(), async |world| forms(&world, 5, 5).await);
}

fn a_cluster_of_one_answers_and_grows_with_what_it_holds() {
    simulate(3, Settings::default(), async |world| {
        world.form(1).await;
        let mut writer = Writer::open(&world, "writer").await;
        writer.put("default", "before", "1").await;
        for _ in 0..2 {
            world.join().await;
        }
        world.at_rest().await;
        assert_eq!(world.node(3).routing().map().driver().unwrap().members.len(), 3);
        for n in 1..=3 {
            let replica = world.node(n).partition(world.partition_of("default")).unwrap();
            assert_eq!(replica.group().status().voters.len(), 3);
            assert!(get(&world, n, "default", "before", &Level::Linearizable, DEADLINE).await.unwrap().found);
        }
    });
}

fn forming_again_is_harmless_and_joining_at_once_gets_a_map() {
    simulate(4, Settings::default(), async |world| {
        world.found().await;
        // Right away, before anything has come to rest; `join` checks that the map names the newcomer.
        world.join().await;
        world.join().await;
        world.at_rest().await;
        let before = world.node(1).routing().map().encode();
        let node = world.node(1);
        let process = meridian::placement::RegisterNode {
            cluster_id: "another".to_owned(),
            uuid: "00000000-0000-4000-8000-000000000009".to_owned(),
            address: "other:1".to_owned(),
            zone: String::new(),
            weight_milli: 1_000,
            previous: None,
            ephemeral: false,
        };
        let again = world.on(1, async move { node.admit(process, Instant::now() + PATIENCE).await });
        assert!(again.await.is_err(), "a stranger of another cluster is refused");
        assert_eq!(world.node(1).routing().map().encode(), before);
    });
}

fn the_driver_grows_while_one_of_its_members_is_down() {
    simulate(5, Settings::default(), async |world| {
        world.form(3).await;
        world.crash(3, meridian::log::memory::Lose::All).await;
        world.join().await;
        world.join().await;
        world.restart(3);
        world.at_rest().await;
        eventually("five members lead and follow", || match world.leader_of(DRIVER) {
            Some(_) => Ok(()),
            None => Err("nobody leads".to_owned()),
        })
        .await;
    });
}
