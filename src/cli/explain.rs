//! `meridian partition why` and `meridian cluster doctor`: what the cluster says of itself.

use super::{
    failure::Failure,
    options::{Format, Options},
    output::Output,
    remote::Remote,
};
use crate::proto::v1;
use clap::Args;
use serde_json::{Value, json};

/// What is wrong, or would be.
#[derive(Args, Debug)]
pub struct Doctor {
    /// Nodes to imagine lost, such as n2,n5
    #[arg(long, value_delimiter = ',', value_parser = node_id)]
    if_lost: Vec<u64>,
}

/// Why a partition is where it is.
#[derive(Args, Debug)]
pub struct Why {
    /// Id of the partition, such as p7
    #[arg(value_parser = partition_id)]
    partition: u64,
}

pub(super) fn node_id(text: &str) -> Result<u64, String> {
    id(text, 'n').ok_or_else(|| format!("{text:?} is not a node such as n2"))
}

pub(super) fn partition_id(text: &str) -> Result<u64, String> {
    id(text, 'p').ok_or_else(|| format!("{text:?} is not a partition such as p7"))
}

/// A number, with or without its letter.
fn id(text: &str, letter: char) -> Option<u64> {
    text.strip_prefix(letter).unwrap_or(text).parse().ok()
}

/// Runs `cluster doctor`.
///
/// # Errors
/// Why there is no answer.
pub async fn doctor(args: &Doctor, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let found = Remote::connect(options).await?.diagnose(&args.if_lost).await?;
    match output.format {
        Format::Json => output.json(&json!({
            "problems": found.problems,
            "unreadable": found.unreadable,
            "without_quorum": found.without_quorum,
            "fragile": found.fragile,
            "underreplicated": found.underreplicated,
            "changing": found.changing,
            "in_one_zone": found.in_one_zone,
            "needed_nodes": found.needed_nodes,
            "driver_live": found.driver_live,
            "driver_members": found.driver_members,
        })),
        Format::Plain | Format::Table if found.problems.is_empty() => output.line("no problems"),
        Format::Plain | Format::Table => found.problems.iter().try_for_each(|problem| output.line(problem)),
    }
}

/// Runs `partition why`.
///
/// # Errors
/// `WRONG_PARTITION`, or why there is no answer.
pub async fn why(args: &Why, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let told = Remote::connect(options).await?.explain_partition(args.partition).await?;
    let status = told.status.clone().unwrap_or_default();
    match output.format {
        Format::Json => output.json(&json!({
            "partition": args.partition,
            "keyspace": told.keyspace,
            "state": status.state,
            "load": load_json(status.load),
            "findings": told.findings,
            "decisions": told.decisions.iter().map(decision_json).collect::<Vec<_>>(),
            "driver_answered": told.driver_answered,
        })),
        Format::Plain => told.findings.iter().try_for_each(|finding| output.line(finding)),
        Format::Table => {
            let partition = told.partition.clone().unwrap_or_default();
            let nodes: Vec<String> = partition.replicas.iter().map(|replica| format!("n{}", replica.node)).collect();
            let [size, rows, reads, writes] = load_columns(status.load);
            output.pairs(&[
                ("partition", format!("p{} of {}", args.partition, told.keyspace)),
                ("state", status.state),
                ("leader", if partition.leader == 0 { "none".to_owned() } else { format!("n{}", partition.leader) }),
                ("nodes", nodes.join(" ")),
                ("size", format!("{size} in {rows} rows")),
                ("load", format!("{reads} reads/s, {writes} writes/s")),
            ])?;
            told.findings.iter().try_for_each(|finding| output.line(&format!("finding: {finding}")))?;
            told.decisions.iter().try_for_each(|decision| {
                let v1::Decision { unix_ms, what, why, result, times } = decision;
                let times = if *times > 1 { format!(" ({times} times)") } else { String::new() };
                let seconds = unix_ms / 1_000;
                output.line(&format!("decision at {seconds}: {what}, because {why}: {result}{times}"))
            })?;
            if told.driver_answered { Ok(()) } else { output.line("the placement driver gave no answer") }
        }
    }
}

fn decision_json(decision: &v1::Decision) -> Value {
    json!({
        "unix_ms": decision.unix_ms, "what": decision.what, "why": decision.why, "result": decision.result,
        "times": decision.times,
    })
}

/// A load for JSON; null when it is not known.
#[must_use]
pub fn load_json(load: Option<v1::PartitionLoad>) -> Value {
    load.map_or(Value::Null, |load| {
        json!({
            "bytes": load.bytes, "rows": load.rows, "reads_per_s": load.reads_per_s,
            "writes_per_s": load.writes_per_s, "traffic_per_s": load.traffic_per_s,
        })
    })
}

/// Size, rows, reads and writes per second; dashes when they are not known.
#[must_use]
pub fn load_columns(load: Option<v1::PartitionLoad>) -> [String; 4] {
    load.map_or_else(
        || std::array::from_fn(|_| "-".to_owned()),
        |load| {
            let counts = [load.rows, load.reads_per_s.into(), load.writes_per_s.into()];
            let [rows, reads, writes] = counts.map(|count: u64| count.to_string());
            [size(load.bytes), rows, reads, writes]
        },
    )
}

/// Bytes with a unit, to a tenth.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1 << 10 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10).min(UNITS.len() as u32);
    format!("{:.1} {}", bytes as f64 / (1_u64 << (10 * power)) as f64, UNITS[power as usize - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ids_are_for_people() {
        assert_eq!([0, 1_023, 1_024, 64 << 20, 3 << 29].map(size), ["0 B", "1023 B", "1.0 KiB", "64.0 MiB", "1.5 GiB"]);
        assert_eq!((node_id("n2"), node_id("5"), partition_id("p7")), (Ok(2), Ok(5), Ok(7)));
        assert!(node_id("p2").is_err() && partition_id("").is_err());
        assert_eq!(load_columns(None), ["-", "-", "-", "-"]);
    }
}
