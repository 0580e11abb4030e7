//! Keeps what shows a failure: a folder under `target/sim` that people, and other tools, can look at.

use crate::{
    plan::Plan,
    run::{Outcome, Told, run},
    trace::fnv,
};
use meridian::proof::history::{self, RunInfo, SCHEMA};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where failures are kept.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/sim").join(name)
}

/// Runs a plan that failed once more, with a trace, and keeps everything. Returns where.
pub(crate) fn keep(name: &str, plan: &Plan, outcome: &Outcome) -> io::Result<PathBuf> {
    let dir = folder(name);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("plan.json"), plan.to_json())?;
    for told in &outcome.told {
        let workload = told.work.workload.name();
        let mut lines = Vec::new();
        for event in &told.events {
            history::write(&mut lines, event)?;
        }
        fs::write(dir.join(format!("history-{workload}.jsonl")), lines)?;
        let info = serde_json::to_string_pretty(&info(plan, outcome, told))?;
        fs::write(dir.join(format!("run-{workload}.json")), info)?;
    }
    let verdicts: Vec<_> = outcome.told.iter().map(|told| (told.work.workload.name(), &told.verdicts)).collect();
    let results = serde_json::json!({"failures": outcome.failures, "verdicts": verdicts, "counts": outcome.counts});
    fs::write(dir.join("results.json"), serde_json::to_string_pretty(&results)?)?;
    fs::write(dir.join("trace.log"), run(plan, true).trace.join("\n"))?;
    Ok(dir)
}

fn info(plan: &Plan, outcome: &Outcome, told: &Told) -> RunInfo {
    RunInfo {
        schema: SCHEMA.to_owned(),
        tool: "sim".to_owned(),
        version: env!("MERIDIAN_VERSION").to_owned(),
        seed: plan.seed,
        plan_hash: format!("{:016x}", fnv(1, plan.to_json().as_bytes())),
        duration_ns: u64::try_from(outcome.simulated.as_nanos()).unwrap_or(u64::MAX),
        clock: "virtual".to_owned(),
        nodes: outcome.nodes.clone(),
        workload: told.work.workload.name().to_owned(),
        empty_at_start: true,
        config: serde_json::to_value(plan).expect("plain data"),
        ..RunInfo::default()
    }
}
