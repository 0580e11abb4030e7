//! Installs faults and heals them, and says so in every history.
//!
//! Invariants:
//! * faults that are on together take no more nodes than one of them may, unless all are hit;
//! * every fault of a round is healed before the next round, and the cluster had its time to recover;
//! * what cannot be done here is recorded as skipped, with the reason, and never as installed;
//! * what the cluster is asked for is installed once the map shows it, and counts as little as what is skipped before.

use super::{
    Error,
    cluster::Cluster,
    operator::{Change, Operator},
    proxy::Mode,
    schedule::Turn,
    settings::{Fault, Settings},
};
use crate::{control::Disk, env, proof::recorder::Recorder};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::{Value as Json, json};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long the cluster may take to be healthy again before the next fault comes regardless.
const SETTLE_MAX: Duration = Duration::from_secs(15);
/// How long it may take until the map shows what was asked for: longer than the library asks.
const CHANGE_MAX: Duration = Duration::from_secs(12);
/// How long it may take until a node that is lost is removed, its replicas built anew elsewhere.
const REMOVED_MAX: Duration = Duration::from_secs(30);
/// How often a change that was asked for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// An outage of all nodes lasts no longer.
const OUTAGE_MAX: Duration = Duration::from_millis(1_500);
/// Delays of slow links.
const DELAY_MS: std::ops::Range<u64> = 20..300;
/// Rates of dripping links.
const DRIP_BYTES_PER_S: std::ops::Range<u32> = 4_000..64_000;
/// Length of the syncs of a slow disk.
const SLOW_SYNC_MS: std::ops::Range<u64> = 50..500;
/// Share of power losses that hit all nodes; and of those before which disks stall, for so long.
const ALL_SHARE: f64 = 0.6;
const STALL_SHARE: f64 = 0.7;
const STALL_MS: std::ops::Range<u64> = 100..600;
/// Clocks jump by at least and at most this, in milliseconds; small jumps are as likely as large ones.
const JUMP_MS: (f64, f64) = (50.0, 6.0 * 3_600_000.0);

/// A fault that is on.
struct Installed {
    nodes: Vec<usize>,
    what: String,
    /// All nodes are hit: nobody can answer.
    outage: bool,
}

/// The same, until it is healed.
struct On {
    fault: Fault,
    /// How long it lasts once it is on.
    lasts: Duration,
    until: Instant,
    installed: Installed,
    /// What is said of it in histories.
    said: Json,
    /// What the cluster was asked for, until the map shows it.
    change: Option<Change>,
    /// What the next cuts, or merges, follow from, and until when there are any.
    again: Option<(StdRng, Instant)>,
    /// The id of a node that is lost.
    lost: Option<u64>,
}

/// Why a fault was not installed.
type Skipped = String;

/// Hurts a cluster.
#[derive(Debug)]
pub struct Nemesis {
    recorders: Vec<Arc<Recorder>>,
    operator: Operator,
    spare: usize,
    replicas: usize,
    next_id: u64,
    /// New processes that the map is to show.
    joining: Vec<Change>,
    /// Faults installed so far.
    pub installed: BTreeMap<Fault, u64>,
    /// Faults that could not be installed, and why.
    pub skipped: BTreeMap<Fault, String>,
    /// Changes that the cluster was asked for in vain, and why.
    pub in_vain: BTreeMap<Fault, String>,
    /// What was not as it must be.
    pub complaints: Vec<String>,
}

impl Nemesis {
    /// Records what it does with all of these; takes at most as many nodes at a time as every group can miss, unless it
    /// takes all.
    #[must_use]
    pub fn new(recorders: Vec<Arc<Recorder>>, operator: Operator, settings: &Settings) -> Self {
        Self {
            recorders,
            operator,
            spare: settings.spare(),
            replicas: settings.replicas as usize,
            next_id: 1,
            joining: Vec::new(),
            installed: BTreeMap::new(),
            skipped: BTreeMap::new(),
            in_vain: BTreeMap::new(),
            complaints: Vec::new(),
        }
    }

