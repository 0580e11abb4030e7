//! Partitions are cut and merged while clients work.

use crate::support::{Cluster, PATIENCE, eventually, get, increment, level, pages, put, refusal, scan, shared, text};
use bytes::Bytes;
use meridian::{
    client::Reason,
    placement::limits::MERGE_BYTES_MAX,
    proto::v1::{self, Consistency as Level},
};
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

/// Does something to the only partition of a keyspace while it is counted up and scanned: every increment counts once,
/// and every scan sees all.
async fn under_load(layout: v1::Layout, keyspace: &'static str, work: impl AsyncFnOnce(&Cluster)) {
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
    work(&cluster).await;
    stop.store(true, Ordering::Relaxed);
    let mut wanted = 0;
    while let Some(done) = counting.join_next().await {
        wanted += done.unwrap();
    }
    looking.join_next().await.unwrap().unwrap();
    assert!(wanted > 0 && scans.load(Ordering::Relaxed) > 0);
    let rows = pages(&mut kv, scan(keyspace, None)).await.unwrap();
    let sum: u64 = rows.iter().flat_map(|page| &page.rows).map(|row| text(&row.value).parse::<u64>().unwrap()).sum();
    assert_eq!(sum, wanted, "every increment counts once");
}

/// The first cut in the middle, the others at a key.
async fn cut(cluster: &Cluster, keyspace: &'static str) {
    let mut admin = cluster.admin(1).await;
    for n in 0..CUTS {
        let partition = if n == 0 { cluster.partitions(keyspace).await[0].id } else { 0 };
        let at = if n == 0 { Bytes::new() } else { key(n as u64 * 5 + 3).into() };
        let request = v1::SplitPartitionRequest { keyspace: keyspace.into(), partition, at };
        let reply = admin.split_partition(request).await.unwrap().into_inner();
        assert!(reply.partition == partition || partition == 0);
    }
    assert_eq!(cluster.partitions(keyspace).await.len(), CUTS + 1);
}

/// Merges all into one again, each with the one after it or the one before it.
async fn mend(cluster: &Cluster, keyspace: &'static str) {
    let mut admin = cluster.admin(2).await;
    for n in (1..=CUTS).rev() {
        // Another node's map may be one step behind.
        let ids = eventually("the last merge is known", async || {
            let ids: Vec<u64> = cluster.partitions(keyspace).await.iter().map(|partition| partition.id).collect();
            (ids.len() == n + 1).then_some(ids)
        });
        let ids = ids.await;
        let (left, right) = (ids[n / 2], ids[n / 2 + 1]);
        let (partition, with) = if n % 2 == 0 { (right, left) } else { (left, 0) };
        let reply = admin.merge_partition(v1::MergePartitionRequest { partition, with }).await.unwrap().into_inner();
        assert_eq!((reply.partition, reply.absorbed), (left, right));
    }
    eventually("all is one", async || (cluster.partitions(keyspace).await.len() == 1).then_some(())).await;
}

async fn cut_and_mend(cluster: &Cluster, keyspace: &'static str) {
    cut(cluster, keyspace).await;
    mend(cluster, keyspace).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordered_keyspace_is_cut_and_merged_under_load() {
    under_load(v1::Layout::Ordered, "ordered", async |cluster| cut_and_mend(cluster, "ordered").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hashed_keyspace_is_cut_and_merged_under_load() {
    under_load(v1::Layout::Hashed, "hashed", async |cluster| cut_and_mend(cluster, "hashed").await).await;
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

/// What a session has seen of the partition that is gone is in the one that took it in, on every replica; a repeated write
/// is answered again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_and_a_repetition_outlive_a_merge() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("rows", &["m"], 3).await;
    let [left, right] = cluster.partitions("rows").await.iter().map(|p| p.id).collect::<Vec<_>>().try_into().unwrap();
    let opened = cluster.kv(0).await.open_session(v1::OpenSessionRequest {}).await.unwrap().into_inner();
    let v1::OpenSessionReply { client_id, opened } = opened;
    let session = Some(v1::WriteSession { client_id, opened, sequence: 1, acknowledged_below: 1 });
    let increment = v1::IncrementRequest { session, ..increment("rows", "z", 5) };
    let first = cluster.kv(1).await.increment(increment.clone()).await.unwrap().into_inner();
    let session_token = first.info.unwrap().session_token;
    let merge = v1::MergePartitionRequest { partition: left, with: right };
    cluster.admin(0).await.merge_partition(merge).await.unwrap();
    let options = Some(v1::ReadOptions { session_token, ..level(Level::Session).unwrap() });
    for index in 0..3 {
        let mut kv = cluster.kv(index).await;
        let seen = kv.get(get("rows", "z", options.clone())).await.unwrap().into_inner();
        assert_eq!(seen.row.unwrap().value, "5", "through node {index}");
        let again = kv.increment(increment.clone()).await.unwrap().into_inner();
        assert_eq!((again.info.unwrap().replayed, again.number), (true, Some(5)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_merged_says_why() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("rows", &["g", "n"], 3).await;
    let mut admin = cluster.admin(0).await;
    let [first, second, last] =
        cluster.partitions("rows").await.iter().map(|p| p.id).collect::<Vec<_>>().try_into().unwrap();
    let elsewhere = cluster.partitions("default").await[0].id;
    let cases = [
        (0, 0, "name a partition"),
        (99, 0, "no partition"),
        (first, 99, "no partition"),
        (last, 0, "the last of its keyspace"),
        (first, last, "does not begin where"),
        (first, elsewhere, "different keyspaces"),
    ];
    for (partition, with, why) in cases {
        let refused = refusal(admin.merge_partition(v1::MergePartitionRequest { partition, with }).await);
        assert_eq!(refused.reason, Reason::InvalidField);
        assert!(refused.message.contains(why), "{}", refused.message);
    }
    let mut kv = cluster.kv(0).await;
    let value = "v".repeat(1 << 20);
    let most = MERGE_BYTES_MAX >> 20;
    for n in 0..most {
        kv.put(put("rows", &format!("h{n}"), &value)).await.unwrap();
        kv.put(put("rows", &format!("z{n}"), &value)).await.unwrap();
    }
    let merge = |partition| v1::MergePartitionRequest { partition, with: 0 };
    let large = refusal(admin.merge_partition(merge(second)).await);
    assert!(large.message.contains(&MERGE_BYTES_MAX.to_string()), "{}", large.message);
    // Nearly as large as it may be.
    kv.delete(v1::DeleteRequest { keyspace: "rows".into(), key: "h0".into(), ..Default::default() }).await.unwrap();
    admin.merge_partition(merge(first)).await.unwrap();
    let rows = pages(&mut kv, v1::ScanRequest { keys_only: true, ..scan("rows", None) }).await.unwrap();
    assert_eq!(rows.iter().map(|page| page.rows.len() as u64).sum::<u64>(), 2 * most - 1);
}
