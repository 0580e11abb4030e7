//! One replica's log: its last entries in memory, records to the node's [`LogEngine`].
//!
//! What is not applied, and the last of what is, is read from memory: only a replica that lags makes others read their
//! disks. How long the log may grow is decided by the snapshot scheduler in [`super::snapshots`].
//!
//! Invariants:
//! * entries are contiguous, and begin right after the purge point if there is one;
//! * records are submitted in the order of the calls; openraft's core makes them from one task;
//! * entries that were let go are applied, so they are never cut off the end;
//! * an entry is readable when `append` returns and acknowledged only when durable; a vote is visible when durable.

use super::{
    codec,
    types::{Entry, LogId, Types, Vote},
};
use crate::{
    key::{PartitionId, ReplicaId},
    log::{LogEngine, Record, Recovered},
    plant::{Bug, planted},
};
use bytes::Bytes;
use futures_util::{Stream, stream};
use openraft::{
    LogState, OptionalSend, RaftLogReader,
    storage::{IOFlushed, RaftLogStorage},
};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    fmt::Debug,
    io,
    ops::{Bound, Range, RangeBounds},
    sync::Arc,
};
use tokio::sync::oneshot;

/// Entries of one append request stay below this, except that there is always one.
pub(super) const APPEND_BYTES: usize = 1 << 20;

/// Entries read at a time to be applied.
const APPLY_READ_ENTRIES: u64 = 64;

/// Applied entries held in memory, as their measure in bytes, for replicas that are a little behind.
const HELD_BYTES: u64 = 1 << 20;

/// What an entry costs besides its bytes, when logs are measured.
const ENTRY_OVERHEAD_BYTES: u64 = 128;

#[derive(Default)]
struct Live {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// Position and [`cost`] of entries that are only in the engine: those before `entries`.
    gone: VecDeque<(LogId, u64)>,
    entries: VecDeque<Entry>,
    /// Sum of [`cost`] over all of them.
    bytes: u64,
    /// Sum of [`cost`] over `entries`.
    held_bytes: u64,
}

/// Where the next entries are.
enum Next {
    Here(Vec<Entry>),
    /// In the engine.
    Gone(Range<u64>),
}

/// What an entry counts when logs are measured, in bytes.
#[must_use]
pub(super) fn cost(entry: &Entry) -> u64 {
    codec::entry_len(entry) as u64 + ENTRY_OVERHEAD_BYTES
}

impl Live {
    fn first(&self) -> Option<u64> {
        let gone = self.gone.front().map(|(log_id, _)| log_id.index);
        gone.or_else(|| self.entries.front().map(|entry| entry.log_id.index))
    }

    fn last(&self) -> Option<LogId> {
        let held = self.entries.back().map(|entry| entry.log_id);
        held.or_else(|| self.gone.back().map(|(log_id, _)| *log_id)).or(self.purged)
    }

    /// Of a log that was just found: nothing of it has left the memory.
    fn contains(&self, log_id: &LogId) -> bool {
        self.purged.is_some_and(|purged| *log_id <= purged)
            || self.range(log_id.index, log_id.index.saturating_add(1)).any(|entry| entry.log_id == *log_id)
    }

    /// Offset in `entries` of the first entry at or above `index`.
    fn offset(&self, index: u64) -> usize {
        let first = self.entries.front().map_or(index, |entry| entry.log_id.index);
        let distance = index.saturating_sub(first);
        usize::try_from(distance).unwrap_or(usize::MAX).min(self.entries.len())
    }

    fn push(&mut self, entry: Entry) -> io::Result<()> {
        let next = self.last().map(|last| last.index + 1);
        // A log that has nothing yet begins wherever the leader, or a seed, says.
        if next.is_some_and(|next| next != entry.log_id.index) {
            return Err(io::Error::other(format!(
                "log would have a hole: entry {} after {:?}",
                entry.log_id,
                self.last()
            )));
        }
        self.bytes += cost(&entry);
        self.held_bytes += cost(&entry);
        self.entries.push_back(entry);
        Ok(())
    }

    /// Forgets the oldest entries in memory, of those up to `applied`, until the others measure `held_bytes` at most.
    fn let_go(&mut self, applied: u64, held_bytes: u64) {
        while let Some(entry) = self.entries.front()
            && self.held_bytes > held_bytes
            && entry.log_id.index <= applied
        {
            self.held_bytes -= cost(entry);
            self.gone.push_back((entry.log_id, cost(entry)));
            self.entries.pop_front();
        }
    }

    /// Cuts off what comes before `index`.
    fn cut_front(&mut self, index: u64) {
        let gone = self.gone.partition_point(|(log_id, _)| log_id.index < index);
        self.bytes -= self.gone.drain(..gone).map(|(_, cost)| cost).sum::<u64>();
        let offset = self.offset(index);
        let cut: u64 = self.entries.drain(..offset).map(|entry| cost(&entry)).sum();
        self.bytes -= cut;
        self.held_bytes -= cut;
    }

