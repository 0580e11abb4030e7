//! One run: from the empty folder to the verdicts.
//!
//! Load, then faults come and go under the workloads, then everything heals: the cluster must become healthy by itself,
//! all replicas must come to rest and be equal, and every key is read; then all nodes are killed at once and started
//! again, and every key is read once more.

use super::{
    Error,
    cluster::Cluster,
    export,
    namespaces::Namespaces,
    nemesis::Nemesis,
    network::Network,
    operator::Operator,
    process::Node,
    schedule::Schedule,
    settings::{Hits, Settings},
    verdicts::{self, Happened},
};
use crate::{
    client::Client,
    env::{Clock as _, SystemClock},
    proof::{
        check,
        door::{Door, Library, OneNode},
        history::{self, Event, Kind, Phase, Process, RunInfo},
        recorder::Recorder,
        report::{Judged, Outcome, Report},
        workload::{self, Summary, Workload},
    },
    proto::v1::{self, CreateKeyspaceRequest},
    telemetry,
};
use serde_json::json;
use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

/// Time before the first fault and after the last: what clients see when nothing is wrong.
const CALM: Duration = Duration::from_secs(2);
/// Time in which the cluster must be sound again once nothing is wrong any more.
pub const RECOVERY_MAX: Duration = Duration::from_secs(45);
/// Time in which everything must have been read at the end.
const FINAL_MAX: Duration = Duration::from_secs(60);
/// Time in which keyspaces must exist and have leaders.
const PREPARE_MAX: Duration = Duration::from_secs(30);
/// Partitions of every keyspace but the bank's.
const PARTITIONS: u32 = 3;
/// Doors of the client library beside one for every node: a client at the door of a node that is cut off waits in vain,
/// and with few others soon all would.
const LIBRARY_DOORS: usize = 3;
/// Time for an operation: a little longer than a node needs to find out that it has no quorum.
const DEADLINE: Duration = Duration::from_millis(2_500);
/// Rows of a page of a scan: so few that the cluster changes between one page and the next.
const PAGE_ROWS: RangeInclusive<u32> = 1..=10;
/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// How far a run is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// What is going on.
    pub phase: String,
    /// Operations that ended, of all workloads.
    pub ops: u64,
    /// Faults installed.
    pub faults: u64,
    /// The fault that is on.
    pub fault: String,
}

/// One workload of a run.
struct Track {
    settings: workload::Settings,
    recorder: Arc<Recorder>,
    doors: Vec<Arc<dyn Door>>,
}

/// A run under way.
struct Run<'a> {
    settings: &'a Settings,
    began: Instant,
    started_wall_ms: u64,
    tracks: Vec<Track>,
    progress: &'a watch::Sender<Progress>,
    /// What the cluster should have done after the faults, and did not.
    unsound: Vec<String>,
}

/// Runs a drill and writes its files.
///
/// # Errors
/// When the drill itself fails; a broken promise is a verdict in the report.
pub async fn run(settings: &Settings, progress: &watch::Sender<Progress>) -> Result<Report, Error> {
    settings.validate()?;
    export::prepare(&settings.out)?;
    let tell = |phase: &str| progress.send_modify(|progress| progress.phase = phase.to_owned());
    tell("starting the cluster");
    let mut cluster = cluster_of(settings).await?;
    let mut run = Run {
        settings,
        began: Instant::now(),
        started_wall_ms: SystemClock.wall_ms(),
        tracks: Vec::new(),
        progress,
        unsound: Vec::new(),
    };
    for workload in &settings.workloads {
        let track = run.prepare(&cluster, *workload).await?;
        run.tracks.push(track);
    }
    let recorders = run.tracks.iter().map(|track| Arc::clone(&track.recorder)).collect();
    let mut nemesis = Nemesis::new(recorders, run.operator(&cluster).await?, settings);
    run.main(&mut cluster, &mut nemesis).await?;
    run.end(&mut cluster).await?;
    tell("judging");
    let report = run.judge(&mut cluster, &nemesis)?;
    for node in &mut cluster.nodes {
        node.kill()?;
    }
    if report.outcome() == Outcome::Pass {
        export::forget_data(cluster.nodes.iter().map(|node| node.data.as_path()))?;
        run.tidy_up(&cluster).await?;
    }
    Ok(report)
}

