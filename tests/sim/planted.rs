//! Every bug of [`meridian::plant`] is noticed: who finds nothing has looked.
//!
//! A bug is planted, and seeds are run with what provokes it ([`provoked`]) until a promise is seen broken that the bug
//! is known to break, at most [`Provoked::seeds_max`] of them. The same plan must pass without the bug: nothing else
//! may be what was noticed.
//!
//! `cargo test --features planted --test sim -- planted` runs one test per bug and prints a table. With `SIM_PLANTED=30`
//! it runs 30 seeds of each bug and prints in how many it was noticed: what `seeds_max` is to be chosen by.

use crate::{
    faults::{Fault, Target, Way},
    plan::{Disks, Links, NodeClock, Plan, Planned, Raft, Work, fault, stream},
    run::run,
    verdict::signature,
};
use Workload::{Bank, Counter, Levels, Register, Rows};
use libtest_mimic::{Failed, Trial};
use meridian::{
    plant::{self, Bug},
    proof::workload::{Settings, Workload},
};
use rand::{RngExt as _, rngs::StdRng};
use std::{collections::BTreeMap, sync::OnceLock};

/// Nodes of a cluster, all with a replica of everything.
const NODES: u64 = 3;
/// Length of the part in which things fail.
const CHAOS_MS: u64 = 10_000;
/// Faults of a run.
const FAULTS: usize = 8;

/// What makes a bug show.
struct Provoked {
    /// It is noticed within so many seeds.
    seeds_max: u64,
    workloads: &'static [Workload],
    /// Kinds of faults; none: nothing fails.
    faults: &'static [&'static str],
    /// What else the plan needs.
    shape: fn(&mut Plan),
    /// Kinds of failures by which it is noticed, or how they begin. Others do not count.
    by: &'static [&'static str],
}

/// How a bug was noticed.
struct Noticed {
    seeds: u64,
    kinds: Vec<String>,
    /// How often the bug took effect in that run.
    reached: u64,
}

const STALE: &[&str] = &["stale-read", "not-linearizable"];
const LEVELS: &[&str] = &["stale-beyond-bound", "stale-read", "session-went-back", "not-linearizable"];
const TWICE: &[&str] = &["applied-twice", "not-linearizable"];
const LOST: &[&str] = &["lost-", "stale-", "not-linearizable", "missing-row", "logs-differ", "replicas-differ"];
const APART: &[&str] =
    &["replicas-differ", "panic: replicas of", "lost-", "stale-", "not-linearizable", "applied-twice"];
/// An assertion of openraft's, which sees a replica break its word.
const REVERSION: &str = "panic: follower log reversion";

const CUTS: &[&str] = &["isolate", "isolate", "split", "pause", "one-way"];
const DEATHS: &[&str] = &["crash", "power-loss"];

