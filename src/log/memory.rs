//! The log in memory: for nodes that keep nothing, and as the disk of the simulation.
//!
//! [`MemoryLog::immediate`] counts every record as durable at once. [`MemoryLog::simulated`] is a disk: what was
//! submitted waits until [`MemoryLog::sync`], or until the disk's own task ([`MemoryLog::run`]) gets to it, and
//! [`MemoryLog::crash`] loses what still waits. The disk outlives the node: share it with the node's next life.
//!
//! Invariants:
//! * a crash loses a tail of each replica's unsynced records and nothing else, so never leaves a hole;
//! * nothing here depends on anything but the order of calls and the seeds given.

use super::{Done, LogEngine, NodeMeta, Record, Recovered, extent::Extent};
use crate::{
    env,
    key::{PartitionId, ReplicaId},
};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    time::Duration,
};
use tokio::{sync::Notify, time::sleep};

type Place = (PartitionId, ReplicaId);

/// Records that may wait for a simulated disk; more is a disk that nobody runs.
pub const QUEUE_RECORDS: usize = 1 << 20;

/// One replica's log.
#[derive(Clone, Debug, Default)]
struct Replica {
    extent: Extent,
    kept: Recovered,
}

impl Replica {
    fn apply(&mut self, record: &Record) -> io::Result<()> {
        let removed = self.extent.admit(record)?;
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
    fail_next: bool,
    /// A sync has failed: nothing is acknowledged until a crash.
    failed: bool,
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
}

/// A log in memory.
pub struct MemoryLog {
    disk: Mutex<Disk>,
    immediate: bool,
    submitted: Notify,
}

impl MemoryLog {
    /// A log whose records count as durable at once: `done` runs inside `submit`.
    #[must_use]
    pub fn immediate() -> Self {
        Self { disk: Mutex::default(), immediate: true, submitted: Notify::new() }
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
            let count = self.disk.lock().waiting.len();
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
            self.sync_first(count);
        }
    }

    fn sync_first(&self, count: usize) {
        let mut disk = self.disk.lock();
        if std::mem::take(&mut disk.fail_next) {
            disk.failed = true;
        }
        let count = count.min(disk.waiting.len());
        let failed = disk.failed;
        let batch: Vec<Waiting> = disk.waiting.drain(..count).collect();
        let mut outcomes = Vec::with_capacity(batch.len());
        for Waiting { place, record, done } in batch {
            let result = match failed {
                true => Err(io::Error::other("injected: the sync failed")),
                false => disk.durable.entry(place).or_default().apply(&record),
            };
            outcomes.push((place, result, done));
        }
        drop(disk);
        for (place, result, done) in outcomes {
            finish(place, result, done);
        }
    }

    /// The next sync fails, and with it every later one until a crash.
    pub fn fail_next_sync(&self) {
        self.disk.lock().fail_next = true;
    }

    /// Records that wait for a sync.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        self.disk.lock().waiting.len()
    }

    /// The machine loses power: records that were not synced are lost as `lose` says, and no `done` of theirs runs.
    pub fn crash(&self, lose: Lose) {
        let mut disk = self.disk.lock();
        let waiting = std::mem::take(&mut disk.waiting);
        (disk.fail_next, disk.failed) = (false, false);
        let mut per_replica: BTreeMap<Place, Vec<Record>> = BTreeMap::new();
        let mut dones = Vec::new();
        for Waiting { place, record, done } in waiting {
            per_replica.entry(place).or_default().push(record);
            dones.extend(done);
        }
        if let Lose::Tail { seed } = lose {
            let mut rng = StdRng::seed_from_u64(seed);
            for (place, records) in per_replica {
                let kept = rng.random_range(0..=records.len());
                for record in &records[..kept] {
                    // A record that cannot follow was refused in life too; nobody is left to be told.
                    let _ = disk.durable.entry(place).or_default().apply(record);
                }
            }
        }
        drop(disk);
        drop(dones); // Outside the lock: dropping them may run anything.
    }
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

    /// What is durable; of a simulated disk only what was synced.
    fn recover(&self) -> io::Result<BTreeMap<Place, Recovered>> {
        let disk = self.disk.lock();
        let written = disk.durable.iter().filter(|(_, replica)| replica.kept != Recovered::default());
        Ok(written.map(|(place, replica)| (*place, replica.kept.clone())).collect())
    }
}

