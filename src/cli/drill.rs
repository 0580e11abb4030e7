//! `meridian drill`: try to break a cluster, and judge what its clients were told.
//!
//! Invariant: the exit code is 1 only for a broken promise of the cluster; whatever kept the drill from finding out is 7.

use super::{
    failure::Failure,
    options::{Format, Level, Options},
    output::Output,
};
use crate::{
    drill::{
        self,
        run::Progress,
        settings::{Fault, NODES_MAX, Settings},
    },
    proof::{
        check::Valid,
        history::{Mode, ReadMode},
        report::{self, Outcome, Report},
        workload::Workload,
    },
    telemetry,
};
use clap::Args;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, interval},
};

/// How often the line on the terminal is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// Violations shown of one verdict; the report has more.
const VIOLATIONS_SHOWN: usize = 3;

/// Try to break a cluster: start one of real processes, let clients work, kill, pause, cut off and starve its nodes, and
/// check that every answer was right. Exit code 0: every promise was kept; 1: one was broken; 7: the drill could not
/// find out.
#[derive(Args, Debug)]
pub struct Drill {
    /// How long faults come and go
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Repeat with new seeds for this long, or until a promise is broken
    #[arg(long, value_name = "HOURS", conflicts_with = "seed")]
    hours: Option<f64>,
    /// Faults to install: kill, pause, partition, one-way, ring, isolate-leader, isolate-driver, slow, stall, clock,
    /// disk-full, power-loss, restart-all, divide, merge, drain, replace, separated by commas; all; none [default: all,
    /// none with --endpoints, where only divide, merge and drain can be asked for]
    #[arg(long, value_name = "LIST", value_parser = faults)]
    faults: Option<Faults>,
    /// Workloads to run side by side: register, levels, counter, rows, bank; all
    #[arg(long, default_value = "all", value_name = "LIST", value_parser = workloads)]
    workload: Workloads,
    /// Nodes
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=NODES_MAX as i64))]
    nodes: u16,
    /// Replicas of every partition
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=NODES_MAX as i64))]
    replicas: u32,
    /// Clients of each workload
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    clients: u32,
    /// Faults and choices follow from it [default: random]
    #[arg(long)]
    seed: Option<u64>,
    /// Where histories, logs and the report go [default: meridian-drill-SEED]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Put nodes into network namespaces instead of behind proxies; for root, with iproute2
    #[arg(long)]
    netns: bool,
}

// A newtype each, because clap takes a plain Vec for an argument that may be repeated.
#[derive(Clone, Debug)]
struct Faults(Vec<Fault>);
#[derive(Clone, Debug)]
struct Workloads(Vec<Workload>);

fn faults(text: &str) -> Result<Faults, String> {
    Fault::parse_list(text).map(Faults)
}

fn workloads(text: &str) -> Result<Workloads, String> {
    if text == "all" {
        return Ok(Workloads(Workload::ALL.to_vec()));
    }
    let mut found = Vec::new();
    for name in text.split(',') {
        let workload = name.trim().parse().map_err(|error: crate::error::Error| error.message.into_owned())?;
        if !found.contains(&workload) {
            found.push(workload);
        }
    }
    Ok(Workloads(found))
}

impl Drill {
    fn settings(&self, options: &Options, seed: u64, out: PathBuf) -> Result<Settings, Failure> {
        let binary = std::env::current_exe()?;
        let endpoints = if options.given.endpoints { options.endpoints.clone() } else { Vec::new() };
        let usual = if endpoints.is_empty() { Fault::ALL.as_slice() } else { &[] };
        Ok(Settings {
            faults: self.faults.as_ref().map_or(usual, |faults| &faults.0).to_vec(),
            workloads: self.workload.0.clone(),
            lasts: Duration::from_secs(self.seconds),
            nodes: self.nodes.into(),
            replicas: self.replicas,
            levels: if options.given.consistency { vec![read_mode(&options.consistency)] } else { Vec::new() },
            seed,
            out,
            clients: self.clients,
            endpoints,
            netns: self.netns,
            binary,
        })
    }
}

