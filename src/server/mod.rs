//! The surface of a node. Only the signatures that the command line calls; the server itself replaces this file.

pub mod dev;

use crate::node::config::NodeConfig;
use std::net::SocketAddr;

/// Why a node did not start, or had to stop.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

/// A started node.
#[derive(Debug)]
pub struct ServerHandle {
    address: SocketAddr,
    http: SocketAddr,
}

/// Starts a node.
///
/// # Errors
/// When it does not start.
pub async fn start(config: NodeConfig) -> Result<ServerHandle, StartError> {
    Err(StartError(format!("no node can run at {} yet", config.listen)))
}

impl ServerHandle {
    /// Address that clients and nodes connect to.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address of `/metrics`, `/livez` and `/readyz`.
    #[must_use]
    pub const fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// Waits until the node has to stop by itself.
    pub async fn failed(&mut self) -> StartError {
        std::future::pending().await
    }

    /// Stops in order.
    pub async fn stop(self) {}
}