fn provoked(bug: Bug) -> Provoked {
    let new = |seeds_max, workloads, faults, shape, by| Provoked { seeds_max, workloads, faults, shape, by };
    let nothing: fn(&mut Plan) = |_| {};
    match bug {
        Bug::AckBeforeFsync => new(5, &[Register, Counter], &["power-loss"], slow_disks, LOST),
        Bug::VoteNotPersisted => {
            new(5, &[Register], DEATHS, nothing, &["two-leaders", "logs-differ", "lost-", "panic: vote <"])
        }
        Bug::FsyncErrorIgnored => new(
            15,
            &[Register, Counter],
            &["sync-error", "sync-error", "crash"],
            no_snapshots,
            &["lost-", "stale-", "not-linearizable", "logs-differ", REVERSION],
        ),
        Bug::DamageTakenForTornTail => {
            new(5, &[Register], &["bit-rot"], no_snapshots, &["panic: assertion", REVERSION, "lost-"])
        }
        Bug::RestartAppliesUncommitted => new(
            20,
            &[Register, Counter],
            &["crash", "crash", "isolate", "power-loss"],
            no_snapshots,
            &[
                "replicas-differ",
                "phantom-",
                "aborted-",
                "not-linearizable",
                "logs-differ",
                "panic: assertion failed: Some(log_id",
            ],
        ),
        Bug::PurgeBeyondSnapshot => new(5, &[Register], DEATHS, snapshots_all_the_time, &["liveness: "]),
        Bug::MapNotKept => new(5, &[Register], &["crash", "keyspace", "power-loss"], nothing, &["liveness: "]),
        Bug::TimeoutCountsAsAck => new(
            5,
            &[Register],
            &["isolate", "split"],
            isolated_leaders,
            &["lost-", "stale-", "not-linearizable", "logs-differ", REVERSION],
        ),
        Bug::ReadIndexUnconfirmed => new(20, &[Register], CUTS, isolated_leaders, STALE),
        Bug::ReadJoinsRoundUnderWay => new(20, &[Levels], &[], very_slow_links, LEVELS),
        Bug::ReadBeforeApplied => new(10, &[Levels], &[], lossy_links, LEVELS),
        Bug::SleepsOnAlone => new(10, &[Register], &["lose"], sleepy, &["liveness: "]),
        Bug::LeaseNeverExpires => new(20, &[Register], CUTS, isolated_leaders, STALE),
        Bug::LinearizableWeakened => new(10, &[Register], CUTS, isolated_leaders, STALE),
        Bug::FreshWithoutProof => new(10, &[Levels], CUTS, nothing, LEVELS),
        Bug::FreshNotedLate => new(20, &[Levels], &[], very_slow_links, LEVELS),
        Bug::StalenessClaimedZero => new(20, &[Levels], &[], very_slow_links, LEVELS),
        Bug::SessionTokenIgnored => new(10, &[Levels], CUTS, nothing, &["session-went-back"]),
        Bug::WriteTokenEarly => new(20, &[Levels], &[], slow_links, &["session-went-back"]),
        Bug::DedupeDisabled => new(5, &[Counter], &[], lost_answers, TWICE),
        Bug::RetryJudgedAgain => {
            new(5, &[Register], &[], lost_answers, &["aborted-read", "not-linearizable", "phantom-"])
        }
        Bug::LateDuplicateApplied => new(
            25,
            &[Counter, Register],
            &["clog", "pause", "bad-links"],
            lost_answers,
            &["applied-twice", "not-linearizable", "stale-", "lost-", "version"],
        ),
        Bug::RetryRenumbered => new(5, &[Counter], &["bad-links", "one-way", "crash", "transfer"], lost_answers, TWICE),
        Bug::UnknownToldAsNotApplied => new(
            10,
            &[Register, Counter],
            &["one-way", "crash", "bad-links", "isolate"],
            impatient,
            &["aborted-", "applied-twice", "not-linearizable"],
        ),
        Bug::ConditionIgnored => new(5, &[Register], &[], nothing, &["not-linearizable", "lost-write", "stale-read"]),
        Bug::BatchHalfApplied => new(5, &[Bank], &[], nothing, &["broken-sum"]),
        Bug::FullBatchLosesEntry => new(5, &[Register, Counter], DEATHS, no_snapshots, APART),
        Bug::VersionsGoBack => new(5, &[Register], &["isolate", "transfer", "transfer"], wrong_clocks, &["version"]),
        Bug::SnapshotWithoutSessions => new(5, &[Counter], DEATHS, snapshots_all_the_time, APART),
        Bug::SnapshotWithoutLastRow => new(5, &[Register], DEATHS, snapshots_all_the_time, APART),
        Bug::SnapshotAhead => new(5, &[Counter], DEATHS, snapshots_all_the_time, APART),
        Bug::ChecksumIgnored => new(
            40,
            &[Register, Rows],
            &["bit-rot"],
            rotten_snapshots,
            &["replicas-differ", "phantom-", "not-linearizable", "lost-", "logs-differ"],
        ),
        Bug::PageSkipsRow => new(15, &[Rows], &[], nothing, &["missing-row"]),
        Bug::PageRepeatsRow => new(5, &[Rows], &[], nothing, &["duplicate-row", "out-of-order"]),
        Bug::ReverseSkipsFirst => new(5, &[Rows], &[], nothing, &["missing-row"]),
        Bug::ScanSkipsSilently => new(10, &[Rows], CUTS, impatient, &["missing-row"]),
        Bug::BoundsIgnoredAtRead => new(
            10,
            &[Register],
            &["divide", "divide", "clog"],
            routers_of_their_own,
            &["lost-", "stale-", "not-linearizable"],
        ),
        Bug::PageBeyondBounds => new(10, &[Rows], &["divide"], routers_of_their_own, &["missing-row"]),
        Bug::ChildWithoutSessions => new(10, &[Counter], &["divide"], lost_frames, TWICE),
        Bug::SealIgnoredAtRead => {
            new(10, &[Register], &[], merged_unheard, &["lost-write", "stale-read", "resurrected", "not-linearizable"])
        }
        Bug::ReplacedReplicaKept => new(10, &[Register], &["absent"], repairs, &["liveness: "]),
        Bug::ScanOutOfOrder => new(20, &[Rows], &[], nothing, &["out-of-order", "duplicate-row", "missing-row"]),
    }
}

