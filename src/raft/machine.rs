//! What a group replicates: a [`Machine`], and the shared cell in which one lives.
//!
//! Commands are applied under the cell's write lock, for a bounded number of entries at a time; readers share it. A
//! snapshot is taken chunk by chunk between them, of the state as it was when it was begun.
//!
//! Invariants:
//! * the state and the position that it was applied to change together, under one lock;
//! * a snapshot never mixes two machines: when a machine is replaced by a received one, the work on it ends.

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use std::{
    any::Any,
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::types::{Answer, Types};

/// Where in a group's log something stands. The default lies before the first entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct LogPosition {
    /// Index of the entry.
    pub index: u64,
    /// Term in which it was proposed.
    pub term: u64,
}

/// A deterministic state machine. Every replica of a group applies the same commands in the same order.
pub trait Machine: Send + Sync + Sized + 'static {
    /// The answer to a command.
    type Reply: Send + Sync + 'static;

    /// Applies the command at `at`. Must depend on nothing but the state and its arguments, and must not panic: a
    /// command that makes no sense gets a reply that says so.
    fn apply(&mut self, at: LogPosition, command: Bytes) -> Self::Reply;

    /// Whether a snapshot may be begun. Not while something that was applied still has to be made durable elsewhere: the
    /// log, which could make it again, is cut after a snapshot.
    fn may_freeze(&self) -> bool {
        true
    }

    /// Begins a snapshot of the state as it is now. Commands may be applied while it is taken.
    fn freeze(&mut self);

    /// The next chunk of the snapshot, of about `bytes_max` bytes at most; none when it is complete.
    fn freeze_next(&mut self, bytes_max: usize) -> Option<Bytes>;

    /// Ends a snapshot, complete or not.
    fn thaw(&mut self);

    /// Builds a machine like this one, but with the state of a snapshot.
    fn restorer(&self) -> Box<dyn Restorer<Self>>;

    /// About how many bytes the state takes.
    fn bytes(&self) -> u64;
}

/// Turns the chunks of a snapshot into a machine.
pub trait Restorer<M>: Send {
    /// Takes the next chunk, exactly as [`Machine::freeze_next`] gave it.
    ///
    /// # Errors
    /// When it is damaged.
    fn feed(&mut self, chunk: Bytes) -> Result<(), String>;

    /// The machine.
    ///
    /// # Errors
    /// When something is missing or damaged.
    fn finish(self: Box<Self>) -> Result<M, String>;
}

/// The machine of a replica, and where it stands.
pub(super) struct Cell<M> {
    state: RwLock<State<M>>,
    /// Goes up when the applied position does.
    pub gate: Gate,
}

struct State<M> {
    machine: M,
    applied: LogPosition,
    /// Goes up when the machine is replaced.
    generation: u64,
}

/// One entry to apply.
pub(super) struct Item {
    /// Its position.
    pub at: LogPosition,
    /// The command; none for entries that only Raft reads.
    pub command: Option<Bytes>,
    /// Who waits for the reply.
    pub responder: Option<openraft::storage::ApplyResponder<Types>>,
}

/// The next step of a snapshot.
pub(super) enum Frozen {
    /// A chunk.
    Chunk(Bytes),
    /// It is complete.
    End,
    /// The machine was replaced: there is nothing to complete.
    Replaced,
}

/// A machine made of a received snapshot, not yet in its place.
pub(super) type Restored = Box<dyn Any + Send>;

/// [`Restorer`] without its type.
pub(super) trait AnyRestorer: Send {
    /// As [`Restorer::feed`].
    fn feed(&mut self, chunk: Bytes) -> Result<(), String>;
    /// As [`Restorer::finish`].
    fn finish(self: Box<Self>) -> Result<Restored, String>;
}

struct ErasedRestorer<M>(Box<dyn Restorer<M>>);

impl<M: Machine> AnyRestorer for ErasedRestorer<M> {
    fn feed(&mut self, chunk: Bytes) -> Result<(), String> {
        self.0.feed(chunk)
    }

    fn finish(self: Box<Self>) -> Result<Restored, String> {
        Ok(Box::new(self.0.finish()?))
    }
}

/// [`Cell`] without the type of its machine, for the one instantiation of openraft.
pub(super) trait AnyCell: Send + Sync + 'static {
    /// Applies entries in order, then answers those who wait.
    fn apply(&self, items: Vec<Item>);
    /// Begins a snapshot; returns the generation that it is of. None while the machine allows none.
    fn freeze(&self) -> Option<u64>;
    /// The next step of the snapshot of `generation`.
    fn freeze_next(&self, generation: u64, bytes_max: usize) -> Frozen;
    /// Ends the snapshot of `generation`.
    fn thaw(&self, generation: u64);
    /// A restorer for this machine.
    fn restorer(&self) -> Box<dyn AnyRestorer>;
    /// Puts `restored` in the machine's place, applied up to `at`.
    fn replace(&self, restored: Restored, at: LogPosition);
    /// Which machine this is, counted from 0.
    fn generation(&self) -> u64;
    /// About how many bytes the state takes.
    fn bytes(&self) -> u64;
    /// The gate of the applied position.
    fn gate(&self) -> &Gate;
}

impl<M: Machine> Cell<M> {
    /// The cell of `machine`, to which nothing was applied.
    pub(super) fn new(machine: M) -> Self {
        let state = State { machine, applied: LogPosition::default(), generation: 0 };
        Self { state: RwLock::new(state), gate: Gate::default() }
    }

    /// The machine, once nobody shares the cell.
    pub(super) fn into_machine(self) -> M {
        self.state.into_inner().machine
    }

    /// Lets `read` look at the state and at the position that it was applied to.
    pub(super) fn read<T>(&self, read: impl FnOnce(&M, LogPosition) -> T) -> T {
        let state = self.state.read();
        read(&state.machine, state.applied)
    }
}

