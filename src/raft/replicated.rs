//! The state machine that openraft sees: a type-erased machine, its membership and its vault.
//!
//! Invariants:
//! * an entry's reply is sent after the entry is applied and readers can see it;
//! * a panic in a machine stops its replica, never the process, and never leaves a writer without an outcome.

use super::{
    machine::{AnyCell, Item},
    snapshots::{Content, Snapshot, Taker, Vault, position},
    storage::{self, Log},
    types::{Entry, LogId, Payload, SnapshotMeta, StoredMembership, Types},
};
use crate::plant::{Bug, planted};
use futures_util::{Stream, StreamExt as _};
use openraft::{
    OptionalSend,
    storage::{EntryResponder, RaftStateMachine},
};
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
};
use tokio::sync::oneshot;

/// Entries applied under one lock.
const APPLY_ENTRIES: usize = 64;

/// Measure of entries applied under one lock, in bytes; one entry may exceed it.
const APPLY_BYTES: u64 = 1 << 20;

/// One replica's state machine.
pub(super) struct Replicated {
    cell: Arc<dyn AnyCell>,
    vault: Arc<Vault>,
    log: Log,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Tells, when dropped, that openraft has let go of the machine.
    _alive: oneshot::Sender<()>,
}

impl Replicated {
    /// The state machine, and what ends when openraft lets go of it.
    pub(super) fn new(cell: Arc<dyn AnyCell>, vault: Arc<Vault>, log: Log) -> (Self, oneshot::Receiver<()>) {
        let (alive, gone) = oneshot::channel();
        let membership = StoredMembership::default();
        (Self { cell, vault, log, applied: None, membership, _alive: alive }, gone)
    }

    fn item(&mut self, (entry, responder): EntryResponder<Types>) -> Item {
        let Entry { log_id, payload } = entry;
        let command = match payload {
            Payload::Blank => None,
            Payload::Normal(command) => Some(command.0),
            Payload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(log_id), membership);
                None
            }
        };
        self.applied = Some(log_id);
        Item { at: position(Some(&log_id)), command, responder }
    }

    fn apply_batch(&self, items: Vec<Item>, bytes: u64) -> io::Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.cell.apply(items))).map_err(|_| {
            tracing::error!(applied = ?self.applied, "the machine panicked; the replica stops");
            io::Error::other("the machine panicked")
        })?;
        if let Some(applied) = self.applied {
            self.log.let_go(applied.index);
        }
        let since = self.vault.since.fetch_add(bytes, Ordering::AcqRel) + bytes;
        if since >= self.vault.mark.load(Ordering::Acquire) {
            self.vault.grown.notify_one();
        }
        Ok(())
    }
}

impl RaftStateMachine<Types> for Replicated {
    type SnapshotData = Content;
    type SnapshotBuilder = Taker;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut items = Vec::new();
        let mut bytes = 0;
        while let Some(entry) = entries.next().await {
            let entry = entry?;
            bytes += storage::cost(&entry.0);
            items.push(self.item(entry));
            if items.len() >= APPLY_ENTRIES || bytes >= APPLY_BYTES {
                items.pop_if(|item| item.responder.is_none() && planted(Bug::FullBatchLosesEntry));
                self.apply_batch(std::mem::take(&mut items), std::mem::take(&mut bytes))?;
                // Readers and other groups get their turn during a long replay.
                tokio::task::yield_now().await;
            }
        }
        self.apply_batch(items, bytes)
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<Taker> {
        let meta = SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() };
        Taker::begin(&self.cell, &self.vault, meta)
    }

    async fn get_snapshot_builder(&mut self) -> Taker {
        self.try_create_snapshot_builder(true).await.expect("openraft takes one snapshot at a time, of something")
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, content: Content) -> io::Result<()> {
        self.vault.install(&*self.cell, meta, content).await?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        self.vault.latest().await
    }
}
