//! `meridian keyspace`: creating, listing, showing and dropping collections.

use super::{
    cluster::print_partitions,
    failure::Failure,
    options::{Format, Options},
    output::Output,
    remote::Remote,
    text::KeyText,
};
use crate::{key::KeyKind, proto::v1};
use bytes::Bytes;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::{ffi::OsString, os::unix::ffi::OsStrExt as _};

/// Most members of a partition.
const REPLICAS_MAX: u32 = 9;

/// What to do with keyspaces.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Create a keyspace; asked again with the same settings it is a success
    Create(Create),
    /// The keyspaces by name
    List,
    /// One keyspace, its partitions, and how many failures it survives
    Show {
        /// Name; by default that of --keyspace
        name: Option<String>,
    },
    /// Drop a keyspace and all its rows
    Drop {
        /// Name
        name: String,
    },
}

/// Kind of keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Keys {
    /// Any bytes
    Bytes,
    /// Integers from 0 to below --max
    Integer,
}

/// How a keyspace is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Layout {
    /// Partitions are intervals of keys: a range touches few of them
    Ordered,
    /// Partitions are intervals of hashes: load is even for any keys, a range asks all of them
    Hashed,
}

/// Create a keyspace.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("members").multiple(false))]
#[command(group = ArgGroup::new("cut").multiple(false))]
pub struct Create {
    /// Name: 1 to 64 of a-z 0-9 . _ - beginning with a letter
    name: String,
    /// Kind of keys
    #[arg(long, value_enum, default_value_t = Keys::Bytes)]
    keys: Keys,
    /// Integer keys lie in [0, M); without it, any unsigned 64-bit integer but the largest
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u64).range(1..))]
    max: Option<u64>,
    /// How it is cut into partitions
    #[arg(long, value_enum, default_value_t = Layout::Ordered)]
    layout: Layout,
    /// Members of each partition; by default what `meridian init` was told
    #[arg(long, group = "members", value_parser = clap::value_parser!(u32).range(1..=i64::from(REPLICAS_MAX)))]
    replicas: Option<u32>,
    /// Failures that writes shall survive: the same as --replicas 2F+1
    #[arg(long, group = "members", value_name = "F")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=i64::from((REPLICAS_MAX - 1) / 2)))]
    tolerate: Option<u32>,
    /// Partitions to cut it into evenly (integer or hashed keyspaces)
    #[arg(long, group = "cut", value_name = "P", value_parser = clap::value_parser!(u32).range(1..))]
    partitions: Option<u32>,
    /// Keys at which partitions begin, ascending, separated by commas (ordered keyspaces)
    #[arg(long, group = "cut", value_name = "KEY,…", value_delimiter = ',')]
    split_at: Vec<OsString>,
}

impl Create {
    fn request(&self, hex: bool) -> Result<v1::CreateKeyspaceRequest, Failure> {
        let kind = match (self.keys, self.max) {
            (Keys::Bytes, None) => KeyKind::Bytes,
            (Keys::Bytes, Some(_)) => return Err(usage("--max needs --keys integer")),
            (Keys::Integer, max) => KeyKind::Integer { max: max.unwrap_or(u64::MAX) },
        };
        let even = self.keys == Keys::Integer || self.layout == Layout::Hashed;
        if self.partitions.is_some_and(|partitions| partitions > 1) && !even {
            return Err(usage(
                "--partitions needs integer keys or --layout hashed; cut ordered byte keys with --split-at",
            ));
        }
        if !self.split_at.is_empty() && self.layout == Layout::Hashed {
            return Err(usage("--split-at needs --layout ordered; cut hashed keyspaces with --partitions"));
        }
        let keys = KeyText { kind, hex };
        let split_at: Vec<Bytes> =
            self.split_at.iter().map(|key| keys.parse(key.as_bytes())).collect::<Result<_, _>>()?;
        let replicas = self.tolerate.map_or_else(|| self.replicas.unwrap_or(0), |failures| 2 * failures + 1);
        let mut request = v1::CreateKeyspaceRequest {
            name: self.name.clone(),
            max: if let KeyKind::Integer { max } = kind { max } else { 0 },
            replicas,
            partitions: self.partitions.unwrap_or(0),
            split_at,
            ..Default::default()
        };
        request.set_keys(if self.keys == Keys::Integer { v1::KeyKind::Integer } else { v1::KeyKind::Bytes });
        request.set_layout(if self.layout == Layout::Hashed { v1::Layout::Hashed } else { v1::Layout::Ordered });
        Ok(request)
    }
}

fn usage(message: &str) -> Failure {
    Failure::Usage(format!("error: {message}"))
}

/// Runs one command.
///
/// # Errors
/// As described for the exit codes.
pub async fn run(command: Command, options: &Options, output: &mut Output) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create(&args, options, output).await,
        Command::List => list(options, output).await,
        Command::Show { name } => show(name.unwrap_or_else(|| options.keyspace.clone()), options, output).await,
        Command::Drop { name } => {
            let dropped = Remote::connect(options).await?.drop_keyspace(&name).await?;
            match output.format {
                Format::Json => output.json(&json!({ "dropped": dropped, "keyspace": name }))?,
                Format::Table if dropped => output.line(&format!("dropped {name}"))?,
                Format::Table | Format::Plain => {}
            }
            if dropped { Ok(()) } else { Err(Failure::NotFound(format!("not found: keyspace {name}"))) }
        }
    }
}

