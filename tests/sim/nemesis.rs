//! Carries out the faults of a plan, each undone after its time, and everything at the end.
//!
//! Invariants:
//! * faults that overlap do not undo each other: a link is cut for as long as any of them cuts it;
//! * no more disks are damaged than any group can spare ([`DAMAGED_MAX`]);
//! * every fault says in every history whether it took effect.

use crate::{
    faults::{Fault, Target, Way},
    operator::Operator,
    plan::{Plan, Planned},
    world::World,
};
use meridian::{
    env::{Scope, spawn},
    error::Reason,
    key::{DRIVER, KeyKind, Layout, NodeId, PartitionId, ReplicaId},
    log::memory::{FailedSync, Lose, SyncTime},
    node::CutAt,
    placement::{Command, CreateKeyspace, Cuts, Reply, sizing::Halve},
    proof::{recorder::Recorder, workload::Workload},
    transport::memory::Shape,
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep_until};

/// Every group has three members or more, of which one may be lost.
const DAMAGED_MAX: usize = 1;
/// Between one node and the next of a clog.
const CLOG_STEP: Duration = Duration::from_millis(40);
/// A broken connection comes back after this long.
const RECONNECT: Duration = Duration::from_millis(200);
/// Patience with the placement driver.
const DRIVE_DEADLINE: Duration = Duration::from_secs(5);

/// What has to be undone of a fault.
#[derive(Default)]
struct Active {
    cuts: Vec<(u64, u64)>,
    clogs: Vec<(u64, u64)>,
    down: Vec<u64>,
    /// Nodes whose next sync fails, and their lives.
    failing: Vec<(u64, u64)>,
    paused: Vec<Arc<Scope>>,
    disks: Vec<u64>,
    full: Vec<u64>,
    rates: Vec<u64>,
    /// Nodes that may be draining.
    drained: Vec<u64>,
    /// Nodes that are away, and the replicas that the map gave them.
    absent: Vec<(u64, BTreeSet<ReplicaId>)>,
    links: bool,
    /// Nodes it hit, for the histories.
    nodes: Vec<u64>,
}

/// Whoever makes things fail. Clones are the same.
#[derive(Clone)]
pub(crate) struct Nemesis(Arc<Inner>);

struct Inner {
    world: World,
    plan: Arc<Plan>,
    recorders: Vec<Arc<Recorder>>,
    active: Mutex<BTreeMap<usize, Active>>,
    joining: AtomicBool,
    operator: Operator,
}

impl Nemesis {
    pub(crate) fn new(world: &World, plan: &Arc<Plan>, recorders: Vec<Arc<Recorder>>) -> Self {
        let operator = Operator::new(world, plan.replicas, plan.repairs());
        let (world, plan, active, joining) =
            (world.clone(), Arc::clone(plan), Mutex::default(), AtomicBool::new(false));
        Self(Arc::new(Inner { world, plan, recorders, active, joining, operator }))
    }

    /// Goes through the timeline, which begins now.
    pub(crate) async fn run(&self) {
        let began = Instant::now();
        let mut steps: Vec<(u64, bool, usize)> = Vec::new();
        for (n, planned) in self.0.plan.faults.iter().enumerate() {
            steps.push((planned.at_ms, false, n));
            steps.push((planned.at_ms + planned.for_ms, true, n));
        }
        steps.sort_unstable();
        let end_ms = self.0.plan.chaos_ms;
        for (at_ms, ends, n) in steps.into_iter().filter(|(at_ms, ..)| *at_ms < end_ms) {
            sleep_until(began + Duration::from_millis(at_ms)).await;
            if ends { self.end(n).await } else { self.begin(n).await }
        }
        sleep_until(began + Duration::from_millis(end_ms)).await;
    }

