//! Changes that are asked of the cluster rather than done to it: partitions are cut and merged, a node drains, a new process takes
//! the place of one that is lost. Each is asked for by way of the client library, and then looked for in the map.
//!
//! Invariants:
//! * a change has happened only once the map shows it;
//! * a question is bounded by the library, and a look that goes on is by its caller, who aborts it.

use crate::{client::Client, env, proto::v1};
use bytes::Bytes;
use std::{collections::BTreeSet, time::Duration};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};

/// How often the map is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A keyspace with so many partitions is not cut any more: each is a process's work for nothing after a while.
const PARTITIONS_MAX: usize = 48;
/// Partitions that are tried before none can be cut, or merged.
const ATTEMPTS: usize = 4;
/// How often a drain that is refused is asked for, and the pause between: less than the map is waited for.
const DRAIN_ATTEMPTS: usize = 10;
const DRAIN_PAUSE: Duration = Duration::from_millis(500);

/// A change under way: what the map shows in the end, or why it shows nothing.
pub type Change = JoinHandle<Result<String, String>>;

/// Asks for changes. Clones are the same.
#[derive(Clone, Debug)]
pub struct Operator {
    client: Client,
    /// Keyspaces whose partitions may be cut and merged.
    keyspaces: Vec<String>,
}

impl Operator {
    /// Cuts and merges partitions of these keyspaces only.
    #[must_use]
    pub const fn new(client: Client, keyspaces: Vec<String>) -> Self {
        Self { client, keyspaces }
    }

    /// Has a partition, which follows from `draw`, cut in its middle.
    #[must_use]
    pub fn divide(&self, draw: u64) -> Change {
        let this = self.clone();
        env::spawn(async move {
            let (keyspace, ids) = this.choose(draw).await?;
            if ids.len() >= PARTITIONS_MAX {
                return Err(format!("{keyspace} has {} partitions already", ids.len()));
            }
            let mut refused = format!("{keyspace} has no partitions");
            for id in ids.into_iter().take(ATTEMPTS) {
                match this.cut(&keyspace, id).await {
                    Ok(child) => return Ok(format!("p{id} is cut, p{child} holds its upper part")),
                    // It may be too small.
                    Err(why) => refused = why,
                }
            }
            Err(refused)
        })
    }

    /// Has a partition, which follows from `draw`, and the one after it become one.
    #[must_use]
    pub fn merge(&self, draw: u64) -> Change {
        let this = self.clone();
        env::spawn(async move {
            let (keyspace, ids) = this.choose(draw).await?;
            let mut refused = format!("{keyspace} has one partition, which has no neighbour");
            let some = if ids.len() > 1 { ATTEMPTS } else { 0 };
            for id in ids.into_iter().take(some) {
                match this.unite(&keyspace, id).await {
                    Ok(reply) => return Ok(format!("p{} holds what p{} held", reply.partition, reply.absorbed)),
                    // It may be the last one, or hold too much.
                    Err(why) => refused = why,
                }
            }
            Err(refused)
        })
    }

    /// A keyspace and its partitions, from any of them on.
    async fn choose(&self, draw: u64) -> Result<(String, Vec<u64>), String> {
        let count = self.keyspaces.len().max(1) as u64;
        let keyspace = self.keyspaces.get((draw % count) as usize).ok_or("no keyspace may be cut or merged")?;
        let mut ids: Vec<u64> = self.partitions(keyspace).await?.into_iter().collect();
        let first = (draw / count) as usize % ids.len().max(1);
        ids.rotate_left(first);
        Ok((keyspace.clone(), ids))
    }

    /// Has a partition cut, and waits until the map shows its child.
    async fn cut(&self, keyspace: &str, partition: u64) -> Result<u64, String> {
        let request = v1::SplitPartitionRequest { keyspace: keyspace.to_owned(), partition, at: Bytes::new() };
        let reply = self.client.admin().split_partition(request).await.map_err(|error| error.to_string())?;
        while !self.partitions(keyspace).await.is_ok_and(|ids| ids.contains(&reply.child)) {
            sleep(LOOK_EVERY).await;
        }
        Ok(reply.child)
    }

    /// Has a partition and the one after it merged, and waits until the map shows one of them no more.
    async fn unite(&self, keyspace: &str, partition: u64) -> Result<v1::MergePartitionReply, String> {
        let reply = self.client.admin().merge_partition(partition, 0).await.map_err(|error| error.to_string())?;
        while !self.partitions(keyspace).await.is_ok_and(|ids| !ids.contains(&reply.absorbed)) {
            sleep(LOOK_EVERY).await;
        }
        Ok(reply)
    }

