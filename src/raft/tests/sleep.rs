//! Groups that sleep.

use super::world::{World, eventually, pair, within};
use crate::key::NodeId;
use crate::raft::{BarrierError, Level, RaftConfig, WriteError};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const SLEEP_AFTER: Duration = Duration::from_secs(1);

impl World {
    async fn asleep() -> Self {
        let config = RaftConfig { sleep_after_ms: SLEEP_AFTER.as_millis() as u64, ..RaftConfig::default() };
        let world = World::with_group(3, config).await;
        world.write("x", 1).await;
        world.sleeps().await;
        world
    }

    fn sleepers(&self) -> usize {
        self.groups.values().filter(|group| group.status().asleep).count()
    }

    async fn sleeps(&self) {
        eventually("all sleep", || self.sleepers() == self.groups.len()).await;
    }

    fn term(&self) -> u64 {
        self.groups.values().map(|group| group.status().term).max().unwrap()
    }

    fn led_by(&self) -> u64 {
        *self.groups.iter().find(|(_, group)| group.is_leader()).expect("it goes on believing so").0
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_that_nobody_asks_anything_sleeps_and_answers_at_once_when_asked() {
    let world = World::asleep().await;
    let (leader, term) = (world.led_by(), world.term());
    let (group, follower) = (&world.groups[&leader], &world.groups[&(leader % 3 + 1)]);
    for round in 0..20 {
        // Of any length: also when a leader that nobody answers would keep quiet for a while.
        let slept = Duration::from_millis(700 * round);
        world.sleeps().await;
        sleep(slept).await;
        let silence = group.status().quorum_acked.unwrap();
        assert!(silence >= slept, "it heard of its quorum {silence:?} ago");
        let began = Instant::now();
        match round % 4 {
            0 => drop(group.write(pair("x", round), within(1_000)).await.unwrap()),
            1 => drop(group.barrier(Level::ReadIndex, within(1_000)).await.unwrap()),
            2 => drop(group.barrier(Level::Lease, within(1_000)).await.unwrap()),
            _ => drop(follower.barrier(Level::ReadIndex, within(1_000)).await.unwrap()),
        }
        assert!(began.elapsed() < Duration::from_millis(50), "round {round}: {:?}", began.elapsed());
        assert!(world.sleepers() < 3);
        let many = (0..5).map(|n| group.write(pair("x", n), within(1_000)));
        for written in futures_util::future::join_all(many).await {
            written.unwrap();
        }
    }
    assert_eq!((world.led_by(), world.term()), (leader, term), "nobody campaigned");
}

#[tokio::test(start_paused = true)]
async fn when_the_leader_of_a_group_that_sleeps_dies_another_is_elected() {
    let mut world = World::asleep().await;
    let (leader, term) = (world.led_by(), world.term());
    world.crash(leader).await;
    let began = Instant::now();
    eventually("another leads", || world.groups.values().any(|group| group.is_leader())).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(world.term() > term);
    world.write("x", 2).await;
    // With one of three missing it does not sleep.
    sleep(10 * SLEEP_AFTER).await;
    assert_eq!(world.sleepers(), 0);
    world.restart(leader).await;
    world.sleeps().await;
}

#[tokio::test(start_paused = true)]
async fn who_was_away_for_a_while_does_not_depose_the_leader_of_a_group_that_sleeps() {
    let world = World::asleep().await;
    let (leader, term) = (world.led_by(), world.term());
    let away = leader % 3 + 1;
    for ms in [300, 900, 1_000, 1_100, 1_500, 4_000] {
        world.isolate(away);
        sleep(Duration::from_millis(ms)).await;
        world.network.heal_all();
        world.sleeps().await;
        assert_eq!((world.led_by(), world.term()), (leader, term), "away for {ms} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_heard_and_hears_nothing_keeps_nobody_from_electing() {
    let world = World::asleep().await;
    let leader = world.led_by();
    for other in world.groups.keys().filter(|n| **n != leader) {
        world.network.cut(NodeId(*other), NodeId(leader));
    }
    let others = || world.groups.iter().filter(|(n, _)| **n != leader);
    eventually("another leads, though nobody asks", || others().any(|(_, group)| group.is_leader())).await;
    world.network.heal_all();
    world.sleeps().await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_slept_alone_confirms_nothing() {
    let world = World::asleep().await;
    let (leader, term) = (world.led_by(), world.term());
    let group = &world.groups[&leader];
    world.isolate(leader);
    let refused = group.write(pair("x", 2), within(3_000)).await.unwrap_err();
    assert!(matches!(refused, WriteError::NoQuorum | WriteError::NotLeader { .. }), "{refused:?}");
    for level in [Level::Lease, Level::ReadIndex] {
        let error = group.barrier(level, within(3_000)).await.unwrap_err();
        assert!(matches!(error, BarrierError::NoQuorum | BarrierError::Timeout), "{error:?}");
    }
    eventually("another leads", || world.groups.iter().any(|(n, group)| *n != leader && group.is_leader())).await;
    world.network.heal_all();
    world.sleeps().await;
    assert!(world.term() > term);
    world.agree(world.write("x", 3).await).await;
}
