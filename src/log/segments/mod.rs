//! The log on disk: one sequence of records for all groups of a node, in files of bounded length, written by one thread.
//!
//! The thread takes everything that waits, writes it as one *frame*, syncs once, and then runs every `done`: the cost of a
//! sync is shared by all groups. Commit hints cause no write: the newest of each replica goes with the next frame, or with
//! the last one when the log is closed. Frames follow one another in *segments* (see `frame` for the bytes); segments of
//! which nothing is needed go, and what pins old ones is copied forward (see `collect`).
//!
//! Invariants:
//! * a frame is written whole or not at all, in the order submitted; frame `n + 1` is begun when `n` is on the disk;
//! * after a failed write or sync nothing is acknowledged: the node logs it and aborts, since what reached the disk is
//!   not known any more;
//! * a frame that was synced and has become unreadable is found at start, not skipped, unless it is the very last one of a
//!   log that was not closed: see `read`;
//! * disk use is at most about thrice what is live, plus [`SEGMENTS_KEPT`] segments, a spare one, and the excess of a frame and of what files grow by.

mod collect;
mod files;
mod frame;
mod index;
mod read;
mod writer;

#[cfg(test)]
mod tests;

pub use collect::SEGMENTS_KEPT;

use super::{Done, LogEngine, NodeMeta, ReadDone, Record, Recovered};
use crate::{
    control::Control,
    key::{PartitionId, ReplicaId},
};
use bytes::Bytes;
use files::Files;
use parking_lot::{Condvar, Mutex};
use read::Found;
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, SyncSender},
    },
    thread::{self, JoinHandle, ThreadId},
    time::Duration,
};
use tokio::time::Instant;
use writer::{Job, Meta, Writer};

type Place = (PartitionId, ReplicaId);

/// Bytes of records that may wait for the disk. A caller that would exceed it waits: the disk has fallen far behind.
pub const QUEUE_BYTES_MAX: usize = 128 << 20;

/// Bytes of records written as one frame, unless one record alone is longer.
pub const BATCH_BYTES_MAX: usize = 16 << 20;

/// Bytes after which a segment ends; the frame that reaches them is its last.
pub const SEGMENT_BYTES: u64 = 32 << 20;

/// A write that takes longer counts as failed: a hung disk must not leave a node that leads but cannot write.
pub const WRITE_STALL_MAX: Duration = Duration::from_secs(60);

/// How to open a log.
#[derive(Clone, Debug)]
pub struct SegmentOptions {
    /// See [`SEGMENT_BYTES`].
    pub segment_bytes: u64,
    /// See [`WRITE_STALL_MAX`].
    pub write_stall_max: Duration,
    /// Runs when a write or a sync has failed or hangs. Aborts the process; tests look on.
    pub on_fatal: fn(&io::Error),
    /// What a drill makes this disk do.
    pub control: Option<Arc<Control>>,
}

impl Default for SegmentOptions {
    fn default() -> Self {
        Self {
            segment_bytes: SEGMENT_BYTES,
            write_stall_max: WRITE_STALL_MAX,
            on_fatal: |_| std::process::abort(),
            control: None,
        }
    }
}

/// The log on disk.
pub struct SegmentLog {
    queue: Arc<Queue>,
    meta: Meta,
    dir: PathBuf,
    options: SegmentOptions,
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

impl SegmentLog {
    /// Opens or makes the log in `dir`. Blocks; reads everything once.
    ///
    /// # Errors
    /// When the directory is in use, cannot be read, or holds damaged bytes; names the place.
    pub fn open(dir: impl Into<PathBuf>, options: SegmentOptions) -> io::Result<Self> {
        let dir = dir.into();
        let (files, found) = Files::open(&dir)?;
        Self::start(dir, options, files, found)
    }

    fn start(dir: PathBuf, options: SegmentOptions, files: Files, mut found: Found) -> io::Result<Self> {
        let all_found = Some(writer::all_found(&found));
        let meta: Meta = Arc::new(Mutex::new(std::mem::take(&mut found.meta)));
        let state = Waiting { jobs: VecDeque::new(), bytes: 0, closed: false, busy_since: None, found: all_found };
        let queue = Arc::new(Queue { state: Mutex::new(state), filled: Condvar::new(), emptied: Condvar::new() });
        let (on_fatal, control) = (options.on_fatal, options.control.clone());
        let writer = Writer::new((files, found), Arc::clone(&meta), options.segment_bytes, on_fatal, control);
        let thread = thread::Builder::new().name("log-writer".into()).spawn({
            let queue = Arc::clone(&queue);
            move || writer.run(&queue)
        })?;
        Ok(Self { queue, meta, dir, options, writer: thread.thread().id(), thread: Mutex::new(Some(thread)) })
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
        // A hint goes with whatever is written next: nobody waits for it.
        let wakes = !job.is_hint() || waiting.bytes >= BATCH_BYTES_MAX;
        waiting.jobs.push_back(job);
        drop(waiting);
        if wakes {
            self.queue.filled.notify_one();
        }
    }

    /// Ends the process when the writer hangs.
    fn watch(&self, waiting: &mut Waiting) {
        if waiting.busy_since.is_some_and(|since| since.elapsed() > self.options.write_stall_max) {
            waiting.busy_since = None;
            let error =
                io::Error::new(io::ErrorKind::TimedOut, format!("log in {}: a write hangs", self.dir.display()));
            tracing::error!(%error, "the log cannot be written: this node stops");
            (self.options.on_fatal)(&error);
        }
    }

    /// Waits for what the writer sends when it has done the job.
    fn push_and_wait<T>(&self, job: impl FnOnce(SyncSender<io::Result<T>>) -> Job) -> io::Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.push(job(sender));
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

/// A `done` that tells a thread which waits.
fn telling(sender: SyncSender<io::Result<()>>) -> Done {
    Box::new(move |result| {
        // Nobody waits any more only if the waiting thread has panicked.
        let _ = sender.send(result);
    })
}

impl LogEngine for SegmentLog {
    fn submit(&self, group: PartitionId, replica: ReplicaId, record: Record, done: Option<Done>) {
        self.push(Job::Record { place: (group, replica), record, done });
    }

    fn read(&self, group: PartitionId, replica: ReplicaId, indexes: Range<u64>, bytes_max: usize, done: ReadDone) {
        self.push(Job::Read { place: (group, replica), indexes, bytes_max, done });
    }

    fn recover(&self) -> io::Result<BTreeMap<Place, Recovered>> {
        let found = self.queue.state.lock().found.take();
        found.map_or_else(|| self.push_and_wait(Job::Recover), Ok)
    }
}

impl NodeMeta for SegmentLog {
    fn put_meta(&self, name: &str, value: Bytes) -> io::Result<()> {
        self.push_and_wait(|sender| Job::Meta { name: name.to_owned(), value, done: telling(sender) })
    }

    fn get_meta(&self, name: &str) -> io::Result<Option<Bytes>> {
        Ok(self.meta.lock().get(name).map(|mark| mark.value.clone()))
    }
}

impl Drop for SegmentLog {
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

impl std::fmt::Debug for SegmentLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentLog").field("dir", &self.dir).finish_non_exhaustive()
    }
}

fn corrupt(dir: &Path, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("log in {}: damaged: {why}", dir.display()))
}
