//! Snapshots, restarts, the length of the log.

use super::world::{GROUP, Pairs, World, eventually, pair, replica, within};
use crate::raft::{Goal, Group, MembersError, OpenError, RaftConfig, Role};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Snapshots often, keeps little.
fn frugal() -> RaftConfig {
    RaftConfig { snapshot_bytes: 20_000, log_keep_bytes: 2_000, log_bytes_max: 100_000, ..RaftConfig::default() }
}

#[tokio::test(start_paused = true)]
async fn the_log_stays_short_under_endless_overwrites() {
    let world = World::with_group(3, frugal()).await;
    let mut longest = 0;
    for n in 0..3000 {
        world.write(&format!("k{}", n % 10), n).await;
        longest = world.groups.values().map(|group| group.status().log_bytes).max().unwrap().max(longest);
    }
    assert!(longest < 60_000, "{longest}");
    for group in world.groups.values() {
        let status = group.status();
        assert!(status.snapshot > 0 && status.purged > 2000, "{status:?}");
        assert!(status.purged <= status.snapshot);
    }
}

#[tokio::test(start_paused = true)]
async fn the_log_of_a_group_that_comes_to_rest_is_cut_although_it_is_shorter_than_the_state() {
    let world = World::with_group(3, frugal()).await;
    let mut last = 0;
    for n in 0..200 {
        last = world.write(&format!("key{n}"), "x".repeat(1_000)).await;
    }
    let longest = world.groups.values().map(|group| group.status().log_bytes).max();
    assert!(longest > Some(60_000), "new rows add as much to the state as to the log: {longest:?}");
    eventually("every log was cut", || {
        world.groups.values().all(|group| group.status().snapshot == last && group.status().log_bytes < 10_000)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_far_behind_gets_a_snapshot() {
    let mut world = World::with_group(3, frugal()).await;
    let leader = world.leader().await;
    let behind = *world.groups.keys().find(|n| **n != leader).unwrap();
    world.crash(behind).await;
    for n in 0..2000 {
        world.write(&format!("k{}", n % 10), n).await;
    }
    eventually("the log was cut past the one behind", || {
        let leader = world.groups.values().find(|group| group.is_leader());
        leader.is_some_and(|leader| leader.status().purged > 500)
    })
    .await;
    world.restart(behind).await;
    world.agree(world.write("x", 1).await).await;
    let status = world.groups[&behind].status();
    assert!(status.snapshot > 500, "it was sent a snapshot: {status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_blank_replica_joins_by_snapshot_even_when_frames_are_lost() {
    let mut world = World::with_group(1, frugal()).await;
    for n in 0..2000 {
        world.write(&format!("key{n}"), n).await;
    }
    world.groups[&1].snapshot_now(within(5000)).await.unwrap();
    assert!(world.groups[&1].status().purged > 1000);
    world.network.shape_all(crate::transport::memory::Shape::loss(0.05));
    for n in [2, 3] {
        world.start(n);
        world.open(replica(n)).await;
    }
    world.groups[&1].set_members(Goal::new(&[1, 2, 3].map(replica)), within(60_000)).await.unwrap();
    world.network.shape_all(Default::default());
    world.agree(world.write("x", 1).await).await;
    assert_eq!(world.get(3, "key1999").as_deref(), Some("1999"));
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_does_not_answer_gets_no_vote_however_short_the_log() {
    let mut world = World::with_group(1, frugal()).await;
    world.start(2);
    let asked = world.groups[&1].set_members(Goal::new(&[1, 2].map(replica)), within(5_000)).await;
    assert_eq!(asked, Err(MembersError::Timeout));
    assert_eq!(world.groups[&1].status().voters, [replica(1)]);
    world.write("x", 1).await;
    // One that has caught up and is gone again does not count either.
    world.open(replica(2)).await;
    eventually("caught up", || world.groups[&2].applied() == world.groups[&1].applied()).await;
    world.crash(2).await;
    sleep(world.config.lease()).await;
    let asked = world.groups[&1].set_members(Goal::new(&[1, 2].map(replica)), within(5_000)).await;
    assert_eq!(asked, Err(MembersError::Timeout));
    world.write("x", 2).await;
    world.restart(2).await;
    world.groups[&1].set_members(Goal::new(&[1, 2].map(replica)), within(5_000)).await.unwrap();
    world.agree(world.write("x", 3).await).await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_piece_of_a_snapshot_costs_seconds_only() {
    let mut longest = Duration::ZERO;
    // Whenever the cut comes: some of them take the snapshot, others the answer to it.
    for after_ms in (0..400).step_by(10) {
        let mut world = World::with_group(1, frugal()).await;
        for n in 0..300 {
            world.write(&format!("key{n}"), n).await;
        }
        world.groups[&1].snapshot_now(within(5000)).await.unwrap();
        assert!(world.groups[&1].status().purged > 0);
        world.start(2);
        world.open(replica(2)).await;
        world.network.shape_all(crate::transport::memory::Shape::delay(Duration::from_millis(15)));
        let (group, began) = (world.groups[&1].clone(), Instant::now());
        let adding =
            world.on(1, async move { group.set_members(Goal::new(&[1, 2].map(replica)), within(100_000)).await });
        let adding = crate::env::spawn(adding);
        sleep(Duration::from_millis(after_ms)).await;
        world.isolate(2);
        sleep(Duration::from_millis(40)).await;
        world.network.heal_all();
        adding.await.unwrap().unwrap();
        longest = longest.max(began.elapsed());
    }
    assert!(longest > Duration::from_secs(2), "a piece was lost: {longest:?}");
    assert!(longest < Duration::from_secs(5), "{longest:?}");
}

#[tokio::test(start_paused = true)]
async fn everything_synced_survives_a_restart_of_all() {
    let mut world = World::with_group(3, frugal()).await;
    for n in 0..500 {
        world.write(&format!("k{}", n % 10), n).await;
    }
    let before = world.groups[&1].status();
    assert!(before.snapshot > 0);
    for n in 1..=3 {
        world.crash(n).await;
    }
    for n in 1..=3 {
        world.restart(n).await;
    }
    world.leader().await;
    world.agree(before.applied.index).await;
    assert_eq!(world.get(2, "k9").as_deref(), Some("499"));
    assert!(world.groups[&1].status().term > before.term, "a restarted leader is elected again");
}

#[tokio::test(start_paused = true)]
async fn a_group_of_one_comes_back_alone() {
    let mut world = World::with_group(1, RaftConfig::default()).await;
    let index = world.write("x", 1).await;
    world.crash(1).await;
    world.restart(1).await;
    world.leader().await;
    assert!(world.groups[&1].applied().index > index);
    assert_eq!(world.get(1, "x").as_deref(), Some("1"));
    // A stop in good order is a restart like any other, and can be asked for twice.
    let group = world.groups[&1].clone();
    group.shutdown().await;
    group.shutdown().await;
    assert_eq!(group.role(), Role::Stopped);
    assert!(group.barrier(crate::raft::Level::ReadIndex, within(100)).await.is_err());
    world.open(replica(1)).await;
    world.write("x", 2).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_restored_is_refused() {
    let mut world = World::with_group(1, RaftConfig::default()).await;
    world.write("x", 1).await;
    let hub = std::sync::Arc::clone(&world.nodes[&1].life.as_ref().unwrap().hub);
    let found = world.found(replica(1));
    let open = |found: crate::log::Recovered| {
        let hub = std::sync::Arc::clone(&hub);
        async move { Group::open(&hub, GROUP, replica(1).id, &found, Pairs::default()).await.unwrap_err() }
    };
    assert!(matches!(open(found.clone()).await, OpenError::AlreadyOpen));
    world.groups.remove(&1).unwrap().shutdown().await;
    let mut hole = found.clone();
    let middle = *hole.entries.keys().nth(1).unwrap();
    hole.entries.remove(&middle);
    assert!(matches!(open(hole).await, OpenError::Log(_)));
    let mut damaged = found.clone();
    damaged.entries.insert(middle, bytes::Bytes::from_static(b"?"));
    let error = open(damaged).await;
    assert!(error.to_string().contains(&middle.to_string()), "{error}");
    // A log that was cut needs the snapshot that allowed it.
    let mut cut = found;
    let last = *cut.entries.keys().next_back().unwrap();
    let marker = crate::raft::codec::store_log_id(&crate::raft::types::log_id(1, 1, last));
    cut.entries.clear();
    cut.purged = Some((last, marker));
    assert!(matches!(open(cut).await, OpenError::State(_)));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_of_one_moment_although_writes_go_on() {
    let mut world = World::with_group(1, RaftConfig::default()).await;
    for n in 0..500 {
        world.write(&format!("key{n}"), 0).await;
    }
    let group = world.groups[&1].clone();
    let taking = world.on(1, async move { group.snapshot_now(within(5000)).await });
    let taking = crate::env::spawn(taking);
    for n in 0..500 {
        world.groups[&1].write(pair(&format!("key{n}"), 1), within(1000)).await.unwrap();
    }
    assert!(taking.await.unwrap().is_some());
    sleep(Duration::from_millis(100)).await;
    world.crash(1).await;
    world.restart(1).await;
    world.leader().await;
    assert_eq!(world.groups[&1].read(|m, _| m.pairs.values().filter(|v| *v == "1").count()), 501);
}
