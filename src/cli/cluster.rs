//! `meridian init`, `cluster`, `partition`: how the cluster is.

use super::{
    explain::{self, Doctor, Why, load_columns, load_json},
    failure::Failure,
    options::{Format, Options},
    output::Output,
    recover::{self, Recover},
    remote::{Remote, kind_of},
    text::KeyText,
};
use crate::{
    key::{KeyKind, Layout, Span, integer_of_key, position as position_of, printable},
    proto::v1,
};
use bytes::Bytes;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::{ffi::OsString, os::unix::ffi::OsStrExt as _};

/// Form the cluster.
#[derive(Args, Debug)]
pub struct Init {
    /// Replicas of keyspaces that do not say otherwise
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=9))]
    replicas: u32,
}

/// About the cluster.
#[derive(Subcommand, Debug)]
pub enum ClusterCommand {
    /// Whether every partition is led and fully replicated and every node alive; exits with 0 if there is an answer
    Status,
    /// What is wrong, and what would still work without certain nodes
    Doctor(Doctor),
}

/// About partitions.
#[derive(Subcommand, Debug)]
pub enum PartitionCommand {
    /// The partitions of the keyspace in order
    List,
    /// How a partition is, what was decided about it, and why
    Why(Why),
    /// Cut a partition in two, online
    Split(Split),
    /// Make one of two neighbours, online
    Merge(Merge),
    /// Go on with a partition whose quorum is lost for good, from one replica that is left
    Recover(Recover),
    /// The partition that holds a key
    Show {
        /// Key
        #[arg(allow_negative_numbers = true)]
        key: OsString,
    },
}

/// Which partition to cut, and where.
#[derive(Args, Debug)]
pub struct Split {
    /// Id of the partition, such as p7; without it, the one that holds the key of --at
    #[arg(value_parser = explain::partition_id, required_unless_present = "at")]
    partition: Option<u64>,
    /// First key of the new partition; without it, the middle of the partition
    #[arg(long, value_name = "KEY", allow_negative_numbers = true)]
    at: Option<OsString>,
}

/// Which partitions to merge.
#[derive(Args, Debug)]
pub struct Merge {
    /// Id of one of them, such as p7
    #[arg(value_parser = explain::partition_id)]
    partition: u64,
    /// Id of its neighbour on either side; without it, the one after it
    #[arg(long, value_name = "ID", value_parser = explain::partition_id)]
    with: Option<u64>,
}

async fn merge(args: &Merge, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let remote = Remote::connect(options).await?;
    let reply = remote.merge_partition(args.partition, args.with.unwrap_or(0)).await?;
    match output.format {
        Format::Json => output.json(&json!({ "partition": reply.partition, "absorbed": reply.absorbed })),
        Format::Plain => output.line(&reply.partition.to_string()),
        Format::Table => {
            output.line(&format!("p{} holds what p{} held, which is gone", reply.partition, reply.absorbed))
        }
    }
}

async fn split(args: &Split, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let remote = Remote::connect(options).await?;
    let at = match &args.at {
        Some(key) => remote.key_text(options).await?.parse(key.as_bytes())?,
        None => Bytes::new(),
    };
    let partition = args.partition.unwrap_or(0);
    let request = v1::SplitPartitionRequest { keyspace: options.keyspace.clone(), partition, at };
    let reply = remote.split_partition(request).await?;
    match output.format {
        Format::Json => output.json(&json!({ "partition": reply.partition, "child": reply.child })),
        Format::Plain => output.line(&reply.child.to_string()),
        Format::Table => output.line(&format!("p{} was cut: p{} holds the upper part", reply.partition, reply.child)),
    }
}

/// Forms the cluster, or says that it exists.
///
/// # Errors
/// Why the cluster could not be formed.
pub async fn init(args: &Init, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let reply = Remote::connect(options).await?.init(args.replicas).await?;
    match output.format {
        Format::Json => output.json(&json!({ "cluster_id": reply.cluster_id, "created": reply.created })),
        Format::Plain => output.line(&reply.cluster_id),
        Format::Table if reply.created => output.line(&format!("formed cluster {}", reply.cluster_id)),
        Format::Table => output.line(&format!("cluster {} exists already", reply.cluster_id)),
    }
}

/// Runs `cluster …`.
///
/// # Errors
/// Why there is no answer.
pub async fn cluster(command: &ClusterCommand, options: &Options, output: &mut Output) -> Result<(), Failure> {
    if let ClusterCommand::Doctor(args) = command {
        return explain::doctor(args, options, output).await;
    }
    let status = Remote::connect(options).await?.cluster_status().await?;
    match output.format {
        Format::Json => output.json(&status_json(&status)),
        Format::Plain => output.line(if status.healthy { "healthy" } else { "unhealthy" }),
        Format::Table => {
            let present = || status.nodes.iter().filter(|node| is_present(node));
            let alive = present().filter(|node| node.alive).count();
            output.pairs(&[
                ("health", if status.healthy { "healthy" } else { "NOT healthy" }.to_owned()),
                ("cluster", status.cluster_id.clone()),
                ("nodes", format!("{alive} of {} alive", present().count())),
                ("partitions", status.partitions.to_string()),
                ("without a leader", ids(&status.partitions_leaderless, "p")),
                ("under-replicated", ids(&status.partitions_underreplicated, "p")),
                ("driver", driver(&status)),
                ("map version", format!("{} (as n{} sees it)", status.map_version, status.node)),
            ])?;
            status.problems.iter().try_for_each(|problem| output.line(&format!("problem: {problem}")))
        }
    }
}

