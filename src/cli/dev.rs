//! `meridian dev`: a whole cluster in one process, on loopback.

use super::{demo, failure::Failure, options::Format, output::Output};
use crate::{
    node::config::PORT_DEFAULT,
    server::dev::{self, DevCluster, DevConfig},
};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};

/// Run a cluster in this process until Ctrl-C: for trying things, for development, and for tests.
#[derive(Args, Debug)]
pub struct Dev {
    /// Nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    nodes: u16,
    /// Port of the first node, the others count up; HTTP lies 100 higher; 0: any free ports [default: 7170, with --demo 0]
    #[arg(long, value_name = "PORT")]
    base_port: Option<u16>,
    /// Keep the data in this directory; without it, everything is in memory and gone at the end
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Show a short tour and exit
    #[arg(long)]
    demo: bool,
    /// Log lines to show, e.g. info or meridian=debug
    #[arg(long, default_value = "error", value_name = "FILTER")]
    log: String,
}

/// Runs the cluster.
///
/// # Errors
/// When it cannot start, or the tour fails.
pub async fn run(args: Dev, output: &mut Output) -> Result<(), Failure> {
    let began = Instant::now();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let base_port = args.base_port.unwrap_or(if args.demo { 0 } else { PORT_DEFAULT });
    let config = DevConfig { nodes: args.nodes, base_port, data: args.data, log_level: args.log };
    let mut cluster = dev::start(config).await.map_err(anyhow::Error::new)?;
    announce(&cluster, began, output)?;
    let result = if args.demo {
        demo::run(&mut cluster, output).await
    } else {
        tokio::select! {
            biased;
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    };
    cluster.shutdown().await;
    result
}

fn announce(cluster: &DevCluster, began: Instant, output: &mut Output) -> Result<(), Failure> {
    let nodes = cluster.nodes();
    let addresses: Vec<&str> = nodes.iter().map(|node| node.address.as_str()).collect();
    let took = began.elapsed().as_secs_f64();
    if output.format == Format::Json {
        let http: Vec<String> = nodes.iter().map(|node| node.http.to_string()).collect();
        output.json(&json!({ "ready": true, "seconds": took, "endpoints": addresses, "http": http }))?;
        return output.flush();
    }
    output.line(&format!("{} nodes ready after {took:.2} s:", nodes.len()))?;
    for node in &nodes {
        output.line(&format!("  {}  {}  metrics http://{}/metrics", node.id, node.address, node.http))?;
    }
    let endpoints = addresses.join(",");
    output.line("try, in another terminal (Ctrl-C here ends the cluster):")?;
    output.line(&format!("  export MERIDIAN_ENDPOINTS={endpoints}"))?;
    output.line("  meridian kv put hello world && meridian kv get hello")?;
    output.flush()
}