/// The level as histories name it. A session is the client's own, whatever token was given.
const fn read_mode(level: &Level) -> ReadMode {
    match level {
        Level::Linearizable => ReadMode { mode: Mode::Linearizable, bound_ms: None },
        Level::Lease => ReadMode { mode: Mode::Lease, bound_ms: None },
        Level::Bounded { staleness_ms } => ReadMode { mode: Mode::Bounded, bound_ms: Some(*staleness_ms) },
        Level::Session { .. } => ReadMode { mode: Mode::Session, bound_ms: None },
        Level::Eventual => ReadMode { mode: Mode::Eventual, bound_ms: None },
    }
}

/// Runs the drill, or many.
///
/// # Errors
/// A broken promise, or why nothing was found out.
pub async fn run(args: Drill, options: &Options, output: &mut Output) -> Result<(), Failure> {
    telemetry::install_logs("error", telemetry::LogFormat::Text);
    match args.hours {
        Some(hours) => soak(&args, options, hours, output).await,
        None => {
            let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
            let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("meridian-drill-{seed}")));
            let settings = args.settings(options, seed, out)?;
            let report = watched(&settings).await?;
            show(&report, &settings.out, output)?;
            ending(&report, &settings.out)
        }
    }
}

/// Runs one drill and shows on stderr how far it is. Ends the drill and its processes when it is interrupted.
async fn watched(settings: &Settings) -> Result<Report, Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (progress, mut seen) = watch::channel(Progress::default());
    let began = Instant::now();
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("the template is well-formed"));
    let hidden = bar.is_hidden();
    let mut told = (String::new(), String::new());
    let mut tick = interval(DRAW_EVERY);
    let mut drilling = Box::pin(drill::run::run(settings, &progress));
    let done = loop {
        tokio::select! {
            biased;
            _ = terminate.recv() => break Err(Failure::Inconclusive("interrupted; nothing was judged".to_owned())),
            _ = interrupt.recv() => break Err(Failure::Inconclusive("interrupted; nothing was judged".to_owned())),
            done = &mut drilling => break done.map_err(Failure::from),
            _ = tick.tick() => {
                let now = seen.borrow_and_update().clone();
                let line = line(&now, began.elapsed());
                if !hidden {
                    bar.set_message(line);
                    bar.tick();
                } else if told != (now.phase.clone(), now.fault.clone()) {
                    eprintln!("{line}");
                    told = (now.phase, now.fault);
                }
            }
        }
    };
    bar.finish_and_clear();
    done
}

fn line(progress: &Progress, elapsed: Duration) -> String {
    let Progress { phase, ops, faults, fault } = progress;
    let mut line = format!("{:>4} s  {phase}", elapsed.as_secs());
    if *ops > 0 {
        line.push_str(&format!("  {} operations  {faults} faults", HumanCount(*ops)));
    }
    if !fault.is_empty() {
        line.push_str(&format!("  {fault}"));
    }
    line
}

/// Drills with new seeds until the time is over or a promise is broken. Only runs that are not a pass are kept.
async fn soak(args: &Drill, options: &Options, hours: f64, output: &mut Output) -> Result<(), Failure> {
    if !(hours > 0.0 && hours <= 10_000.0) {
        return Err(Failure::Usage(format!("error: --hours {hours}: must be above 0 and at most 10000")));
    }
    let began = Instant::now();
    let lasts = Duration::from_secs_f64(hours * 3_600.0);
    let folder = args.out.clone().unwrap_or_else(|| PathBuf::from("meridian-drill-soak"));
    let (mut passes, mut others, mut operations) = (0_u64, Vec::new(), 0_u64);
    let mut installed = std::collections::BTreeMap::<String, u64>::new();
    loop {
        let seed = u64::from(rand::random::<u32>());
        let out = folder.join(format!("seed-{seed}"));
        let settings = args.settings(options, seed, out.clone())?;
        let report = watched(&settings).await?;
        let results = report::results(&report);
        let (ops, faults) = figures(&report);
        operations += ops;
        faults.into_iter().for_each(|fault| *installed.entry(fault).or_default() += 1);
        match report.outcome() {
            Outcome::Pass => {
                passes += 1;
                std::fs::remove_dir_all(&out)?;
            }
            outcome => others.push(json!({ "seed": seed, "verdict": outcome, "out": out })),
        }
        let summary = json!({
            "passes": passes, "others": others, "operations": operations, "faults": installed,
            "seconds": began.elapsed().as_secs(),
        });
        std::fs::write(folder.join("summary.json"), format!("{summary:#}\n"))?;
        match output.format {
            Format::Json => output.json(&json!({ "seed": seed, "verdict": results["verdict"], "operations": ops }))?,
            Format::Table | Format::Plain => {
                let verdict = results["verdict"].as_str().unwrap_or_default();
                output
                    .line(&format!("{:>6} s  seed {seed}: {verdict}, {ops} operations", began.elapsed().as_secs()))?;
            }
        }
        output.flush()?;
        if report.outcome() == Outcome::Violation {
            show(&report, &out, output)?;
            return ending(&report, &out);
        }
        if began.elapsed() >= lasts {
            let text =
                format!("{passes} passes, {} others; see {}", others.len(), folder.join("summary.json").display());
            return if others.is_empty() { output.line(&text) } else { Err(Failure::Inconclusive(text)) };
        }
    }
}

