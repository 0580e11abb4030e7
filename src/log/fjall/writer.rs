//! The one thread that writes.

use super::{
    super::{Done, Record, extent::Extent, memory::finish},
    Queue, error_at,
    layout::{self, Place, SEAL_KEY},
    seal::Seal,
};
use crate::{
    control::Control,
    plant::{Bug, planted},
};
use bytes::Bytes;
use fjall::{Database, Keyspace, OwnedWriteBatch, PersistMode};
use std::{collections::BTreeMap, io, path::Path, sync::Arc};

/// Bytes counted for a job besides its payload.
const JOB_BYTES: usize = 64;

/// Something for the writer to do.
pub(super) enum Job {
    /// A record of a replica.
    Record { place: Place, record: Record, done: Option<Done> },
    /// A fact of the node, under its key.
    Meta { key: Vec<u8>, value: Bytes, done: Done },
    /// Nothing: tells when everything before is written.
    Barrier(Done),
}

impl Job {
    /// Bytes that count against the bounds of queue and batch.
    pub(super) fn bytes(&self) -> usize {
        let payload = match self {
            Self::Record { record, .. } => match record {
                Record::Append { entries, .. } => entries.iter().map(|entry| entry.len() + JOB_BYTES).sum(),
                Record::Vote(bytes) | Record::Committed(bytes) | Record::Purge { marker: bytes, .. } => bytes.len(),
                Record::Truncate { .. } | Record::Tombstone => 0,
            },
            Self::Meta { value, .. } => value.len(),
            Self::Barrier(_) => 0,
        };
        payload + JOB_BYTES
    }
}

pub(super) struct Writer {
    db: Database,
    records: Keyspace,
    seal: Seal,
    /// Number of the last synced write.
    synced: u64,
    extents: BTreeMap<Place, Extent>,
    on_fatal: fn(&io::Error),
    control: Option<Arc<Control>>,
    /// In a lossy drill: what was written without a sync, and so may not have left the process yet.
    held: Option<OwnedWriteBatch>,
    failed: bool,
}

/// What became of one job, once the batch is written.
type Outcome = (Place, io::Result<()>, Option<Done>);

impl Writer {
    pub(super) fn new(
        db: Database,
        records: Keyspace,
        (seal, synced): (Seal, u64),
        extents: BTreeMap<Place, Extent>,
        on_fatal: fn(&io::Error),
        control: Option<Arc<Control>>,
    ) -> Self {
        Self { db, records, seal, synced, extents, on_fatal, control, held: None, failed: false }
    }

    /// Writes until the queue is closed and empty.
    pub(super) fn run(mut self, queue: &Queue) {
        while let Some(jobs) = queue.take() {
            self.write(jobs);
        }
    }

    fn write(&mut self, jobs: Vec<Job>) {
        let mut batch = self.held.take().unwrap_or_else(|| self.db.batch());
        let mut outcomes = Vec::with_capacity(jobs.len());
        let mut sync = false;
        for job in jobs {
            let (outcome, wants_sync) = self.stage(&mut batch, job);
            sync |= wants_sync;
            outcomes.push(outcome);
        }
        let written = self.commit(batch, sync);
        for (place, staged, done) in outcomes {
            let result = match &written {
                Ok(()) => staged,
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            };
            finish(place, result, done);
        }
    }

    /// Adds a job to the batch. Returns whether it must be synced.
    fn stage(&mut self, batch: &mut OwnedWriteBatch, job: Job) -> (Outcome, bool) {
        match job {
            Job::Record { place, record, done } => match self.extents.entry(place).or_default().admit(&record) {
                Ok(removed) => {
                    layout::stage(batch, &self.records, place, &record, removed);
                    ((place, Ok(()), done), !matches!(record, Record::Committed(_)))
                }
                Err(refused) => ((place, Err(refused), done), false),
            },
            Job::Meta { key, value, done } => {
                batch.insert(&self.records, key, value.as_ref());
                ((Place::default(), Ok(()), Some(done)), true)
            }
            Job::Barrier(done) => ((Place::default(), Ok(()), Some(done)), false),
        }
    }

    fn commit(&mut self, mut batch: OwnedWriteBatch, sync: bool) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier write of the log has failed"));
        }
        if sync {
            batch.insert(&self.records, SEAL_KEY, self.seal.stamp(self.synced + 1));
            batch = batch.durability(Some(PersistMode::SyncData));
        }
        if !sync && self.control.as_ref().is_some_and(|control| control.is_lossy()) {
            self.held = Some(batch);
            return Ok(());
        }
        let path: &Path = self.records.path();
        let ready = self.control.as_ref().filter(|_| sync).map_or(Ok(()), |control| control.before_sync());
        match ready.and_then(|()| batch.commit().map_err(|error| error_at(path, error))) {
            Ok(()) => {
                self.synced += u64::from(sync);
                Ok(())
            }
            Err(_) if planted(Bug::FsyncErrorIgnored) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "the log cannot be written: this node stops");
                self.failed = true;
                (self.on_fatal)(&error);
                Err(error)
            }
        }
    }
}
