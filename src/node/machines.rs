//! The two machines that groups replicate: a partition's rows, and the placement driver's state.

use crate::{
    kv, placement,
    raft::{LogPosition, Machine, Restorer},
};
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use tokio::sync::Notify;

/// Rows and sessions of one partition.
#[derive(Debug)]
pub struct PartitionMachine(kv::Store);

impl PartitionMachine {
    /// Replicates `store`.
    #[must_use]
    pub const fn new(store: kv::Store) -> Self {
        Self(store)
    }

    /// The rows.
    #[must_use]
    pub const fn store(&self) -> &kv::Store {
        &self.0
    }
}

impl Machine for PartitionMachine {
    type Reply = Vec<kv::Reply>;

    fn apply(&mut self, at: LogPosition, command: Bytes) -> Vec<kv::Reply> {
        let command = kv::Command::decode(&command).expect("the log holds only commands that this layer encoded");
        self.0.apply(at.index, &command)
    }

    fn freeze(&mut self) {
        self.0.freeze();
    }

    fn freeze_next(&mut self, bytes_max: usize) -> Option<Bytes> {
        self.0.freeze_next(bytes_max)
    }

    fn thaw(&mut self) {
        self.0.thaw();
    }

    fn restorer(&self) -> Box<dyn Restorer<Self>> {
        Box::new(PartitionRestorer(kv::Restore::new()))
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}

struct PartitionRestorer(kv::Restore);

impl Restorer<PartitionMachine> for PartitionRestorer {
    fn feed(&mut self, chunk: Bytes) -> Result<(), String> {
        self.0.feed(&chunk).map_err(|error| error.to_string())
    }

    fn finish(self: Box<Self>) -> Result<PartitionMachine, String> {
        self.0.finish().map(PartitionMachine).map_err(|error| error.to_string())
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
