//! A plan: everything that shapes one run, as data. A seed makes a plan, and the run consumes only the plan, so that a
//! plan that found a bug goes on finding it however plans are made later, and parts of it can be taken away.
//!
//! Every part draws from its own stream of the seed, in the making and in the run: taking one fault away leaves the
//! others as they were.

use crate::{
    faults::{Fault, Target, Way},
    trace::fnv,
};
use meridian::{
    node::config::NodeConfig,
    proof::workload::{Settings, Workload},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Version of the form of plans.
pub(crate) const FORM: u32 = 1;

/// What nodes have by default: no silence of a run lasts as long.
pub(crate) fn usual_down_after_ms() -> u64 {
    NodeConfig::default().down_after_ms
}

fn is_within_a_run(down_after_ms: u64) -> bool {
    down_after_ms < usual_down_after_ms()
}

/// One run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// [`FORM`].
    pub(crate) form: u32,
    /// What the streams of the run begin with: frames, disks, nodes.
    pub(crate) seed: u64,
    /// Nodes that form the cluster.
    pub(crate) nodes: u64,
    pub(crate) replicas: u32,
    pub(crate) raft: Raft,
    pub(crate) links: Links,
    pub(crate) disks: Disks,
    /// Of node 1, 2, …; nodes without one are right.
    pub(crate) clocks: Vec<NodeClock>,
    /// Silence after which a node's replicas are built anew.
    #[serde(default = "usual_down_after_ms")]
    pub(crate) down_after_ms: u64,
    /// Whether partitions are cut and merged by their sizes.
    #[serde(default)]
    pub(crate) sizing: Option<Sizing>,
    pub(crate) workloads: Vec<Work>,
    /// Length of the part in which things fail.
    pub(crate) chaos_ms: u64,
    pub(crate) faults: Vec<Planned>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Raft {
    pub(crate) heartbeat_ms: u64,
    pub(crate) election_ms: (u64, u64),
    pub(crate) snapshot_bytes: u64,
    pub(crate) log_keep_bytes: u64,
    pub(crate) log_bytes_max: u64,
    /// Idle groups sleep after so long; 0: never.
    #[serde(default)]
    pub(crate) sleep_after_ms: u64,
}

/// When partitions are cut and merged by themselves.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sizing {
    pub(crate) split_bytes: u64,
    pub(crate) merge_after_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Links {
    pub(crate) delay_min_us: u64,
    pub(crate) delay_max_us: u64,
    pub(crate) loss: f64,
    pub(crate) duplicate: f64,
    pub(crate) reorder: f64,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Disks {
    pub(crate) min_us: u64,
    pub(crate) max_us: u64,
    pub(crate) slow_share: f64,
    pub(crate) slow_max_us: u64,
}

#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeClock {
    pub(crate) wall_off_ms: i64,
    pub(crate) rate_ppm: i64,
}

/// A workload, in a keyspace of its own.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Work {
    #[serde(with = "by_name")]
    pub(crate) workload: Workload,
    pub(crate) hashed: bool,
    pub(crate) partitions: u32,
    pub(crate) clients: u32,
    pub(crate) keys: u32,
    pub(crate) ops_per_key_max: u32,
    pub(crate) pause_ms: (u64, u64),
    pub(crate) deadline_ms: u64,
    pub(crate) page_rows: (u32, u32),
    /// Share of answers that clients throw away, to force repetitions.
    pub(crate) drop_replies: f64,
    /// Doors that are routers of their own, with maps of their own, besides one door per node.
    pub(crate) routers: u32,
    pub(crate) seed: u64,
}

impl Work {
    /// Name of its keyspace.
    pub(crate) fn keyspace(&self) -> &'static str {
        self.workload.name()
    }

    pub(crate) fn settings(&self) -> Settings {
        let ms = Duration::from_millis;
        Settings {
            clients: self.clients,
            keys: self.keys,
            ops_per_key_max: self.ops_per_key_max,
            pause: ms(self.pause_ms.0)..=ms(self.pause_ms.1),
            deadline: ms(self.deadline_ms),
            page_rows: self.page_rows.0..=self.page_rows.1,
            drop_replies: self.drop_replies,
            ..Settings::new(self.workload, self.keyspace(), self.seed)
        }
    }
}

