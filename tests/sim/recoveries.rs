//! A partition whose quorum is lost for good goes on from the replica that is left, whenever what fails meanwhile.

use crate::{
    client::{DEADLINE, Level, Writer, get},
    world::{Settings, World, eventually, simulate},
};
use meridian::{
    key::{Layout, PartitionId},
    log::memory::Lose,
    placement::{Cuts, Phase},
};
use std::time::Duration;
use tokio::time::{Instant, sleep};

crate::scenarios! {
    the_replica_that_is_left_goes_on_also_when_its_node_dies_meanwhile,
}

const SEEDS: u64 = 8;
/// Rows that every replica has.
const ROWS: u64 = 12;
/// The survivor's node dies so soon after the order at the latest: by then it has opened the fresh replica.
const DIES_MS_MAX: u64 = 60;

/// Orders the recovery from any node until one takes the order.
async fn recover(world: &World, id: PartitionId) {
    let give_up = Instant::now() + Duration::from_secs(30);
    loop {
        let mut refused = String::from("nobody runs");
        for n in world.running() {
            let node = world.node(n);
            let ordered = world.on(n, async move {
                let survey = node.survey(id, None).await?;
                let deadline = Instant::now() + Duration::from_millis(50);
                // Whether it is done by then is looked for in the map.
                let _late = node.recover(&survey, deadline).await;
                Ok::<_, meridian::error::Error>(())
            });
            if let Err(error) = ordered.await {
                refused = error.to_string();
            }
            let map = world.node(n).routing().map();
            if map
                .partition(id)
                .is_some_and(|partition| partition.members.len() == 1 || partition.phase != Phase::Active)
            {
                return;
            }
        }
        assert!(Instant::now() < give_up, "{refused}");
        sleep(Duration::from_millis(100)).await;
    }
}

async fn has_all(world: &World, n: u64) -> Result<(), String> {
    for row in 0..ROWS {
        let found = get(world, n, "rows", &format!("{row:02}"), &Level::Linearizable, DEADLINE).await;
        let found = found.map_err(|error| error.to_string())?;
        if !found.found {
            return Err(format!("row {row} is lost"));
        }
    }
    Ok(())
}

fn the_replica_that_is_left_goes_on_also_when_its_node_dies_meanwhile() {
    for seed in 1..=SEEDS {
        simulate(seed, Settings::default(), async |world| {
            world.form(5).await;
            world.create_keyspace(1, "rows", Layout::Ordered, Cuts::Even(1)).await;
            world.at_rest().await;
            let mut writer = Writer::open(&world, "writer").await;
            for row in 0..ROWS {
                writer.put("rows", &format!("{row:02}"), "kept").await;
            }
            let id = world.partition_of("rows");
            world.at_rest().await;
            let members: Vec<u64> = world
                .node(1)
                .routing()
                .map()
                .partition(id)
                .unwrap()
                .members
                .iter()
                .map(|member| member.node.0)
                .collect();
            let survivor = members[world.draw(3) as usize];
            let lost: Vec<u64> = members.into_iter().filter(|n| *n != survivor).collect();
            for n in &lost {
                world.crash(*n, Lose::Tail { seed }).await;
            }
            recover(&world, id).await;
            if seed % 2 == 0 {
                sleep(Duration::from_millis(world.draw(DIES_MS_MAX))).await;
                world.crash(survivor, Lose::Tail { seed }).await;
                sleep(Duration::from_millis(500)).await;
                world.restart(survivor);
            }
            eventually("it is led by who is left", || match world.leader_of(id) {
                Some(n) if n == survivor => Ok(()),
                other => Err(format!("led by {other:?}")),
            })
            .await;
            // Those of before come back, and do not matter any more.
            for n in &lost {
                world.restart(*n);
            }
            world.at_rest().await;
            writer.put("rows", "new", "1").await;
            for n in world.running() {
                has_all(&world, n).await.unwrap();
            }
            let term = world.node(survivor).routing().map().partition(id).unwrap().clone();
            assert_eq!(term.members.len(), 3, "{term:?}");
        });
    }
}
