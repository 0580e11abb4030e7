//! The two machines that groups replicate: a partition's rows, and the placement driver's state.

use crate::{
    key::Span,
    kv, placement,
    raft::{LogPosition, Machine, Restorer},
};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::Notify;

/// Children that splits have made here and that are not durable yet.
#[derive(Debug, Default)]
pub struct Births {
    waiting: Mutex<Vec<Born>>,
    /// Told of every new one.
    pub(super) news: Arc<Notify>,
    /// Told of every change of what a partition here owns: the leader may have something to do about it.
    reshaped: Arc<Notify>,
}

/// A child, and the claim that keeps its parent from taking a snapshot.
#[derive(Debug)]
pub(super) struct Born {
    pub(super) birth: kv::Birth,
    pub(super) unborn: Arc<()>,
}

impl Births {
    /// Births of which `news` tells; `reshaped` tells of all changes of bounds.
    #[must_use]
    pub fn new(news: Arc<Notify>, reshaped: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { waiting: Mutex::default(), news, reshaped })
    }

    /// Takes all that wait.
    pub(super) fn take(&self) -> Vec<Born> {
        std::mem::take(&mut *self.waiting.lock())
    }

    /// Puts one back that could not be made durable.
    pub(super) fn put_back(&self, born: Born) {
        self.waiting.lock().push(born);
    }
}

/// Rows and sessions of one partition.
#[derive(Debug)]
pub struct PartitionMachine {
    store: kv::Store,
    births: Arc<Births>,
    /// Held by every child that is not durable yet.
    unborn: Arc<()>,
}

impl PartitionMachine {
    /// Replicates `store`; children go to `births`.
    #[must_use]
    pub fn new(store: kv::Store, births: Arc<Births>) -> Self {
        Self { store, births, unborn: Arc::default() }
    }

    /// The rows, once nobody needs the machine.
    #[must_use]
    pub fn into_store(self) -> kv::Store {
        self.store
    }

    /// The rows.
    #[must_use]
    pub const fn store(&self) -> &kv::Store {
        &self.store
    }

    /// See [`kv::Store::confine`].
    pub(super) fn confine(&mut self, index: u64, span: Span, epoch: u64) {
        self.store.confine(index, span, epoch);
    }

    fn reshape(&mut self, at: LogPosition, reshape: &kv::Reshape) {
        if let Some(birth) = self.store.reshape(at.index, at.term, reshape) {
            self.births.put_back(Born { birth, unborn: Arc::clone(&self.unborn) });
            self.births.news.notify_one();
        }
        self.births.reshaped.notify_one();
    }
}

impl Machine for PartitionMachine {
    type Reply = Vec<kv::Reply>;

    /// Writes are answered one by one; a change of what is owned has no answer: the state tells.
    fn apply(&mut self, at: LogPosition, command: Bytes) -> Vec<kv::Reply> {
        const OURS: &str = "the log holds only what this layer encoded";
        if let Some(reshape) = kv::Reshape::decode(&command).expect(OURS) {
            self.reshape(at, &reshape);
            return Vec::new();
        }
        self.store.apply(at.index, &kv::Command::decode(&command).expect(OURS))
    }

    fn may_freeze(&self) -> bool {
        Arc::strong_count(&self.unborn) == 1
    }

    fn freeze(&mut self) {
        self.store.freeze();
    }

    fn freeze_next(&mut self, bytes_max: usize) -> Option<Bytes> {
        self.store.freeze_next(bytes_max)
    }

    fn thaw(&mut self) {
        self.store.thaw();
    }

    fn restorer(&self) -> Box<dyn Restorer<Self>> {
        Box::new(PartitionRestorer(kv::Restore::new(), Arc::clone(&self.births)))
    }

    fn bytes(&self) -> u64 {
        self.store.bytes()
    }
}

struct PartitionRestorer(kv::Restore, Arc<Births>);

impl Restorer<PartitionMachine> for PartitionRestorer {
    fn feed(&mut self, chunk: Bytes) -> Result<(), String> {
        self.0.feed(&chunk).map_err(|error| error.to_string())
    }

    fn finish(self: Box<Self>) -> Result<PartitionMachine, String> {
        let store = self.0.finish().map_err(|error| error.to_string())?;
        Ok(PartitionMachine::new(store, self.1))
    }
}

/// Nodes, keyspaces and the map.
#[derive(Debug, Default)]
pub struct DriverMachine {
    state: placement::State,
    /// Shared with whoever acts on changes; survives the replacement of the machine by a snapshot.
    changed: Arc<Notify>,
    frozen: Option<Bytes>,
}

impl DriverMachine {
    /// The state.
    #[must_use]
    pub const fn state(&self) -> &placement::State {
        &self.state
    }

    /// Told of every command applied.
    #[must_use]
    pub fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }
}

impl Machine for DriverMachine {
    type Reply = placement::Answer;

    fn apply(&mut self, _at: LogPosition, command: Bytes) -> placement::Answer {
        let command = placement::Command::decode(&command).expect("the log holds only commands that nodes encoded");
        let answer = self.state.apply(command);
        self.changed.notify_one();
        answer
    }

    /// The state is small and changes rarely: it is frozen as one piece.
    fn freeze(&mut self) {
        self.frozen = Some(self.state.encode());
    }

    fn freeze_next(&mut self, bytes_max: usize) -> Option<Bytes> {
        let rest = self.frozen.as_mut().filter(|rest| !rest.is_empty())?;
        Some(rest.split_to(rest.len().min(bytes_max.max(1))))
    }

    fn thaw(&mut self) {
        self.frozen = None;
    }

    fn restorer(&self) -> Box<dyn Restorer<Self>> {
        Box::new(DriverRestorer { bytes: BytesMut::new(), changed: Arc::clone(&self.changed) })
    }

    fn bytes(&self) -> u64 {
        (self.state.map().partitions().len() * size_of::<placement::Partition>()) as u64
    }
}

struct DriverRestorer {
    bytes: BytesMut,
    changed: Arc<Notify>,
}

impl Restorer<DriverMachine> for DriverRestorer {
    fn feed(&mut self, chunk: Bytes) -> Result<(), String> {
        self.bytes.extend_from_slice(&chunk);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<DriverMachine, String> {
        let state = placement::State::decode(&self.bytes).map_err(|error| error.to_string())?;
        self.changed.notify_one();
        Ok(DriverMachine { state, changed: self.changed, frozen: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Layout, NodeId, PartitionId, Replica, ReplicaId, Span};

    #[test]
    fn a_partition_takes_no_snapshot_before_its_child_is_durable() {
        let births = Births::new(Arc::default(), Arc::default());
        let (layout, limits) = (Layout::Ordered, kv::SessionLimits::default());
        let store = kv::Store::new(kv::StoreConfig { layout, span: Span::all(), limits });
        let mut machine = PartitionMachine::new(store, Arc::clone(&births));
        let split = kv::Split {
            at: Bytes::from_static(b"m"),
            child: PartitionId(2),
            members: vec![Replica { id: ReplicaId(9), node: NodeId(1) }],
            leader: ReplicaId(9),
            map_version: 3,
        };
        let reshape = kv::Reshape { epoch: 1, term: 4, change: kv::Change::Split(Box::new(split)) };
        assert!(machine.may_freeze());
        machine.apply(LogPosition { index: 1, term: 4 }, reshape.encode());
        assert!(!machine.may_freeze(), "the log can still make the child again, and has to");
        let born = births.take();
        assert!(!machine.may_freeze(), "it is being kept");
        drop(born);
        assert!(machine.may_freeze());
    }
}
