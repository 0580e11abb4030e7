//! How one node runs: read once at start, validated as a whole, then immutable.
//!
//! Invariants:
//! * every number carries its unit in its name;
//! * [`NodeConfig::validate`] reports every fault at once, each naming the setting as the user writes it;
//! * the defaults are valid, so that `meridian start` with no settings at all gives a usable node.

use super::admission::Budgets;
use crate::placement::{sizing::SPLIT_BYTES_DEFAULT, uniting::MERGE_AFTER_MS_DEFAULT};
use std::{collections::BTreeMap, fmt, net::SocketAddr, ops::Range, path::PathBuf};

/// First port of a node started without settings; away from the ports of well-known databases.
pub const PORT_DEFAULT: u16 = 7170;
/// The HTTP port lies this far above the gRPC port, so that many nodes of one machine can count up side by side.
pub const HTTP_PORT_OFFSET: u16 = 100;

/// Bounds that `validate` holds the settings to.
pub mod bounds {
    /// Longest key that may be configured: a key is copied into every page token and error.
    pub const KEY_BYTES_MAX: usize = 64 << 10;
    /// Longest value that may be configured: a row must fit a page, and a page a gRPC message.
    pub const VALUE_BYTES_MAX: usize = 2 << 20;
    /// Most items of one batch that may be configured: a batch is applied in one turn.
    pub const BATCH_ITEMS_MAX: usize = 100_000;
    /// Most bytes of one batch that may be configured: a batch is one log entry.
    pub const BATCH_BYTES_MAX: usize = 16 << 20;
    /// Shortest heartbeat: below it the heartbeats of a few hundred groups use up a core.
    pub const HEARTBEAT_MS_MIN: u64 = 10;
    /// Heartbeats that must fit into the shortest election timeout, so that one lost frame starts no election.
    pub const HEARTBEATS_PER_ELECTION_MIN: u64 = 3;
    /// Smallest log growth after which a snapshot is taken.
    pub const SNAPSHOT_BYTES_MIN: u64 = 4 << 10;
    /// What an item of a batch is counted for besides its key and value, at most.
    pub const ITEM_BYTES: u64 = 64;
    /// Least memory for rows and logs.
    pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
    /// Slowest sending of snapshots: below it a partition takes minutes to be moved.
    pub const SNAPSHOT_BYTES_PER_S_MIN: u64 = 1 << 20;
    /// Largest weight of a node: beyond it the ring would hold too many of its tokens.
    pub const WEIGHT_MAX: f64 = 100.0;
    /// Longest zone name.
    pub const ZONE_BYTES_MAX: usize = 64;
    /// Shortest silence after which a node's replicas are built anew: below it a pause would move data.
    pub const DOWN_AFTER_MS_MIN: u64 = 2_000;
    /// Least bytes from which on a partition is cut in two: below it the groups cost more than the rows.
    pub const SPLIT_BYTES_MIN: u64 = 64 << 10;
    /// Shortest idle time after which neighbours are merged: a few reports of loads.
    pub const MERGE_AFTER_MS_MIN: u64 = 5_000;
    /// Longest default deadline, an hour.
    pub const DEADLINE_MS_MAX: u32 = 3_600_000;
}

/// Where the log and the snapshots of a node live.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// In the data directory; a write is acknowledged after fsync.
    Disk,
    /// Nowhere: after a restart the node rejoins as an empty one.
    Memory,
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Memory => "memory",
        })
    }
}

pub use crate::telemetry::LogFormat;

/// Largest requests a node accepts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Longest key. Default 4 KiB: enough for any path or URL, small enough to be cheap in every index node.
    pub key_bytes_max: usize,
    /// Longest value. Default 1 MiB: a row travels in one log entry, and larger ones would delay the heartbeats behind it.
    pub value_bytes_max: usize,
    /// Most items of a batch. Default 1,000: a batch is applied in one turn and must not stall the group.
    pub batch_items_max: usize,
    /// Most bytes of a batch, keys and values. Default 2 MiB: half of the usual gRPC message limit.
    pub batch_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { key_bytes_max: 4 << 10, value_bytes_max: 1 << 20, batch_items_max: 1_000, batch_bytes_max: 2 << 20 }
    }
}

