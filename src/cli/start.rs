//! `meridian start`: one node of a real cluster, until it is told to stop.
//!
//! Invariant: SIGTERM and Ctrl-C stop the node in an orderly way; a node that ends by itself is an error.

use super::{
    config::{Layers, resolve},
    failure::Failure,
    output::Output,
};
use crate::{node::config::NodeConfig, server, telemetry};
use anyhow::Context as _;
use clap::Args;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};

/// Run one node. Every setting can also come from a MERIDIAN_* variable or from the file given with --config; a flag
/// wins over a variable, a variable over the file.
#[derive(Args, Debug)]
pub struct Start {
    /// TOML file of settings
    #[arg(long, value_name = "FILE", env = "MERIDIAN_CONFIG")]
    config: Option<PathBuf>,
    /// Directory of identity, log and snapshots [default: meridian-data]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Address to listen on, for clients and nodes [default: 127.0.0.1:7170]
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<String>,
    /// Address under which others reach this node [default: that of --listen]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Nodes of the cluster to join
    #[arg(long, value_name = "HOST:PORT,…")]
    join: Option<String>,
    /// Connect to the node at ADDRESS by way of VIA, e.g. a proxy of a drill; may be given again
    #[arg(long, value_name = "ADDRESS=VIA", hide = true)]
    dial: Vec<String>,
    /// Address of /metrics, /livez and /readyz [default: the port of --listen plus 100, on loopback]
    #[arg(long, value_name = "IP:PORT")]
    http: Option<String>,
    /// Failure domain
    #[arg(long)]
    zone: Option<String>,
    /// Share of the load compared with other nodes [default: 1]
    #[arg(long)]
    weight: Option<String>,
    /// disk or memory [default: disk]
    #[arg(long)]
    storage: Option<String>,
    /// Silence after which a node's replicas are built anew on others; the same on every node [default: 5m]
    #[arg(long, value_name = "DURATION")]
    down_after: Option<String>,
    /// Bytes of rows from which on a partition is cut in two; the same on every node [default: 64MiB]
    #[arg(long, value_name = "BYTES")]
    split_bytes: Option<String>,
    /// Any other setting, e.g. limits.value_bytes_max=512KiB
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Check the configuration and exit
    #[arg(long)]
    check: bool,
}

impl Start {
    fn layers(&self) -> Result<Layers, Failure> {
        let file = match &self.config {
            None => None,
            Some(path) => {
                let named = || format!("cannot read {}", path.display());
                Some((path.clone(), std::fs::read_to_string(path).with_context(named)?))
            }
        };
        let named = [
            ("data", &self.data),
            ("listen", &self.listen),
            ("advertise", &self.advertise),
            ("join", &self.join),
            ("http", &self.http),
            ("zone", &self.zone),
            ("weight", &self.weight),
            ("storage", &self.storage),
            ("down_after_ms", &self.down_after),
            ("split_bytes", &self.split_bytes),
        ];
        let mut flags = Vec::new();
        for (name, value) in named {
            flags.extend(value.iter().map(|value| (name.to_owned(), value.clone())));
        }
        if !self.dial.is_empty() {
            flags.push(("dial".to_owned(), self.dial.join(",")));
        }
        for pair in &self.set {
            let Some((name, value)) = pair.split_once('=') else {
                return Err(Failure::Usage(format!("error: --set {pair}: must be NAME=VALUE")));
            };
            flags.push((name.to_owned(), value.to_owned()));
        }
        Ok(Layers { file, variables: std::env::vars_os().collect(), flags })
    }

    fn node_config(&self) -> Result<NodeConfig, Failure> {
        let (config, warnings) = resolve(&self.layers()?).map_err(|faults| {
            let lines: Vec<String> = faults.iter().map(|fault| format!("  {fault}")).collect();
            Failure::Usage(format!("error: the configuration is wrong:\n{}", lines.join("\n")))
        })?;
        for warning in warnings {
            eprintln!("warning: {warning}");
        }
        Ok(config)
    }
}

/// Runs a node until it is told to stop.
///
/// # Errors
/// When the configuration is wrong, or the node cannot start or go on.
pub async fn run(args: &Start, output: &mut Output) -> Result<(), Failure> {
    let config = args.node_config()?;
    if args.check {
        return output.line("the configuration is valid");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    telemetry::install_logs(&config.log_level, config.log_format);
    let mut node = server::start(config).await?;
    output.line(&format!("listening on {}, http on {}", node.address(), node.http_address()))?;
    output.flush()?;
    tokio::select! {
        biased;
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        fault = node.failed() => return Err(fault.into()),
    }
    eprintln!("stopping");
    node.hand_over().await;
    node.stop().await;
    Ok(())
}
