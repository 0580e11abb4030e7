//! Clusters of `meridian start` processes on loopback ports that nobody else uses.
//!
//! Invariants: a process is signalled only through the handle of the child that was started here; whatever happens to
//! the test, its processes end with it.

use meridian::client::Client;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    future::Future,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep},
};

/// Patience with anything that has no bar of its own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often something awaited is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Fleets at the same time: more only wait for each other.
const FLEETS_MAX: u32 = 2;
/// Lines of a node's log that are shown when a test fails.
const LOG_LINES_SHOWN: usize = 20;

static TURNS: Semaphore = Semaphore::const_new(FLEETS_MAX as usize);

/// Waits until `look` finds something, and fails with what it last saw instead.
pub(crate) async fn eventually<T, F>(patience: Duration, what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let deadline = Instant::now() + patience;
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) => assert!(Instant::now() < deadline, "{what}: not after {patience:?}; {seen}"),
        }
        sleep(LOOK_EVERY).await;
    }
}

/// A block of ports, held by a lock file: below the ports that systems hand out, so that none is taken while its node is
/// down.
pub(crate) struct Ports {
    first: u16,
    _lock: File,
}

impl Ports {
    const FIRST: u16 = 20_480;
    const END: u16 = 32_768;
    const BLOCK: u16 = 256;
    /// gRPC ports used of a block; the HTTP ports lie 100 above them.
    const USED: u16 = 10;

    pub(crate) fn reserve() -> Self {
        let dir = std::env::temp_dir().join("meridian-test-ports");
        fs::create_dir_all(&dir).unwrap();
        let blocks: Vec<u16> = (Self::FIRST..Self::END).step_by(Self::BLOCK.into()).collect();
        let begin = std::process::id() as usize % blocks.len();
        for first in blocks[begin..].iter().chain(&blocks[..begin]).copied() {
            let path = dir.join(first.to_string());
            let Ok(lock) = File::options().create(true).write(true).truncate(false).open(path) else { continue };
            let ports = (first..first + Self::USED).chain(first + 100..first + 100 + Self::USED);
            if lock.try_lock().is_ok()
                && ports.into_iter().all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok())
            {
                return Self { first, _lock: lock };
            }
        }
        panic!("no block of free ports");
    }

    pub(crate) fn port(&self, index: usize) -> u16 {
        assert!(index < Self::USED.into());
        self.first + index as u16
    }

    pub(crate) fn address(&self, index: usize) -> String {
        format!("127.0.0.1:{}", self.port(index))
    }
}

/// The binary, without settings from the environment.
pub(crate) fn meridian() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meridian"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MERIDIAN_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Nodes, by index.
pub(crate) struct Fleet {
    dir: TempDir,
    ports: Ports,
    nodes: Vec<Option<Child>>,
    settings: Vec<String>,
    _turn: SemaphorePermit<'static>,
}

impl Fleet {
    /// A cluster of `nodes` that is formed and healthy. `settings` are further flags of every node.
    pub(crate) async fn start(nodes: usize, settings: &[&str]) -> Self {
        Self::start_with(nodes, settings, 1).await
    }

    /// The same, while no other fleet runs: for what has to happen within a time.
    pub(crate) async fn start_alone(nodes: usize, settings: &[&str]) -> Self {
        Self::start_with(nodes, settings, FLEETS_MAX).await
    }

    async fn start_with(nodes: usize, settings: &[&str], turns: u32) -> Self {
        let turn = TURNS.acquire_many(turns).await.unwrap();
        let mut fleet = Self {
            dir: tempfile::tempdir().unwrap(),
            ports: Ports::reserve(),
            nodes: (0..nodes).map(|_| None).collect(),
            settings: settings.iter().map(|setting| (*setting).to_owned()).collect(),
            _turn: turn,
        };
        fleet.start_all();
        let formed = fleet.client().await.admin().init(nodes.min(3) as u32).await.unwrap();
        assert!(formed.created);
        fleet.healthy().await;
        fleet
    }

    /// Starts every node that does not run.
    pub(crate) fn start_all(&mut self) {
        (0..self.nodes.len()).for_each(|index| self.start_node(index));
    }