/// Whether a node is, or should be, part of the cluster.
fn is_present(node: &v1::Node) -> bool {
    !matches!(node.standing(), v1::NodeStanding::Gone | v1::NodeStanding::Removed)
}

fn driver(status: &v1::ClusterStatusReply) -> String {
    let members: Vec<u64> = status.driver_members.iter().map(|member| member.node).collect();
    let leader = if status.driver_leader == 0 {
        "no leader known".to_owned()
    } else {
        format!("led by n{}", status.driver_leader)
    };
    format!("{leader}, on {}", ids(&members, "n"))
}

fn status_json(status: &v1::ClusterStatusReply) -> Value {
    let nodes: Vec<Value> = status.nodes.iter().map(node_json).collect();
    json!({
        "healthy": status.healthy,
        "cluster_id": status.cluster_id,
        "node": status.node,
        "driver_leader": status.driver_leader,
        "driver_nodes": status.driver_members.iter().map(|member| member.node).collect::<Vec<_>>(),
        "map_version": status.map_version,
        "nodes_alive": status.nodes.iter().filter(|node| is_present(node) && node.alive).count(),
        "nodes": nodes,
        "partitions": status.partitions,
        "partitions_leaderless": status.partitions_leaderless,
        "partitions_underreplicated": status.partitions_underreplicated,
        "problems": status.problems,
    })
}

/// A node as the commands print it.
#[must_use]
pub fn node_json(node: &v1::Node) -> Value {
    json!({
        "id": node.id, "uuid": node.uuid, "address": node.address, "zone": node.zone, "weight": node.weight,
        "alive": node.alive, "last_contact_ms": node.last_contact_ms,
        "standing": super::node::standing(node.standing()),
    })
}

/// `p1 p2 p3`, or `none`.
fn ids(ids: &[u64], prefix: &str) -> String {
    const SHOWN_MAX: usize = 10;
    if ids.is_empty() {
        return "none".to_owned();
    }
    let shown: Vec<String> = ids.iter().take(SHOWN_MAX).map(|id| format!("{prefix}{id}")).collect();
    let more = ids.len().saturating_sub(SHOWN_MAX);
    if more == 0 { shown.join(" ") } else { format!("{} and {more} more", shown.join(" ")) }
}

/// Runs `partition …`.
///
/// # Errors
/// Why there is no answer.
pub async fn partition(command: &PartitionCommand, options: &Options, output: &mut Output) -> Result<(), Failure> {
    match command {
        PartitionCommand::Why(args) => return explain::why(args, options, output).await,
        PartitionCommand::Split(args) => return split(args, options, output).await,
        PartitionCommand::Merge(args) => return merge(args, options, output).await,
        PartitionCommand::Recover(args) => return recover::run(args, options, output).await,
        PartitionCommand::List | PartitionCommand::Show { .. } => {}
    }
    let reply = Remote::connect(options).await?.keyspace(&options.keyspace).await?;
    let settings = reply.keyspace.unwrap_or_default();
    let partitions = match command {
        PartitionCommand::Show { key } => {
            let keys = KeyText { kind: kind_of(&settings), hex: options.hex };
            let key = keys.parse(key.as_bytes())?;
            reply.partitions.into_iter().filter(|partition| holds(&settings, partition, &key)).collect()
        }
        _ => reply.partitions,
    };
    print_partitions(&settings, &partitions, &reply.statuses, output)
}

/// Whether a key lies in a partition.
#[must_use]
pub fn holds(keyspace: &v1::Keyspace, partition: &v1::Partition, key: &Bytes) -> bool {
    let layout = if keyspace.layout() == v1::Layout::Hashed { Layout::Hashed } else { Layout::Ordered };
    let end = (!partition.end.is_empty()).then(|| partition.end.clone());
    Span { start: partition.start.clone(), end }.contains(&position_of(layout, key))
}

