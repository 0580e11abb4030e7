//! `meridian check`: judges recorded histories, of this tool or another.
//!
//! Invariants:
//! * it ends well only if every verdict is true: what could not be decided is not a pass;
//! * a file that is no history is refused, naming the line; a last line that was cut short is left out, and that is said.

use super::{failure::Failure, options::Format, output::Output};
use crate::proof::{
    check::{self, History, Valid, Verdict},
    history::{self, Event, RunInfo, SCHEMA},
};
use clap::Args;
use serde::Serialize;
use std::{
    fs,
    path::{Path, PathBuf},
};
use tokio::time::Instant;

/// Name of a history in its folder.
const HISTORY: &str = "history.jsonl";
/// Name of what is known of the run, beside it.
const RUN: &str = "run.json";

/// Judge recorded histories (format kvhist/1).
#[derive(Args, Debug)]
pub struct Check {
    /// Histories: files, or folders with a history.jsonl (and a run.json), or folders of such folders
    #[arg(required = true, value_name = "DIR|FILE")]
    histories: Vec<PathBuf>,
    /// What made them; by default run.json says it, or else the operations do
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(check::WORKLOADS))]
    workload: Option<String>,
}

/// A verdict, and what it cost.
#[derive(Serialize)]
struct Judged {
    file: String,
    workload: String,
    took_ms: u64,
    #[serde(flatten)]
    verdict: Verdict,
}

/// Runs it.
///
/// # Errors
/// When a file is no history, and when a verdict is not true.
pub fn run(args: &Check, output: &mut Output) -> Result<(), Failure> {
    let mut all = Vec::new();
    for path in &args.histories {
        for file in files(path)? {
            all.extend(judge(&file, args.workload.as_deref())?);
        }
    }
    print(&all, output)?;
    let count = |valid| all.iter().filter(|judged| judged.verdict.valid == valid).count();
    match (count(Valid::False), count(Valid::Unknown)) {
        (0, 0) => Ok(()),
        (0, unknown) => {
            Err(Failure::Other(anyhow::anyhow!("unknown: {unknown} of {} verdicts; that is not a pass", all.len())))
        }
        (wrong, _) => Err(Failure::Other(anyhow::anyhow!("violated: {wrong} of {} verdicts are false", all.len()))),
    }
}

/// The histories that a path stands for.
fn files(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let own = path.join(HISTORY);
    if own.exists() {
        return Ok(vec![own]);
    }
    let entries = fs::read_dir(path).map_err(|error| unreadable(path, &error))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path().join(HISTORY))).filter(|file| file.exists()).collect();
    files.sort();
    if files.is_empty() {
        return Err(unreadable(path, &format!("there is no {HISTORY} in it")));
    }
    Ok(files)
}

fn unreadable(path: &Path, why: &impl std::fmt::Display) -> Failure {
    Failure::Usage(format!("error: {}: {why}", path.display()))
}

fn judge(file: &Path, workload: Option<&str>) -> Result<Vec<Judged>, Failure> {
    let bytes = fs::read(file).map_err(|error| unreadable(file, &error))?;
    let events = history::read(bytes.as_slice()).map_err(|error| unreadable(file, &error))?;
    if events.is_empty() {
        return Err(unreadable(file, &"there are no events in it"));
    }
    if bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count() > events.len() {
        eprintln!("note: {}: the last line is cut short and left out", file.display());
    }
    let workload = match workload {
        Some(workload) => workload.to_owned(),
        None => workload_of(file, &events)?,
    };
    let history = History::of(&events);
    let judged = |(_, check): check::Checker| {
        let began = Instant::now();
        let verdict = check(&history);
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Judged { file: file.display().to_string(), workload: workload.clone(), took_ms, verdict }
    };
    Ok(check::checkers(&workload, &events).into_iter().map(judged).collect())
}

/// What run.json says, or else what the operations show.
fn workload_of(file: &Path, events: &[Event]) -> Result<String, Failure> {
    let beside = file.with_file_name(RUN);
    if file.file_name().is_some_and(|name| name == HISTORY) && beside.exists() {
        let bytes = fs::read(&beside).map_err(|error| unreadable(&beside, &error))?;
        let run: RunInfo = serde_json::from_slice(&bytes).map_err(|error| unreadable(&beside, &error))?;
        if run.schema != SCHEMA {
            return Err(unreadable(&beside, &format!("its schema is {:?}, this reads {SCHEMA:?}", run.schema)));
        }
        if check::WORKLOADS.contains(&run.workload.as_str()) {
            return Ok(run.workload);
        }
        if !run.workload.is_empty() {
            let known = check::WORKLOADS.join(", ");
            return Err(unreadable(&beside, &format!("workload {:?} is none of {known}", run.workload)));
        }
    }
    let found = check::infer(events)
        .ok_or_else(|| unreadable(file, &"its operations are of no known workload; add --workload"));
    found.map(str::to_owned)
}

fn print(all: &[Judged], output: &mut Output) -> Result<(), Failure> {
    if output.format == Format::Json {
        return all.iter().try_for_each(|judged| output.json(judged));
    }
    let row = |judged: &Judged| {
        let looked_at = judged.verdict.looked_at.iter().filter(|(_, count)| **count > 0);
        let looked_at: Vec<String> = looked_at.map(|(name, count)| format!("{count} {name}")).collect();
        vec![
            judged.file.clone(),
            judged.workload.clone(),
            judged.verdict.checker.clone(),
            valid(judged.verdict.valid).to_owned(),
            format!("{} ms", judged.took_ms),
            looked_at.join(", "),
        ]
    };
    output.table(&["HISTORY", "WORKLOAD", "CHECKER", "VALID", "TOOK", "LOOKED AT"], all.iter().map(row).collect())?;
    for judged in all {
        for violation in &judged.verdict.violations {
            let key = violation.key.as_ref().map(|key| format!(" of {key:?}")).unwrap_or_default();
            let head = format!("{}: {}{key}: {}", judged.verdict.checker, violation.kind, violation.what);
            output.line(&format!("\n{head}"))?;
            if !violation.events.is_empty() {
                output.line(&format!("  {}: events {}", judged.file, numbers(&violation.events)))?;
            }
        }
    }
    Ok(())
}

fn valid(valid: Valid) -> &'static str {
    match valid {
        Valid::True => "true",
        Valid::False => "FALSE",
        Valid::Unknown => "unknown",
    }
}

fn numbers(of: &[u64]) -> String {
    of.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
}
