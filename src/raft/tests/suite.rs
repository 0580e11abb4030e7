//! openraft's own tests of a log and a state machine, on ours: several groups share one engine and are interleaved.

use super::world::Pairs;
use crate::{
    key::{PartitionId, ReplicaId},
    log::{
        LogEngine, Recovered,
        memory::MemoryLog,
        segments::{SegmentLog, SegmentOptions},
        snapshots::MemorySnapshots,
    },
    raft::{
        machine::{AnyCell, Cell},
        replicated::Replicated,
        snapshots::{Content, Incoming, Snapshot, Taker, Vault},
        storage::{Log, cost},
        types::{Cmd, Entry, LogId, Payload, SnapshotMeta, StoredMembership, Types, log_id},
    },
};
use futures_util::{Stream, StreamExt as _};
use openraft::{
    OptionalSend, StorageError,
    storage::{EntryResponder, RaftLogReader as _, RaftLogStorage as _, RaftLogStorageExt as _, RaftStateMachine},
    testing::log::{StoreBuilder, Suite},
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// A replica whose snapshots arrive as from another node: the suite hands over content as it is.
struct Elsewhere {
    inner: Replicated,
    cell: Arc<dyn AnyCell>,
    vault: Arc<Vault>,
}

impl RaftStateMachine<Types> for Elsewhere {
    type SnapshotData = Content;
    type SnapshotBuilder = Taker;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        self.inner.applied_state().await
    }

    async fn apply<S>(&mut self, entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        self.inner.apply(entries).await
    }

    async fn get_snapshot_builder(&mut self) -> Taker {
        self.inner.try_create_snapshot_builder(true).await.expect("nothing else is being taken")
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, content: Content) -> io::Result<()> {
        let Content::Stored(handle) = content else { return Err(io::Error::other("already received")) };
        let mut incoming = Incoming::begin(&*self.cell, &self.vault).await?;
        while incoming.offset < handle.len {
            incoming.feed(self.vault.read(&handle, incoming.offset, 3).await?).await?;
        }
        self.inner.install_snapshot(meta, incoming.finish()?).await
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        self.inner.get_current_snapshot().await
    }
}

struct Builder {
    engine: Arc<dyn LogEngine>,
    groups: AtomicU64,
}

/// A log that holds nothing in memory of what is applied.
fn open(engine: &Arc<dyn LogEngine>, place: (PartitionId, ReplicaId), found: &Recovered) -> Log {
    Log::open(engine, place, found, 0).unwrap()
}

impl Builder {
    /// A neighbour that writes to the same engine between the steps of the suite.
    async fn disturb(&self, group: u64) {
        let mut log = open(&self.engine, (PartitionId(group), ReplicaId(2)), &Recovered::default());
        let entries = (1..=20).map(|index| Entry { log_id: log_id(9, 2, index), payload: Payload::Blank });
        log.blocking_append(entries).await.unwrap();
        log.truncate_after(Some(log_id(9, 2, 15))).await.unwrap();
        log.purge(log_id(9, 2, 5)).await.unwrap();
    }
}

impl StoreBuilder<Types, Log, Elsewhere> for Builder {
    async fn build(&self) -> Result<((), Log, Elsewhere), StorageError<Types>> {
        let group = PartitionId(self.groups.fetch_add(1, Ordering::Relaxed));
        self.disturb(group.0).await;
        let log = open(&self.engine, (group, ReplicaId(1)), &Recovered::default());
        let cell: Arc<dyn AnyCell> = Arc::new(Cell::new(Pairs::default()));
        let vault = Arc::new(Vault::new(group, ReplicaId(1), Arc::new(MemorySnapshots::default())));
        let (inner, _released) = Replicated::new(Arc::clone(&cell), Arc::clone(&vault), log.clone());
        Ok(((), log, Elsewhere { inner, cell, vault }))
    }
}

async fn suite(engine: Arc<dyn LogEngine>) {
    let builder = Builder { engine: Arc::clone(&engine), groups: AtomicU64::new(1) };
    Suite::test_all(builder).await.unwrap();
    // What the neighbours wrote is what is found.
    let found = engine.recover().unwrap();
    let neighbours: Vec<_> = found.iter().filter(|((_, replica), _)| *replica == ReplicaId(2)).collect();
    assert!(neighbours.len() > 40, "{}", neighbours.len());
    for ((group, replica), found) in neighbours {
        let mut log = open(&engine, (*group, *replica), found);
        let state = log.get_log_state().await.unwrap();
        assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(log_id(9, 2, 5)), Some(log_id(9, 2, 15))));
    }
}

#[tokio::test]
async fn openraft_accepts_the_log_in_memory() {
    suite(Arc::new(MemoryLog::immediate())).await;
}

#[tokio::test]
async fn openraft_accepts_the_log_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    suite(Arc::new(SegmentLog::open(dir.path(), SegmentOptions::default()).unwrap())).await;
}

async fn reads_what_was_let_go(engine: Arc<dyn LogEngine>) {
    let place = (PartitionId(1), ReplicaId(1));
    let mut log = open(&engine, place, &Recovered::default());
    let entry =
        |index| Entry { log_id: log_id(3, 1, index), payload: Payload::Normal(Cmd(format!("{index:060000}").into())) };
    let all: Vec<Entry> = (1..=40).map(entry).collect();
    for some in all.chunks(7) {
        log.blocking_append(some.iter().cloned()).await.unwrap();
    }
    let whole = log.bytes();
    for (applied, purged) in [(0, 0), (1, 0), (16, 0), (16, 4), (16, 20), (39, 20)] {
        log.let_go(applied);
        if purged > 0 {
            log.purge(log_id(3, 1, purged)).await.unwrap();
        }
        let left = &all[usize::try_from(purged).unwrap()..];
        let held = 40 - applied.max(purged);
        assert_eq!((log.bytes(), log.held_bytes()), (whole / 40 * left.len() as u64, whole / 40 * held));
        assert_eq!(log.try_get_log_entries(..).await.unwrap(), left);
        assert_eq!(log.try_get_log_entries(30..33).await.unwrap(), all[29..32]);
        let streamed: Vec<Entry> = log.entries_stream(purged + 1..38).await.map(Result::unwrap).collect().await;
        assert_eq!(streamed, left[..37 - usize::try_from(purged).unwrap()]);
        let limited = log.limited_get_log_entries(purged + 1, 41).await.unwrap();
        assert!(!limited.is_empty() && limited == left[..limited.len()]);
        assert!(limited.iter().map(cost).sum::<u64>() <= 1 << 20);
        assert_eq!(log.index_before_last(cost(&all[0]) * 5), Some(35));
        assert_eq!(log.last(), Some(log_id(3, 1, 40)));
    }
    assert!(log.limited_get_log_entries(5, 9).await.is_err(), "purged");
    let found = engine.recover().unwrap().remove(&place).unwrap();
    let mut log = open(&engine, place, &found);
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), all[20..]);
}

#[tokio::test]
async fn entries_that_were_let_go_are_read_again() {
    reads_what_was_let_go(Arc::new(MemoryLog::immediate())).await;
    let dir = tempfile::tempdir().unwrap();
    reads_what_was_let_go(Arc::new(SegmentLog::open(dir.path(), SegmentOptions::default()).unwrap())).await;
}
