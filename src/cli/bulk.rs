//! `meridian kv load` and `dump`: whole files in and out.
//!
//! Invariants:
//! * rows of one key are written in the order of the file: a batch waits for every batch in flight that shares a key;
//! * the first failure ends a load; what it says counts only rows that are certainly written;
//! * a dump is whole or not there: a file gets its name when its last row is in it.

use super::{
    failure::Failure,
    options::{Format, Options},
    output::Output,
    records::{Batch, RecordFormat, parse_line, write_line},
    remote::Remote,
    scan::RangeArgs,
    text::KeyText,
};
use crate::{
    error::{Error, Outcome, Reason},
    proto::v1,
};
use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use std::{
    collections::BTreeSet,
    future::Future,
    io::Write as _,
    path::{Path, PathBuf},
    pin::Pin,
};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    time::Instant,
};

/// Batches in flight at most, by default.
const CONCURRENCY_DEFAULT: usize = 8;
/// Longest line of a file: a value of the largest size with every byte escaped.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// Rows of one page of a dump.
const PAGE_ROWS: u32 = 5_000;

/// Write every row of a file.
#[derive(Args, Debug)]
pub struct Load {
    /// File of rows; `-` is stdin
    file: PathBuf,
    /// Form of the file; by default its extension says it (.tsv .txt .jsonl .ndjson; stdin: tsv)
    #[arg(long, value_enum)]
    format: Option<RecordFormat>,
    /// TSV: a backslash stands for itself, and everything after the first tab is the value
    #[arg(long)]
    raw: bool,
    /// Requests in flight
    #[arg(long, default_value_t = CONCURRENCY_DEFAULT as u64, value_parser = clap::value_parser!(u64).range(1..=256))]
    concurrency: u64,
}

/// Print every row.
#[derive(Args, Debug)]
pub struct Dump {
    /// File to write; `-` is stdout
    #[arg(default_value = "-")]
    file: PathBuf,
    /// Form of the file; by default its extension says it (.tsv .txt .jsonl .ndjson; stdout: tsv)
    #[arg(long, value_enum)]
    format: Option<RecordFormat>,
    #[command(flatten)]
    range: RangeArgs,
}

fn format_of(path: &Path, format: Option<RecordFormat>) -> Result<RecordFormat, Failure> {
    format.or_else(|| RecordFormat::of_path(path)).ok_or_else(|| {
        Failure::Usage(format!("error: the extension of {} says nothing; add --format tsv or jsonl", path.display()))
    })
}

/// What a load has done so far.
#[derive(Default)]
struct Totals {
    rows: u64,
    bytes: u64,
}

type Sent = Pin<Box<dyn Future<Output = (Vec<Bytes>, Result<u64, Error>)> + Send>>;

/// Sends batches, a bounded number at a time.
struct Loader<'a> {
    remote: &'a Remote,
    keyspace: String,
    concurrency: usize,
    flying: FuturesUnordered<Sent>,
    flying_keys: BTreeSet<Bytes>,
    totals: Totals,
    progress: ProgressBar,
}

impl Loader<'_> {
    /// Sends a batch, once there is room and none of its keys is on its way already.
    async fn send(&mut self, batch: Batch) -> Result<(), Failure> {
        let rows = batch.into_rows();
        while self.flying.len() >= self.concurrency || rows.keys().any(|key| self.flying_keys.contains(key)) {
            self.settle_one().await?;
        }
        let keys: Vec<Bytes> = rows.keys().cloned().collect();
        self.flying_keys.extend(keys.iter().cloned());
        let bytes = rows.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum();
        let item = |(key, value)| {
            let put = v1::PutRequest { key, value, ..Default::default() };
            v1::BatchItem { op: Some(v1::batch_item::Op::Put(put)) }
        };
        let request = v1::BatchRequest {
            keyspace: self.keyspace.clone(),
            items: rows.into_iter().map(item).collect(),
            atomic: false,
            session: None,
        };
        let remote = self.remote.clone();
        self.flying.push(Box::pin(async move {
            let result = remote.write(request).await.and_then(|reply| first_error(reply).map_or(Ok(bytes), Err));
            (keys, result)
        }));
        Ok(())
    }

    /// Waits for one batch.
    async fn settle_one(&mut self) -> Result<(), Failure> {
        let Some((keys, result)) = self.flying.next().await else { return Ok(()) };
        for key in &keys {
            self.flying_keys.remove(key);
        }
        let bytes = result.map_err(|error| {
            Failure::Api(
                error.with("rows_written_before", self.totals.rows).with("repeating", "a load is safe to run again"),
            )
        })?;
        self.totals.rows += keys.len() as u64;
        self.totals.bytes += bytes;
        self.progress.set_message(format!("{} rows", HumanCount(self.totals.rows)));
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        while !self.flying.is_empty() {
            self.settle_one().await?;
        }
        Ok(())
    }
}

