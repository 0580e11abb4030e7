//! Power loss, restarts, and replicas that begin from nothing.

use crate::{
    client::{DEADLINE, Level, Writer, get, scan},
    crew::Crew,
    world::{Settings, World, simulate},
};
use meridian::{
    log::memory::{FailedSync, Lose},
    proof::workload::Workload,
    proto::v1::request::Op,
    raft::RaftConfig,
};
use std::time::Duration;
use tokio::time::sleep;

crate::scenarios! {
    power_loss_everywhere_loses_no_acknowledged_write_and_no_session,
    a_write_repeated_after_power_loss_is_answered_again_and_not_applied_twice,
    a_disk_that_fails_acknowledges_nothing,
    a_node_that_was_down_catches_up_from_the_log,
    a_new_member_gets_a_snapshot_of_what_is_no_longer_in_the_log,
    a_node_that_was_down_for_long_gets_a_snapshot_and_keeps_sessions,
    a_wall_clock_set_back_neither_stops_writes_nor_lowers_versions,
}

const PAUSE: Duration = Duration::from_millis(5);

/// Cuts the power of every node at the same moment.
async fn power_loss(world: &World) {
    for n in world.running() {
        let seed = world.draw(u64::MAX);
        world.crash(n, Lose::Tail { seed }).await;
    }
}

fn power_loss_everywhere_loses_no_acknowledged_write_and_no_session() {
    for seed in 1..=6 {
        simulate(seed, Settings::default(), async |world| {
            world.form(3).await;
            let crew = Crew::start(&world, Workload::Counter, 6, PAUSE).await;
            for _ in 0..4 {
                sleep(Duration::from_millis(500 + world.draw(1_000))).await;
                power_loss(&world).await;
                sleep(Duration::from_millis(world.draw(300))).await;
                for n in world.all() {
                    world.restart(n);
                }
                world.at_rest_while_busy().await;
            }
            let sum = crew.finish().await;
            assert!(sum.ok_of("incr") > 150, "{sum:?}");
            world.at_rest().await;
        });
    }
}

fn a_write_repeated_after_power_loss_is_answered_again_and_not_applied_twice() {
    simulate(7, Settings::default(), async |world| {
        world.form(3).await;
        let mut writer = Writer::open(&world, "writer").await;
        let increment = writer.increment("default", "counter");
        let first = writer.settle(increment.clone()).await;
        power_loss(&world).await;
        for n in world.all() {
            world.restart(n);
        }
        let again = writer.settle(increment).await;
        assert_eq!((first.number, first.version), (again.number, again.version));
        assert!(again.info.unwrap().replayed);
        let row = get(&world, 2, "default", "counter", &Level::Linearizable, DEADLINE).await.unwrap().row.unwrap();
        assert_eq!(row.value, "1");
    });
}

fn a_disk_that_fails_acknowledges_nothing() {
    simulate(8, Settings::default(), async |world| {
        world.form(1).await;
        let mut writer = Writer::open(&world, "writer").await;
        writer.put("default", "before", "1").await;
        world.disk(1).fail_next_sync(FailedSync::Lost);
        let put = meridian::proto::v1::PutRequest {
            key: "after".into(),
            value: "2".into(),
            session: Some(writer.next()),
            ..Default::default()
        };
        let error = crate::client::ask(&world, 1, Op::Put(put), DEADLINE).await.unwrap_err();
        assert_eq!(error.outcome, Some(meridian::error::Outcome::Unknown), "{error:?}");
        assert!(world.life(1).is_none(), "the process ends");
        world.settled(1).await;
        world.restart(1);
        world.at_rest().await;
        assert!(get(&world, 1, "default", "before", &Level::Linearizable, DEADLINE).await.unwrap().found);
        assert!(!get(&world, 1, "default", "after", &Level::Linearizable, DEADLINE).await.unwrap().found);
    });
}

