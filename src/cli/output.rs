//! Printing results: stdout is data, stderr is messages.
//!
//! Invariants:
//! * JSON is one object per line, its fields in a fixed order; 64-bit versions are strings there, because most JSON
//!   readers round numbers above 2^53;
//! * nothing is printed that was not asked for: no colours, no frames, no progress on stdout.

use super::{
    failure::Failure,
    options::Format,
    text::{JsonKey, KeyText, to_json},
};
use crate::proto::v1;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use std::io::{self, BufWriter, Write};

/// Where results go.
pub struct Output {
    /// How they are printed.
    pub format: Format,
    out: BufWriter<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Output {
    /// To stdout.
    #[must_use]
    pub fn stdout(format: Format) -> Self {
        Self::to(format, Box::new(io::stdout()))
    }

    /// To anything that can be written to.
    #[must_use]
    pub fn to(format: Format, out: Box<dyn Write + Send>) -> Self {
        Self { format, out: BufWriter::new(out) }
    }

    /// One object on a line of its own.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn json(&mut self, object: &impl Serialize) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.out, object).map_err(io::Error::from)?;
        Ok(self.out.write_all(b"\n")?)
    }

    /// Columns under a header, aligned; only the rows when the header is empty.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn table(&mut self, header: &[&str], rows: Vec<Vec<String>>) -> Result<(), Failure> {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if !header.is_empty() {
            table.set_header(header);
        }
        table.add_rows(rows);
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        for line in table.lines() {
            writeln!(self.out, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Names and values, one pair a line.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn pairs(&mut self, pairs: &[(&str, String)]) -> Result<(), Failure> {
        let rows = pairs.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect();
        self.table(&[], rows)
    }

    /// Bytes as they are.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.out.write_all(bytes)?)
    }

    /// A line of text.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn line(&mut self, text: &str) -> Result<(), Failure> {
        Ok(writeln!(self.out, "{text}")?)
    }

    /// Hands everything to the reader.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn flush(&mut self) -> Result<(), Failure> {
        Ok(self.out.flush()?)
    }
}

/// Who served a read, in JSON.
#[derive(Serialize, Debug)]
pub struct ReadView {
    /// Node that read its state.
    pub node: u64,
    /// `leader`, `follower`, `learner` or `unknown`.
    pub role: &'static str,
    /// Level that was really served.
    pub level: &'static str,
    /// 0: nothing is missing; a number: at most that stale; null: not known.
    pub staleness_ms: Option<f64>,
    /// Partition.
    pub partition: u64,
    /// Last log index applied when the state was read.
    pub applied_index: u64,
    /// True when a weaker level was served than asked for.
    pub degraded: bool,
    /// For `--consistency session=…`.
    pub session_token: String,
}

impl From<&v1::ReadInfo> for ReadView {
    fn from(info: &v1::ReadInfo) -> Self {
        use v1::staleness::Known;
        let staleness_ms = match info.staleness.as_ref().and_then(|staleness| staleness.known.as_ref()) {
            Some(Known::None(_)) => Some(0.0),
            Some(Known::AtMostUs(us)) => Some(*us as f64 / 1_000.0),
            Some(Known::Unknown(_)) | None => None,
        };
        Self {
            node: info.node,
            role: role_name(info.role()),
            level: level_name(info.consistency()),
            staleness_ms,
            partition: info.partition,
            applied_index: info.applied_index,
            degraded: info.degraded,
            session_token: BASE64.encode(&info.session_token),
        }
    }
}

impl ReadView {
    /// In one line, for people.
    #[must_use]
    pub fn sentence(&self) -> String {
        let stale = match self.staleness_ms {
            None => "staleness not known".to_owned(),
            Some(0.0) => "nothing missing".to_owned(),
            Some(ms) => format!("at most {ms} ms stale"),
        };
        format!(
            "{} by n{} ({} of p{}, index {}), {stale}{}",
            self.level,
            self.node,
            self.role,
            self.partition,
            self.applied_index,
            if self.degraded { ", degraded" } else { "" }
        )
    }
}

/// Name of a role.
#[must_use]
pub const fn role_name(role: v1::Role) -> &'static str {
    match role {
        v1::Role::Unspecified => "unknown",
        v1::Role::Leader => "leader",
        v1::Role::Follower => "follower",
        v1::Role::Learner => "learner",
    }
}

/// Name of a level, without its argument.
#[must_use]
pub const fn level_name(level: v1::Consistency) -> &'static str {
    match level {
        v1::Consistency::Unspecified => "unknown",
        v1::Consistency::Linearizable => "linearizable",
        v1::Consistency::Lease => "lease",
        v1::Consistency::Bounded => "bounded",
        v1::Consistency::Session => "session",
        v1::Consistency::Eventual => "eventual",
    }
}

/// A row in JSON.
#[derive(Serialize, Debug)]
pub struct RowView {
    /// Key.
    pub key: JsonKey,
    /// Value; left out when only keys were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Version, as decimal text.
    pub version: String,
}

impl RowView {
    /// With its value.
    #[must_use]
    pub fn new(keys: KeyText, row: &v1::Row) -> Self {
        Self { value: Some(to_json(&row.value)), ..Self::key_only(keys, row) }
    }

