//! The log in memory: for nodes that keep nothing, and as the disk of the simulation.
//!
//! [`MemoryLog::immediate`] counts every record as durable at once. [`MemoryLog::simulated`] is a disk: what was
//! submitted waits until [`MemoryLog::sync`], or until the disk's own task ([`MemoryLog::run`]) gets to it, and
//! [`MemoryLog::crash`] loses what still waits. The disk outlives the node: share it with the node's next life.
//!
//! A sync that fails, or finds no space, ends a node in production: the process aborts before anybody is told. So here no
//! `done` runs any more either, and whoever runs the node waits for [`MemoryLog::failed`] and crashes it.
//!
//! Invariants:
//! * a crash loses a tail of each replica's unsynced records and nothing else, so never leaves a hole;
//! * a damaged record is never given back: [`LogEngine::recover`] names it and gives nothing;
//! * nothing here depends on anything but the order of calls and the seeds given.

use super::{Done, LogEngine, NodeMeta, ReadDone, Record, Recovered, extent::Extent, within};
use crate::{
    env,
    key::{PartitionId, ReplicaId},
    plant::{Bug, planted},
};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    io,
    ops::Range,
    time::Duration,
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

type Place = (PartitionId, ReplicaId);

/// Records that may wait for a simulated disk; more is a disk that nobody runs.
pub const QUEUE_RECORDS: usize = 1 << 20;

/// One replica's log.
#[derive(Clone, Debug, Default)]
struct Replica {
    extent: Extent,
    kept: Recovered,
    /// Index of an entry that can no longer be read.
    rotten: Option<u64>,
}

impl Replica {
    fn apply(&mut self, record: &Record) -> io::Result<()> {
        let removed = self.extent.admit(record)?;
        self.rotten = self.rotten.filter(|index| !removed.contains(index));
        for index in removed {
            self.kept.entries.remove(&index);
        }
        match record {
            Record::Append { first, entries } => self.kept.entries.extend((*first..).zip(entries.iter().cloned())),
            Record::Vote(vote) => self.kept.vote = Some(vote.clone()),
            Record::Truncate { .. } => {}
            Record::Purge { upto, marker } => self.kept.purged = Some((*upto, marker.clone())),
            Record::Committed(hint) => self.kept.committed = Some(hint.clone()),
            Record::Tombstone => self.kept = Recovered { tombstone: true, ..Recovered::default() },
        }
        Ok(())
    }
}

struct Waiting {
    place: Place,
    record: Record,
    done: Option<Done>,
}

#[derive(Default)]
struct Disk {
    durable: BTreeMap<Place, Replica>,
    meta: BTreeMap<String, Bytes>,
    waiting: VecDeque<Waiting>,
    /// The next sync fails.
    fail_next: Option<FailedSync>,
    /// There is no space.
    full: bool,
    /// No sync ends before.
    stalled_until: Option<Instant>,
    failed: Option<Failed>,
}

/// A sync has failed: nothing is written, and nobody told, until a crash.
#[derive(Clone, Copy)]
struct Failed {
    why: &'static str,
    /// Of what waits, so many records are on the disk nevertheless.
    kept: usize,
}

/// What a failed sync has left on the disk of what it was to make durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailedSync {
    /// All of it.
    Kept,
    /// Nothing.
    Lost,
}

/// How long a simulated disk takes for a sync.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SyncTime {
    /// Shortest usual time.
    pub min: Duration,
    /// Longest usual time.
    pub max: Duration,
    /// Probability in `[0, 1]` of a slow sync.
    pub slow_share: f64,
    /// Longest time of a slow sync.
    pub slow_max: Duration,
}

impl Default for SyncTime {
    fn default() -> Self {
        Self {
            min: Duration::from_micros(300),
            max: Duration::from_millis(3),
            slow_share: 0.01,
            slow_max: Duration::from_millis(80),
        }
    }
}

/// What a crash takes of the records that were not synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lose {
    /// All of them.
    All,
    /// Of each replica's a tail whose length follows from the seed.
    Tail {
        /// Seed.
        seed: u64,
    },
    /// The same, and the first record of each tail was being written: recovery drops what it cannot read of it, which
    /// leaves the first entries of an append, and nothing of any other record.
    Torn {
        /// Seed.
        seed: u64,
    },
}

/// A log in memory.
pub struct MemoryLog {
    disk: Mutex<Disk>,
    immediate: bool,
    submitted: Notify,
    /// Told when a sync has failed.
    failing: Notify,
}

impl MemoryLog {
    /// A log whose records count as durable at once: `done` runs inside `submit`.
    #[must_use]
    pub fn immediate() -> Self {
        Self { disk: Mutex::default(), immediate: true, submitted: Notify::new(), failing: Notify::new() }
    }

    /// A simulated disk.
    #[must_use]
    pub fn simulated() -> Self {
        Self { immediate: false, ..Self::immediate() }
    }