/// The worst error of a batch: one whose outcome is unknown before all others.
fn first_error(reply: v1::BatchReply) -> Option<Error> {
    let errors = reply.items.into_iter().filter_map(|item| match item.result {
        Some(v1::batch_item_reply::Result::Error(error)) => Some(Error::from(error)),
        Some(v1::batch_item_reply::Result::Write(_)) => None,
        None => Some(Error::new(Reason::Internal, "an item without an answer").outcome(Outcome::Unknown)),
    });
    errors.max_by_key(|error| error.outcome == Some(Outcome::Unknown))
}

/// Writes every row of a file.
///
/// # Errors
/// The first bad line with its number, or the first failed write.
pub async fn load(
    args: &Load,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let format = format_of(&args.file, args.format)?;
    let (mut reader, size) = open(&args.file).await?;
    let progress = progress_bar(size);
    let began = Instant::now();
    let mut loader = Loader {
        remote,
        keyspace: options.keyspace.clone(),
        concurrency: args.concurrency as usize,
        flying: FuturesUnordered::new(),
        flying_keys: BTreeSet::new(),
        totals: Totals::default(),
        progress: progress.clone(),
    };
    let mut batch = Batch::default();
    let mut line = Vec::new();
    for number in 1_u64.. {
        let read =
            next_line(&mut reader, &mut line).await.map_err(|error| at_line(&args.file, number, &error.to_string()))?;
        if read == 0 {
            break;
        }
        progress.inc(read);
        let row = parse_line(format, args.raw, keys, strip_line_end(&line, args.raw))
            .map_err(|fault| at_line(&args.file, number, &fault))?;
        let Some((key, value)) = row else { continue };
        if batch.is_full_for(key.len() + value.len()) {
            loader.send(std::mem::take(&mut batch)).await?;
        }
        batch.push(key, value);
    }
    if !batch.is_empty() {
        loader.send(batch).await?;
    }
    loader.finish().await?;
    progress.finish_and_clear();
    summary(&loader.totals, began.elapsed().as_secs_f64(), options, output)
}

fn summary(totals: &Totals, seconds: f64, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let rate = totals.rows as f64 / seconds.max(1e-9);
    match output.format {
        Format::Json => output.json(&serde_json::json!({
            "rows": totals.rows, "bytes": totals.bytes, "seconds": seconds, "rows_per_second": rate.round(),
        })),
        Format::Table | Format::Plain => output.line(&format!(
            "loaded {} rows ({}) into {} in {seconds:.1} s, {} rows/s",
            HumanCount(totals.rows),
            HumanBytes(totals.bytes),
            options.keyspace,
            HumanCount(rate.round() as u64),
        )),
    }
}

type Reader = Box<dyn AsyncBufRead + Unpin + Send>;

async fn open(path: &Path) -> Result<(Reader, Option<u64>), Failure> {
    if path.as_os_str() == "-" {
        return Ok((Box::new(BufReader::new(tokio::io::stdin())), None));
    }
    let named = || format!("cannot read {}", path.display());
    let file = tokio::fs::File::open(path).await.with_context(named)?;
    let size = file.metadata().await.with_context(named)?.len();
    Ok((Box::new(BufReader::with_capacity(1 << 16, file)), Some(size)))
}

/// Reads one line with its end; 0 bytes at the end of the file.
async fn next_line(reader: &mut Reader, line: &mut Vec<u8>) -> std::io::Result<u64> {
    line.clear();
    let read = reader.take(LINE_BYTES_MAX).read_until(b'\n', line).await? as u64;
    if read == LINE_BYTES_MAX && line.last() != Some(&b'\n') {
        return Err(std::io::Error::other(format!("longer than {LINE_BYTES_MAX} bytes")));
    }
    Ok(read)
}

