//! `meridian kv`: reading and writing rows.
//!
//! Invariant: `found = false` and `applied = false` are results: they are printed, and show in the exit code
//! (3 and 4), never as an error.

use super::{
    bulk,
    failure::Failure,
    options::{Format, Options, ReadArgs},
    output::{GetView, Output, ReadView, WriteView},
    remote::Remote,
    scan,
    text::{KeyText, bytes_of_argument, cell},
};
use crate::proto::v1;
use bytes::Bytes;
use clap::{ArgGroup, Args, Subcommand};
use std::{ffi::OsString, io::Read as _, os::unix::ffi::OsStrExt as _, path::PathBuf};

/// What to do with rows.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Read one row
    Get(Get),
    /// Write one row
    Put(Put),
    /// Delete one row, or with --from/--to, --prefix or --all a range of them
    Del(Del),
    /// Replace or delete one row if a condition on it holds
    Cas(Cas),
    /// Add to a decimal number; an absent row counts as 0
    Incr(Incr),
    /// Read a range in key order
    Scan(scan::Scan),
    /// Count the rows of a range
    Count(scan::Count),
    /// Write every row of a file
    Load(bulk::Load),
    /// Print every row of the keyspace in the form that `load` reads
    Dump(bulk::Dump),
}

/// A key given as an argument.
#[derive(Args, Debug)]
pub struct Key {
    /// Key; decimal in an integer keyspace; may be empty ("")
    #[arg(allow_negative_numbers = true)]
    pub key: OsString,
}

impl Key {
    fn bytes(&self, keys: KeyText) -> Result<Bytes, Failure> {
        Ok(keys.parse(self.key.as_bytes())?)
    }
}

/// Read one row.
#[derive(Args, Debug)]
pub struct Get {
    #[command(flatten)]
    key: Key,
    #[command(flatten)]
    read: ReadArgs,
    /// With --consistency eventual: believe the first replica that does not have the key
    #[arg(long)]
    no_confirm_absent: bool,
}

/// What must hold of a row before it is written.
#[derive(Args, Debug, Default)]
#[command(group = ArgGroup::new("condition").multiple(false))]
pub struct Condition {
    /// Only if there is no such row
    #[arg(long, group = "condition")]
    if_absent: bool,
    /// Only if there is such a row
    #[arg(long, group = "condition")]
    if_present: bool,
    /// Only if the row has exactly this version
    #[arg(long, group = "condition", value_name = "VERSION")]
    if_version: Option<u64>,
    /// Only if the row has exactly this value
    #[arg(long, group = "condition", value_name = "VALUE")]
    if_value: Option<OsString>,
}

impl Condition {
    /// As in a request; `None` when nothing was asked.
    fn request(&self, hex: bool) -> Result<Option<v1::Condition>, Failure> {
        use v1::condition::Must;
        let must = match self {
            Self { if_absent: true, .. } => Must::Absent(true),
            Self { if_present: true, .. } => Must::Present(true),
            Self { if_version: Some(version), .. } => Must::Version(*version),
            Self { if_value: Some(value), .. } => Must::Value(bytes_of_argument(value.as_bytes(), hex)?),
            _ => return Ok(None),
        };
        Ok(Some(v1::Condition { must: Some(must) }))
    }
}

/// A value given as an argument or in a file.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("new value").required(true).args(["value", "value_file"]))]
pub struct Value {
    /// Value
    #[arg(allow_negative_numbers = true)]
    value: Option<OsString>,
    /// Read the value from a file, byte for byte; `-` is stdin
    #[arg(long, value_name = "FILE")]
    value_file: Option<PathBuf>,
}

impl Value {
    fn bytes(&self, hex: bool) -> Result<Bytes, Failure> {
        match (&self.value, &self.value_file) {
            (Some(value), _) => Ok(bytes_of_argument(value.as_bytes(), hex)?),
            (None, Some(path)) => read_file(path),
            (None, None) => Err(Failure::Usage("error: a value is required".to_owned())),
        }
    }
}