    /// Makes everything that waits durable and runs its `done`s.
    pub fn sync(&self) {
        let count = self.disk.lock().waiting.len();
        self.sync_first(count);
    }

    /// Runs the disk: syncs what waits, again and again, taking its time. Spawn it in the node's scope.
    pub async fn run(&self, time: SyncTime) {
        loop {
            let count = self.ready();
            if count == 0 {
                self.submitted.notified().await;
                continue;
            }
            let mut rng = env::ScopeRng;
            let (min, max) = match rng.random_bool(time.slow_share.clamp(0.0, 1.0)) {
                true => (time.max, time.slow_max),
                false => (time.min, time.max),
            };
            sleep(min + max.saturating_sub(min).mul_f64(rng.random::<f64>())).await;
            while let Some(until) = self.stalled_until() {
                sleep_until(until).await;
            }
            self.sync_first(count);
        }
    }

    /// Records that a sync would take.
    fn ready(&self) -> usize {
        let disk = self.disk.lock();
        if disk.failed.is_some() { 0 } else { disk.waiting.len() }
    }

    fn stalled_until(&self) -> Option<Instant> {
        self.disk.lock().stalled_until.filter(|until| Instant::now() < *until)
    }

    fn sync_first(&self, count: usize) {
        let mut disk = self.disk.lock();
        let count = count.min(disk.waiting.len());
        if count == 0 || disk.failed.is_some() {
            return;
        }
        let fault = disk.fail_next.take();
        if fault.is_some() && planted(Bug::FsyncErrorIgnored) {
            let batch: Vec<Waiting> = disk.waiting.drain(..count).collect();
            drop(disk);
            batch.into_iter().for_each(|lost| finish(lost.place, Ok(()), lost.done));
            return;
        }
        if disk.full || fault.is_some() {
            let kept = if fault == Some(FailedSync::Kept) { count } else { 0 };
            self.fail(&mut disk, kept);
            return;
        }
        let batch: Vec<Waiting> = disk.waiting.drain(..count).collect();
        let mut outcomes = Vec::with_capacity(batch.len());
        for Waiting { place, record, done } in batch {
            outcomes.push((place, disk.durable.entry(place).or_default().apply(&record), done));
        }
        drop(disk);
        for (place, result, done) in outcomes {
            finish(place, result, done);
        }
    }

    fn fail(&self, disk: &mut Disk, kept: usize) {
        let why = if disk.full { "no space on the disk" } else { "the sync failed" };
        disk.failed = Some(Failed { why, kept });
        self.failing.notify_waiters();
    }

    /// The next sync fails, and nothing is written or acknowledged any more until a crash. What the failed sync has left
    /// on the disk is found then; what came later is lost.
    pub fn fail_next_sync(&self, left: FailedSync) {
        self.disk.lock().fail_next = Some(left);
    }

    /// Takes the space away, or gives it back: without it every sync fails, and so does [`NodeMeta::put_meta`], also
    /// those of the node's next life.
    pub fn set_full(&self, full: bool) {
        self.disk.lock().full = full;
    }

    /// No sync ends for this long. Production ends a node whose disk hangs for a minute.
    pub fn stall(&self, time: Duration) {
        self.disk.lock().stalled_until = Some(Instant::now() + time);
    }

    /// Waits until a sync has failed, and says why. Production has ended the process at this moment.
    pub async fn failed(&self) -> &'static str {
        loop {
            let failing = self.failing.notified();
            if let Some(failed) = self.disk.lock().failed {
                return failed.why;
            }
            failing.await;
        }
    }

    /// Damages a durable entry, which follows from the seed; says which, or that there is none.
    pub fn rot(&self, seed: u64) -> Option<String> {
        let mut disk = self.disk.lock();
        let count: usize = disk.durable.values().map(|replica| replica.kept.entries.len()).sum();
        let mut nth = StdRng::seed_from_u64(seed).random_range(0..count.max(1));
        for (place, replica) in &mut disk.durable {
            if let Some(index) = replica.kept.entries.keys().nth(nth) {
                replica.rotten = Some(*index);
                return Some(entry_at(*place, *index));
            }
            nth -= replica.kept.entries.len();
        }
        None
    }

    /// Records that wait for a sync.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        self.disk.lock().waiting.len()
    }

    /// The machine loses power: records that were not synced are lost as `lose` says, and no `done` of theirs runs. After
    /// a failed sync it is as [`Self::fail_next_sync`] says. Time begins anew for the disk; a lack of space and damage
    /// stay.
    pub fn crash(&self, lose: Lose) {
        let mut disk = self.disk.lock();
        let waiting = std::mem::take(&mut disk.waiting);
        let failed = disk.failed.take();
        (disk.fail_next, disk.stalled_until) = (None, None);
        let mut per_replica: BTreeMap<Place, Vec<Record>> = BTreeMap::new();
        let mut dones = Vec::new();
        let reached = failed.map_or(waiting.len(), |failed| failed.kept);
        for (n, Waiting { place, record, done }) in waiting.into_iter().enumerate() {
            if n < reached {
                per_replica.entry(place).or_default().push(record);
            }
            dones.extend(done);
        }
        for (place, record) in left(per_replica, if failed.is_some() { None } else { Some(lose) }) {
            // A record that cannot follow was refused in life too; nobody is left to be told.
            let _ = disk.durable.entry(place).or_default().apply(&record);
        }
        drop(disk);
        drop(dones); // Outside the lock: dropping them may run anything.
    }
}

