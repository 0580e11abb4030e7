//! When a leader that no quorum answers keeps quiet, so that the others can elect.
//!
//! A leader that is heard and hears nothing would lead for ever: every message of it tells the others to wait. Here all
//! of them pause: heartbeats, and entries that nobody has acknowledged. (openraft can pause its heartbeats by itself, and
//! only them; it would also keep a leader that has slept from asking for its quorum.)
//!
//! Invariant: pauses are turns of [`Quiet::period`], from the end of the lease on, silent ones first.

use super::{
    types::Types,
    watch::{Receiver, Ref},
};
use openraft::RaftMetrics;
use parking_lot::Mutex;
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::time::Instant;

/// What one replica's messages go by. Clones share it.
#[derive(Clone)]
pub(super) struct Quiet {
    lease: Duration,
    period: Duration,
    /// Set once openraft runs.
    metrics: Arc<OnceLock<Receiver<RaftMetrics<Types>>>>,
    /// When the replica last woke: before, nobody was to answer.
    woke: Arc<Mutex<Option<Instant>>>,
}

impl Quiet {
    pub(super) fn new(lease: Duration, period: Duration) -> Self {
        Self { lease, period, metrics: Arc::default(), woke: Arc::default() }
    }

    /// Takes openraft's view of the group.
    pub(super) fn watch(&self, metrics: Receiver<RaftMetrics<Types>>) {
        assert!(self.metrics.set(metrics).is_ok(), "a replica is built once");
    }

    /// Counts silence from now on: the replica has slept.
    pub(super) fn restart(&self) {
        *self.woke.lock() = Some(Instant::now());
    }

    /// Whether a message that is sent because this replica leads should wait. `since` is when it began to send: nobody
    /// can have answered before.
    pub(super) fn is_due(&self, since: Instant) -> bool {
        let Some(metrics) = self.metrics.get() else { return false };
        let metrics: Ref<'_, RaftMetrics<Types>> = metrics.borrow();
        if metrics.membership_config.membership().voter_ids().nth(1).is_none() {
            return false; // A quorum by itself.
        }
        let acked = metrics.last_quorum_acked.map(|at| openraft::Instant::elapsed(&at.into_inner()));
        drop(metrics);
        let silence = (*self.woke.lock()).map_or(since, |woke| woke.max(since)).elapsed();
        is_silent_turn(acked.map_or(silence, |acked| acked.min(silence)), self.lease, self.period)
    }
}

/// Whether the time since a quorum last answered falls into a silent turn.
fn is_silent_turn(silence: Duration, lease: Duration, period: Duration) -> bool {
    silence.checked_sub(lease).is_some_and(|over| (over.as_nanos() / period.as_nanos()).is_multiple_of(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_begin_with_a_silent_one_when_the_lease_is_over() {
        let silent =
            |ms| is_silent_turn(Duration::from_millis(ms), Duration::from_millis(900), Duration::from_millis(2_000));
        let turns = [0, 899, 900, 2_899, 2_900, 4_899, 4_900].map(silent);
        assert_eq!(turns, [false, false, true, true, false, false, true]);
    }
}
