//! One run of a plan: the cluster forms, clients work while things fail, everything is made sound, and then every promise
//! must hold: while it is under way, at rest, and again after all nodes have lost power.

use crate::{
    doors::doors,
    invariants,
    nemesis::{Nemesis, cuts},
    plan::{Plan, Raft, Work},
    verdict::{Failure, Failures, judged},
    world::{Settings, World, simulate_noting_panics},
};
use bytes::Bytes;
use futures_util::future::join_all;
use meridian::{
    env::spawn,
    key::{Layout, NodeId, PartitionId, position},
    log::memory::{Lose, SyncTime},
    placement::{Map, Standing},
    proof::{
        check::{Verdict, replicas},
        door::Door,
        history::{Event, Kind, Phase, Process},
        recorder::Recorder,
        workload::{self, Summary},
    },
    proto::v1::{self, request::Op},
    raft::RaftConfig,
};
use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

/// Once everything is sound, the cluster has agreed on all there is to agree on within this time.
const RESTS_WITHIN: Duration = Duration::from_secs(40);
/// Once everything is sound, every partition takes a write within this time, and every node reads it.
const WORKS_WITHIN: Duration = Duration::from_secs(10);
/// Patience with the final reads.
const READS_WITHIN: Duration = Duration::from_secs(30);
/// Patience with one probe.
const PROBE_DEADLINE: Duration = Duration::from_secs(1);

/// What one workload's clients were told.
pub(crate) struct Told {
    pub(crate) work: Work,
    pub(crate) events: Vec<Event>,
    pub(crate) verdicts: Vec<Verdict>,
}

/// How a run went.
pub(crate) struct Outcome {
    pub(crate) failures: Vec<Failure>,
    pub(crate) told: Vec<Told>,
    /// What has happened, by name.
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) nodes: Vec<String>,
    pub(crate) simulated: Duration,
    /// Empty unless asked for.
    pub(crate) trace: Vec<String>,
}

/// Runs a plan. Nothing but the plan decides what happens.
pub(crate) fn run(plan: &Plan, keep_trace: bool) -> Outcome {
    let failures = Failures::new();
    let (mut outcome, panics) = simulate_noting_panics(plan.seed, settings(plan, keep_trace), {
        let (plan, failures) = (Arc::new(plan.clone()), Arc::clone(&failures));
        async move |world| {
            let course = Course::new(world, plan, failures);
            // In a task of its own: when it panics, there still is an outcome.
            let _panicked = spawn({
                let course = course.clone();
                async move { course.run().await }
            })
            .await;
            course.outcome()
        }
    });
    panics.iter().for_each(|message| failures.add(Failure::panic(message)));
    outcome.failures = failures.take();
    outcome
}

fn settings(plan: &Plan, keep_trace: bool) -> Settings {
    let us = Duration::from_micros;
    let Raft { heartbeat_ms, election_ms: (least, most), .. } = plan.raft;
    let Raft { snapshot_bytes, log_keep_bytes, log_bytes_max, sleep_after_ms, .. } = plan.raft;
    let election_ms = least..most;
    Settings {
        raft: RaftConfig {
            heartbeat_ms,
            election_ms,
            sleep_after_ms,
            snapshot_bytes,
            log_keep_bytes,
            log_bytes_max,
            ..RaftConfig::default()
        },
        replicas: plan.replicas,
        links: plan.links.shape(),
        disks: SyncTime {
            min: us(plan.disks.min_us),
            max: us(plan.disks.max_us),
            slow_share: plan.disks.slow_share,
            slow_max: us(plan.disks.slow_max_us),
        },
        clocks: plan.clocks.clone(),
        down_after: Duration::from_millis(plan.down_after_ms),
        sizing: plan.sizing,
        keep_trace,
    }
}

/// A run under way. Clones are the same.
#[derive(Clone)]
struct Course {
    world: World,
    plan: Arc<Plan>,
    failures: Arc<Failures>,
    recorders: Arc<[Arc<Recorder>]>,
}

impl Course {
    fn new(world: World, plan: Arc<Plan>, failures: Arc<Failures>) -> Self {
        let recorders = plan.workloads.iter().map(|_| Recorder::new(Instant::now(), None)).collect();
        Self { world, plan, failures, recorders }
    }

