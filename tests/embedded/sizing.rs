//! Partitions that hold too much, or are asked too much, are cut without anybody asking, and idle neighbours are merged.

use crate::support::{Cluster, PATIENCE, alone, eventually, pages, put, scan, shared};
use meridian::{
    node::config::{NodeConfig, bounds},
    proto::v1,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

/// Rows written at the least, of about a KiB each: some twenty times what is cut.
const ROWS_MIN: u64 = 1_200;
/// Partitions that come of that, at the least.
const PARTITIONS_MIN: usize = 8;
/// Longest time until work is cut: a hot partition is one that stays hot.
const CUT_WITHIN: Duration = Duration::from_secs(90);

async fn cluster() -> Cluster {
    let template = NodeConfig { split_bytes: bounds::SPLIT_BYTES_MIN, ..NodeConfig::default() };
    Cluster::on_disk_with(3, 3, template).await
}

/// What the placement driver has done about some partition of the keyspace, and why.
async fn decisions(cluster: &Cluster, keyspace: &str) -> Vec<v1::Decision> {
    let mut admin = cluster.admin(0).await;
    let mut all = Vec::new();
    for partition in cluster.partitions(keyspace).await {
        let request = v1::ExplainPartitionRequest { partition: partition.id };
        all.extend(admin.explain_partition(request).await.unwrap().into_inner().decisions);
    }
    all
}

/// Writers that go on until they are stopped; row numbers below what is returned are written.
fn write_on(client: &meridian::client::Client, keyspace: &'static str, stop: &Arc<AtomicBool>) -> JoinSet<()> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..4 {
        let (client, stop, next) = (client.clone(), Arc::clone(stop), Arc::clone(&next));
        tasks.spawn(async move {
            let rows = client.keyspace(keyspace);
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) && n >= ROWS_MIN {
                    return;
                }
                rows.put(format!("{n:06}"), vec![b'v'; 1_000]).deadline(PATIENCE).await.unwrap();
            }
        });
    }
    tasks
}

async fn grows(layout: v1::Layout, keyspace: &'static str) {
    let _turn = shared().await;
    let cluster = cluster().await;
    cluster.create_even(keyspace, 0, layout, 1).await;
    let stop = Arc::default();
    let mut writing = write_on(&cluster.client().await, keyspace, &stop);
    eventually("it is cut again and again", async || {
        (cluster.partitions(keyspace).await.len() >= PARTITIONS_MIN).then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    while let Some(written) = writing.join_next().await {
        written.unwrap();
    }
    let mut kv = cluster.kv(1).await;
    let seen = pages(&mut kv, v1::ScanRequest { page_rows: 100, ..scan(keyspace, None) }).await.unwrap();
    let mut keys: Vec<u64> =
        seen.iter().flat_map(|page| &page.rows).map(|row| crate::support::text(&row.key).parse().unwrap()).collect();
    keys.sort_unstable();
    assert!(keys.len() as u64 >= ROWS_MIN);
    assert!(keys.iter().copied().eq(0..keys.len() as u64), "every row, once");
    let decisions = decisions(&cluster, keyspace).await;
    let cut = decisions.iter().find(|decision| decision.why.contains("and is cut from 65536 on"));
    assert!(cut.is_some_and(|cut| cut.result.starts_with("done: the upper half is ")), "{decisions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordered_keyspace_that_grows_is_cut() {
    grows(v1::Layout::Ordered, "ordered").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hashed_keyspace_that_grows_is_cut() {
    grows(v1::Layout::Hashed, "hashed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neighbours_that_came_of_a_cut_and_have_nothing_to_do_are_merged() {
    let _turn = shared().await;
    let template = NodeConfig { merge_after_ms: bounds::MERGE_AFTER_MS_MIN, ..NodeConfig::default() };
    let cluster = Cluster::on_disk_with(3, 3, template).await;
    cluster.create_even("idle", 0, v1::Layout::Ordered, 1).await;
    cluster.create_even("asked-for", 0, v1::Layout::Hashed, 2).await;
    let mut kv = cluster.kv(0).await;
    for n in 0..20 {
        kv.put(put("idle", &format!("k{n:02}"), "v")).await.unwrap();
    }
    let mut admin = cluster.admin(0).await;
    let request = v1::SplitPartitionRequest { keyspace: "idle".into(), partition: 0, at: "k10".into() };
    admin.split_partition(request).await.unwrap();
    assert_eq!(cluster.partitions("idle").await.len(), 2);
    eventually("they are one again", async || (cluster.partitions("idle").await.len() == 1).then_some(())).await;
    let seen = pages(&mut kv, scan("idle", None)).await.unwrap();
    assert_eq!(seen.iter().flat_map(|page| &page.rows).count(), 20);
    assert_eq!(cluster.partitions("asked-for").await.len(), 2, "it was created so");
    let told = eventually("the reason is told", async || {
        let decisions = decisions(&cluster, "idle").await;
        decisions.into_iter().find(|decision| decision.what.ends_with("is merged into it") && decision.result == "done")
    });
    assert!(told.await.why.contains("were asked little for"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_is_asked_too_much_is_cut_in_the_middle_of_its_work() {
    let _turn = alone().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even("hot", 0, v1::Layout::Ordered, 1).await;
    // Work is counted in bytes as well: these few rows are worth many requests.
    let mut kv = cluster.kv(0).await;
    for n in 0..8 {
        kv.put(put("hot", &format!("k{n}"), &"v".repeat(200 << 10))).await.unwrap();
    }
    let client = cluster.client().await;
    let (stop, mut reading) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    for reader in 0..4 {
        let (client, stop) = (client.clone(), Arc::clone(&stop));
        reading.spawn(async move {
            let rows = client.keyspace("hot");
            let mut n: u32 = reader;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_mul(1_103_515_245).wrapping_add(12_345);
                rows.get(format!("k{}", (n >> 16) % 8)).deadline(PATIENCE).await.unwrap();
            }
        });
    }
    let began = Instant::now();
    while cluster.partitions("hot").await.len() < 2 {
        assert!(began.elapsed() < CUT_WITHIN, "not cut: {:?}", decisions(&cluster, "hot").await);
        sleep(Duration::from_millis(250)).await;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(read) = reading.join_next().await {
        read.unwrap();
    }
    let starts: Vec<_> = cluster.partitions("hot").await.into_iter().map(|partition| partition.start).collect();
    let middle = [b"k2", b"k3", b"k4", b"k5", b"k6"];
    assert!(starts.iter().any(|start| middle.iter().any(|key| start.as_ref() == *key)), "{starts:?}");
}