fn a_node_that_was_down_catches_up_from_the_log() {
    simulate(9, Settings::default(), async |world| {
        world.form(3).await;
        let mut writer = Writer::open(&world, "writer").await;
        writer.put("default", "a", "before").await;
        world.crash(3, Lose::Tail { seed: 1 }).await;
        for i in 0..100 {
            writer.put("default", &format!("b{i}"), "meanwhile").await;
        }
        world.restart(3);
        world.at_rest().await;
        let replica = world.node(3).partition(world.partition_of("default")).unwrap();
        assert_eq!(replica.group().status().snapshot, 0, "the log was enough");
        assert_eq!(replica.group().read(|machine, _| machine.store().rows()), 101);
    });
}

/// A log that is cut soon.
fn short_logs() -> Settings {
    let raft =
        RaftConfig { snapshot_bytes: 64 << 10, log_keep_bytes: 8 << 10, log_bytes_max: 96 << 10, ..Default::default() };
    Settings { raft, ..Settings::default() }
}

async fn fill(writer: &mut Writer, name: &str) {
    let value = "v".repeat(1_000);
    for i in 0..400 {
        writer.put("default", &format!("{name}{:02}", i % 100), &value).await;
    }
}

fn a_new_member_gets_a_snapshot_of_what_is_no_longer_in_the_log() {
    simulate(10, short_logs(), async |world| {
        world.form(1).await;
        let mut writer = Writer::open(&world, "writer").await;
        fill(&mut writer, "k").await;
        let id = world.partition_of("default");
        let status = world.node(1).partition(id).unwrap().group().status();
        assert!(status.purged > 0 && status.log_bytes < 200 << 10, "the log was cut: {status:?}");
        world.join().await;
        world.join().await;
        world.at_rest().await;
        for n in [2, 3] {
            let status = world.node(n).partition(id).unwrap().group().status();
            assert!(status.snapshot > 0, "node {n}: {status:?}");
            let rows = scan(&world, n, "default", 0).await.unwrap();
            assert_eq!(rows.len(), 100);
        }
        // What came by snapshot is on disk: the new members hold everything without the first.
        power_loss(&world).await;
        world.restart(2);
        world.restart(3);
        world.at_rest_while_busy().await;
        assert_eq!(scan(&world, 2, "default", 0).await.unwrap().len(), 100);
        world.restart(1);
        world.at_rest().await;
    });
}

fn a_node_that_was_down_for_long_gets_a_snapshot_and_keeps_sessions() {
    simulate(11, short_logs(), async |world| {
        world.form(3).await;
        let mut writer = Writer::open(&world, "writer").await;
        let increment = writer.increment("default", "counter");
        let first = writer.settle(increment.clone()).await;
        let mut others = Writer::open(&world, "others").await;
        world.crash(3, Lose::Tail { seed: 3 }).await;
        fill(&mut others, "k").await;
        world.restart(3);
        world.at_rest().await;
        let replica = world.node(3).partition(world.partition_of("default")).unwrap();
        assert!(replica.group().status().snapshot > 0);
        // Only the replicas that restarted decide now: the session came with the snapshot.
        let leader = world.leader_of(world.partition_of("default")).unwrap();
        world.crash(leader, Lose::All).await;
        let again = writer.settle(increment).await;
        assert_eq!((first.number, again.number), (Some(1), Some(1)));
        assert!(again.info.unwrap().replayed);
    });
}

fn a_wall_clock_set_back_neither_stops_writes_nor_lowers_versions() {
    simulate(12, Settings::default(), async |world| {
        world.form(3).await;
        let crew = Crew::start(&world, Workload::Levels, 4, PAUSE).await;
        for round in 0..6_i64 {
            sleep(Duration::from_millis(300)).await;
            let leader = world.leader_of(world.partition_of("default")).unwrap();
            // Ahead by less than the hour for which sessions are remembered.
            world.clock(leader).set_wall_off(if round % 2 == 0 { -86_400_000 } else { 600_000 * round });
            if round % 3 == 2 {
                world.crash(leader, Lose::All).await;
                sleep(Duration::from_secs(3)).await;
                world.restart(leader);
            }
        }
        let sum = crew.finish().await;
        assert!(sum.ok_of("write") > 50, "{sum:?}");
    });
}