/// Timings of consensus. The same on every node of a cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RaftTimings {
    /// A leader's heartbeat period. Default 150 ms: finds a dead leader within a second at little idle cost.
    pub heartbeat_ms: u64,
    /// A follower campaigns after a silence drawn from this interval. Default 600..900 ms: four heartbeats may be lost.
    pub election_ms: Range<u64>,
    /// A group that nobody asks anything for so long sleeps: it sends no heartbeats and runs no timers until it is asked.
    /// Default 5 s; 0 lets no group sleep.
    pub sleep_after_ms: u64,
    /// Log bytes after which a partition is snapshotted and its log purged. Default 16 MiB: replayed in well under a
    /// second, yet rarely written.
    pub snapshot_bytes: u64,
    /// Log bytes kept of a partition when it is purged, for replicas that are a little behind. Default 4 MiB.
    pub log_keep_bytes: u64,
    /// Log bytes kept at most for replicas that are far behind; beyond, they get a snapshot. Default 128 MiB: a node that
    /// is restarted is brought up to date from the log.
    pub log_bytes_max: u64,
    /// Bytes of snapshots that this node sends to others per second, all together. Default 64 MiB: a partition is moved in
    /// about a second, and half of a gigabit network is left to clients.
    pub snapshot_bytes_per_s: u64,
}

impl Default for RaftTimings {
    fn default() -> Self {
        Self {
            heartbeat_ms: 150,
            election_ms: 600..900,
            sleep_after_ms: 5_000,
            snapshot_bytes: 16 << 20,
            log_keep_bytes: 4 << 20,
            log_bytes_max: 128 << 20,
            snapshot_bytes_per_s: 64 << 20,
        }
    }
}

/// How much a node lets in and holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BudgetSettings {
    /// Writes of clients that are let in and not answered yet; half of them of one partition. Default 65,536.
    pub writes_max: u64,
    /// Their bytes. Default a sixteenth of the machine's memory, between 64 MiB and 1 GiB: each of them is held about three
    /// times, as a request, in the log and on its way to the other replicas.
    pub bytes_max: Option<u64>,
    /// Bytes of rows (64 for each besides its key and value) and logs from which on only deletes are taken; 0: no limit.
    /// Default four fifths of the machine's memory, or of what its control group allows.
    pub memory_bytes_max: Option<u64>,
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self { writes_max: Budgets::default().writes_max, bytes_max: None, memory_bytes_max: None }
    }
}

impl BudgetSettings {
    /// The budgets on a machine with so much memory, if that is known.
    #[must_use]
    pub fn of(&self, machine_bytes: Option<u64>) -> Budgets {
        let scaled = machine_bytes.map(|bytes| (bytes / 16).clamp(64 << 20, 1 << 30));
        let most = machine_bytes.map(|bytes| bytes / 5 * 4);
        let usual = Budgets::default();
        Budgets {
            writes_max: self.writes_max,
            bytes_max: self.bytes_max.or(scaled).unwrap_or(usual.bytes_max),
            memory_bytes_max: self.memory_bytes_max.or(most).filter(|most| *most > 0),
        }
    }
}