    async fn run(&self) {
        let (world, plan) = (&self.world, &self.plan);
        world.form(plan.nodes).await;
        for work in &plan.workloads {
            let layout = if work.hashed { Layout::Hashed } else { Layout::Ordered };
            world.create_keyspace(1, work.keyspace(), layout, cuts(work.hashed, work.partitions)).await;
        }
        let watching = spawn(invariants::watch(world.clone(), Arc::clone(&self.failures)));
        let mut running = Vec::new();
        for (work, recorder) in plan.workloads.iter().zip(self.recorders.iter()) {
            let doors = doors(world, &world.all(), work.routers).await;
            let until = Instant::now() + READS_WITHIN;
            if let Err(error) = workload::load(&work.settings(), &doors, recorder, until).await {
                self.failures.add(Failure::liveness("the workload is loaded", &error.to_string()));
                return;
            }
            running.push(workload::start(work.settings(), doors, Arc::clone(recorder)));
        }
        let nemesis = Nemesis::new(world, plan, self.recorders.to_vec());
        nemesis.run().await;
        self.set_phase(Phase::Heal);
        nemesis.heal().await;
        let tidying = spawn(nemesis.operator().clone().tidy_up());
        let healed = self.demand_soundness(&nemesis).await;
        tidying.abort();
        for running in running {
            running.stop().await;
        }
        if healed {
            self.demand_equality("after the heal").await;
            self.power_loss().await;
            self.demand_equality("after a restart of everything").await;
        }
        watching.abort();
    }

    fn set_phase(&self, phase: Phase) {
        self.recorders.iter().for_each(|recorder| recorder.set_phase(phase));
    }

    /// Everything is sound: clients still work, and must be able to.
    async fn demand_soundness(&self, nemesis: &Nemesis) -> bool {
        let joined = || if nemesis.is_joining() { Err("it has not joined".to_owned()) } else { Ok(()) };
        let shape = || self.world.check_shape().map(drop);
        let operator = nemesis.operator();
        let done = self.demand("a node that joins has joined", RESTS_WITHIN, joined).await
            && self.probe_all().await
            && self.demand("what is lost is built anew", RESTS_WITHIN, || operator.check_rebuilt()).await
            && self.demand("who is to leave has left", RESTS_WITHIN, || operator.check_left()).await;
        if done {
            operator.retire().await;
        }
        done && self.demand("the cluster is whole", RESTS_WITHIN, shape).await
    }

    /// Nobody works: all replicas are the same, and everything is read once more.
    async fn demand_equality(&self, when: &str) {
        let rest = || self.world.check_rest();
        if !self.demand(&format!("replicas are equal {when}"), RESTS_WITHIN, rest).await {
            return;
        }
        self.set_phase(Phase::Final);
        for (work, recorder) in self.plan.workloads.iter().zip(self.recorders.iter()) {
            for digests in self.world.digests(work.keyspace()) {
                recorder.nemesis(replicas::F, digests);
            }
            let doors: Vec<Arc<dyn Door>> = doors(&self.world, &self.world.running(), 1).await;
            let until = Instant::now() + READS_WITHIN;
            let read = workload::final_reads(work.settings(), doors, Arc::clone(recorder), until).await;
            if let Err(error) = read {
                self.failures.add(Failure::liveness(&format!("everything is read {when}"), &error.to_string()));
            }
        }
    }

    /// All nodes lose power at once, with whatever they had not synced.
    async fn power_loss(&self) {
        for n in self.world.running() {
            self.world.crash(n, Lose::All).await;
        }
        for n in self.world.all().into_iter().filter(|n| !self.world.lost().contains(n)) {
            self.world.restart(n);
        }
    }

