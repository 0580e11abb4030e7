//! A leader that cannot reach the others, or is not reached by them: no stale read, and one history.

use crate::{
    crew::Crew,
    faults::Way,
    world::{Settings, World, eventually, simulate},
};
use meridian::key::{DRIVER, Layout};
use meridian::placement::Cuts;
use meridian::proof::workload::Workload;
use std::time::Duration;
use tokio::time::sleep;

crate::scenarios! {
    a_leader_cut_off_both_ways_serves_no_stale_read_and_loses_no_write,
    a_leader_that_hears_nothing_serves_no_stale_read_and_loses_no_write,
    a_leader_that_is_not_heard_serves_no_stale_read_and_loses_no_write,
    the_minority_answers_nothing_strong_and_says_why,
    the_drivers_leader_cut_off_disturbs_no_reader_and_the_next_one_pushes_the_map,
}

const PAUSE: Duration = Duration::from_millis(10);

/// Cuts the leader of the only partition off three times, with clients on both sides all the while.
async fn leader_is_cut_off(world: &World, way: Way) {
    world.form(3).await;
    let id = world.partition_of("default");
    let crew = Crew::start(world, Workload::Levels, 9, PAUSE).await;
    sleep(Duration::from_secs(1)).await;
    for _ in 0..3 {
        let leader = world.leader_of(id).expect("led");
        let before = crew.written();
        world.isolate(leader, way);
        eventually("the others go on without it", || match crew.written() >= before + 20 {
            true => Ok(()),
            false => Err(format!("{} acknowledged", crew.written() - before)),
        })
        .await;
        sleep(Duration::from_millis(500 + world.draw(1_500))).await;
        world.heal();
        sleep(Duration::from_millis(500 + world.draw(1_500))).await;
        world.at_rest_while_busy().await;
    }
    let sum = crew.finish().await;
    assert!(sum.ok_of("write") >= 60 && sum.ok_of("read") > 400 && sum.follower_reads > 50, "{sum:?}");
    world.at_rest().await;
}

fn over_seeds(way: Way) {
    for seed in 1..=4 {
        simulate(seed, Settings::default(), async |world| leader_is_cut_off(&world, way).await);
    }
}

fn a_leader_cut_off_both_ways_serves_no_stale_read_and_loses_no_write() {
    over_seeds(Way::Both);
}

fn a_leader_that_hears_nothing_serves_no_stale_read_and_loses_no_write() {
    over_seeds(Way::To);
}

fn a_leader_that_is_not_heard_serves_no_stale_read_and_loses_no_write() {
    over_seeds(Way::From);
}

fn the_minority_answers_nothing_strong_and_says_why() {
    use crate::client::{Level, get};
    use meridian::error::Reason;
    simulate(9, Settings::default(), async |world| {
        world.form(3).await;
        let leader = world.leader_of(world.partition_of("default")).unwrap();
        let mut writer = crate::client::Writer::open(&world, "writer").await;
        writer.put("default", "key", "value").await;
        world.isolate(leader, Way::Both);
        sleep(Duration::from_secs(3)).await;
        for level in [Level::Linearizable, Level::Lease] {
            let error = get(&world, leader, "default", "key", &level, Duration::from_secs(5)).await.unwrap_err();
            assert_eq!(error.reason, Reason::NoQuorum, "{error:?}");
        }
        assert!(get(&world, leader, "default", "key", &Level::Eventual, Duration::from_secs(1)).await.unwrap().found);
    });
}

fn the_drivers_leader_cut_off_disturbs_no_reader_and_the_next_one_pushes_the_map() {
    simulate(10, Settings::default(), async |world| {
        world.form(5).await;
        let leader = world.leader_of(DRIVER).unwrap();
        world.isolate(leader, Way::Both);
        let other = world.all().into_iter().find(|n| *n != leader).unwrap();
        world.create_keyspace(other, "new", Layout::Ordered, Cuts::Even(1)).await;
        eventually("the map reaches all that can be reached", || {
            let version = world.node(other).routing().map().version();
            let behind = |n: &u64| *n != leader && world.node(*n).routing().map().version() < version;
            match world.all().into_iter().find(behind) {
                Some(n) => Err(format!("node {n} is behind")),
                None => Ok(()),
            }
        })
        .await;
        assert!(world.node(leader).routing().map().keyspace_by_name("new").is_none());
        world.heal();
        world.at_rest().await;
        assert!(world.node(leader).routing().map().keyspace_by_name("new").is_some());
    });
}