    /// Installs and heals the faults of a round, each at its time, and waits for the cluster to recover. `tell` hears
    /// what is on.
    ///
    /// # Errors
    /// When the drill itself fails.
    pub async fn round(&mut self, cluster: &mut Cluster, round: &[Turn], tell: impl Fn(&[&str])) -> Result<(), Error> {
        let began = Instant::now();
        let mut coming = round.iter().peekable();
        let mut on: Vec<On> = Vec::new();
        loop {
            let due = coming.peek().map(|turn| began + turn.after);
            let Some(next) = due.into_iter().chain(on.iter().map(|on| on.until)).min() else { break };
            let now = Instant::now();
            if now < next && on.iter().any(|on| on.change.is_some()) {
                sleep_until(next.min(now + LOOK_EVERY)).await;
                self.look(cluster, &mut on).await;
                continue;
            }
            sleep_until(next).await;
            if due == Some(next) {
                let turn = coming.next().expect("it is due");
                let begun = self.begin(cluster, turn, &on).await?;
                on.extend(begun);
            } else {
                for over in on.extract_if(.., |on| on.until <= next) {
                    self.end(cluster, over).await?;
                }
            }
            tell(&on.iter().map(|on| on.installed.what.as_str()).collect::<Vec<_>>());
        }
        self.settle(cluster, round).await;
        Ok(())
    }

    /// Waits for the cluster to recover, and for what it is to show by then.
    async fn settle(&mut self, cluster: &Cluster, round: &[Turn]) {
        if round.iter().any(|turn| turn.fault == Fault::Drain)
            && let Err(why) = self.operator.resume_all(SETTLE_MAX).await
        {
            tracing::warn!(%why, "a drain was not taken back");
        }
        if let Err(why) = cluster.healthy(SETTLE_MAX).await {
            tracing::warn!(%why, "the next fault comes regardless");
        }
        for mut joining in std::mem::take(&mut self.joining) {
            let shown = timeout(CHANGE_MAX, &mut joining).await;
            joining.abort();
            match shown {
                Ok(Ok(Ok(_))) => *self.installed.entry(Fault::Replace).or_default() += 1,
                _ => drop(self.in_vain.insert(Fault::Replace, "the map does not show the new process".to_owned())),
            }
        }
    }

    /// Sees what the map shows by now of what was asked for.
    async fn look(&mut self, cluster: &Cluster, on: &mut Vec<On>) {
        let finished = |on: &mut On| on.change.as_ref().is_some_and(Change::is_finished);
        for mut asked in on.extract_if(.., finished).collect::<Vec<_>>() {
            let Some(change) = asked.change.take() else { continue };
            match change.await.unwrap_or_else(|ended| Err(ended.to_string())) {
                Ok(shown) => {
                    // It has been said of a node that is lost, and counts when there is another in its place.
                    if asked.lost.is_none() {
                        asked.installed.what = shown;
                        let said = said(cluster, &asked.said["id"], &asked.installed);
                        asked.said = with_state(&said, "installed");
                        self.say(asked.fault, asked.said.clone());
                        *self.installed.entry(asked.fault).or_default() += 1;
                    }
                    asked.until = Instant::now() + asked.lasts;
                    if let Some((draws, until)) = &mut asked.again {
                        asked.change = (Instant::now() < *until).then(|| self.reshape(asked.fault, draws.random()));
                        asked.until = Instant::now() + if asked.change.is_some() { CHANGE_MAX } else { Duration::ZERO };
                    }
                    on.push(asked);
                }
                // What was cut or merged before stays so.
                Err(why) if asked.said["state"] == "installed" => {
                    self.in_vain.insert(asked.fault, why);
                    asked.until = Instant::now();
                    on.push(asked);
                }
                Err(why) => self.fail(asked.fault, &asked.said["id"], why),
            }
        }
    }

