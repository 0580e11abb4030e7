//! `meridian bench`: how fast the cluster answers, measured from here.
//!
//! Closed loop: each of `--clients` sends its next request when the last one is answered, so the rate adapts to the
//! cluster and waiting before sending is not part of a latency. With `--rate` the loop is open: requests are sent when
//! they are due, whatever has become of the earlier ones, and latencies count from then; those that could not be sent in
//! time from here are counted as `NOT_SENT`. Percentiles are those of answered requests; errors are counted by reason. The
//! rows stay where they are: use a keyspace of your own and drop it afterwards.

use super::{
    failure::Failure,
    options::{Format, Options},
    output::Output,
    remote::Remote,
    text::KeyText,
    zipf::Zipf,
};
use crate::{
    env,
    error::Error,
    key::{KeyKind, integer_key},
    proto::v1,
};
use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand};
use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, interval};

/// Longest latency that is told apart, a minute.
const LATENCY_US_MAX: u64 = 60_000_000;
/// Rows of one request while the keys are written beforehand.
const PREPARE_BATCH_ROWS: u64 = 200;

/// How often those requests are sent that have become due.
const SEND_EVERY: Duration = Duration::from_millis(1);
/// Requests of an open loop that may be in flight.
const OPEN_IN_FLIGHT_MAX: usize = 20_000;
/// A request that has been due for longer is not sent any more.
const OVERDUE_MAX: Duration = Duration::from_millis(100);

/// What to measure.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Write rows
    Put(Load),
    /// Read rows
    Get(Load),
    /// Read ranges
    Scan(ScanLoad),
    /// Read and write rows
    Mixed(MixedLoad),
}

/// How hard, and how long.
#[derive(Args, Debug, Clone)]
pub struct Load {
    /// Requests in flight
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// Requests per second, sent whatever becomes of them; --clients does not count then
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rate: Option<u32>,
    /// Length of the measurement
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// Seconds of the same load beforehand that do not count
    #[arg(long, default_value_t = 1, value_name = "SECONDS")]
    warmup: u32,
    /// Distinct keys
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Which of them the next request is for
    #[arg(long, value_enum, default_value_t = Choice::Uniform)]
    choose: Choice,
    /// Length of values
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    value_bytes: u32,
    /// The keys are there already: do not write them beforehand
    #[arg(long)]
    prepared: bool,
}

/// Which key is next.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// Any, each as likely as the others
    Uniform,
    /// The first keys most often, as YCSB does, but side by side
    Zipf,
    /// One after the other, from the first on
    Sequential,
}

/// As [`Load`], for ranges.
#[derive(Args, Debug, Clone)]
pub struct ScanLoad {
    #[command(flatten)]
    load: Load,
    /// Rows of one range
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rows: u32,
}

/// As [`Load`], for both.
#[derive(Args, Debug, Clone)]
pub struct MixedLoad {
    #[command(flatten)]
    load: Load,
    /// Share of reads
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u64).range(0..=100))]
    read_percent: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Get,
    Put,
    Scan,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Scan => "scan",
        }
    }
}

/// What every client does, over and over.
struct Plan {
    workload: &'static str,
    load: Load,
    read_percent: u64,
    rows: u32,
    keyspace: String,
    options: v1::ReadOptions,
    integers: bool,
    value: Bytes,
    zipf: Option<Zipf>,
    next: AtomicU64,
}

/// Measured by one client, or by all together.
struct Measured {
    latency_us: BTreeMap<Kind, Histogram<u64>>,
    errors: BTreeMap<&'static str, u64>,
    rows: u64,
}

impl Measured {
    const fn new() -> Self {
        Self { latency_us: BTreeMap::new(), errors: BTreeMap::new(), rows: 0 }
    }

