//! Metrics and logs: every name and unit in one place.
//!
//! Names follow `meridian_<subsystem>_<what>_<unit>[_total]` in base units. Labels are few and bounded: never a key,
//! a client or a partition.

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{sync::OnceLock, time::Duration};

/// Time from a request's arrival to its answer. Labels: `method`, `code` (a reason, or `OK`).
pub const RPC_DURATION_SECONDS: &str = "meridian_rpc_duration_seconds";
/// Groups on this node by `state`: leader, follower, learner.
pub const RAFT_GROUPS: &str = "meridian_raft_groups";
/// Leaderships won by this node.
pub const RAFT_LEADER_CHANGES_TOTAL: &str = "meridian_raft_leader_changes_total";
/// Time from proposing an entry to its application on the leader. Rises when disks or followers are slow.
pub const RAFT_PROPOSE_TO_APPLY_SECONDS: &str = "meridian_raft_propose_to_apply_seconds";
/// Client writes per proposed entry.
pub const WRITE_BATCH_ITEMS: &str = "meridian_write_batch_items";
/// Reads served, by `consistency` and `role`.
pub const READ_SERVED_TOTAL: &str = "meridian_read_served_total";
/// Staleness stated to clients by BOUNDED reads.
pub const READ_STALENESS_SECONDS: &str = "meridian_read_staleness_seconds";
/// Rows returned by scans.
pub const SCAN_ROWS_RETURNED_TOTAL: &str = "meridian_scan_rows_returned_total";
/// Requests refused because a budget was used up, by `budget`: `node_writes`, `node_bytes`, `partition_writes`,
/// `partition_bytes`, `queue_time`, `deadline`, `memory`; `partition_queue` and `proposed_bytes` refuse deletes, too.
pub const ADMISSION_REJECTED_TOTAL: &str = "meridian_admission_rejected_total";
/// What is used of a budget, by `budget`: `node_writes`, `node_bytes`, `memory` (bytes).
pub const ADMISSION_USED: &str = "meridian_admission_used";
/// The limit of a budget, by `budget` as [`ADMISSION_USED`]; 0: none.
pub const ADMISSION_LIMIT: &str = "meridian_admission_limit";
/// Retried writes answered from a session instead of being applied again.
pub const DEDUPE_HITS_TOTAL: &str = "meridian_dedupe_hits_total";
/// Bytes of keys and values held by this node's replicas.
pub const MEM_BYTES: &str = "meridian_mem_bytes";
/// Rows held by this node's replicas.
pub const ROWS: &str = "meridian_rows";
/// Partitions without a known leader, as this node sees them.
pub const PARTITIONS_LEADERLESS: &str = "meridian_partitions_without_leader";
/// Partitions with fewer members than asked for, as this node sees them.
pub const PARTITIONS_UNDERREPLICATED: &str = "meridian_partitions_underreplicated";
/// Partitions with too few members in contact for a quorum, as this node sees them.
pub const PARTITIONS_WITHOUT_QUORUM: &str = "meridian_partitions_without_quorum";
/// Snapshots received from a leader and put in force: this node was too far behind for the log.
pub const RAFT_SNAPSHOTS_INSTALLED_TOTAL: &str = "meridian_raft_snapshots_installed_total";
/// Message of the log line that says the same of one replica: unlike the counter, the log outlives the process.
pub const SNAPSHOT_INSTALLED: &str = "a snapshot of the leader's is in force";
/// Entries that the furthest behind member of any group led here lacks.
pub const RAFT_LOG_LAG_ENTRIES: &str = "meridian_raft_log_lag_entries";
/// Constant 1; label `version`, with the commit where it is known.
pub const BUILD_INFO: &str = "meridian_build_info";

/// Buckets of every `_seconds` histogram.
const SECONDS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// Buckets of every `_items` histogram.
const ITEMS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Starts collecting metrics in this process; asked again it does nothing. Returns what renders them.
pub fn install_metrics() -> &'static PrometheusHandle {
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_items".to_owned()), ITEMS))
            .expect("the bucket lists are not empty")
            .build_recorder();
        let handle = recorder.handle();
        // Another recorder can be there only if the library runs inside a program with its own: then that one counts.
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed in this process; /metrics stays empty");
        }
        describe();
        gauge!(BUILD_INFO, "version" => env!("MERIDIAN_VERSION")).set(1.0);
        handle
    })
}

