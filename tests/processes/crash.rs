//! What survives kill -9.

use crate::fleet::{Fleet, PATIENCE, eventually};
use futures_util::{StreamExt as _, stream};
use meridian::client::{Keyspace, RawKeys};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::task::JoinSet;

const ROUNDS: usize = 10;
const PUTTERS: usize = 6;
const COUNTERS: usize = 2;
/// Writes acknowledged in a round before the nodes are killed.
const ACKNOWLEDGED_MIN: usize = 100;
/// Deadline of writes that are given up before the nodes are back.
const SHORT: Duration = Duration::from_millis(700);

/// What the writers know.
#[derive(Default)]
struct Ledger {
    /// Rows whose put was acknowledged.
    rows: BTreeMap<String, String>,
    /// For each counter: increments acknowledged, and those of unknown outcome.
    counted: [(i64, i64); COUNTERS],
}

/// Writers of one round.
struct Round {
    number: usize,
    rows: Keyspace<RawKeys>,
    deadline: Duration,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
}

impl Round {
    async fn put(self: Arc<Self>, writer: usize) -> Vec<(String, String)> {
        let mut acknowledged = Vec::new();
        for n in 0.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let (key, value) = (format!("row {} {writer} {n}", self.number), format!("value {n} of {writer}"));
            match self.rows.put(key.as_str(), value.as_str()).deadline(self.deadline).await {
                Ok(written) => {
                    assert!(written.applied);
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    acknowledged.push((key, value));
                }
                Err(error) => assert!(error.is_retryable() || error.maybe_applied(), "{error:?}"),
            }
        }
        acknowledged
    }

    /// Increments acknowledged, and those of unknown outcome.
    async fn count(self: Arc<Self>, counter: usize) -> (i64, i64) {
        let (mut acknowledged, mut unknown, mut last) = (0, 0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            match self.rows.increment(counter_key(counter), 1).deadline(self.deadline).await {
                Ok(written) => {
                    let number = written.number.unwrap();
                    assert!(number > last, "{number} after {last}");
                    last = number;
                    acknowledged += 1;
                }
                Err(error) if error.maybe_applied() => unknown += 1,
                Err(error) => assert!(error.is_retryable(), "{error:?}"),
            }
        }
        (acknowledged, unknown)
    }
}

fn counter_key(counter: usize) -> String {
    format!("counter {counter}")
}

/// One round: writes go on while every node is killed, and in every second round until they are back.
async fn round(fleet: &mut Fleet, number: usize, ledger: &mut Ledger) {
    let through = number.is_multiple_of(2);
    let round = Arc::new(Round {
        number,
        rows: fleet.client().await.keyspace("default"),
        deadline: if through { PATIENCE } else { SHORT },
        stop: Arc::default(),
        acknowledged: Arc::default(),
    });
    let mut putters = JoinSet::new();
    (0..PUTTERS).for_each(|writer| drop(putters.spawn(Arc::clone(&round).put(writer))));
    let counters: Vec<_> =
        (0..COUNTERS).map(|counter| meridian::env::spawn(Arc::clone(&round).count(counter))).collect();
    written(&round, ACKNOWLEDGED_MIN).await;
    fleet.kill_all();
    if through {
        fleet.start_all();
        let before = round.acknowledged.load(Ordering::Relaxed);
        written(&round, before + PUTTERS).await;
    }
    round.stop.store(true, Ordering::Relaxed);
    while let Some(rows) = putters.join_next().await {
        ledger.rows.extend(rows.unwrap());
    }
    for (counter, task) in counters.into_iter().enumerate() {
        let (acknowledged, unknown) = task.await.unwrap();
        ledger.counted[counter].0 += acknowledged;
        ledger.counted[counter].1 += unknown;
    }
    fleet.start_all();
}

async fn written(round: &Round, rows: usize) {
    eventually(PATIENCE, "writes", || async {
        let now = round.acknowledged.load(Ordering::Relaxed);
        if now >= rows { Ok(()) } else { Err(format!("{now} of {rows} acknowledged")) }
    })
    .await;
}

