//! `meridian kv scan` and `count`: ranges, in key order, page after page.
//!
//! Invariant: a row is printed when its page has arrived; nothing is held back until the end, however long the range.

use super::{
    failure::Failure,
    options::{Format, Options, ReadArgs},
    output::{Output, ReadView, RowView},
    remote::Remote,
    text::{KeyText, cell, to_tsv},
};
use crate::{
    error::Error,
    key::{Span, prefix_end},
    proto::v1,
};
use bytes::Bytes;
use clap::Args;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    os::unix::ffi::OsStrExt as _,
};

/// A range of keys.
#[derive(Args, Debug, Default, Clone)]
pub struct RangeArgs {
    /// First key; without it, from the very start
    #[arg(long, value_name = "KEY", allow_negative_numbers = true)]
    pub from: Option<OsString>,
    /// Key to stop before (with --inclusive: the last key); without it, to the very end
    #[arg(long, value_name = "KEY", allow_negative_numbers = true)]
    pub to: Option<OsString>,
    /// The key given with --to belongs to the range
    #[arg(long, requires = "to")]
    pub inclusive: bool,
    /// Only keys that begin with this
    #[arg(long, value_name = "KEY", conflicts_with_all = ["from", "to"])]
    pub prefix: Option<OsString>,
}

impl RangeArgs {
    /// The bounds as of a request.
    fn range(&self, keys: KeyText) -> Result<v1::KeyRange, Error> {
        let lower = self.from.as_ref().map(|from| keys.parse_end(from.as_bytes(), false)).transpose()?;
        let upper = self.to.as_ref().map(|to| keys.parse_end(to.as_bytes(), self.inclusive)).transpose()?;
        Ok(v1::KeyRange {
            lower: lower.map(|key| v1::Bound { key, inclusive: true }),
            upper: upper.map(|key| v1::Bound { key, inclusive: self.inclusive }),
        })
    }

    /// The prefix as of a request; empty when there is none.
    fn prefix(&self, keys: KeyText) -> Result<Bytes, Failure> {
        match (&self.prefix, keys.kind) {
            (None, _) => Ok(Bytes::new()),
            (Some(prefix), crate::key::KeyKind::Bytes) => Ok(keys.parse(prefix.as_bytes())?),
            (Some(_), crate::key::KeyKind::Integer { .. }) => {
                Err(Failure::Usage("error: integer keys have no prefix; use --from and --to".to_owned()))
            }
        }
    }

    /// Bounds that say everything, the prefix included.
    ///
    /// # Errors
    /// When a key is not one of the keyspace's.
    pub fn whole_range(&self, keys: KeyText) -> Result<v1::KeyRange, Failure> {
        let prefix = self.prefix(keys)?;
        if prefix.is_empty() {
            return Ok(self.range(keys)?);
        }
        let span = Span { end: prefix_end(&prefix), start: prefix };
        Ok(v1::KeyRange {
            lower: Some(v1::Bound { key: span.start, inclusive: true }),
            upper: span.end.map(|key| v1::Bound { key, inclusive: false }),
        })
    }
}

/// Read a range.
#[derive(Args, Debug)]
pub struct Scan {
    #[command(flatten)]
    range: RangeArgs,
    /// Largest key first; --from and --to mean the same
    #[arg(long)]
    reverse: bool,
    /// Most rows
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Leave the values out
    #[arg(long)]
    keys_only: bool,
    /// Leave out partitions that cannot answer, name them on stderr, and exit with 5
    #[arg(long)]
    skip_unavailable: bool,
    /// Say on stderr who served the rows
    #[arg(long)]
    show_reads: bool,
    /// Say on stderr at the end which partitions were asked, who served them, and what that cost
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    read: ReadArgs,
}

/// Count a range.
#[derive(Args, Debug)]
pub struct Count {
    #[command(flatten)]
    range: RangeArgs,
    #[command(flatten)]
    read: ReadArgs,
}

impl Scan {
    fn request(&self, keys: KeyText, options: &Options) -> Result<v1::ScanRequest, Failure> {
        let mut request = v1::ScanRequest {
            keyspace: options.keyspace.clone(),
            range: Some(self.range.range(keys)?),
            prefix: self.range.prefix(keys)?,
            limit: self.limit,
            keys_only: self.keys_only,
            options: Some(self.read.read_options(&options.consistency)?),
            ..Default::default()
        };
        if !request.prefix.is_empty() {
            request.range = None;
        }
        if self.reverse {
            request.set_order(v1::Order::Descending);
        }
        if self.skip_unavailable {
            request.set_on_partition_failure(v1::OnPartitionFailure::Skip);
        }
        Ok(request)
    }
}