    /// Cuts off what is not applied: `index` and what comes after.
    fn cut_back(&mut self, index: u64) {
        let offset = self.offset(index);
        let cut: u64 = self.entries.drain(offset..).map(|entry| cost(&entry)).sum();
        self.bytes -= cut;
        self.held_bytes -= cut;
    }

    /// The live entries of `start..end`, or the first ones of them that stay within `bytes_max` bytes.
    fn next(&self, start: u64, end: u64, bytes_max: usize) -> Next {
        let start = start.max(self.first().unwrap_or(start));
        if let Some((last, _)) = self.gone.back().filter(|(last, _)| start <= last.index && start < end) {
            return Next::Gone(start..end.min(last.index + 1));
        }
        let mut bytes = 0;
        let within = |entry: &&Entry| {
            let first = bytes == 0;
            bytes += codec::entry_len(entry);
            first || bytes <= bytes_max
        };
        Next::Here(self.range(start, end).take_while(within).cloned().collect())
    }

    fn range(&self, start: u64, end: u64) -> impl Iterator<Item = &Entry> {
        let (from, to) = (self.offset(start), self.offset(end));
        self.entries.range(from.min(to)..to)
    }
}

struct Shared {
    group: PartitionId,
    replica: ReplicaId,
    engine: Arc<dyn LogEngine>,
    live: Mutex<Live>,
    /// Measure of applied entries that stay in memory.
    held_bytes: u64,
}

/// The log of one replica. Clones are the same log; openraft reads through clones.
#[derive(Clone)]
pub(super) struct Log(Arc<Shared>);

impl Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Log({} {})", self.0.group, self.0.replica)
    }
}

impl Log {
    /// Whether nothing was ever in it.
    pub(super) fn is_empty(&self) -> bool {
        self.last().is_none()
    }

    /// Position of the last entry; none if nothing was ever in it.
    pub(super) fn last(&self) -> Option<LogId> {
        self.0.live.lock().last()
    }

