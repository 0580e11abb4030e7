//! The one thread that writes.

use super::{
    super::{Done, ReadDone, Record, Recovered, memory::finish},
    Place, Queue,
    collect::Collector,
    files::Files,
    frame,
    index::{Known, Mark, recovered},
    read::{self, Found},
};
use crate::{
    control::Control,
    plant::{Bug, planted},
};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{collections::BTreeMap, io, ops::Range, sync::Arc, sync::mpsc::SyncSender};

/// Bytes counted for a job besides its payload.
const JOB_BYTES: usize = 64;

/// What [`recover`](super::super::LogEngine::recover) gives.
pub(super) type AllFound = BTreeMap<Place, Recovered>;

/// The facts of the node, which the writer keeps and others read.
pub(super) type Meta = Arc<Mutex<BTreeMap<String, Mark>>>;

/// Something for the writer to do.
pub(super) enum Job {
    /// A record of a replica.
    Record { place: Place, record: Record, done: Option<Done> },
    /// A fact of the node.
    Meta { name: String, value: Bytes, done: Done },
    /// Reads entries of a replica.
    Read { place: Place, indexes: Range<u64>, bytes_max: usize, done: ReadDone },
    /// Reads back everything before.
    Recover(SyncSender<io::Result<AllFound>>),
}

impl Job {
    /// Whether it can wait for one that cannot.
    pub(super) const fn is_hint(&self) -> bool {
        matches!(self, Self::Record { record: Record::Committed(_), done: None, .. })
    }

    /// Bytes that count against the bounds of queue and batch.
    pub(super) fn bytes(&self) -> usize {
        let payload = match self {
            Self::Record { record, .. } => match record {
                Record::Append { entries, .. } => entries.iter().map(|entry| entry.len() + JOB_BYTES).sum(),
                Record::Vote(bytes) | Record::Committed(bytes) | Record::Purge { marker: bytes, .. } => bytes.len(),
                Record::Truncate { .. } | Record::Tombstone => 0,
            },
            Self::Meta { value, .. } => value.len(),
            Self::Read { .. } | Self::Recover(_) => 0,
        };
        payload + JOB_BYTES
    }
}

pub(super) struct Writer {
    pub(super) files: Files,
    pub(super) segment_bytes: u64,
    /// Number of the next frame.
    pub(super) number: u64,
    /// The next frame; begun, and reused.
    pub(super) frame: Vec<u8>,
    pub(super) replicas: BTreeMap<Place, Known>,
    pub(super) meta: Meta,
    /// Commit hints that go with the next frame.
    hints: BTreeMap<Place, Bytes>,
    pub(super) collector: Collector,
    on_fatal: fn(&io::Error),
    control: Option<Arc<Control>>,
    failed: bool,
}

/// What becomes of one job, once the frame is written.
enum Outcome {
    Record(Place, io::Result<()>, Option<Done>),
    Read { place: Place, indexes: Range<u64>, bytes_max: usize, done: ReadDone },
    Recover(SyncSender<io::Result<AllFound>>),
}

impl Writer {
    pub(super) fn new(
        (files, found): (Files, Found),
        meta: Meta,
        segment_bytes: u64,
        on_fatal: fn(&io::Error),
        control: Option<Arc<Control>>,
    ) -> Self {
        let known = found.replicas.into_iter().map(|(place, found)| (place, Known::of(found.marks, &found.entries)));
        let mut frame = Vec::new();
        frame::begin(&mut frame);
        Self {
            files,
            segment_bytes,
            number: found.next,
            frame,
            replicas: known.collect(),
            meta,
            hints: BTreeMap::new(),
            collector: Collector::default(),
            on_fatal,
            control,
            failed: false,
        }
    }

    /// Writes until the queue is closed and empty.
    pub(super) fn run(mut self, queue: &Queue) {
        while let Some(jobs) = queue.take() {
            self.write(jobs);
        }
        self.close();
    }

    fn write(&mut self, jobs: Vec<Job>) {
        let mut outcomes = Vec::with_capacity(jobs.len());
        let mut sync = false;
        for job in jobs {
            let (outcome, wants_sync) = self.stage(job);
            sync |= wants_sync;
            outcomes.push(outcome);
        }
        let written = if sync { self.commit() } else { self.intact() };
        for outcome in outcomes {
            match outcome {
                Outcome::Record(place, staged, done) => {
                    let result = match &written {
                        Ok(()) => staged,
                        Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
                    };
                    finish(place, result, done);
                }
                Outcome::Read { place, indexes, bytes_max, done } => {
                    let read = self.intact().and_then(|()| self.read_entries(place, indexes, bytes_max));
                    done(read.map_err(|error| self.fatal(&error)));
                }
                Outcome::Recover(to) => {
                    // Nobody waits any more only if the waiting thread has panicked.
                    let _ = to.send(self.read_back());
                }
            }
        }
        if sync && written.is_ok() {
            // After the answers: nobody waits for it.
            let kept = self.keep_house();
            let _ = self.or_fatal(kept);
        }
    }

