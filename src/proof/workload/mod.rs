//! The workloads: what clients do, so that a checker can tell whether they were told the truth.
//!
//! Each needs a keyspace of its own with keys of bytes; [`Workload::Bank`] an ordered one. [`cuts`] says where to cut
//! it. In order: [`load`] while the cluster is sound, [`start`], faults, [`Running::stop`], a heal, [`final_reads`].
//!
//! Values are `<process>:<n>`, hence unique; in the counter and in the bank they are numbers.
//!
//! Invariant: a run follows from its settings' seed and the answers: every choice is drawn from it, all time is Tokio's.

mod bank;
mod registers;
mod rows;
mod summary;
#[cfg(test)]
mod tests;

pub use summary::Summary;

use super::{
    door::Door,
    history::{Kind, Mode, Phase, Process, ReadMode},
    perform::Client,
    recorder::Recorder,
    wire::{Op, Scan},
};
use crate::{
    env,
    error::{Error, Reason},
};
use bank::Bank;
use bytes::Bytes;
use registers::Registers;
use rows::Rows;
use std::{
    collections::BTreeSet,
    fmt,
    ops::RangeInclusive,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{task::JoinHandle, time::Instant};

/// Numbers of the clients that load and of those that read at the end, beyond those that work.
const LOADER: u64 = 1 << 32;
const READERS: u64 = 1 << 33;
/// Clients that read at the end.
const READERS_MAX: usize = 8;
/// Rows per page of a scan at the end.
const FINAL_PAGE_ROWS: u32 = 500;
/// Parts in which a range is scanned at the end: one line of a history has a limit.
const FINAL_SCANS: u32 = 16;

/// What clients do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Workload {
    /// Reads, writes, conditional writes and deletes of single rows, at the strong levels.
    Register,
    /// The same, read at every level.
    Levels,
    /// Increments, repeated whenever an answer is lost.
    Counter,
    /// Inserts and deletes all over the key order, and scans with tiny pages.
    Rows,
    /// Atomic transfers between the accounts of one partition.
    Bank,
}

impl Workload {
    /// Every workload.
    pub const ALL: [Self; 5] = [Self::Register, Self::Levels, Self::Counter, Self::Rows, Self::Bank];

    /// Its name: on the command line, and for the checkers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Levels => "levels",
            Self::Counter => "counter",
            Self::Rows => "rows",
            Self::Bank => "bank",
        }
    }

    /// The levels at which it reads when nothing else is said.
    #[must_use]
    pub fn levels(self) -> Vec<ReadMode> {
        let of = |mode| ReadMode { mode, bound_ms: None };
        let bounded = |ms| ReadMode { mode: Mode::Bounded, bound_ms: Some(ms) };
        match self {
            Self::Register => vec![of(Mode::Linearizable), of(Mode::Linearizable), of(Mode::Lease)],
            Self::Levels => vec![
                of(Mode::Linearizable),
                of(Mode::Lease),
                bounded(20),
                bounded(200),
                bounded(2_000),
                of(Mode::Session),
                of(Mode::Session),
                of(Mode::Eventual),
            ],
            Self::Counter => vec![of(Mode::Linearizable)],
            Self::Rows => vec![of(Mode::Linearizable), of(Mode::Linearizable), bounded(500), of(Mode::Eventual)],
            Self::Bank => vec![of(Mode::Linearizable)],
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Workload {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|workload| workload.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::field("workload", format!("there is no workload \"{text}\"; choose one of {names}"))
        })
    }
}

/// How a workload is run.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// What clients do.
    pub workload: Workload,
    /// Where.
    pub keyspace: String,
    /// How many there are.
    pub clients: u32,
    /// Keys in use at a time: registers, counters, rows, accounts.
    pub keys: u32,
    /// A register or counter makes room for a fresh one after this many operations, so that checking stays fast.
    pub ops_per_key_max: u32,
    /// Pause of a client after each operation.
    pub pause: RangeInclusive<Duration>,
    /// Time for an operation, repetitions included.
    pub deadline: Duration,
    /// Levels of reads and scans, drawn with equal chance; one named twice comes twice as often. Not empty.
    pub levels: Vec<ReadMode>,
    /// Rows per page of a scan.
    pub page_rows: RangeInclusive<u32>,
    /// Share of answers to writes that are thrown away, so that the write is repeated.
    pub drop_replies: f64,
    /// What every choice follows from.
    pub seed: u64,
}