    /// The log as it was found at start; empty for a new replica. Of `keep_bytes`, which are kept for others, at most
    /// [`HELD_BYTES`] stay in memory.
    ///
    /// # Errors
    /// When what was found is damaged or has a hole.
    pub(super) fn open(
        engine: &Arc<dyn LogEngine>,
        (group, replica): (PartitionId, ReplicaId),
        found: &Recovered,
        keep_bytes: u64,
    ) -> io::Result<Self> {
        let mut live = Live {
            vote: found.vote.as_ref().map(codec::recover_vote).transpose()?,
            committed: found.committed.as_ref().map(codec::recover_log_id).transpose()?,
            purged: found.purged.as_ref().map(|(_, marker)| codec::recover_log_id(marker)).transpose()?,
            ..Live::default()
        };
        for (index, bytes) in &found.entries {
            let entry = recover_entry(*index, bytes)?;
            live.push(entry).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        // The hint is not synced with the entries: it counts only if what it speaks of survived.
        live.committed = live.committed.filter(|hint| live.contains(hint));
        if planted(Bug::RestartAppliesUncommitted) {
            live.committed = live.last();
        }
        let held_bytes = keep_bytes.min(HELD_BYTES);
        Ok(Self(Arc::new(Shared { group, replica, engine: Arc::clone(engine), live: Mutex::new(live), held_bytes })))
    }

    /// Measure of the live entries, in bytes.
    #[must_use]
    pub(super) fn bytes(&self) -> u64 {
        self.0.live.lock().bytes
    }

    /// Measure of the entries in memory, in bytes.
    #[must_use]
    pub(super) fn held_bytes(&self) -> u64 {
        self.0.live.lock().held_bytes
    }

    /// Entries up to `applied` are applied: only the last of them stay in memory.
    pub(super) fn let_go(&self, applied: u64) {
        self.0.live.lock().let_go(applied, self.0.held_bytes);
    }

    /// The largest index such that the entries after it measure at least `keep_bytes`; none if all entries are needed
    /// for that.
    #[must_use]
    pub(super) fn index_before_last(&self, keep_bytes: u64) -> Option<u64> {
        let live = self.0.live.lock();
        let mut kept = 0;
        let held = live.entries.iter().rev().map(|entry| (entry.log_id, cost(entry)));
        for (log_id, cost) in held.chain(live.gone.iter().rev().copied()) {
            if kept >= keep_bytes {
                return Some(log_id.index);
            }
            kept += cost;
        }
        None
    }

    /// The live entries of `start..end`: as many of the first ones as come at once, and within `bytes_max` bytes, but one
    /// at least.
    async fn next(&self, start: u64, end: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let gone = match self.0.live.lock().next(start, end, bytes_max) {
            Next::Here(entries) => return Ok(entries),
            Next::Gone(indexes) => indexes,
        };
        let (done, read) = oneshot::channel();
        let done = move |entries| drop(done.send(entries));
        self.0.engine.read(self.0.group, self.0.replica, gone.clone(), bytes_max, Box::new(done));
        let read = read.await.unwrap_or_else(|_| Err(io::Error::other("the log engine has stopped")))?;
        let entries: Vec<Entry> =
            gone.clone().zip(&read).map(|(at, bytes)| recover_entry(at, bytes)).collect::<io::Result<_>>()?;
        // What was purged meanwhile is not there any more.
        if entries.is_empty() && self.0.live.lock().purged.is_none_or(|purged| purged.index < gone.start) {
            return Err(io::Error::other(format!("entry {} is neither in memory nor on the disk", gone.start)));
        }
        Ok(entries)
    }

    fn submit(&self, record: Record, done: Option<crate::log::Done>) {
        self.0.engine.submit(self.0.group, self.0.replica, record, done);
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (mut start, end) = half_open(&range);
        let mut entries: Vec<Entry> = Vec::new();
        while start < end {
            let next = self.next(start, end, APPEND_BYTES).await?;
            let Some(last) = next.last() else { break };
            start = last.log_id.index + 1;
            entries.extend(next);
        }
        Ok(entries)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let entries = self.next(start, end, APPEND_BYTES).await?;
        match entries.first() {
            Some(first) if first.log_id.index == start => Ok(entries),
            None if start >= end => Ok(entries),
            _ => {
                let first = self.0.live.lock().first();
                Err(io::Error::other(format!("entry {start} is not in the log, which begins at {first:?}")))
            }
        }
    }

    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = half_open(&range);
        let state = (self.clone(), start, VecDeque::new());
        Box::pin(stream::unfold(state, move |(log, mut next, mut read)| async move {
            if read.is_empty() && next < end {
                let upto = end.min(next.saturating_add(APPLY_READ_ENTRIES));
                match log.next(next, upto, APPEND_BYTES).await {
                    Ok(entries) => read.extend(entries),
                    Err(error) => return Some((Err(error), (log, end, read))),
                }
            }
            let item = match read.pop_front() {
                Some(entry) if entry.log_id.index == next => Ok(entry),
                None => return None,
                Some(other) => Err(io::Error::other(format!("entry {next} is not in the log, but {other}"))),
            };
            next = if item.is_ok() { next + 1 } else { end };
            Some((item, (log, next, read)))
        }))
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.0.live.lock().vote)
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let live = self.0.live.lock();
        Ok(LogState { last_purged_log_id: live.purged, last_log_id: live.last() })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        if planted(Bug::VoteNotPersisted) {
            self.0.live.lock().vote = Some(*vote);
            return Ok(());
        }
        let (durable, wait) = oneshot::channel();
        let done = move |result| drop(durable.send(result));
        self.submit(Record::Vote(codec::store_vote(vote)), Some(Box::new(done)));
        wait.await.unwrap_or_else(|_| Err(io::Error::other("the log engine has stopped")))?;
        self.0.live.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        if let Some(committed) = committed {
            self.0.live.lock().committed = Some(committed);
            self.submit(Record::Committed(codec::store_log_id(&committed)), None);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.0.live.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut first = None;
        let mut stored = Vec::new();
        {
            let mut live = self.0.live.lock();
            for entry in entries {
                first.get_or_insert(entry.log_id.index);
                stored.push(codec::store_entry(&entry));
                live.push(entry)?;
            }
        }
        match first {
            Some(first) if planted(Bug::AckBeforeFsync) => {
                self.submit(Record::Append { first, entries: stored }, None);
                callback.io_completed(Ok(()));
            }
            Some(first) => {
                let done = move |result: io::Result<()>| {
                    callback.io_completed(
                        result.or_else(|error| if planted(Bug::FsyncErrorIgnored) { Ok(()) } else { Err(error) }),
                    );
                };
                self.submit(Record::Append { first, entries: stored }, Some(Box::new(done)));
            }
            None => callback.io_completed(Ok(())),
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let from = last_log_id.map_or(0, |last| last.index + 1);
        self.0.live.lock().cut_back(from);
        self.submit(Record::Truncate { from }, None);
        Ok(())
    }

    async fn purge(&mut self, mut log_id: LogId) -> io::Result<()> {
        {
            let mut live = self.0.live.lock();
            live.cut_front(log_id.index + 1);
            live.purged = live.purged.max(Some(log_id));
            if let Some(last) = live.last().filter(|_| planted(Bug::PurgeBeyondSnapshot)) {
                log_id = last;
            }
        }
        self.submit(Record::Purge { upto: log_id.index, marker: codec::store_log_id(&log_id) }, None);
        Ok(())
    }
}

fn recover_entry(index: u64, bytes: &Bytes) -> io::Result<Entry> {
    let damaged = |why| io::Error::new(io::ErrorKind::InvalidData, why);
    let entry = codec::recover_entry(bytes).map_err(|why| damaged(format!("index {index}: {why}")))?;
    if entry.log_id.index != index {
        return Err(damaged(format!("index {index} holds the entry of index {}", entry.log_id.index)));
    }
    Ok(entry)
}

fn half_open(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}