/// The line without `\n`, and without the `\r` of a file from elsewhere.
fn strip_line_end(line: &[u8], raw: bool) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    if raw { line } else { line.strip_suffix(b"\r").unwrap_or(line) }
}

fn at_line(path: &Path, number: u64, fault: &str) -> Failure {
    Failure::Other(anyhow::anyhow!("{}, line {number}: {fault}", path.display()))
}

/// On stderr when that is a terminal, else nowhere.
fn progress_bar(size: Option<u64>) -> ProgressBar {
    let (bar, template) = match size {
        Some(size) => {
            (ProgressBar::new(size), "{bar:40} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {msg}, {eta} left")
        }
        None => (ProgressBar::new_spinner(), "{spinner} {bytes} {bytes_per_sec} {msg}"),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the template is well-formed"))
}

/// Prints every row of a keyspace or range.
///
/// # Errors
/// When a page cannot be read, or the file not written.
pub async fn dump(
    args: &Dump,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let format = format_of(&args.file, args.format)?;
    if args.file.as_os_str() == "-" {
        dump_rows(args, format, remote, keys, options, &mut |line| output.line(line)).await?;
        return Ok(());
    }
    let named = || format!("cannot write {}", args.file.display());
    let mut partial = args.file.clone().into_os_string();
    partial.push(".partial");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&partial).with_context(named)?);
    let rows = dump_rows(args, format, remote, keys, options, &mut |line| Ok(writeln!(file, "{line}")?)).await?;
    file.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all()).with_context(named)?;
    std::fs::rename(&partial, &args.file).with_context(named)?;
    eprintln!("dumped {} rows of {} to {}", HumanCount(rows), options.keyspace, args.file.display());
    Ok(())
}

async fn dump_rows(
    args: &Dump,
    format: RecordFormat,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    print: &mut (dyn FnMut(&str) -> Result<(), Failure> + Send),
) -> Result<u64, Failure> {
    let mut request = v1::ScanRequest {
        keyspace: options.keyspace.clone(),
        range: Some(args.range.whole_range(keys)?),
        page_rows: PAGE_ROWS,
        options: Some(options.consistency.read_options()),
        ..Default::default()
    };
    let mut rows = 0;
    loop {
        let page = remote.scan(request.clone()).await?;
        for row in &page.rows {
            print(&write_line(format, keys, &row.key, &row.value))?;
        }
        rows += page.rows.len() as u64;
        if page.next_page_token.is_empty() {
            return Ok(rows);
        }
        request.page_token = page.next_page_token;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_read_to_the_end_with_or_without_a_last_newline() {
        let mut reader: Reader = Box::new(std::io::Cursor::new(b"a\t1\r\nb\t2".to_vec()));
        let mut line = Vec::new();
        assert_eq!(next_line(&mut reader, &mut line).await.unwrap(), 5);
        assert_eq!(strip_line_end(&line, false), b"a\t1");
        assert_eq!(strip_line_end(&line, true), b"a\t1\r");
        assert_eq!(next_line(&mut reader, &mut line).await.unwrap(), 3);
        assert_eq!(next_line(&mut reader, &mut line).await.unwrap(), 0);
    }

    #[test]
    fn an_unknown_outcome_is_the_error_that_is_reported() {
        let item = |outcome| v1::BatchItemReply {
            result: Some(v1::batch_item_reply::Result::Error(
                (&Error::new(Reason::NoQuorum, "").outcome(outcome)).into(),
            )),
        };
        let written =
            v1::BatchItemReply { result: Some(v1::batch_item_reply::Result::Write(v1::WriteReply::default())) };
        let items = vec![written.clone(), item(Outcome::Unknown), item(Outcome::NotApplied)];
        let error = first_error(v1::BatchReply { applied: false, items }).unwrap();
        assert_eq!(error.outcome, Some(Outcome::Unknown));
        assert_eq!(first_error(v1::BatchReply { applied: false, items: vec![written] }), None);
    }
}
