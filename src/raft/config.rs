//! Settings of the groups of a node.

use openraft::{Config, SnapshotPolicy, StepDownPolicy};
use std::{ops::Range, time::Duration};

/// Entries of one append request; bytes are bounded by [`super::storage::APPEND_BYTES`].
const APPEND_ENTRIES: u64 = 512;

/// Messages that may wait for a replica's core.
const CORE_QUEUE: u64 = 4096;

/// Work that may wait for a replica's machine.
const MACHINE_QUEUE: u64 = 256;

/// Settings of the groups of a node. All nodes of a cluster should have the same times.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RaftConfig {
    /// How often a leader tells the others that it lives.
    pub heartbeat_ms: u64,
    /// How long a replica that hears nothing waits before it campaigns, drawn from this range after the leader's lease,
    /// which is its end. A dead leader is replaced after `end + start` to `2 × end`.
    pub election_ms: Range<u64>,
    /// A group that nobody asks anything sleeps after so long, and never if this is 0; see `super::sleep`.
    pub sleep_after_ms: u64,
    /// A snapshot is taken when the log has grown by this much since the last one, or by as much as the state takes,
    /// whichever is more; by this much alone when nothing is written any more.
    pub snapshot_bytes: u64,
    /// Entries kept after a snapshot for replicas that are a little behind. No more of them than this are in memory
    /// either, and at most a megabyte.
    pub log_keep_bytes: u64,
    /// Entries kept at most for replicas that are far behind; beyond, they get a snapshot.
    pub log_bytes_max: u64,
    /// Commands that may be proposed and not yet applied, per group.
    pub proposed_bytes_max: u64,
    /// Snapshots that a node takes at the same time.
    pub snapshots_at_a_time: usize,
    /// Bytes of snapshots that a node sends to others per second, all together.
    pub snapshot_bytes_per_s: u64,
}

impl Default for RaftConfig {
    fn default() -> Self {
        Self {
            heartbeat_ms: 150,
            election_ms: 600..900,
            sleep_after_ms: 5_000,
            snapshot_bytes: 16 << 20,
            log_keep_bytes: 4 << 20,
            log_bytes_max: 128 << 20,
            proposed_bytes_max: 64 << 20,
            snapshots_at_a_time: 2,
            snapshot_bytes_per_s: 64 << 20,
        }
    }
}

impl RaftConfig {
    /// How long a leader may lead after the last confirmation by a quorum.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.election_ms.end)
    }

    /// How long a leader that no quorum answers keeps quiet, before it tries again for as long. The others need their
    /// leases to end, which is `end` after its last message, then `end` to campaign, and time for the votes.
    pub(super) fn quiet_period(&self) -> Duration {
        Duration::from_millis(self.election_ms.end * 3)
    }

    /// How long an append request may take: a few heartbeats, so that a slow disk does not end a session.
    pub(super) fn append_deadline(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms * 4)
    }

    /// The same for openraft.
    ///
    /// # Errors
    /// When the times do not fit each other; says which.
    pub(super) fn openraft(&self, elect: bool) -> Result<Config, String> {
        let config = Config {
            heartbeat_interval: self.heartbeat_ms,
            heartbeat_min_interval: Some(self.heartbeat_ms),
            election_timeout_min: self.election_ms.start,
            election_timeout_max: self.election_ms.end,
            // A restarted leader must win a new term: what it had committed may be unknown to it.
            enable_leader_restore: Some(false),
            enable_pre_vote: Some(true),
            enable_elect: elect,
            // The livelock of an old leader that is heard and does not hear is ended by `super::quiet`.
            quorum_loss_probe_interval: None,
            removed_leader_step_down: StepDownPolicy::After(self.heartbeat_ms * 2),
            backoff: "50ms 100ms 200ms ...1s".to_owned(),
            // Both are decided by bytes, in `super::replica`.
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            purge_batch_size: 1,
            max_payload_entries: APPEND_ENTRIES,
            max_append_entries: Some(APPEND_ENTRIES),
            api_channel_size: Some(CORE_QUEUE),
            notification_channel_size: Some(CORE_QUEUE),
            state_machine_channel_size: Some(MACHINE_QUEUE),
            // Statistics that nobody reads; each stage would cost memory per group.
            log_stage_capacity: Some(1),
            ..Config::default()
        };
        config.validate().map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_do_not_fit_are_refused() {
        assert!(RaftConfig::default().openraft(true).is_ok());
        let hasty = RaftConfig { election_ms: 200..300, ..RaftConfig::default() };
        assert!(hasty.openraft(true).unwrap_err().contains("heartbeat"));
    }
}