/// Much waits for a sync at any moment.
fn slow_disks(plan: &mut Plan) {
    plan.disks = Disks { min_us: 20_000, max_us: 80_000, ..plan.disks };
}

/// What is under way is under way for long.
fn slow_links(plan: &mut Plan) {
    plan.links = Links { delay_min_us: 5_000, delay_max_us: 40_000, loss: 0.0, duplicate: 0.0, reorder: 0.0 };
}

/// The same, with so many clients that each read meets others, and for longer.
fn very_slow_links(plan: &mut Plan) {
    plan.links = Links { delay_min_us: 10_000, delay_max_us: 120_000, loss: 0.0, duplicate: 0.0, reorder: 0.0 };
    plan.raft = Raft { heartbeat_ms: 225, election_ms: (900, 1_350), ..plan.raft.clone() };
    plan.chaos_ms = 3 * CHAOS_MS;
    for work in &mut plan.workloads {
        *work = Work {
            partitions: 1,
            clients: 16,
            keys: 6,
            ops_per_key_max: 150,
            pause_ms: (1, 20),
            deadline_ms: 3_000,
            ..work.clone()
        };
    }
}

/// Followers lack entries and do not know what is committed, while answers of the leader reach them.
fn lossy_links(plan: &mut Plan) {
    plan.links = Links { delay_min_us: 1_000, delay_max_us: 10_000, loss: 0.15, duplicate: 0.0, reorder: 0.3 };
    plan.raft = Raft { heartbeat_ms: 225, election_ms: (1_350, 2_000), ..plan.raft.clone() };
    for work in &mut plan.workloads {
        *work = Work { partitions: 1, keys: 6, ops_per_key_max: 150, deadline_ms: 3_000, ..work.clone() };
    }
}

fn snapshots_all_the_time(plan: &mut Plan) {
    plan.raft = Raft { snapshot_bytes: 2 << 10, log_keep_bytes: 512, log_bytes_max: 4 << 10, ..plan.raft.clone() };
}

/// The same, and what rots is a snapshot.
fn rotten_snapshots(plan: &mut Plan) {
    snapshots_all_the_time(plan);
    plan.faults.iter_mut().for_each(|planned| planned.seed |= 1);
}

/// Everything is in the log.
fn no_snapshots(plan: &mut Plan) {
    plan.raft =
        Raft { snapshot_bytes: 16 << 20, log_keep_bytes: 4 << 20, log_bytes_max: 128 << 20, ..plan.raft.clone() };
}

/// Whoever leads is cut off, again and again, and still asked.
fn isolated_leaders(plan: &mut Plan) {
    for (n, planned) in plan.faults.iter_mut().enumerate() {
        if let Fault::Isolate { target, way } = &mut planned.fault {
            (*target, *way) = (Target::Leader { work: 0, partition: n as u32 % 2 }, Way::Both);
            planned.for_ms = 3_000;
        }
    }
}

/// Writes are repeated.
fn lost_answers(plan: &mut Plan) {
    plan.workloads.iter_mut().for_each(|work| work.drop_replies = 0.3);
}

/// Some answers are lost on the way, so that their writes are repeated later than a cut takes.
fn lost_frames(plan: &mut Plan) {
    plan.clocks.clear();
    plan.links = Links { delay_min_us: 100, delay_max_us: 2_000, loss: 0.05, duplicate: 0.0, reorder: 0.0 };
    plan.raft = Raft { heartbeat_ms: 225, election_ms: (1_350, 2_000), ..plan.raft.clone() };
    for work in &mut plan.workloads {
        *work =
            Work { clients: 24, keys: 36, pause_ms: (1, 10), deadline_ms: 4_000, drop_replies: 0.3, ..work.clone() };
    }
}

/// Nobody waits for long.
fn impatient(plan: &mut Plan) {
    plan.workloads.iter_mut().for_each(|work| work.deadline_ms = 400);
}

