//! The rows of a partition, and their state as of a freeze while writes go on.
//!
//! Invariant: while frozen, `undo` holds, for every key after the cursor whose row has changed, that row as it was.

use super::codec::{Sink, put_bytes, put_u64};
use super::packed::{Packed, RowRef, ahead};
use super::rows::{Probe, Rows};
use crate::{
    key::{Layout, Span, Version, position_of_token, token},
    plant::{Bug, planted},
};
use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Bound::{Excluded, Unbounded};

/// Rows in key order.
#[derive(Debug, Default)]
pub(super) struct Table {
    rows: Rows,
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
    rows: BTreeMap<Box<[u8]>, Option<Packed>>,
}

impl Undo {
    fn needs(&self, key: &[u8]) -> bool {
        self.cursor.as_deref().is_none_or(|cursor| cursor < key) && !self.rows.contains_key(key)
    }

    fn save(&mut self, key: &[u8], before: Option<Packed>) {
        if !planted(Bug::SnapshotAhead) {
            self.rows.insert(key.into(), before);
        }
    }
}

impl Table {
    /// A table of rows in strictly ascending order of keys.
    pub(super) fn from_ascending(rows: Vec<Packed>) -> Self {
        let mut table = Self::default();
        for row in &rows {
            table.bytes += row.size();
            table.digest = table.digest.wrapping_add(digest(row));
        }
        table.rows = Rows::from_ascending(rows);
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

    pub(super) fn get(&self, key: &[u8]) -> Option<RowRef<'_>> {
        self.rows.get(Probe::new(key)).map(Packed::row)
    }

    /// Asks the memory for the rows of these keys.
    pub(super) fn call_for<'a>(&self, keys: impl Iterator<Item = &'a [u8]>) {
        self.rows.call_for(keys);
    }

    /// The rows of a span that is not empty.
    pub(super) fn range<'a>(&'a self, span: &'a Span) -> impl DoubleEndedIterator<Item = &'a Packed> {
        self.rows.range(span.bounds())
    }

    /// Stores a row, and says whether it replaces one.
    pub(super) fn put(&mut self, key: &[u8], value: &[u8], version: Version) -> bool {
        let probe = Probe::new(key);
        self.bytes += (key.len() + value.len()) as u64;
        self.digest = self.digest.wrapping_add(RowRef { value, version }.digest(probe.crc));
        let undo = self.undo.as_mut().filter(|undo| undo.needs(key));
        let Some(row) = self.rows.get_mut(probe) else {
            undo.into_iter().for_each(|undo| undo.save(key, None));
            self.rows.insert(probe, Packed::new(key, value, version));
            return false;
        };
        self.bytes -= row.size();
        self.digest = self.digest.wrapping_sub(row.row().digest(probe.crc));
        match undo {
            Some(undo) => undo.save(key, Some(std::mem::replace(row, Packed::new(key, value, version)))),
            None => row.set(value, version),
        }
        true
    }

    /// Removes a row, and says whether there was one.
    pub(super) fn remove(&mut self, key: &[u8]) -> bool {
        let probe = Probe::new(key);
        let Some(row) = self.rows.remove(probe) else { return false };
        self.bytes -= row.size();
        self.digest = self.digest.wrapping_sub(row.row().digest(probe.crc));
        if let Some(undo) = self.undo.as_mut().filter(|undo| undo.needs(key)) {
            undo.save(key, Some(row));
        }
        true
    }

    /// Takes the rows at positions from `at` on away, as a table of their own.
    pub(super) fn split_off(&mut self, at: &[u8], layout: Layout) -> Self {
        let right = match layout {
            Layout::Ordered => self.rows.split_off(at),
            Layout::Hashed => {
                let rows = std::mem::take(&mut self.rows).into_rows();
                let (left, right): (Vec<_>, Vec<_>) = rows.partition(|row| *position_of_token(token(row.key())) < *at);
                self.rows = Rows::from_ascending(left);
                right
            }
        };
        if let Some(undo) = &mut self.undo {
            for row in &right {
                if undo.needs(row.key()) {
                    undo.save(row.key(), Some(row.clone()));
                }
            }
        }
        let right = Self::from_ascending(right);
        self.bytes -= right.bytes;
        self.digest = self.digest.wrapping_sub(right.digest);
        right
    }

    /// Takes all rows of another table, whose keys are others.
    pub(super) fn extend(&mut self, other: Self) {
        for row in other.rows.into_rows() {
            let (key, RowRef { value, version }) = row.parts();
            self.put(key, value, version);
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
            let needed = row.map_or(0, |row| key.len() + row.value.len());
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
fn frozen_rows<'a>(rows: &'a Rows, undo: &'a Undo) -> impl Iterator<Item = (&'a [u8], Option<RowRef<'a>>)> {
    let after = (undo.cursor.as_deref().map_or(Unbounded, Excluded), Unbounded);
    let mut live: Peekable<_> = ahead(rows.range(after), true).peekable();
    let mut saved: Peekable<_> = undo.rows.range::<[u8], _>(after).peekable();
    std::iter::from_fn(move || match (live.peek(), saved.peek()) {
        (Some((key, _)), Some((changed, _))) if *key < &***changed => live.next().map(|(key, row)| (key, Some(row))),
        (Some(_), None) => live.next().map(|(key, row)| (key, Some(row))),
        (live_row, Some((changed, _))) => {
            if live_row.is_some_and(|(key, _)| *key == &***changed) {
                live.next();
            }
            saved.next().map(|(key, row)| (&**key, row.as_ref().map(Packed::row)))
        }
        (None, None) => None,
    })
}

fn digest(row: &Packed) -> u64 {
    row.row().digest(Probe::new(row.key()).crc)
}

/// A row of a snapshot: flags (none yet), version, key, value.
fn encode_row(key: &[u8], row: RowRef<'_>, out: &mut Vec<u8>) {
    out.put(&[0]);
    put_u64(out, row.version);
    put_bytes(out, key);
    put_bytes(out, row.value);
}
