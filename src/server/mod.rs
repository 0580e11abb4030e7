//! The surface of a node. Only what the command line calls; the node itself arrives with the server.

pub mod dev;

use crate::node::config::NodeConfig;
use std::net::SocketAddr;

/// Why a node cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

/// A running node.
#[derive(Debug)]
pub struct ServerHandle {
    listen: SocketAddr,
    http: SocketAddr,
}

/// Starts a node; returns when it listens.
///
/// # Errors
/// When the data directory or an address cannot be used.
pub async fn start(config: NodeConfig) -> Result<ServerHandle, StartError> {
    Err(StartError(format!("no node can run at {} yet", config.listen)))
}

impl ServerHandle {
    /// Address really listened on, for clients and nodes.
    #[must_use]
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Address really listened on, for metrics and health.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Waits until the node ends by itself.
    ///
    /// # Errors
    /// Why it ended.
    pub async fn stopped(&mut self) -> Result<(), StartError> {
        std::future::pending().await
    }

    /// Stops the node in an orderly way.
    pub async fn shutdown(self) {}
}