impl Settings {
    /// The usual settings.
    #[must_use]
    pub fn new(workload: Workload, keyspace: impl Into<String>, seed: u64) -> Self {
        Self {
            workload,
            keyspace: keyspace.into(),
            clients: 6,
            keys: match workload {
                Workload::Register | Workload::Levels => 12,
                Workload::Counter => 4,
                Workload::Rows => 400,
                Workload::Bank => 6,
            },
            ops_per_key_max: 500,
            pause: Duration::from_millis(2)..=Duration::from_millis(40),
            deadline: Duration::from_secs(3),
            levels: workload.levels(),
            page_rows: 1..=50,
            drop_replies: if workload == Workload::Counter { 0.2 } else { 0.02 },
            seed,
        }
    }
}

/// Keys at which to cut a keyspace into this many partitions so that every workload touches several, except the bank,
/// whose accounts stay together.
#[must_use]
pub fn cuts(partitions: u32) -> Vec<Bytes> {
    (1..partitions).map(|n| format!("{:02x}", n * 256 / partitions).into()).collect()
}

/// What the clients of one workload share.
enum Shared {
    Registers(Registers),
    Rows(Rows),
    Bank(Bank),
}

impl Shared {
    fn new(settings: &Settings) -> Self {
        match settings.workload {
            Workload::Register | Workload::Levels | Workload::Counter => Self::Registers(Registers::new(settings)),
            Workload::Rows => Self::Rows(Rows::default()),
            Workload::Bank => Self::Bank(Bank::new(settings.keys)),
        }
    }

    async fn step(&self, client: &mut Client) {
        match self {
            Self::Registers(registers) => registers.step(client).await,
            Self::Rows(rows) => rows.step(client).await,
            Self::Bank(bank) => bank.step(client).await,
        }
    }
}

/// A workload that runs. Dropping it tells its clients to stop.
#[derive(Debug)]
#[must_use = "dropping it stops its clients"]
pub struct Running {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
    recorder: Arc<Recorder>,
}

/// Writes what a workload needs to begin with, in [`Phase::Load`]: the balances of the bank. Others need nothing.
///
/// # Errors
/// When it was not done at `until`.
pub async fn load(
    settings: &Settings,
    doors: &[Arc<dyn Door>],
    recorder: &Arc<Recorder>,
    until: Instant,
) -> Result<(), Error> {
    let Shared::Bank(bank) = Shared::new(settings) else { return Ok(()) };
    recorder.set_phase(Phase::Load);
    let mut client = Client::new(Arc::new(settings.clone()), doors.into(), Arc::clone(recorder), LOADER);
    for account in bank.accounts() {
        let write = Op::Write { key: account.clone(), value: bank::OPENING.to_string() };
        insist(&mut client, &write, None, until).await?;
    }
    recorder.set_phase(Phase::Main);
    Ok(())
}

/// Starts the clients; each picks doors by its own choice. They stop by themselves when the history is full.
pub fn start(settings: Settings, doors: Vec<Arc<dyn Door>>, recorder: Arc<Recorder>) -> Running {
    let over = Arc::new(AtomicBool::new(false));
    let (settings, doors) = (Arc::new(settings), Arc::from(doors));
    let shared = Arc::new(Shared::new(&settings));
    let clients = (0..u64::from(settings.clients)).map(|number| {
        let mut client = Client::new(Arc::clone(&settings), Arc::clone(&doors), Arc::clone(&recorder), number);
        let (over, shared, recorder) = (Arc::clone(&over), Arc::clone(&shared), Arc::clone(&recorder));
        env::spawn(async move {
            client.pause().await;
            while !over.load(Ordering::Relaxed) && !recorder.is_full() {
                Box::pin(shared.step(&mut client)).await;
                client.pause().await;
            }
        })
    });
    Running { clients: clients.collect(), over, recorder }
}

