//! A whole cluster in one process, for development, demonstrations and tests: the production server, several times, on
//! loopback ports of their own.

use super::{ServerHandle, StartError, start};
use crate::{
    error::{Error, Reason},
    node::{
        config::{NodeConfig, Storage},
        identity::DataDirError,
    },
};
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Nodes at most.
pub const NODES_MAX: usize = 15;
/// Patience with the cluster becoming healthy.
const HEALTHY_DEADLINE: Duration = Duration::from_secs(30);
/// Patience with a killed node that still holds its directory, its log or its ports: what others asked of it may go on
/// until its deadline.
const LETS_GO_DEADLINE: Duration = Duration::from_secs(60);
/// How often health is looked at while waiting for it.
const HEALTHY_EVERY: Duration = Duration::from_millis(20);

/// What the cluster looks like.
#[derive(Clone, Debug)]
pub struct DevConfig {
    /// Nodes, 1 to [`NODES_MAX`].
    pub nodes: usize,
    /// Folder that keeps the data, one folder a node; `None` keeps everything in memory.
    pub data: Option<PathBuf>,
    /// First of consecutive gRPC ports; 0 takes free ones.
    pub base_port: u16,
    /// Replicas of keyspaces that do not say; 0 means 3.
    pub replicas: u32,
    /// Settings of every node but for its addresses, data and storage.
    pub template: NodeConfig,
}

impl Default for DevConfig {
    fn default() -> Self {
        Self { nodes: 3, data: None, base_port: 0, replicas: 0, template: NodeConfig::default() }
    }
}

/// A running cluster. Dropping it leaves its nodes to the end of the runtime; [`DevCluster::stop`] ends them in order.
#[derive(Debug)]
pub struct DevCluster {
    nodes: Vec<Option<ServerHandle>>,
    addresses: Vec<SocketAddr>,
    http_addresses: Vec<SocketAddr>,
    configs: Vec<NodeConfig>,
}

impl DevCluster {
    /// Starts the nodes, forms the cluster, and waits until it is healthy.
    ///
    /// # Errors
    /// When a node does not start, or the cluster does not become healthy in time.
    pub async fn start(config: DevConfig) -> Result<Self, StartError> {
        let nodes = config.nodes.clamp(1, NODES_MAX);
        let mut cluster = Self { nodes: vec![], addresses: vec![], http_addresses: vec![], configs: vec![] };
        for index in 0..nodes {
            let settings = cluster.settings(&config, index);
            let handle = start(settings.clone()).await?;
            cluster.addresses.push(handle.address());
            cluster.http_addresses.push(handle.http_address());
            cluster.configs.push(NodeConfig { listen: handle.address(), http: handle.http_address(), ..settings });
            if index == 0 {
                handle.init(config.replicas).await.map_err(StartError::Refused)?;
            }
            cluster.nodes.push(Some(handle));
        }
        cluster.healthy().await.map_err(StartError::Refused)?;
        Ok(cluster)
    }

    fn settings(&self, config: &DevConfig, index: usize) -> NodeConfig {
        let loopback = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let port = if config.base_port == 0 { 0 } else { config.base_port + index as u16 };
        NodeConfig {
            data: config.data.clone().unwrap_or_default().join(format!("node{}", index + 1)),
            storage: if config.data.is_some() { Storage::Disk } else { Storage::Memory },
            listen: loopback(port),
            http: loopback(0),
            join: self.addresses.iter().map(ToString::to_string).collect(),
            ..config.template.clone()
        }
    }

    /// gRPC addresses of all nodes, in order, killed ones included.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        self.addresses.iter().map(ToString::to_string).collect()
    }

    /// HTTP addresses of all nodes, in order.
    #[must_use]
    pub fn http_addresses(&self) -> &[SocketAddr] {
        &self.http_addresses
    }

    /// The node at `index`, unless it was killed.
    #[must_use]
    pub fn node(&self, index: usize) -> Option<&ServerHandle> {
        self.nodes.get(index).and_then(Option::as_ref)
    }

    /// Waits until every living node finds the cluster healthy.
    ///
    /// # Errors
    /// What is wrong still, when it does not become healthy in time.
    pub async fn healthy(&self) -> Result<(), Error> {
        let deadline = Instant::now() + HEALTHY_DEADLINE;
        loop {
            let problems: Vec<String> = self.nodes.iter().flatten().flat_map(|handle| self.problems(handle)).collect();
            if problems.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(Reason::LeaderUnknown, format!("not healthy: {}", problems.join("; "))));
            }
            sleep(HEALTHY_EVERY).await;
        }
    }

    fn problems(&self, handle: &ServerHandle) -> Vec<String> {
        let Some(node) = handle.node() else { return vec![format!("{} has not joined yet", handle.address())] };
        let (nodes, expected) = (node.routing().map().nodes().len(), self.addresses.len());
        let mut problems = node.health().problems();
        if nodes < expected {
            problems.push(format!("{} knows {nodes} of {expected} nodes", handle.address()));
        }
        problems
    }

    /// Kills a node like a crash.
    pub fn kill(&mut self, index: usize) {
        if let Some(handle) = self.nodes.get_mut(index).and_then(Option::take) {
            handle.kill();
        }
    }

    /// Stops one node in order, after it has handed over what it leads.
    pub async fn stop_node(&mut self, index: usize) {
        if let Some(handle) = self.nodes.get_mut(index).and_then(Option::take) {
            handle.hand_over().await;
            handle.stop().await;
        }
    }

    /// Waits until a node has to stop by itself.
    pub async fn failed(&mut self, index: usize) -> StartError {
        match self.nodes.get_mut(index).and_then(Option::as_mut) {
            Some(handle) => handle.failed().await,
            None => std::future::pending().await,
        }
    }

    /// Starts a killed node again, on its addresses and with its data, once the killed one has let go of them: its tasks
    /// end when they are next looked at.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn restart(&mut self, index: usize) -> Result<(), StartError> {
        let mut config = self.configs[index].clone();
        let others = self.addresses.iter().enumerate().filter(|(other, _)| *other != index);
        config.join = others.map(|(_, address)| address.to_string()).collect();
        let deadline = Instant::now() + LETS_GO_DEADLINE;
        let held = |error: &StartError| {
            // The log too is let go of only when the last task has ended.
            matches!(
                error,
                StartError::DataDir(DataDirError::InUse(_)) | StartError::Listen { .. } | StartError::Log { .. }
            )
        };
        let node = loop {
            match start(config.clone()).await {
                Err(error) if held(&error) && Instant::now() < deadline => sleep(HEALTHY_EVERY).await,
                started => break started?,
            }
        };
        self.nodes[index] = Some(node);
        Ok(())
    }

    /// Stops every node in order.
    pub async fn stop(self) {
        for handle in self.nodes.into_iter().flatten() {
            handle.stop().await;
        }
    }
}