/// Reads a range page after page and prints it.
///
/// # Errors
/// As described for the exit codes.
pub async fn scan(
    args: &Scan,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut request = args.request(keys, options)?;
    let mut missing = Vec::new();
    let mut costs = Costs::default();
    let mut first = true;
    loop {
        let page = remote.scan(request.clone()).await?;
        print_rows(&page.rows, keys, args.keys_only, first, output)?;
        output.flush()?;
        first &= page.rows.is_empty();
        missing.extend(page.missing);
        costs.add(&page.reads);
        if args.show_reads {
            for read in &page.reads {
                eprintln!("{}", ReadView::from(read).sentence());
            }
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if args.explain {
        costs.lines().iter().for_each(|line| eprintln!("{line}"));
    }
    report_missing(&missing, keys)
}

/// What a scan cost, by partition and the replica that served it.
#[derive(Default)]
struct Costs(BTreeMap<(u64, u64, &'static str), Cost>);

#[derive(Default)]
struct Cost {
    parts: u64,
    rows: u64,
    rows_scanned: u64,
    bytes: u64,
    retries: u64,
    took_us: u64,
}

impl Costs {
    fn add(&mut self, reads: &[v1::ReadInfo]) {
        for read in reads {
            let part = read.scan.unwrap_or_default();
            let cost = self.0.entry((read.partition, read.node, ReadView::from(read).role)).or_default();
            cost.parts += 1;
            cost.rows += part.rows;
            cost.rows_scanned += part.rows_scanned;
            cost.bytes += part.bytes;
            cost.retries += u64::from(part.attempts.saturating_sub(1));
            cost.took_us += part.took_us;
        }
    }

    /// A line for each replica, and one for all.
    fn lines(&self) -> Vec<String> {
        let told = |who: String, cost: &Cost| {
            let Cost { parts, rows, rows_scanned, bytes, retries, took_us } = cost;
            let took_ms = *took_us as f64 / 1_000.0;
            format!(
                "{who}: {parts} parts, {rows} of {rows_scanned} rows, {bytes} bytes, {retries} retries, {took_ms:.1} ms"
            )
        };
        let mut all = Cost::default();
        let mut lines = Vec::new();
        for ((partition, node, role), cost) in &self.0 {
            lines.push(told(format!("p{partition} served by n{node} ({role})"), cost));
            all.parts += cost.parts;
            all.rows += cost.rows;
            all.rows_scanned += cost.rows_scanned;
            all.bytes += cost.bytes;
            all.retries += cost.retries;
            all.took_us += cost.took_us;
        }
        let partitions = self.0.keys().map(|(partition, ..)| partition).collect::<BTreeSet<_>>().len();
        lines.push(told(format!("{partitions} partitions"), &all));
        lines
    }
}

/// Names the intervals left out; they make the exit code 5.
fn report_missing(missing: &[v1::MissingRange], keys: KeyText) -> Result<(), Failure> {
    let Some(first) = missing.first() else { return Ok(()) };
    for missing in missing {
        let cause = missing.error.clone().map(|error| Error::from(error).to_string()).unwrap_or_default();
        let range = shown_range(missing.range.as_ref(), keys);
        eprintln!("missing: {range} of p{}: {cause}", missing.partition);
    }
    let cause = first
        .error
        .clone()
        .map_or_else(|| Error::new(crate::error::Reason::LeaderUnknown, "a partition did not answer"), Error::from);
    Err(Failure::Api(cause))
}

fn shown_range(range: Option<&v1::KeyRange>, keys: KeyText) -> String {
    let bound = |bound: Option<&v1::Bound>| bound.map(|bound| (keys.shown(&bound.key), bound.inclusive));
    let lower = match bound(range.and_then(|range| range.lower.as_ref())) {
        None => "(start".to_owned(),
        Some((key, inclusive)) => format!("{}{key}", if inclusive { "[" } else { "(" }),
    };
    let upper = match bound(range.and_then(|range| range.upper.as_ref())) {
        None => "end)".to_owned(),
        Some((key, inclusive)) => format!("{key}{}", if inclusive { "]" } else { ")" }),
    };
    format!("{lower}, {upper}")
}

fn print_rows(
    rows: &[v1::Row],
    keys: KeyText,
    keys_only: bool,
    first: bool,
    output: &mut Output,
) -> Result<(), Failure> {
    match output.format {
        Format::Json => {
            let view = if keys_only { RowView::key_only } else { RowView::new };
            rows.iter().try_for_each(|row| output.json(&view(keys, row)))
        }
        Format::Plain if keys_only => rows.iter().try_for_each(|row| output.line(&keys.tsv(&row.key))),
        Format::Plain => {
            rows.iter().try_for_each(|row| output.line(&format!("{}\t{}", keys.tsv(&row.key), to_tsv(&row.value))))
        }
        Format::Table if rows.is_empty() => Ok(()),
        Format::Table => {
            let header: &[&str] = match (first, keys_only) {
                (false, _) => &[],
                (true, true) => &["KEY", "VERSION"],
                (true, false) => &["KEY", "VALUE", "VERSION"],
            };
            let line = |row: &v1::Row| {
                let value = (!keys_only).then(|| cell(&row.value));
                [Some(keys.shown(&row.key)), value, Some(row.version.to_string())].into_iter().flatten().collect()
            };
            output.table(header, rows.iter().map(line).collect())
        }
    }
}

/// Counts a range and prints the number.
///
/// # Errors
/// As described for the exit codes.
pub async fn count(
    args: &Count,
    remote: &Remote,
    keys: KeyText,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let prefix = args.range.prefix(keys)?;
    let request = v1::CountRequest {
        keyspace: options.keyspace.clone(),
        range: if prefix.is_empty() { Some(args.range.range(keys)?) } else { None },
        prefix,
        options: Some(args.read.read_options(&options.consistency)?),
    };
    let reply = remote.count(request).await?;
    match output.format {
        Format::Json => {
            let reads: Vec<ReadView> = reply.reads.iter().map(ReadView::from).collect();
            output.json(&serde_json::json!({ "count": reply.count, "reads": reads }))
        }
        Format::Plain | Format::Table => output.line(&reply.count.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyKind, integer_key};

    fn args(from: &str, to: &str, inclusive: bool) -> RangeArgs {
        RangeArgs { from: Some(from.into()), to: Some(to.into()), inclusive, prefix: None }
    }

    #[test]
    fn bounds_say_whether_they_are_inclusive() {
        let keys = KeyText::new(KeyKind::Bytes);
        let range = args("a", "c", true).range(keys).unwrap();
        assert_eq!(range.lower, Some(v1::Bound { key: "a".into(), inclusive: true }));
        assert_eq!(range.upper, Some(v1::Bound { key: "c".into(), inclusive: true }));
        assert!(!args("a", "c", false).range(keys).unwrap().upper.unwrap().inclusive);
        assert_eq!(RangeArgs::default().range(keys).unwrap(), v1::KeyRange::default());
    }

    #[test]
    fn a_prefix_becomes_bounds_where_only_bounds_are_taken() {
        let keys = KeyText::new(KeyKind::Bytes);
        let prefix = RangeArgs { prefix: Some("ab".into()), ..RangeArgs::default() };
        let range = prefix.whole_range(keys).unwrap();
        assert_eq!(range.lower, Some(v1::Bound { key: "ab".into(), inclusive: true }));
        assert_eq!(range.upper, Some(v1::Bound { key: "ac".into(), inclusive: false }));
        let integers = KeyText::new(KeyKind::Integer { max: 5 });
        assert!(matches!(prefix.whole_range(integers), Err(Failure::Usage(_))));
    }

    #[test]
    fn costs_add_up_by_partition_and_replica() {
        let read = |partition, node, attempts| {
            let scan = Some(v1::ScanCost { rows: 10, rows_scanned: 15, bytes: 500, attempts, took_us: 1_500 });
            let role = v1::Role::Leader as i32;
            v1::ReadInfo { partition, node, role, scan, ..Default::default() }
        };
        let mut costs = Costs::default();
        costs.add(&[read(3, 1, 1), read(3, 1, 3), read(4, 2, 1)]);
        let lines = costs.lines();
        assert_eq!(lines[0], "p3 served by n1 (leader): 2 parts, 20 of 30 rows, 1000 bytes, 2 retries, 3.0 ms");
        assert_eq!(lines[2], "2 partitions: 3 parts, 30 of 45 rows, 1500 bytes, 2 retries, 4.5 ms");
    }

    #[test]
    fn integer_ranges_are_half_open_up_to_the_maximum() {
        let keys = KeyText::new(KeyKind::Integer { max: 100 });
        let range = args("0", "100", false).range(keys).unwrap();
        assert_eq!(range.upper, Some(v1::Bound { key: integer_key(100), inclusive: false }));
        assert!(args("0", "100", true).range(keys).is_err());
        assert!(args("-1", "5", false).range(keys).is_err());
    }

    #[test]
    fn missing_intervals_are_shown_with_their_bounds() {
        let keys = KeyText::new(KeyKind::Bytes);
        let range = args("a", "c", true).range(keys).unwrap();
        assert_eq!(shown_range(Some(&range), keys), "[\"a\", \"c\"]");
        assert_eq!(shown_range(None, keys), "(start, end)");
    }
}