    /// Installs a fault beside those that are on.
    async fn begin(&mut self, cluster: &mut Cluster, turn: &Turn, on: &[On]) -> Result<Option<On>, Error> {
        let id = self.next_id;
        self.next_id += 1;
        let mut rng = StdRng::seed_from_u64(turn.seed);
        let victims = self.victims(cluster.addresses().len(), on, &mut rng);
        if turn.fault.is_asked_for() {
            return Ok(Some(self.ask(cluster, turn, id, victims[0])));
        }
        if turn.fault == Fault::Replace {
            return self.replace(cluster, turn, id, victims[0]).await;
        }
        let installed = match install(cluster, turn.fault, victims, &mut rng).await? {
            Ok(installed) => installed,
            Err(why) => {
                self.say(turn.fault, json!({ "id": id, "state": "skipped", "nodes": [], "what": why }));
                self.skipped.insert(turn.fault, why);
                return Ok(None);
            }
        };
        *self.installed.entry(turn.fault).or_default() += 1;
        let said = said(cluster, &id.into(), &installed);
        self.say(turn.fault, with_state(&said, "installed"));
        let lasts = if installed.outage { turn.lasts.min(OUTAGE_MAX) } else { turn.lasts };
        let until = Instant::now() + lasts;
        Ok(Some(On { fault: turn.fault, lasts, until, installed, said, change: None, again: None, lost: None }))
    }

    /// Asks the cluster for a change, and does not wait.
    fn ask(&self, cluster: &Cluster, turn: &Turn, id: u64, victim: usize) -> On {
        let now = Instant::now();
        let mut rng = StdRng::seed_from_u64(turn.seed);
        let (change, nodes, what, again) = match turn.fault {
            Fault::Drain => {
                let address = cluster.addresses()[victim].clone();
                let what = format!("asking {address} to drain");
                (self.operator.drain(address), vec![victim], what, None)
            }
            // One after the other.
            _ => {
                let change = self.reshape(turn.fault, rng.random());
                let what = if turn.fault == Fault::Merge { "merging partitions" } else { "cutting partitions" };
                (change, Vec::new(), what.to_owned(), Some((rng, now + turn.lasts)))
            }
        };
        let installed = Installed { nodes, what, outage: false };
        let (until, said, change) = (now + CHANGE_MAX, json!({ "id": id }), Some(change));
        On { fault: turn.fault, lasts: turn.lasts, until, installed, said, change, again, lost: None }
    }

    fn reshape(&self, fault: Fault, draw: u64) -> Change {
        if fault == Fault::Merge { self.operator.merge(draw) } else { self.operator.divide(draw) }
    }

    /// Takes a node away for good, with its disk, and has it removed. Before that every partition must have all its
    /// replicas, and after it as many nodes as it wants.
    async fn replace(
        &mut self,
        cluster: &mut Cluster,
        turn: &Turn,
        id: u64,
        victim: usize,
    ) -> Result<Option<On>, Error> {
        if cluster.nodes.len() <= self.replicas {
            let why = format!("{} nodes for {} replicas can spare none", cluster.nodes.len(), self.replicas);
            self.say(turn.fault, json!({ "id": id, "state": "skipped", "nodes": [], "what": why }));
            self.skipped.insert(turn.fault, why);
            return Ok(None);
        }
        let whole = cluster.healthy(Duration::ZERO).await.map(drop);
        let node = self.operator.id_at(&cluster.addresses()[victim]).await;
        let node = match whole.and(node) {
            Ok(node) => node,
            Err(why) => {
                self.fail(turn.fault, &id.into(), why);
                return Ok(None);
            }
        };
        cluster.lose(victim)?;
        let installed = hurt(cluster, vec![victim], "lost with its disk:");
        let said = said(cluster, &id.into(), &installed);
        self.say(turn.fault, with_state(&said, "installed"));
        let (until, change) = (Instant::now() + REMOVED_MAX, Some(self.operator.remove(node)));
        // The new process comes as soon as it may.
        let lasts = Duration::ZERO;
        Ok(Some(On { fault: turn.fault, lasts, until, installed, said, change, again: None, lost: Some(node) }))
    }