impl NodeMeta for MemoryLog {
    fn put_meta(&self, name: &str, value: Bytes) -> io::Result<()> {
        self.disk.lock().meta.insert(name.to_owned(), value);
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
mod tests {
    use super::{
        super::testing::{A, B, append, outcome, records},
        *,
    };
    use proptest::prelude::*;
    use std::sync::Arc;

    #[test]
    fn an_immediate_log_answers_at_once_and_refuses_what_cannot_follow() {
        let log = MemoryLog::immediate();
        let put = |record| {
            let (result, done) = outcome();
            log.submit(A.0, A.1, record, Some(done));
            let result = result.lock().take();
            result.expect("answered at once")
        };
        put(append(0, 3)).unwrap();
        assert!(put(append(4, 1)).is_err(), "a hole");
        assert!(put(append(2, 1)).is_err(), "an overwrite");
        put(Record::Truncate { from: 2 }).unwrap();
        put(append(2, 2)).unwrap();
        put(Record::Purge { upto: 0, marker: "m0".into() }).unwrap();
        let found = log.recover().unwrap().remove(&A).unwrap();
        assert_eq!(found.entries.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(found.purged, Some((0, "m0".into())));
        put(Record::Purge { upto: 9, marker: "m9".into() }).unwrap();
        assert!(put(append(4, 1)).is_err(), "a hole behind the purge point");
        assert!(put(Record::Purge { upto: 8, marker: "m8".into() }).is_err(), "purging backwards");
        put(append(10, 1)).unwrap();
        put(Record::Tombstone).unwrap();
        put(Record::Tombstone).unwrap();
        assert!(put(Record::Vote("v".into())).is_err(), "destroyed");
        assert_eq!(log.recover().unwrap()[&A], Recovered { tombstone: true, ..Recovered::default() });
    }

    #[test]
    fn a_simulated_disk_answers_when_synced_and_a_crash_loses_the_rest() {
        let log = MemoryLog::simulated();
        let (first, done) = outcome();
        log.submit(A.0, A.1, append(0, 2), Some(done));
        assert!(first.lock().is_none() && log.recover().unwrap().is_empty());
        log.sync();
        assert!(matches!(*first.lock(), Some(Ok(()))));
        let (second, done) = outcome();
        log.submit(A.0, A.1, append(2, 2), Some(done));
        log.crash(Lose::All);
        assert!(second.lock().is_none() && Arc::strong_count(&second) == 1, "dropped, not run");
        log.sync();
        assert_eq!(log.recover().unwrap()[&A].entries.len(), 2);
    }

    #[test]
    fn after_a_failed_sync_nothing_is_acknowledged_until_a_crash() {
        let log = MemoryLog::simulated();
        log.fail_next_sync();
        for n in 0..2 {
            let (result, done) = outcome();
            log.submit(A.0, A.1, append(n, 1), Some(done));
            log.sync();
            assert!(matches!(*result.lock(), Some(Err(_))), "{n}");
        }
        log.crash(Lose::All);
        let (result, done) = outcome();
        log.submit(A.0, A.1, append(0, 1), Some(done));
        log.sync();
        assert!(matches!(*result.lock(), Some(Ok(()))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_disk_task_syncs_what_waits_and_takes_its_time() {
        let log = Arc::new(MemoryLog::simulated());
        let task = env::spawn({
            let log = log.clone();
            async move { log.run(SyncTime::default()).await }
        });
        let start = tokio::time::Instant::now();
        for n in 0..3 {
            let (tx, rx) = tokio::sync::oneshot::channel();
            log.submit(A.0, A.1, append(n, 1), Some(Box::new(move |result| tx.send(result).unwrap())));
            rx.await.unwrap().unwrap();
        }
        assert!(start.elapsed() >= 3 * SyncTime::default().min && start.elapsed() <= 3 * SyncTime::default().slow_max);
        assert_eq!(log.unsynced(), 0);
        task.abort();
    }

    #[test]
    fn meta_survives_a_crash() {
        let log = MemoryLog::simulated();
        log.put_meta("node", "7".into()).unwrap();
        log.crash(Lose::All);
        assert_eq!(log.get_meta("node").unwrap(), Some("7".into()));
        assert_eq!(log.get_meta("other").unwrap(), None);
    }

    proptest! {
        /// For every replica, what survives is the state after some prefix of its records that contains all synced.
        #[test]
        fn a_crash_loses_exactly_a_tail_of_what_was_not_synced(
            script in records(), synced in 0_usize..60, seed in any::<u64>(), all in any::<bool>(),
        ) {
            let log = MemoryLog::simulated();
            let synced = synced.min(script.len());
            for (n, (place, record)) in script.iter().enumerate() {
                log.submit(place.0, place.1, record.clone(), None);
                if n + 1 == synced {
                    log.sync();
                }
            }
            log.crash(if all { Lose::All } else { Lose::Tail { seed } });
            let found = log.recover().unwrap();
            for place in [A, B] {
                let found = found.get(&place).cloned().unwrap_or_default();
                let mut model = Replica::default();
                let mut possible = Vec::new();
                for (n, (at, record)) in script.iter().enumerate() {
                    if n >= synced {
                        possible.push(model.kept.clone());
                    }
                    if *at == place {
                        let _ = model.apply(record);
                    }
                }
                possible.push(model.kept);
                if all {
                    prop_assert_eq!(&found, &possible[0]);
                }
                prop_assert!(possible.contains(&found));
                prop_assert!(found.entries.keys().zip(found.entries.keys().skip(1)).all(|(a, b)| a + 1 == *b));
                if let (Some((purged, _)), Some((first, _))) = (&found.purged, found.entries.first_key_value()) {
                    prop_assert_eq!(*first, purged + 1);
                }
            }
        }
    }
}