/// Prints partitions of one keyspace.
///
/// # Errors
/// When stdout cannot be written.
pub fn print_partitions(
    keyspace: &v1::Keyspace,
    partitions: &[v1::Partition],
    statuses: &[v1::PartitionStatus],
    output: &mut Output,
) -> Result<(), Failure> {
    let status = |id: u64| statuses.iter().find(|status| status.partition == id).cloned().unwrap_or_default();
    match output.format {
        Format::Json => partitions.iter().try_for_each(|partition| {
            let (mut object, status) = (partition_json(keyspace, partition), status(partition.id));
            object["state"] = status.state.into();
            object["load"] = load_json(status.load);
            output.json(&object)
        }),
        Format::Plain => partitions.iter().try_for_each(|partition| output.line(&partition.id.to_string())),
        Format::Table => {
            let line = |partition: &v1::Partition| {
                let epoch = partition.epoch.unwrap_or_default();
                let nodes: Vec<u64> = partition.replicas.iter().map(|replica| replica.node).collect();
                let status = status(partition.id);
                let [size, rows, reads, writes] = load_columns(status.load);
                vec![
                    format!("p{}", partition.id),
                    position(keyspace, &partition.start, "start"),
                    position(keyspace, &partition.end, "end"),
                    if partition.leader == 0 { "none".to_owned() } else { format!("n{}", partition.leader) },
                    ids(&nodes, "n"),
                    format!("{}.{}", epoch.bounds, epoch.members),
                    partition.term.to_string(),
                    status.state,
                    size,
                    rows,
                    reads,
                    writes,
                ]
            };
            let header = [
                "PARTITION",
                "FROM",
                "TO (EXCLUSIVE)",
                "LEADER",
                "NODES",
                "EPOCH",
                "TERM",
                "STATE",
                "SIZE",
                "ROWS",
                "READS/S",
                "WRITES/S",
            ];
            output.table(&header, partitions.iter().map(line).collect())
        }
    }
}

fn partition_json(keyspace: &v1::Keyspace, partition: &v1::Partition) -> Value {
    let epoch = partition.epoch.unwrap_or_default();
    let replicas: Vec<Value> =
        partition.replicas.iter().map(|replica| json!({ "replica": replica.replica, "node": replica.node })).collect();
    json!({
        "partition": partition.id,
        "keyspace": keyspace.name,
        "from": position_json(keyspace, &partition.start),
        "to": position_json(keyspace, &partition.end),
        "leader": (partition.leader != 0).then_some(partition.leader),
        "term": partition.term,
        "epoch": { "bounds": epoch.bounds, "members": epoch.members },
        "replicas": replicas,
    })
}

/// A position for people: a key, an integer, or in a hashed keyspace a token.
fn position(keyspace: &v1::Keyspace, position: &[u8], open: &str) -> String {
    match position_kind(keyspace, position) {
        Position::Open => open.to_owned(),
        Position::Token(token) => format!("#{token:016x}"),
        Position::Integer(n) => n.to_string(),
        Position::Key => printable(position),
    }
}

/// As [`position`], for JSON; null is an open end.
fn position_json(keyspace: &v1::Keyspace, position: &[u8]) -> Value {
    match position_kind(keyspace, position) {
        Position::Open => Value::Null,
        Position::Token(token) => json!({ "token": format!("{token:016x}") }),
        Position::Integer(n) => n.into(),
        Position::Key => super::text::to_json(position).into(),
    }
}

enum Position {
    Open,
    Token(u64),
    Integer(u64),
    Key,
}

fn position_kind(keyspace: &v1::Keyspace, position: &[u8]) -> Position {
    let number = integer_of_key(position);
    match (position.is_empty(), number) {
        (true, _) => Position::Open,
        (false, Some(token)) if keyspace.layout() == v1::Layout::Hashed => Position::Token(token),
        (false, Some(n)) if matches!(kind_of(keyspace), KeyKind::Integer { .. }) => Position::Integer(n),
        (false, _) => Position::Key,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_ids_are_cut() {
        assert_eq!(ids(&[], "p"), "none");
        assert_eq!(ids(&[1, 2], "p"), "p1 p2");
        assert!(ids(&(0..14).collect::<Vec<_>>(), "p").ends_with("p9 and 4 more"));
    }

    #[test]
    fn every_key_lies_in_exactly_one_partition() {
        let partition = |start: &'static [u8], end: &'static [u8]| v1::Partition {
            start: Bytes::from_static(start),
            end: Bytes::from_static(end),
            ..Default::default()
        };
        let mut keyspace = v1::Keyspace::default();
        let ordered = [partition(b"", b"m"), partition(b"m", b"")];
        let hashed = [partition(b"", &[0x80, 0, 0, 0, 0, 0, 0, 0]), partition(&[0x80, 0, 0, 0, 0, 0, 0, 0], b"")];
        for key in ["", "a", "m", "zz"].map(Bytes::from) {
            keyspace.set_layout(v1::Layout::Ordered);
            let held: Vec<bool> = ordered.iter().map(|partition| holds(&keyspace, partition, &key)).collect();
            assert_eq!(held, [key < "m", key >= "m"]);
            keyspace.set_layout(v1::Layout::Hashed);
            assert_eq!(hashed.iter().filter(|partition| holds(&keyspace, partition, &key)).count(), 1);
        }
    }

    #[test]
    fn positions_are_shown_by_kind_and_layout() {
        let mut keyspace = v1::Keyspace::default();
        assert_eq!(position(&keyspace, b"", "start"), "start");
        assert_eq!(position(&keyspace, b"12345678", "end"), "\"12345678\"");
        keyspace.set_keys(v1::KeyKind::Integer);
        assert_eq!(position(&keyspace, &9_u64.to_be_bytes(), "end"), "9");
        keyspace.set_layout(v1::Layout::Hashed);
        assert_eq!(position(&keyspace, &(1_u64 << 63).to_be_bytes(), "end"), "#8000000000000000");
    }
}