/// How one node runs.
#[derive(Clone, PartialEq, Debug)]
pub struct NodeConfig {
    /// Directory of identity, log and snapshots; used by one process at a time. Default `meridian-data` in the working
    /// directory, so that a first try needs no rights.
    pub data: PathBuf,
    /// Address to listen on for clients and nodes (gRPC). Default loopback: there is no authentication, so a node is
    /// reachable from elsewhere only if somebody says so.
    pub listen: SocketAddr,
    /// `host:port` under which others reach this node; `None`: the address listened on.
    pub advertise: Option<String>,
    /// `host:port` of nodes to join. Empty: this node waits for `meridian init`, or for nodes that join it.
    pub join: Vec<String>,
    /// Addresses of other nodes that are connected to by way of another address: for proxies, as `meridian drill` puts
    /// between nodes to cut and delay what passes. Default none.
    pub dial: BTreeMap<String, String>,
    /// File by which `meridian drill` tells this node what to suffer, see [`crate::control`]. Default none.
    pub drill_control: Option<PathBuf>,
    /// Address of `/metrics`, `/livez` and `/readyz`. Default: the port of `listen` plus 100 on loopback.
    pub http: SocketAddr,
    /// Failure domain; replicas of a partition are spread over zones first. Default empty: one domain.
    pub zone: String,
    /// Share of the load compared with other nodes. Default 1.
    pub weight: f64,
    /// Disk or memory. Default disk: an acknowledged write must survive a power cut.
    pub storage: Storage,
    /// Deadline of requests that state none. Default 5,000 ms: longer than any election, shorter than patience.
    pub deadline_default_ms: u32,
    /// A node that the placement driver has not heard from for so long is down: its replicas are built anew on others.
    /// Default five minutes: longer than most restarts, as building them anew moves data. The same on every node.
    pub down_after_ms: u64,
    /// A partition that holds so many bytes of rows is cut in two. Default 64 MiB: little enough to be moved in seconds.
    /// The same on every node.
    pub split_bytes: u64,
    /// Neighbours that came of cuts and have been small and idle for so long are merged. Default an hour: what is asked for
    /// once a day is cut again seldom. The same on every node.
    pub merge_after_ms: u64,
    /// Largest requests accepted.
    pub limits: Limits,
    /// How much is let in and held.
    pub budgets: BudgetSettings,
    /// Timings of consensus.
    pub raft: RaftTimings,
    /// Form of log lines. Default text.
    pub log_format: LogFormat,
    /// Filter of log lines, as `tracing` directives, e.g. `info` or `warn,meridian::raft=info`. Default `info`.
    pub log_level: String,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            data: PathBuf::from("meridian-data"),
            listen: SocketAddr::from(([127, 0, 0, 1], PORT_DEFAULT)),
            advertise: None,
            join: Vec::new(),
            dial: BTreeMap::new(),
            drill_control: None,
            http: SocketAddr::from(([127, 0, 0, 1], PORT_DEFAULT + HTTP_PORT_OFFSET)),
            zone: String::new(),
            weight: 1.0,
            storage: Storage::Disk,
            deadline_default_ms: 5_000,
            down_after_ms: 300_000,
            split_bytes: SPLIT_BYTES_DEFAULT,
            merge_after_ms: MERGE_AFTER_MS_DEFAULT,
            limits: Limits::default(),
            budgets: BudgetSettings::default(),
            raft: RaftTimings::default(),
            log_format: LogFormat::Text,
            log_level: "info".to_owned(),
        }
    }
}

/// One thing that is wrong with a configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The setting, as in the configuration file, e.g. `limits.key_bytes_max`.
    pub setting: String,
    /// What is wrong with it, with the value and the limit.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.message)
    }
}