    /// Makes everything sound again that can be.
    pub(crate) async fn heal(&self) {
        let active: Vec<usize> = self.0.active.lock().unwrap().keys().copied().collect();
        for n in active {
            self.end(n).await;
        }
        let world = &self.0.world;
        world.heal();
        for n in world.lost().into_iter().filter(|n| world.life(*n).is_some()) {
            world.crash(n, Lose::All).await;
        }
        // The disk may have ended a node after its fault was over.
        for n in world.all() {
            self.start(n).await;
        }
    }

    /// A join is under way.
    pub(crate) fn is_joining(&self) -> bool {
        self.0.joining.load(Ordering::Relaxed)
    }

    pub(crate) fn operator(&self) -> &Operator {
        &self.0.operator
    }

    fn say(&self, n: usize, state: &str, nodes: &[u64]) {
        let fault = &self.0.plan.faults[n].fault;
        let what = serde_json::to_string(fault).expect("plain data");
        self.0.world.note(format_args!("fault {n} {state}: {what} on {nodes:?}"));
        let names: Vec<String> = nodes.iter().map(|n| NodeId(*n).to_string()).collect();
        for recorder in &self.0.recorders {
            let value = json!({"id": n, "state": state, "nodes": names, "what": what});
            recorder.nemesis(fault.kind(), value);
        }
    }

    async fn begin(&self, n: usize) {
        let planned = &self.0.plan.faults[n];
        match self.install(planned).await {
            Some(active) => {
                self.0.world.count(&format!("fault/{}", planned.fault.kind()));
                self.say(n, "installed", &active.nodes);
                self.0.active.lock().unwrap().insert(n, active);
            }
            None => {
                self.0.world.count(&format!("skipped/{}", planned.fault.kind()));
                self.say(n, "skipped", &[]);
            }
        }
    }

    async fn end(&self, n: usize) {
        let Some(active) = self.0.active.lock().unwrap().remove(&n) else { return };
        self.undo(&self.0.plan.faults[n], &active).await;
        self.say(n, "healed", &active.nodes);
    }

    /// Whom a target means now.
    fn find(&self, target: &Target) -> Option<u64> {
        let world = &self.0.world;
        match target {
            Target::Node(n) => world.all().contains(n).then_some(*n),
            Target::DriverLeader => world.leader_of(DRIVER),
            Target::Leader { work, partition } => world.leader_of(self.partition(*work, *partition)?),
        }
        .filter(|n| !world.lost().contains(n))
    }

    fn partition(&self, work: usize, partition: u32) -> Option<PartitionId> {
        let world = &self.0.world;
        let name = self.0.plan.workloads.get(work)?.keyspace();
        let map = world.map()?;
        let keyspace = map.keyspace_by_name(name)?;
        map.partitions_of(keyspace.id).nth(partition as usize).map(|partition| partition.id)
    }

    /// A target that runs and is awake.
    fn awake(&self, target: &Target) -> Option<u64> {
        self.find(target).filter(|n| self.0.world.awake().contains(n))
    }

