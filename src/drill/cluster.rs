//! The nodes of a drill and the network between them, as one thing that is started, hurt, healed and asked.

use super::{
    Error, api,
    network::Network,
    process::{Node, State},
    settings::{Fault, Hits, Settings},
};
use crate::proto::internal::ReplicaDigest;
use futures_util::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value as Json, json};
use std::{collections::BTreeMap, fs, path::Path, time::Duration};
use tokio::time::{Instant, sleep};

/// Patience with a cluster to which nothing was done yet.
const FORM_PATIENCE: Duration = Duration::from_secs(60);
/// How often something awaited is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest time that the sync of a lossy disk takes.
const LOSSY_SYNC_MS_MAX: u64 = 50;
/// Log bytes after which partitions are snapshotted, and those that are kept: low, so that nodes that were away get
/// snapshots.
const SNAPSHOT_BYTES: std::ops::Range<u64> = 4 << 10..32 << 10;
const LOG_KEEP_BYTES: std::ops::Range<u64> = 512..2 << 10;
const LOG_BYTES_MAX: u64 = 2 << 10;
/// Groups sleep whenever nobody asks anything for a moment, so that faults meet them asleep.
const SLEEP_AFTER_MS: u64 = 100;

/// A node that ended by itself although nobody asked it to.
#[derive(Clone, Debug)]
pub struct Fallen {
    /// Its name.
    pub node: String,
    /// How it ended, and its last words.
    pub how: String,
}

/// The cluster under drill.
#[derive(Debug)]
pub struct Cluster {
    /// Nodes of the drill's own; none for a cluster that runs elsewhere.
    pub nodes: Vec<Node>,
    network: Option<Network>,
    addresses: Vec<String>,
    /// How long a sync takes at most when nothing is wrong, in milliseconds; 0: as long as it takes.
    sync_ms: u64,
    /// Nodes that may end by themselves.
    doomed: Vec<usize>,
    fallen: Vec<Fallen>,
}

impl Cluster {
    /// A cluster that runs already, with all nodes that the first of `endpoints` which answers knows; nothing can be done
    /// to it.
    ///
    /// # Errors
    /// When none answers.
    pub async fn foreign(endpoints: &[String]) -> Result<Self, Error> {
        let asked = join_all(endpoints.iter().map(|endpoint| api::status(endpoint))).await;
        let problems = asked.iter().filter_map(|asked| asked.as_ref().err().cloned()).collect::<Vec<_>>();
        let status = asked.into_iter().find_map(Result::ok).ok_or_else(|| Error::NotReady(problems.join("; ")))?;
        let addresses = status.nodes.into_iter().map(|node| node.address).collect();
        let (doomed, fallen) = (Vec::new(), Vec::new());
        Ok(Self { nodes: Vec::new(), network: None, addresses, sync_ms: 0, doomed, fallen })
    }

    /// Starts nodes with everything of theirs in `dir`, forms the cluster, and waits until it is healthy.
    ///
    /// # Errors
    /// When that fails.
    pub async fn start(settings: &Settings, dir: &Path, network: Network) -> Result<Self, Error> {
        let mut rng = StdRng::seed_from_u64(settings.seed);
        let raft = [
            ("snapshot_bytes", rng.random_range(SNAPSHOT_BYTES)),
            ("log_keep_bytes", rng.random_range(LOG_KEEP_BYTES)),
            ("log_bytes_max", LOG_BYTES_MAX),
            ("sleep_after_ms", SLEEP_AFTER_MS),
        ];
        let lossy = settings.faults.contains(&Fault::PowerLoss);
        let sync_ms = if lossy { rng.random_range(5..=LOSSY_SYNC_MS_MAX) } else { 0 };
        let addresses: Vec<String> = (0..settings.nodes).map(|index| network.address(index)).collect();
        let mut nodes = Vec::new();
        for (index, address) in addresses.iter().enumerate() {
            let others: Vec<&str> = addresses.iter().filter(|other| *other != address).map(String::as_str).collect();
            let mut command = network.prefix_of(index);
            command.push(settings.binary.display().to_string());
            command.extend(["start", "--listen", address, "--http", "127.0.0.1:0"].map(str::to_owned));
            for (name, value) in raft {
                command.extend(["--set".to_owned(), format!("raft.{name}={value}")]);
            }
            if !others.is_empty() {
                command.extend(["--join".to_owned(), others.join(",")]);
            }
            command.extend(network.dial_of(index));
            let mut node = Node::new(format!("n{}", index + 1), address.clone(), dir, command)?;
            node.order(|orders| orders.sync_ms = sync_ms)?;
            node.start()?;
            nodes.push(node);
        }
        let (doomed, fallen) = (Vec::new(), Vec::new());
        let mut cluster = Self { nodes, network: Some(network), addresses, sync_ms, doomed, fallen };
        cluster.form(settings.replicas).await?;
        Ok(cluster)
    }