    fn record(&mut self, kind: Kind, took: Duration, result: Result<u64, Error>) {
        match result {
            Ok(rows) => {
                let us = (took.as_micros() as u64).clamp(1, LATENCY_US_MAX);
                self.latency_us.entry(kind).or_insert_with(histogram).saturating_record(us);
                self.rows += rows;
            }
            Err(error) => *self.errors.entry(error.reason.as_str()).or_insert(0) += 1,
        }
    }

    fn add(&mut self, other: Self) {
        for (kind, histogram_of_one) in other.latency_us {
            let all = self.latency_us.entry(kind).or_insert_with(histogram);
            all.add(histogram_of_one).expect("all histograms have the same bounds");
        }
        for (reason, count) in other.errors {
            *self.errors.entry(reason).or_insert(0) += count;
        }
        self.rows += other.rows;
    }

    fn operations(&self) -> u64 {
        self.latency_us.values().map(Histogram::len).sum()
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("the bounds are in order")
}

impl Plan {
    fn new(command: Command, keys: KeyText, options: &Options) -> Result<Self, Failure> {
        let (workload, load, read_percent, rows) = match command {
            Command::Put(load) => ("put", load, 0, 0),
            Command::Get(load) => ("get", load, 100, 0),
            Command::Scan(scan) => ("scan", scan.load, 100, scan.rows),
            Command::Mixed(mixed) => ("mixed", mixed.load, mixed.read_percent, 0),
        };
        if let KeyKind::Integer { max } = keys.kind
            && load.keys > max
        {
            return Err(Failure::Usage(format!("error: --keys {}: the keyspace has only {max} keys", load.keys)));
        }
        let value = Bytes::from(vec![b'v'; load.value_bytes as usize]);
        let zipf = (load.choose == Choice::Zipf).then(|| Zipf::new(load.keys));
        Ok(Self {
            workload,
            load,
            read_percent,
            rows,
            keyspace: options.keyspace.clone(),
            options: options.consistency.read_options(),
            integers: matches!(keys.kind, KeyKind::Integer { .. }),
            value,
            zipf,
            next: AtomicU64::new(0),
        })
    }

    fn key(&self, n: u64) -> Bytes {
        if self.integers { integer_key(n) } else { format!("bench/{n:010}").into() }
    }

    fn next_key(&self) -> Bytes {
        let n = match (&self.zipf, self.load.choose) {
            // The upper 53 bits are what a fraction holds.
            (Some(zipf), _) => zipf.rank((env::random_u64() >> 11) as f64 / (1_u64 << 53) as f64),
            (None, Choice::Sequential) => self.next.fetch_add(1, Ordering::Relaxed) % self.load.keys,
            (None, _) => env::random_u64() % self.load.keys,
        };
        self.key(n)
    }

    fn next_kind(&self) -> Kind {
        match self.workload {
            "scan" => Kind::Scan,
            _ if env::random_u64() % 100 < self.read_percent => Kind::Get,
            _ => Kind::Put,
        }
    }

    /// Sends one request; the rows read or written.
    async fn send(&self, kind: Kind, remote: &Remote) -> Result<u64, Error> {
        let key = self.next_key();
        let keyspace = self.keyspace.clone();
        match kind {
            Kind::Get => {
                let request = v1::GetRequest { keyspace, key, options: Some(self.options.clone()) };
                remote.get(request).await.map(|reply| u64::from(reply.found))
            }
            Kind::Put => {
                let request = v1::PutRequest { keyspace, key, value: self.value.clone(), ..Default::default() };
                remote.put(request).await.map(|_| 1)
            }
            Kind::Scan => {
                let lower = Some(v1::Bound { key, inclusive: true });
                let request = v1::ScanRequest {
                    keyspace,
                    range: Some(v1::KeyRange { lower, upper: None }),
                    limit: Some(self.rows.into()),
                    page_rows: self.rows,
                    options: Some(self.options.clone()),
                    ..Default::default()
                };
                remote.scan(request).await.map(|page| page.rows.len() as u64)
            }
        }
    }