    /// Starts a node unless it runs.
    pub(crate) fn start_node(&mut self, index: usize) {
        if self.nodes[index].is_none() {
            let child = self.command(index).spawn().unwrap();
            self.nodes[index] = Some(child);
        }
    }

    /// What starts a node, its messages going to its log.
    pub(crate) fn command(&self, index: usize) -> Command {
        let join: Vec<_> =
            (0..self.nodes.len()).filter(|other| *other != index).map(|other| self.address(other)).collect();
        let mut command = meridian();
        command.args(["start", "--listen", &self.address(index), "--data"]).arg(self.data(index));
        if !join.is_empty() {
            command.args(["--join", &join.join(",")]);
        }
        let log = File::options().create(true).append(true).open(self.log(index)).unwrap();
        command.args(&self.settings).stdout(Stdio::null()).stderr(log);
        command
    }

    pub(crate) fn address(&self, index: usize) -> String {
        self.ports.address(index)
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        (0..self.nodes.len()).map(|index| self.address(index)).collect()
    }

    /// Data directory of a node.
    pub(crate) fn data(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("n{index}"))
    }

    fn log(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("n{index}.log"))
    }

    /// A client that was told all addresses.
    pub(crate) async fn client(&self) -> Client {
        self.client_of(self.addresses()).await
    }

    /// A client that was told these addresses.
    pub(crate) async fn client_of(&self, addresses: Vec<String>) -> Client {
        Client::builder(addresses).connect_deadline(PATIENCE).connect().await.unwrap()
    }

    /// kill -9 of these nodes at once; they are gone when this returns.
    pub(crate) fn kill(&mut self, indices: impl IntoIterator<Item = usize>) {
        let mut killed: Vec<Child> = indices.into_iter().filter_map(|index| self.nodes[index].take()).collect();
        killed.iter_mut().for_each(|child| child.kill().unwrap());
        killed.iter_mut().for_each(|child| assert!(!child.wait().unwrap().success()));
    }

    pub(crate) fn kill_all(&mut self) {
        self.kill(0..self.nodes.len());
    }

    /// SIGTERM to a node; how it ended.
    pub(crate) async fn terminate(&mut self, index: usize) -> ExitStatus {
        let mut child = self.nodes[index].take().unwrap();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        ended(&mut child).await
    }

    /// Waits until every node runs, is alive in the eyes of every other, and every partition is led and complete.
    pub(crate) async fn healthy(&self) {
        for address in self.addresses() {
            let client = self.client_of(vec![address.clone()]).await;
            eventually(PATIENCE, &format!("health of {address}"), || async {
                let status = client.admin().status().await.map_err(|error| error.to_string())?;
                let whole = status.nodes.iter().filter(|node| node.alive).count() >= self.nodes.len();
                if status.healthy && whole { Ok(()) } else { Err(format!("{status:?}")) }
            })
            .await;
        }
    }

    /// Runs a command against all nodes.
    pub(crate) fn run(&self, words: &[&str]) -> std::process::Output {
        meridian().args(words).args(["--endpoints", &self.addresses().join(",")]).output().unwrap()
    }

    /// Runs a command that must succeed; its stdout.
    pub(crate) fn ok(&self, words: &[&str]) -> Vec<u8> {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().flatten() {
            let _ended_already = child.kill();
        }
        for child in self.nodes.iter_mut().flatten() {
            let _ended_already = child.wait();
        }
        if std::thread::panicking() {
            (0..self.nodes.len()).for_each(|index| show(&self.log(index)));
        }
    }
}

fn show(log: &Path) {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("-- end of {}:", log.display());
    for line in &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..] {
        eprintln!("{}", line.chars().take(400).collect::<String>());
    }
}

/// Waits for a child's end; a child that does not end is killed.
pub(crate) async fn ended(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it did not end");
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Runs a command that is to end by itself; its exit code and stderr.
pub(crate) async fn refused(mut command: Command) -> (Option<i32>, String) {
    let mut stderr = tempfile::tempfile().unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(stderr.try_clone().unwrap()).spawn().unwrap();
    let status = ended(&mut child).await;
    let mut text = String::new();
    std::io::Seek::rewind(&mut stderr).unwrap();
    std::io::Read::read_to_string(&mut stderr, &mut text).unwrap();
    (status.code(), text)
}