    /// Says that something was asked for, or tried, in vain.
    fn fail(&mut self, fault: Fault, id: &Json, why: String) {
        self.say(fault, json!({ "id": id, "state": "skipped", "nodes": [], "what": why }));
        self.in_vain.insert(fault, why);
    }

    async fn end(&mut self, cluster: &mut Cluster, over: On) -> Result<(), Error> {
        if let Some(change) = over.change {
            change.abort();
            if over.lost.is_some() {
                // Its process would be refused.
                let what = &over.installed.what;
                self.complaints.push(format!("{what}; it was not removed from the cluster within {REMOVED_MAX:?}"));
            }
            self.fail(over.fault, &over.said["id"], format!("the map did not show it within {CHANGE_MAX:?}"));
            return Ok(());
        }
        if over.fault == Fault::DiskFull {
            self.disk_full_must_end(cluster, &over.installed).await;
        }
        cluster.heal(over.fault.hits())?;
        if let Some(lost) = over.lost {
            let address = cluster.addresses()[over.installed.nodes[0]].clone();
            self.joining.push(self.operator.replaced(address, lost));
        }
        if over.fault == Fault::Drain {
            let operator = self.operator.clone();
            env::spawn(async move { operator.resume_all(SETTLE_MAX).await });
        }
        self.say(over.fault, with_state(&over.said, "healed"));
        Ok(())
    }

    /// A minority: nodes that are taken already, before others.
    fn victims(&self, count: usize, on: &[On], rng: &mut StdRng) -> Vec<usize> {
        let takes = |on: &&On| on.fault.takes_nodes() && !on.installed.outage;
        let taken: Vec<usize> = on.iter().filter(takes).flat_map(|on| on.installed.nodes.iter().copied()).collect();
        let mut victims: Vec<usize> = (0..count).collect();
        victims.shuffle(rng);
        victims.sort_by_key(|index| !taken.contains(index));
        victims.truncate(rng.random_range(1..=self.spare.max(1)));
        victims
    }

    fn say(&self, fault: Fault, value: serde_json::Value) {
        for recorder in &self.recorders {
            recorder.nemesis(fault.name(), value.clone());
        }
    }

    /// A node that cannot write its log stops, and says why.
    async fn disk_full_must_end(&mut self, cluster: &mut Cluster, installed: &Installed) {
        for index in &installed.nodes {
            let node = &mut cluster.nodes[*index];
            if node.wait_end(SETTLE_MAX).await.is_none() {
                self.complaints.push(format!("{} goes on although its disk is full", node.name));
            } else if !node.last_lines(20).contains("no space left") {
                self.complaints.push(format!("{} does not say that its disk is full", node.name));
            }
        }
    }
}

fn said(cluster: &Cluster, id: &Json, installed: &Installed) -> Json {
    let names = cluster.names();
    let names: Vec<&str> = installed.nodes.iter().map(|index| names[*index].as_str()).collect();
    json!({ "id": id, "nodes": names, "what": installed.what, "outage": installed.outage })
}

fn with_state(said: &Json, state: &str) -> Json {
    let mut said = said.clone();
    said["state"] = state.into();
    said
}

