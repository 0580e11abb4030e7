//! The load: clients in a loop, each with one request in flight, and what they saw.
//!
//! Only operations that end inside a window are counted, and CPU times are those of the same window.

use crate::{
    process::{Servers, own_cpu_us},
    system::{Caller, Cluster, Door, Level},
    workload::{Mix, Operation},
};
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use meridian::cli::zipf::Zipf;
use meridian::env;
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

/// Load before the window begins.
const WARM_UP: Duration = Duration::from_millis(500);
/// Longest latency that is told apart, a minute.
const LATENCY_US_MAX: u64 = 60_000_000;
/// Patience with clients after the window has ended.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// Clients that fill a system, and rows of one of their requests.
const FILLERS: u64 = 4;
const FILL_ROWS: u64 = 500;
/// Random bytes of which values are parts: what cannot be compressed, so that nobody gains by it.
const POOL_BYTES: usize = 1 << 20;

/// A key, 16 bytes in the order of its number.
pub(crate) fn key_of(number: u64) -> Bytes {
    format!("user{number:012}").into()
}

/// The rows of one system.
pub(crate) struct Data {
    /// Rows that were there at the beginning.
    pub(crate) rows: u64,
    inserted: AtomicU64,
    value_bytes: usize,
    pool: Bytes,
    zipf: Zipf,
}

impl Data {
    pub(crate) fn new(rows: u64, value_bytes: usize) -> Arc<Self> {
        let mut pool = vec![0; POOL_BYTES + value_bytes];
        StdRng::seed_from_u64(0).fill_bytes(&mut pool);
        Arc::new(Self { rows, inserted: AtomicU64::new(0), value_bytes, pool: pool.into(), zipf: Zipf::new(rows) })
    }

    fn value(&self, rng: &mut StdRng) -> Bytes {
        let from = rng.random_range(0..POOL_BYTES);
        self.pool.slice(from..from + self.value_bytes)
    }

    /// Does it; how many rows that concerned.
    async fn perform(&self, operation: Operation, caller: &mut Caller, rng: &mut StdRng) -> anyhow::Result<u64> {
        match operation {
            Operation::Put(number) => caller.put(key_of(number), self.value(rng)).await.map(|()| 1),
            Operation::Get(number, level) => {
                ensure!(caller.get(key_of(number), level).await?, "row {number} is missing");
                Ok(1)
            }
            Operation::GetLatest(number) => caller.get(key_of(number), Level::Linearizable).await.map(|_there| 1),
            Operation::Scan(form, (first, end), rows) => caller.scan(form, (key_of(first), key_of(end)), rows).await,
            Operation::LongScan(first, end) => {
                let seen = AtomicU64::new(0);
                caller.scan_long(first..end, &seen).await?;
                Ok(seen.into_inner())
            }
            Operation::ReadModifyWrite(number) => {
                ensure!(caller.get(key_of(number), Level::Linearizable).await?, "row {number} is missing");
                caller.put(key_of(number), self.value(rng)).await.map(|()| 1)
            }
            Operation::Insert => {
                let number = self.rows + self.inserted.fetch_add(1, Ordering::Relaxed);
                caller.put(key_of(number), self.value(rng)).await.map(|()| 1)
            }
        }
    }
}

/// Writes all rows of a system.
pub(crate) async fn fill(cluster: &Cluster, data: &Arc<Data>) -> anyhow::Result<()> {
    let door = Door::open(cluster.system.filler(), cluster).await?;
    let next = Arc::new(AtomicU64::new(0));
    let mut fillers: Vec<JoinHandle<anyhow::Result<()>>> = Vec::new();
    for client in 0..FILLERS {
        let (mut caller, data, next) = (door.caller(client as usize).await?, Arc::clone(data), Arc::clone(&next));
        fillers.push(env::spawn(async move {
            let mut rng = StdRng::seed_from_u64(client);
            loop {
                let first = next.fetch_add(FILL_ROWS, Ordering::Relaxed);
                if first >= data.rows {
                    return Ok(());
                }
                let numbers = first..(first + FILL_ROWS).min(data.rows);
                let rows = numbers.map(|number| (key_of(number), data.value(&mut rng))).collect();
                caller.put_many(rows).await?;
            }
        }));
    }
    for filler in fillers {
        filler.await.context("filling")??;
    }
    Ok(())
}