/// The bytes of a file, or of stdin when the path is `-`.
fn read_file(path: &PathBuf) -> Result<Bytes, Failure> {
    let read = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        std::fs::read(path)
    };
    read.map(Bytes::from)
        .map_err(|error| Failure::Other(anyhow::Error::new(error).context(format!("cannot read {}", path.display()))))
}

/// Write one row.
#[derive(Args, Debug)]
pub struct Put {
    #[command(flatten)]
    key: Key,
    #[command(flatten)]
    value: Value,
    #[command(flatten)]
    condition: Condition,
    /// Print the row as it was before
    #[arg(long)]
    return_previous: bool,
}

/// Delete.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").required(true).multiple(true).args(["key", "from", "to", "prefix", "all"]))]
pub struct Del {
    /// Key
    #[arg(allow_negative_numbers = true, conflicts_with_all = ["from", "to", "inclusive", "prefix", "all"])]
    key: Option<OsString>,
    #[command(flatten)]
    range: scan::RangeArgs,
    /// Delete every row of the keyspace
    #[arg(long, conflicts_with_all = ["from", "to", "inclusive", "prefix"])]
    all: bool,
    #[command(flatten)]
    condition: Condition,
    /// Exit with 3 if there is no such row, which is a success otherwise
    #[arg(long)]
    must_exist: bool,
    /// Print the row as it was before
    #[arg(long)]
    return_previous: bool,
}

/// Replace or delete under a condition.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("new value").required(true).args(["value", "delete"]))]
#[command(mut_group("condition", |group| group.required(true)))]
pub struct Cas {
    #[command(flatten)]
    key: Key,
    /// New value
    #[arg(allow_negative_numbers = true)]
    value: Option<OsString>,
    /// Delete the row instead
    #[arg(long)]
    delete: bool,
    #[command(flatten)]
    condition: Condition,
    /// Print the row as it was before
    #[arg(long)]
    return_previous: bool,
}

/// Add to a number.
#[derive(Args, Debug)]
pub struct Incr {
    #[command(flatten)]
    key: Key,
    /// What to add; may be negative
    #[arg(default_value_t = 1, allow_negative_numbers = true)]
    delta: i64,
    /// Print the row as it was before
    #[arg(long)]
    return_previous: bool,
}

/// Runs one command.
///
/// # Errors
/// As described for the exit codes.
pub async fn run(command: Command, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let remote = Remote::connect(options).await?;
    let keys = remote.key_text(options).await?;
    match command {
        Command::Get(args) => get(&args, &remote, keys, options, output).await,
        Command::Put(args) => {
            let key = args.key.bytes(keys)?;
            let request = v1::PutRequest {
                keyspace: options.keyspace.clone(),
                key: key.clone(),
                value: args.value.bytes(options.hex)?,
                condition: args.condition.request(options.hex)?,
                return_previous: args.return_previous,
                session: None,
            };
            written(keys, &key, &remote.put(request).await?, output)
        }
        Command::Del(args) => delete(&args, &remote, keys, options, output).await,
        Command::Cas(args) => {
            let key = args.key.bytes(keys)?;
            let value =
                args.value.as_ref().map(|value| bytes_of_argument(value.as_bytes(), options.hex)).transpose()?;
            let request = v1::CompareAndSetRequest {
                keyspace: options.keyspace.clone(),
                key: key.clone(),
                condition: args.condition.request(options.hex)?,
                value,
                return_previous: args.return_previous,
                session: None,
            };
            written(keys, &key, &remote.compare_and_set(request).await?, output)
        }
        Command::Incr(args) => {
            let key = args.key.bytes(keys)?;
            let request = v1::IncrementRequest {
                keyspace: options.keyspace.clone(),
                key: key.clone(),
                delta: args.delta,
                return_previous: args.return_previous,
                session: None,
            };
            written(keys, &key, &remote.increment(request).await?, output)
        }
        Command::Scan(args) => scan::scan(&args, &remote, keys, options, output).await,
        Command::Count(args) => scan::count(&args, &remote, keys, options, output).await,
        Command::Load(args) => bulk::load(&args, &remote, keys, options, output).await,
        Command::Dump(args) => bulk::dump(&args, &remote, keys, options, output).await,
    }
}

