//! Rows as lines of a file, and lines gathered into batches: the pure half of `load` and `dump`.
//!
//! Invariants:
//! * what [`write_line`] writes, [`parse_line`] reads back, byte for byte (property test);
//! * a batch never holds a key twice: the later row wins, as it would if rows were written one by one.

use super::text::{KeyText, from_json, from_tsv, to_json, to_tsv};
use bytes::Bytes;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// Rows of one batch at most.
pub const BATCH_ROWS_MAX: usize = 500;
/// Bytes of keys and values of one batch at most, unless a single row is larger.
pub const BATCH_BYTES_MAX: usize = 512 << 10;

/// Form of a file of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum RecordFormat {
    /// Key, tab, value; escapes \t \n \r \\ \xHH
    Tsv,
    /// {"key":…,"value":…} on each line
    Jsonl,
}

impl RecordFormat {
    /// By extension: `.tsv`, `.txt`, `.jsonl`, `.ndjson`; a path without a file (`-`) is TSV.
    #[must_use]
    pub fn of_path(path: &Path) -> Option<Self> {
        if path.as_os_str() == "-" {
            return Some(Self::Tsv);
        }
        match path.extension()?.to_str()? {
            "tsv" | "txt" => Some(Self::Tsv),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            _ => None,
        }
    }
}

#[derive(Deserialize)]
struct Record {
    key: serde_json::Value,
    value: String,
}

#[derive(Serialize)]
struct RecordOut {
    key: super::text::JsonKey,
    value: String,
}

/// The row on a line without its line end; `None` for an empty line.
///
/// # Errors
/// What is wrong with the line.
pub fn parse_line(
    format: RecordFormat,
    raw: bool,
    keys: KeyText,
    line: &[u8],
) -> Result<Option<(Bytes, Bytes)>, String> {
    if line.is_empty() {
        return Ok(None);
    }
    match format {
        RecordFormat::Jsonl => {
            let record: Record = serde_json::from_slice(line).map_err(|error| error.to_string())?;
            let key = keys.parse_json(&record.key).map_err(|error| error.to_string())?;
            let value = from_json(&record.value).map_err(|error| error.to_string())?;
            Ok(Some((key, value)))
        }
        RecordFormat::Tsv => {
            let tab = line.iter().position(|byte| *byte == b'\t').ok_or("no tab between key and value")?;
            let field = |text: &[u8]| if raw { Ok(Bytes::copy_from_slice(text)) } else { from_tsv(text) };
            let (key, value) = (field(&line[..tab])?, field(&line[tab + 1..])?);
            let key = keys.parse(&key).map_err(|error| error.to_string())?;
            Ok(Some((key, value)))
        }
    }
}

/// A row as a line, without its line end.
#[must_use]
pub fn write_line(format: RecordFormat, keys: KeyText, key: &[u8], value: &[u8]) -> String {
    match format {
        RecordFormat::Tsv => format!("{}\t{}", keys.tsv(key), to_tsv(value)),
        RecordFormat::Jsonl => {
            let record = RecordOut { key: keys.json(key), value: to_json(value) };
            serde_json::to_string(&record).expect("a record is plain data")
        }
    }
}

/// Rows gathered for one request.
#[derive(Debug, Default)]
pub struct Batch {
    rows: BTreeMap<Bytes, Bytes>,
    bytes: usize,
}

impl Batch {
    /// Adds a row; an earlier one of the same key is forgotten.
    pub fn push(&mut self, key: Bytes, value: Bytes) {
        self.bytes += key.len() + value.len();
        let key_len = key.len();
        if let Some(before) = self.rows.insert(key, value) {
            self.bytes -= key_len + before.len();
        }
    }

