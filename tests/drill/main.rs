//! `meridian drill`, with this binary: three drills that must pass, and how a drill ends when it cannot.
//!
//! Drills take turns: a machine that is busy with another one says little about how long anything takes.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use meridian::proof::history::{self, Event, Kind, Process, RunInfo};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value as Json;
use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tempfile::TempDir;

static TURN: Mutex<()> = Mutex::new(());

/// Patience with what takes no time.
const LOOKS: usize = 1_000;
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A folder for a drill that runs alone.
struct Place {
    dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Place {
    fn take() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self { dir: tempfile::tempdir().unwrap(), _turn: turn }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("drill")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_meridian"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MERIDIAN_")) {
            command.env_remove(name);
        }
        command.arg("drill").args(words).arg("--out").arg(self.out()).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs a drill that must pass; its results.
    fn pass(&self, words: &[&str]) -> Json {
        let output = self.run(words);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            // The histories are gone with the folder: keep them for whoever looks into it.
            let kept = std::env::temp_dir().join(format!("meridian-drill-failed-{}", std::process::id()));
            fs::rename(self.out(), &kept).unwrap();
            panic!("{words:?}: {}\n{stdout}\n{stderr}\nkept in {}", output.status, kept.display());
        }
        let results: Json = serde_json::from_slice(&fs::read(self.out().join("results.json")).unwrap()).unwrap();
        assert_eq!(results["verdict"], "pass");
        assert!(fs::read_to_string(self.out().join("report.html")).unwrap().contains("</html>"));
        assert!(self.out().join("nodes/n1.log").exists() && !self.out().join("nodes/n1").exists(), "data is gone");
        results
    }

    /// A history as it was written, and its `run.json`.
    fn history(&self, workload: &str) -> (RunInfo, Vec<Event>) {
        let folder = self.out().join(workload);
        let run = serde_json::from_slice(&fs::read(folder.join("run.json")).unwrap()).unwrap();
        let events = history::read(BufReader::new(File::open(folder.join("history.jsonl")).unwrap())).unwrap();
        (run, events)
    }
}

fn installed(events: &[Event], f: &str) -> usize {
    let of = |event: &&Event| event.process == Process::Nemesis && event.f == f && event.value["state"] == "installed";
    events.iter().filter(of).count()
}

#[test]
fn killed_and_cut_off_nodes_cost_no_promise() {
    let place = Place::take();
    let faults = "kill,partition,one-way,ring,divide,merge,drain,replace";
    place.pass(&["--seconds", "40", "--nodes", "4", "--faults", faults, "--workload", "register,counter,rows,bank"]);
    let (run, events) = place.history("");
    assert_eq!((run.tool.as_str(), run.workload.as_str(), run.nodes.len()), ("drill", "register", 4));
    assert!(
        ["divide", "merge", "drain", "replace"].iter().all(|fault| installed(&events, fault) >= 1),
        "the map has shown them"
    );
    assert!(installed(&events, "kill") >= 1 && installed(&events, "ring") >= 1);
    assert_eq!(installed(&events, "restart-all"), 1, "kill -9 of all comes at the end");
    assert!(events.iter().any(|event| event.kind == Kind::Ok && event.f == "cas"));
    let (run, events) = place.history("rows");
    assert_eq!(run.workload, "rows");
    assert!(installed(&events, "partition") >= 1, "faults are in every history");
    assert!(events.iter().any(|event| event.kind == Kind::Ok && event.f == "scan"));
}

#[test]
fn leases_of_paused_and_isolated_leaders_end_in_time() {
    let place = Place::take();
    let faults = ["--faults", "pause,isolate-leader,isolate-driver,clock"];
    let what = ["--seconds", "40", "--nodes", "3", "--workload", "register,levels", "--consistency", "lease"];
    place.pass(&[faults.as_slice(), what.as_slice()].concat());
    let (_, events) = place.history("");
    assert!(installed(&events, "pause") >= 1 && installed(&events, "isolate-leader") >= 1);
    let lease =
        |event: &&Event| event.kind == Kind::Ok && event.f == "read" && event.mode().mode == history::Mode::Lease;
    assert!(events.iter().filter(lease).count() > 100);
}

#[test]
fn what_was_acknowledged_survives_the_loss_of_everything_not_synced() {
    let place = Place::take();
    let faults = "power-loss,disk-full,stall";
    place.pass(&["--seconds", "40", "--nodes", "3", "--faults", faults, "--workload", "register,counter,rows"]);
    let (_, events) = place.history("counter");
    assert!(installed(&events, "power-loss") >= 1 && installed(&events, "disk-full") >= 1);
    let at_the_end = |event: &&Event| event.phase == history::Phase::Final && event.kind == Kind::Ok;
    assert!(events.iter().filter(at_the_end).count() > 10);
}

#[test]
fn a_drill_that_cannot_do_its_work_says_so_and_blames_nobody() {
    let place = Place::take();
    for (words, why) in [
        (["--nodes", "1", "--replicas", "3"].as_slice(), "--replicas 3"),
        (&["--nodes", "1", "--replicas", "1"], "need --replicas 3"),
        (&["--endpoints", "127.0.0.1:1"], "127.0.0.1:1"),
        (&["--endpoints", "127.0.0.1:1", "--faults", "divide,replace"], "divide, merge and drain"),
    ] {
        let output = Place::run(&place, words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{words:?}: {stderr}");
        assert!(stderr.contains(why) && !stderr.contains("promise"), "{words:?}: {stderr}");
        let _there_or_not = fs::remove_dir_all(place.out());
    }
    fs::create_dir_all(place.out()).unwrap();
    fs::write(place.out().join("mine"), "").unwrap();
    assert_eq!(place.run(&["--nodes", "3"]).status.code(), Some(7), "nothing is overwritten");
}

/// Waits until every node holds its data directory, or none does any more.
fn wait_nodes(out: &Path, run: bool) {
    let held =
        |node: &str| File::open(out.join("nodes").join(node).join("LOCK")).is_ok_and(|file| file.try_lock().is_err());
    for _ in 0..LOOKS {
        if ["n1", "n2", "n3"].into_iter().all(|node| held(node) == run) {
            return;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    panic!("nodes run: not {run}");
}

/// A drill of this test that runs, with whatever it says.
fn started(place: &Place, faults: &str, stderr: Stdio) -> Child {
    let mut command = place.command(&["--nodes", "3", "--faults", faults, "--workload", "register"]);
    command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap()
}

#[test]
fn a_paused_node_ends_with_its_drill_too() {
    let place = Place::take();
    let mut child = started(&place, "pause", Stdio::piped());
    let said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let paused = said.take_while(|line| !line.contains("SIGSTOP to")).count();
    assert!(paused > 0, "it says what it does");
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    wait_nodes(&place.out(), false);
}

#[test]
fn nodes_end_with_their_drill_however_that_ends() {
    let place = Place::take();
    for signal in [Signal::INT, Signal::KILL] {
        let mut child = started(&place, "kill", Stdio::null());
        wait_nodes(&place.out(), true);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), (signal == Signal::INT).then_some(7));
        wait_nodes(&place.out(), false);
        fs::remove_dir_all(place.out()).unwrap();
    }
}
