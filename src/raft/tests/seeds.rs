//! Groups that begin with a state.

use super::world::*;
use crate::{
    key::{NodeId, Replica, ReplicaId, SEED_INDEX},
    log::{Record, Recovered},
    raft::{
        Goal, LogPosition, Machine as _, MembersError, RaftConfig, SEED_AT, bury, codec, salvage, seed, types::Vote,
    },
};
use std::sync::Arc;

/// Seeds the replica of node `n` of a group of nodes 1 to 3, led by node 1 at first; what to open it with.
async fn seed_on(world: &World, n: u64) -> Recovered {
    let mut machine = Pairs::default();
    machine.apply(LogPosition::default(), pair("old", 7));
    let members = [1, 2, 3].map(replica);
    let hub = Arc::clone(&world.nodes[&n].life.as_ref().unwrap().hub);
    world
        .on(n, async move { seed(&hub, GROUP, replica(n).id, &members, replica(1).id, SEED_AT, &mut machine).await })
        .await
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_seeded_group_elects_at_once_and_takes_in_who_missed_it() {
    let mut world = World::new(1, RaftConfig::default());
    for n in 1..=3 {
        world.start(n);
    }
    for n in 1..=2 {
        let found = seed_on(&world, n).await;
        assert_eq!(found, world.found(replica(n)), "it is durable");
        world.open(replica(n)).await;
        assert_eq!(world.get(n, "old").as_deref(), Some("7"));
        assert_eq!(world.groups[&n].applied().index, SEED_INDEX);
    }
    let began = tokio::time::Instant::now();
    world.groups[&1].campaign().await;
    eventually("the first of them leads", || world.groups[&1].is_leader()).await;
    assert!(began.elapsed() < RaftConfig::default().lease(), "nobody had to wait: {:?}", began.elapsed());
    // It has not seen what the others were made of: it gets a snapshot.
    world.open(replica(3)).await;
    let at = world.write("new", 8).await;
    world.agree(at).await;
    assert_eq!(world.get(3, "old").as_deref(), Some("7"));
}

#[tokio::test(start_paused = true)]
async fn a_seeded_replica_that_dies_at_once_comes_back_seeded() {
    let mut world = World::new(2, RaftConfig::default());
    for n in 1..=3 {
        world.start(n);
        seed_on(&world, n).await;
    }
    for n in 1..=3 {
        world.crash(n).await;
    }
    for n in 1..=3 {
        world.restart(n).await;
    }
    let at = world.write("new", 8).await;
    world.agree(at).await;
    assert_eq!(world.get(2, "old").as_deref(), Some("7"));
}

#[tokio::test(start_paused = true)]
async fn a_group_that_has_lost_its_quorum_goes_on_with_all_that_one_replica_holds() {
    let mut world = World::with_group(3, RaftConfig::default()).await;
    world.write("early", 1).await;
    let leader = world.leader().await;
    world.groups[&leader].snapshot_now(within(1_000)).await.expect("something to take");
    let at = world.write("kept", 2).await;
    world.agree(at).await;
    // The leader writes on, and the others are gone: nobody acknowledges it, and it does not know it to be committed.
    let lost: Vec<u64> = (1..=3).filter(|n| *n != leader).collect();
    for n in &lost {
        world.crash(*n).await;
    }
    let group = world.groups[&leader].clone();
    assert!(group.write(pair("tail", 3), within(100)).await.is_err());
    let (last, applied) = (group.last_log(), group.applied());
    assert!(last.index > applied.index, "{last:?} {applied:?}");
    world.on(leader, async move { group.shutdown().await }).await;

    let (old, fresh) = (replica(leader), Replica { id: ReplicaId(leader + 10), node: NodeId(leader) });
    let begins = LogPosition { index: last.index + 1_000, term: last.term + 100 };
    for attempt in 1..=2 {
        // Whoever stops in between finds the old replica as it was.
        let found = world.found(old);
        let hub = Arc::clone(&world.nodes[&leader].life.as_ref().unwrap().hub);
        let salvaged = world.on(leader, async move {
            let (mut machine, upto) = salvage(&hub, GROUP, old.id, &found, Pairs::default()).await.unwrap();
            if attempt == 2 {
                seed(&hub, GROUP, fresh.id, &[fresh], fresh.id, begins, &mut machine).await.unwrap();
                bury(&hub, GROUP, old.id).await.unwrap();
            }
            (machine.pairs, upto)
        });
        let (pairs, upto) = salvaged.await;
        let get = |key: &str| pairs.get(key).cloned();
        assert_eq!((get("early"), get("kept"), get("tail")), (Some("1".into()), Some("2".into()), Some("3".into())));
        assert_eq!(upto, last);
    }
    assert!(world.found(old).tombstone, "it is never opened again");
    world.crash(leader).await;
    world.start(leader);
    world.groups.clear();
    world.open(fresh).await;
    let at = world.write("new", 4).await;
    assert!(at > begins.index && world.groups[&leader].leadership().term > begins.term);
    assert_eq!((world.get(leader, "tail").as_deref(), world.get(leader, "new").as_deref()), (Some("3"), Some("4")));
    // A replica that comes to it begins with a snapshot of all that.
    let joins = Replica { id: ReplicaId(lost[0] + 10), node: NodeId(lost[0]) };
    world.start(lost[0]);
    world.open(joins).await;
    let (group, target) = (world.groups[&leader].clone(), [fresh, joins]);
    let goal = move || async move {
        let goal = Goal { target: &target, after: None, allows: &|_| true };
        group.set_members(goal, within(10_000)).await
    };
    world.on(leader, goal()).await.unwrap();
    let at = world.write("last", 5).await;
    world.agree(at).await;
    assert_eq!(world.get(lost[0], "tail").as_deref(), Some("3"));
}

#[tokio::test(start_paused = true)]
async fn a_group_whose_first_member_died_after_the_others_had_voted_for_it_is_begun_by_another() {
    let mut world = World::new(3, RaftConfig::default());
    let members = [1, 2, 3].map(replica);
    for n in 2..=3 {
        world.start(n);
        let hub = Arc::clone(&world.nodes[&n].life.as_ref().unwrap().hub);
        let voted = Record::Vote(codec::store_vote(&Vote::new(2, 1)));
        world.on(n, async move { hub.keep(GROUP, replica(n).id, voted).await }).await.unwrap();
        world.open(replica(n)).await;
    }
    // It stops for that, as its node opens it again.
    let second = world.groups[&2].clone();
    let refused = world.on(2, async move { second.initialize(&members).await }).await;
    assert_eq!(refused, Err(MembersError::Stopped));
    world.open(replica(2)).await;
    let at = world.write("a", 1).await;
    world.agree(at).await;
    // Asked again it has nothing to do, and the first one is taken in if it comes back after all.
    let second = world.groups[&2].clone();
    assert_eq!(world.on(2, async move { second.initialize(&members).await }).await, Ok(()));
    world.start(1);
    world.open(replica(1)).await;
    let first = world.groups[&1].clone();
    let _refused = world.on(1, async move { first.initialize(&members).await }).await;
    if world.groups[&1].status().role == crate::raft::Role::Stopped {
        world.open(replica(1)).await;
    }
    let at = world.write("b", 2).await;
    world.agree(at).await;
}
