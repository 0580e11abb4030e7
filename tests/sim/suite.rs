//! The tests of `cargo test --test sim`: directed scenarios, the same plan twice, plans that once found a bug, and fresh
//! seeds with the gates that they must pass together.

use crate::{
    command::{self, Seeds},
    coverage::Coverage,
    cuts, dividing, forming, handing, keyspaces,
    plan::Plan,
    recoveries, restarts,
    run::run,
    trace::fnv,
};
use libtest_mimic::{Failed, Trial};
use std::{path::Path, process::Command, sync::OnceLock};

/// Trials of fresh seeds.
const CHUNKS: usize = 4;
/// Fresh seeds of one trial.
const CHUNK_SEEDS: u64 = 30;
/// Seeds that are run twice.
const TWICE: [u64; 4] = [1, 2, 3, 4];
/// Fewer lines cannot have a run's frames in them.
const LINES_MIN: usize = 2_000;

pub(crate) fn trials() -> Vec<Trial> {
    let directed = [
        cuts::SCENARIOS,
        dividing::SCENARIOS,
        forming::SCENARIOS,
        handing::SCENARIOS,
        keyspaces::SCENARIOS,
        recoveries::SCENARIOS,
        restarts::SCENARIOS,
    ]
    .concat();
    let mut trials: Vec<Trial> = directed
        .into_iter()
        .map(|(name, run)| {
            Trial::test(name.trim_start_matches("sim::"), move || {
                run();
                Ok(())
            })
        })
        .collect();
    for seed in TWICE {
        trials.push(Trial::test(format!("twice::seed_{seed}_gives_the_same_run_byte_for_byte"), move || twice(seed)));
    }
    for (name, text) in regressions() {
        trials.push(Trial::test(format!("regressions::{name}"), move || regression(&name, &text)));
    }
    for chunk in 0..CHUNKS {
        trials.push(Trial::test(format!("seeds::fresh_{chunk}"), move || match &fresh(chunk).1 {
            failed if failed.is_empty() => Ok(()),
            failed => Err(failed.join("\n").into()),
        }));
    }
    trials.push(Trial::test("seeds::together_they_saw_enough", enough));
    #[cfg(feature = "planted")]
    trials.extend(crate::planted::trials());
    trials
}

/// One plan, in two threads: another thread has other thread-local randomness, hash keys and addresses.
fn twice(seed: u64) -> Result<(), Failed> {
    let lines = move |seed| {
        let outcome = run(&Plan::of(seed), true);
        let told = outcome.told.iter().flat_map(|told| &told.events);
        let told = told.map(|event| serde_json::to_string(event).expect("plain data"));
        outcome.trace.iter().cloned().chain(told).collect::<Vec<String>>()
    };
    let (first, second) = (lines(seed), std::thread::spawn(move || lines(seed)).join().unwrap());
    if let Some(at) = (0..first.len().max(second.len())).find(|at| first.get(*at) != second.get(*at)) {
        let before = first[at.saturating_sub(5)..at].join("\n");
        let (first, second) = (first.get(at), second.get(at));
        return Err(format!("line {at}, after\n{before}\nfirst:  {first:?}\nsecond: {second:?}").into());
    }
    assert!(first.len() > LINES_MIN, "frames are in it: {}", first.len());
    assert_ne!(Plan::of(seed), Plan::of(seed + 1), "another seed is another plan");
    Ok(())
}

/// The plans under `tests/sim/regressions`.
fn regressions() -> Vec<(String, String)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sim/regressions");
    let mut plans: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    plans.sort();
    plans
}

fn regression(name: &str, text: &str) -> Result<(), Failed> {
    let plan = Plan::from_json(text)?;
    let outcome = run(&plan, false);
    if outcome.failures.is_empty() { Ok(()) } else { Err(command::explain(name, &plan, &outcome).into()) }
}

/// What the fresh seeds follow from: all that decides how a run goes. A commit of documents tries no others.
const CODE: [&str; 4] = ["HEAD:src", "HEAD:proto", "HEAD:tests/sim", "HEAD:Cargo.lock"];

/// The first of the fresh seeds: `SIM_SEED`, or follows from the code as it was committed, so that every change of it tries
/// others and everybody tries the same.
fn base() -> u64 {
    static BASE: OnceLock<u64> = OnceLock::new();
    *BASE.get_or_init(|| {
        let given = std::env::var("SIM_SEED").ok().map(|seed| seed.parse().expect("SIM_SEED is a number"));
        let base = given.unwrap_or_else(|| {
            let code = Command::new("git").arg("rev-parse").args(CODE).output();
            // Without git, always the same.
            let code = code.map(|output| output.stdout).unwrap_or_default();
            (fnv(1, &code) % 1_000_000) * 1_000
        });
        eprintln!("fresh seeds from {base} on; SIM_SEED={base} runs them again");
        base
    })
}

/// Runs a chunk of fresh seeds, once: what was seen, and what failed.
fn fresh(chunk: usize) -> &'static (Coverage, Vec<String>) {
    static RAN: [OnceLock<(Coverage, Vec<String>)>; CHUNKS] = [const { OnceLock::new() }; CHUNKS];
    RAN[chunk].get_or_init(|| {
        let first = base() + chunk as u64 * CHUNK_SEEDS;
        command::run_seeds(&Seeds::range(first, CHUNK_SEEDS))
    })
}

/// Waits for the chunks, and runs those that were not asked for.
fn enough() -> Result<(), Failed> {
    let mut all = Coverage::default();
    (0..CHUNKS).for_each(|chunk| all.join(&fresh(chunk).0));
    eprintln!("{all}");
    match all.gaps() {
        gaps if gaps.is_empty() => Ok(()),
        gaps => Err(format!("too little was seen of\n{}", gaps.join("\n")).into()),
    }
}