/// Clients learn of a cut late: their routers have maps of their own, and rows are cut in order.
fn routers_of_their_own(plan: &mut Plan) {
    plan.chaos_ms = 2 * CHAOS_MS;
    plan.faults.iter_mut().for_each(|planned| planned.at_ms *= 2);
    plan.workloads.iter_mut().for_each(|work| (work.routers, work.partitions, work.hashed) = (8, 1, false));
}

/// Two partitions become one, again and again, and who leads the right one is cut off before it hears of that: it
/// answers for as long as its lease lasts, whoever has an old map.
fn merged_unheard(plan: &mut Plan) {
    plan.chaos_ms = 2 * CHAOS_MS;
    plan.raft = Raft { heartbeat_ms: 225, election_ms: (900, 1_350), ..plan.raft.clone() };
    plan.links = Links { delay_min_us: 2_000, delay_max_us: 15_000, loss: 0.0, duplicate: 0.0, reorder: 0.0 };
    for work in &mut plan.workloads {
        *work = Work { clients: 24, keys: 8, pause_ms: (1, 10), deadline_ms: 300, routers: 8, ..work.clone() };
    }
    let rng = &mut stream(plan.seed, "merged unheard");
    for round in 0..7 {
        let at_ms = 500 + 2_500 * round;
        let planned = |at_ms, for_ms, fault| Planned { at_ms, for_ms, seed: round, fault };
        let right = Target::Leader { work: 0, partition: 1 };
        plan.faults.extend([
            planned(at_ms, 1, Fault::Merge { work: 0, partition: 0 }),
            planned(at_ms + rng.random_range(70..170), 1_200, Fault::Isolate { target: right, way: Way::Both }),
            planned(at_ms + 1_700, 1, Fault::Divide { work: 0, partition: 0 }),
        ]);
    }
}

/// There is one node more than replicas, and whoever is away for long is replaced.
fn repairs(plan: &mut Plan) {
    plan.nodes = NODES + 1;
    plan.down_after_ms = 1_500;
    for (planned, at_ms) in plan.faults.iter_mut().zip([500, 6_000]) {
        (planned.at_ms, planned.for_ms) = (at_ms, 5_000);
    }
    plan.faults.truncate(2);
    plan.chaos_ms = 12_000;
}

/// Clients pause for longer than it takes a group to fall asleep, and a node that leads some does not come back.
fn sleepy(plan: &mut Plan) {
    repairs(plan);
    plan.faults.truncate(1);
    plan.raft.sleep_after_ms = 50;
    plan.workloads.iter_mut().for_each(|work| {
        (work.clients, work.partitions, work.pause_ms) = (1, 4, (1_500, 3_000));
    });
}

/// Leaders change, and their clocks are a minute apart.
fn wrong_clocks(plan: &mut Plan) {
    isolated_leaders(plan);
    plan.clocks = [60_000, 0, -60_000].map(|wall_off_ms| NodeClock { wall_off_ms, rate_ppm: 0 }).to_vec();
}

fn work(workload: Workload, rng: &mut StdRng) -> Work {
    let usual = Settings::new(workload, "", 0);
    Work {
        workload,
        hashed: workload == Rows && rng.random_bool(0.5),
        partitions: if workload == Rows { 4 } else { 2 },
        clients: 8,
        keys: usual.keys,
        ops_per_key_max: usual.ops_per_key_max,
        pause_ms: (2, 30),
        deadline_ms: 1_500,
        page_rows: (1, 8),
        drop_replies: 0.05,
        routers: 1,
        seed: rng.random_range(0..1 << 48),
    }
}

/// The plan of a seed that provokes a bug.
pub(crate) fn plan(bug: Bug, seed: u64) -> Plan {
    let Provoked { workloads, faults, shape, .. } = provoked(bug);
    let rng = &mut stream(seed, "planted");
    let workloads: Vec<Work> = workloads.iter().map(|workload| work(*workload, rng)).collect();
    let count = if faults.is_empty() { 0 } else { FAULTS };
    let mut planned: Vec<Planned> = (0..count)
        .map(|_| Planned {
            at_ms: rng.random_range(500..CHAOS_MS - 1_000),
            for_ms: rng.random_range(200..3_000),
            seed: rng.random_range(0..1 << 48),
            fault: {
                let kind = faults[rng.random_range(0..faults.len())];
                fault(rng, kind, NODES, &workloads)
            },
        })
        .collect();
    planned.sort_by_key(|planned| planned.at_ms);
    let usual = Plan::of(seed);
    let clocks = usual.clocks.iter().copied().take(NODES as usize).collect();
    let mut plan = Plan {
        nodes: NODES,
        replicas: NODES as u32,
        raft: Raft { sleep_after_ms: 0, ..usual.raft.clone() },
        chaos_ms: CHAOS_MS,
        clocks,
        sizing: None,
        workloads,
        faults: planned,
        ..usual
    };
    shape(&mut plan);
    plan
}

