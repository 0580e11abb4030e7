//! Keyspaces that come and go while a node is away.

use crate::{
    client::{DEADLINE, Level, Writer, get},
    faults::Way,
    world::{Settings, World, eventually, simulate},
};
use meridian::{
    error::Reason,
    key::{Layout, PartitionId, ReplicaId},
    log::{LogEngine as _, memory::Lose},
    placement::{Command, Cuts, Reply},
};

crate::scenarios! {
    a_node_that_was_cut_off_creates_and_retires_its_replicas_when_healed,
    a_node_that_was_down_creates_and_retires_its_replicas_when_back,
    a_keyspace_whose_first_leader_is_down_is_created_by_another,
}

async fn drop_keyspace(world: &World, n: u64, name: &str) {
    let reply = world.drive(n, Command::DropKeyspace { name: name.to_owned() }).await;
    assert!(matches!(reply, Reply::KeyspaceDropped { dropped: true }), "{reply:?}");
}

/// Waits until node `n` holds a keyspace, or does not.
async fn holds(world: &World, n: u64, name: &str, there: bool) {
    eventually(&format!("node {n} and keyspace {name}"), || {
        let map = world.node(n).routing().map();
        match map.keyspace_by_name(name).is_some() == there {
            true => Ok(()),
            false => Err(format!("its map is {}", map.version())),
        }
    })
    .await;
}

fn replica_of(world: &World, n: u64, id: PartitionId) -> ReplicaId {
    world.node(n).partition(id).expect("held").group().replica().id
}

fn is_destroyed(world: &World, n: u64, id: PartitionId, replica: ReplicaId) -> bool {
    world.disk(n).recover().unwrap().get(&(id, replica)).is_some_and(|found| found.tombstone)
}

fn a_node_that_was_cut_off_creates_and_retires_its_replicas_when_healed() {
    simulate(1, Settings::default(), async |world| {
        world.form(3).await;
        world.create_keyspace(1, "old", Layout::Ordered, Cuts::At(vec!["m".into()])).await;
        world.at_rest().await;
        let mut writer = Writer::open(&world, "writer").await;
        writer.put("old", "a", "1").await;
        let id = world.partition_of("old");
        let replica = replica_of(&world, 3, id);

        world.isolate(3, Way::Both);
        drop_keyspace(&world, 1, "old").await;
        world.create_keyspace(2, "new", Layout::Hashed, Cuts::Even(2)).await;
        for n in [1, 2] {
            holds(&world, n, "old", false).await;
            holds(&world, n, "new", true).await;
        }
        let mut writer = Writer::open(&world, "writer").await;
        assert!(world.node(3).partition(id).is_some(), "it has not been told yet");

        world.heal();
        holds(&world, 3, "new", true).await;
        writer.put("new", "b", "2").await;
        world.at_rest().await;
        assert!(world.node(3).partition(id).is_none());
        eventually("the replica is destroyed", || match is_destroyed(&world, 3, id, replica) {
            true => Ok(()),
            false => Err("no tombstone".to_owned()),
        })
        .await;
        assert!(world.node(3).partition(world.partition_of("new")).is_some());
        assert!(get(&world, 3, "new", "b", &Level::Linearizable, DEADLINE).await.unwrap().found);
        let error = get(&world, 3, "old", "a", &Level::Linearizable, DEADLINE).await.unwrap_err();
        assert_eq!(error.reason, Reason::KeyspaceUnknown);
    });
}

fn a_node_that_was_down_creates_and_retires_its_replicas_when_back() {
    simulate(2, Settings::default(), async |world| {
        world.form(3).await;
        world.create_keyspace(1, "old", Layout::Ordered, Cuts::Even(1)).await;
        world.at_rest().await;
        let id = world.partition_of("old");
        let replica = replica_of(&world, 2, id);
        world.crash(2, Lose::Tail { seed: 5 }).await;
        drop_keyspace(&world, 1, "old").await;
        // The same name is another keyspace: other partitions, other replicas, no rows.
        world.create_keyspace(3, "old", Layout::Ordered, Cuts::Even(1)).await;
        let mut writer = Writer::open(&world, "writer").await;
        writer.put("old", "a", "1").await;
        world.restart(2);
        world.at_rest().await;
        assert_ne!(world.partition_of("old"), id);
        assert!(world.node(2).partition(id).is_none());
        eventually("the replica is destroyed", || match is_destroyed(&world, 2, id, replica) {
            true => Ok(()),
            false => Err("no tombstone".to_owned()),
        })
        .await;
        assert!(get(&world, 2, "old", "a", &Level::Linearizable, DEADLINE).await.unwrap().found);
        // Once destroyed it stays so, whatever is lost.
        world.crash(2, Lose::All).await;
        assert!(is_destroyed(&world, 2, id, replica));
        world.restart(2);
        world.at_rest().await;
    });
}

fn a_keyspace_whose_first_leader_is_down_is_created_by_another() {
    simulate(3, Settings::default(), async |world| {
        world.form(5).await;
        for n in 1..=2_u64 {
            world.crash(n, Lose::All).await;
        }
        for i in 0..4 {
            world.create_keyspace(3, &format!("k{i}"), Layout::Hashed, Cuts::Even(3)).await;
        }
        eventually("every partition is active", || {
            let map = world.node(4).routing().map();
            let stuck = map.partitions().values().find(|p| {
                let alive = p.members.iter().filter(|member| member.node.0 > 2).count();
                alive * 2 > p.members.len() && p.phase == meridian::placement::Phase::Creating
            });
            match stuck {
                Some(partition) => Err(format!("{partition:?}")),
                None => Ok(()),
            }
        })
        .await;
        world.restart(1);
        world.restart(2);
        world.at_rest().await;
    });
}