    /// Whether the batch must be sent before a row of this many bytes may be added.
    #[must_use]
    pub fn is_full_for(&self, row_bytes: usize) -> bool {
        self.rows.len() >= BATCH_ROWS_MAX || (!self.rows.is_empty() && self.bytes + row_bytes > BATCH_BYTES_MAX)
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows by key.
    #[must_use]
    pub fn into_rows(self) -> BTreeMap<Bytes, Bytes> {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyKind, integer_key};
    use proptest::prelude::*;

    const BYTES: KeyText = KeyText::new(KeyKind::Bytes);
    const INTEGERS: KeyText = KeyText::new(KeyKind::Integer { max: u64::MAX });
    const FORMATS: [RecordFormat; 2] = [RecordFormat::Tsv, RecordFormat::Jsonl];

    proptest! {
        #[test]
        fn what_is_dumped_is_loaded_again(key in any::<Vec<u8>>(), value in any::<Vec<u8>>(), n in 0..u64::MAX) {
            for format in FORMATS {
                for (keys, key) in [(BYTES, Bytes::from(key.clone())), (INTEGERS, integer_key(n))] {
                    let line = write_line(format, keys, &key, &value);
                    prop_assert!(!line.contains('\n'));
                    let row = parse_line(format, false, keys, line.as_bytes()).unwrap().unwrap();
                    prop_assert_eq!(row, (key, Bytes::from(value.clone())));
                }
            }
        }
    }

    #[test]
    fn lines_that_are_not_rows_are_named() {
        let error = |format, line: &[u8]| parse_line(format, false, BYTES, line).unwrap_err();
        assert!(error(RecordFormat::Tsv, b"no tab").contains("no tab"));
        assert!(error(RecordFormat::Tsv, b"k\tC:\\dir").contains("--raw"));
        assert!(error(RecordFormat::Jsonl, b"{\"key\":\"k\"}").contains("value"));
        assert!(error(RecordFormat::Jsonl, b"{\"key\":5,\"value\":\"\"}").contains("not a string"));
        assert_eq!(parse_line(RecordFormat::Tsv, false, BYTES, b""), Ok(None));
        let raw = parse_line(RecordFormat::Tsv, true, BYTES, b"k\tC:\\dir\tx").unwrap().unwrap();
        assert_eq!(raw.1, "C:\\dir\tx");
    }

    #[test]
    fn scans_in_json_can_be_loaded() {
        let line = br#"{"key":7,"value":"v","version":"12"}"#;
        let row = parse_line(RecordFormat::Jsonl, false, INTEGERS, line).unwrap().unwrap();
        assert_eq!(row, (integer_key(7), Bytes::from("v")));
    }

    #[test]
    fn formats_follow_the_extension() {
        let of = |path: &str| RecordFormat::of_path(Path::new(path));
        assert_eq!(of("a/b.tsv"), Some(RecordFormat::Tsv));
        assert_eq!(of("b.jsonl"), Some(RecordFormat::Jsonl));
        assert_eq!(of("-"), Some(RecordFormat::Tsv));
        assert_eq!(of("b.csv"), None);
        assert_eq!(of("tsv"), None);
    }

    #[test]
    fn the_later_row_of_a_key_wins_within_a_batch() {
        let mut batch = Batch::default();
        batch.push("k".into(), "first".into());
        batch.push("k".into(), "second".into());
        assert_eq!(batch.bytes, 1 + 6);
        assert_eq!(batch.into_rows(), BTreeMap::from([("k".into(), "second".into())]));
    }

    #[test]
    fn a_batch_is_bounded_in_rows_and_bytes() {
        let mut batch = Batch::default();
        assert!(!batch.is_full_for(usize::MAX), "one row always fits");
        batch.push("k".into(), vec![0; BATCH_BYTES_MAX - 1].into());
        assert!(batch.is_full_for(1) && !batch.is_full_for(0));
        let mut batch = Batch::default();
        (0..BATCH_ROWS_MAX as u64).for_each(|n| batch.push(integer_key(n), Bytes::new()));
        assert!(batch.is_full_for(0));
    }
}