async fn cluster_of(settings: &Settings) -> Result<Cluster, Error> {
    if !settings.endpoints.is_empty() {
        return Cluster::foreign(&settings.endpoints).await;
    }
    let network = match settings.netns {
        true => Network::Namespaces(Namespaces::make(settings.nodes, settings.seed)?),
        false => Network::proxies(settings.nodes, settings.seed).await?,
    };
    Cluster::start(settings, &export::nodes(&settings.out), network).await
}

impl Run<'_> {
    fn tell(&self, phase: &str) {
        self.progress.send_modify(|progress| progress.phase = phase.to_owned());
    }

    /// Creates the keyspace of a workload, opens its doors, and writes what it needs to begin with.
    async fn prepare(&self, cluster: &Cluster, workload: Workload) -> Result<Track, Error> {
        let settings = self.settings;
        self.tell(&format!("preparing {workload}"));
        // Unique, so that a cluster of others can be drilled again.
        let keyspace = format!("drill-{workload}-{:08x}", settings.seed & 0xffff_ffff);
        let failed = |what: &str| {
            let what = format!("{what} {keyspace}");
            move |why: String| Error::NotReady(format!("{what}: {why}"))
        };
        let until = Instant::now() + PREPARE_MAX;
        let addresses = cluster.addresses().to_vec();
        let client = Client::builder(addresses.clone()).connect_deadline(PREPARE_MAX).connect().await;
        let client = client.map_err(|error| failed("connecting for")(error.to_string()))?;
        let request = CreateKeyspaceRequest {
            name: keyspace.clone(),
            keys: v1::KeyKind::Bytes as i32,
            layout: v1::Layout::Ordered as i32,
            replicas: if cluster.nodes.is_empty() { 0 } else { settings.replicas },
            split_at: if workload == Workload::Bank { Vec::new() } else { workload::cuts(PARTITIONS) },
            ..CreateKeyspaceRequest::default()
        };
        let created = client.admin().create_keyspace(request).await;
        created.map_err(|error| failed("creating")(error.to_string()))?;
        let library = || Arc::new(Library(client.clone())) as Arc<dyn Door>;
        let mut doors: Vec<Arc<dyn Door>> = std::iter::repeat_with(library).take(LIBRARY_DOORS).collect();
        for (name, address) in cluster.names().into_iter().zip(addresses) {
            let door = OneNode::new(name, &address).map_err(|error| failed("a door to")(error.to_string()))?;
            doors.push(Arc::new(door));
        }
        let mut of_workload = workload::Settings::new(workload, keyspace.clone(), settings.seed);
        of_workload.clients = settings.clients;
        of_workload.deadline = DEADLINE;
        of_workload.page_rows = PAGE_ROWS;
        let levels = settings.levels.iter().filter(|level| workload != Workload::Register || level.mode.is_strong());
        let levels: Vec<_> = levels.copied().collect();
        if !levels.is_empty() && matches!(workload, Workload::Register | Workload::Levels | Workload::Rows) {
            of_workload.levels = levels;
        }
        let recorder = Recorder::new(self.began, Some(Box::new(export::history(settings, workload)?)));
        let loaded = workload::load(&of_workload, &doors, &recorder, until).await;
        loaded.map_err(|error| failed("loading")(error.to_string()))?;
        Ok(Track { settings: of_workload, recorder, doors })
    }

    /// Who asks the cluster for changes. A bank is not cut: its batches are promised within a partition only.
    async fn operator(&self, cluster: &Cluster) -> Result<Operator, Error> {
        let cut = self.tracks.iter().filter(|track| track.settings.workload != Workload::Bank);
        let keyspaces = cut.map(|track| track.settings.keyspace.clone()).collect();
        let client = Client::builder(cluster.addresses().to_vec()).connect_deadline(PREPARE_MAX).connect().await;
        let client = client.map_err(|error| Error::NotReady(format!("connecting for the operator: {error}")))?;
        Ok(Operator::new(client, keyspaces))
    }

    /// Drops the keyspaces from a cluster that goes on without the drill.
    async fn tidy_up(&self, cluster: &Cluster) -> Result<(), Error> {
        if !cluster.nodes.is_empty() {
            return Ok(());
        }
        let failed = |error: crate::client::Error| Error::NotReady(format!("dropping the drill's keyspaces: {error}"));
        let client = Client::builder(cluster.addresses().to_vec()).connect_deadline(PREPARE_MAX).connect().await;
        let admin = client.map_err(failed)?.admin();
        for track in &self.tracks {
            admin.drop_keyspace(&track.settings.keyspace).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Faults come and go under the workloads.
    async fn main(&mut self, cluster: &mut Cluster, nemesis: &mut Nemesis) -> Result<(), Error> {
        self.tell("running");
        let start =
            |track: &Track| workload::start(track.settings.clone(), track.doors.clone(), Arc::clone(&track.recorder));
        let running: Vec<workload::Running> = self.tracks.iter().map(start).collect();
        let hurting = async {
            sleep(CALM).await;
            let began = Instant::now();
            let mut schedule = Schedule::new(&self.settings.faults, self.settings.seed);
            loop {
                let left = self.settings.lasts.saturating_sub(began.elapsed());
                if left.is_zero() {
                    return Ok(());
                }
                let round = schedule.next(left);
                if round.is_empty() {
                    sleep(left).await;
                    return Ok(());
                }
                let told = |on: &[&str]| self.progress.send_modify(|progress| progress.fault = on.join(" + "));
                nemesis.round(cluster, &round, told).await?;
                let faults = nemesis.installed.values().sum();
                self.progress.send_modify(|progress| progress.faults = faults);
                cluster.look_for_fallen();
            }
        };
        let hurt = tokio::select! {
            hurt = hurting => hurt,
            never = self.count() => never,
        };
        self.set_phase(Phase::Heal);
        self.tell("healing");
        cluster.heal(Hits::ALL)?;
        let recovered = cluster.healthy(RECOVERY_MAX).await;
        self.unsound.extend(recovered.err().map(|why| format!("after the last fault: {why}")));
        sleep(CALM).await;
        for workload in running {
            workload.stop().await;
        }
        hurt
    }

    /// Tells how many operations there are, for ever.
    async fn count<T>(&self) -> T {
        loop {
            let of = |track: &Track| track.recorder.with_events(|events| events.len() as u64 / 2);
            let ops = self.tracks.iter().map(of).sum();
            self.progress.send_modify(|progress| progress.ops = ops);
            sleep(TELL_EVERY).await;
        }
    }

    fn set_phase(&self, phase: Phase) {
        for track in &self.tracks {
            track.recorder.set_phase(phase);
        }
    }

    /// Everything is compared and read, as it is and after all nodes were killed.
    async fn end(&mut self, cluster: &mut Cluster) -> Result<(), Error> {
        self.rest_and_read(cluster, "after the faults").await;
        // A cluster that is not sound now is judged as it is.
        if cluster.nodes.is_empty() || !self.unsound.is_empty() {
            return Ok(());
        }
        self.tell("killing all nodes once more");
        let names = cluster.names();
        let value = |state: &str| json!({ "id": "final", "state": state, "nodes": names, "what": "kill -9 of all" });
        self.note("restart-all", &value("installed"));
        cluster.nodes.iter().try_for_each(Node::strike)?;
        cluster.nodes.iter_mut().try_for_each(Node::kill)?;
        cluster.heal(Hits::ALL)?;
        self.note("restart-all", &value("healed"));
        let recovered = cluster.healthy(RECOVERY_MAX).await;
        self.unsound.extend(recovered.err().map(|why| format!("after a restart of all nodes: {why}")));
        self.rest_and_read(cluster, "after a restart of all nodes").await;
        Ok(())
    }

    async fn rest_and_read(&mut self, cluster: &Cluster, when: &str) {
        self.set_phase(Phase::Final);
        self.tell("comparing replicas");
        let rest = cluster.rest(RECOVERY_MAX).await;
        for digest in rest.digests {
            self.note(check::replicas::F, &digest);
        }
        self.unsound.extend(rest.problem.map(|why| format!("{when}: {why}")));
        self.tell("reading everything");
        let until = Instant::now() + FINAL_MAX;
        let reads = self.tracks.iter().map(|track| {
            let (settings, doors) = (track.settings.clone(), track.doors.clone());
            workload::final_reads(settings, doors, Arc::clone(&track.recorder), until)
        });
        let done = futures_util::future::join_all(reads).await;
        let failed = done.into_iter().filter_map(Result::err);
        self.unsound.extend(failed.map(|error| format!("{when}: {error}")));
    }

    fn note(&self, f: &str, value: &serde_json::Value) {
        for track in &self.tracks {
            track.recorder.nemesis(f, value.clone());
        }
    }

    fn info(&self, cluster: &Cluster, workload: &str) -> RunInfo {
        let settings = self.settings;
        let faults: Vec<&str> = settings.faults.iter().map(|fault| fault.name()).collect();
        RunInfo {
            schema: history::SCHEMA.to_owned(),
            tool: "drill".to_owned(),
            version: env!("MERIDIAN_VERSION").to_owned(),
            seed: settings.seed,
            plan_hash: settings.plan_hash(),
            started_wall_ms: self.started_wall_ms,
            duration_ns: u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX),
            clock: "CLOCK_MONOTONIC of the machine that drills".to_owned(),
            nodes: cluster.names(),
            workload: workload.to_owned(),
            promises: BTreeMap::from([("scan".to_owned(), "each partition at its own moment".to_owned())]),
            empty_at_start: true,
            config: json!({
                "faults": faults,
                "seconds": settings.lasts.as_secs(),
                "nodes": cluster.addresses(),
                "replicas": settings.replicas,
                "clients": settings.clients,
                "network": match (&settings.endpoints[..], settings.netns) {
                    ([], true) => "namespaces",
                    ([], false) => "proxies",
                    _ => "as it is",
                },
            }),
        }
    }

    fn judge(&self, cluster: &mut Cluster, nemesis: &Nemesis) -> Result<Report, Error> {
        let mut workloads = Vec::new();
        let mut summaries = Vec::new();
        let mut histories = Vec::new();
        for track in &self.tracks {
            let workload = track.settings.workload;
            track.recorder.finish().map_err(Error::io(format!("the history of {workload}")))?;
            let info = self.info(cluster, workload.name());
            export::run_info(self.settings, workload, &info)?;
            let events = track.recorder.events();
            summaries.push((workload, Summary::of(&events)));
            let verdicts = check::judge(workload.name(), &events);
            histories.push((workload.name().to_owned(), events.clone()));
            workloads.push(Judged { run: info, events, verdicts });
        }
        cluster.look_for_fallen();
        let fell = cluster.fallen().iter().map(|fallen| format!("{} ended by itself: {}", fallen.node, fallen.how));
        let processes: Vec<String> = fell.chain(nemesis.complaints.iter().cloned()).collect();
        let nodes = cluster.nodes.len() as u64;
        let mut of_cluster = vec![
            verdicts::verdict("recovery", &self.unsound, ("recoveries", if nodes == 0 { 1 } else { 2 })),
            verdicts::availability(&histories),
        ];
        if nodes > 0 {
            of_cluster.push(verdicts::verdict("processes", &processes, ("processes", nodes)));
        }
        let faults = |event: &&Event| event.process == Process::Nemesis && event.kind == Kind::Info;
        let events = histories.first().map(|(_, events)| events.iter().filter(faults).cloned().collect());
        let info = self.info(cluster, "cluster");
        workloads.push(Judged { run: info, events: events.unwrap_or_default(), verdicts: of_cluster });
        let gates = verdicts::gates(&Happened {
            wanted: &self.settings.faults,
            installed: &nemesis.installed,
            skipped: &nemesis.skipped,
            in_vain: &nemesis.in_vain,
            leader_changes: verdicts::leader_changes(histories.iter().flat_map(|(_, events)| events)),
            snapshots: cluster.nodes.iter().map(|node| node.said(telemetry::SNAPSHOT_INSTALLED)).sum(),
            summaries: &summaries,
        });
        let names: Vec<&str> = self.settings.workloads.iter().map(|workload| workload.name()).collect();
        let run = self.info(cluster, &names.join(", "));
        let report = Report { run, reproduce: self.settings.command(), workloads, gates };
        export::report(&self.settings.out, &report)?;
        Ok(report)
    }
}
