//! The command line: parse, run, exit code.
//!
//! One file per group of commands. Data goes to stdout, messages and progress to stderr; the exit code says what
//! happened (see [`failure`]). The commands hold no rules of the system: they turn arguments into requests of the API
//! and answers into text.

pub mod bench;
pub mod bulk;
pub mod check;
pub mod cluster;
pub mod config;
pub mod demo;
pub mod dev;
pub mod drill;
pub mod explain;
pub mod failure;
pub mod keyspace;
pub mod kv;
pub mod node;
pub mod options;
pub mod output;
pub mod records;
pub mod recover;
pub mod remote;
pub mod scan;
pub mod start;
pub mod text;
pub mod units;
pub mod zipf;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use failure::Failure;
use options::{Format, Options};
use output::Output;
use std::process::ExitCode;

/// A strongly consistent, distributed, in-memory key-value store with range queries.
///
/// Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 condition not met, 5 unavailable, 6 outcome of a write unknown,
/// 7 a drill that says nothing.
#[derive(Parser, Debug)]
#[command(name = "meridian", version = env!("MERIDIAN_VERSION"), max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a whole cluster in this process, for trying things
    Dev(dev::Dev),
    /// Run one node of a cluster
    Start(Box<start::Start>),
    /// Form the cluster, once; asked again it is a success
    Init(cluster::Init),
    /// Create, list, show and drop keyspaces
    #[command(subcommand)]
    Keyspace(keyspace::Command),
    /// Read and write rows
    #[command(subcommand)]
    Kv(kv::Command),
    /// How the cluster is
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// The nodes
    #[command(subcommand)]
    Node(node::Command),
    /// The partitions of the keyspace
    #[command(subcommand)]
    Partition(cluster::PartitionCommand),
    /// Measure how fast the cluster answers
    #[command(subcommand)]
    Bench(bench::Command),
    /// Judge recorded histories
    Check(check::Check),
    /// Try to break a cluster, and judge what its clients were told
    Drill(Box<drill::Drill>),
    /// Print the version
    Version,
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    cli.options.given = options::Given::of(&matches);
    #[cfg(feature = "planted")]
    if let Err(error) = crate::plant::set_from_env() {
        eprintln!("{error}");
        return ExitCode::from(failure::USAGE);
    }
    let mut output = Output::stdout(cli.options.output);
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failure::from)
        .and_then(|runtime| runtime.block_on(Box::pin(run(cli, &mut output))));
    // What was printed before a failure belongs to the reader, too.
    let flushed = output.flush();
    let result = result.and(flushed);
    match result {
        Ok(()) => ExitCode::from(failure::OK),
        Err(failure) => {
            if !matches!(failure, Failure::OutputClosed) {
                eprintln!("{failure}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

async fn run(cli: Cli, output: &mut Output) -> Result<(), Failure> {
    let Cli { options, command } = cli;
    match command {
        Command::Dev(args) => dev::run(args, output).await,
        Command::Start(args) => start::run(&args, output).await,
        Command::Init(args) => cluster::init(&args, &options, output).await,
        Command::Keyspace(command) => keyspace::run(command, &options, output).await,
        Command::Kv(command) => kv::run(command, &options, output).await,
        Command::Cluster(command) => cluster::cluster(&command, &options, output).await,
        Command::Node(command) => node::run(&command, &options, output).await,
        Command::Partition(command) => cluster::partition(&command, &options, output).await,
        Command::Bench(command) => bench::run(command, &options, output).await,
        Command::Check(args) => check::run(&args, output),
        Command::Drill(args) => Box::pin(drill::run(*args, &options, output)).await,
        Command::Version => match output.format {
            Format::Json => output.json(&serde_json::json!({ "version": env!("MERIDIAN_VERSION") })),
            Format::Table | Format::Plain => output.line(concat!("meridian ", env!("MERIDIAN_VERSION"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("meridian").chain(line.split_whitespace()))
    }

    #[test]
    fn the_commands_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_commands_are_accepted() {
        for line in [
            "dev",
            "dev --demo",
            "dev --nodes 5 --base-port 7300 --data d --down-after 30s",
            "start --data d --listen 0.0.0.0:7170 --advertise n1:7170 --join n2:7170,n3:7170 --http 0.0.0.0:7270",
            "start --config node.toml --zone a --weight 2 --down-after 2m --storage memory --set raft.heartbeat_ms=100 --check",
            "init --replicas 3",
            "keyspace create ids --keys integer --max 100000 --layout ordered --replicas 3 --partitions 16",
            "keyspace create names --split-at g,n --tolerate 1",
            "keyspace list",
            "keyspace show ids",
            "keyspace drop ids",
            "kv put k v --if-absent --return-previous",
            "kv put k --value-file -",
            "kv get k --consistency bounded=200ms --degrade -o json",
            "kv get -5 --keyspace ids",
            "kv get --hex 00ff --consistency eventual --no-confirm-absent",
            "kv del k --must-exist",
            "kv del --prefix a",
            "kv del --all",
            "kv cas k new --if-value old",
            "kv cas k --delete --if-version 12",
            "kv incr k",
            "kv incr k -5",
            "kv scan --from a --to c --inclusive --reverse --limit 10 --keys-only",
            "kv scan --prefix python3- -o plain --skip-unavailable --show-reads --explain",
            "kv count --from 10 --to 20",
            "kv load rows.tsv --raw --concurrency 16",
            "kv load - --format jsonl",
            "kv dump",
            "kv dump rows.jsonl --prefix a",
            "cluster status -o json",
            "--endpoints a:1,b:2 node list",
            "node drain n3 --dry-run -o json",
            "node decommission 3 --no-wait",
            "node decommission n3 --wait --wait-max 5m",
            "node resume n3",
            "partition list --keyspace ids",
            "partition show 500 --keyspace ids",
            "partition why p7",
            "partition merge p7 --with p8 -o json",
            "partition recover p7",
            "partition recover p7 --accept-data-loss --from n2 -o json",
            "cluster doctor",
            "cluster doctor --if-lost n2,n5 -o json",
            "bench mixed --clients 8 --seconds 1 --read-percent 50 -o json",
            "bench scan --rows 10 --keys 100",
            "check out",
            "check out/history.jsonl other.jsonl --workload levels -o json",
            "drill",
            "drill --seconds 40 --faults kill,partition --workload register,bank --nodes 3 --replicas 3 --seed 7 --out d",
            "drill --hours 0.5 --faults none --netns",
            "drill --endpoints a:1,b:2 --consistency bounded=200ms -o json",
            "version",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "",
            "kv",
            "kv get",
            "kv put k",
            "kv put k v --value-file f",
            "kv put k v --if-absent --if-present",
            "kv cas k v",
            "kv cas k v --delete --if-absent",
            "kv cas k --if-absent",
            "kv del",
            "kv del k --prefix a",
            "kv del --all --from a",
            "kv del --inclusive",
            "kv scan --limit 0",
            "kv scan --prefix a --from b",
            "kv scan --inclusive",
            "kv get k --consistency strong",
            "kv get k --consistency bounded",
            "kv get k --endpoints nowhere",
            "kv get k --deadline 5",
            "kv incr k x",
            "dev --nodes 0",
            "node drain",
            "node drain n0",
            "node decommission all",
            "drill --faults meteor",
            "drill --workload everything",
            "drill --hours 1 --seed 7",
            "bench get --clients 0",
            "partition why seven",
            "partition recover --accept-data-loss",
            "partition recover p7 --from p2",
            "cluster doctor --if-lost p2",
            "check",
            "check out --workload other",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), i32::from(failure::USAGE), "{line}");
        }
    }
}
