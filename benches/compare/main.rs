//! Meridian beside other systems: same machine, same disk, same rows, same clients, rounds in turns.
//!
//! `cargo bench --bench compare` starts every system that it finds, three nodes each on loopback with syncs on, fills
//! them with the same rows, and lets the same clients do the same work to one after the other, again and again. It
//! prints medians with their spread, and keeps them in `--dir`; with `--save` also in `benches/`. A closed loop, in one
//! process: the clients share the machine with the servers, so CPU time per operation says more than the rate does.
//!
//! `process` starts and watches processes · `system` is what all systems have in common · `meridian`, `etcd` and `redis`
//! are the systems · `workload` is what clients do, `load` does it · `long` is what is no matter of rates · `report` and
//! `plot` show it, and `bars` says what of it is enough.
//!
//! Invariants:
//! * a system is asked by every way and in every round with operations drawn from the same seeds;
//! * a row that is missing and an answer that is an error are counted and shown, never timed;
//! * however it ends, no process and no file of a system is left.

mod bars;
mod etcd;
mod load;
mod long;
mod meridian;
mod plot;
mod process;
mod redis;
mod report;
mod system;
mod workload;

use anyhow::{Context as _, bail};
use clap::Parser;
use load::{Data, Plan};
use long::Long;
use report::{Facts, Report, Row, Sample};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};
use system::{Cluster, Door, Elections, System, Way};
use tokio::signal::unix::{SignalKind, signal};
use workload::{Clients, Workload};

/// Meridian beside other systems
#[derive(Parser, Debug)]
#[command(name = "cargo bench --bench compare --")]
pub(crate) struct Options {
    /// One short round of the most important workloads
    #[arg(long)]
    quick: bool,
    /// Also what takes long: memory, puts beside a long scan, the loss of a leader
    #[arg(long)]
    long: bool,
    /// Only these ways of asking (default: all that are installed)
    #[arg(long, value_name = "WAY,…", value_delimiter = ',')]
    only: Vec<Way>,
    /// Only these workloads (default: all)
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    workloads: Vec<String>,
    /// Rounds of each workload; every system once in each
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// Length of a round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Clients, each with one request in flight
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// Rows that are there at the beginning
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(2_000..=100_000_000))]
    rows: u64,
    /// Length of values
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    value_bytes: u32,
    /// Rows of what takes long, of 16 + 100 bytes
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(10_000..=100_000_000))]
    long_rows: u64,
    /// Operations per second of the workloads at a fixed rate
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Partitions of Meridian's keyspace; the others have one of everything
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    partitions: u64,
    /// Where data and results go: on the disk that is to be measured
    #[arg(long, default_value = "target/compare", value_name = "DIR")]
    dir: PathBuf,
    /// Another binary of Meridian than the one that was just built
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_meridian"))]
    binary: PathBuf,
    /// Put the results into benches/README.md and benches/plots/
    #[arg(long)]
    save: bool,
    /// Given by cargo bench; without it nothing is run
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if !options.bench {
        eprintln!("a comparison takes minutes: cargo bench --bench compare");
        return ExitCode::SUCCESS;
    }
    if options.quick {
        (options.rounds, options.seconds) = (1, 1);
    }
    if let Err(error) = run(&options) {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Whatever ends it, what it holds is dropped here: processes first, then their directory.
        tokio::select! {
            done = compare(options) => done,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })
}

async fn compare(options: &Options) -> anyhow::Result<()> {
    let (workloads, long) = chosen(options)?;
    let (ways, facts) = installed(options)?;
    let systems: BTreeSet<System> = ways.iter().map(|way| way.system()).collect();
    std::fs::create_dir_all(&options.dir).with_context(|| format!("creating {}", options.dir.display()))?;
    let dir = || tempfile::Builder::new().prefix("run-").tempdir_in(&options.dir);
    let mut report =
        Report { facts, rows: Vec::new(), tables: Vec::new(), peaks: BTreeMap::new(), figures: BTreeMap::new() };
    if !workloads.is_empty() {
        let dir = dir()?;
        let mut running = BTreeMap::new();
        for system in &systems {
            eprintln!("{}: starting, and writing {} rows", system.name(), options.rows);
            let started = Running::start(*system, options, dir.path()).await;
            running.insert(*system, started.with_context(|| system.name())?);
        }
        for workload in &workloads {
            report.rows.extend(measure(workload, &ways, &mut running, options).await?);
        }
        let peak = |running: &Running| running.cluster.servers.memory().peak;
        report.peaks = running.iter().map(|(system, running)| (*system, peak(running))).collect();
    }
    if !long.is_empty() {
        let mut long = Long::new(long, options.long_rows);
        for system in systems {
            let dir = dir()?;
            long.measure(system, &ways, options, dir.path()).await.with_context(|| system.name())?;
        }
        (report.tables, report.figures) = long.results();
    }
    println!("\n{}", report.markdown());
    report.keep(&options.dir)?;
    if options.save {
        report.save(Path::new(env!("CARGO_MANIFEST_DIR")))?;
    }
    Ok(())
}