    async fn form(&mut self, replicas: u32) -> Result<(), Error> {
        let deadline = Instant::now() + FORM_PATIENCE;
        while let Err(why) = api::init(&self.addresses[0], replicas).await {
            if let Some(fallen) = self.look_for_fallen().first() {
                return Err(Error::NotReady(format!("{} ended at once: {}", fallen.node, fallen.how)));
            }
            if Instant::now() >= deadline {
                return Err(Error::NotReady(format!("the cluster could not be formed: {why}")));
            }
            sleep(LOOK_EVERY).await;
        }
        self.healthy(FORM_PATIENCE).await.map(|_took| ()).map_err(Error::NotReady)
    }

    /// `host:port` of every node.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Names of nodes, as in histories.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        (1..=self.addresses.len()).map(|number| format!("n{number}")).collect()
    }

    /// The network, if it is the drill's own.
    pub const fn network(&mut self) -> Option<&mut Network> {
        self.network.as_mut()
    }

    /// A node ends at once, and what it had on disk is gone.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn lose(&mut self, index: usize) -> Result<(), Error> {
        let node = &mut self.nodes[index];
        node.kill()?;
        fs::remove_dir_all(&node.data).map_err(Error::io(node.data.display().to_string()))
    }

    /// Whether syncs that are not waited for are lost with the process.
    #[must_use]
    pub const fn is_lossy(&self) -> bool {
        self.sync_ms > 0
    }

    /// This node may end by itself until the next heal.
    pub fn doom(&mut self, index: usize) {
        self.doomed.push(index);
    }

    /// Everything that was done to these is undone: paused nodes go on and dead ones start, the network works, the disks
    /// work and clocks are right. Asked again it does nothing.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn heal(&mut self, what: &[Hits]) -> Result<(), Error> {
        if what.contains(&Hits::Links) {
            self.network.as_mut().map_or(Ok(()), Network::heal)?;
        }
        if what.contains(&Hits::Insides) {
            let sync_ms = self.sync_ms;
            self.nodes.iter_mut().try_for_each(|node| node.relieve(sync_ms))?;
        }
        if what.contains(&Hits::Processes) {
            self.look_for_fallen();
            self.doomed.clear();
            self.nodes.iter_mut().try_for_each(|node| node.resume().and_then(|()| node.start()))?;
        }
        Ok(())
    }

    /// Nodes that ended by themselves since this was last asked; they count as down.
    pub fn look_for_fallen(&mut self) -> Vec<Fallen> {
        let mut found = Vec::new();
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let Some(status) = node.ended() else { continue };
            if !self.doomed.contains(&index) {
                found.push(Fallen { node: node.name.clone(), how: format!("{status}; {}", node.last_lines(5)) });
            }
        }
        self.fallen.extend(found.iter().cloned());
        found
    }

    /// Every node that ever ended by itself although it was not doomed.
    #[must_use]
    pub fn fallen(&self) -> &[Fallen] {
        &self.fallen
    }

    /// Waits until every node finds the cluster healthy and complete; how long that took.
    ///
    /// # Errors
    /// What is wrong still, when it does not become healthy in time.
    pub async fn healthy(&self, patience: Duration) -> Result<Duration, String> {
        let began = Instant::now();
        loop {
            let asked = join_all(self.addresses.iter().map(|address| self.problem(address))).await;
            let problems: Vec<String> = asked.into_iter().flatten().collect();
            if problems.is_empty() {
                return Ok(began.elapsed());
            }
            if began.elapsed() >= patience {
                return Err(format!("not healthy after {patience:?}: {}", problems.join("; ")));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn problem(&self, address: &str) -> Option<String> {
        let status = match api::status(address).await {
            Ok(status) => status,
            Err(why) => return Some(why),
        };
        let alive = status.nodes.iter().filter(|node| node.alive).count();
        if !status.healthy {
            return Some(format!("{address} says: {}", status.problems.join(", ")));
        }
        (alive < self.nodes.len()).then(|| format!("{address} knows {alive} of {} nodes", self.nodes.len()))
    }

    /// The node that leads a partition drawn from all, or the placement driver, as some node sees it.
    pub async fn leader(&self, draw: u64, of_driver: bool) -> Option<(usize, String)> {
        for node in self.nodes.iter().filter(|node| node.state() == State::Running) {
            let Ok(status) = api::status(&node.address).await else { continue };
            let by_id: BTreeMap<u64, &str> = status.nodes.iter().map(|node| (node.id, node.address.as_str())).collect();
            let (leader, of) = if of_driver {
                (status.driver_leader, "the placement driver".to_owned())
            } else {
                let led: Vec<_> = api::partitions(&node.address).await.unwrap_or_default();
                let led: Vec<_> = led.into_iter().filter(|partition| partition.leader != 0).collect();
                let Some(partition) = led.get((draw % led.len().max(1) as u64) as usize) else { continue };
                (partition.leader, format!("partition {}", partition.id))
            };
            let index = by_id.get(&leader).and_then(|address| self.nodes.iter().position(|n| n.address == *address));
            if let Some(index) = index {
                return Some((index, of));
            }
        }
        None
    }

    /// Waits until all replicas of every partition have applied the same, and tells what they hold.
    pub async fn rest(&self, patience: Duration) -> Rest {
        let began = Instant::now();
        loop {
            let answers = join_all(self.addresses.iter().map(|address| api::digests(address))).await;
            let rest = rest_of(&self.names(), &answers);
            if rest.problem.is_none() || began.elapsed() >= patience {
                return rest;
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// What replicas hold when nothing is written any more.
#[derive(Debug, Default)]
pub struct Rest {
    /// Of each partition: `{"part", "applied": {node: index}, "digests": {node: digest}}`.
    pub digests: Vec<Json>,
    /// Why they are not at rest: replicas at different points, or nodes that do not answer.
    pub problem: Option<String>,
}

type Digests = Result<Vec<ReplicaDigest>, String>;

fn rest_of(names: &[String], answers: &[Digests]) -> Rest {
    let mut rest = Rest::default();
    let mut partitions: BTreeMap<u64, BTreeMap<&str, &ReplicaDigest>> = BTreeMap::new();
    for (name, answer) in names.iter().zip(answers) {
        match answer {
            Ok(held) => {
                for replica in held {
                    partitions.entry(replica.partition).or_default().insert(name, replica);
                }
            }
            Err(why) => rest.problem = Some(why.clone()),
        }
    }
    for (partition, held) in partitions {
        let applied: BTreeMap<&str, u64> = held.iter().map(|(node, replica)| (*node, replica.applied)).collect();
        let digests: BTreeMap<&str, String> =
            held.iter().map(|(node, replica)| (*node, format!("{:016x}", replica.digest))).collect();
        if applied.values().any(|index| Some(index) != applied.values().next()) {
            rest.problem = Some(format!("replicas of partition {partition} are at {applied:?}"));
        }
        rest.digests.push(json!({ "part": partition, "applied": applied, "digests": digests }));
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(partition: u64, applied: u64, digest: u64) -> Digests {
        Ok(vec![ReplicaDigest { partition, applied, digest }])
    }

    #[test]
    fn replicas_are_at_rest_when_all_answer_and_are_at_the_same_point() {
        let names = ["n1".to_owned(), "n2".to_owned()];
        let rest = |a, b| rest_of(&names, &[a, b]);
        let equal = rest(held(1, 5, 7), held(1, 5, 8));
        assert_eq!(equal.problem, None, "whether they are equal is for the checker to say");
        assert_eq!(equal.digests[0]["digests"]["n2"], "0000000000000008");
        assert!(rest(held(1, 5, 7), held(1, 6, 7)).problem.unwrap().contains("partition 1"));
        assert_eq!(rest(held(1, 5, 7), Err("gone".to_owned())).problem.unwrap(), "gone");
    }
}
