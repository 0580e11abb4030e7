//! Groups that lose leaders, quorums, frames and disks.

use super::world::{World, definite, eventually, pair, replica, within};
use crate::{
    error::Outcome,
    key::NodeId,
    raft::{RaftConfig, WriteError},
    transport::memory::Shape,
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep};

#[tokio::test(start_paused = true)]
async fn a_lost_leader_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut world = World::with_group(3, RaftConfig::default()).await;
    let leader = world.leader().await;
    let index = world.write("x", 1).await;
    let began = Instant::now();
    world.crash(leader).await;
    let next = world.leader().await;
    assert_ne!(next, leader);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(world.groups[&next].applied().index > index);
    assert_eq!(world.get(next, "x").as_deref(), Some("1"));
    world.write("x", 2).await;
    world.restart(leader).await;
    world.agree(world.write("x", 3).await).await;
}

#[tokio::test(start_paused = true)]
async fn a_write_without_quorum_says_what_is_known() {
    let world = World::with_group(3, RaftConfig::default()).await;
    let leader = world.leader().await;
    let group = &world.groups[&leader];
    world.isolate(leader);
    // Proposed under a lease that is still fresh: nobody can say.
    let error = group.write(pair("x", "maybe"), within(300)).await.unwrap_err();
    assert_eq!((error, error.effect()), (WriteError::Timeout, Outcome::Unknown));
    // The lease is over: refused before it is proposed.
    sleep(Duration::from_secs(2)).await;
    let error = group.write(pair("x", "no"), within(300)).await.unwrap_err();
    assert!(definite(error), "{error:?}");
    assert!(matches!(error, WriteError::NoQuorum | WriteError::NotLeader { .. }), "{error:?}");
    // Others lead meanwhile and write. When the old leader returns, its proposal is gone and what was refused is nowhere.
    let others: Vec<u64> = world.groups.keys().copied().filter(|n| *n != leader).collect();
    let mut written = 0;
    while written == 0 {
        for n in &others {
            if let Ok((at, _)) = world.groups[n].write(pair("x", "other"), within(500)).await {
                written = at.index;
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
    world.network.heal_all();
    world.agree(written).await;
    assert_eq!(world.get(leader, "x").as_deref(), Some("other"));
}

#[tokio::test(start_paused = true)]
async fn a_write_proposed_by_a_deposed_leader_is_reported_as_unknown() {
    let world = World::with_group(3, RaftConfig::default()).await;
    let leader = world.leader().await;
    world.isolate(leader);
    let group = world.groups[&leader].clone();
    let pending = world.on(leader, async move { group.write(pair("x", "maybe"), within(30_000)).await });
    let pending = crate::env::spawn(pending);
    sleep(Duration::from_secs(4)).await;
    world.network.heal_all();
    let error = pending.await.unwrap().unwrap_err();
    assert_eq!((error, error.effect()), (WriteError::Discarded, Outcome::Unknown));
    world.agree(world.write("x", 1).await).await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_heard_and_hears_nothing_is_replaced_while_it_repeats_itself() {
    let world = World::with_group(3, RaftConfig::default()).await;
    let leader = world.leader().await;
    for other in world.groups.keys().filter(|other| **other != leader) {
        world.network.cut(NodeId(*other), NodeId(leader));
    }
    // An entry that reaches the others, and whose acknowledgement is lost.
    let group = world.groups[&leader].clone();
    let pending = crate::env::spawn(world.on(leader, async move { group.write(pair("x", 1), within(30_000)).await }));
    eventually("another leads", || world.groups.iter().any(|(n, group)| *n != leader && group.is_leader())).await;
    let others: Vec<u64> = world.groups.keys().copied().filter(|n| *n != leader).collect();
    eventually("it has what was repeated", || others.iter().any(|n| world.get(*n, "x").as_deref() == Some("1"))).await;
    world.network.heal_all();
    world.agree(world.write("y", 1).await).await;
    // It is the same entry, whoever committed it.
    assert!(pending.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn acknowledged_writes_survive_loss_delay_and_crashes() {
    let config = RaftConfig { snapshot_bytes: 20_000, log_keep_bytes: 4_000, ..RaftConfig::default() };
    let mut world = World::with_group(3, config).await;
    let rough = Shape {
        delay_min: Duration::from_millis(1),
        delay_max: Duration::from_millis(20),
        loss: 0.03,
        duplicate: 0.1,
        reorder: 0.1,
        stray_max: Duration::from_millis(500),
    };
    world.network.shape_all(rough);
    let mut acknowledged = BTreeMap::new();
    let mut last = 0;
    for round in 0..30u64 {
        for n in 0..20 {
            let key = format!("k{n}");
            last = world.write(&key, round).await;
            acknowledged.insert(key, round.to_string());
        }
        let victim = round % 3 + 1;
        match round % 5 {
            1 => {
                world.crash(victim).await;
                world.leader().await;
                world.restart(victim).await;
            }
            3 => {
                world.network.cut(NodeId(victim), NodeId(victim % 3 + 1));
                sleep(Duration::from_millis(500)).await;
                world.network.heal_all();
            }
            _ => {}
        }
    }
    world.network.shape_all(Shape::default());
    world.agree(world.write("last", 1).await.max(last)).await;
    for (key, value) in &acknowledged {
        assert_eq!(world.get(1, key).as_ref(), Some(value), "{key}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_restarted_replica_does_not_vote_before_its_lease_is_over() {
    let mut world = World::with_group(3, RaftConfig::default()).await;
    let leader = world.leader().await;
    let [voter, candidate] = [1, 2, 3].into_iter().filter(|n| *n != leader).collect::<Vec<_>>()[..] else { panic!() };
    // The candidate hears nothing of the leader, whose lease rests on the voter alone.
    world.network.cut(NodeId(leader), NodeId(candidate));
    world.network.cut(NodeId(candidate), NodeId(leader));
    sleep(Duration::from_millis(1750)).await;
    // The voter restarts: it has forgotten the lease, but must keep it.
    assert!(world.groups[&leader].is_leader());
    world.crash(voter).await;
    world.restart(voter).await;
    let lease = world.config.lease();
    let restarted = Instant::now();
    while restarted.elapsed() < lease - Duration::from_millis(20) {
        assert!(!world.groups[&candidate].is_leader(), "elected {:?} after the restart", restarted.elapsed());
        assert!(!world.groups[&voter].is_leader());
        sleep(Duration::from_millis(5)).await;
    }
    // Later somebody leads; nothing is lost.
    world.network.heal_all();
    world.agree(world.write("x", 1).await).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_panics_stops_its_replica_and_tells_the_writer() {
    let world = World::with_group(1, RaftConfig::default()).await;
    let group = &world.groups[&1];
    let error = group.write(pair("panic", 1), within(5000)).await.unwrap_err();
    assert_eq!((error, error.effect()), (WriteError::Stopped { proposed: true }, Outcome::Unknown));
    eventually("stopped", || group.role() == crate::raft::Role::Stopped).await;
    let error = group.write(pair("x", 1), within(1000)).await.unwrap_err();
    assert!(definite(error));
    group.shutdown().await;
    group.shutdown().await;
    assert_eq!(group.replica(), replica(1));
}

/// What a client sees of a rough minute: when each write was acknowledged, and where it stands.
fn rough_history(seed: u64) -> Vec<(Duration, u64)> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let began = Instant::now();
        let config = RaftConfig { snapshot_bytes: 5_000, log_keep_bytes: 1_000, ..RaftConfig::default() };
        let mut world = World::with_group_seeded(3, seed, config).await;
        world.network.shape_all(Shape { delay_max: Duration::from_millis(30), loss: 0.05, ..Shape::default() });
        let mut history = Vec::new();
        for n in 0..100u64 {
            history.push((began.elapsed(), world.write(&format!("k{}", n % 7), n).await));
            if n % 25 == 10 {
                let victim = world.leader().await;
                world.crash(victim).await;
                world.leader().await;
                world.restart(victim).await;
            }
        }
        history
    })
}

#[test]
fn the_same_seed_gives_the_same_history() {
    let first = rough_history(1);
    assert_eq!(first, rough_history(1));
    assert_ne!(first, rough_history(2));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_cannot_be_written_is_tried_again_and_stops_nothing() {
    let config = RaftConfig { snapshot_bytes: 20_000, log_keep_bytes: 4_000, ..RaftConfig::default() };
    let world = World::with_group(1, config).await;
    world.nodes[&1].snapshots.set_full(true);
    for n in 0..500 {
        world.write(&format!("k{}", n % 10), n).await;
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.groups[&1].status().snapshot, 0);
    world.nodes[&1].snapshots.set_full(false);
    let short = || {
        let status = world.groups[&1].status();
        status.snapshot > 0 && status.purged > 0
    };
    eventually("the log is cut, without another write", short).await;
    world.write("k", "v").await;
}