impl NodeConfig {
    /// `host:port` that other nodes and clients are told.
    #[must_use]
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }

    /// Checks the settings by themselves and against each other.
    ///
    /// # Errors
    /// Every fault found, in the order of the settings.
    pub fn validate(&self) -> Result<(), Vec<Fault>> {
        let mut faults = Faults::default();
        self.check_addresses(&mut faults);
        faults.check("zone", self.zone.len() <= bounds::ZONE_BYTES_MAX, || {
            format!("{} bytes long, at most {}", self.zone.len(), bounds::ZONE_BYTES_MAX)
        });
        faults.check("weight", self.weight > 0.0 && self.weight <= bounds::WEIGHT_MAX, || {
            format!("{} is not above 0 and at most {}", self.weight, bounds::WEIGHT_MAX)
        });
        let deadline = self.deadline_default_ms;
        faults.check("deadline_default_ms", (1..=bounds::DEADLINE_MS_MAX).contains(&deadline), || {
            format!("{deadline} is not between 1 and {}", bounds::DEADLINE_MS_MAX)
        });
        let least = bounds::DOWN_AFTER_MS_MIN;
        faults
            .check("down_after_ms", self.down_after_ms >= least, || format!("{} is below {least}", self.down_after_ms));
        let least = bounds::SPLIT_BYTES_MIN;
        faults.check("split_bytes", self.split_bytes >= least, || format!("{} is below {least}", self.split_bytes));
        let least = bounds::MERGE_AFTER_MS_MIN;
        faults.check("merge_after_ms", self.merge_after_ms >= least, || {
            format!("{} is below {least}", self.merge_after_ms)
        });
        self.check_limits(&mut faults);
        self.check_budgets(&mut faults);
        self.check_raft(&mut faults);
        let level = self.log_level.parse::<tracing_subscriber::EnvFilter>();
        faults.check("log.level", level.is_ok() && !self.log_level.is_empty(), || {
            format!("{:?} is not a filter such as \"info\" or \"warn,meridian::raft=info\"", self.log_level)
        });
        if faults.0.is_empty() { Ok(()) } else { Err(faults.0) }
    }

    fn check_addresses(&self, faults: &mut Faults) {
        faults.check("data", !self.data.as_os_str().is_empty(), || "is empty; name a directory".to_owned());
        let unreachable = self.advertise.is_none() && self.listen.ip().is_unspecified();
        faults.check("advertise", !unreachable, || {
            format!("must be set when listening on every address ({}): others need one to connect to", self.listen)
        });
        if let Some(advertise) = &self.advertise {
            faults.check("advertise", is_host_port(advertise), || format!("{advertise:?} is not host:port"));
        }
        for address in &self.join {
            faults.check("join", is_host_port(address), || format!("{address:?} is not host:port"));
        }
        for address in self.dial.iter().flat_map(|(to, via)| [to, via]) {
            faults.check("dial", is_host_port(address), || format!("{address:?} is not host:port"));
        }
        let same = self.listen.port() != 0 && self.http == self.listen;
        faults.check("http", !same, || format!("{} is the address of `listen` too", self.http));
    }

    fn check_limits(&self, faults: &mut Faults) {
        let limits = &self.limits;
        let sizes = [
            ("limits.key_bytes_max", limits.key_bytes_max, bounds::KEY_BYTES_MAX),
            ("limits.value_bytes_max", limits.value_bytes_max, bounds::VALUE_BYTES_MAX),
            ("limits.batch_items_max", limits.batch_items_max, bounds::BATCH_ITEMS_MAX),
            ("limits.batch_bytes_max", limits.batch_bytes_max, bounds::BATCH_BYTES_MAX),
        ];
        for (name, value, max) in sizes {
            faults.check(name, (1..=max).contains(&value), || format!("{value} is not between 1 and {max}"));
        }
        faults.check("limits.key_bytes_max", limits.key_bytes_max >= 8, || {
            format!("{} is below 8, the length of an integer key", limits.key_bytes_max)
        });
        let row = limits.key_bytes_max.saturating_add(limits.value_bytes_max);
        faults.check("limits.batch_bytes_max", limits.batch_bytes_max >= row, || {
            format!("{} is less than one row of the largest size ({row} bytes)", limits.batch_bytes_max)
        });
    }

    fn check_budgets(&self, faults: &mut Faults) {
        let BudgetSettings { writes_max, bytes_max, memory_bytes_max } = self.budgets;
        faults.check("admission.writes_max", writes_max >= 2, || format!("{writes_max} is below 2"));
        // A partition has half of it, and must be able to take the largest batch.
        let least = 2 * (self.limits.batch_bytes_max as u64 + self.limits.batch_items_max as u64 * bounds::ITEM_BYTES);
        faults.check("admission.bytes_max", bytes_max.is_none_or(|bytes| bytes >= least), || {
            format!("{} is below {least}, twice the largest batch with its items", bytes_max.unwrap_or(0))
        });
        let least = bounds::MEMORY_BYTES_MIN;
        faults.check("memory.bytes_max", memory_bytes_max.is_none_or(|bytes| bytes == 0 || bytes >= least), || {
            format!("{} is below {least}; 0 is no limit", memory_bytes_max.unwrap_or(0))
        });
    }

    fn check_raft(&self, faults: &mut Faults) {
        let RaftTimings {
            heartbeat_ms,
            election_ms,
            sleep_after_ms: _,
            snapshot_bytes,
            log_keep_bytes,
            log_bytes_max,
            snapshot_bytes_per_s,
        } = &self.raft;
        faults.check("raft.heartbeat_ms", *heartbeat_ms >= bounds::HEARTBEAT_MS_MIN, || {
            format!("{heartbeat_ms} is below {}", bounds::HEARTBEAT_MS_MIN)
        });
        let least = heartbeat_ms.saturating_mul(bounds::HEARTBEATS_PER_ELECTION_MIN);
        faults.check("raft.election_min_ms", election_ms.start >= least, || {
            let times = bounds::HEARTBEATS_PER_ELECTION_MIN;
            format!("{} must be at least {times} × raft.heartbeat_ms ({heartbeat_ms})", election_ms.start)
        });
        faults.check("raft.election_max_ms", election_ms.end > election_ms.start, || {
            format!("{} must be above raft.election_min_ms ({})", election_ms.end, election_ms.start)
        });
        faults.check("raft.snapshot_bytes", *snapshot_bytes >= bounds::SNAPSHOT_BYTES_MIN, || {
            format!("{snapshot_bytes} is below {}", bounds::SNAPSHOT_BYTES_MIN)
        });
        faults.check("raft.log_bytes_max", log_bytes_max >= log_keep_bytes, || {
            format!("{log_bytes_max} must be at least raft.log_keep_bytes ({log_keep_bytes})")
        });
        let least = bounds::SNAPSHOT_BYTES_PER_S_MIN;
        faults.check("raft.snapshot_bytes_per_s", *snapshot_bytes_per_s >= least, || {
            format!("{snapshot_bytes_per_s} is below {least}")
        });
    }
}