    /// Lets a fault begin; none: there is nothing for it to do.
    async fn install(&self, planned: &Planned) -> Option<Active> {
        let world = &self.0.world;
        let hit = |n: u64| Active { nodes: vec![n], ..Active::default() };
        Some(match &planned.fault {
            Fault::Crash { target, torn } => {
                let n = self.find(target).filter(|n| world.life(*n).is_some())?;
                world.crash(n, lose(*torn, planned.seed)).await;
                Active { down: vec![n], ..hit(n) }
            }
            Fault::PowerLoss { torn } => {
                let nodes = world.running();
                for n in &nodes {
                    world.crash(*n, lose(*torn, planned.seed.wrapping_add(*n))).await;
                }
                Active { down: nodes.clone(), nodes, ..Active::default() }
            }
            Fault::Pause { target } => {
                let n = self.awake(target)?;
                let scope = world.life(n)?.scope;
                scope.pause();
                Active { paused: vec![scope], ..hit(n) }
            }
            Fault::Isolate { .. }
            | Fault::Split { .. }
            | Fault::OneWay { .. }
            | Fault::Ring { .. }
            | Fault::Bridge { .. } => self.cut(&planned.fault)?,
            Fault::Clog { order, .. } => self.clog(order).await,
            Fault::Disconnect { target } => {
                let n = self.find(target)?;
                for other in world.all().into_iter().filter(|other| *other != n) {
                    world.network().disconnect(NodeId(n), NodeId(other), RECONNECT);
                    world.network().disconnect(NodeId(other), NodeId(n), RECONNECT);
                }
                hit(n)
            }
            Fault::BadLinks(links) => {
                world.network().shape_all(links.shape());
                Active { links: true, nodes: world.all(), ..Active::default() }
            }
            Fault::WallClock { target, jump_ms } => {
                let n = self.find(target)?;
                world.clock(n).set_wall_off(*jump_ms);
                hit(n)
            }
            Fault::ClockRate { target, ppm } => {
                let n = self.find(target)?;
                world.clock(n).set_rate(*ppm);
                Active { rates: vec![n], ..hit(n) }
            }
            Fault::Drain { .. } | Fault::Decommission { .. } | Fault::Lose { .. } | Fault::Absent { .. } => {
                self.take_away(&planned.fault).await?
            }
            Fault::Transfer { work, partition } => hit(self.transfer(*work, *partition)?),
            Fault::Divide { work, partition } => hit(self.divide(*work, *partition)?),
            Fault::Merge { work, partition } => hit(self.merge(*work, *partition)?),
            Fault::Snapshot { target } => hit(self.snapshot(target)?),
            Fault::Join => self.join()?,
            Fault::Keyspace { name, hashed, partitions } => {
                let layout = if *hashed { Layout::Hashed } else { Layout::Ordered };
                let (kind, cuts) = (KeyKind::Bytes, cuts(*hashed, *partitions));
                let (name, avoid) = (name.clone(), BTreeSet::new());
                hit(self.drive(Command::CreateKeyspace(CreateKeyspace {
                    name,
                    kind,
                    layout,
                    replicas: 0,
                    cuts,
                    avoid,
                }))?)
            }
            Fault::SlowDisk { .. }
            | Fault::StalledDisk { .. }
            | Fault::SyncError { .. }
            | Fault::DiskFull { .. }
            | Fault::BitRot { .. } => self.disk(planned).await?,
        })
    }

    /// Nodes that are to do without their part in the cluster, for a while or for good.
    async fn take_away(&self, fault: &Fault) -> Option<Active> {
        let (world, operator) = (&self.0.world, &self.0.operator);
        let hit = |n: u64| Active { nodes: vec![n], ..Active::default() };
        Some(match fault {
            Fault::Drain { target } => {
                let n = self.find(target)?;
                operator.drain(n);
                Active { drained: vec![n], ..hit(n) }
            }
            Fault::Decommission { target } => {
                let n = self.find(target).filter(|n| operator.decommission(*n))?;
                hit(n)
            }
            Fault::Lose { target } => {
                let n = self.find(target).filter(|n| operator.can_spare(*n))?;
                if world.lost().len() >= DAMAGED_MAX {
                    return None;
                }
                world.retire(n).await;
                hit(n)
            }
            Fault::Absent { target } => {
                let n = self.find(target).filter(|n| world.life(*n).is_some())?;
                let held = self.held(n);
                world.crash(n, Lose::All).await;
                Active { down: vec![n], absent: vec![(n, held)], ..hit(n) }
            }
            other => unreachable!("takes nobody away: {other:?}"),
        })
    }

    /// Replicas that the map gives a node.
    fn held(&self, n: u64) -> BTreeSet<ReplicaId> {
        let Some(map) = self.0.world.map() else { return BTreeSet::new() };
        map.partitions().values().filter_map(|partition| partition.replica_on(NodeId(n))).map(|it| it.id).collect()
    }