fn describe() {
    describe_histogram!(RPC_DURATION_SECONDS, "Time from a request's arrival to its answer.");
    describe_gauge!(RAFT_GROUPS, "Groups on this node by state.");
    describe_counter!(RAFT_LEADER_CHANGES_TOTAL, "Leaderships won by this node.");
    describe_counter!(RAFT_SNAPSHOTS_INSTALLED_TOTAL, "Snapshots received from a leader and put in force.");
    describe_histogram!(RAFT_PROPOSE_TO_APPLY_SECONDS, "Time from proposing an entry to its application.");
    describe_histogram!(WRITE_BATCH_ITEMS, "Client writes per proposed entry.");
    describe_counter!(READ_SERVED_TOTAL, "Reads served, by consistency and role.");
    describe_histogram!(READ_STALENESS_SECONDS, "Staleness stated to clients by BOUNDED reads.");
    describe_counter!(SCAN_ROWS_RETURNED_TOTAL, "Rows returned by scans.");
    describe_counter!(ADMISSION_REJECTED_TOTAL, "Requests refused because a budget was used up.");
    describe_gauge!(ADMISSION_USED, "What is used of a budget: writes not answered yet, their bytes, bytes held.");
    describe_gauge!(ADMISSION_LIMIT, "The limit of a budget; 0: none.");
    describe_counter!(DEDUPE_HITS_TOTAL, "Retried writes answered from a session.");
    describe_gauge!(MEM_BYTES, "Bytes of keys and values held by this node's replicas.");
    describe_gauge!(ROWS, "Rows held by this node's replicas.");
    describe_gauge!(PARTITIONS_LEADERLESS, "Partitions without a known leader.");
    describe_gauge!(PARTITIONS_UNDERREPLICATED, "Partitions with fewer members than asked for.");
    describe_gauge!(PARTITIONS_WITHOUT_QUORUM, "Partitions with too few members in contact for a quorum.");
    describe_gauge!(RAFT_LOG_LAG_ENTRIES, "Entries that the furthest behind member of any group led here lacks.");
    describe_gauge!(BUILD_INFO, "Constant 1, labelled with the version.");
}

/// Records requests that were answered together.
pub fn observe_rpcs(method: &'static str, code: &'static str, elapsed: Duration, count: usize) {
    histogram!(RPC_DURATION_SECONDS, "method" => method, "code" => code).record_many(elapsed.as_secs_f64(), count);
}

/// Records reads that were served together.
pub fn observe_reads(consistency: &'static str, role: &'static str, count: u64) {
    counter!(READ_SERVED_TOTAL, "consistency" => consistency, "role" => role).increment(count);
}

/// How logs are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

impl std::fmt::Display for LogFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Starts writing logs to stderr; asked again it does nothing. `filter` is in the syntax of `RUST_LOG`; one that is not
/// understood counts as `info`. openraft narrates every membership change at `info`: it is heard from `warn` on, unless
/// the filter names it.
pub fn install_logs(filter: &str, format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_new(format!("openraft=error,{filter}"))
        .unwrap_or_else(|_| "openraft=error,info".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second call finds a subscriber already set: the first one stays.
    let _already_set = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_render_with_their_names_and_units() {
        let handle = install_metrics();
        observe_rpcs("Get", "OK", Duration::from_micros(300), 1);
        observe_reads("linearizable", "leader", 1);
        let text = handle.render();
        assert!(
            text.contains("meridian_rpc_duration_seconds_bucket{method=\"Get\",code=\"OK\",le=\"0.0005\"} 1"),
            "{text}"
        );
        assert!(text.contains("meridian_read_served_total"), "{text}");
        assert!(text.contains("meridian_build_info"), "{text}");
    }
}