/// What one client saw in the window, or all together.
pub(crate) struct Tally {
    pub(crate) latency_us: Histogram<u64>,
    pub(crate) units: u64,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
}

impl Tally {
    fn new() -> Self {
        let latency_us = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("the bounds are in order");
        Self { latency_us, units: 0, errors: 0, first_error: None }
    }

    fn add(&mut self, other: &Self) {
        self.latency_us.add(&other.latency_us).expect("all histograms have the same bounds");
        self.units += other.units;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or_else(|| other.first_error.clone());
    }
}

/// What to do, and when.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) mix: Mix,
    pub(crate) clients: usize,
    pub(crate) length: Duration,
    /// Operations per second of all clients together; as many as can be, if not said.
    pub(crate) rate: Option<u32>,
    /// Tells rounds apart.
    pub(crate) seed: u64,
}

/// One client: its caller, and its share of the plan.
struct Client {
    caller: Caller,
    data: Arc<Data>,
    plan: Plan,
    number: usize,
    from: Instant,
    until: Instant,
}

impl Client {
    async fn run(mut self) -> (Caller, Tally) {
        let mut tally = Tally::new();
        let mut rng = StdRng::seed_from_u64(self.plan.seed * 1_000_000 + self.number as u64);
        let step =
            self.plan.rate.map(|rate| Duration::from_secs(1).mul_f64(self.plan.clients as f64 / f64::from(rate)));
        let mut turn = Instant::now() + step.unwrap_or_default().mul_f64(rng.random());
        loop {
            let mut began = Instant::now();
            if let Some(step) = step {
                if turn > began {
                    sleep_until(turn).await;
                    began = Instant::now();
                } else {
                    began = turn; // Its turn came while the one before was not answered: that wait counts.
                }
                turn += step;
            }
            let rows = self.data.rows;
            let operation = self.plan.mix.next(&mut rng, &self.data.zipf, rows + self.inserted());
            let done = self.data.perform(operation, &mut self.caller, &mut rng).await;
            let ended = Instant::now();
            if ended > self.until {
                return (self.caller, tally);
            }
            if ended < self.from {
                continue;
            }
            match done {
                Ok(rows) => {
                    tally.latency_us.saturating_record((ended - began).as_micros() as u64);
                    tally.units += if self.plan.mix.counts_rows() { rows } else { 1 };
                }
                Err(error) => {
                    tally.errors += 1;
                    tally.first_error.get_or_insert_with(|| format!("{error:#}"));
                }
            }
        }
    }

    /// Only D reads rows that were inserted.
    fn inserted(&self) -> u64 {
        if self.plan.mix == Mix::Latest { self.data.inserted.load(Ordering::Relaxed) } else { 0 }
    }
}

/// The load of one window, and what it took.
pub(crate) struct Window {
    pub(crate) tally: Tally,
    pub(crate) length: Duration,
    pub(crate) servers_cpu_us: u64,
    pub(crate) client_cpu_us: u64,
}

/// Runs a plan; the callers are kept for the next.
pub(crate) async fn run(
    plan: Plan,
    callers: &mut Vec<Caller>,
    data: &Arc<Data>,
    servers: &Servers,
) -> anyhow::Result<Window> {
    let from = Instant::now() + WARM_UP;
    let until = from + plan.length;
    let clients: Vec<_> = callers
        .drain(..)
        .enumerate()
        .map(|(number, caller)| env::spawn(Client { caller, data: Arc::clone(data), plan, number, from, until }.run()))
        .collect();
    sleep_until(from).await;
    let (began, servers_before, own_before) = (Instant::now(), servers.cpu_us(), own_cpu_us());
    sleep_until(until).await;
    let servers_cpu_us = servers.cpu_us() - servers_before;
    let client_cpu_us = own_cpu_us() - own_before;
    let length = began.elapsed();
    let mut tally = Tally::new();
    for client in clients {
        let ended = timeout(END_PATIENCE, client).await.context("a client still waits for its answer")?;
        let (caller, seen) = ended.context("a client failed")?;
        tally.add(&seen);
        callers.push(caller);
    }
    Ok(Window { tally, length, servers_cpu_us, client_cpu_us })
}
