//! Members that die: what goes on, what fails how fast, and scans in the middle of it.

use crate::{
    acceptance::every_operation,
    support::{Cluster, alone, between, eventually, get, keys_of, level, pages, put, refusal, scan, shared, text},
};
use futures_util::TryStreamExt as _;
use meridian::{
    client::{Outcome, Reason},
    proto::{error_of, v1},
};
use std::{collections::BTreeSet, time::Duration};
use tokio::time::Instant;
use tonic::transport::Channel;
use v1::kv_client::KvClient;

/// With a quorum everything works again this long after a death.
const RECOVERED_WITHIN: Duration = Duration::from_secs(5);
/// Without one, eventual reads answer within this.
const EVENTUAL_WITHIN: Duration = Duration::from_secs(1);
/// Without one, everything else fails within this.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);

/// A cluster of as many nodes as replicas, a keyspace `rows` in three partitions, and rows in each.
async fn with_rows(replicas: usize) -> Cluster {
    let cluster = Cluster::start(replicas, replicas as u32).await;
    cluster.create_cut("rows", &["h", "p"], 0).await;
    // Each operation leaves no row of its own: a keyspace apart lets them see that.
    cluster.create_cut("all", &["h", "p"], 0).await;
    let mut kv = cluster.kv(0).await;
    for key in ["before a", "i before", "q before"] {
        kv.put(put("rows", key, "kept")).await.unwrap();
    }
    // An eventual read of any member is to find them: a replica may be behind by one.
    for index in 0..replicas {
        let mut pipe = cluster.pipe(index).await;
        for partition in cluster.partitions("rows").await {
            let read = level(v1::Consistency::Linearizable);
            let request = v1::CountRequest { keyspace: "rows".into(), options: read, ..Default::default() };
            let count = count_from(request, &partition);
            eventually("a replica that has heard of its leader", async || {
                pipe.routed(partition.id, v1::request::Op::Count(count.clone())).await.ok()
            })
            .await;
        }
    }
    cluster
}

/// A count of one partition.
fn count_from(request: v1::CountRequest, partition: &v1::Partition) -> v1::CountRequest {
    let lower = Some(v1::Bound { key: partition.start.clone(), inclusive: true });
    v1::CountRequest { range: Some(v1::KeyRange { lower, upper: None }), ..request }
}

async fn everything_works_in_time(cluster: &Cluster, died: Instant) {
    for index in cluster.living() {
        let mut kv = cluster.kv(index).await;
        every_operation(&mut kv, "all").await;
        for key in ["before a", "i before", "q before"] {
            let reply = kv.get(get("rows", key, None)).await.unwrap().into_inner();
            assert_eq!(reply.row.unwrap().value, "kept");
        }
    }
    assert!(died.elapsed() <= RECOVERED_WITHIN, "everything works only {:?} after the death", died.elapsed());
}

async fn eventual_reads_answer_in_time(kv: &mut KvClient<Channel>) {
    let eventual = level(v1::Consistency::Eventual);
    for key in ["before a", "i before", "q before"] {
        let began = Instant::now();
        let reply = kv.get(get("rows", key, eventual.clone())).await.unwrap().into_inner();
        assert!(began.elapsed() <= EVENTUAL_WITHIN, "an eventual get took {:?}", began.elapsed());
        assert_eq!(reply.row.unwrap().value, "kept");
        let read = reply.read.unwrap();
        assert_eq!(read.consistency(), v1::Consistency::Eventual);
        assert_eq!(read.staleness.unwrap().known, Some(v1::staleness::Known::Unknown(true)));
    }
    let began = Instant::now();
    let all = pages(kv, v1::ScanRequest { options: eventual, ..scan("rows", None) }).await.unwrap();
    assert!(began.elapsed() <= EVENTUAL_WITHIN, "an eventual scan took {:?}", began.elapsed());
    assert_eq!(keys_of(&all), ["before a", "i before", "q before"]);
}

