//! A whole cluster in one process. Only the signatures that the command line calls.

use super::StartError;
use crate::node::config::NodeConfig;
use std::{net::SocketAddr, path::PathBuf};

/// Nodes at most.
pub const NODES_MAX: usize = 15;

/// What the cluster looks like.
#[derive(Clone, Debug, Default)]
pub struct DevConfig {
    /// Nodes.
    pub nodes: usize,
    /// Folder that keeps the data.
    pub data: Option<PathBuf>,
    /// First of consecutive ports; 0 takes free ones.
    pub base_port: u16,
    /// Replicas of keyspaces that do not say; 0 means 3.
    pub replicas: u32,
    /// Settings of every node but for its addresses, data and storage.
    pub template: NodeConfig,
}

/// A running cluster.
#[derive(Debug)]
pub struct DevCluster {
    addresses: Vec<String>,
    http_addresses: Vec<SocketAddr>,
}

impl DevCluster {
    /// Starts the nodes, forms the cluster, and waits until it is healthy.
    ///
    /// # Errors
    /// When a node does not start.
    pub async fn start(config: DevConfig) -> Result<Self, StartError> {
        Err(StartError(format!("no cluster of {} nodes can run yet", config.nodes)))
    }

    /// gRPC addresses of all nodes, in order.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        self.addresses.clone()
    }

    /// HTTP addresses of all nodes, in order.
    #[must_use]
    pub fn http_addresses(&self) -> &[SocketAddr] {
        &self.http_addresses
    }

    /// Kills a node like a crash.
    pub fn kill(&mut self, index: usize) {
        self.addresses.remove(index);
    }

    /// Stops every node in order.
    pub async fn stop(self) {}
}
