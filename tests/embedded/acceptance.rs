//! The operations of the three descriptions that the assignment merges, as their users would check them.

use crate::support::{
    Cluster, between, eventually, get, increment, keys_of, level, pages, put, reason, refusal, scan, shared, text,
};
use futures_util::TryStreamExt as _;
use meridian::{
    client::{Consistency, Outcome, Reason},
    key::integer_key,
    proto::v1,
};
use std::collections::BTreeSet;

/// S0: string keys, inclusive ranges, over partitions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inclusive_string_ranges_are_whole_sorted_and_without_duplicates_over_partitions() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("words", &["b", "c", "m"], 3).await;
    let words = cluster.client().await.keyspace("words");
    let keys = ["", "a", "aa", "az", "b", "b\u{0}", "bz", "c", "c\u{0}", "ca", "m", "z", "ä"];
    for key in keys {
        words.put(key, format!("value of {key}")).await.unwrap();
    }
    let (low, high) = (("a".as_bytes(), true), ("c".as_bytes(), true));
    let want = ["a", "aa", "az", "b", "b\u{0}", "bz", "c"];
    for index in 0..3 {
        let mut kv = cluster.kv(index).await;
        let all = pages(&mut kv, scan("words", between(low, high))).await.unwrap();
        assert_eq!(keys_of(&all), want);
        let partitions: BTreeSet<u64> = all.iter().flat_map(|page| &page.reads).map(|read| read.partition).collect();
        assert_eq!(partitions.len(), 3, "the range lies in three partitions");
        let values: Vec<_> = all.iter().flat_map(|page| &page.rows).map(|row| text(&row.value)).collect();
        assert_eq!(values, want.map(|key| format!("value of {key}")));
        let everything = pages(&mut kv, scan("words", None)).await.unwrap();
        assert_eq!(keys_of(&everything), keys);
    }
    let rows = words.scan("a"..="c").await.unwrap();
    assert_eq!(rows.iter().map(|row| text(&row.key)).collect::<Vec<_>>(), want);
    let backwards: Vec<_> = words.scan("a"..="c").reverse().rows().try_collect().await.unwrap();
    assert_eq!(backwards.iter().map(|row| text(&row.key)).rev().collect::<Vec<_>>(), want);
}

/// S1: integer keys, half-open ranges.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_integer_ranges_and_their_edges() {
    let _turn = shared().await;
    const M: u64 = 1_000;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even("numbers", M, v1::Layout::Ordered, 4).await;
    let numbers = cluster.client().await.integer_keyspace("numbers");
    for n in (0..M).step_by(10) {
        numbers.put(n, n.to_string()).await.unwrap();
    }
    let keys = async |range: std::ops::Range<u64>| {
        let rows = numbers.scan(range).await?;
        Ok::<_, meridian::client::Error>(rows.into_iter().map(|row| row.key).collect::<Vec<u64>>())
    };
    assert_eq!(keys(240..270).await.unwrap(), [240, 250, 260], "over the cut at 250, the end left out");
    assert_eq!(keys(0..M).await.unwrap(), (0..M).step_by(10).collect::<Vec<_>>());
    assert!(keys(240..240).await.unwrap().is_empty(), "start = end is empty");
    assert!(keys(M..M).await.unwrap().is_empty(), "M itself may be an end");
    assert!(keys(241..250).await.unwrap().is_empty(), "nothing lies there: empty, not an error");
    #[expect(clippy::reversed_empty_ranges, reason = "the answer to it is what is tested")]
    let inverted = keys(250..240).await.unwrap_err();
    assert_eq!(inverted.reason(), Reason::RangeInverted);
    let facts: Vec<_> = inverted.facts().map(|(name, _)| name).collect();
    assert!(facts.contains(&"lower") && facts.contains(&"upper"), "both ends are named: {facts:?}");
    assert_eq!(keys(0..M + 1).await.unwrap_err().reason(), Reason::KeyOutOfDomain);
    for key in [M, M + 1, u64::MAX] {
        assert_eq!(numbers.get(key).await.unwrap_err().reason(), Reason::KeyOutOfDomain);
        let refused = numbers.put(key, "").await.unwrap_err();
        assert_eq!((refused.reason(), refused.outcome()), (Reason::KeyOutOfDomain, Some(Outcome::NotApplied)));
        assert_eq!(numbers.delete(key).await.unwrap_err().reason(), Reason::KeyOutOfDomain);
    }
    // The same for users of other languages, at every node.
    for index in 0..3 {
        let mut kv = cluster.kv(index).await;
        let range = |low: u64, high: u64| between((&integer_key(low), true), (&integer_key(high), false));
        let page = kv.scan(scan("numbers", range(240, 240))).await.unwrap().into_inner();
        assert!(page.rows.is_empty() && page.next_page_token.is_empty());
        assert_eq!(reason(kv.scan(scan("numbers", range(250, 240))).await), Reason::RangeInverted);
        assert_eq!(reason(kv.scan(scan("numbers", range(0, M + 1))).await), Reason::KeyOutOfDomain);
        let get = v1::GetRequest { keyspace: "numbers".into(), key: integer_key(M), options: None };
        assert_eq!(reason(kv.get(get).await), Reason::KeyOutOfDomain);
    }
}