/// A workload as the text of its name.
mod by_name {
    use super::Workload;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(workload: &Workload, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(workload.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Workload, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// One fault of the timeline.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Planned {
    pub(crate) at_ms: u64,
    pub(crate) for_ms: u64,
    /// What the fault itself draws from.
    pub(crate) seed: u64,
    #[serde(flatten)]
    pub(crate) fault: Fault,
}

/// A stream of randomness of its own.
pub(crate) fn stream(seed: u64, name: &str) -> StdRng {
    StdRng::seed_from_u64(fnv(fnv(0xcbf2_9ce4_8422_2325, &seed.to_le_bytes()), name.as_bytes()))
}

fn chance(rng: &mut StdRng, share: f64) -> bool {
    rng.random_bool(share)
}

impl Plan {
    /// The plan of a seed.
    pub(crate) fn of(seed: u64) -> Self {
        let mut shape = stream(seed, "shape");
        let nodes = [3, 3, 3, 4, 4, 5, 5, 6, 6, 7][shape.random_range(0..10)];
        let down_after_ms = down_after_ms(&mut stream(seed, "repair"));
        // Repair needs a node more than there are replicas.
        let (nodes, five) = if is_within_a_run(down_after_ms) { (nodes.max(4), 6) } else { (nodes, 5) };
        let replicas = if nodes >= five && chance(&mut shape, 0.3) { 5 } else { 3 };
        let chaos_ms = shape.random_range(8_000..18_000);
        let workloads = workloads(&mut stream(seed, "workloads"));
        Self {
            form: FORM,
            seed,
            nodes,
            replicas,
            raft: Raft {
                sleep_after_ms: sleep_after_ms(&mut stream(seed, "sleep")),
                ..raft(&mut stream(seed, "raft"))
            },
            links: links(&mut stream(seed, "links")),
            disks: disks(&mut stream(seed, "disks")),
            clocks: clocks(&mut stream(seed, "clocks"), nodes),
            down_after_ms,
            sizing: sizing(&mut stream(seed, "sizing"), &workloads),
            faults: timeline(seed, nodes, &workloads, chaos_ms, down_after_ms),
            workloads,
            chaos_ms,
        }
    }

    /// Whether nodes are taken for down within the run.
    pub(crate) fn repairs(&self) -> bool {
        is_within_a_run(self.down_after_ms)
    }

    /// As a file.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data") + "\n"
    }

    /// Reads a file.
    pub(crate) fn from_json(text: &str) -> Result<Self, String> {
        let plan: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if plan.form != FORM {
            return Err(format!("the plan has form {}, this binary runs form {FORM}", plan.form));
        }
        Ok(plan)
    }
}

fn raft(rng: &mut StdRng) -> Raft {
    let (heartbeat_ms, election_ms) =
        [(150, (600, 900)), (150, (600, 900)), (100, (400, 600)), (225, (900, 1_350))][rng.random_range(0..4)];
    let plain = Raft {
        heartbeat_ms,
        election_ms,
        snapshot_bytes: 16 << 20,
        log_keep_bytes: 4 << 20,
        log_bytes_max: 128 << 20,
        sleep_after_ms: 0,
    };
    match rng.random_range(0..3) {
        0 => plain,
        // Snapshots all the time.
        1 => Raft { snapshot_bytes: 2 << 10, log_keep_bytes: 512, log_bytes_max: 4 << 10, ..plain },
        // Snapshots now and then, and whoever was away for long gets one.
        _ => Raft { snapshot_bytes: 16 << 10, log_keep_bytes: 0, log_bytes_max: 24 << 10, ..plain },
    }
}

fn links(rng: &mut StdRng) -> Links {
    let delay_max_us = [1_000, 2_000, 2_000, 5_000, 15_000][rng.random_range(0..5)];
    let mut share = |often: f64, max: f64| if rng.random_bool(often) { rng.random_range(0.0..max) } else { 0.0 };
    let (loss, duplicate, reorder) = (share(0.3, 0.02), share(0.3, 0.05), share(0.3, 0.1));
    Links { delay_min_us: 100, delay_max_us, loss, duplicate, reorder }
}

fn disks(rng: &mut StdRng) -> Disks {
    let slow_max_us = [80_000, 80_000, 300_000][rng.random_range(0..3)];
    Disks { min_us: 300, max_us: [1_000, 3_000, 12_000][rng.random_range(0..3)], slow_share: 0.01, slow_max_us }
}

fn clocks(rng: &mut StdRng, nodes: u64) -> Vec<NodeClock> {
    let (wrong, drifting) = (chance(rng, 0.4), chance(rng, 0.4));
    let clock = |_| NodeClock {
        wall_off_ms: if wrong { rng.random_range(-600_000..600_000) } else { 0 },
        rate_ppm: if drifting { rng.random_range(-500..500) } else { 0 },
    };
    (1..=nodes).map(clock).collect()
}

/// In most plans groups sleep, in the pauses of their clients already or after a while.
fn sleep_after_ms(rng: &mut StdRng) -> u64 {
    [0, 50, 300, 1_000, 5_000][rng.random_range(0..5)]
}

/// In some plans partitions of some rows are cut, and merged again when they are idle. Not where a batch has to find all of
/// its rows in one partition.
fn sizing(rng: &mut StdRng, workloads: &[Work]) -> Option<Sizing> {
    let drawn = Sizing {
        split_bytes: [500, 1_000, 2_000][rng.random_range(0..3)],
        merge_after_ms: [500, 2_000, 8_000][rng.random_range(0..3)],
    };
    let bank = workloads.iter().any(|work| work.workload == Workload::Bank);
    (chance(rng, 0.3) && !bank).then_some(drawn)
}

/// In half of the plans the cluster repairs itself, also behind nodes that come back.
fn down_after_ms(rng: &mut StdRng) -> u64 {
    if chance(rng, 0.5) { rng.random_range(1_500..5_000) } else { usual_down_after_ms() }
}

fn workloads(rng: &mut StdRng) -> Vec<Work> {
    let mut all = Workload::ALL.to_vec();
    let count = rng.random_range(1..=3);
    let mut chosen = Vec::new();
    for _ in 0..count {
        let workload = all.remove(rng.random_range(0..all.len()));
        let usual = Settings::new(workload, "", 0);
        chosen.push(Work {
            workload,
            hashed: workload != Workload::Bank && rng.random_bool(0.4),
            partitions: rng.random_range(1..=4),
            clients: rng.random_range(3..=6),
            keys: rng.random_range(usual.keys.div_ceil(2)..=usual.keys),
            ops_per_key_max: usual.ops_per_key_max,
            pause_ms: [(2, 40), (10, 100), (50, 300)][rng.random_range(0..3)],
            deadline_ms: [500, 1_000, 3_000][rng.random_range(0..3)],
            page_rows: (1, rng.random_range(2..=30)),
            drop_replies: if rng.random_bool(0.5) { rng.random_range(0.0..0.2) } else { 0.0 },
            routers: rng.random_range(0..=2),
            seed: rng.random_range(0..1 << 48),
        });
    }
    chosen
}

/// After a node has been taken for down, its replicas are built anew within this time if nothing else is wrong.
const AWAY_MORE_MS: u64 = 3_000;

/// The faults of a run: a random subset of the kinds, each fault from a stream of its own.
fn timeline(seed: u64, nodes: u64, workloads: &[Work], chaos_ms: u64, down_after_ms: u64) -> Vec<Planned> {
    let mut swarm = stream(seed, "swarm");
    let share = swarm.random_range(0.15..0.6);
    let mut kinds: Vec<&str> = KINDS.iter().copied().filter(|_| swarm.random_bool(share)).collect();
    // A node is absent for longer than that.
    let away_ms = down_after_ms + AWAY_MORE_MS;
    kinds.retain(|kind| *kind != "absent" || away_ms + 1_000 < chaos_ms);
    if kinds.is_empty() {
        return Vec::new();
    }
    let tail_ms = if swarm.random_bool(0.4) { chaos_ms / 3 } else { 0 };
    let count = swarm.random_range(3..=12);
    let mut faults: Vec<Planned> = (0..count)
        .map(|n| {
            let mut rng = stream(seed, &format!("fault {n}"));
            let mut at_ms = rng.random_range(300..chaos_ms - tail_ms);
            let mut for_ms =
                if chance(&mut rng, 0.2) { rng.random_range(3_000..9_000) } else { rng.random_range(50..3_000) };
            let kind = kinds[rng.random_range(0..kinds.len())];
            let fault = fault(&mut rng, kind, nodes, workloads);
            if kind == "absent" {
                (at_ms, for_ms) = (at_ms.min(chaos_ms - away_ms), away_ms);
            }
            Planned { at_ms, for_ms, seed: rng.random_range(0..1 << 48), fault }
        })
        .collect();
    faults.sort_by_key(|planned| planned.at_ms);
    faults
}

/// Kinds of faults, as [`Fault::kind`] names them.
pub(crate) const KINDS: [&str; 28] = [
    "crash",
    "power-loss",
    "pause",
    "isolate",
    "split",
    "one-way",
    "ring",
    "bridge",
    "clog",
    "disconnect",
    "bad-links",
    "slow-disk",
    "stalled-disk",
    "sync-error",
    "disk-full",
    "bit-rot",
    "wall-clock",
    "clock-rate",
    "drain",
    "decommission",
    "lose",
    "absent",
    "transfer",
    "divide",
    "merge",
    "snapshot",
    "join",
    "keyspace",
];

fn target(rng: &mut StdRng, nodes: u64, workloads: &[Work]) -> Target {
    match rng.random_range(0..6) {
        0 => Target::DriverLeader,
        1 | 2 => {
            let (work, partition) = partition(rng, workloads);
            Target::Leader { work, partition }
        }
        _ => Target::Node(rng.random_range(1..=nodes)),
    }
}

fn partition(rng: &mut StdRng, workloads: &[Work]) -> (usize, u32) {
    let work = rng.random_range(0..workloads.len());
    (work, rng.random_range(0..workloads[work].partitions))
}

/// Some nodes, fewer than half.
fn minority(rng: &mut StdRng, nodes: u64) -> Vec<u64> {
    let mut all = shuffled(rng, nodes);
    all.truncate(rng.random_range(1..=((nodes - 1) / 2).max(1)) as usize);
    all.sort_unstable();
    all
}

fn shuffled(rng: &mut StdRng, nodes: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (1..=nodes).collect();
    for last in (1..all.len()).rev() {
        all.swap(last, rng.random_range(0..=last));
    }
    all
}

pub(crate) fn fault(rng: &mut StdRng, kind: &str, nodes: u64, workloads: &[Work]) -> Fault {
    let target = target(rng, nodes, workloads);
    match kind {
        "crash" => Fault::Crash { target, torn: chance(rng, 0.5) },
        "power-loss" => Fault::PowerLoss { torn: chance(rng, 0.7) },
        "pause" => Fault::Pause { target },
        "isolate" => Fault::Isolate { target, way: [Way::Both, Way::To, Way::From][rng.random_range(0..3)] },
        "split" => Fault::Split { side: minority(rng, nodes) },
        "one-way" => {
            let all = shuffled(rng, nodes);
            let at = rng.random_range(1..all.len());
            Fault::OneWay { from: all[..at].to_vec(), to: all[at..].to_vec() }
        }
        "ring" => Fault::Ring { order: shuffled(rng, nodes) },
        "bridge" => Fault::Bridge { over: rng.random_range(1..=nodes), side: minority(rng, nodes) },
        "clog" => Fault::Clog { order: shuffled(rng, nodes), free: shuffled(rng, nodes) },
        "disconnect" => Fault::Disconnect { target },
        "bad-links" => Fault::BadLinks(Links {
            delay_min_us: 100,
            delay_max_us: rng.random_range(1_000..80_000),
            loss: rng.random_range(0.0..0.3),
            duplicate: rng.random_range(0.0..0.3),
            reorder: rng.random_range(0.0..0.3),
        }),
        "slow-disk" => Fault::SlowDisk { target, sync_ms: rng.random_range(20..400) },
        "stalled-disk" => Fault::StalledDisk { target },
        "sync-error" => Fault::SyncError { target },
        "disk-full" => Fault::DiskFull { target },
        "bit-rot" => Fault::BitRot { target },
        "wall-clock" => Fault::WallClock { target, jump_ms: rng.random_range(-4_000_000..600_000) },
        "clock-rate" => Fault::ClockRate { target, ppm: rng.random_range(-100_000..100_000) },
        "drain" => Fault::Drain { target },
        "decommission" => Fault::Decommission { target },
        "lose" => Fault::Lose { target },
        "absent" => Fault::Absent { target },
        "transfer" => {
            let (work, partition) = partition(rng, workloads);
            Fault::Transfer { work, partition }
        }
        "divide" => {
            let (work, partition) = partition(rng, workloads);
            Fault::Divide { work, partition }
        }
        "merge" => {
            let (work, partition) = partition(rng, workloads);
            Fault::Merge { work, partition }
        }
        "snapshot" => Fault::Snapshot { target },
        "join" => Fault::Join,
        "keyspace" => Fault::Keyspace {
            name: format!("made{}", rng.random_range(0..1_000)),
            hashed: chance(rng, 0.5),
            partitions: rng.random_range(1..=3),
        },
        other => unreachable!("no such kind of fault: {other}"),
    }
}