    /// Writes every key once.
    async fn prepare(&self, remote: &Remote) -> Result<(), Failure> {
        for first in (0..self.load.keys).step_by(PREPARE_BATCH_ROWS as usize) {
            let item = |n| {
                let put = v1::PutRequest { key: self.key(n), value: self.value.clone(), ..Default::default() };
                v1::BatchItem { op: Some(v1::batch_item::Op::Put(put)) }
            };
            let last = (first + PREPARE_BATCH_ROWS).min(self.load.keys);
            let request = v1::BatchRequest {
                keyspace: self.keyspace.clone(),
                items: (first..last).map(item).collect(),
                atomic: false,
                session: None,
            };
            for item in remote.write(request).await?.items {
                if let Some(v1::batch_item_reply::Result::Error(error)) = item.result {
                    return Err(Failure::Api(error.into()));
                }
            }
        }
        Ok(())
    }

    /// One client: measures from `from` to `until`.
    async fn client(self: Arc<Self>, remote: Remote, from: Instant, until: Instant) -> Measured {
        let mut measured = Measured::new();
        loop {
            let began = Instant::now();
            if began >= until {
                return measured;
            }
            let kind = self.next_kind();
            let result = self.send(kind, &remote).await;
            let ended = Instant::now();
            if began >= from {
                measured.record(kind, ended - began, result);
            }
        }
    }
}

/// Sends requests at a rate, whatever becomes of them, and measures those that are due from `from` to `until`.
async fn open_loop(plan: &Arc<Plan>, remote: &Remote, rate: u32, from: Instant, until: Instant) -> Measured {
    let (began, mut sent, mut ticks) = (Instant::now(), 0_u64, interval(SEND_EVERY));
    let (mut measured, mut in_flight) = (Measured::new(), FuturesUnordered::new());
    let mut record = |answered: Result<(Instant, Kind, Duration, Result<u64, Error>), _>| {
        let (due, kind, took, result) = answered.expect("a request of the benchmark does not panic");
        if due >= from {
            measured.record(kind, took, result);
        }
    };
    let mut unsent = 0;
    while Instant::now() < until {
        ticks.tick().await;
        let due_by_now = (began.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        for n in sent..due_by_now {
            let due = began + Duration::from_secs_f64(n as f64 / f64::from(rate));
            if in_flight.len() >= OPEN_IN_FLIGHT_MAX || due.elapsed() > OVERDUE_MAX {
                unsent += u64::from(due >= from);
                continue;
            }
            let (plan, remote, kind) = (Arc::clone(plan), remote.clone(), plan.next_kind());
            in_flight.push(env::spawn(async move {
                let result = plan.send(kind, &remote).await;
                (due, kind, due.elapsed(), result)
            }));
        }
        sent = sent.max(due_by_now);
        while let Some(Some(answered)) = in_flight.next().now_or_never() {
            record(answered);
        }
    }
    while let Some(answered) = in_flight.next().await {
        record(answered);
    }
    if unsent > 0 {
        measured.errors.insert("NOT_SENT", unsent);
    }
    measured
}

/// Runs one measurement and prints it.
///
/// # Errors
/// When the keys cannot be written beforehand, or not a single request was answered.
pub async fn run(command: Command, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let remote = Remote::connect(options).await?;
    let keys = remote.key_text(options).await?;
    let plan = Arc::new(Plan::new(command, keys, options)?);
    if plan.workload != "put" && !plan.load.prepared {
        eprintln!("writing {} keys", plan.load.keys);
        plan.prepare(&remote).await?;
    }
    let from = Instant::now() + Duration::from_secs(plan.load.warmup.into());
    let until = from + Duration::from_secs(plan.load.seconds.into());
    let mut all = Measured::new();
    if let Some(rate) = plan.load.rate {
        eprintln!("{} at {rate} per second for {} s", plan.workload, plan.load.seconds);
        all = open_loop(&plan, &remote, rate, from, until).await;
    } else {
        eprintln!("{} with {} clients for {} s", plan.workload, plan.load.clients, plan.load.seconds);
        let client = |_| env::spawn(Arc::clone(&plan).client(remote.clone(), from, until));
        for client in (0..plan.load.clients).map(client).collect::<Vec<_>>() {
            all.add(client.await.context("a client of the benchmark failed")?);
        }
    }
    report(&plan, &all, options, output)?;
    if all.operations() == 0 {
        return Err(Failure::Other(anyhow::anyhow!("no request was answered")));
    }
    Ok(())
}

fn report(plan: &Plan, all: &Measured, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let seconds = f64::from(plan.load.seconds);
    let rate = all.operations() as f64 / seconds;
    let errors: u64 = all.errors.values().sum();
    if output.format == Format::Json {
        let latency: BTreeMap<_, _> =
            all.latency_us.iter().map(|(kind, histogram)| (kind.name(), latency_json(histogram))).collect();
        return output.json(&json!({
            "workload": plan.workload,
            "clients": plan.load.clients,
            "rate": plan.load.rate,
            "seconds": plan.load.seconds,
            "keyspace": plan.keyspace,
            "consistency": options.consistency.to_string(),
            "keys": plan.load.keys,
            "choose": format!("{:?}", plan.load.choose).to_lowercase(),
            "value_bytes": plan.load.value_bytes,
            "operations": all.operations(),
            "ops_per_second": rate.round(),
            "rows_per_second": (all.rows as f64 / seconds).round(),
            "errors": errors,
            "errors_by_reason": all.errors,
            "latency_us": latency,
            "machine": machine(),
            "version": env!("MERIDIAN_VERSION"),
        }));
    }
    let rows = all
        .latency_us
        .iter()
        .map(|(kind, histogram)| {
            let mut row = vec![kind.name().to_owned(), format!("{:.0}", histogram.len() as f64 / seconds)];
            row.extend(PERCENTILES.iter().map(|(_, p)| ms(histogram.value_at_percentile(*p))));
            row.push(ms(histogram.max()));
            row
        })
        .collect();
    output.table(&["", "OPS/S", "P50 MS", "P90 MS", "P99 MS", "P99.9 MS", "MAX MS"], rows)?;
    output.line(&format!("errors: {errors} {}", if errors == 0 { String::new() } else { format!("{:?}", all.errors) }))
}

const PERCENTILES: [(&str, f64); 4] = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9)];