/// S2: what is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_rows_are_answers_and_a_deleted_row_is_absent_on_every_replica() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("rows", &[], 3).await;
    let partition = cluster.led("rows").await.id;
    for index in 0..3 {
        let mut kv = cluster.kv(index).await;
        let absent = kv.get(get("rows", "nobody", None)).await.unwrap().into_inner();
        assert!(!absent.found && absent.row.is_none(), "absent is found = false with status OK");
        let delete = |must_exist| v1::DeleteRequest {
            keyspace: "rows".into(),
            key: "nobody".into(),
            must_exist,
            ..Default::default()
        };
        let deleted = kv.delete(delete(false)).await.unwrap().into_inner();
        assert!(deleted.applied && !deleted.existed);
        let refused = refusal(kv.delete(delete(true)).await);
        assert_eq!((refused.reason, refused.outcome), (Reason::NotFound, Some(Outcome::NotApplied)));
    }
    let mut kv = cluster.kv(0).await;
    kv.put(put("rows", "gone", "soon")).await.unwrap();
    let delete = v1::DeleteRequest { keyspace: "rows".into(), key: "gone".into(), ..Default::default() };
    let deleted = kv.delete(delete).await.unwrap().into_inner();
    assert!(deleted.applied && deleted.existed);
    for index in 0..3 {
        let mut pipe = cluster.pipe(index).await;
        // A replica of a new partition may not have heard of its leader yet.
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(5);
        let own = loop {
            match pipe.get(partition, get("rows", "gone", level(v1::Consistency::Linearizable))).await {
                Err(error) if error.reason == "LEADER_UNKNOWN" && tokio::time::Instant::now() < deadline => {}
                answer => break answer.unwrap(),
            }
        };
        assert_eq!(own.read.unwrap().node, cluster.id_of(index), "this replica itself has answered");
        assert!(!own.found, "node {index} still has the row");
        let eventual = cluster.kv(index).await.get(get("rows", "gone", level(v1::Consistency::Eventual))).await;
        assert!(!eventual.unwrap().into_inner().found);
    }
}

/// S2: a get on any replica finds what that replica has missed; here it asks the leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_eventual_get_right_after_the_write_finds_the_row_through_every_node() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("rows", &[], 3).await;
    let mut kvs = vec![cluster.kv(0).await, cluster.kv(1).await, cluster.kv(2).await];
    for round in 0..200 {
        let key = format!("row {round}");
        kvs[round % 3].put(put("rows", &key, "there")).await.unwrap();
        for kv in &mut kvs {
            let reply = kv.get(get("rows", &key, level(v1::Consistency::Eventual))).await.unwrap().into_inner();
            assert!(reply.found, "{key} is acknowledged; missed by {:?}", reply.read);
        }
    }
}

