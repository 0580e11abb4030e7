//! Snapshots of one replica: taking, keeping, restoring and receiving them.
//!
//! The chunks of a machine stand in the stored content one after the other, each with its length in four bytes before
//! it, so that a restorer is fed exactly the chunks that a machine gave, whatever pieces they travelled in.
//!
//! Invariants:
//! * a stored snapshot is replaced only by a newer one: taking one and installing a received one take turns, and one
//!   that was overtaken is dropped. Otherwise a log purged up to the newer one could not be replayed;
//! * a received snapshot is decoded completely before it is offered to Raft, and stored before it is in force;
//! * nothing is stored once the vault is closed.

use super::{
    codec,
    machine::{AnyCell, AnyRestorer, Frozen, LogPosition, Restored},
    types::{LogId, SnapshotMeta, Types},
};
use crate::{
    key::{PartitionId, ReplicaId},
    log::snapshots::{SnapshotHandle, SnapshotStore, SnapshotWriter},
    plant::{Bug, planted},
    telemetry,
};
use bytes::{BufMut as _, Bytes, BytesMut};
use openraft::{RaftSnapshotBuilder, alias::SnapshotOf};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Mutex, Notify};

/// Bytes that a machine is asked for at a time: it is locked for as long as that takes.
pub(super) const CHUNK_BYTES: usize = 128 << 10;

/// How long a disk takes for a chunk, when a planted bug needs one that takes time.
const CHUNK_PAUSE: Duration = Duration::from_millis(10);

/// Longest chunk accepted; a machine exceeds [`CHUNK_BYTES`] by one row at most.
const CHUNK_BYTES_MAX: usize = 64 << 20;

/// The content of a snapshot on its way through openraft.
pub(super) enum Content {
    /// One that is stored.
    Stored(SnapshotHandle),
    /// One that was received and decoded, and is stored when Raft accepts it.
    Received(Received),
    /// None: it could not be taken.
    Nothing,
}

/// A snapshot with its content.
pub(super) type Snapshot = SnapshotOf<Types, Content>;

/// A snapshot received completely.
pub(super) struct Received {
    writer: Box<dyn SnapshotWriter>,
    restored: Restored,
}

/// Where one replica keeps its snapshot, and what the scheduler needs to know.
pub(super) struct Vault {
    group: PartitionId,
    replica: ReplicaId,
    store: Arc<dyn SnapshotStore>,
    /// Held while the stored snapshot is replaced.
    replacing: Mutex<()>,
    closed: AtomicBool,
    taking: AtomicBool,
    /// Measure of the entries applied since the last snapshot was begun.
    pub since: AtomicU64,
    /// Where `since` is worth a look.
    pub mark: AtomicU64,
    /// Told when `since` has reached `mark`.
    pub grown: Notify,
    /// Told when a snapshot has been taken, refused or installed.
    pub settled: Notify,
}

impl Vault {
    /// The vault of one replica.
    pub(super) fn new(group: PartitionId, replica: ReplicaId, store: Arc<dyn SnapshotStore>) -> Self {
        Self {
            group,
            replica,
            store,
            replacing: Mutex::default(),
            closed: AtomicBool::new(false),
            taking: AtomicBool::new(false),
            since: AtomicU64::new(0),
            mark: AtomicU64::new(u64::MAX),
            grown: Notify::new(),
            settled: Notify::new(),
        }
    }

