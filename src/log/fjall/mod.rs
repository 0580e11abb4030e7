//! The log on disk: one `fjall` database for all groups of a node, written by one thread.
//!
//! The thread takes everything that waits, writes it as one batch, syncs once, and then runs every `done`: the cost of a
//! sync is shared by all groups. A batch of nothing but commit hints is not synced. All keys (see `layout`) live in one
//! fjall keyspace, because a journal can only be dropped when every keyspace with data in it has been flushed.
//!
//! Invariants:
//! * a record is written whole or not at all, in the order submitted;
//! * after a failed write or sync nothing is acknowledged: the node logs it and aborts, since what reached the disk is
//!   not known any more;
//! * a write that was synced and has become unreadable is found at start, not skipped: see `seal`;
//! * disk use is bounded by a multiple of what is live, plus journals of [`JOURNAL_BYTES_MAX`].

mod layout;
mod seal;
mod writer;

#[cfg(test)]
mod tests;

use super::{Done, LogEngine, NodeMeta, Record, Recovered};
use crate::{
    control::Control,
    key::{PartitionId, ReplicaId},
};
use bytes::Bytes;
use fjall::{
    CompressionType, Database, Keyspace, KeyspaceCreateOptions,
    config::{CompressionPolicy, FilterPolicy},
};
use layout::Place;
use parking_lot::{Condvar, Mutex};
use seal::Seal;
use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle, ThreadId},
    time::Duration,
};
use tokio::time::Instant;
use writer::{Job, Writer};

/// Bytes of records that may wait for the disk. A caller that would exceed it waits: the disk has fallen far behind.
pub const QUEUE_BYTES_MAX: usize = 128 << 20;

/// Bytes of records written as one batch, unless one record alone is longer.
pub const BATCH_BYTES_MAX: usize = 16 << 20;

/// Bytes of old journals that fjall keeps before it forces memtables out. The least it accepts.
pub const JOURNAL_BYTES_MAX: u64 = 64 << 20;

/// A write that takes longer counts as failed: a hung disk must not leave a node that leads but cannot write.
pub const WRITE_STALL_MAX: Duration = Duration::from_secs(60);

/// fjall's cache of blocks. Small: the disk is read only at start.
const CACHE_BYTES: u64 = 4 << 20;

/// fjall's threads. With more than one, the first of them does nothing but hand a request to compact back to the queue, over
/// and over, for as long as another one compacts: an eighth of all CPU time of a cluster under writes.
const WORKERS: usize = 1;

/// How to open a log.
#[derive(Clone, Debug)]
pub struct FjallOptions {
    /// Bytes that fjall gathers in memory before it writes a table.
    pub memtable_bytes: u64,
    /// See [`WRITE_STALL_MAX`].
    pub write_stall_max: Duration,
    /// Runs when a write or a sync has failed or hangs. Aborts the process; tests look on.
    pub on_fatal: fn(&io::Error),
    /// What a drill makes this disk do.
    pub control: Option<Arc<Control>>,
}

impl Default for FjallOptions {
    fn default() -> Self {
        Self {
            memtable_bytes: 16 << 20,
            write_stall_max: WRITE_STALL_MAX,
            on_fatal: |_| std::process::abort(),
            control: None,
        }
    }
}

/// The log on disk.
pub struct FjallLog {
    queue: Arc<Queue>,
    records: Keyspace,
    dir: PathBuf,
    options: FjallOptions,
    writer: ThreadId,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What waits for the writer.
struct Queue {
    state: Mutex<Waiting>,
    filled: Condvar,
    emptied: Condvar,
}

struct Waiting {
    jobs: VecDeque<Job>,
    bytes: usize,
    closed: bool,
    /// When the writer took the batch that it has not finished.
    busy_since: Option<Instant>,
    /// What was found at start, until it is asked for or outdated.
    found: Option<BTreeMap<Place, Recovered>>,
}

impl FjallLog {
    /// Opens or makes the log in `dir`. Blocks; reads everything once.
    ///
    /// # Errors
    /// When the directory is in use, cannot be read, or holds damaged bytes; names the place.
    pub fn open(dir: impl Into<PathBuf>, options: FjallOptions) -> io::Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir)?;
        let seal = Seal::open(&dir)?;
        let database = dir.join("db");
        let written = seal::last_written(&database, &seal)?;
        let db = open_database(&database)?;
        let create = || {
            KeyspaceCreateOptions::default()
                .max_memtable_size(options.memtable_bytes)
                .data_block_compression_policy(CompressionPolicy::disabled())
                .filter_policy(FilterPolicy::disabled()) // Nothing is ever looked up by key.
        };
        let records = db.keyspace("log", create).map_err(|error| error_at(&database, error))?;
        layout::check_format(&records, &dir)?;
        let synced = seal.check(&records, written)?;
        let found = layout::load(&records, &dir)?;
        let extents = found.iter().map(|(place, found)| (*place, layout::extent_of(found))).collect();