/// What is to be measured: workloads, and what takes long.
fn chosen(options: &Options) -> anyhow::Result<(Vec<Workload>, Vec<&'static str>)> {
    let mut names: Vec<&str> = workload::ALL.iter().map(|workload| workload.name).collect();
    names.extend(long::ALL);
    if let Some(unknown) = options.workloads.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("there is no workload {unknown:?}; there are: {}", names.join(", "));
    }
    let wanted = |name: &str, by_default: bool| match options.workloads.as_slice() {
        [] => by_default,
        chosen => chosen.iter().any(|chosen| chosen == name),
    };
    let is_default = |name: &str| !options.quick || workload::QUICK.contains(&name);
    let workloads = workload::ALL.iter().filter(|workload| wanted(workload.name, is_default(workload.name)));
    let long = long::ALL.iter().filter(|name| wanted(name, options.long));
    Ok((workloads.copied().collect(), long.copied().collect()))
}

/// The ways that can be measured here, and what is to be known of the measurement.
fn installed(options: &Options) -> anyhow::Result<(Vec<Way>, Facts)> {
    let all = [Way::Meridian, Way::MeridianUnary, Way::Etcd, Way::Redis];
    let wanted: Vec<Way> =
        all.into_iter().filter(|way| options.only.is_empty() || options.only.contains(way)).collect();
    let mut versions = BTreeMap::new();
    for system in System::ALL.into_iter().filter(|system| wanted.iter().any(|way| way.system() == *system)) {
        match process::version_of(&system.program(&options.binary)) {
            Some(version) => _ = versions.insert(system, version),
            None => eprintln!("{} is not installed and is left out; to get it: {}", system.name(), system.install()),
        }
    }
    let ways: Vec<Way> = wanted.into_iter().filter(|way| versions.contains_key(&way.system())).collect();
    if ways.is_empty() {
        bail!("nothing to measure");
    }
    Ok((ways, Facts::new(options, versions)))
}

/// A system that runs and is filled.
struct Running {
    cluster: Cluster,
    data: Arc<Data>,
}

impl Running {
    async fn start(system: System, options: &Options, dir: &Path) -> anyhow::Result<Self> {
        let program = system.program(&options.binary);
        let mut cluster = system.start(&program, dir, (options.partitions, options.rows), Elections::AsTheyAre).await?;
        let data = Data::new(options.rows, options.value_bytes as usize);
        load::fill(&cluster, &data).await?;
        cluster.servers.check()?;
        Ok(Self { cluster, data })
    }
}

/// All rounds of one workload, the ways in turns.
async fn measure(
    workload: &Workload,
    ways: &[Way],
    running: &mut BTreeMap<System, Running>,
    options: &Options,
) -> anyhow::Result<Vec<Row>> {
    let clients = workload.clients(options.clients as usize);
    let mut lanes = Vec::new();
    for way in ways.iter().copied().filter(|way| workload.is_for(*way)) {
        let door = Door::open(way, &running[&way.system()].cluster).await?;
        let callers = door.callers(clients).await?;
        lanes.push((door, callers, Row { workload: *workload, way, samples: Vec::new() }));
    }
    let rate = (workload.clients == Clients::Paced).then_some(options.rate);
    for seed in 0..options.rounds {
        for (door, callers, row) in &mut lanes {
            let system = running.get_mut(&row.way.system()).expect("it was started");
            door.look_for_leaders().await?;
            let plan = Plan { mix: workload.mix, clients, length: Duration::from_secs(options.seconds), rate, seed };
            let window = load::run(plan, callers, &system.data, &system.cluster.servers).await;
            system.cluster.servers.check()?;
            let sample = Sample::of(&window.with_context(|| format!("{}: {}", row.way.name(), workload.name))?);
            eprintln!("{}: {}", workload.name, sample.line(row.way));
            row.samples.push(sample);
        }
    }
    Ok(lanes.into_iter().map(|(_, _, row)| row).collect())
}
