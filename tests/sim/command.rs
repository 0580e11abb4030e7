//! Commands for people: run one plan, run many seeds, make a failing plan small.

use crate::{
    coverage::Coverage,
    keep::keep,
    plan::Plan,
    run::{Outcome, run},
    shrink::{Budget, shrink},
    verdict::signature,
};
use clap::{Args, Parser, Subcommand};
use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant; // Real time: no runtime is entered here.

/// Names of the commands; anything else is for the test harness.
const COMMANDS: [&str; 5] = ["run", "soak", "shrink", "plan", "help"];

/// From so many seeds on a soak must have seen enough.
const GATED_SEEDS: u64 = 100;

/// A soak says where it is after so many seeds.
const PROGRESS_SEEDS: u64 = 50;

/// Whole clusters in one thread, under a seed.
#[derive(Parser)]
#[command(name = "cargo test --test sim --", no_binary_name = true)]
struct Cli {
    #[command(subcommand)]
    command: Sim,
}

/// What is asked for.
#[derive(Subcommand)]
pub(crate) enum Sim {
    /// Run one seed, or one plan, and say what is wrong with it
    Run(Which),
    /// Run many fresh seeds; what fails is kept and made small
    Soak {
        /// Stop after this long
        #[arg(long)]
        hours: Option<f64>,
        /// Stop after so many seeds
        #[arg(long)]
        seeds: Option<u64>,
        /// Threads
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// First seed
        #[arg(long, default_value_t = 1)]
        from: u64,
    },
    /// Make a failing plan small, keeping the way in which it fails
    Shrink(Which),
    /// Print the plan of a seed
    Plan {
        #[arg(long)]
        seed: u64,
        /// The plan that is to provoke a planted bug; `MERIDIAN_PLANT` plants it for `run`
        #[cfg(feature = "planted")]
        #[arg(long)]
        bug: Option<meridian::plant::Bug>,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Which {
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
}

impl Which {
    fn plan(&self) -> (String, Plan) {
        match (&self.plan, self.seed) {
            (Some(path), _) => {
                let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let plan = Plan::from_json(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                (path.file_stem().unwrap().to_string_lossy().into_owned(), plan)
            }
            (None, seed) => {
                let seed = seed.expect("one of the two is required");
                (seed.to_string(), Plan::of(seed))
            }
        }
    }
}

/// The command on the command line, if it is one.
pub(crate) fn asked() -> Option<Sim> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    COMMANDS.contains(&args.first()?.as_str()).then(|| Cli::parse_from(args).command)
}

impl Sim {
    pub(crate) fn run(self) -> ExitCode {
        match self {
            #[cfg(feature = "planted")]
            Self::Plan { seed, bug: Some(bug) } => {
                print!("{}", crate::planted::plan(bug, seed).to_json());
                ExitCode::SUCCESS
            }
            Self::Plan { seed, .. } => {
                print!("{}", Plan::of(seed).to_json());
                ExitCode::SUCCESS
            }
            Self::Run(which) => {
                let (name, plan) = which.plan();
                let began = Instant::now();
                let outcome = run(&plan, false);
                let mut seen = Coverage::default();
                seen.add(&outcome, began.elapsed());
                println!("{seen}");
                for (told, verdict) in outcome.told.iter().flat_map(|told| told.verdicts.iter().map(move |v| (told, v)))
                {
                    let (workload, checker) = (told.work.workload, &verdict.checker);
                    println!("{workload}: {checker}: {:?}, looked at {:?}", verdict.valid, verdict.looked_at);
                }
                if outcome.failures.is_empty() {
                    return ExitCode::SUCCESS;
                }
                println!("{}", explain(&name, &plan, &outcome));
                ExitCode::FAILURE
            }
            Self::Shrink(which) => {
                let (name, plan) = which.plan();
                match shrink(&plan, Budget::PATIENT) {
                    Some(small) => println!("{}", keep_small(&name, &small)),
                    None => println!("it does not fail"),
                }
                ExitCode::SUCCESS
            }
            Self::Soak { hours, seeds, jobs, from } => soak(hours, seeds, jobs, from),
        }
    }
}

/// What is wrong with a run, where it is kept, and how to see it again.
pub(crate) fn explain(name: &str, plan: &Plan, outcome: &Outcome) -> String {
    let mut lines = vec![format!("{name}: {} failures", outcome.failures.len())];
    lines.extend(outcome.failures.iter().map(|failure| format!("  [{}] {}", failure.kind, failure.what)));
    match keep(name, plan, outcome) {
        Ok(dir) => lines.push(format!("again: cargo test --test sim -- run --plan {}/plan.json", dir.display())),
        Err(error) => lines.push(format!("it could not be kept: {error}")),
    }
    lines.join("\n")
}

fn keep_small(name: &str, small: &Plan) -> String {
    let path = crate::keep::folder(name).join("plan.min.json");
    let kept = std::fs::create_dir_all(crate::keep::folder(name)).and_then(|()| std::fs::write(&path, small.to_json()));
    match kept {
        Ok(()) => format!("small: cargo test --test sim -- run --plan {}", path.display()),
        Err(error) => format!("{}: {error}", path.display()),
    }
}

/// Seeds that are taken one after the other, by several threads.
pub(crate) struct Seeds {
    next: AtomicU64,
    end: u64,
    until: Option<Instant>,
}

impl Seeds {
    pub(crate) fn range(first: u64, count: u64) -> Self {
        Self { next: first.into(), end: first.saturating_add(count), until: None }
    }

    fn take(&self) -> Option<u64> {
        if self.until.is_some_and(|until| Instant::now() >= until) {
            return None;
        }
        Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < self.end)
    }
}

/// Runs seeds until there are none: what was seen, and what failed.
pub(crate) fn run_seeds(seeds: &Seeds) -> (Coverage, Vec<String>) {
    let (mut seen, mut failed) = (Coverage::default(), Vec::new());
    while let Some(seed) = seeds.take() {
        let plan = Plan::of(seed);
        let began = Instant::now();
        let outcome = run(&plan, false);
        seen.add(&outcome, began.elapsed());
        if !outcome.failures.is_empty() {
            let explained = explain(&seed.to_string(), &plan, &outcome);
            eprintln!("{explained}");
            failed.push(explained);
        }
    }
    (seen, failed)
}

fn soak(hours: Option<f64>, count: Option<u64>, jobs: usize, from: u64) -> ExitCode {
    let until = hours.map(|hours| Instant::now() + Duration::from_secs_f64(hours * 3_600.0));
    let usual = if until.is_some() { u64::MAX } else { GATED_SEEDS };
    let count = count.unwrap_or(usual);
    let seeds = Seeds { until, ..Seeds::range(from, count) };
    let all = Mutex::new(Coverage::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| soak_seeds(&seeds, &all));
        }
    });
    let all = all.into_inner().unwrap();
    println!("{all}");
    println!("{}", serde_json::to_string(&all).expect("plain data"));
    let gaps = all.gaps();
    let vacuous = all.seeds >= GATED_SEEDS && !gaps.is_empty();
    if vacuous {
        println!("too little was seen of\n  {}", gaps.join("\n  "));
    }
    if all.failed > 0 || vacuous { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// One thread of a soak. The first seed that fails in a new way is made small at once.
fn soak_seeds(seeds: &Seeds, all: &Mutex<Coverage>) {
    static KNOWN: Mutex<Vec<std::collections::BTreeSet<String>>> = Mutex::new(Vec::new());
    while let Some(seed) = seeds.take() {
        let plan = Plan::of(seed);
        let began = Instant::now();
        let outcome = run(&plan, false);
        {
            let mut all = all.lock().unwrap();
            all.add(&outcome, began.elapsed());
            if all.seeds.is_multiple_of(PROGRESS_SEEDS) {
                eprintln!("{} seeds, {} failed", all.seeds, all.failed);
            }
        }
        if outcome.failures.is_empty() {
            continue;
        }
        println!("{}", explain(&seed.to_string(), &plan, &outcome));
        let signature = signature(&outcome.failures);
        let new = {
            let mut known = KNOWN.lock().unwrap();
            let new = !known.contains(&signature);
            known.push(signature);
            new
        };
        if new && let Some(small) = shrink(&plan, Budget::QUICK) {
            println!("{}", keep_small(&seed.to_string(), &small));
        }
    }
}
