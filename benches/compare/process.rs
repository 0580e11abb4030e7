//! Processes of the systems that are compared: started, watched and ended here.
//!
//! Invariants:
//! * only children that were started here and not waited for are signalled;
//! * whatever ends the comparison, dropped servers are killed and waited for.

use anyhow::{Context as _, bail};
use rustix::{
    process::{Pid, Signal, kill_process},
    time::{ClockId, clock_gettime},
};
use std::{
    fs::{self, File},
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Below the ports that systems hand out to clients, so that none is taken before its server starts.
const PORTS: std::ops::Range<u16> = 21_000..32_000;
/// Unit of times in /proc/PID/stat: Linux shows programs 100 ticks a second, whatever its own are.
const TICK_US: u64 = 10_000;
/// Words of a program's answer that name its version; Redis goes on with how it was built.
const VERSION_WORDS_MAX: usize = 3;
/// Lines of a log that are shown when its server has ended.
const LOG_LINES_SHOWN: usize = 5;

/// The servers of one system.
#[derive(Default)]
pub(crate) struct Servers {
    processes: Vec<Process>,
}

struct Process {
    name: String,
    command: Command,
    child: Child,
    log: PathBuf,
    /// It was ended on purpose and waited for.
    killed: bool,
}

/// Memory of all servers of a system together, in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Memory {
    /// Resident now.
    pub(crate) resident: u64,
    /// Of these, not backed by a file: what the system cannot take back.
    pub(crate) anonymous: u64,
    /// Most that was ever resident.
    pub(crate) peak: u64,
}

impl Servers {
    /// Starts one more; what it prints goes to a log in `dir`.
    pub(crate) fn start(&mut self, name: String, dir: &Path, mut command: Command) -> anyhow::Result<()> {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        // Ctrl-C is for the comparison, which then ends its servers.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("starting {name}: {command:?}"))?;
        self.processes.push(Process { name, command, child, log, killed: false });
        Ok(())
    }

    /// Fails if one has ended that was not killed here.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        for process in self.processes.iter_mut().filter(|process| !process.killed) {
            if let Some(status) = process.child.try_wait()? {
                let log = fs::read_to_string(&process.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let last = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
                bail!("{} ended ({status}); its last words:\n{last}", process.name);
            }
        }
        Ok(())
    }

    /// `kill -9` of one; it is gone when this returns.
    pub(crate) fn kill(&mut self, index: usize) -> anyhow::Result<()> {
        let process = &mut self.processes[index];
        process.child.kill().and_then(|()| process.child.wait()).context("killing a server")?;
        process.killed = true;
        Ok(())
    }

    /// Starts one that was killed.
    pub(crate) fn start_again(&mut self, index: usize) -> anyhow::Result<()> {
        let process = &mut self.processes[index];
        process.child = process.command.spawn().with_context(|| format!("starting {} again", process.name))?;
        process.killed = false;
        Ok(())
    }

    /// SIGSTOP to one.
    pub(crate) fn stop(&self, index: usize) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.processes[index].child), Signal::STOP)?)
    }

    /// SIGCONT to one.
    pub(crate) fn resume(&self, index: usize) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.processes[index].child), Signal::CONT)?)
    }

    /// CPU time of all that run, in microseconds.
    pub(crate) fn cpu_us(&self) -> u64 {
        self.running().map(|pid| cpu_us_of(pid).unwrap_or(0)).sum()
    }

    /// Memory of all that run.
    pub(crate) fn memory(&self) -> Memory {
        self.running().fold(Memory::default(), |sum, pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            Memory {
                resident: sum.resident + bytes_of(&status, "VmRSS:"),
                anonymous: sum.anonymous + bytes_of(&status, "RssAnon:"),
                peak: sum.peak + bytes_of(&status, "VmHWM:"),
            }
        })
    }

    fn running(&self) -> impl Iterator<Item = u32> {
        self.processes.iter().filter(|process| !process.killed).map(|process| process.child.id())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let mut left: Vec<_> = self.processes.iter_mut().filter(|process| !process.killed).collect();
        for process in &mut left {
            let _ended_already = process.child.kill();
        }
        for process in &mut left {
            let _ended_already = process.child.wait();
        }
    }
}

fn cpu_us_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before ")" may hold anything; utime and stime are the 12th and 13th fields after it.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) * TICK_US)
}

fn bytes_of(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// CPU time of this process, in microseconds.
pub(crate) fn own_cpu_us() -> u64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// So many addresses on loopback at which nobody listens.
pub(crate) fn free_addresses(count: usize) -> anyhow::Result<Vec<String>> {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(0);
    let mut found = Vec::new();
    for _ in PORTS {
        let step = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let port = PORTS.start + (std::process::id() as u16 % 100 * 100 + step) % (PORTS.end - PORTS.start);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            found.push(format!("127.0.0.1:{port}"));
        }
        if found.len() == count {
            return Ok(found);
        }
    }
    bail!("fewer than {count} ports are free between {} and {}", PORTS.start, PORTS.end)
}

/// The first words that a program prints when it is asked for its version; `None` if there is no such program.
pub(crate) fn version_of(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let words: Vec<&str> = text.lines().next()?.split_whitespace().take(VERSION_WORDS_MAX).collect();
    Some(words.join(" "))
}
