//! One node: a process of this very binary, its files, and what it is made to suffer from the inside.
//!
//! Invariants:
//! * signals go to the child that was started here and has not been waited for, hence to no other process;
//! * a dropped node is killed and waited for.

use super::Error;
use crate::{
    control::{Disk, Orders},
    plant,
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Patience with a node that was told to stop in order.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// How often the end of a process is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What a node's process does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It runs.
    Running,
    /// SIGSTOP was sent.
    Paused,
    /// There is none.
    Down,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Name in histories: `n1`, …
    pub name: String,
    /// `host:port` of its API.
    pub address: String,
    /// Its data.
    pub data: PathBuf,
    /// Where its log lines go.
    pub log: PathBuf,
    control: PathBuf,
    orders: Orders,
    /// Program and arguments that start it.
    command: Vec<String>,
    child: Option<Child>,
    paused: bool,
}

impl Node {
    /// A node that does not run yet. `command` starts it; `dir` gets its log and its orders.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn new(name: String, address: String, dir: &std::path::Path, command: Vec<String>) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::io(dir.display().to_string()))?;
        let file = |suffix: &str| dir.join(format!("{name}{suffix}"));
        let (data, log, control) = (file(""), file(".log"), file(".orders.toml"));
        Ok(Self { name, address, data, log, control, orders: Orders::default(), command, child: None, paused: false })
    }

    /// What it does now, as far as it was told to.
    #[must_use]
    pub const fn state(&self) -> State {
        match (&self.child, self.paused) {
            (None, _) => State::Down,
            (Some(_), true) => State::Paused,
            (Some(_), false) => State::Running,
        }
    }

    /// Starts it, unless it runs.
    ///
    /// # Errors
    /// When the process cannot be made.
    pub fn start(&mut self) -> Result<(), Error> {
        if self.child.is_some() {
            return Ok(());
        }
        let what = || format!("starting {}", self.name);
        self.orders.write(&self.control).map_err(Error::io(what()))?;
        let log = File::options().create(true).append(true).open(&self.log).map_err(Error::io(what()))?;
        let mut command = Command::new(&self.command[0]);
        // Settings are the drill's to make; a bug that is planted in this process is to be in its nodes as well.
        let is_setting = |name: &str| name.starts_with("MERIDIAN_") && name != plant::VARIABLE;
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        command.args(&self.command[1..]).arg("--data").arg(&self.data).env("MERIDIAN_DRILL_CONTROL", &self.control);
        command.env("NO_COLOR", "1"); // The log goes to a file.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // A paused node cannot see that the drill is gone. The system ends it: a group of processes whose stopped members
        // have lost the last parent outside of it gets SIGHUP and SIGCONT. And Ctrl-C is for the drill alone.
        command.process_group(0);
        self.child = Some(command.spawn().map_err(Error::io(what()))?);
        self.paused = false;
        Ok(())
    }

    /// Sends SIGKILL, if it runs or is paused, and does not wait; [`Node::kill`] must follow.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn strike(&self) -> Result<(), Error> {
        self.signal(Signal::KILL).map(|_there| ())
    }

    /// `kill -9`, if it runs or is paused; it is gone when this returns.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn kill(&mut self) -> Result<(), Error> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        self.paused = false;
        let ended = child.kill().and_then(|()| child.wait());
        ended.map(|_status| ()).map_err(Error::io(format!("killing {}", self.name)))
    }

    /// SIGSTOP, if it runs.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.paused = self.signal(Signal::STOP)?;
        Ok(())
    }

    /// SIGCONT, if it was paused.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn resume(&mut self) -> Result<(), Error> {
        if self.paused {
            self.signal(Signal::CONT)?;
            self.paused = false;
        }
        Ok(())
    }

    /// Tells it to stop in order, and waits; one that does not is killed. Says whether it ended well.
    ///
    /// # Errors
    /// When the system refuses.
    pub async fn stop(&mut self) -> Result<bool, Error> {
        self.resume()?;
        if !self.signal(Signal::TERM)? {
            return Ok(true);
        }
        let ended = self.wait_end(STOP_PATIENCE).await;
        self.kill()?;
        Ok(ended.is_some_and(|status| status.success()))
    }

    fn signal(&self, signal: Signal) -> Result<bool, Error> {
        let Some(child) = &self.child else { return Ok(false) };
        kill_process(Pid::from_child(child), signal)
            .map_err(|error| Error::io(format!("signalling {}", self.name))(error.into()))?;
        Ok(true)
    }

    /// How it ended, if it did by itself. It counts as down from then on.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())?;
        self.child = None;
        self.paused = false;
        Some(status)
    }

    /// Waits for it to end by itself.
    pub async fn wait_end(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if self.child.is_none() || Instant::now() >= deadline {
                return None;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Changes what it suffers from the inside.
    ///
    /// # Errors
    /// When its orders cannot be written.
    pub fn order(&mut self, change: impl FnOnce(&mut Orders)) -> Result<(), Error> {
        change(&mut self.orders);
        self.orders.write(&self.control).map_err(Error::io(format!("orders of {}", self.name)))
    }

    /// Its disk works and its clock is right again. How long a sync takes stays, if the disk is a lossy one.
    ///
    /// # Errors
    /// When its orders cannot be written.
    pub fn relieve(&mut self, sync_ms: u64) -> Result<(), Error> {
        let relieved = Orders { wall_offset_ms: 0, disk: Disk::Good, sync_ms };
        if relieved == self.orders { Ok(()) } else { self.order(|orders| *orders = relieved) }
    }

    /// How many of its lines, in all its lives, hold this text.
    #[must_use]
    pub fn said(&self, what: &str) -> u64 {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter(|line| line.contains(what)).count() as u64
    }

    /// The last lines that it wrote.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::error!(%error, "a node of the drill may still run");
        }
    }
}