impl Running {
    /// Lets every client finish its operation and stop. Counts the whole history so far.
    pub async fn stop(mut self) -> Summary {
        self.over.store(true, Ordering::Relaxed);
        for client in std::mem::take(&mut self.clients) {
            if let Err(ended) = client.await
                && ended.is_panic()
            {
                std::panic::resume_unwind(ended.into_panic());
            }
        }
        self.recorder.with_events(Summary::of)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Reads everything that was ever touched, linearizable, in [`Phase::Final`]: every key through every door (of rows:
/// through one), and the whole range through every door where the workload scans.
///
/// # Errors
/// When something could not be read until `until`; what could be is in the history.
pub async fn final_reads(
    settings: Settings,
    doors: Vec<Arc<dyn Door>>,
    recorder: Arc<Recorder>,
    until: Instant,
) -> Result<(), Error> {
    recorder.set_phase(Phase::Final);
    let plan = final_plan(&settings, doors.len(), &recorder);
    let (settings, doors): (_, Arc<[Arc<dyn Door>]>) = (Arc::new(settings), doors.into());
    let readers: Vec<_> = (0..READERS_MAX)
        .map(|reader| {
            let plan: Vec<_> = plan.iter().skip(reader).step_by(READERS_MAX).cloned().collect();
            let number = READERS + reader as u64;
            let mut client = Client::new(Arc::clone(&settings), Arc::clone(&doors), Arc::clone(&recorder), number);
            env::spawn(async move {
                let mut result = Ok(());
                for (door, op) in plan {
                    let read = Box::pin(insist(&mut client, &op, Some(door), until)).await;
                    result = result.and(read);
                }
                result
            })
        })
        .collect();
    let mut result = Ok(());
    for reader in readers {
        match reader.await {
            Ok(read) => result = result.and(read),
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            Err(_) => return Err(Error::new(Reason::Stopping, "the final reads were ended")),
        }
    }
    result
}

/// What to read at the end, and through which door.
fn final_plan(settings: &Settings, doors: usize, recorder: &Recorder) -> Vec<(usize, Op)> {
    let mode = ReadMode::default();
    let keys: BTreeSet<String> = recorder.with_events(|events| {
        events.iter().filter(|event| event.process != Process::Nemesis).filter_map(|event| event.key.clone()).collect()
    });
    let mut plan = Vec::new();
    for (n, key) in keys.into_iter().enumerate() {
        let read = Op::Read { key, mode };
        match settings.workload {
            Workload::Rows => plan.push((n % doors, read)),
            _ => plan.extend((0..doors).map(|door| (door, read.clone()))),
        }
    }
    let ranges = match settings.workload {
        Workload::Rows => rows::parts(FINAL_SCANS),
        Workload::Bank => vec![bank::range()],
        Workload::Register | Workload::Levels | Workload::Counter => Vec::new(),
    };
    for (from, to) in ranges {
        let page_rows = FINAL_PAGE_ROWS;
        let scan = Scan { from, to, limit: None, page_rows, reverse: false, mode };
        plan.extend((0..doors).map(|door| (door, Op::Scan(scan.clone()))));
    }
    plan
}

/// Carries out an operation again and again until it succeeds.
async fn insist(client: &mut Client, op: &Op, door: Option<usize>, until: Instant) -> Result<(), Error> {
    loop {
        let event = match door {
            Some(door) => client.perform_at(op, door).await,
            None => client.perform(op).await,
        };
        if event.kind == Kind::Ok {
            return Ok(());
        }
        if Instant::now() >= until {
            let what = event.key.unwrap_or_else(|| event.value.to_string());
            let via = event.node.map_or_else(String::new, |node| format!(" through {node}"));
            let why = event.error.map_or_else(String::new, |error| format!(": {}: {}", error.code, error.msg));
            let message = format!("{} of {what}{via} did not succeed in time{why}", event.f);
            return Err(Error::new(Reason::DeadlineExceeded, message));
        }
        client.pause().await;
    }
}