    /// Runs `work` where it may wait for a disk.
    async fn io<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        if !self.store.blocking() {
            return work();
        }
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
    }

    /// From now on nothing is stored. Waits for what is being stored.
    pub(super) async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        drop(self.replacing.lock().await);
    }

    /// Removes the stored snapshot.
    ///
    /// # Errors
    /// When the store could not.
    pub(super) async fn remove(&self) -> io::Result<()> {
        let (store, group, replica) = (Arc::clone(&self.store), self.group, self.replica);
        self.io(move || store.remove(group, replica)).await
    }

    /// The stored snapshot.
    ///
    /// # Errors
    /// When it is damaged.
    pub(super) async fn latest(&self) -> io::Result<Option<Snapshot>> {
        let (store, group, replica) = (Arc::clone(&self.store), self.group, self.replica);
        let Some(handle) = self.io(move || store.latest(group, replica)).await? else { return Ok(None) };
        let meta = codec::recover_meta(&handle.meta)?;
        Ok(Some(Snapshot { meta, snapshot: Content::Stored(handle) }))
    }

    async fn create(&self) -> io::Result<Box<dyn SnapshotWriter>> {
        let (store, group, replica) = (Arc::clone(&self.store), self.group, self.replica);
        self.io(move || store.create(group, replica)).await
    }

    async fn write(
        &self,
        mut writer: Box<dyn SnapshotWriter>,
        pieces: Vec<Bytes>,
    ) -> io::Result<Box<dyn SnapshotWriter>> {
        self.io(move || {
            for piece in pieces {
                writer.write(piece)?;
            }
            Ok(writer)
        })
        .await
    }

    /// Stores a snapshot made of these chunks of a machine, each asked for when the one before is written.
    ///
    /// # Errors
    /// When the store could not.
    pub(super) async fn keep(&self, chunks: impl Iterator<Item = Bytes> + Send, meta: &SnapshotMeta) -> io::Result<()> {
        let mut writer = self.create().await?;
        for chunk in chunks {
            writer = self.write(writer, framed(chunk)).await?;
        }
        self.finish(writer, meta).await?;
        Ok(())
    }

    async fn finish(&self, writer: Box<dyn SnapshotWriter>, meta: &SnapshotMeta) -> io::Result<SnapshotHandle> {
        let meta = codec::store_meta(meta);
        self.io(move || writer.finish(meta)).await
    }

    /// Content of a stored snapshot from `offset` on: `max` bytes, unless it ends before.
    ///
    /// # Errors
    /// When it is damaged.
    pub(super) async fn read(&self, handle: &SnapshotHandle, offset: u64, max: usize) -> io::Result<Bytes> {
        let handle = handle.clone();
        self.io(move || {
            let mut content = BytesMut::new();
            while content.len() < max {
                let piece = handle.read(offset + content.len() as u64, max - content.len())?;
                if piece.is_empty() {
                    break;
                }
                if content.is_empty() && piece.len() == max {
                    return Ok(piece);
                }
                content.extend_from_slice(&piece);
            }
            Ok(content.freeze())
        })
        .await
    }

    /// Puts the machine of a snapshot in force; a received one is stored first.
    ///
    /// # Errors
    /// When it is damaged or cannot be stored.
    pub(super) async fn install(&self, cell: &dyn AnyCell, meta: &SnapshotMeta, content: Content) -> io::Result<()> {
        let at = position(meta.last_log_id.as_ref());
        match content {
            Content::Stored(handle) => {
                let mut decoder = Decoder::new(cell.restorer());
                let mut offset = 0;
                while offset < handle.len {
                    let piece = self.read(&handle, offset, CHUNK_BYTES).await?;
                    offset += piece.len() as u64;
                    decoder.feed(piece).map_err(damaged)?;
                    tokio::task::yield_now().await;
                }
                cell.replace(decoder.finish().map_err(damaged)?, at);
            }
            Content::Received(Received { writer, restored }) => {
                let _turn = self.replacing.lock().await;
                if self.closed.load(Ordering::Acquire) {
                    return Err(io::Error::other("the replica is stopping"));
                }
                self.finish(writer, meta).await?;
                cell.replace(restored, at);
                metrics::counter!(telemetry::RAFT_SNAPSHOTS_INSTALLED_TOTAL).increment(1);
                tracing::info!(partition = %self.group, index = at.index, "{}", telemetry::SNAPSHOT_INSTALLED);
            }
            Content::Nothing => return Err(io::Error::other("there is no snapshot to install")),
        }
        self.since.store(0, Ordering::Release);
        self.settled.notify_waiters();
        Ok(())
    }
}

fn damaged(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged snapshot: {why}"))
}

/// A position without the proposing replica.
#[must_use]
pub(super) fn position(log_id: Option<&LogId>) -> LogPosition {
    log_id.map_or_else(LogPosition::default, |at| LogPosition { index: at.index, term: at.leader_id.term })
}

/// Takes one snapshot. Ends it when dropped.
pub(super) struct Taker {
    cell: Arc<dyn AnyCell>,
    vault: Arc<Vault>,
    meta: SnapshotMeta,
    generation: u64,
}

impl Taker {
    /// Begins a snapshot of the state as it is now, which `meta` describes; none while another one is being taken.
    pub(super) fn begin(cell: &Arc<dyn AnyCell>, vault: &Arc<Vault>, meta: SnapshotMeta) -> Option<Self> {
        if vault.taking.swap(true, Ordering::AcqRel) {
            return None;
        }
        let Some(generation) = cell.freeze() else {
            vault.taking.store(false, Ordering::Release);
            return None;
        };
        vault.since.store(0, Ordering::Release);
        Some(Self { cell: Arc::clone(cell), vault: Arc::clone(vault), meta, generation })
    }

