//! Partitions are cut while clients work.

use crate::support::{Cluster, PATIENCE, pages, put, refusal, scan, shared, text};
use bytes::Bytes;
use meridian::{client::Reason, proto::v1};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use tokio::task::JoinSet;

/// Counters that are counted up while they are moved about.
const KEYS: u64 = 40;
/// Cuts per keyspace.
const CUTS: usize = 6;

fn key(n: u64) -> String {
    format!("k{:02}", n % KEYS)
}

async fn count_up(cluster: &Cluster, keyspace: &'static str, stop: &Arc<AtomicBool>, tasks: &mut JoinSet<u64>) {
    for worker in 0..3 {
        let client = cluster.client().await;
        let stop = Arc::clone(stop);
        tasks.spawn(async move {
            let counters = client.keyspace(keyspace);
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                counters.increment(key(worker * 7 + done), 1).deadline(PATIENCE).await.unwrap();
                done += 1;
            }
            done
        });
    }
}

/// Every scan sees every key, once and in order.
async fn look(
    cluster: &Cluster,
    keyspace: &'static str,
    stop: &Arc<AtomicBool>,
    scans: &Arc<AtomicU64>,
) -> JoinSet<()> {
    let mut kv = cluster.kv(0).await;
    let (stop, scans) = (Arc::clone(stop), Arc::clone(scans));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let expected: Vec<String> = (0..KEYS).map(key).collect();
        while !stop.load(Ordering::Relaxed) {
            let request = v1::ScanRequest { page_rows: 3, ..scan(keyspace, None) };
            let seen = pages(&mut kv, request).await.unwrap();
            let mut keys: Vec<String> = seen.iter().flat_map(|page| &page.rows).map(|row| text(&row.key)).collect();
            keys.sort();
            assert_eq!(keys, expected);
            scans.fetch_add(1, Ordering::Relaxed);
        }
    });
    tasks
}

async fn cut_under_load(layout: v1::Layout, keyspace: &'static str) {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even(keyspace, 0, layout, 1).await;
    let mut kv = cluster.kv(0).await;
    for n in 0..KEYS {
        kv.put(put(keyspace, &key(n), "0")).await.unwrap();
    }
    let (stop, scans) = (Arc::default(), Arc::default());
    let mut counting = JoinSet::new();
    count_up(&cluster, keyspace, &stop, &mut counting).await;
    let mut looking = look(&cluster, keyspace, &stop, &scans).await;
    let mut admin = cluster.admin(1).await;
    for n in 0..CUTS {
        // The first in its middle, the others at a key.
        let partition = if n == 0 { cluster.partitions(keyspace).await[0].id } else { 0 };
        let at = if n == 0 { Bytes::new() } else { key(n as u64 * 5 + 3).into() };
        let request = v1::SplitPartitionRequest { keyspace: keyspace.into(), partition, at };
        let reply = admin.split_partition(request).await.unwrap().into_inner();
        assert!(reply.partition == partition || partition == 0);
    }
    stop.store(true, Ordering::Relaxed);
    let mut wanted = 0;
    while let Some(done) = counting.join_next().await {
        wanted += done.unwrap();
    }
    looking.join_next().await.unwrap().unwrap();
    assert!(wanted > 0 && scans.load(Ordering::Relaxed) > 0);
    assert_eq!(cluster.partitions(keyspace).await.len(), CUTS + 1);
    let rows = pages(&mut kv, scan(keyspace, None)).await.unwrap();
    let sum: u64 = rows.iter().flat_map(|page| &page.rows).map(|row| text(&row.value).parse::<u64>().unwrap()).sum();
    assert_eq!(sum, wanted, "every increment counts once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordered_keyspace_is_cut_under_load() {
    cut_under_load(v1::Layout::Ordered, "ordered").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hashed_keyspace_is_cut_under_load() {
    cut_under_load(v1::Layout::Hashed, "hashed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_cut_says_why() {
    let _turn = shared().await;
    let cluster = Cluster::start(1, 1).await;
    let mut admin = cluster.admin(0).await;
    let split = |keyspace: &str, partition, at: &'static [u8]| v1::SplitPartitionRequest {
        keyspace: keyspace.into(),
        partition,
        at: Bytes::from_static(at),
    };
    let nothing = refusal(admin.split_partition(split("", 0, b"")).await);
    assert_eq!((nothing.reason, &*nothing.field), (Reason::InvalidField, "partition"));
    let unknown = refusal(admin.split_partition(split("", 99, b"k")).await);
    assert_eq!(unknown.reason, Reason::InvalidField);
    assert!(unknown.message.contains("99"), "{}", unknown.message);
    assert_eq!(refusal(admin.split_partition(split("none", 0, b"k")).await).reason, Reason::KeyspaceUnknown);
    let id = cluster.partitions("default").await[0].id;
    let empty = refusal(admin.split_partition(split("", id, b"")).await);
    assert!(empty.message.contains("no two rows"), "{}", empty.message);
    admin.split_partition(split("", 0, b"m")).await.unwrap();
    let outside = refusal(admin.split_partition(split("", id, b"x")).await);
    assert!(outside.message.contains("between"), "{}", outside.message);
}
