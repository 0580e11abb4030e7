//! A cluster in one process. Only what the command line calls.

use super::StartError;
use crate::key::NodeId;
use std::{net::SocketAddr, path::PathBuf};

/// How the cluster runs.
#[derive(Clone, Debug)]
pub struct DevConfig {
    /// Nodes, 1 to 99.
    pub nodes: u16,
    /// Port of the first node, the others count up, HTTP 100 higher; 0: any free ports.
    pub base_port: u16,
    /// Where the data is kept; `None`: in memory.
    pub data: Option<PathBuf>,
    /// Filter of log lines.
    pub log_level: String,
}

/// One node of the cluster.
#[derive(Clone, Debug)]
pub struct DevNode {
    /// Its id.
    pub id: NodeId,
    /// `host:port` for clients.
    pub address: String,
    /// Metrics and health.
    pub http: SocketAddr,
}

/// A running cluster.
#[derive(Debug)]
pub struct DevCluster {
    nodes: Vec<DevNode>,
}

/// Starts a cluster; returns when it is healthy.
///
/// # Errors
/// When a node cannot start.
pub async fn start(config: DevConfig) -> Result<DevCluster, StartError> {
    Err(StartError(format!("no cluster of {} nodes can run yet", config.nodes)))
}

impl DevCluster {
    /// The nodes that run.
    #[must_use]
    pub fn nodes(&self) -> Vec<DevNode> {
        self.nodes.clone()
    }

    /// Ends a node at once, without a goodbye.
    pub async fn kill(&mut self, node: NodeId) {
        self.nodes.retain(|other| other.id != node);
    }

    /// Stops every node in an orderly way.
    pub async fn shutdown(self) {}
}