impl<M: Machine> AnyCell for Cell<M> {
    fn apply(&self, items: Vec<Item>) {
        let Some(last) = items.last().map(|item| item.at) else { return };
        let mut answers = Vec::with_capacity(items.len());
        {
            let mut state = self.state.write();
            for item in items {
                let reply = item.command.map(|command| state.machine.apply(item.at, command));
                state.applied = item.at;
                // Only the leader has somebody to answer; elsewhere the reply is dropped here.
                if let Some(responder) = item.responder {
                    answers.push((responder, Answer(reply.map(|reply| Box::new(reply) as _))));
                }
            }
        }
        self.gate.reach(last.index);
        for (responder, answer) in answers {
            responder.send(answer);
        }
    }

    fn freeze(&self) -> Option<u64> {
        let mut state = self.state.write();
        if !state.machine.may_freeze() {
            return None;
        }
        state.machine.freeze();
        Some(state.generation)
    }

    fn freeze_next(&self, generation: u64, bytes_max: usize) -> Frozen {
        let mut state = self.state.write();
        if state.generation != generation {
            return Frozen::Replaced;
        }
        state.machine.freeze_next(bytes_max).map_or(Frozen::End, Frozen::Chunk)
    }

    fn thaw(&self, generation: u64) {
        let mut state = self.state.write();
        if state.generation == generation {
            state.machine.thaw();
        }
    }

    fn restorer(&self) -> Box<dyn AnyRestorer> {
        Box::new(ErasedRestorer(self.state.read().machine.restorer()))
    }

    fn replace(&self, restored: Restored, at: LogPosition) {
        let machine = *restored.downcast::<M>().expect("a restorer of this cell makes machines of its type");
        let replaced = {
            let mut state = self.state.write();
            state.generation += 1;
            state.applied = at;
            std::mem::replace(&mut state.machine, machine)
        };
        self.gate.reach(at.index);
        // Outside the lock: letting go of a large state takes time.
        drop(replaced);
    }

    fn generation(&self) -> u64 {
        self.state.read().generation
    }

    fn bytes(&self) -> u64 {
        self.state.read().machine.bytes()
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }
}

/// Lets waiters through when the applied index reaches theirs. Wakes exactly those.
#[derive(Default)]
pub(super) struct Gate {
    applied: AtomicU64,
    waiters: Mutex<Waiters>,
}

#[derive(Default)]
struct Waiters {
    closed: bool,
    next: u64,
    by_index: BTreeMap<(u64, u64), oneshot::Sender<()>>,
}

/// Why a gate did not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum GateError {
    /// The deadline passed.
    Timeout,
    /// The replica has stopped.
    Stopped,
}

/// Forgets a waiter when dropped.
struct Waiting<'a> {
    gate: &'a Gate,
    key: (u64, u64),
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.gate.waiters.lock().by_index.remove(&self.key);
    }
}

impl Gate {
    /// The applied index.
    #[must_use]
    pub(super) fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// Waits until `index` is applied.
    ///
    /// # Errors
    /// When that does not happen before `deadline`, or not any more.
    pub(super) async fn reached(&self, index: u64, deadline: Instant) -> Result<(), GateError> {
        if self.applied() >= index {
            return Ok(());
        }
        let (open, opened) = oneshot::channel();
        let _waiting = {
            let mut waiters = self.waiters.lock();
            // Looked at again under the lock that the other side takes after raising it.
            if self.applied() >= index {
                return Ok(());
            }
            if waiters.closed {
                return Err(GateError::Stopped);
            }
            waiters.next += 1;
            let key = (index, waiters.next);
            waiters.by_index.insert(key, open);
            Waiting { gate: self, key }
        };
        match timeout_at(deadline, opened).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_closed)) => Err(GateError::Stopped),
            Err(_elapsed) => Err(GateError::Timeout),
        }
    }

    fn reach(&self, index: u64) {
        self.applied.fetch_max(index, Ordering::AcqRel);
        let passed = {
            let mut waiters = self.waiters.lock();
            if waiters.by_index.is_empty() {
                return;
            }
            let later = waiters.by_index.split_off(&(index + 1, 0));
            std::mem::replace(&mut waiters.by_index, later)
        };
        for open in passed.into_values() {
            // The waiter may have given up.
            let _ = open.send(());
        }
    }

    /// Ends all waiting.
    pub(super) fn close(&self) {
        let waiters = {
            let mut waiters = self.waiters.lock();
            waiters.closed = true;
            std::mem::take(&mut waiters.by_index)
        };
        drop(waiters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_gate_opens_for_those_whose_index_is_reached() {
        let gate = std::sync::Arc::new(Gate::default());
        gate.reach(3);
        let deadline = Instant::now() + Duration::from_secs(1);
        assert_eq!(gate.reached(3, deadline).await, Ok(()));
        let wait = |index| {
            let gate = std::sync::Arc::clone(&gate);
            crate::env::spawn(async move { gate.reached(index, deadline).await })
        };
        let (four, five, six) = (wait(4), wait(5), wait(6));
        tokio::task::yield_now().await;
        gate.reach(5);
        assert_eq!(four.await.unwrap(), Ok(()));
        assert_eq!(five.await.unwrap(), Ok(()));
        assert_eq!(six.await.unwrap(), Err(GateError::Timeout));
        assert!(gate.waiters.lock().by_index.is_empty(), "those who gave up are forgotten");
        let seven = wait(7);
        tokio::task::yield_now().await;
        gate.close();
        assert_ne!(seven.await.unwrap(), Ok(()));
        assert_eq!(gate.reached(8, Instant::now() + Duration::from_secs(1)).await, Err(GateError::Stopped));
    }
}
