//! Files of a run: `DIR/{run.json, history.jsonl}` of the first workload, `DIR/<workload>/…` of the others,
//! `DIR/results.json`, `DIR/report.html`, and the logs and data of nodes in `DIR/nodes`.

use super::{Error, settings::Settings};
use crate::proof::{
    history::RunInfo,
    report::{self, Report},
    workload::Workload,
};
use std::{
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
};

/// Makes the folder of a run.
///
/// # Errors
/// When it is there and not empty: a drill overwrites nothing.
pub fn prepare(out: &Path) -> Result<(), Error> {
    let failed = || Error::io(out.display().to_string());
    fs::create_dir_all(out).map_err(failed())?;
    if fs::read_dir(out).map_err(failed())?.next().is_some() {
        return Err(Error::Impossible(format!("{} is not empty; choose another --out", out.display())));
    }
    Ok(())
}

/// Where the history of a workload goes.
#[must_use]
pub fn folder(settings: &Settings, workload: Workload) -> PathBuf {
    match settings.workloads.first() {
        Some(first) if *first == workload => settings.out.clone(),
        _ => settings.out.join(workload.name()),
    }
}

/// Logs, data and orders of the nodes.
#[must_use]
pub fn nodes(out: &Path) -> PathBuf {
    out.join("nodes")
}

/// Opens the history of a workload.
///
/// # Errors
/// When it cannot be made.
pub fn history(settings: &Settings, workload: Workload) -> Result<BufWriter<File>, Error> {
    let folder = folder(settings, workload);
    let path = folder.join("history.jsonl");
    fs::create_dir_all(&folder).map_err(Error::io(folder.display().to_string()))?;
    Ok(BufWriter::new(File::create(&path).map_err(Error::io(path.display().to_string()))?))
}

/// Writes what a workload's run was.
///
/// # Errors
/// When it cannot be written.
pub fn run_info(settings: &Settings, workload: Workload, info: &RunInfo) -> Result<(), Error> {
    write(&folder(settings, workload).join("run.json"), &pretty(info)?)
}

/// Writes the report, for people and for programs.
///
/// # Errors
/// When it cannot be written.
pub fn report(out: &Path, report: &Report) -> Result<(), Error> {
    write(&out.join("results.json"), &pretty(&report::results(report))?)?;
    write(&out.join("report.html"), &report::html(report))
}

/// Removes the data of nodes, which nobody needs after a run without a fault to look for. Logs stay.
///
/// # Errors
/// When it cannot be removed.
pub fn forget_data<'a>(data: impl Iterator<Item = &'a Path>) -> Result<(), Error> {
    for data in data {
        fs::remove_dir_all(data).map_err(Error::io(data.display().to_string()))?;
    }
    Ok(())
}

fn pretty(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(value).map_err(|error| Error::io("as JSON")(error.into()))
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(Error::io(path.display().to_string()))
}