async fn check(fleet: &Fleet, ledger: &Ledger) {
    let rows = fleet.client().await.keyspace("default");
    let found: BTreeMap<_, _> = rows
        .scan_prefix("row ")
        .deadline(PATIENCE)
        .rows()
        .map(|row| row.map(|row| (row.key, row.value)).unwrap())
        .collect()
        .await;
    for (key, value) in &ledger.rows {
        let found = found.get(key.as_bytes());
        assert_eq!(found.map(|found| &found[..]), Some(value.as_bytes()), "acknowledged: {key}");
    }
    for (counter, (acknowledged, unknown)) in ledger.counted.into_iter().enumerate() {
        let row = rows.get(counter_key(counter)).await.unwrap();
        let number: i64 = row.map_or(0, |row| std::str::from_utf8(&row.value).unwrap().parse().unwrap());
        assert!(
            (acknowledged..=acknowledged + unknown).contains(&number),
            "counter {counter} is {number}; {acknowledged} acknowledged, {unknown} unknown"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_kill_9_of_all_nodes_and_no_increment_is_applied_twice() {
    let mut fleet = Fleet::start(3, &[]).await;
    let mut ledger = Ledger::default();
    for number in 0..ROUNDS {
        round(&mut fleet, number, &mut ledger).await;
        check(&fleet, &ledger).await;
    }
    fleet.healthy().await;
    check(&fleet, &ledger).await;
    assert!(ledger.rows.len() >= ROUNDS * ACKNOWLEDGED_MIN);
    assert!(ledger.counted.iter().all(|(acknowledged, _)| *acknowledged > 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_killed_leader_everything_works_again_within_5_s() {
    const BAR: Duration = Duration::from_secs(5);
    let mut fleet = Fleet::start_alone(3, &[]).await;
    let client = fleet.client().await;
    let rows = client.keyspace("default");
    rows.put("k", "before").await.unwrap();
    let leader = {
        let partitions = client.admin().partitions("default").await.unwrap().partitions;
        let nodes = client.admin().nodes().await.unwrap();
        let leader = nodes.into_iter().filter_map(|status| status.node).find(|node| node.id == partitions[0].leader);
        let address = leader.unwrap().address;
        fleet.addresses().iter().position(|known| *known == address).unwrap()
    };
    fleet.kill([leader]);
    let works_again = async {
        eventually(BAR, "a put", || async { rows.put("k", "after").await.map_err(|error| error.to_string()) }).await;
        let row = rows.get("k").await.unwrap();
        assert_eq!(row.unwrap().value, "after");
        let many = stream::iter(0..100).map(|n| rows.put(format!("k{n}"), "v").into_future());
        let failed = many.buffer_unordered(16).filter(|written| std::future::ready(written.is_err())).count().await;
        assert_eq!(failed, 0);
        assert_eq!(rows.count(..).await.unwrap(), 101);
        let request = meridian::proto::v1::CreateKeyspaceRequest { name: "later".to_owned(), ..Default::default() };
        client.admin().create_keyspace(request).await.unwrap();
        let later = client.keyspace("later");
        eventually(BAR, "a new keyspace", || async { later.put("k", "v").await.map_err(|error| error.to_string()) })
            .await;
    };
    tokio::time::timeout(BAR, works_again).await.expect("within 5 s of the death");
    fleet.start_all();
    fleet.healthy().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_killed_while_the_map_changes_learns_what_it_has_missed() {
    const KEYSPACES: usize = 12;
    let mut fleet = Fleet::start(3, &[]).await;
    // Through another node than the one that is killed: it confirms the map at about the time of the answer.
    let admin = fleet.client_of(vec![fleet.address(0)]).await.admin();
    for n in 0..KEYSPACES {
        let request = meridian::proto::v1::CreateKeyspaceRequest { name: format!("k{n}"), ..Default::default() };
        admin.create_keyspace(request).await.unwrap();
    }
    fleet.healthy().await;
    // A drop is one change of the map, and none follows that would bring it along.
    for n in 0..KEYSPACES {
        assert!(admin.drop_keyspace(&format!("k{n}")).await.unwrap());
        fleet.kill([2]);
        fleet.start_node(2);
        let killed = fleet.client_of(vec![fleet.address(2)]).await.admin();
        let left = KEYSPACES - n;
        eventually(PATIENCE, "the map at the node that was killed", || async {
            let known = killed.keyspaces().await.map_err(|error| error.to_string())?;
            if known.len() == left { Ok(()) } else { Err(format!("{} of {left} keyspaces", known.len())) }
        })
        .await;
    }
    fleet.healthy().await;
}
