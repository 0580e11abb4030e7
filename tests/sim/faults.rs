//! What can go wrong in a run, as data.

use crate::plan::Links;
use serde::{Deserialize, Serialize};

/// Whom a fault hits; who leads is found out when it does.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    Node(u64),
    /// The leader of a partition of a workload's keyspace.
    Leader {
        work: usize,
        partition: u32,
    },
    DriverLeader,
}

/// Which frames of a node are lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    Both,
    To,
    From,
}

/// A fault.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Fault {
    /// Loses power: all that was not synced, or a part of it, torn anywhere.
    Crash { target: Target, torn: bool },
    /// All nodes at once.
    PowerLoss { torn: bool },
    /// Does nothing for a while, and does not know.
    Pause { target: Target },
    /// One node and all others.
    Isolate { target: Target, way: Way },
    /// Two sides that do not hear each other.
    Split { side: Vec<u64> },
    /// Frames of these do not reach those.
    OneWay { from: Vec<u64>, to: Vec<u64> },
    /// Each node only hears its two neighbours.
    Ring { order: Vec<u64> },
    /// Two sides that do not hear each other, but for one node that hears both.
    Bridge { over: u64, side: Vec<u64> },
    /// Nodes are cut off one after the other in one order, and freed in another.
    Clog { order: Vec<u64>, free: Vec<u64> },
    /// Every connection of a node breaks.
    Disconnect { target: Target },
    /// Every link is bad.
    BadLinks(Links),
    /// Syncs take this long.
    SlowDisk { target: Target, sync_ms: u64 },
    /// Syncs do not end.
    StalledDisk { target: Target },
    /// A sync fails, and the node ends, as the process does.
    SyncError { target: Target },
    /// Nothing more can be written, and the node ends.
    DiskFull { target: Target },
    /// A bit of what is stored flips while the node is down. It must refuse to start, and stays down.
    BitRot { target: Target },
    /// The wall clock jumps.
    WallClock { target: Target, jump_ms: i64 },
    /// The clocks go wrong by so many millionths.
    ClockRate { target: Target, ppm: i64 },
    /// A node hands over what it leads and gets nothing new, until the time is over.
    Drain { target: Target },
    /// A node is asked to leave for good.
    Decommission { target: Target },
    /// A node dies with its disk and never comes back.
    Lose { target: Target },
    /// A node is away for longer than it takes to build its replicas anew, and comes back with its disk.
    Absent { target: Target },
    /// Leadership of a partition is handed on.
    Transfer { work: usize, partition: u32 },
    /// A partition is cut in its middle.
    Divide { work: usize, partition: u32 },
    /// A partition and the one after it become one.
    Merge { work: usize, partition: u32 },
    /// A node takes snapshots of all it holds.
    Snapshot { target: Target },
    /// One more node.
    Join,
    /// One more keyspace, which is dropped when the time is over.
    Keyspace { name: String, hashed: bool, partitions: u32 },
}

impl Fault {
    /// Its name in plans and reports.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Crash { .. } => "crash",
            Self::PowerLoss { .. } => "power-loss",
            Self::Pause { .. } => "pause",
            Self::Isolate { .. } => "isolate",
            Self::Split { .. } => "split",
            Self::OneWay { .. } => "one-way",
            Self::Ring { .. } => "ring",
            Self::Bridge { .. } => "bridge",
            Self::Clog { .. } => "clog",
            Self::Disconnect { .. } => "disconnect",
            Self::BadLinks(_) => "bad-links",
            Self::SlowDisk { .. } => "slow-disk",
            Self::StalledDisk { .. } => "stalled-disk",
            Self::SyncError { .. } => "sync-error",
            Self::DiskFull { .. } => "disk-full",
            Self::BitRot { .. } => "bit-rot",
            Self::WallClock { .. } => "wall-clock",
            Self::ClockRate { .. } => "clock-rate",
            Self::Drain { .. } => "drain",
            Self::Decommission { .. } => "decommission",
            Self::Lose { .. } => "lose",
            Self::Absent { .. } => "absent",
            Self::Transfer { .. } => "transfer",
            Self::Divide { .. } => "divide",
            Self::Merge { .. } => "merge",
            Self::Snapshot { .. } => "snapshot",
            Self::Join => "join",
            Self::Keyspace { .. } => "keyspace",
        }
    }
}