    async fn partitions(&self, keyspace: &str) -> Result<BTreeSet<u64>, String> {
        let listed = self.client.admin().partitions(keyspace).await.map_err(|error| error.to_string())?;
        Ok(listed.partitions.iter().map(|partition| partition.id).collect())
    }

    async fn nodes(&self) -> Result<Vec<v1::Node>, String> {
        let nodes = self.client.admin().nodes().await.map_err(|error| error.to_string())?;
        Ok(nodes.into_iter().filter_map(|status| status.node).collect())
    }

    /// Has the node at an address drain.
    #[must_use]
    pub fn drain(&self, address: String) -> Change {
        let this = self.clone();
        env::spawn(async move {
            let id = this.id_at(&address).await?;
            // Refused while another fault keeps too many others away, which may soon be over.
            let mut refused = this.stand(id, v1::NodeStanding::Draining).await;
            for _ in 1..DRAIN_ATTEMPTS {
                if refused.is_ok() {
                    break;
                }
                sleep(DRAIN_PAUSE).await;
                refused = this.stand(id, v1::NodeStanding::Draining).await;
            }
            refused?;
            let drains = |node: &v1::Node| node.id == id && node.standing() == v1::NodeStanding::Draining;
            while !this.nodes().await.is_ok_and(|nodes| nodes.iter().any(drains)) {
                sleep(LOOK_EVERY).await;
            }
            Ok(format!("node {id} drains"))
        })
    }

    async fn stand(&self, id: u64, standing: v1::NodeStanding) -> Result<(), String> {
        let asked = self.client.admin().set_node_standing(id, standing, false).await;
        asked.map(drop).map_err(|error| error.to_string())
    }

    /// Takes every drain back, until the map shows none.
    ///
    /// # Errors
    /// What was in the way when the patience ended.
    pub async fn resume_all(&self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        loop {
            let problem = match self.resume().await {
                Ok(0) => return Ok(()),
                Ok(left) => format!("{left} nodes still drained a moment ago"),
                Err(why) => why,
            };
            if Instant::now() >= deadline {
                return Err(problem);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Asks every node that drains to go on; how many did.
    async fn resume(&self) -> Result<usize, String> {
        let mut drained = self.nodes().await?;
        drained.retain(|node| node.standing() == v1::NodeStanding::Draining);
        for node in &drained {
            self.stand(node.id, v1::NodeStanding::Active).await?;
        }
        Ok(drained.len())
    }

    /// The active node that has an address.
    ///
    /// # Errors
    /// Why nobody could say.
    pub async fn id_at(&self, address: &str) -> Result<u64, String> {
        let stands = |node: &&v1::Node| node.address == address && node.standing() == v1::NodeStanding::Active;
        let id = self.nodes().await?.iter().find(stands).map(|node| node.id);
        id.ok_or_else(|| format!("no node at {address} is active"))
    }

    /// Has a node that is lost removed: its replicas are built anew elsewhere, and its address is free.
    #[must_use]
    pub fn remove(&self, id: u64) -> Change {
        let this = self.clone();
        env::spawn(async move {
            // What is in the way passes: not all may have heard of its end yet.
            while this.stand(id, v1::NodeStanding::Leaving).await.is_err() {
                sleep(LOOK_EVERY).await;
            }
            let removed = |node: &v1::Node| node.id == id && node.standing() == v1::NodeStanding::Removed;
            while !this.nodes().await.is_ok_and(|nodes| nodes.iter().any(removed)) {
                sleep(LOOK_EVERY).await;
            }
            Ok(format!("node {id} is lost and removed"))
        })
    }

    /// Waits until a living node has an address, another than `before`.
    #[must_use]
    pub fn replaced(&self, address: String, before: u64) -> Change {
        let this = self.clone();
        env::spawn(async move {
            loop {
                let nodes = this.nodes().await.unwrap_or_default();
                let new = |node: &&v1::Node| node.address == address && node.id > before && node.alive;
                if let Some(node) = nodes.iter().find(new) {
                    return Ok(format!("node {} is at {address} now", node.id));
                }
                sleep(LOOK_EVERY).await;
            }
        })
    }
}
