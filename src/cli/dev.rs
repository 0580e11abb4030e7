//! `meridian dev`: a whole cluster in one process, on loopback.

use super::{demo, failure::Failure, options::Format, output::Output};
use crate::{
    node::config::{LogFormat, NodeConfig, PORT_DEFAULT},
    server::dev::{DevCluster, DevConfig, NODES_MAX},
    telemetry,
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
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=NODES_MAX as i64))]
    nodes: u16,
    /// Port of the first node, the others count up; 0: any free ports [default: 7170, with --demo 0]
    #[arg(long, value_name = "PORT")]
    base_port: Option<u16>,
    /// Keep the data in this directory; without it, everything is in memory and gone at the end
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Silence after which a node's replicas are built anew on others
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = super::units::duration_ms)]
    down_after: u64,
    /// Bytes of rows from which on a partition is cut in two
    #[arg(long, default_value = "64MiB", value_name = "BYTES", value_parser = super::units::bytes)]
    split_bytes: u64,
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
    telemetry::install_logs(&args.log, LogFormat::Text);
    let (down_after_ms, split_bytes) = (args.down_after, args.split_bytes);
    let template = NodeConfig { down_after_ms, split_bytes, ..NodeConfig::default() };
    let config = DevConfig { nodes: args.nodes.into(), base_port, data: args.data, template, ..DevConfig::default() };
    let mut cluster = DevCluster::start(config).await?;
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
    cluster.stop().await;
    result
}

fn announce(cluster: &DevCluster, began: Instant, output: &mut Output) -> Result<(), Failure> {
    let (addresses, http) = (cluster.addresses(), cluster.http_addresses());
    let took = began.elapsed().as_secs_f64();
    if output.format == Format::Json {
        output.json(&json!({ "ready": true, "seconds": took, "endpoints": addresses, "http": http }))?;
        return output.flush();
    }
    output.line(&format!("{} nodes ready after {took:.2} s:", addresses.len()))?;
    for (address, http) in addresses.iter().zip(http) {
        output.line(&format!("  {address}  metrics http://{http}/metrics"))?;
    }
    let endpoints = addresses.join(",");
    output.line("try, in another terminal (Ctrl-C here ends the cluster):")?;
    output.line(&format!("  export MERIDIAN_ENDPOINTS={endpoints}"))?;
    output.line("  meridian kv put hello world && meridian kv get hello")?;
    output.flush()
}
