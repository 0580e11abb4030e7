//! The rows of a partition, and their state as of a freeze while writes go on.
//!
//! Memory: a key is its bytes and 16 more, a value its bytes and 40 more with its version, in tree nodes. Both are
//! copied into allocations of their own when they are stored, always: what arrives is a slice of a Raft entry, which
//! may itself be a slice of a frame of several megabytes, and a [`Bytes`] cannot tell how much it keeps alive. A copy
//! of a large value costs less than its way here; a small one needs an allocation anyway. [`Table::bytes`] is
//! therefore what rows really hold.
//!
//! Invariant: while frozen, `undo` holds, for every key after the cursor whose row has changed, that row as it was.

use super::codec::{Sink, mix, put_bytes, put_u64};
use crate::{
    key::{Layout, Span, Version, position_of_token, token},
    plant::{Bug, planted},
};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Bound::{Excluded, Unbounded};

/// A row without its key.
///
/// The value is an allocation of its own, shared by everyone who reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The value.
    pub value: Bytes,
    /// Version of the row's last write.
    pub version: Version,
}

impl Row {
    /// A number that differs between different rows.
    fn digest(&self, key: &[u8]) -> u64 {
        let (key, value) = (crc32fast::hash(key), crc32fast::hash(&self.value));
        mix(mix((u64::from(key) << 32) | u64::from(value)) ^ self.version)
    }
}

/// Rows in key order.
#[derive(Debug, Default)]
pub(super) struct Table {
    rows: BTreeMap<Box<[u8]>, Row>,
    bytes: u64,
    digest: u64,
    undo: Option<Undo>,
}

/// What is needed to still see the rows of a freeze.
#[derive(Debug, Default)]
struct Undo {
    /// The last key already given out; `None`: none yet.
    cursor: Option<Box<[u8]>>,
    /// Rows after the cursor that have changed since, as they were; `None`: there was none.
    rows: BTreeMap<Box<[u8]>, Option<Row>>,
}

impl Undo {
    fn needs(&self, key: &[u8]) -> bool {
        self.cursor.as_deref().is_none_or(|cursor| cursor < key) && !self.rows.contains_key(key)
    }
}

impl Table {
    /// A table of rows in strictly ascending order of keys.
    pub(super) fn from_ascending(rows: Vec<(Box<[u8]>, Row)>) -> Self {
        let mut table = Self::default();
        for (key, row) in &rows {
            table.bytes += size(key, row);
            table.digest = table.digest.wrapping_add(row.digest(key));
        }
        // Collecting a sorted vector fills the nodes of the tree; inserting one by one would leave them half empty.
        table.rows = rows.into_iter().collect();
        table
    }