    async fn take(&mut self) -> io::Result<Snapshot> {
        let mut writer = self.vault.create().await?;
        loop {
            match self.cell.freeze_next(self.generation, CHUNK_BYTES) {
                Frozen::Chunk(chunk) => writer = self.vault.write(writer, framed(chunk)).await?,
                Frozen::End => break,
                Frozen::Replaced => return self.overtaken().await,
            }
            if planted(Bug::SnapshotAhead) {
                // Snapshots in memory take no time, in which nothing can be written.
                tokio::time::sleep(CHUNK_PAUSE).await;
            }
            tokio::task::yield_now().await;
        }
        let _turn = self.vault.replacing.lock().await;
        if self.vault.closed.load(Ordering::Acquire) || self.cell.generation() != self.generation {
            return self.overtaken().await;
        }
        let handle = self.vault.finish(writer, &self.meta).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: Content::Stored(handle) })
    }

    async fn overtaken(&self) -> io::Result<Snapshot> {
        self.vault.latest().await?.ok_or_else(|| io::Error::other("the replica is stopping"))
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        self.cell.thaw(self.generation);
        self.vault.taking.store(false, Ordering::Release);
        self.vault.settled.notify_waiters();
    }
}

impl RaftSnapshotBuilder<Types> for Taker {
    type SnapshotData = Content;

    /// Never an error: that would stop the replica for good, while a log without a new snapshot only grows. It is tried
    /// again when the log is looked at next.
    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        Ok(self.take().await.unwrap_or_else(|error| {
            let (group, replica) = (self.vault.group, self.vault.replica);
            tracing::error!(%group, %replica, %error, "no snapshot could be taken; the log grows until one can");
            self.vault.since.fetch_max(self.vault.mark.load(Ordering::Acquire), Ordering::AcqRel);
            Snapshot { meta: SnapshotMeta::default(), snapshot: Content::Nothing }
        }))
    }
}

fn framed(chunk: Bytes) -> Vec<Bytes> {
    let len = u32::try_from(chunk.len()).expect("a chunk is far below 4 GiB");
    vec![Bytes::copy_from_slice(&len.to_be_bytes()), chunk]
}

/// Feeds a restorer the chunks that are framed in pieces of any size.
pub(super) struct Decoder {
    restorer: Box<dyn AnyRestorer>,
    pending: BytesMut,
}

impl Decoder {
    /// A decoder at the beginning of the content.
    #[must_use]
    pub(super) fn new(restorer: Box<dyn AnyRestorer>) -> Self {
        Self { restorer, pending: BytesMut::new() }
    }

    /// Takes the next piece of content.
    ///
    /// # Errors
    /// When the content is damaged.
    pub(super) fn feed(&mut self, piece: Bytes) -> Result<(), String> {
        self.pending.put(piece);
        while let Some((head, rest)) = self.pending.split_first_chunk::<4>() {
            let len = u32::from_be_bytes(*head) as usize;
            if len > CHUNK_BYTES_MAX {
                return Err(format!("a chunk of {len} bytes"));
            }
            if rest.len() < len {
                break;
            }
            let mut chunk = self.pending.split_to(4 + len).freeze();
            self.restorer.feed(chunk.split_off(4))?;
        }
        Ok(())
    }

    /// The machine.
    ///
    /// # Errors
    /// When something is missing or damaged.
    pub(super) fn finish(self) -> Result<Restored, String> {
        if !self.pending.is_empty() {
            return Err("the last chunk is cut".into());
        }
        self.restorer.finish()
    }
}

/// A snapshot on its way in.
pub(super) struct Incoming {
    vault: Arc<Vault>,
    writer: Option<Box<dyn SnapshotWriter>>,
    decoder: Decoder,
    /// Bytes received so far.
    pub offset: u64,
}

impl Incoming {
    /// Begins receiving.
    ///
    /// # Errors
    /// When the store cannot begin a snapshot.
    pub(super) async fn begin(cell: &dyn AnyCell, vault: &Arc<Vault>) -> io::Result<Self> {
        let writer = Some(vault.create().await?);
        Ok(Self { vault: Arc::clone(vault), writer, decoder: Decoder::new(cell.restorer()), offset: 0 })
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// When it is damaged or cannot be written; nothing can be added any more then.
    pub(super) async fn feed(&mut self, piece: Bytes) -> io::Result<()> {
        let writer = self.writer.take().ok_or_else(|| io::Error::other("receiving has failed before"))?;
        self.decoder.feed(piece.clone()).map_err(damaged)?;
        self.offset += piece.len() as u64;
        self.writer = Some(self.vault.write(writer, vec![piece]).await?);
        Ok(())
    }

    /// Ends receiving.
    ///
    /// # Errors
    /// When something is missing or damaged.
    pub(super) fn finish(self) -> io::Result<Content> {
        let writer = self.writer.ok_or_else(|| io::Error::other("receiving has failed before"))?;
        Ok(Content::Received(Received { writer, restored: self.decoder.finish().map_err(damaged)? }))
    }
}
