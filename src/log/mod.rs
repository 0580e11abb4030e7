//! The durable log of a node: one engine for all its groups, behind a narrow trait.
//!
//! Knows nothing of openraft: entries, votes and markers are bytes. What is in memory and how Raft reads it is the
//! business of `raft/`; an engine only makes records durable, in order, and gives them back at start or when asked.
//!
//! Invariants:
//! * records take effect in the order submitted; a `done` runs once its record and all before it are durable;
//! * after a failed write or sync no record is acknowledged any more (production ends the process);
//! * what is recovered per replica is contiguous: no hole between the purge point and the last entry.

mod extent;
pub mod memory;
pub mod segments;
pub mod snapshots;
#[cfg(test)]
mod testing;

use crate::key::{PartitionId, ReplicaId};
use bytes::Bytes;
use std::{collections::BTreeMap, io, ops::Range};

/// One change to the log of one replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// Entries at `first`, `first + 1`, …
    Append {
        /// Index of the first entry.
        first: u64,
        /// Encoded entries.
        entries: Vec<Bytes>,
    },
    /// The vote.
    Vote(Bytes),
    /// Entries at `from` and after are no more.
    Truncate {
        /// First index removed.
        from: u64,
    },
    /// Entries up to and including `upto` are no more.
    Purge {
        /// Last index removed.
        upto: u64,
        /// Encoded log id of that entry.
        marker: Bytes,
    },
    /// The last index known to be committed. A hint: never synced on its own account, and `done` need not wait.
    Committed(Bytes),
    /// The replica is destroyed: everything of it goes, and this replica id may never be opened again.
    Tombstone,
}

/// Runs when a record is durable, or has failed.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Runs when entries have been read, or could not be.
pub type ReadDone = Box<dyn FnOnce(io::Result<Vec<Bytes>>) + Send>;

/// What was found of one replica at start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// The vote.
    pub vote: Option<Bytes>,
    /// Commit hint.
    pub committed: Option<Bytes>,
    /// Last purged index and its marker.
    pub purged: Option<(u64, Bytes)>,
    /// Live entries: index of the first, and the entries.
    pub entries: BTreeMap<u64, Bytes>,
    /// The replica was destroyed.
    pub tombstone: bool,
}

/// The first of `entries`, and of the others as many as stay with it within `bytes_max` bytes.
fn within<E: AsRef<[u8]>>(entries: impl Iterator<Item = E>, bytes_max: usize) -> impl Iterator<Item = E> {
    let mut bytes = 0;
    entries.take_while(move |entry| {
        let first = bytes == 0;
        bytes += entry.as_ref().len();
        first || bytes <= bytes_max
    })
}

/// Makes records durable.
pub trait LogEngine: Send + Sync + 'static {
    /// Queues a record. Never blocks for the disk.
    fn submit(&self, group: PartitionId, replica: ReplicaId, record: Record, done: Option<Done>);

    /// Reads entries again, with what has been submitted before: from the first of `indexes` on, as many of them as are
    /// live and stay within `bytes_max` bytes, but one at least; none if the first is not live.
    fn read(&self, group: PartitionId, replica: ReplicaId, indexes: Range<u64>, bytes_max: usize, done: ReadDone);

    /// Everything durable, per replica, with what has been submitted before. Called at start, and by tests.
    ///
    /// # Errors
    /// When the stored bytes are damaged or cannot be read; names the place.
    fn recover(&self) -> io::Result<BTreeMap<(PartitionId, ReplicaId), Recovered>>;
}

/// A node's own few facts: who it is, which cluster it belongs to. Beside the log, and as durable.
pub trait NodeMeta: Send + Sync + 'static {
    /// Keeps `value` under `name`. Blocks until it is durable: not for runtime threads.
    ///
    /// # Errors
    /// When it could not be made durable.
    fn put_meta(&self, name: &str, value: Bytes) -> io::Result<()>;

    /// What is kept under `name`.
    ///
    /// # Errors
    /// When the stored bytes are damaged or cannot be read.
    fn get_meta(&self, name: &str) -> io::Result<Option<Bytes>>;
}