    pub(super) fn len(&self) -> u64 {
        self.rows.len() as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Row> {
        self.rows.get(key)
    }

    /// The rows of a span that is not empty.
    pub(super) fn range(&self, span: &Span) -> impl DoubleEndedIterator<Item = (&[u8], &Row)> {
        self.rows.range::<[u8], _>(span.bounds()).map(|(key, row)| (key.as_ref(), row))
    }

    /// Stores a row; the row that it replaces.
    pub(super) fn put(&mut self, key: &[u8], row: Row) -> Option<Row> {
        self.bytes += size(key, &row);
        self.digest = self.digest.wrapping_add(row.digest(key));
        let before = match self.rows.get_mut(key) {
            Some(place) => Some(std::mem::replace(place, row)),
            None => self.rows.insert(key.into(), row),
        };
        self.changed(key, before.as_ref());
        before
    }

    /// Removes a row.
    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Row> {
        let before = self.rows.remove(key)?;
        self.changed(key, Some(&before));
        Some(before)
    }

    fn changed(&mut self, key: &[u8], before: Option<&Row>) {
        if let Some(row) = before {
            self.bytes -= size(key, row);
            self.digest = self.digest.wrapping_sub(row.digest(key));
        }
        if let Some(undo) = &mut self.undo
            && undo.needs(key)
            && !planted(Bug::SnapshotAhead)
        {
            undo.rows.insert(key.into(), before.cloned());
        }
    }

    /// Takes the rows at positions from `at` on away, as a table of their own.
    pub(super) fn split_off(&mut self, at: &[u8], layout: Layout) -> Self {
        let right = match layout {
            Layout::Ordered => self.rows.split_off(at),
            Layout::Hashed => {
                let rows = std::mem::take(&mut self.rows).into_iter();
                let (left, right): (Vec<_>, Vec<_>) = rows.partition(|(key, _)| *position_of_token(token(key)) < *at);
                self.rows = left.into_iter().collect();
                right.into_iter().collect()
            }
        };
        for (key, row) in &right {
            self.changed(key, Some(row));
        }
        Self::from_ascending(right.into_iter().collect())
    }

    /// Takes all rows of another table, whose keys are others.
    pub(super) fn extend(&mut self, other: Self) {
        for (key, row) in other.rows {
            self.put(&key, row);
        }
    }

    /// The same rows, not frozen.
    pub(super) fn copy(&self) -> Self {
        Self { rows: self.rows.clone(), bytes: self.bytes, digest: self.digest, undo: None }
    }

    /// From now on [`Table::next_frozen`] gives the rows as they are now.
    pub(super) fn freeze(&mut self) {
        self.undo = Some(Undo::default());
    }

    pub(super) fn thaw(&mut self) {
        self.undo = None;
    }

    /// Writes the next rows as of the freeze into `out` until it holds about `bytes_max` or `looked_max` rows have
    /// been looked at, and says how many it wrote; `None` once there are none left, which thaws.
    pub(super) fn next_frozen(&mut self, bytes_max: usize, looked_max: usize, out: &mut Vec<u8>) -> Option<u64> {
        let undo = self.undo.as_mut()?;
        let (mut written, mut looked) = (0, 0);
        let mut reached: Option<&[u8]> = None;
        for (key, row) in frozen_rows(&self.rows, undo) {
            let needed = row.map_or(0, |row| size(key, row) as usize);
            if looked == looked_max || (written > 0 && out.len() + needed > bytes_max) {
                break;
            }
            looked += 1;
            reached = Some(key);
            if let Some(row) = row {
                encode_row(key, row, out);
                written += 1;
            }
        }
        let Some(reached) = reached.map(Box::from) else {
            self.undo = None;
            return None;
        };
        while undo.rows.first_key_value().is_some_and(|(key, _)| *key <= reached) {
            undo.rows.pop_first();
        }
        undo.cursor = Some(reached);
        Some(written)
    }
}

/// The rows after the cursor as of the freeze; `None` for a key that had none.
fn frozen_rows<'a>(
    rows: &'a BTreeMap<Box<[u8]>, Row>,
    undo: &'a Undo,
) -> impl Iterator<Item = (&'a [u8], Option<&'a Row>)> {
    let after = (undo.cursor.as_deref().map_or(Unbounded, Excluded), Unbounded);
    let mut live: Peekable<_> = rows.range::<[u8], _>(after).peekable();
    let mut saved: Peekable<_> = undo.rows.range::<[u8], _>(after).peekable();
    std::iter::from_fn(move || match (live.peek(), saved.peek()) {
        (Some((key, _)), Some((changed, _))) if key < changed => live.next().map(|(key, row)| (&**key, Some(row))),
        (Some(_), None) => live.next().map(|(key, row)| (&**key, Some(row))),
        (live_key, Some((changed, _))) => {
            if live_key.is_some_and(|(key, _)| key == changed) {
                live.next();
            }
            saved.next().map(|(key, row)| (&**key, row.as_ref()))
        }
        (None, None) => None,
    })
}

/// What a row counts: its key and its value.
fn size(key: &[u8], row: &Row) -> u64 {
    (key.len() + row.value.len()) as u64
}

/// A row of a snapshot: flags (none yet), version, key, value.
fn encode_row(key: &[u8], row: &Row, out: &mut Vec<u8>) {
    out.put(&[0]);
    put_u64(out, row.version);
    put_bytes(out, key);
    put_bytes(out, &row.value);
}