    /// Adds a job to the frame. Returns whether it must be synced.
    fn stage(&mut self, job: Job) -> (Outcome, bool) {
        match job {
            Job::Record { place, record, done } => {
                let known = self.replicas.entry(place).or_default();
                if let Err(refused) = known.extent.admit(&record) {
                    return (Outcome::Record(place, Err(refused), done), false);
                }
                known.apply(&record, self.files.spot(self.number));
                let hint = match &record {
                    Record::Committed(hint) => Some(hint.clone()),
                    _ => None,
                };
                let sync = hint.is_none();
                match hint {
                    Some(hint) => drop(self.hints.insert(place, hint)),
                    None => frame::put_record(&mut self.frame, place, &record),
                }
                if record == Record::Tombstone {
                    self.hints.remove(&place);
                }
                (Outcome::Record(place, Ok(()), done), sync)
            }
            Job::Meta { name, value, done } => {
                frame::put_meta(&mut self.frame, &name, &value);
                self.meta.lock().insert(name, Mark { frame: self.number, value });
                (Outcome::Record(Place::default(), Ok(()), Some(done)), true)
            }
            Job::Read { place, indexes, bytes_max, done } => (Outcome::Read { place, indexes, bytes_max, done }, false),
            Job::Recover(to) => (Outcome::Recover(to), false),
        }
    }

    /// Adds the newest commit hints to the frame.
    fn put_hints(&mut self) {
        for (place, hint) in std::mem::take(&mut self.hints) {
            frame::put_committed(&mut self.frame, place, &hint);
            if let Some(known) = self.replicas.get_mut(&place) {
                known.marks.committed = Some(Mark { frame: self.number, value: hint });
            }
        }
    }

    fn intact(&self) -> io::Result<()> {
        if self.failed { Err(io::Error::other("an earlier write of the log has failed")) } else { Ok(()) }
    }

    /// Writes the frame, and waits until it is on the disk.
    fn commit(&mut self) -> io::Result<()> {
        self.intact()?;
        let ready = self.control.as_ref().map_or(Ok(()), |control| control.before_sync());
        let written = ready.and_then(|()| {
            self.put_hints();
            self.collect()?;
            self.append()
        });
        self.or_fatal(written)
    }

    fn append(&mut self) -> io::Result<()> {
        self.files.append(&mut self.frame, self.number)?;
        self.number += 1;
        self.frame.shrink_to(super::BATCH_BYTES_MAX);
        frame::begin(&mut self.frame);
        Ok(())
    }

    /// What a frame on the disk allows: old segments go, and a full one is left.
    fn keep_house(&mut self) -> io::Result<()> {
        self.files.recycle()?;
        if self.files.len() >= self.segment_bytes {
            self.files.roll(self.number)?;
            self.number += 1;
            self.collector.look();
        }
        Ok(())
    }

    fn or_fatal(&mut self, result: io::Result<()>) -> io::Result<()> {
        match result {
            Err(_) if planted(Bug::FsyncErrorIgnored) => {
                frame::begin(&mut self.frame);
                Ok(())
            }
            Err(error) => Err(self.fatal(&error)),
            written => written,
        }
    }

    /// Nothing is written, read or acknowledged from here on.
    fn fatal(&mut self, error: &io::Error) -> io::Error {
        let error = io::Error::new(error.kind(), format!("log in {}: {error}", self.files.dir.display()));
        tracing::error!(%error, "the log cannot be used: this node stops");
        self.failed = true;
        (self.on_fatal)(&error);
        error
    }

    /// What is on the disk, and the hints that are not yet.
    fn read_back(&self) -> io::Result<AllFound> {
        let segments: Vec<u64> = self.files.segments.keys().copied().collect();
        let mut found = all_found(&read::load(&self.files.dir, &segments)?);
        for (place, hint) in &self.hints {
            found.entry(*place).or_default().committed = Some(hint.clone());
        }
        Ok(found)
    }

    /// Ends the log with a frame that proves all before it.
    fn close(&mut self) {
        if self.failed {
            return;
        }
        self.put_hints();
        if let Err(error) = self.append() {
            // Nobody was told that anything of it is durable.
            tracing::warn!(%error, "the log could not be closed properly");
        }
    }
}

/// For those who asked; nothing of replicas of which nothing is left.
pub(super) fn all_found(found: &Found) -> AllFound {
    let replicas = found.replicas.iter().map(|(place, found)| (*place, recovered(&found.marks, &found.entries)));
    replicas.filter(|(_, found)| *found != Recovered::default()).collect()
}
