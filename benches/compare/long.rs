//! What takes long: memory of a million rows, puts beside a scan of all of them, and service without its leader.
//!
//! The systems are started anew for it, one after the other, so that each has the machine and the memory for itself.

use crate::{
    Options, load,
    load::{Data, Plan},
    process::Memory,
    report::{Figure, Table, thousands},
    system::{Caller, Cluster, Door, Level, REPLICAS, System, Way, ready},
    workload::Mix,
};
use anyhow::Context as _;
use bytes::Bytes;
use meridian::env;
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

/// Names of these measurements, as of workloads.
pub(crate) const ALL: &[&str] = &[MEMORY, SCAN, KILL, STOP];
const MEMORY: &str = "memory";
const SCAN: &str = "put-beside-scan";
const KILL: &str = "leader-kill";
const STOP: &str = "leader-stop";

const VALUE_BYTES: usize = 100;
const KEY_BYTES: usize = 16;
/// Rest before memory is taken: what a system does once nothing is written any more belongs to it.
const REST: Duration = Duration::from_secs(20);
/// Memory is taken once it has changed by less than a hundredth in this time, or after so many of these.
const SETTLE_LOOK: Duration = Duration::from_secs(2);
const SETTLE_LOOKS_MAX: u32 = 15;
/// How long an idle system is watched, and puts are made with and without a scan beside them.
const WATCH: Duration = Duration::from_secs(10);
/// Load before a leader is lost, and after that.
const BEFORE_LOSS: Duration = Duration::from_secs(1);
const AFTER_LOSS: Duration = Duration::from_secs(10);
/// Clients of each kind that ask while a leader is lost.
const PROBERS: usize = 3;
/// After this long without an answer a caller that must choose its node tries the next one.
const PROBE_MAX: Duration = Duration::from_millis(200);
const PROBE_PAUSE: Duration = Duration::from_millis(5);

/// The tables of all systems, filled as they are measured.
pub(crate) struct Long {
    memory: Table,
    scan: Table,
    loss: Table,
    wanted: Vec<&'static str>,
}

impl Long {
    pub(crate) fn new(wanted: Vec<&'static str>, rows: u64) -> Self {
        let rows = thousands(rows as f64);
        let memory = Table::new(
            &format!("Memory of {rows} rows of {KEY_BYTES} + {VALUE_BYTES} bytes, per row and replica"),
            &[
                "System",
                "resident bytes",
                "not backed by a file",
                "of these over key and value",
                "at most",
                "idle CPU ms per s",
            ],
        );
        let scan = Table::new(
            &format!("Puts at a fixed rate beside scans of all {rows} rows"),
            &[
                "Way",
                "p50 ms",
                "p99 ms",
                "p50 ms beside",
                "p99 ms beside",
                "p99 ratio",
                "rows per second scanned beside",
            ],
        );
        let loss = Table::new(
            "Longest time without an answer when the leader is lost, ms: median (least to most)",
            &["Way", "Loss", "put", "get, linearizable", "get, lease", "get, eventual"],
        );
        Self { memory, scan, loss, wanted }
    }

    pub(crate) fn tables(self) -> Vec<Table> {
        [self.memory, self.scan, self.loss].into_iter().filter(|table| !table.rows.is_empty()).collect()
    }

    /// Measures one system, from its start to its end.
    pub(crate) async fn measure(
        &mut self,
        system: System,
        ways: &[Way],
        options: &Options,
        dir: &Path,
    ) -> anyhow::Result<()> {
        eprintln!("{}: starting, and writing {} rows", system.name(), options.long_rows);
        let program = system.program(&options.binary);
        let mut cluster = system.start(&program, dir, options.partitions, options.long_rows).await?;
        let empty = cluster.servers.memory();
        let data = Data::new(options.long_rows, VALUE_BYTES);
        load::fill(&cluster, &data).await?;
        if self.wanted.contains(&MEMORY) {
            self.memory(&cluster, empty, options.long_rows).await;
        }
        for way in ways.iter().copied().filter(|way| way.system() == system) {
            if self.wanted.contains(&SCAN) && way.can_scan() {
                self.scan(way, &cluster, &data, options).await.context(SCAN)?;
            }
            for loss in [KILL, STOP] {
                if self.wanted.contains(&loss) && way.can_lose_its_leader() {
                    self.loss(way, &mut cluster, &data, loss, options.rounds).await.context(loss)?;
                }
            }
        }
        cluster.servers.check()
    }

    async fn memory(&mut self, cluster: &Cluster, empty: Memory, rows: u64) {
        sleep(REST).await;
        let mut full = cluster.servers.memory();
        for _ in 0..SETTLE_LOOKS_MAX {
            sleep(SETTLE_LOOK).await;
            let now = cluster.servers.memory();
            let settled = now.resident.abs_diff(full.resident) * 100 < full.resident;
            full = now;
            if settled {
                break;
            }
        }
        let cpu_us = cluster.servers.cpu_us();
        sleep(WATCH).await;
        let idle = (cluster.servers.cpu_us() - cpu_us) as f64 / 1e3 / WATCH.as_secs_f64();
        let each = |full: u64, empty: u64| full.saturating_sub(empty) as f64 / (rows * REPLICAS as u64) as f64;
        let anonymous = each(full.anonymous, empty.anonymous);
        self.memory.push(vec![
            cluster.system.name().to_owned(),
            format!("{:.0}", each(full.resident, empty.resident)),
            format!("{anonymous:.0}"),
            format!("{:.0}", anonymous - (KEY_BYTES + VALUE_BYTES) as f64),
            format!("{:.0}", each(full.peak, empty.resident)),
            format!("{idle:.1}"),
        ]);
    }