async fn get(
    args: &Get,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let key = args.key.bytes(keys)?;
    let mut read = args.read.read_options(&options.consistency)?;
    read.confirm_absent = args.no_confirm_absent.then_some(false);
    let request = v1::GetRequest { keyspace: options.keyspace.clone(), key: key.clone(), options: Some(read) };
    let reply = remote.get(request).await?;
    let row = reply.row.clone().filter(|_| reply.found);
    match (output.format, &row) {
        (Format::Json, _) => output.json(&GetView::new(keys, &key, &reply))?,
        (Format::Plain, Some(row)) => {
            output.raw(&row.value)?;
            output.raw(b"\n")?;
        }
        (Format::Table, Some(row)) => {
            let read = reply.read.as_ref().map(|info| ReadView::from(info).sentence()).unwrap_or_default();
            output.pairs(&[
                ("key", keys.shown(&key)),
                ("value", whole(&row.value)),
                ("version", row.version.to_string()),
                ("read", read),
            ])?;
        }
        (Format::Plain | Format::Table, None) => {}
    }
    match row {
        Some(_) => Ok(()),
        None => Err(Failure::NotFound(format!("not found: {} in {}", keys.shown(&key), options.keyspace))),
    }
}

/// A value in full if it is text that a terminal shows as it is, else as a cell.
fn whole(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => cell(value),
    }
}

async fn delete(
    args: &Del,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let Some(key) = &args.key else {
        let single_only = args.must_exist || args.return_previous || args.condition.request(options.hex)?.is_some();
        if single_only {
            return Err(Failure::Usage("error: conditions, --must-exist and --return-previous need a KEY".to_owned()));
        }
        return delete_range(&args.range, remote, keys, options, output).await;
    };
    let key = keys.parse(key.as_bytes())?;
    let request = v1::DeleteRequest {
        keyspace: options.keyspace.clone(),
        key: key.clone(),
        condition: args.condition.request(options.hex)?,
        must_exist: args.must_exist,
        return_previous: args.return_previous,
        session: None,
    };
    let reply = remote.delete(request).await?;
    if output.format == Format::Table && reply.applied && !reply.existed {
        return output.line(&format!("ok, there was no row {}", keys.shown(&key)));
    }
    written(keys, &key, &reply, output)
}

async fn delete_range(
    range: &scan::RangeArgs,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let request = v1::DeleteRangeRequest {
        keyspace: options.keyspace.clone(),
        range: Some(range.whole_range(keys)?),
        session: None,
    };
    let reply = remote.delete_range(request).await?;
    match output.format {
        Format::Json => {
            let partitions: Vec<u64> = reply.infos.iter().map(|info| info.partition).collect();
            output.json(&serde_json::json!({ "deleted": reply.deleted, "partitions": partitions }))
        }
        Format::Plain => output.line(&reply.deleted.to_string()),
        Format::Table => output.line(&format!("deleted {} rows", reply.deleted)),
    }
}

/// Prints the answer to a single-row write.
fn written(keys: KeyText, key: &Bytes, reply: &v1::WriteReply, output: &mut Output) -> Result<(), Failure> {
    match (output.format, reply.number) {
        (Format::Json, _) => output.json(&WriteView::new(keys, key, reply))?,
        (_, Some(number)) if reply.applied => output.line(&number.to_string())?,
        (Format::Table, _) if reply.applied => {
            output.line(&format!("ok, version {}{}", reply.version, if reply.existed { "" } else { ", new" }))?;
        }
        (Format::Plain | Format::Table, _) => {}
    }
    if let (Format::Plain | Format::Table, Some(previous)) = (output.format, &reply.previous) {
        let value = cell(&previous.value);
        output.pairs(&[("previous", value), ("previous version", previous.version.to_string())])?;
    }
    if reply.applied {
        return Ok(());
    }
    let state = match reply.version {
        0 => "there is no such row".to_owned(),
        version => format!("the row has version {version}"),
    };
    Err(Failure::ConditionNotMet(format!("condition not met, nothing written: {state}")))
}