async fn install(
    cluster: &mut Cluster,
    fault: Fault,
    victims: Vec<usize>,
    rng: &mut StdRng,
) -> Result<Result<Installed, Skipped>, Error> {
    let all: Vec<usize> = (0..cluster.nodes.len()).collect();
    Ok(match fault {
        Fault::Kill => Ok(killed(cluster, victims, "kill -9 of")?),
        Fault::RestartAll => Ok(killed(cluster, all, "kill -9 of")?),
        Fault::PowerLoss if !cluster.is_lossy() => Err("the disks of these nodes are not lossy".to_owned()),
        Fault::PowerLoss => {
            let victims = if rng.random_bool(ALL_SHARE) { all } else { victims };
            Ok(power_loss(cluster, victims, rng).await?)
        }
        Fault::Pause => {
            victims.iter().try_for_each(|index| cluster.nodes[*index].pause())?;
            Ok(hurt(cluster, victims, "SIGSTOP to"))
        }
        Fault::Partition => {
            isolate(cluster, &victims)?;
            Ok(hurt(cluster, victims, "cut off:"))
        }
        Fault::OneWay => one_way(cluster, victims[0], rng)?,
        Fault::Ring => ring(cluster, rng)?,
        Fault::IsolateLeader => isolate_leader(cluster, rng, false).await?,
        Fault::IsolateDriver => isolate_leader(cluster, rng, true).await?,
        Fault::Slow => Ok(slow(cluster, victims[0], rng)?),
        Fault::Stall => Ok(stall(cluster, victims[0], rng)?),
        Fault::Clock => Ok(jump(cluster, rng)?),
        Fault::Divide | Fault::Merge | Fault::Drain | Fault::Replace => {
            Err("the cluster has to be asked for it".to_owned())
        }
        Fault::DiskFull => {
            let victim = victims[0];
            cluster.doom(victim);
            cluster.nodes[victim].order(|orders| orders.disk = Disk::Full)?;
            Ok(hurt(cluster, vec![victim], "disk full:"))
        }
    })
}

fn hurt(cluster: &Cluster, nodes: Vec<usize>, what: &str) -> Installed {
    let names: Vec<&str> = nodes.iter().map(|index| cluster.nodes[*index].name.as_str()).collect();
    Installed { what: format!("{what} {}", names.join(", ")), outage: nodes.len() == cluster.nodes.len(), nodes }
}

fn killed(cluster: &mut Cluster, victims: Vec<usize>, what: &str) -> Result<Installed, Error> {
    // All are struck before any is waited for: while one ends, another would sync what the power loss is to take.
    victims.iter().try_for_each(|index| cluster.nodes[*index].strike())?;
    victims.iter().try_for_each(|index| cluster.nodes[*index].kill())?;
    Ok(hurt(cluster, victims, what))
}

/// Mostly the disks stall for a moment before: then nothing that is acknowledged in it can be durable.
async fn power_loss(cluster: &mut Cluster, victims: Vec<usize>, rng: &mut StdRng) -> Result<Installed, Error> {
    if rng.random_bool(STALL_SHARE) {
        for index in &victims {
            cluster.nodes[*index].order(|orders| orders.disk = Disk::Stalled)?;
        }
        sleep(Duration::from_millis(rng.random_range(STALL_MS))).await;
    }
    killed(cluster, victims, "power loss of")
}

fn cut(cluster: &mut Cluster, from: usize, to: usize) -> Result<(), Error> {
    cluster.network().map_or(Ok(()), |network| network.cut(from, to))
}

/// Nobody outside hears these nodes, and they hear nobody outside.
fn isolate(cluster: &mut Cluster, inside: &[usize]) -> Result<(), Error> {
    for other in (0..cluster.nodes.len()).filter(|other| !inside.contains(other)) {
        for node in inside {
            cut(cluster, *node, other)?;
            cut(cluster, other, *node)?;
        }
    }
    Ok(())
}

fn one_way(cluster: &mut Cluster, victim: usize, rng: &mut StdRng) -> Result<Result<Installed, Skipped>, Error> {
    let mute = rng.random_bool(0.5);
    for other in (0..cluster.nodes.len()).filter(|other| *other != victim) {
        let (from, to) = if mute { (victim, other) } else { (other, victim) };
        cut(cluster, from, to)?;
    }
    Ok(Ok(hurt(cluster, vec![victim], if mute { "no longer heard:" } else { "no longer hears:" })))
}