    async fn undo(&self, planned: &Planned, active: &Active) {
        let world = &self.0.world;
        active.drained.iter().for_each(|n| self.0.operator.resume(*n));
        for (n, held) in &active.absent {
            if !held.is_subset(&self.held(*n)) {
                world.count("returned-late");
            }
        }
        self.uncut(&active.cuts);
        if let Fault::Clog { free, .. } = &planned.fault {
            self.unclog(free, &active.clogs).await;
        }
        active.paused.iter().for_each(|scope| scope.resume());
        active.rates.iter().for_each(|n| world.clock(*n).set_rate(0));
        for n in &active.disks {
            world.disk(*n).stall(Duration::ZERO);
            world.set_pace(*n, world.settings().disks);
        }
        for n in &active.full {
            world.disk(*n).set_full(false);
            world.snapshots(*n).set_full(false);
        }
        for (n, life) in &active.failing {
            // It had nothing to sync yet: the failure would come when everything is to be sound.
            if world.lives(*n) == *life && world.life(*n).is_some() {
                world.crash(*n, Lose::All).await;
            }
        }
        for n in &active.down {
            self.start(*n).await;
        }
        if let Fault::Keyspace { name, .. } = &planned.fault {
            let _nobody_awake = self.drive(Command::DropKeyspace { name: name.clone() });
        }
        if active.links {
            world.network().shape_all(world.settings().links);
        }
    }

    /// Starts a node that is down and not lost.
    async fn start(&self, n: u64) {
        let world = &self.0.world;
        world.settled(n).await;
        if world.life(n).is_none() && !world.lost().contains(&n) {
            // Its disk may still be full.
            if let Err(refused) = world.try_restart(n) {
                world.note(format_args!("{n} does not start: {refused}"));
            }
        }
    }

    /// Nodes of a group of links between which frames are lost.
    fn cut(&self, fault: &Fault) -> Option<Active> {
        let all = self.0.world.all();
        let others = |side: &[u64]| -> Vec<u64> { all.iter().copied().filter(|n| !side.contains(n)).collect() };
        let product = |from: &[u64], to: &[u64]| -> Vec<(u64, u64)> {
            from.iter().flat_map(|from| to.iter().map(|to| (*from, *to))).filter(|(from, to)| from != to).collect()
        };
        let both = |a: &[u64], b: &[u64]| [product(a, b), product(b, a)].concat();
        let (nodes, cuts) = match fault {
            Fault::Isolate { target, way } => {
                let n = self.find(target)?;
                let rest = others(&[n]);
                let cuts = match way {
                    Way::Both => both(&[n], &rest),
                    Way::To => product(&rest, &[n]),
                    Way::From => product(&[n], &rest),
                };
                (vec![n], cuts)
            }
            Fault::Split { side } => (side.clone(), both(side, &others(side))),
            Fault::OneWay { from, to } => (from.clone(), product(from, to)),
            Fault::Ring { order } => {
                let apart = |a: usize, b: usize| (a + 1) % order.len() != b && (b + 1) % order.len() != a;
                let mut cuts = product(order, order);
                let place = |n: u64| order.iter().position(|at| *at == n).expect("it is of the ring");
                cuts.retain(|(from, to)| apart(place(*from), place(*to)));
                (order.clone(), cuts)
            }
            Fault::Bridge { over, side } => {
                let side: Vec<u64> = side.iter().copied().filter(|n| n != over).collect();
                let rest: Vec<u64> = others(&side).into_iter().filter(|n| n != over).collect();
                (vec![*over], both(&side, &rest))
            }
            other => unreachable!("cuts nothing: {other:?}"),
        };
        if cuts.is_empty() {
            return None;
        }
        for (from, to) in &cuts {
            self.0.world.network().cut(NodeId(*from), NodeId(*to));
        }
        Some(Active { cuts, nodes, ..Active::default() })
    }

    /// Heals links that no other fault cuts.
    fn uncut(&self, cuts: &[(u64, u64)]) {
        let active = self.0.active.lock().unwrap();
        let still: BTreeSet<_> = active.values().flat_map(|active| active.cuts.iter().copied()).collect();
        for (from, to) in cuts.iter().filter(|link| !still.contains(link)) {
            self.0.world.network().heal(NodeId(*from), NodeId(*to));
        }
    }

