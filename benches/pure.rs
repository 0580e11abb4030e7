//! The pure code by itself: rows of a partition, bytes of commands and messages, the map of partitions.
//!
//! `cargo bench --bench pure`; see benches/README.md. The planner and the balancer have a program of
//! their own, `placement`, because one call of them takes as long as thousands of samples here.
//!
//! Invariant: what is measured succeeds, checked where it costs nothing beside the work.

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use meridian::{
    key::{KeyKind, KeyspaceId, Layout, Span, integer_key, version_at},
    kv::{Action, Command, Condition, Item, Op, Restore, ScanSpec, Session, SessionLimits, Store, StoreConfig, Write},
    placement::{self, CreateKeyspace, Cuts, Map, RegisterNode, State},
    proto::{
        batch::Requests,
        rows::{Packer, unpack},
        v1,
    },
};
use prost::Message as _;
use std::{collections::BTreeSet, hint::black_box, time::Duration};

const ROWS: u64 = 100_000;
const ROWS_FROZEN: u64 = 10_000;
const ROWS_PER_PAGE: u64 = 1_000;
const PUTS: u64 = 100;
const VALUE_BYTES: usize = 256;
/// Bytes of a row's key and value.
const ROW_BYTES: u64 = 16 + VALUE_BYTES as u64;
const CHUNK_BYTES: usize = 1 << 20;

const KEYSPACES: u64 = 10;
const PARTITIONS_PER_KEYSPACE: u64 = 1_000;
const KEYS_PER_PARTITION: u64 = 1_000;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .nresamples(10_000)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let mut store = criterion.benchmark_group("store");
    reads(&mut store);
    writes(&mut store);
    snapshots(&mut store);
    store.finish();
    let mut codec = criterion.benchmark_group("codec");
    commands(&mut codec);
    pages(&mut codec);
    pipelines(&mut codec);
    codec.finish();
    let mut map = criterion.benchmark_group("map");
    lookups(&mut map);
    map.finish();
    criterion.final_summary();
}

/// Random enough, and the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

fn key(row: u64) -> Bytes {
    format!("{row:016}").into()
}

fn value() -> Bytes {
    vec![b'v'; VALUE_BYTES].into()
}

/// One entry of the log: a put for each of these rows.
fn puts(rows: impl Iterator<Item = u64>, value: &Bytes, session: impl Fn(u64) -> Option<Session>) -> Command {
    let write = |(i, row)| {
        let action = Action::Put { value: value.clone() };
        let item = Item { key: key(row), condition: Condition::Any, action, return_previous: false };
        Write { session: session(i), op: Op::Single(item) }
    };
    Command { stamp: version_at(1_000_000), writes: (0..).zip(rows).map(write).collect() }
}

fn apply(store: &mut Store, command: &Command) {
    let replies = store.apply(store.applied() + 1, command);
    assert!(replies.iter().all(|reply| reply.answer.is_ok()));
}

fn filled(rows: u64) -> Store {
    let limits = SessionLimits::default();
    let mut store = Store::new(StoreConfig { layout: Layout::Ordered, span: Span::all(), limits });
    apply(&mut store, &puts(0..rows, &value(), |_| None));
    store
}

fn reads(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (store, mut dice) = (filled(ROWS), Dice(7));
    let keys: Vec<Bytes> = (0..1 << 16).map(|_| key(dice.roll(ROWS))).collect();
    let mut next = keys.iter().cycle();
    group.throughput(Throughput::Elements(1));
    group.bench_function("get", |b| b.iter(|| store.get(next.next().expect("a cycle")).expect("owned")));

    let first = ROWS / 2;
    let scan = ScanSpec {
        span: Span::new(key(first), Some(key(first + ROWS_PER_PAGE))),
        tokens: None,
        reverse: false,
        rows_max: ROWS_PER_PAGE,
        bytes_max: u64::MAX,
        keys_only: false,
        count_only: false,
    };
    let keys_only = ScanSpec { keys_only: true, ..scan.clone() };
    let count = ScanSpec { count_only: true, ..scan.clone() };
    group.throughput(Throughput::Elements(ROWS_PER_PAGE));
    for (name, spec) in [("scan 1000", scan), ("scan 1000, keys only", keys_only), ("count 1000", count)] {
        let page = || {
            let page = store.scan(&spec, |key, row| _ = black_box((key, row))).expect("owned");
            assert_eq!(page.count, ROWS_PER_PAGE);
        };
        group.bench_function(name, |b| b.iter(page));
    }
}

/// Overwrites of random rows. A session of its own for each put of a command, as when many clients write.
fn writes(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (mut store, value, mut dice, mut sequence) = (filled(ROWS), value(), Dice(11), 0);
    group.throughput(Throughput::Elements(PUTS));
    for (name, with_sessions) in [("apply 100 puts", false), ("apply 100 puts, sessions", true)] {
        let mut command = || {
            sequence += 1;
            let session = |client| {
                let client = u128::from(client) + 1;
                let opened = version_at(999_000);
                with_sessions.then_some(Session { client, opened, sequence, acknowledged_below: sequence })
            };
            puts((0..PUTS).map(|_| dice.roll(ROWS)), &value, session)
        };
        group.bench_function(name, |b| {
            b.iter_batched(&mut command, |command| apply(&mut store, &command), BatchSize::SmallInput);
        });
    }
}

fn frozen(store: &mut Store) -> Vec<Bytes> {
    store.freeze();
    std::iter::from_fn(|| store.freeze_next(CHUNK_BYTES)).collect()
}

fn restored(chunks: &[Bytes]) -> Store {
    let mut restore = Restore::new();
    chunks.iter().for_each(|chunk| restore.feed(chunk).expect("ours"));
    restore.finish().expect("ours")
}