/// Every node keeps its nearest neighbours: so many that of any three nodes two can talk.
fn ring(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Result<Installed, Skipped>, Error> {
    let count = cluster.nodes.len();
    if count < 3 {
        return Ok(Err("a ring needs three nodes".to_owned()));
    }
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(rng);
    for (at, from) in order.iter().enumerate() {
        for (other, to) in order.iter().enumerate().filter(|(other, _)| *other != at) {
            let apart = at.abs_diff(other);
            // Three in a ring are all neighbours: there the ring is open, between its ends.
            let far = if count == 3 { apart == 2 } else { apart.min(count - apart) > count / 3 };
            if far {
                cut(cluster, *from, *to)?;
            }
        }
    }
    let mut installed = hurt(cluster, order, "only neighbours hear each other:");
    installed.outage = false;
    Ok(Ok(installed))
}

async fn isolate_leader(
    cluster: &mut Cluster,
    rng: &mut StdRng,
    of_driver: bool,
) -> Result<Result<Installed, Skipped>, Error> {
    let Some((leader, of)) = cluster.leader(rng.random(), of_driver).await else {
        return Ok(Err("no leader is known".to_owned()));
    };
    isolate(cluster, &[leader])?;
    let mut installed = hurt(cluster, vec![leader], "cut off:");
    installed.what.push_str(&format!(", leader of {of}"));
    Ok(Ok(installed))
}

fn slow(cluster: &mut Cluster, victim: usize, rng: &mut StdRng) -> Result<Installed, Error> {
    let can_shape = cluster.network().is_some_and(|network| network.can_shape());
    let count = cluster.nodes.len();
    let mode = match rng.random_range(0..3) {
        0 if can_shape => Mode::Slow { delay: Duration::from_millis(rng.random_range(DELAY_MS)) },
        1 if can_shape => Mode::Drip { bytes_per_s: rng.random_range(DRIP_BYTES_PER_S) },
        _ => {
            let sync_ms = rng.random_range(SLOW_SYNC_MS);
            cluster.nodes[victim].order(|orders| orders.sync_ms = sync_ms)?;
            return Ok(hurt(cluster, vec![victim], &format!("syncs take {sync_ms} ms:")));
        }
    };
    shape(cluster, victim, count, mode);
    let what = match mode {
        Mode::Slow { delay } => format!("links {} ms late:", delay.as_millis()),
        _ => "links drip:".to_owned(),
    };
    Ok(hurt(cluster, vec![victim], &what))
}

fn stall(cluster: &mut Cluster, victim: usize, rng: &mut StdRng) -> Result<Installed, Error> {
    let count = cluster.nodes.len();
    let can_shape = cluster.network().is_some_and(|network| network.can_shape());
    if can_shape && rng.random_bool(0.5) {
        shape(cluster, victim, count, Mode::Refuse);
        return Ok(hurt(cluster, vec![victim], "connections refused:"));
    }
    cluster.nodes[victim].order(|orders| orders.disk = Disk::Stalled)?;
    Ok(hurt(cluster, vec![victim], "no sync ends:"))
}

/// All links of a node, both ways.
fn shape(cluster: &mut Cluster, victim: usize, count: usize, mode: Mode) {
    let Some(network) = cluster.network() else { return };
    for other in (0..count).filter(|other| *other != victim) {
        network.shape(victim, other, mode);
        network.shape(other, victim, mode);
    }
}

fn jump(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Installed, Error> {
    let mut nodes: Vec<usize> = (0..cluster.nodes.len()).collect();
    nodes.shuffle(rng);
    nodes.truncate(rng.random_range(1..=nodes.len()));
    let mut what = Vec::new();
    for index in &nodes {
        let size = rng.random_range(JUMP_MS.0.ln()..JUMP_MS.1.ln()).exp() as i64;
        let offset = if rng.random_bool(0.5) { size } else { -size };
        let node = &mut cluster.nodes[*index];
        node.order(|orders| orders.wall_offset_ms = offset)?;
        what.push(format!("{} {:+.1} s", node.name, offset as f64 / 1_000.0));
    }
    Ok(Installed { what: format!("clocks jump: {}", what.join(", ")), outage: false, nodes })
}