fn ms(us: u64) -> String {
    format!("{:.2}", us as f64 / 1_000.0)
}

fn latency_json(histogram: &Histogram<u64>) -> Value {
    let mut object = json!({ "count": histogram.len(), "mean": histogram.mean().round(), "max": histogram.max() });
    for (name, percentile) in PERCENTILES {
        object[name] = histogram.value_at_percentile(percentile).into();
    }
    object
}

/// Where the benchmark ran: figures mean little without it.
fn machine() -> Value {
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
        let line = info.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    json!({
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": model,
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "debug_build": cfg!(debug_assertions),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[test]
    fn measurements_of_clients_add_up() {
        let mut one = Measured::new();
        (1..=100).for_each(|ms| one.record(Kind::Get, Duration::from_millis(ms), Ok(1)));
        let mut two = Measured::new();
        two.record(Kind::Put, Duration::from_secs(600), Ok(1));
        two.record(Kind::Put, Duration::ZERO, Err(Error::new(Reason::NoQuorum, "")));
        one.add(two);
        assert_eq!((one.operations(), one.rows), (101, 101));
        assert_eq!(one.errors, BTreeMap::from([("NO_QUORUM", 1)]));
        let get = latency_json(&one.latency_us[&Kind::Get]);
        let p50 = get["p50"].as_u64().unwrap();
        assert!((49_900..=50_100).contains(&p50), "{p50}");
        assert!(get["p99.9"].as_u64().unwrap() >= 99_900);
        assert!(one.latency_us[&Kind::Put].max() >= LATENCY_US_MAX, "kept, at the longest that is told apart");
    }
}