        let state = Waiting { jobs: VecDeque::new(), bytes: 0, closed: false, busy_since: None, found: Some(found) };
        let queue = Arc::new(Queue { state: Mutex::new(state), filled: Condvar::new(), emptied: Condvar::new() });
        let writer =
            Writer::new(db, records.clone(), (seal, synced), extents, options.on_fatal, options.control.clone());
        let thread = thread::Builder::new().name("log-writer".into()).spawn({
            let queue = Arc::clone(&queue);
            move || writer.run(&queue)
        })?;
        Ok(Self { queue, records, dir, options, writer: thread.thread().id(), thread: Mutex::new(Some(thread)) })
    }

    fn push(&self, job: Job) {
        let mut waiting = self.queue.state.lock();
        // The writer itself never waits: it would wait for itself.
        if thread::current().id() != self.writer {
            while waiting.bytes >= QUEUE_BYTES_MAX && !waiting.closed {
                self.queue.emptied.wait_for(&mut waiting, self.options.write_stall_max);
                self.watch(&mut waiting);
            }
        }
        self.watch(&mut waiting);
        waiting.found = None;
        waiting.bytes += job.bytes();
        waiting.jobs.push_back(job);
        drop(waiting);
        self.queue.filled.notify_one();
    }

    /// Ends the process when the writer hangs. fjall itself waits for ever once its own threads have failed.
    fn watch(&self, waiting: &mut Waiting) {
        if waiting.busy_since.is_some_and(|since| since.elapsed() > self.options.write_stall_max) {
            waiting.busy_since = None;
            let error =
                io::Error::new(io::ErrorKind::TimedOut, format!("log in {}: a write hangs", self.dir.display()));
            tracing::error!(%error, "the log cannot be written: this node stops");
            (self.options.on_fatal)(&error);
        }
    }

    /// Waits until the writer has done what `job` makes of a `done`.
    fn push_and_wait(&self, job: impl FnOnce(Done) -> Job) -> io::Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.push(job(Box::new(move |result| {
            // Nobody waits any more only if the waiting thread has panicked.
            let _ = sender.send(result);
        })));
        receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the log writer has stopped")))
    }
}

impl Queue {
    /// What waits, up to a batch; `None` when closed and empty.
    fn take(&self) -> Option<Vec<Job>> {
        let mut waiting = self.state.lock();
        waiting.busy_since = None;
        while waiting.jobs.is_empty() {
            if waiting.closed {
                return None;
            }
            self.filled.wait(&mut waiting);
        }
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(job) = waiting.jobs.front() {
            if !taken.is_empty() && bytes + job.bytes() > BATCH_BYTES_MAX {
                break;
            }
            bytes += job.bytes();
            taken.extend(waiting.jobs.pop_front());
        }
        waiting.bytes -= bytes;
        waiting.busy_since = Some(Instant::now());
        drop(waiting);
        self.emptied.notify_all();
        Some(taken)
    }
}

impl LogEngine for FjallLog {
    /// Never waits for the disk, unless [`QUEUE_BYTES_MAX`] wait already. `done` runs on the writer's thread: it must be
    /// quick.
    fn submit(&self, group: PartitionId, replica: ReplicaId, record: Record, done: Option<Done>) {
        self.push(Job::Record { place: (group, replica), record, done });
    }

    fn recover(&self) -> io::Result<BTreeMap<Place, Recovered>> {
        let found = self.queue.state.lock().found.take();
        if let Some(found) = found {
            return Ok(found);
        }
        self.push_and_wait(Job::Barrier)?;
        layout::load(&self.records, &self.dir)
    }
}

impl NodeMeta for FjallLog {
    fn put_meta(&self, name: &str, value: Bytes) -> io::Result<()> {
        self.push_and_wait(|done| Job::Meta { key: layout::meta_key(name), value, done })
    }

    fn get_meta(&self, name: &str) -> io::Result<Option<Bytes>> {
        let value = self.records.get(layout::meta_key(name)).map_err(|error| error_at(&self.dir, error))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }
}

impl Drop for FjallLog {
    fn drop(&mut self) {
        self.queue.state.lock().closed = true;
        self.queue.filled.notify_all();
        self.queue.emptied.notify_all();
        let thread = self.thread.lock().take().filter(|_| thread::current().id() != self.writer);
        if let Some(Err(_panic)) = thread.map(JoinHandle::join) {
            tracing::error!(dir = %self.dir.display(), "the log writer panicked");
        }
    }
}

impl std::fmt::Debug for FjallLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FjallLog").field("dir", &self.dir).finish_non_exhaustive()
    }
}

fn open_database(path: &Path) -> io::Result<Database> {
    let builder = Database::builder(path)
        .cache_size(CACHE_BYTES)
        .max_journaling_size(JOURNAL_BYTES_MAX)
        .journal_compression(CompressionType::None)
        .worker_threads(WORKERS);
    // fjall panics on some damaged bytes instead of returning an error.
    match std::panic::catch_unwind(AssertUnwindSafe(|| builder.open())) {
        Ok(opened) => opened.map_err(|error| error_at(path, error)),
        Err(_panic) => Err(corrupt(path, "fjall cannot make sense of it")),
    }
}

/// fjall's error as one of ours, naming the place.
fn error_at(path: &Path, error: fjall::Error) -> io::Error {
    let (kind, why) = match error {
        fjall::Error::Io(error) => (error.kind(), error.to_string()),
        fjall::Error::Locked => (io::ErrorKind::ResourceBusy, "in use by another process".into()),
        fjall::Error::Poisoned => (io::ErrorKind::Other, "an earlier write has failed".into()),
        error => (io::ErrorKind::InvalidData, format!("{error:?}")),
    };
    io::Error::new(kind, format!("log in {}: {why}", path.display()))
}

fn corrupt(dir: &Path, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("log in {}: damaged: {why}", dir.display()))
}