fn snapshots(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut store = filled(ROWS_FROZEN);
    let chunks = frozen(&mut store);
    assert_eq!(restored(&chunks).digest(), store.digest());
    group.throughput(Throughput::Bytes(chunks.iter().map(|chunk| chunk.len() as u64).sum()));
    group.bench_function("freeze 10000", |b| b.iter(|| frozen(&mut store)));
    group.bench_function("restore 10000", |b| b.iter_with_large_drop(|| restored(&chunks)));
}

fn commands(group: &mut BenchmarkGroup<'_, WallTime>) {
    let command = puts(0..PUTS, &value(), |_| None);
    let bytes = command.encode();
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("command of 100 puts, encode", |b| b.iter(|| command.encode()));
    group.bench_function("command of 100 puts, decode", |b| b.iter(|| Command::decode(&bytes).expect("ours")));
}

/// A page of rows, packed and as generated messages.
fn pages(group: &mut BenchmarkGroup<'_, WallTime>) {
    let version = version_at(1_000_000);
    let rows = (0..ROWS_PER_PAGE).map(|row| v1::Row { key: key(row), value: value(), version });
    let reply = v1::ScanReply { rows: rows.collect(), ..v1::ScanReply::default() };
    let pack = || {
        let mut packer = Packer::with_capacity((ROWS_PER_PAGE * (ROW_BYTES + 24)) as usize);
        reply.rows.iter().for_each(|row| packer.push(&row.key, &row.value, row.version));
        packer.finish()
    };
    let (packed, bytes) = (pack(), Bytes::from(reply.encode_to_vec()));
    group.throughput(Throughput::Elements(ROWS_PER_PAGE));
    group.bench_function("page of 1000 packed, encode", |b| b.iter(pack));
    group.bench_function("page of 1000 packed, decode", |b| b.iter(|| unpack(&packed).expect("ours")));
    group.bench_function("page of 1000 messages, encode", |b| b.iter(|| reply.encode_to_vec()));
    group.bench_function("page of 1000 messages, decode", |b| {
        b.iter(|| v1::ScanReply::decode(bytes.clone()).expect("ours"));
    });
}

fn pipelines(group: &mut BenchmarkGroup<'_, WallTime>) {
    let request = |row| {
        let put = v1::PutRequest { key: key(row), value: value(), ..v1::PutRequest::default() };
        v1::Request { id: row, op: Some(v1::request::Op::Put(put)), ..v1::Request::default() }
    };
    let requests: Vec<v1::Request> = (0..PUTS).map(request).collect();
    let bytes = Bytes::from(Requests::of(&requests).encode_to_vec());
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("pipeline of 100 puts, encode", |b| b.iter(|| Requests::of(&requests)));
    group.bench_function("pipeline of 100 puts, decode", |b| {
        b.iter(|| Requests::decode(bytes.clone()).and_then(Requests::items).expect("ours"));
    });
}

/// 10,000 partitions of integers on one node.
fn map_of_partitions() -> Map {
    let node = RegisterNode {
        cluster_id: String::new(),
        uuid: format!("00000000-0000-4000-8000-{:012x}", 1),
        address: "h1:7700".to_owned(),
        zone: String::new(),
        weight_milli: 0,
        previous: None,
        ephemeral: false,
    };
    let mut state = State::new();
    let bootstrap = placement::Command::Bootstrap { cluster_id: "bench".to_owned(), node, replicas_default: 1 };
    state.apply(bootstrap).expect("the first command");
    for i in 0..KEYSPACES {
        let request = CreateKeyspace {
            name: format!("k{i}"),
            kind: KeyKind::Integer { max: PARTITIONS_PER_KEYSPACE * KEYS_PER_PARTITION },
            layout: Layout::Ordered,
            replicas: 1,
            cuts: Cuts::Even(PARTITIONS_PER_KEYSPACE as u32),
            avoid: BTreeSet::new(),
        };
        state.apply(placement::Command::CreateKeyspace(request)).expect("a new keyspace");
    }
    state.map().clone()
}

fn lookups(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (map, mut dice) = (map_of_partitions(), Dice(13));
    let keyspaces: Vec<KeyspaceId> =
        (0..KEYSPACES).map(|i| map.keyspace_by_name(&format!("k{i}")).expect("created").id).collect();
    let mut place = || {
        let keyspace = keyspaces[dice.roll(KEYSPACES) as usize];
        (keyspace, dice.roll((PARTITIONS_PER_KEYSPACE - 10) * KEYS_PER_PARTITION))
    };
    let keys: Vec<(KeyspaceId, Bytes)> =
        (0..1 << 16).map(|_| place()).map(|(keyspace, n)| (keyspace, integer_key(n))).collect();
    let wide = |n| Span::new(integer_key(n), Some(integer_key(n + 9 * KEYS_PER_PARTITION + 1)));
    let spans: Vec<(KeyspaceId, Span)> =
        (0..1 << 16).map(|_| place()).map(|(keyspace, n)| (keyspace, wide(n))).collect();
    let (mut next_key, mut next_span) = (keys.iter().cycle(), spans.iter().cycle());
    group.throughput(Throughput::Elements(1));
    group.bench_function("locate a key", |b| {
        b.iter(|| {
            let (keyspace, key) = next_key.next().expect("a cycle");
            map.locate(*keyspace, key).expect("a partition of every key").id
        });
    });
    group.bench_function("partitions of a range (10)", |b| {
        b.iter(|| {
            let (keyspace, span) = next_span.next().expect("a cycle");
            let last = map.overlapping(*keyspace, span).enumerate().last();
            last.map(|(before, partition)| (before, partition.id)).filter(|(before, _)| *before == 9).expect("ten")
        });
    });
}