    /// Without its value.
    #[must_use]
    pub fn key_only(keys: KeyText, row: &v1::Row) -> Self {
        Self { key: keys.json(&row.key), value: None, version: row.version.to_string() }
    }
}

/// A get in JSON.
#[derive(Serialize, Debug)]
pub struct GetView {
    /// Whether the row exists.
    pub found: bool,
    /// The key asked for.
    pub key: JsonKey,
    /// Its value, or null.
    pub value: Option<String>,
    /// Its version as decimal text, or null.
    pub version: Option<String>,
    /// Who served it.
    pub read: Option<ReadView>,
}

impl GetView {
    /// Of an answer.
    #[must_use]
    pub fn new(keys: KeyText, key: &Bytes, reply: &v1::GetReply) -> Self {
        let row = reply.row.as_ref().filter(|_| reply.found);
        Self {
            found: reply.found,
            key: keys.json(key),
            value: row.map(|row| to_json(&row.value)),
            version: row.map(|row| row.version.to_string()),
            read: reply.read.as_ref().map(ReadView::from),
        }
    }
}

/// A write in JSON.
#[derive(Serialize, Debug)]
pub struct WriteView {
    /// Whether the write happened; false when its condition did not hold.
    pub applied: bool,
    /// The key written.
    pub key: JsonKey,
    /// Version after the write, or the existing one if the condition did not hold; decimal text.
    pub version: String,
    /// Whether the row existed before.
    pub existed: bool,
    /// The number after an increment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<i64>,
    /// The row before, with --return-previous.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<RowView>,
    /// Partition.
    pub partition: Option<u64>,
    /// Log index of the write.
    pub log_index: Option<u64>,
    /// Leading node.
    pub node: Option<u64>,
    /// True when an earlier attempt had been applied.
    pub replayed: bool,
    /// For `--consistency session=…`.
    pub session_token: Option<String>,
}

impl WriteView {
    /// Of an answer.
    #[must_use]
    pub fn new(keys: KeyText, key: &Bytes, reply: &v1::WriteReply) -> Self {
        let info = reply.info.as_ref();
        Self {
            applied: reply.applied,
            key: keys.json(key),
            version: reply.version.to_string(),
            existed: reply.existed,
            number: reply.number,
            previous: reply.previous.as_ref().map(|row| RowView::new(keys, row)),
            partition: info.map(|info| info.partition),
            log_index: info.map(|info| info.log_index),
            node: info.map(|info| info.node),
            replayed: info.is_some_and(|info| info.replayed),
            session_token: info.map(|info| BASE64.encode(&info.session_token)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyKind, integer_key};
    use parking_lot::Mutex;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn printed(print: impl FnOnce(&mut Output)) -> String {
        let sink = Sink::default();
        let mut output = Output::to(Format::Table, Box::new(sink.clone()));
        print(&mut output);
        output.flush().unwrap();
        let bytes = sink.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn reply() -> v1::GetReply {
        let staleness = v1::Staleness { known: Some(v1::staleness::Known::AtMostUs(1_500)) };
        v1::GetReply {
            found: true,
            row: Some(v1::Row { key: integer_key(7), value: vec![0xFF].into(), version: u64::MAX }),
            read: Some(v1::ReadInfo {
                partition: 4,
                applied_index: 9,
                node: 2,
                role: v1::Role::Follower as i32,
                consistency: v1::Consistency::Bounded as i32,
                staleness: Some(staleness),
                session_token: vec![1].into(),
                ..Default::default()
            }),
        }
    }

    #[test]
    fn a_get_in_json_says_what_and_who() {
        let keys = KeyText::new(KeyKind::Integer { max: 10 });
        let text = printed(|output| output.json(&GetView::new(keys, &integer_key(7), &reply())).unwrap());
        assert_eq!(
            text,
            concat!(
                r#"{"found":true,"key":7,"value":"b64:/w==","version":"18446744073709551615","#,
                r#""read":{"node":2,"role":"follower","level":"bounded","staleness_ms":1.5,"partition":4,"#,
                r#""applied_index":9,"degraded":false,"session_token":"AQ=="}}"#,
                "\n"
            )
        );
    }

    #[test]
    fn an_absent_row_is_null_in_json() {
        let keys = KeyText::new(KeyKind::Bytes);
        let text = printed(|output| {
            output.json(&GetView::new(keys, &Bytes::from_static(b"k"), &v1::GetReply::default())).unwrap();
        });
        assert_eq!(text, "{\"found\":false,\"key\":\"k\",\"value\":null,\"version\":null,\"read\":null}\n");
    }

    #[test]
    fn who_served_a_read_is_one_sentence() {
        let view = ReadView::from(&reply().read.unwrap());
        assert_eq!(view.sentence(), "bounded by n2 (follower of p4, index 9), at most 1.5 ms stale");
    }

    #[test]
    fn tables_are_aligned_and_bare() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["longer".to_owned(), "2".to_owned()]];
        let text = printed(|output| output.table(&["KEY", "VALUE"], rows).unwrap());
        assert_eq!(text, "KEY     VALUE\na       1\nlonger  2\n");
    }
}