async fn create(args: &Create, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let reply = Remote::connect(options).await?.create_keyspace(args.request(options.hex)?).await?;
    for warning in &reply.warnings {
        eprintln!("warning: {warning}");
    }
    let keyspace = reply.keyspace.unwrap_or_default();
    match output.format {
        Format::Json => {
            let mut object = keyspace_json(&keyspace);
            object["created"] = reply.created.into();
            object["warnings"] = reply.warnings.into();
            output.json(&object)
        }
        Format::Plain => output.line(&keyspace.name),
        Format::Table => {
            let done = if reply.created { "created" } else { "exists already with these settings:" };
            output.line(&format!("{done} {}: {}", keyspace.name, described(&keyspace)))
        }
    }
}

async fn list(options: &Options, output: &mut Output) -> Result<(), Failure> {
    let keyspaces = Remote::connect(options).await?.keyspaces().await?;
    match output.format {
        Format::Json => keyspaces.iter().try_for_each(|keyspace| output.json(&keyspace_json(keyspace))),
        Format::Plain => keyspaces.iter().try_for_each(|keyspace| output.line(&keyspace.name)),
        Format::Table => {
            let line = |keyspace: &v1::Keyspace| {
                vec![
                    keyspace.name.clone(),
                    keys_name(keyspace),
                    layout_name(keyspace).to_owned(),
                    keyspace.replicas.to_string(),
                    keyspace.partitions.to_string(),
                ]
            };
            output
                .table(&["KEYSPACE", "KEYS", "LAYOUT", "REPLICAS", "PARTITIONS"], keyspaces.iter().map(line).collect())
        }
    }
}

async fn show(name: String, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let reply = Remote::connect(options).await?.keyspace(&name).await?;
    let keyspace = reply.keyspace.clone().unwrap_or_default();
    match output.format {
        Format::Json => {
            let mut object = keyspace_json(&keyspace);
            object["failures_tolerated_strong"] = reply.failures_tolerated_strong.into();
            object["failures_tolerated_eventual"] = reply.failures_tolerated_eventual.into();
            output.json(&object)
        }
        Format::Plain => output.line(&keyspace.name),
        Format::Table => {
            output.pairs(&[
                ("keyspace", keyspace.name.clone()),
                ("keys", keys_name(&keyspace)),
                ("layout", layout_name(&keyspace).to_owned()),
                ("replicas", keyspace.replicas.to_string()),
                ("survives", survives(&reply)),
            ])?;
            print_partitions(&keyspace, &reply.partitions, &reply.statuses, output)
        }
    }
}

fn survives(reply: &v1::GetKeyspaceReply) -> String {
    format!(
        "{} failed members for writes and linearizable reads, {} for eventual reads",
        reply.failures_tolerated_strong, reply.failures_tolerated_eventual
    )
}

fn described(keyspace: &v1::Keyspace) -> String {
    format!(
        "{} keys, {}, {} partitions of {} replicas",
        keys_name(keyspace),
        layout_name(keyspace),
        keyspace.partitions,
        keyspace.replicas
    )
}

fn keys_name(keyspace: &v1::Keyspace) -> String {
    match keyspace.keys() {
        v1::KeyKind::Integer => format!("integer [0, {})", keyspace.max),
        v1::KeyKind::Bytes | v1::KeyKind::Unspecified => "bytes".to_owned(),
    }
}

fn layout_name(keyspace: &v1::Keyspace) -> &'static str {
    match keyspace.layout() {
        v1::Layout::Hashed => "hashed",
        v1::Layout::Ordered | v1::Layout::Unspecified => "ordered",
    }
}

fn keyspace_json(keyspace: &v1::Keyspace) -> Value {
    let integer = keyspace.keys() == v1::KeyKind::Integer;
    json!({
        "keyspace": keyspace.name,
        "id": keyspace.id,
        "keys": if integer { "integer" } else { "bytes" },
        "max": integer.then_some(keyspace.max),
        "layout": layout_name(keyspace),
        "replicas": keyspace.replicas,
        "partitions": keyspace.partitions,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::integer_key;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        create: Create,
    }

    fn request(line: &str) -> Result<v1::CreateKeyspaceRequest, String> {
        let words = std::iter::once("create").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        line.create.request(false).map_err(|failure| failure.to_string())
    }

    #[test]
    fn tolerated_failures_are_another_way_to_say_replicas() {
        assert_eq!(request("a --tolerate 2").unwrap().replicas, 5);
        assert_eq!(request("a --tolerate 0").unwrap().replicas, 1);
        assert_eq!(request("a --replicas 4").unwrap().replicas, 4);
        assert_eq!(request("a").unwrap().replicas, 0, "the cluster's default");
        assert!(request("a --tolerate 1 --replicas 3").is_err());
        assert!(request("a --replicas 0").is_err() && request("a --replicas 10").is_err());
        assert!(request("a --tolerate 5").is_err());
    }

    #[test]
    fn keyspaces_are_cut_evenly_or_at_keys() {
        let integers = request("a --keys integer --max 100 --partitions 4").unwrap();
        assert_eq!((integers.keys(), integers.max, integers.partitions), (v1::KeyKind::Integer, 100, 4));
        assert_eq!(request("a --split-at g,n").unwrap().split_at, [Bytes::from("g"), Bytes::from("n")]);
        assert_eq!(request("a --keys integer --split-at 5,10").unwrap().split_at, [integer_key(5), integer_key(10)]);
        assert_eq!(request("a --layout hashed --partitions 8").unwrap().layout(), v1::Layout::Hashed);
        assert!(request("a --partitions 4").unwrap_err().contains("--split-at"));
        assert!(request("a --layout hashed --split-at g").unwrap_err().contains("--partitions"));
        assert!(request("a --max 5").unwrap_err().contains("--keys integer"));
        assert!(request("a --keys integer --max 5 --split-at 5").unwrap_err().contains("KEY_OUT_OF_DOMAIN"));
    }
}
