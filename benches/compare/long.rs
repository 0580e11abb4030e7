//! What takes long: memory of a million rows, also while they are written again, puts beside a scan of all of them, and
//! service without its leader.
//!
//! The systems are started anew for it, one after the other, so that each has the machine and the memory for itself.

use crate::{
    Options, bars, load,
    load::{Data, Plan},
    process::Memory,
    report::{Figure, Figures, Table, thousands},
    system::{Caller, Cluster, Door, Elections, Level, REPLICAS, System, Way, ready},
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
pub(crate) const ALL: &[&str] = &[MEMORY, SCAN, KILL, STOP, KILL_EQUAL];
const MEMORY: &str = "memory";
const SCAN: &str = "put-beside-scan";
const KILL: &str = "leader-kill";
const STOP: &str = "leader-stop";
const KILL_EQUAL: &str = "leader-kill-equal";

const VALUE_BYTES: usize = 100;
const KEY_BYTES: usize = 16;
/// Rest before memory is taken: what a system does once nothing is written any more belongs to it.
const REST: Duration = Duration::from_secs(20);
/// Memory is taken once it has changed by less than a hundredth in this time, or after so many of these.
const SETTLE_LOOK: Duration = Duration::from_secs(2);
const SETTLE_LOOKS_MAX: u32 = 15;
/// How long an idle system is watched, and puts are made with and without a scan beside them.
const WATCH: Duration = Duration::from_secs(10);
/// How often memory is looked at while rows are written again.
const PEAK_LOOK: Duration = Duration::from_millis(50);
/// Rows of a system of which only the leader is lost.
const LOSS_ROWS: u64 = 10_000;
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
    figures: Figures,
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
                "at most until then",
                "idle CPU ms per s",
                "at most while all rows are written again, to that at rest",
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
                "rows per second scanned alone",
            ],
        );
        let loss = Table::new(
            "Longest time without an answer when the leader is lost, ms: median (least to most)",
            &["Way", "Loss", "put", "get, linearizable", "get, lease", "get, eventual"],
        );
        Self { memory, scan, loss, figures: Figures::new(), wanted }
    }

    pub(crate) fn results(self) -> (Vec<Table>, Figures) {
        let tables = [self.memory, self.scan, self.loss];
        (tables.into_iter().filter(|table| !table.rows.is_empty()).collect(), self.figures)
    }

    /// Measures one system, from its start to its end.
    pub(crate) async fn measure(
        &mut self,
        system: System,
        ways: &[Way],
        options: &Options,
        dir: &Path,
    ) -> anyhow::Result<()> {
        let program = system.program(&options.binary);
        let loses = ways.iter().any(|way| way.system() == system && way.can_lose_its_leader());
        if self.wanted.contains(&KILL_EQUAL) && loses {
            let dir = dir.join("equal");
            std::fs::create_dir(&dir)?;
            let shape = (options.partitions, LOSS_ROWS);
            let mut cluster = system.start(&program, &dir, shape, Elections::Equal).await?;
            let data = Data::new(LOSS_ROWS, VALUE_BYTES);
            load::fill(&cluster, &data).await?;
            for way in ways.iter().copied().filter(|way| way.system() == system) {
                self.loss(way, &mut cluster, &data, KILL_EQUAL, options.rounds).await.context(KILL_EQUAL)?;
            }
        }
        if self.wanted == [KILL_EQUAL] {
            return Ok(());
        }
        eprintln!("{}: starting, and writing {} rows", system.name(), options.long_rows);
        let shape = (options.partitions, options.long_rows);
        let mut cluster = system.start(&program, dir, shape, Elections::AsTheyAre).await?;
        let empty = cluster.servers.memory();
        let data = Data::new(options.long_rows, VALUE_BYTES);
        load::fill(&cluster, &data).await?;
        if self.wanted.contains(&MEMORY) {
            self.memory(&cluster, empty, &data).await.context(MEMORY)?;
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

    async fn memory(&mut self, cluster: &Cluster, empty: Memory, data: &Arc<Data>) -> anyhow::Result<()> {
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
        let mut again = std::pin::pin!(load::fill(cluster, data));
        let mut most = full.resident;
        loop {
            match timeout(PEAK_LOOK, &mut again).await {
                Ok(written) => break written?,
                Err(_goes_on) => most = most.max(cluster.servers.memory().resident),
            }
        }
        let peak = most as f64 / full.resident as f64;
        let each = |full: u64, empty: u64| full.saturating_sub(empty) as f64 / (data.rows * REPLICAS as u64) as f64;
        let anonymous = each(full.anonymous, empty.anonymous);
        let overhead = anonymous - (KEY_BYTES + VALUE_BYTES) as f64;
        let way = cluster.system.filler();
        self.figures.extend([((bars::OVERHEAD_BYTES, way), overhead), ((bars::REWRITE_PEAK, way), peak)]);
        self.memory.push(vec![
            cluster.system.name().to_owned(),
            format!("{:.0}", each(full.resident, empty.resident)),
            format!("{anonymous:.0}"),
            format!("{overhead:.0}"),
            format!("{:.0}", each(full.peak, empty.resident)),
            format!("{idle:.1}"),
            format!("{peak:.2}"),
        ]);
        Ok(())
    }

    async fn scan(&mut self, way: Way, cluster: &Cluster, data: &Arc<Data>, options: &Options) -> anyhow::Result<()> {
        let door = Door::open(way, cluster).await?;
        let clients = options.clients as usize;
        let mut callers = door.callers(clients).await?;
        let (alone, began) = (AtomicU64::new(0), Instant::now());
        door.caller(0).await?.scan_long(0..options.long_rows, &alone).await?;
        let alone = alone.into_inner() as f64 / began.elapsed().as_secs_f64();
        let plan = Plan { mix: Mix::Put, clients, length: WATCH, rate: Some(options.rate), seed: 0 };
        let idle = load::run(plan, &mut callers, data, &cluster.servers).await?;
        let seen = Arc::new(AtomicU64::new(0));
        let (mut scanner, counter, rows) = (door.caller(0).await?, Arc::clone(&seen), options.long_rows);
        let scanning: JoinHandle<anyhow::Result<()>> = env::spawn(async move {
            loop {
                scanner.scan_long(0..rows, &counter).await?;
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
        let p99_ratio = ms(&beside, 99.0) / ms(&idle, 99.0);
        self.figures.insert((bars::PUT_BESIDE_SCAN, way), p99_ratio);
        self.scan.push(vec![
            way.name().to_owned(),
            format!("{:.2}", ms(&idle, 50.0)),
            format!("{:.2}", ms(&idle, 99.0)),
            format!("{:.2}", ms(&beside, 50.0)),
            format!("{:.2}", ms(&beside, 99.0)),
            format!("{p99_ratio:.1}"),
            thousands(rate),
            thousands(alone),
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
        let (what, figure) = match loss {
            KILL => ("kill -9", Some(bars::KILLED_MS)),
            KILL_EQUAL => ("kill -9, election timeouts of a second", Some(bars::KILLED_EQUAL_MS)),
            _ => ("SIGSTOP", None),
        };
        if let (Some(figure), Some(put)) = (figure, Figure::of(gaps[0].clone())) {
            self.figures.insert((figure, way), put.median);
        }
        let mut row = vec![way.name().to_owned(), what.to_owned()];
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
    if loss == STOP {
        cluster.servers.stop(leader)?
    } else {
        cluster.servers.kill(leader)?
    }
    sleep_until(until).await;
    if loss == STOP {
        cluster.servers.resume(leader)?
    } else {
        cluster.servers.start_again(leader)?
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