/// What a crash leaves of records that were not synced; all of them if it loses nothing.
fn left(records: BTreeMap<Place, Vec<Record>>, lose: Option<Lose>) -> Vec<(Place, Record)> {
    let (seed, torn) = match lose {
        Some(Lose::All) => return Vec::new(),
        Some(Lose::Tail { seed }) => (Some(seed), false),
        Some(Lose::Torn { seed }) => (Some(seed), true),
        None => (None, false),
    };
    let mut rng = seed.map(StdRng::seed_from_u64);
    let mut left = Vec::new();
    for (place, mut records) in records {
        let cut = rng.as_mut().map_or(records.len(), |rng| rng.random_range(0..=records.len()));
        let lost = records.split_off(cut).into_iter().next();
        left.extend(records.into_iter().map(|record| (place, record)));
        if let (true, Some(rng), Some(Record::Append { first, mut entries })) = (torn, rng.as_mut(), lost) {
            entries.truncate(rng.random_range(0..=entries.len().saturating_sub(1)));
            left.push((place, Record::Append { first, entries }));
        }
    }
    left
}

fn entry_at(place: Place, index: u64) -> String {
    format!("entry {index} of {} {}", place.0, place.1)
}

/// Tells the outcome of a record.
pub(super) fn finish(place: Place, result: io::Result<()>, done: Option<Done>) {
    match done {
        Some(done) => done(result),
        None => {
            if let Err(error) = result {
                tracing::error!(group = %place.0, replica = %place.1, %error, "log record lost");
            }
        }
    }
}

impl LogEngine for MemoryLog {
    fn submit(&self, group: PartitionId, replica: ReplicaId, record: Record, done: Option<Done>) {
        let place = (group, replica);
        let mut disk = self.disk.lock();
        if self.immediate {
            let result = disk.durable.entry(place).or_default().apply(&record);
            drop(disk);
            finish(place, result, done);
            return;
        }
        if disk.waiting.len() >= QUEUE_RECORDS {
            drop(disk);
            finish(place, Err(io::Error::other("the queue of the simulated disk is full")), done);
            return;
        }
        disk.waiting.push_back(Waiting { place, record, done });
        drop(disk);
        self.submitted.notify_one();
    }

    /// Of a simulated disk also what was not synced. Damage is not seen by this: what was written in this life comes from
    /// the cache of the disk.
    fn read(&self, group: PartitionId, replica: ReplicaId, indexes: Range<u64>, bytes_max: usize, done: ReadDone) {
        let place = (group, replica);
        let entries = {
            let disk = self.disk.lock();
            let mut known = disk.durable.get(&place).map_or_else(Cow::default, Cow::Borrowed);
            for waiting in disk.waiting.iter().filter(|waiting| waiting.place == place) {
                // What is refused changes nothing.
                let _ = known.to_mut().apply(&waiting.record);
            }
            let live = indexes.map_while(|index| known.kept.entries.get(&index));
            within(live, bytes_max).cloned().collect()
        };
        done(Ok(entries));
    }

    /// What is durable; of a simulated disk only what was synced.
    fn recover(&self) -> io::Result<BTreeMap<Place, Recovered>> {
        let mut disk = self.disk.lock();
        for replica in disk.durable.values_mut().filter(|_| planted(Bug::DamageTakenForTornTail)) {
            if let Some(from) = replica.rotten.take() {
                replica.apply(&Record::Truncate { from })?;
            }
        }
        if let Some((place, index)) = disk.durable.iter().find_map(|(place, replica)| Some((*place, replica.rotten?))) {
            let why = format!("simulated log: damaged: {}", entry_at(place, index));
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let written = disk.durable.iter().filter(|(_, replica)| replica.kept != Recovered::default());
        Ok(written.map(|(place, replica)| (*place, replica.kept.clone())).collect())
    }
}

impl NodeMeta for MemoryLog {
    fn put_meta(&self, name: &str, value: Bytes) -> io::Result<()> {
        let mut disk = self.disk.lock();
        if disk.full {
            self.fail(&mut disk, 0);
            return Err(io::ErrorKind::StorageFull.into());
        }
        disk.meta.insert(name.to_owned(), value);
        Ok(())
    }

    fn get_meta(&self, name: &str) -> io::Result<Option<Bytes>> {
        Ok(self.disk.lock().meta.get(name).cloned())
    }
}

impl std::fmt::Debug for MemoryLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryLog").field("immediate", &self.immediate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