    async fn scan(&mut self, way: Way, cluster: &Cluster, data: &Arc<Data>, options: &Options) -> anyhow::Result<()> {
        let door = Door::open(way, cluster).await?;
        let clients = options.clients as usize;
        let mut callers = door.callers(clients).await?;
        let plan = Plan { mix: Mix::Put, clients, length: WATCH, rate: Some(options.rate), seed: 0 };
        let idle = load::run(plan, &mut callers, data, &cluster.servers).await?;
        let seen = Arc::new(AtomicU64::new(0));
        let (mut scanner, counter, rows) = (door.caller(0).await?, Arc::clone(&seen), options.long_rows);
        let scanning: JoinHandle<anyhow::Result<()>> = env::spawn(async move {
            loop {
                scanner.scan_all(rows, &counter).await?;
            }
        });
        let began = Instant::now();
        let beside = load::run(plan, &mut callers, data, &cluster.servers).await?;
        let rate = seen.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
        if scanning.is_finished() {
            scanning.await.context("the scanner")??;
        } else {
            scanning.abort();
        }
        let ms =
            |window: &load::Window, percentile| window.tally.latency_us.value_at_percentile(percentile) as f64 / 1e3;
        self.scan.push(vec![
            way.name().to_owned(),
            format!("{:.2}", ms(&idle, 50.0)),
            format!("{:.2}", ms(&idle, 99.0)),
            format!("{:.2}", ms(&beside, 50.0)),
            format!("{:.2}", ms(&beside, 99.0)),
            format!("{:.1}", ms(&beside, 99.0) / ms(&idle, 99.0)),
            thousands(rate),
        ]);
        Ok(())
    }

    async fn loss(
        &mut self,
        way: Way,
        cluster: &mut Cluster,
        data: &Arc<Data>,
        loss: &str,
        rounds: u64,
    ) -> anyhow::Result<()> {
        let mut gaps: Vec<Vec<f64>> = vec![Vec::new(); Probe::ALL.len()];
        for _ in 0..rounds {
            for (all, gap) in gaps.iter_mut().zip(lose_once(way, cluster, data, loss).await?) {
                all.extend(gap.map(|gap| gap.as_secs_f64() * 1e3));
            }
        }
        let mut row = vec![way.name().to_owned(), if loss == KILL { "kill -9" } else { "SIGSTOP" }.to_owned()];
        row.extend(gaps.into_iter().map(|gaps| match Figure::of(gaps) {
            Some(f) => format!("{:.0} ({:.0} to {:.0})", f.median, f.least, f.most),
            None => "–".to_owned(),
        }));
        eprintln!("{}", row.join(", "));
        self.loss.push(row);
        Ok(())
    }
}

/// What is asked while the leader is lost.
#[derive(Clone, Copy, PartialEq)]
enum Probe {
    Put,
    Get(Level),
}

impl Probe {
    const ALL: [Self; 4] =
        [Self::Put, Self::Get(Level::Linearizable), Self::Get(Level::Lease), Self::Get(Level::Eventual)];

    fn is_for(self, way: Way) -> bool {
        match self {
            Self::Put => true,
            Self::Get(level) => way.can_read(level),
        }
    }
}

/// Loses the leader under load and brings it back; for each probe the longest time that a client had no answer.
async fn lose_once(
    way: Way,
    cluster: &mut Cluster,
    data: &Arc<Data>,
    loss: &str,
) -> anyhow::Result<Vec<Option<Duration>>> {
    let mut door = Door::open(way, cluster).await?;
    let until = Instant::now() + BEFORE_LOSS + AFTER_LOSS;
    let mut probers = Vec::new();
    for probe in Probe::ALL {
        let mut group = Vec::new();
        for client in 0..PROBERS * usize::from(probe.is_for(way)) {
            let caller = door.caller(client).await?;
            group.push(env::spawn(probe_until(probe, caller, Arc::clone(data), until)));
        }
        probers.push(group);
    }
    sleep_until(until - AFTER_LOSS).await;
    let leader = cluster.leader().await?;
    if loss == KILL {
        cluster.servers.kill(leader)?
    } else {
        cluster.servers.stop(leader)?
    }
    sleep_until(until).await;
    if loss == KILL {
        cluster.servers.start_again(leader)?
    } else {
        cluster.servers.resume(leader)?
    }
    let mut gaps = Vec::new();
    for group in probers {
        let mut longest = None;
        for prober in group {
            longest = longest.max(Some(prober.await.context("a prober failed")?));
        }
        gaps.push(longest);
    }
    let addresses = cluster.addresses.clone();
    let system = cluster.system;
    ready(&mut cluster.servers, async || system.is_whole(&addresses).await).await?;
    door.look_for_leaders().await?;
    Ok(gaps)
}

/// Asks again and again; the longest time between two answers, or from the last one to the end.
async fn probe_until(probe: Probe, mut caller: Caller, data: Arc<Data>, until: Instant) -> Duration {
    let mut number = 0;
    let (mut answered, mut longest) = (Instant::now(), Duration::ZERO);
    while Instant::now() < until {
        number += 1;
        let (key, value) = (load::key_of(number), Bytes::from_static(&[b'v'; VALUE_BYTES]));
        debug_assert!(number < data.rows);
        // The library knows by itself where to turn and when.
        let patience = if caller.finds_its_way() { AFTER_LOSS } else { PROBE_MAX };
        let asked = async {
            match probe {
                Probe::Put => caller.put(key, value).await.is_ok(),
                Probe::Get(level) => caller.get(key, level).await.is_ok_and(|found| found),
            }
        };
        if timeout(patience, asked).await.unwrap_or(false) {
            longest = longest.max(answered.elapsed());
            answered = Instant::now();
        } else {
            caller.turn();
        }
        sleep(PROBE_PAUSE).await;
    }
    longest.max(answered.elapsed())
}