/// S2: the same without a leader: the other members are asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_eventual_get_finds_a_row_that_its_replica_has_missed() {
    let _turn = shared().await;
    let mut cluster = Cluster::on_disk(5, 5).await;
    cluster.create_cut("rows", &[], 5).await;
    let partition = cluster.led("rows").await.id;
    let leader = cluster.index_of(cluster.led("rows").await.leader);
    let missed = (leader + 1) % 5;
    cluster.dev.kill(missed);
    let through = cluster.living()[0];
    cluster.kv(through).await.put(put("rows", "late", "there")).await.unwrap();
    // One member that has the row stays; with the one that missed it that is no quorum, so nobody can catch up.
    let keeper = (leader + 2) % 5;
    let mut pipe = cluster.pipe(keeper).await;
    eventually("the row on the member that stays", async || {
        let own = pipe.get(partition, get("rows", "late", level(v1::Consistency::Eventual))).await.unwrap();
        own.found.then_some(())
    })
    .await;
    for index in (0..5).filter(|index| *index != missed && *index != keeper) {
        cluster.dev.kill(index);
    }
    cluster.dev.restart(missed).await.unwrap();
    let mut pipe = eventually("the member that is back hosts its replica", async || {
        let mut pipe = cluster.pipe(missed).await;
        let own = pipe.get(partition, get("rows", "late", level(v1::Consistency::Eventual))).await;
        own.is_ok().then_some(pipe)
    })
    .await;
    let own = pipe.get(partition, get("rows", "late", level(v1::Consistency::Eventual))).await.unwrap();
    assert!(!own.found, "this replica has missed the row");
    let mut kv = cluster.kv(missed).await;
    // The connection between the two may still be coming up.
    let reply = eventually("the row by way of the other member", async || {
        let reply = kv.get(get("rows", "late", level(v1::Consistency::Eventual))).await.unwrap().into_inner();
        reply.found.then_some(reply)
    })
    .await;
    let read = reply.read.unwrap();
    assert_eq!(read.node, cluster.id_of(keeper), "the reply says who had it");
    assert_eq!(read.consistency(), v1::Consistency::Eventual);
    let weak = v1::ReadOptions { confirm_absent: Some(false), ..level(v1::Consistency::Eventual).unwrap() };
    let unconfirmed = kv.get(get("rows", "late", Some(weak))).await.unwrap().into_inner();
    assert!(!unconfirmed.found && unconfirmed.read.unwrap().node == cluster.id_of(missed), "not asked to confirm");
}

/// S0: a range over k partitions moves no more rows and bytes than it returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_moves_hardly_more_than_it_returns() {
    let _turn = crate::support::alone().await;
    const ROWS: u64 = 1_600;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even("numbers", ROWS, v1::Layout::Ordered, 16).await;
    let client = cluster.client().await;
    let numbers = client.integer_keyspace("numbers");
    let mut batch = numbers.batch();
    for n in 0..1_000 {
        batch = batch.put(n, vec![b'x'; 100]);
    }
    assert!(batch.await.unwrap().applied);
    for n in 1_000..ROWS {
        numbers.put(n, vec![b'x'; 100]).await.unwrap();
    }
    let moved = async || crate::surface::metric(&cluster, "meridian_scan_rows_returned_total").await;
    for limit in [1, 10, 99, 100, 101, 150, 250, 500, 1_599, 1_600] {
        for reverse in [false, true] {
            let before = moved().await;
            let scan = numbers.scan(..).limit(limit);
            let scan = if reverse { scan.reverse() } else { scan };
            assert_eq!(scan.await.unwrap().len() as u64, limit);
            let rows = moved().await - before;
            assert!(rows <= limit as f64 * 1.1, "{rows} rows were moved for {limit} (reverse: {reverse})");
        }
    }
    let before = moved().await;
    assert_eq!(numbers.count(..).await.unwrap(), ROWS);
    assert_eq!(moved().await, before, "a count moves no rows");
    let request = v1::ScanRequest { keys_only: true, ..scan("numbers", None) };
    let all = pages(&mut cluster.kv(0).await, request).await.unwrap();
    assert!(all.iter().flat_map(|page| &page.rows).all(|row| row.value.is_empty()), "keys only means keys only");
    assert_eq!(all.iter().map(|page| page.rows.len()).sum::<usize>() as u64, ROWS);
    // Pages asked for one by one, by token, move no more either.
    let before = moved().await;
    let mut request = v1::ScanRequest { page_rows: 150, ..scan("numbers", None) };
    let (mut kv, mut rows) = (cluster.kv(1).await, 0);
    loop {
        let page = kv.scan(request.clone()).await.unwrap().into_inner();
        rows += page.rows.len() as u64;
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(rows, ROWS);
    let rows = moved().await - before;
    assert!(rows <= ROWS as f64 * 1.1, "{rows} rows were moved for {ROWS} in pages");
}