/// Everything that needs a quorum fails in time, with what a person needs to know.
async fn the_rest_is_refused_in_time(cluster: &Cluster, kv: &mut KvClient<Channel>, first: bool) {
    let members = cluster.partitions("rows").await.remove(0).replicas;
    let (mut reader, mut scanner) = (kv.clone(), kv.clone());
    let began = Instant::now();
    let (write, read, ranged) = tokio::join!(
        async {
            let refused = refusal(kv.put(put("rows", "i after", "x")).await);
            (refused, began.elapsed())
        },
        async {
            let refused = refusal(reader.get(get("rows", "i before", None)).await);
            (refused, began.elapsed())
        },
        async {
            let refused = error_of(&pages(&mut scanner, scan("rows", None)).await.unwrap_err());
            (refused, began.elapsed())
        },
    );
    for (what, (error, took)) in [("put", &write), ("get", &read), ("scan", &ranged)] {
        assert!(*took <= REFUSED_WITHIN, "a {what} without a quorum failed only after {took:?}: {error:?}");
    }
    for (error, _) in [&read, &ranged] {
        assert_eq!((error.reason, error.outcome), (Reason::NoQuorum, None), "{error}");
        names_members_and_hint(error, &members);
    }
    // The first write may have been on its way to a follower when it died; nothing later can have been.
    let (write, _) = &write;
    let unknown = first && write.reason == Reason::OutcomeUnknown && write.outcome == Some(Outcome::Unknown);
    if !unknown {
        assert_eq!((write.reason, write.outcome), (Reason::NoQuorum, Some(Outcome::NotApplied)), "{write}");
        names_members_and_hint(write, &members);
    }
}

