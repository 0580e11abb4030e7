//! Read levels: what each sees, who serves it, and what the reply says of that.

use crate::support::{Cluster, Pipe, alone, eventually, get, level, pages, put, refusal, scan, shared};
use meridian::{
    client::{Consistency, Reason, Session},
    proto::v1::{self, Consistency as Level, Role, staleness::Known},
};
use std::time::Duration;
use tokio::time::Instant;

/// Three nodes and a keyspace `rows` of one partition, with a pipeline to each node.
struct World {
    cluster: Cluster,
    partition: u64,
    leader: usize,
    pipes: Vec<Pipe>,
}

async fn world() -> World {
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("rows", &[], 3).await;
    let led = cluster.followed("rows").await;
    let leader = cluster.index_of(led.leader);
    let pipes = vec![cluster.pipe(0).await, cluster.pipe(1).await, cluster.pipe(2).await];
    World { cluster, partition: led.id, leader, pipes }
}

fn bounded(ms: u64) -> Option<v1::ReadOptions> {
    Some(v1::ReadOptions { max_staleness_ms: ms, ..level(Level::Bounded).unwrap() })
}

fn known(read: &v1::ReadInfo) -> Known {
    read.staleness.as_ref().unwrap().known.unwrap()
}

/// The reply names node, role, partition, term, applied index and level.
#[track_caller]
fn assert_told(read: &v1::ReadInfo, partition: u64, consistency: Level) {
    assert_eq!((read.partition, read.consistency()), (partition, consistency));
    assert!(read.node > 0 && read.term > 0 && read.applied_index > 0, "{read:?}");
    assert!(matches!(read.role(), Role::Leader | Role::Follower) && !read.session_token.is_empty(), "{read:?}");
    assert!(!read.degraded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linearizable_reads_on_every_replica_see_the_acknowledged_write() {
    let _turn = shared().await;
    let mut world = world().await;
    let mut followers = 0;
    for round in 0..50 {
        let value = round.to_string();
        world.cluster.kv(round % 3).await.put(put("rows", "k", &value)).await.unwrap();
        for index in 0..3 {
            // This very replica: a follower asks the leader how far it has to come, and waits until it has.
            let own = world.pipes[index].get(world.partition, get("rows", "k", None)).await.unwrap();
            assert_eq!(own.row.unwrap().value, value, "a linearizable read of node {index} has missed a write");
            let read = own.read.unwrap();
            assert_told(&read, world.partition, Level::Linearizable);
            assert_eq!((read.node, known(&read)), (world.cluster.id_of(index), Known::None(true)));
            followers += u32::from(read.role() == Role::Follower);
        }
    }
    assert!(followers > 0, "no follower has answered");
    for index in 0..3 {
        let mut kv = world.cluster.kv(index).await;
        for options in [None, level(Level::Unspecified), level(Level::Linearizable)] {
            let reply = kv.get(get("rows", "k", options)).await.unwrap().into_inner();
            assert_eq!(reply.row.unwrap().value, "49");
            assert_told(&reply.read.unwrap(), world.partition, Level::Linearizable);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_reads_through_every_node_see_the_acknowledged_write_and_are_served_by_the_leader() {
    let _turn = shared().await;
    let world = world().await;
    for round in 0..20 {
        let value = round.to_string();
        world.cluster.kv((round + 1) % 3).await.put(put("rows", "k", &value)).await.unwrap();
        let mut kv = world.cluster.kv(round % 3).await;
        let reply = kv.get(get("rows", "k", level(Level::Lease))).await.unwrap().into_inner();
        assert_eq!(reply.row.unwrap().value, value);
        let read = reply.read.unwrap();
        assert_told(&read, world.partition, Level::Lease);
        assert_eq!((read.role(), known(&read)), (Role::Leader, Known::None(true)));
    }
}

/// What a writer has had acknowledged, and when.
async fn write_all_the_time(
    cluster: &Cluster,
    through: usize,
    stopped: tokio::sync::watch::Receiver<bool>,
) -> tokio::task::JoinHandle<Vec<Instant>> {
    let mut kv = cluster.kv(through).await;
    meridian::env::spawn(async move {
        let mut acknowledged = Vec::new();
        while !*stopped.borrow() {
            kv.put(put("rows", "k", &acknowledged.len().to_string())).await.unwrap();
            acknowledged.push(Instant::now());
        }
        acknowledged
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bounded_read_never_claims_less_staleness_than_it_has() {
    const BOUND_MS: u64 = 200;
    let _turn = shared().await;
    let mut world = world().await;
    world.cluster.kv(0).await.put(put("rows", "k", "0")).await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writer = write_all_the_time(&world.cluster, world.leader, stopped).await;
    let mut seen = Vec::new();
    let (mut by_followers, mut from_memory) = (0, 0);
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        for index in 0..3 {
            let began = Instant::now();
            let reply = world.pipes[index].get(world.partition, get("rows", "k", bounded(BOUND_MS))).await.unwrap();
            let read = reply.read.unwrap();
            assert_told(&read, world.partition, Level::Bounded);
            assert_eq!(read.node, world.cluster.id_of(index));
            let Known::AtMostUs(claimed) = known(&read) else { panic!("{read:?}") };
            assert!(claimed <= BOUND_MS * 1_000, "more stale than was asked for: {read:?}");
            let value: usize = std::str::from_utf8(&reply.row.unwrap().value).unwrap().parse().unwrap();
            by_followers += u32::from(read.role() == Role::Follower);
            from_memory += u32::from(claimed > 1_000);
            seen.push((began, Duration::from_micros(claimed), value));
        }
    }
    stop.send(true).unwrap();
    let acknowledged = writer.await.unwrap();
    for (began, claimed, value) in &seen {
        // The answer was given after the request: whatever was acknowledged longer before that than claimed must be in it.
        let Some(limit) = began.checked_sub(*claimed) else { continue };
        let must = acknowledged.iter().take_while(|at| **at < limit).count();
        assert!(
            value + 1 >= must,
            "a read claims {claimed:?} and has {value}, but write {must} was acknowledged before"
        );
    }
    assert!(by_followers > 0 && from_memory > 0, "{} reads, {by_followers} {from_memory}", seen.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_a_bounded_read_is_refused_once_its_bound_has_passed() {
    let _turn = alone().await;
    let mut world = world().await;
    let survivor = (world.leader + 1) % 3;
    world.cluster.kv(0).await.put(put("rows", "k", "v")).await.unwrap();
    let patient = async |pipe: &mut Pipe, partition, ms| {
        let began = Instant::now();
        (began, pipe.get(partition, get("rows", "k", bounded(ms))).await)
    };
    let (_, fresh) = patient(&mut world.pipes[survivor], world.partition, 60_000).await;
    assert_eq!(fresh.unwrap().row.unwrap().value, "v");
    for index in (0..3).filter(|index| *index != survivor) {
        world.cluster.dev.kill(index);
    }
    let died = Instant::now();
    // It answers from what it knows, and says how old that is.
    let (began, old) = patient(&mut world.pipes[survivor], world.partition, 60_000).await;
    let read = old.unwrap().read.unwrap();
    let Known::AtMostUs(claimed) = known(&read) else { panic!("{read:?}") };
    assert!(Duration::from_micros(claimed) >= began - died, "{claimed} us, {:?} after the death", began - died);
    // With a bound in the past there is no answer any more, only the reason.
    let refused =
        eventually("a refusal", async || match patient(&mut world.pipes[survivor], world.partition, 100).await {
            (began, Ok(reply)) => {
                let read = reply.read.unwrap();
                let Known::AtMostUs(claimed) = known(&read) else { panic!("{read:?}") };
                assert!(claimed <= 100_000 && began - died <= Duration::from_millis(100), "{read:?}");
                None
            }
            (_, Err(error)) => Some(error),
        })
        .await;
    assert_eq!(refused.reason, Reason::TooStale.as_str(), "{refused:?}");
    let mut kv = world.cluster.kv(survivor).await;
    let by_any = refusal(kv.get(get("rows", "k", bounded(100))).await);
    assert!(matches!(by_any.reason, Reason::TooStale | Reason::NoQuorum), "{by_any}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_reads_its_own_writes_from_every_replica() {
    let _turn = shared().await;
    let mut world = world().await;
    let client = world.cluster.client().await;
    let rows = client.keyspace("rows");
    let session = client.session();
    for round in 0..100 {
        let value = round.to_string();
        rows.put("k", &value).session(&session).await.unwrap();
        for index in 0..3 {
            let session_token = session.token();
            let options = Some(v1::ReadOptions { session_token, ..level(Level::Session).unwrap() });
            let own = world.pipes[index].get(world.partition, get("rows", "k", options)).await.unwrap();
            assert_eq!(own.row.unwrap().value, value, "node {index} has not what the session wrote");
            let read = own.read.unwrap();
            assert_told(&read, world.partition, Level::Session);
            assert_eq!((read.node, known(&read)), (world.cluster.id_of(index), Known::Unknown(true)));
        }
        let row = rows.get("k").session(&session).await.unwrap().unwrap();
        assert_eq!(row.value, value);
    }
    // Handed to another process, and put behind another token, it means the same.
    let elsewhere = Session::from_token([&session.token()[..], &session.token()[..]].concat()).unwrap();
    assert_eq!(rows.get("k").session(&elsewhere).await.unwrap().unwrap().value, "99");
    let options = Some(v1::ReadOptions { session_token: "damaged".into(), ..level(Level::Session).unwrap() });
    let refused = refusal(world.cluster.kv(0).await.get(get("rows", "k", options)).await);
    assert_eq!(refused.reason, Reason::InvalidField);
}

/// Reads of a session never go back, whichever replica answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_of_a_session_never_go_back() {
    let _turn = shared().await;
    let world = world().await;
    world.cluster.kv(0).await.put(put("rows", "k", "0")).await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writer = write_all_the_time(&world.cluster, world.leader, stopped).await;
    let client = world.cluster.client().await;
    let (session, mut highest) = (client.session(), 0_u64);
    for _ in 0..600 {
        let row = client.keyspace("rows").get("k").session(&session).await.unwrap().unwrap();
        assert!(row.version >= highest, "went back from {highest} to {}", row.version);
        highest = row.version;
    }
    stop.send(true).unwrap();
    writer.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eventual_reads_are_served_by_every_replica_and_say_so() {
    let _turn = shared().await;
    let mut world = world().await;
    world.cluster.kv(0).await.put(put("rows", "k", "v")).await.unwrap();
    for index in 0..3 {
        let partition = world.partition;
        let pipe = &mut world.pipes[index];
        let reply = eventually("the row on this replica", async || {
            let reply = pipe.get(partition, get("rows", "k", level(Level::Eventual))).await.unwrap();
            reply.found.then_some(reply)
        })
        .await;
        let read = reply.read.unwrap();
        assert_told(&read, world.partition, Level::Eventual);
        assert_eq!((read.node, known(&read)), (world.cluster.id_of(index), Known::Unknown(true)));
        // Asked as any client asks, the node's own replica is the nearest.
        let reply = world.cluster.kv(index).await.get(get("rows", "k", level(Level::Eventual))).await.unwrap();
        assert_eq!(reply.into_inner().read.unwrap().node, world.cluster.id_of(index));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_degraded_read_is_marked_and_only_then_weaker() {
    let _turn = alone().await;
    let mut world = world().await;
    let survivor = (world.leader + 1) % 3;
    world.cluster.kv(0).await.put(put("rows", "k", "v")).await.unwrap();
    let partition = world.partition;
    let pipe = &mut world.pipes[survivor];
    pipe.get(partition, get("rows", "k", level(Level::Linearizable))).await.unwrap();
    let degrade = |consistency| {
        let on_unavailable = v1::OnUnavailable::Degrade as i32;
        let base = bounded(if consistency == Level::Bounded { 50 } else { 0 }).unwrap();
        Some(v1::ReadOptions { consistency: consistency as i32, on_unavailable, ..base })
    };
    let mut kv = world.cluster.kv(survivor).await;
    for consistency in [Level::Linearizable, Level::Lease, Level::Bounded] {
        let reply = kv.get(get("rows", "k", degrade(consistency))).await.unwrap().into_inner();
        assert_told(&reply.read.unwrap(), partition, consistency);
    }
    for index in (0..3).filter(|index| *index != survivor) {
        world.cluster.dev.kill(index);
    }
    for consistency in [Level::Unspecified, Level::Linearizable, Level::Lease, Level::Bounded] {
        let reply = eventually("a degraded answer", async || {
            let reply = kv.get(get("rows", "k", degrade(consistency))).await.unwrap().into_inner();
            // Before anybody can know of the deaths, what was asked for may still be had.
            reply.read.as_ref().unwrap().degraded.then_some(reply)
        })
        .await;
        assert_eq!(reply.row.unwrap().value, "v");
        let read = reply.read.unwrap();
        assert_eq!((read.consistency(), known(&read)), (Level::Eventual, Known::Unknown(true)));
        let request = v1::ScanRequest { options: degrade(consistency), ..scan("rows", None) };
        let page = pages(&mut kv, request).await.unwrap().remove(0);
        assert!(page.reads.iter().all(|read| read.degraded && read.consistency() == Level::Eventual));
    }
    let client = world.cluster.client().await;
    let rows = client.keyspace("rows");
    let (row, read) = rows.get("k").or_degrade().with_info().await.unwrap();
    assert!(row.is_some() && read.degraded);
    let refused = rows.get("k").await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NoQuorum, "without DEGRADE nothing is weaker than asked for: {refused:?}");
    let eventual = rows.get("k").consistency(Consistency::Eventual).or_degrade().with_info().await.unwrap();
    assert!(!eventual.1.degraded, "what was asked for was had");
}