    async fn clog(&self, order: &[u64]) -> Active {
        let (world, mut clogs) = (&self.0.world, Vec::new());
        for n in order {
            for other in world.all().into_iter().filter(|other| other != n) {
                world.network().clog(NodeId(other), NodeId(*n));
                clogs.push((other, *n));
            }
            tokio::time::sleep(CLOG_STEP).await;
        }
        Active { clogs, nodes: order.to_vec(), ..Active::default() }
    }

    async fn unclog(&self, free: &[u64], clogs: &[(u64, u64)]) {
        let still: BTreeSet<_> = {
            let active = self.0.active.lock().unwrap();
            active.values().flat_map(|active| active.clogs.iter().copied()).collect()
        };
        for n in free {
            for (from, to) in clogs.iter().filter(|link| link.1 == *n && !still.contains(link)) {
                self.0.world.network().unclog(NodeId(*from), NodeId(*to));
            }
            tokio::time::sleep(CLOG_STEP).await;
        }
    }

    async fn disk(&self, planned: &Planned) -> Option<Active> {
        let world = &self.0.world;
        let hit = |n: u64| Active { nodes: vec![n], ..Active::default() };
        Some(match &planned.fault {
            Fault::SlowDisk { target, sync_ms } => {
                let n = self.find(target)?;
                let max = Duration::from_millis(*sync_ms);
                world.set_pace(n, SyncTime { min: max / 2, max, slow_share: 0.0, slow_max: max });
                Active { disks: vec![n], ..hit(n) }
            }
            Fault::StalledDisk { target } => {
                let n = self.find(target)?;
                world.disk(n).stall(Duration::from_millis(planned.for_ms));
                Active { disks: vec![n], ..hit(n) }
            }
            Fault::SyncError { target } => {
                let n = self.awake(target)?;
                let left = if planned.seed.is_multiple_of(2) { FailedSync::Kept } else { FailedSync::Lost };
                world.disk(n).fail_next_sync(left);
                Active { down: vec![n], failing: vec![(n, world.lives(n))], ..hit(n) }
            }
            Fault::DiskFull { target } => {
                let n = self.awake(target)?;
                world.disk(n).set_full(true);
                world.snapshots(n).set_full(true);
                Active { down: vec![n], full: vec![n], ..hit(n) }
            }
            Fault::BitRot { target } => {
                let n = self.find(target)?;
                if world.lost().len() >= DAMAGED_MAX || !self.0.operator.can_damage(n) {
                    return None;
                }
                world.set_lost(n);
                if world.life(n).is_some() {
                    world.crash(n, Lose::All).await;
                }
                world.settled(n).await;
                let snapshot = if planned.seed.is_multiple_of(2) { None } else { world.snapshots(n).rot(planned.seed) };
                // Without snapshots there is a log.
                let log = if snapshot.is_none() { world.disk(n).rot(planned.seed) } else { None };
                world.note(format_args!("{n} has rotten: {log:?} {snapshot:?}"));
                world.count(if log.is_some() { "rotten/log" } else { "rotten/snapshot" });
                match world.try_restart(n) {
                    Err(refused) => {
                        world.count("refused-to-start");
                        world.note(format_args!("{n} refuses to start: {refused}"));
                    }
                    // Its other replicas work; that one is not opened.
                    Ok(_) => assert_eq!(log, None, "node {n} started with a damaged log"),
                }
                hit(n)
            }
            other => unreachable!("hits no disk: {other:?}"),
        })
    }

    fn transfer(&self, work: usize, partition: u32) -> Option<u64> {
        let world = &self.0.world;
        let id = self.partition(work, partition)?;
        let leader = world.leader_of(id)?;
        let life = world.life(leader)?;
        let here = life.node.partition(id)?;
        let to = here.group().status().voters.into_iter().find(|replica| replica.node.0 != leader)?;
        life.scope.enter(|| {
            spawn(async move {
                let _refused = here.group().transfer(to.id).await;
            })
        });
        Some(leader)
    }

