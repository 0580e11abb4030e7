//! Installs faults and heals them, and says so in every history.
//!
//! Invariants:
//! * faults that are on together take no more nodes than one of them may, unless all are hit;
//! * every fault of a round is healed before the next round, and the cluster had its time to recover;
//! * what cannot be done here is recorded as skipped, with the reason, and never as installed.

use super::{Error, cluster::Cluster, proxy::Mode, schedule::Turn, settings::Fault};
use crate::{control::Disk, proof::recorder::Recorder};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::{Value as Json, json};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, sleep_until};

/// How long the cluster may take to be healthy again before the next fault comes regardless.
const SETTLE_MAX: Duration = Duration::from_secs(15);
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
    until: Instant,
    installed: Installed,
    /// What is said of it in histories.
    said: Json,
}

/// Why a fault was not installed.
type Skipped = String;

/// Hurts a cluster.
#[derive(Debug)]
pub struct Nemesis {
    recorders: Vec<Arc<Recorder>>,
    spare: usize,
    next_id: u64,
    /// Faults installed so far.
    pub installed: BTreeMap<Fault, u64>,
    /// Faults that could not be installed, and why.
    pub skipped: BTreeMap<Fault, String>,
    /// What was not as it must be.
    pub complaints: Vec<String>,
}

impl Nemesis {
    /// Records what it does with all of these; takes at most `spare` nodes at a time, unless it takes all.
    #[must_use]
    pub fn new(recorders: Vec<Arc<Recorder>>, spare: usize) -> Self {
        let (installed, skipped, complaints) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { recorders, spare, next_id: 1, installed, skipped, complaints }
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
            let first_end = on.iter().map(|on| on.until).min();
            match (coming.peek(), first_end) {
                (Some(turn), end) if end.is_none_or(|end| began + turn.after <= end) => {
                    sleep_until(began + turn.after).await;
                    let begun = self.begin(cluster, turn, &on).await?;
                    on.extend(begun);
                    coming.next();
                }
                (_, Some(end)) => {
                    sleep_until(end).await;
                    for over in on.extract_if(.., |on| on.until <= end) {
                        self.end(cluster, &over).await?;
                    }
                }
                (_, None) => break,
            }
            tell(&on.iter().map(|on| on.installed.what.as_str()).collect::<Vec<_>>());
        }
        if let Err(why) = cluster.healthy(SETTLE_MAX).await {
            tracing::warn!(%why, "the next fault comes regardless");
        }
        Ok(())
    }

    /// Installs a fault beside those that are on.
    async fn begin(&mut self, cluster: &mut Cluster, turn: &Turn, on: &[On]) -> Result<Option<On>, Error> {
        let id = self.next_id;
        self.next_id += 1;
        let mut rng = StdRng::seed_from_u64(turn.seed);
        let victims = self.victims(cluster.nodes.len(), on, &mut rng);
        let installed = match install(cluster, turn.fault, victims, &mut rng).await? {
            Ok(installed) => installed,
            Err(why) => {
                self.say(turn.fault, json!({ "id": id, "state": "skipped", "nodes": [], "what": why }));
                self.skipped.insert(turn.fault, why);
                return Ok(None);
            }
        };
        *self.installed.entry(turn.fault).or_default() += 1;
        let names: Vec<&str> = installed.nodes.iter().map(|index| cluster.nodes[*index].name.as_str()).collect();
        let said = json!({ "id": id, "nodes": names, "what": installed.what, "outage": installed.outage });
        self.say(turn.fault, with_state(&said, "installed"));
        let lasts = if installed.outage { turn.lasts.min(OUTAGE_MAX) } else { turn.lasts };
        Ok(Some(On { fault: turn.fault, until: Instant::now() + lasts, installed, said }))
    }

    async fn end(&mut self, cluster: &mut Cluster, over: &On) -> Result<(), Error> {
        if over.fault == Fault::DiskFull {
            self.disk_full_must_end(cluster, &over.installed).await;
        }
        cluster.heal(over.fault.hits())?;
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
