//! Ranges over many partitions, against a plain ordered map.

use crate::support::{Cluster, between, keys_of, pages, scan, shared};
use futures_util::TryStreamExt as _;
use meridian::{
    client::{Consistency, IntegerKeys, Keyspace, RawKeys, Row},
    key::{integer_key, integer_of_key},
    proto::v1,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

/// Batches of a load under way at the same time.
const LOADERS: usize = 4;

/// A small generator, the same on every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

async fn load(numbers: &Keyspace<IntegerKeys>, model: &BTreeMap<u64, String>) {
    let rows: Vec<(u64, String)> = model.iter().map(|(key, value)| (*key, value.clone())).collect();
    let batches = rows.chunks(1_000).map(|rows| {
        let batch = rows.iter().fold(numbers.batch(), |batch, (key, value)| batch.put(*key, value));
        async move {
            let written = batch.deadline(crate::support::PATIENCE).await?;
            assert!(written.applied, "{:?}", written.items.iter().find(|item| item.is_err()));
            Ok::<_, meridian::client::Error>(())
        }
    });
    use futures_util::StreamExt as _;
    futures_util::stream::iter(batches).buffer_unordered(LOADERS).try_collect::<Vec<()>>().await.unwrap();
}

fn pairs(rows: Vec<Row<IntegerKeys>>) -> Vec<(u64, String)> {
    rows.into_iter().map(|row| (row.key, String::from_utf8(row.value.to_vec()).unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_integers_over_sixteen_partitions_read_like_a_map() {
    const M: u64 = 100_000;
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even("numbers", M, v1::Layout::Ordered, 16).await;
    assert_eq!(cluster.partitions("numbers").await.len(), 16);
    let numbers = cluster.client().await.integer_keyspace("numbers");
    let model: BTreeMap<u64, String> = (0..M).map(|n| (n, (n * 7).to_string())).collect();
    load(&numbers, &model).await;
    assert_eq!(numbers.count(..).await.unwrap(), M);
    assert_eq!(pairs(numbers.scan(..).page_rows(10_000).await.unwrap()), Vec::from_iter(model.clone()));
    let mut dice = Dice(7);
    for _ in 0..60 {
        let (low, width) = (dice.below(M), dice.below(3_000));
        let high = (low + width).min(M - 1);
        let ends = [Bound::Included(low), Bound::Excluded(low)][dice.below(2) as usize];
        let bounds = (ends, [Bound::Included(high), Bound::Excluded(high)][dice.below(2) as usize]);
        let empty = low == high && bounds.0 == Bound::Excluded(low) && bounds.1 == Bound::Excluded(high);
        let mut want: Vec<(u64, String)> =
            if empty { Vec::new() } else { model.range(bounds).map(|(k, v)| (*k, v.clone())).collect() };
        let mut asked = numbers.scan(bounds).page_rows(1 + dice.below(900) as u32);
        if dice.below(2) == 1 {
            want.reverse();
            asked = asked.reverse();
        }
        if dice.below(3) == 0 {
            let limit = 1 + dice.below(1_500);
            want.truncate(limit as usize);
            asked = asked.limit(limit);
        } else {
            assert_eq!(numbers.count(bounds).await.unwrap(), want.len() as u64, "{bounds:?}");
        }
        if dice.below(4) == 0 {
            asked = asked.consistency(Consistency::Lease);
        }
        assert_eq!(pairs(asked.await.unwrap()), want, "{bounds:?}");
    }
    only_the_owners_answer(&cluster).await;
}

/// The keys of any interval 10,000 wide come from the partitions that own it and from no others.
async fn only_the_owners_answer(cluster: &Cluster) {
    const WIDTH: u64 = 10_000;
    let number = |key: &[u8], otherwise| if key.is_empty() { otherwise } else { integer_of_key(key).unwrap() };
    let mut kv = cluster.kv(1).await;
    let mut starts: Vec<u64> = (0..=90_000).step_by(WIDTH as usize).collect();
    starts.extend([1, 3_125, 6_250, 6_249, 12_345, 43_749, 50_001, 77_777, 89_999]);
    for start in starts {
        let range = between((&integer_key(start), true), (&integer_key(start + WIDTH), false));
        // The load may have made one too hot, which is cut now.
        let (got, partitions) = loop {
            let before = cluster.partitions("numbers").await;
            let got = pages(&mut kv, scan("numbers", range.clone())).await.unwrap();
            if cluster.partitions("numbers").await.len() == before.len() {
                break (got, before);
            }
        };
        let keys: Vec<u64> = got.iter().flat_map(|p| &p.rows).map(|row| integer_of_key(&row.key).unwrap()).collect();
        assert_eq!(keys, (start..start + WIDTH).collect::<Vec<_>>());
        let asked: BTreeSet<u64> = got.iter().flat_map(|page| &page.reads).map(|read| read.partition).collect();
        let owners: BTreeSet<u64> = partitions
            .iter()
            .filter(|p| number(&p.start, 0) < start + WIDTH && number(&p.end, u64::MAX) > start)
            .map(|p| p.id)
            .collect();
        assert_eq!(asked, owners, "for {start} and the {WIDTH} keys from it");
    }
}

/// Keys that share prefixes, of skewed lengths, with bytes of every kind.
fn awkward_keys() -> BTreeSet<Vec<u8>> {
    let mut dice = Dice(11);
    let mut keys = BTreeSet::from([vec![], vec![0], vec![0, 0], vec![0xff], vec![0xff, 0xff], b"user/".to_vec()]);
    while keys.len() < 2_000 {
        let mut key = [&b"user/"[..], b"us", b"", b"zz/\xff"][dice.below(4) as usize].to_vec();
        key.extend((0..dice.below(8)).map(|_| [b'0', b'9', b'/', 0, 0xff, 0xfe, b'm'][dice.below(7) as usize]));
        keys.insert(key);
    }
    keys
}

async fn load_keys(rows: &Keyspace<RawKeys>, keys: &BTreeSet<Vec<u8>>) {
    for chunk in keys.iter().collect::<Vec<_>>().chunks(500) {
        let batch = chunk.iter().fold(rows.batch(), |batch, key| batch.put(&key[..], &key[..]));
        assert!(batch.await.unwrap().applied);
    }
}

async fn reads_like_a_set(cluster: &Cluster, name: &str) {
    let rows = cluster.client().await.keyspace(name);
    let keys = awkward_keys();
    load_keys(&rows, &keys).await;
    let all: Vec<Vec<u8>> = keys.iter().cloned().collect();
    let got = async |scan: meridian::client::Scan<RawKeys>| -> Vec<Vec<u8>> {
        scan.await.unwrap().into_iter().map(|row| row.key.to_vec()).collect()
    };
    assert_eq!(got(rows.scan(..)).await, all, "in order");
    let mut backwards = got(rows.scan(..).reverse()).await;
    backwards.reverse();
    assert_eq!(backwards, all, "in descending order");
    for limit in [1, 7, 333, 1_999, 2_000, 5_000] {
        let (first, last) = (got(rows.scan(..).limit(limit)).await, got(rows.scan(..).reverse().limit(limit)).await);
        let limit = (limit as usize).min(all.len());
        assert_eq!(first, all[..limit], "the first {limit}");
        assert_eq!(last, all[all.len() - limit..].iter().rev().cloned().collect::<Vec<_>>(), "the last {limit}");
    }
    for row in rows.scan(..).keys_only().await.unwrap() {
        assert!(row.value.is_empty() && keys.contains(&row.key[..]) && row.version > 0);
    }
    for prefix in [&b"user/"[..], b"us", b"zz/\xff", b"\xff", b"\xff\xff", b"\0", b"nobody"] {
        let want: Vec<_> = all.iter().filter(|key| key.starts_with(prefix)).cloned().collect();
        assert_eq!(got(rows.scan_prefix(prefix)).await, want, "{prefix:?}");
        let request = v1::CountRequest { keyspace: name.into(), prefix: prefix.to_vec().into(), ..Default::default() };
        let counted = cluster.kv(2).await.count(request).await.unwrap().into_inner().count;
        assert_eq!(counted, want.len() as u64, "{prefix:?}");
    }
    assert_eq!(rows.count(..).await.unwrap(), all.len() as u64);
    let (low, high) = (&b"us"[..], &b"user/9"[..]);
    let want: Vec<_> = all.iter().filter(|key| low <= &key[..] && &key[..] <= high).cloned().collect();
    assert_eq!(got(rows.scan(low..=high)).await, want);
    in_pages(cluster, name, &all).await;
}

/// One page after the other, each from another node, by token.
async fn in_pages(cluster: &Cluster, name: &str, all: &[Vec<u8>]) {
    for (order, page_rows) in [(v1::Order::Ascending, 37), (v1::Order::Descending, 150), (v1::Order::Ascending, 2_000)]
    {
        let mut request = v1::ScanRequest { order: order as i32, page_rows, ..scan(name, None) };
        let (mut got, mut turn) = (Vec::new(), 0);
        loop {
            let page = cluster.kv(turn % 3).await.scan(request.clone()).await.unwrap().into_inner();
            assert!(page.rows.len() <= page_rows as usize, "a page has at most as many rows as asked for");
            got.extend(page.rows.iter().map(|row| row.key.to_vec()));
            turn += 1;
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        if order == v1::Order::Descending {
            got.reverse();
        }
        assert_eq!(got, all, "{order:?} in pages of {page_rows}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hashed_keyspace_reads_in_key_order_in_every_way() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even("hashed", 0, v1::Layout::Hashed, 8).await;
    reads_like_a_set(&cluster, "hashed").await;
    let all = pages(&mut cluster.kv(0).await, v1::ScanRequest { prefix: "user/".into(), ..scan("hashed", None) }).await;
    let reads: BTreeSet<u64> = all.unwrap().iter().flat_map(|page| &page.reads).map(|read| read.partition).collect();
    assert_eq!(reads.len(), 8, "every partition has a share of any prefix");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordered_keyspace_reads_in_key_order_in_every_way() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("ordered", &["us", "user/", "user/9", "user/m", "zz"], 3).await;
    reads_like_a_set(&cluster, "ordered").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn integers_in_a_hashed_keyspace_read_in_order() {
    const M: u64 = 5_000;
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_even("hashed", M, v1::Layout::Hashed, 4).await;
    let numbers = cluster.client().await.integer_keyspace("hashed");
    let model: BTreeMap<u64, String> = (0..M).step_by(3).map(|n| (n, n.to_string())).collect();
    load(&numbers, &model).await;
    assert_eq!(pairs(numbers.scan(..).await.unwrap()), Vec::from_iter(model.clone()));
    let some: Vec<_> = model.range(1_000..2_000).map(|(key, value)| (*key, value.clone())).collect();
    assert_eq!(pairs(numbers.scan(1_000..2_000).await.unwrap()), some);
    assert_eq!(numbers.count(1_000..2_000).await.unwrap(), some.len() as u64);
    let deleted = numbers.delete_range(1_000..2_000).await.unwrap();
    assert_eq!(deleted, some.len() as u64);
    assert_eq!(numbers.count(..).await.unwrap(), (model.len() - some.len()) as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_ends_before_it_becomes_too_large_for_a_message() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("large", &["m"], 3).await;
    let rows = cluster.client().await.keyspace("large");
    let value = vec![b'v'; 400 << 10];
    let want: Vec<String> = (0..20).map(|n| format!("{}{n:02}", if n < 10 { 'a' } else { 'z' })).collect();
    for key in &want {
        rows.put(key, &value[..]).await.unwrap();
    }
    let got = pages(&mut cluster.kv(0).await, scan("large", None)).await.unwrap();
    assert_eq!(keys_of(&got), want);
    for page in &got {
        let all_but_one = page.rows.iter().skip(1).map(|row| row.key.len() + row.value.len());
        assert!(all_but_one.sum::<usize>() < 1 << 20, "a page of {} rows goes on beyond 1 MiB", page.rows.len());
        let bytes = prost::Message::encoded_len(page);
        assert!(bytes < 4 << 20, "{bytes} bytes do not fit what gRPC clients take by default");
    }
}