/// Runs a plan with a bug: the kinds of what went wrong that tell of it, the telling ones first, and how often the bug
/// took effect.
fn run_planted(bug: Bug, plan: &Plan) -> (Option<Vec<String>>, u64) {
    plant::set(Some(bug));
    let outcome = run(plan, false);
    let reached = plant::reached();
    plant::set(None);
    let by = provoked(bug).by;
    let tells = |kind: &String| by.iter().any(|begin| kind.starts_with(begin));
    let (mut kinds, others): (Vec<_>, Vec<_>) = signature(&outcome.failures).into_iter().partition(tells);
    let noticed = !kinds.is_empty();
    kinds.extend(others);
    (noticed.then_some(kinds), reached)
}

fn notice(bug: Bug) -> Result<Noticed, String> {
    let seeds_max = provoked(bug).seeds_max;
    let mut in_vain = 0;
    for seed in 1..=seeds_max {
        let plan = plan(bug, seed);
        let (kinds, reached) = run_planted(bug, &plan);
        let Some(kinds) = kinds else {
            in_vain += reached;
            continue;
        };
        let without = run(&plan, false).failures;
        if !without.is_empty() {
            return Err(format!("seed {seed} fails without the bug: {without:?}\n{}", plan.to_json()));
        }
        return Ok(Noticed { seeds: seed, kinds, reached });
    }
    Err(format!("{seeds_max} seeds have not shown it; it took effect {in_vain} times"))
}

/// In how many of so many seeds a bug is noticed.
fn rate(bug: Bug, seeds: u64) {
    let mut by_kind: BTreeMap<String, u64> = BTreeMap::new();
    let (mut noticed, mut all, mut first) = (0, 0, None);
    for seed in 1..=seeds {
        let (kinds, reached) = run_planted(bug, &plan(bug, seed));
        all += reached;
        if let Some(kinds) = kinds {
            noticed += 1;
            first.get_or_insert(seed);
            kinds.into_iter().for_each(|kind| *by_kind.entry(kind).or_default() += 1);
        }
    }
    println!("{:28} {noticed} of {seeds}, first {first:?}, took effect {all} times: {by_kind:?}", bug.name());
}

fn line(bug: Bug, noticed: &Result<Noticed, String>) -> String {
    match noticed {
        Ok(Noticed { seeds, kinds, reached }) => {
            format!("{:28} seeds {seeds:2}  took effect {reached:6}  {}", bug.name(), kinds.join(", "))
        }
        Err(why) => format!("{:28} NOT NOTICED: {why}", bug.name()),
    }
}

/// What became of a bug, found out once.
fn noticed(n: usize) -> &'static Result<Noticed, String> {
    static NOTICED: [OnceLock<Result<Noticed, String>>; Bug::ALL.len()] = [const { OnceLock::new() }; Bug::ALL.len()];
    NOTICED[n].get_or_init(|| notice(Bug::ALL[n]))
}

fn table() -> Result<(), Failed> {
    let lines: Vec<String> = Bug::ALL.iter().enumerate().map(|(n, bug)| line(*bug, noticed(n))).collect();
    println!("{}", lines.join("\n"));
    Ok(())
}

pub(crate) fn trials() -> Vec<Trial> {
    let seeds: Option<u64> = std::env::var("SIM_PLANTED").ok().map(|seeds| seeds.parse().expect("a number of seeds"));
    let mut trials: Vec<Trial> = Bug::ALL
        .iter()
        .enumerate()
        .map(|(n, bug)| {
            Trial::test(format!("planted::{}", bug.name()), move || match seeds {
                Some(seeds) => {
                    rate(*bug, seeds);
                    Ok(())
                }
                None => noticed(n).as_ref().map(drop).map_err(|why| why.as_str().into()),
            })
        })
        .collect();
    if seeds.is_none() {
        trials.push(Trial::test("planted::table", table));
    }
    trials
}