/// Operations that ended, and the kind of every fault that was installed.
fn figures(report: &Report) -> (u64, Vec<String>) {
    use crate::proof::history::{Kind, Process};
    let events = || report.workloads.iter().flat_map(|workload| &workload.events);
    let ended = events().filter(|event| event.process != Process::Nemesis && event.kind != Kind::Invoke).count();
    let said = report.workloads.last().map(|workload| workload.events.as_slice()).unwrap_or_default();
    let installed = said.iter().filter(|event| event.value["state"] == "installed").map(|event| event.f.clone());
    (ended as u64, installed.collect())
}

fn show(report: &Report, out: &Path, output: &mut Output) -> Result<(), Failure> {
    if output.format == Format::Json {
        output.json(&report::results(report))?;
        return output.flush();
    }
    let says = |valid| match valid {
        Valid::True => "kept",
        Valid::False => "BROKEN",
        Valid::Unknown => "unknown",
    };
    let rows = report.workloads.iter().flat_map(|workload| {
        workload.verdicts.iter().map(|verdict| {
            let looked_at: Vec<String> =
                verdict.looked_at.iter().map(|(what, count)| format!("{} {what}", HumanCount(*count))).collect();
            let of = workload.run.workload.clone();
            vec![of, verdict.checker.clone(), says(verdict.valid).to_owned(), looked_at.join(", ")]
        })
    });
    output.table(&["WORKLOAD", "CHECKER", "PROMISE", "LOOKED AT"], rows.collect())?;
    for workload in &report.workloads {
        for verdict in workload.verdicts.iter().filter(|verdict| verdict.valid != Valid::True) {
            for violation in verdict.violations.iter().take(VIOLATIONS_SHOWN) {
                output.line(&format!("{}, {}: {}", workload.run.workload, verdict.checker, violation.what))?;
            }
        }
    }
    for gate in report.gates.iter().filter(|gate| !gate.ok) {
        output.line(&format!("too little happened: {}: wanted {}, got {}", gate.name, gate.want, gate.got))?;
    }
    let (ops, faults) = figures(report);
    output.line(&format!("{} operations, {} faults", HumanCount(ops), faults.len()))?;
    output.line(&format!("report: {}", out.join("report.html").display()))?;
    output.line(&format!("repeat: {}", report.reproduce))?;
    output.flush()
}

fn ending(report: &Report, out: &Path) -> Result<(), Failure> {
    let seen = format!("see {}", out.join("report.html").display());
    match report.outcome() {
        Outcome::Pass => Ok(()),
        Outcome::Violation => Err(Failure::Other(anyhow::anyhow!("a promise was broken; {seen}"))),
        Outcome::Vacuous => Err(Failure::Inconclusive(format!("too little happened for a judgement; {seen}"))),
        Outcome::Unknown => Err(Failure::Inconclusive(format!("a checker could not finish; {seen}"))),
    }
}

impl From<drill::Error> for Failure {
    fn from(error: drill::Error) -> Self {
        Self::Inconclusive(format!("the drill itself failed: {error}"))
    }
}