/// The operations that only one of the descriptions has, at every node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_works_through_every_node() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("all", &["h", "p"], 3).await;
    for index in 0..3 {
        let mut kv = cluster.kv(index).await;
        every_operation(&mut kv, "all").await;
    }
    let all = cluster.client().await.keyspace("all");
    assert!(all.put("x", "1").if_absent().await.unwrap().applied);
    assert!(!all.put("x", "2").if_absent().await.unwrap().applied, "an unmet condition is a result");
    let eventual = all.get("x").consistency(Consistency::Eventual).await.unwrap();
    assert_eq!(eventual.unwrap().value, "1");
}

/// Each operation once, on keys in three partitions cut at `h` and `p`; leaves nothing behind.
pub(crate) async fn every_operation(kv: &mut v1::kv_client::KvClient<tonic::transport::Channel>, keyspace: &str) {
    for key in ["a", "i", "q"] {
        assert!(kv.put(put(keyspace, key, "1")).await.unwrap().into_inner().applied);
        let row = kv.get(get(keyspace, key, None)).await.unwrap().into_inner().row.unwrap();
        assert_eq!(row.value, "1");
        let sum = kv.increment(increment(keyspace, key, 41)).await.unwrap().into_inner();
        assert_eq!(sum.number, Some(42));
        let must = Some(v1::condition::Must::Version(sum.version));
        let cas = v1::CompareAndSetRequest {
            keyspace: keyspace.into(),
            key: key.into(),
            condition: Some(v1::Condition { must }),
            value: Some("swapped".into()),
            return_previous: true,
            session: None,
        };
        let swapped = kv.compare_and_set(cas.clone()).await.unwrap().into_inner();
        assert!(swapped.applied && swapped.previous.unwrap().value == "42");
        assert!(!kv.compare_and_set(cas).await.unwrap().into_inner().applied);
    }
    let keys = vec!["a".into(), "nobody".into(), "q".into(), "a".into()];
    let many = v1::BatchGetRequest { keyspace: keyspace.into(), keys, options: None };
    let items = kv.batch_get(many).await.unwrap().into_inner().items;
    assert_eq!(items.iter().map(|item| item.found).collect::<Vec<_>>(), [true, false, true, true]);
    let item = |key| v1::BatchItem { op: Some(v1::batch_item::Op::Put(put("", key, "batch"))) };
    let items = vec![item("b"), item("j"), item("r")];
    let batch = v1::BatchRequest { keyspace: keyspace.into(), items, ..Default::default() };
    assert!(kv.write(batch).await.unwrap().into_inner().applied);
    let all = pages(kv, scan(keyspace, None)).await.unwrap();
    assert_eq!(keys_of(&all), ["a", "b", "i", "j", "q", "r"]);
    let count = v1::CountRequest { keyspace: keyspace.into(), ..Default::default() };
    assert_eq!(kv.count(count).await.unwrap().into_inner().count, 6);
    let range = between((b"a", true), (b"j", true));
    let some = v1::DeleteRangeRequest { keyspace: keyspace.into(), range, session: None };
    assert_eq!(kv.delete_range(some).await.unwrap().into_inner().deleted, 4);
    let rest = v1::DeleteRangeRequest { keyspace: keyspace.into(), ..Default::default() };
    assert_eq!(kv.delete_range(rest).await.unwrap().into_inner().deleted, 2);
}