fn names_members_and_hint(error: &meridian::error::Error, members: &[v1::Replica]) {
    let whole = format!("{} {:?}", error.message, error.metadata);
    for member in members {
        assert!(whole.contains(&format!("n{}", member.node)), "member {} is not named: {whole}", member.node);
    }
    assert!(whole.contains("ms ago"), "when they were last heard of is not said: {whole}");
    assert!(whole.to_uppercase().contains("EVENTUAL"), "what would still work is not said: {whole}");
    assert!(error.retry_after_ms > 0, "when to try again is not said: {whole}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_dead_of_three_everything_works_within_5_s() {
    let _turn = alone().await;
    let mut cluster = with_rows(3).await;
    let leader = cluster.index_of(cluster.led("rows").await.leader);
    cluster.dev.kill(leader);
    everything_works_in_time(&cluster, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_dead_of_three_eventual_reads_answer_within_1_s_and_the_rest_is_refused_within_2_s() {
    let _turn = alone().await;
    let mut cluster = with_rows(3).await;
    let leader = cluster.index_of(cluster.led("rows").await.leader);
    let mut kv = cluster.kv((leader + 1) % 3).await;
    for index in [leader, (leader + 2) % 3] {
        cluster.dev.kill(index);
    }
    eventual_reads_answer_in_time(&mut kv).await;
    the_rest_is_refused_in_time(&cluster, &mut kv, true).await;
    the_rest_is_refused_in_time(&cluster, &mut kv, false).await;
    eventual_reads_answer_in_time(&mut kv).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_left_alone_of_three_refuses_within_2_s_too() {
    let _turn = alone().await;
    let mut cluster = with_rows(3).await;
    let leader = cluster.index_of(cluster.led("rows").await.leader);
    let mut kv = cluster.kv(leader).await;
    for index in (0..3).filter(|index| *index != leader) {
        cluster.dev.kill(index);
    }
    the_rest_is_refused_in_time(&cluster, &mut kv, true).await;
    the_rest_is_refused_in_time(&cluster, &mut kv, false).await;
    eventual_reads_answer_in_time(&mut kv).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_five_two_may_die_for_everything_and_four_for_eventual_reads() {
    let _turn = alone().await;
    let mut cluster = with_rows(5).await;
    let leader = cluster.index_of(cluster.led("rows").await.leader);
    let [second, third, last, keeper] = [1, 2, 3, 4].map(|step| (leader + step) % 5);
    let died = Instant::now();
    cluster.dev.kill(leader);
    cluster.dev.kill(second);
    everything_works_in_time(&cluster, died).await;
    let mut kv = cluster.kv(keeper).await;
    cluster.dev.kill(third);
    eventual_reads_answer_in_time(&mut kv).await;
    the_rest_is_refused_in_time(&cluster, &mut kv, true).await;
    the_rest_is_refused_in_time(&cluster, &mut kv, false).await;
    cluster.dev.kill(last);
    eventual_reads_answer_in_time(&mut kv).await;
}

/// Rows per partition, and bytes per row, of the scans below: far more than a connection buffers.
const ROWS: usize = 1_500;
const VALUE_BYTES: usize = 2_000;

/// A keyspace `long` of three partitions with many large rows; answers with its keys in order.
async fn with_long_partitions(cluster: &Cluster, name: &str, layout: v1::Layout) -> Vec<String> {
    match layout {
        v1::Layout::Hashed => cluster.create_even(name, 0, layout, 3).await,
        _ => cluster.create_cut(name, &["b", "c"], 3).await,
    }
    let rows = cluster.client().await.keyspace(name);
    let value = vec![b'v'; VALUE_BYTES];
    let mut keys = Vec::new();
    for first in ["a", "b", "c"] {
        let mut of_partition: Vec<String> = (0..ROWS).map(|n| format!("{first} {n:05}")).collect();
        for chunk in of_partition.chunks(500) {
            let batch = chunk.iter().fold(rows.batch(), |batch, key| batch.put(key, &value[..]));
            let written = batch.await.unwrap();
            assert!(written.applied, "{:?}", written.items.iter().find(|item| item.is_err()));
        }
        keys.append(&mut of_partition);
    }
    keys
}

/// Streams everything through a node, and kills the leader of the scan's last partition after the first page.
async fn streams_through_a_death(layout: v1::Layout, order: v1::Order) {
    let mut cluster = Cluster::start(3, 3).await;
    let mut want = with_long_partitions(&cluster, "long", layout).await;
    if order == v1::Order::Descending {
        want.reverse();
    }
    let partitions = cluster.partitions("long").await;
    let last = if order == v1::Order::Descending { &partitions[0] } else { &partitions[2] };
    let leader = cluster.index_of(last.leader);
    let mut kv = cluster.kv((leader + 1) % 3).await;
    let request = v1::ScanRequest { page_rows: 100, order: order as i32, ..scan("long", None) };
    let mut stream = kv.scan_stream(request).await.unwrap().into_inner();
    let mut got = vec![stream.message().await.unwrap().unwrap()];
    cluster.dev.kill(leader);
    while let Some(page) = stream.message().await.unwrap() {
        got.push(page);
    }
    assert!(got.last().unwrap().next_page_token.is_empty());
    assert_same(&keys_of(&got), &want);
    let reads = got.iter().flat_map(|page| &page.reads);
    let after = reads.filter(|read| read.partition == last.id && read.node != cluster.id_of(leader)).count();
    assert!(after > 0, "the scan was over before the leader died: nothing was shown");
}

#[track_caller]
fn assert_same(got: &[String], want: &[String]) {
    if got != want {
        let at = got.iter().zip(want).position(|(got, want)| got != want).unwrap_or_else(|| got.len().min(want.len()));
        panic!("{} rows, {} wanted; at {at}: {:?} for {:?}", got.len(), want.len(), got.get(at), want.get(at));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_in_mid_scan_leaves_no_gap_and_no_duplicate() {
    let _turn = shared().await;
    streams_through_a_death(v1::Layout::Ordered, v1::Order::Ascending).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_in_mid_scan_backwards_leaves_no_gap_and_no_duplicate() {
    let _turn = shared().await;
    streams_through_a_death(v1::Layout::Ordered, v1::Order::Descending).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_in_mid_scan_of_a_hashed_keyspace_leaves_no_gap_and_no_duplicate() {
    let _turn = shared().await;
    streams_through_a_death(v1::Layout::Hashed, v1::Order::Ascending).await;
}

/// The node that streams dies: the last token goes on at another node; the library does the same by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_goes_on_by_token_at_another_node_and_in_the_library_by_itself() {
    let _turn = shared().await;
    let mut cluster = Cluster::start(3, 3).await;
    let want = with_long_partitions(&cluster, "long", v1::Layout::Ordered).await;
    let client = cluster.client().await;
    let rows = client.keyspace("long");
    let mut library = rows.scan(..).page_rows(100).rows();
    let mut by_library = vec![text(&library.try_next().await.unwrap().unwrap().key)];
    let victim = cluster.index_of(cluster.partitions("long").await[1].leader);
    let request = v1::ScanRequest { page_rows: 100, ..scan("long", None) };
    let mut stream = cluster.kv(victim).await.scan_stream(request.clone()).await.unwrap().into_inner();
    let mut got = vec![stream.message().await.unwrap().unwrap()];
    cluster.dev.kill(victim);
    while let Ok(Some(page)) = stream.message().await {
        got.push(page);
    }
    let page_token = got.last().unwrap().next_page_token.clone();
    assert!(!page_token.is_empty(), "the stream was over before its node died: nothing was shown");
    let mut kv = cluster.kv((victim + 1) % 3).await;
    got.extend(pages(&mut kv, v1::ScanRequest { page_token, ..request }).await.unwrap());
    assert_same(&keys_of(&got), &want);
    while let Some(row) = library.try_next().await.unwrap() {
        by_library.push(text(&row.key));
    }
    assert_same(&by_library, &want);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skip_leaves_out_what_cannot_answer_and_names_the_missing_range() {
    let _turn = shared().await;
    let mut cluster = Cluster::start(3, 3).await;
    // One replica each: a death takes whole partitions away.
    cluster.create_cut("rows", &["b", "c", "d", "e", "f"], 1).await;
    let mut kv = cluster.kv(0).await;
    for key in ["a", "b", "c", "d", "e", "f"] {
        kv.put(put("rows", key, "v")).await.unwrap();
    }
    let partitions = cluster.partitions("rows").await;
    let victim = (0..3).rev().find(|index| {
        let here = partitions.iter().filter(|p| p.replicas[0].node == cluster.id_of(*index)).count();
        here > 0 && here < partitions.len()
    });
    let victim = victim.expect("six partitions do not all lie on one node");
    let lost: Vec<_> = partitions.iter().filter(|p| p.replicas[0].node == cluster.id_of(victim)).collect();
    let want: Vec<String> = partitions
        .iter()
        .zip(["a", "b", "c", "d", "e", "f"])
        .filter(|(p, _)| p.replicas[0].node != cluster.id_of(victim))
        .map(|(_, key)| key.to_owned())
        .collect();
    cluster.dev.kill(victim);
    for index in cluster.living() {
        let mut kv = cluster.kv(index).await;
        assert!(pages(&mut kv, scan("rows", None)).await.is_err(), "without being asked nothing is left out");
        for order in [v1::Order::Ascending, v1::Order::Descending] {
            let skip = v1::OnPartitionFailure::Skip as i32;
            let request = v1::ScanRequest { on_partition_failure: skip, order: order as i32, ..scan("rows", None) };
            let got = pages(&mut kv, request).await.unwrap();
            let keys: BTreeSet<String> = keys_of(&got).into_iter().collect();
            assert_eq!(keys.into_iter().collect::<Vec<_>>(), want);
            let missing: Vec<_> = got.iter().flat_map(|page| &page.missing).collect();
            for partition in &lost {
                let named = missing.iter().find(|missing| missing.partition == partition.id);
                let named = named.unwrap_or_else(|| panic!("partition {} is not named: {missing:?}", partition.id));
                assert_eq!(named.range, range_of(partition), "the interval left out is that of the partition");
                assert!(named.error.as_ref().is_some_and(|error| !error.reason.is_empty()), "and why");
            }
            assert_eq!(missing.len(), lost.len());
        }
    }
    // A part of a partition that is asked for is what is named, not all of it.
    let mut kv = cluster.kv(cluster.living()[0]).await;
    let partition = lost[0];
    let low = if partition.start.is_empty() { b"0".to_vec() } else { [&partition.start[..], b"5"].concat() };
    let high = [&low[..], b"9"].concat();
    let skip = v1::OnPartitionFailure::Skip as i32;
    let range = between((&low, true), (&high, false));
    let request = v1::ScanRequest { on_partition_failure: skip, ..scan("rows", range.clone()) };
    let got = pages(&mut kv, request).await.unwrap();
    let missing: Vec<_> = got.iter().flat_map(|page| &page.missing).collect();
    assert_eq!((missing.len(), &missing[0].range), (1, &range));
}

/// The keys of a partition as a range.
fn range_of(partition: &v1::Partition) -> Option<v1::KeyRange> {
    let bound = |key: &bytes::Bytes, inclusive| (!key.is_empty()).then(|| v1::Bound { key: key.clone(), inclusive });
    Some(v1::KeyRange { lower: bound(&partition.start, true), upper: bound(&partition.end, false) })
}

/// A member that was dead comes back and takes part again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_dead_are_back_writes_work_and_nothing_acknowledged_is_missing() {
    let _turn = shared().await;
    let mut cluster = Cluster::on_disk(3, 3).await;
    cluster.create_cut("rows", &[], 3).await;
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let client = cluster.client().await;
        let rows = client.keyspace("rows");
        for n in 0..20 {
            let key = format!("{round} {n:02}");
            rows.put(&key, "v").await.unwrap();
            acknowledged.push(key);
        }
        let first = cluster.kill_leader("rows").await;
        let second = cluster.living()[0];
        cluster.dev.kill(second);
        for index in [first, second] {
            cluster.dev.restart(index).await.unwrap();
        }
        cluster.dev.healthy().await.unwrap();
    }
    let mut kv = cluster.kv(0).await;
    let all = eventually("a linearizable scan", async || pages(&mut kv, scan("rows", None)).await.ok()).await;
    assert_same(&keys_of(&all), &acknowledged);
}
