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
        storage::Log,
        types::{Entry, LogId, Payload, SnapshotMeta, StoredMembership, Types, log_id},
    },
};
use futures_util::Stream;
use openraft::{
    OptionalSend, StorageError,
    storage::{EntryResponder, RaftLogStorage as _, RaftLogStorageExt as _, RaftStateMachine},
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

impl Builder {
    /// A neighbour that writes to the same engine between the steps of the suite.
    async fn disturb(&self, group: u64) {
        let mut log =
            Log::open(Arc::clone(&self.engine), PartitionId(group), ReplicaId(2), &Recovered::default()).unwrap();
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
        let log = Log::open(Arc::clone(&self.engine), group, ReplicaId(1), &Recovered::default()).unwrap();
        let cell: Arc<dyn AnyCell> = Arc::new(Cell::new(Pairs::default()));
        let vault = Arc::new(Vault::new(group, ReplicaId(1), Arc::new(MemorySnapshots::default())));
        let (inner, _released) = Replicated::new(Arc::clone(&cell), Arc::clone(&vault));
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
        let mut log = Log::open(Arc::clone(&engine), *group, *replica, found).unwrap();
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