/// What was found wrong so far.
#[derive(Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn check(&mut self, setting: &str, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.0.push(Fault { setting: setting.to_owned(), message: message() });
        }
    }
}

/// Whether `text` looks like `host:port` with a port above 0; `[v6]:port` included.
#[must_use]
pub fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_ok = match host.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']').is_some_and(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
    };
    host_ok && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(NodeConfig::default().validate(), Ok(()));
    }

    #[test]
    fn every_fault_is_reported_at_once() {
        let config = NodeConfig {
            listen: "0.0.0.0:7170".parse().unwrap(),
            join: vec!["nowhere".into(), "n1:7170".into()],
            weight: f64::NAN,
            deadline_default_ms: 0,
            down_after_ms: 100,
            split_bytes: 1,
            limits: Limits { key_bytes_max: 4, batch_bytes_max: 10, ..Limits::default() },
            budgets: BudgetSettings { writes_max: 1, bytes_max: Some(5), memory_bytes_max: Some(7) },
            raft: RaftTimings {
                heartbeat_ms: 200,
                election_ms: Range { start: 500, end: 400 },
                ..RaftTimings::default()
            },
            log_level: "meridian=loud".into(),
            ..NodeConfig::default()
        };
        let faults = config.validate().unwrap_err();
        let settings: Vec<_> = faults.iter().map(|fault| fault.setting.as_str()).collect();
        let expected = [
            "advertise",
            "join",
            "weight",
            "deadline_default_ms",
            "down_after_ms",
            "split_bytes",
            "limits.key_bytes_max",
            "limits.batch_bytes_max",
            "admission.writes_max",
            "admission.bytes_max",
            "memory.bytes_max",
            "raft.election_min_ms",
            "raft.election_max_ms",
            "log.level",
        ];
        assert_eq!(settings, expected);
        let election = &faults[11];
        assert_eq!(election.to_string(), "raft.election_min_ms: 500 must be at least 3 × raft.heartbeat_ms (200)");
    }

    #[test]
    fn budgets_follow_the_machine_unless_they_are_set() {
        let usual = BudgetSettings::default();
        let of = |machine| (usual.of(machine).bytes_max, usual.of(machine).memory_bytes_max);
        assert_eq!(of(None), (256 << 20, None));
        assert_eq!(of(Some(500 << 20)), (64 << 20, Some(400 << 20)));
        assert_eq!(of(Some(64 << 30)).0, 1 << 30);
        let set = BudgetSettings { bytes_max: Some(8 << 20), memory_bytes_max: Some(0), ..usual };
        let want = Budgets { bytes_max: 8 << 20, memory_bytes_max: None, ..Budgets::default() };
        assert_eq!(set.of(Some(1 << 30)), want);
    }

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["n1:1", "10.0.0.1:7170", "[::1]:7170", "a-b.c_d:65535"] {
            assert!(is_host_port(good), "{good}");
        }
        for bad in ["", "n1", "n1:", ":7170", "n1:0", "n1:65536", "::1:7170", "[::1:7170", "a b:1", "http://n1:7170"] {
            assert!(!is_host_port(bad), "{bad}");
        }
    }
}