    /// Waits until something holds, and says what does not if it takes too long.
    async fn demand(&self, what: &str, within: Duration, mut holds: impl FnMut() -> Result<(), String>) -> bool {
        let until = Instant::now() + within;
        loop {
            match holds() {
                Ok(()) => return true,
                Err(why) if Instant::now() >= until => {
                    self.failures.add(Failure::liveness(what, &why));
                    return false;
                }
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Every partition takes a write through every node, and is read through every node; all at the same time.
    async fn probe_all(&self) -> bool {
        let until = Instant::now() + WORKS_WITHIN;
        let works =
            |work: &Work| self.probe_keys(work).into_iter().map(|key| (work.keyspace(), key)).collect::<Vec<_>>();
        let keys = self.plan.workloads.iter().flat_map(works);
        join_all(keys.map(|(keyspace, key)| self.probe(keyspace, key.into(), until)))
            .await
            .into_iter()
            .all(|works| works)
    }

    async fn probe(&self, keyspace: &str, key: Bytes, until: Instant) -> bool {
        let world = &self.world;
        let delete = v1::DeleteRequest { keyspace: keyspace.into(), key: key.clone(), ..Default::default() };
        let read = v1::GetRequest { keyspace: keyspace.into(), key, ..Default::default() };
        for n in world.running() {
            let what = "every partition takes a write through every node";
            let delete = || ask(world, n, Op::Delete(delete.clone()));
            if !self.insist(what, until, delete).await {
                return false;
            }
            let what = "every partition is read through every node";
            if !self.insist(what, until, || ask(world, n, Op::Get(read.clone()))).await {
                return false;
            }
        }
        true
    }

    async fn insist<F>(&self, what: &str, until: Instant, attempt: impl Fn() -> F) -> bool
    where
        F: Future<Output = Result<(), String>>,
    {
        loop {
            match attempt().await {
                Ok(()) => return true,
                Err(why) if Instant::now() >= until => {
                    self.failures.add(Failure::liveness(what, &why));
                    return false;
                }
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// A key in each partition that no workload uses: deleting what is not there changes nothing.
    fn probe_keys(&self, work: &Work) -> Vec<String> {
        let Some(map) = self.world.map() else { return Vec::new() };
        let Some(space) = map.keyspace_by_name(work.keyspace()) else { return Vec::new() };
        let mut found: BTreeMap<PartitionId, String> = BTreeMap::new();
        for n in 0..=255_u8 {
            let key = format!("{n:02x}!probe");
            let at = map.locate(space.id, &position(space.layout, &key.clone().into())).expect("it tiles");
            found.entry(at.id).or_insert(key);
        }
        found.into_values().collect()
    }

    fn outcome(&self) -> Outcome {
        let map = self.world.map();
        let mut counts = self.world.counts();
        let mut told = Vec::new();
        for (work, recorder) in self.plan.workloads.iter().zip(self.recorders.iter()) {
            let events = recorder.events();
            let (verdicts, failures) = judged(work.workload, &events);
            failures.into_iter().for_each(|failure| self.failures.add(failure));
            if let Some(map) = &map {
                owned(&self.world, map, work, &events, &self.failures);
            }
            let sum = Summary::of(&events);
            for (name, count) in &sum.ops {
                *counts.entry(format!("op/{name}")).or_default() += count;
            }
            *counts.entry("follower-reads".to_owned()).or_default() += sum.follower_reads;
            *counts.entry("repeated".to_owned()).or_default() += sum.repeated;
            *counts.entry("ended".to_owned()).or_default() += sum.ended;
            *counts.entry("unknown".to_owned()).or_default() += sum.unknown;
            *counts.entry(format!("workload/{}", work.workload)).or_default() += 1;
            told.push(Told { work: work.clone(), events, verdicts });
        }
        Outcome {
            failures: Vec::new(),
            told,
            counts,
            nodes: self.world.all().into_iter().map(|n| NodeId(n).to_string()).collect(),
            simulated: self.world.trace().now(),
            trace: self.world.trace().take(),
        }
    }
}

async fn ask(world: &World, n: u64, op: Op) -> Result<(), String> {
    // Nothing is promised of one that has left.
    let left = |map: Arc<Map>| map.node(NodeId(n)).is_none_or(|node| node.standing == Standing::Removed);
    if world.map().is_some_and(left) {
        return Ok(());
    }
    match crate::client::ask(world, n, op, PROBE_DEADLINE).await {
        Ok(_) => Ok(()),
        Err(error) if error.reason == meridian::error::Reason::NotFound => Ok(()),
        Err(error) => Err(format!("through node {n}: {error}")),
    }
}

/// Whoever answered for a key has owned it: it does, or did before it was cut or merged.
fn owned(world: &World, map: &Map, work: &Work, events: &[Event], failures: &Failures) {
    let Some(space) = map.keyspace_by_name(work.keyspace()) else { return };
    for event in events.iter().filter(|event| event.kind == Kind::Ok && event.process != Process::Nemesis) {
        let part = event.srv.as_ref().and_then(|srv| srv.part);
        let (Some(key), Some(part)) = (&event.key, part) else { continue };
        let position = position(space.layout, &key.clone().into());
        if !world.has_owned(space.id, PartitionId(part), &position) {
            let what = format!("{part} answered for {key}, which it never owned: event {}", event.index);
            failures.add(Failure::new("not-the-owner", what));
        }
    }
}