    /// Has a partition cut in two, which may be in vain; returns the node that was asked. Not a bank's: its batches, and scans
    /// of one moment, are promised within a partition only.
    fn divide(&self, work: usize, partition: u32) -> Option<u64> {
        if self.0.plan.workloads.get(work)?.workload == Workload::Bank {
            return None;
        }
        let world = self.0.world.clone();
        let id = self.partition(work, partition)?;
        let n = *world.awake().first()?;
        let life = world.life(n)?;
        let scope = Arc::clone(&life.scope);
        scope.enter(|| {
            spawn(async move {
                if life.node.divide(id, CutAt::Middle(Halve::Bytes), Instant::now() + DRIVE_DEADLINE).await.is_ok() {
                    world.count("divided");
                }
            })
        });
        Some(n)
    }

    /// Has a partition and the one after it become one, which may be in vain; returns the node that was asked.
    fn merge(&self, work: usize, partition: u32) -> Option<u64> {
        let world = self.0.world.clone();
        let id = self.partition(work, partition)?;
        let n = *world.awake().first()?;
        let life = world.life(n)?;
        let scope = Arc::clone(&life.scope);
        scope.enter(|| {
            spawn(async move {
                match life.node.merge(id, None, Instant::now() + DRIVE_DEADLINE).await {
                    Ok(_) => world.count("merged"),
                    Err(error) if error.reason == Reason::Overloaded => world.count("merges-withdrawn"),
                    Err(error) => world.note(format_args!("{id} is not merged: {error}")),
                }
            })
        });
        Some(n)
    }

    fn snapshot(&self, target: &Target) -> Option<u64> {
        let n = self.awake(target)?;
        let life = self.0.world.life(n)?;
        for partition in life.node.partitions() {
            life.scope
                .enter(|| spawn(async move { partition.group().snapshot_now(Instant::now() + DRIVE_DEADLINE).await }));
        }
        Some(n)
    }

    fn join(&self) -> Option<Active> {
        let world = self.0.world.clone();
        // One at a time, and not without a quorum that could admit it.
        if world.all().len() >= 8 || self.0.joining.swap(true, Ordering::Relaxed) {
            return None;
        }
        let this = self.clone();
        spawn(async move {
            let n = world.join().await;
            world.note(format_args!("{n} has joined"));
            world.count("joined");
            this.0.joining.store(false, Ordering::Relaxed);
        });
        Some(Active::default())
    }

    /// Has the placement driver do something, which may be in vain; returns the node that was asked.
    fn drive(&self, command: Command) -> Option<u64> {
        let world = self.0.world.clone();
        let n = *world.awake().first()?;
        let life = world.life(n)?;
        let node = Arc::clone(&life.node);
        life.scope.enter(|| {
            spawn(async move {
                match node.drive(&command, Instant::now() + DRIVE_DEADLINE).await {
                    Ok(Reply::KeyspaceCreated { created: true, .. }) => world.count("keyspaces-created"),
                    Ok(Reply::KeyspaceDropped { dropped: true }) => world.count("keyspaces-dropped"),
                    other => world.note(format_args!("{command:?}: {other:?}")),
                }
            })
        });
        Some(n)
    }
}

/// Where to cut a keyspace.
pub(crate) fn cuts(hashed: bool, partitions: u32) -> Cuts {
    if hashed { Cuts::Even(partitions) } else { Cuts::At(meridian::proof::workload::cuts(partitions)) }
}

fn lose(torn: bool, seed: u64) -> Lose {
    if torn { Lose::Torn { seed } } else { Lose::All }
}

impl crate::plan::Links {
    pub(crate) fn shape(&self) -> Shape {
        Shape {
            delay_min: Duration::from_micros(self.delay_min_us),
            delay_max: Duration::from_micros(self.delay_max_us),
            loss: self.loss,
            duplicate: self.duplicate,
            reorder: self.reorder,
            stray_max: Duration::from_micros(self.delay_max_us * 4),
        }
    }
}
