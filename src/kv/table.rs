//! The rows of a partition, and their state as of a freeze while writes go on.
//!
//! Memory: a row is one allocation of its key, its value and [`HEADER_BYTES`], and 16 bytes in a tree node. It is copied
//! there when it is stored and copied out when it is read: what arrives is a slice of a Raft entry, which may itself be a
//! slice of a frame of several megabytes and would be kept alive as a whole; what leaves is copied into an answer anyway.
//! Counting references would cost 32 bytes per row and a cache miss per read more.
//!
//! Invariant: while frozen, `undo` holds, for every key after the cursor whose row has changed, that row as it was.

use super::codec::{Sink, mix, put_bytes, put_u64};
use crate::{
    key::{Layout, Span, Version, position_of_token, token},
    plant::{Bug, planted},
};
use bytes::Bytes;
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::iter::Peekable;
use std::ops::Bound::{Excluded, Unbounded};

/// A row without its key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The value.
    pub value: Bytes,
    /// Version of the row's last write.
    pub version: Version,
}

/// A row without its key, where it lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowRef<'a> {
    /// The value.
    pub value: &'a [u8],
    /// Version of the row's last write.
    pub version: Version,
}

impl RowRef<'_> {
    /// A copy that stays when the row changes.
    #[must_use]
    pub fn to_row(&self) -> Row {
        Row { value: Bytes::copy_from_slice(self.value), version: self.version }
    }

    /// A number that differs between different rows.
    fn digest(&self, key: &[u8]) -> u64 {
        let (key, value) = (crc32fast::hash(key), crc32fast::hash(self.value));
        mix(mix((u64::from(key) << 32) | u64::from(value)) ^ self.version)
    }
}

/// Rows that a walk asks the memory for together: one after the other, each of them would be waited for.
const NEAR_ROWS: usize = 16;
/// Bytes that come from memory in one piece.
const LINE_BYTES: usize = 64;
/// Of a row, no more of these are asked for: those behind follow by themselves.
const NEAR_LINES: usize = 8;

/// Bytes of a packed row besides its key and its value.
const HEADER_BYTES: usize = VERSION_BYTES + KEY_LENGTH_BYTES;
const VERSION_BYTES: usize = size_of::<Version>();
const KEY_LENGTH_BYTES: usize = size_of::<u32>();

/// A row in one piece: version, length of the key, key, value. Ordered by its key, and found by it.
#[derive(Clone, Debug)]
pub(super) struct Packed(Box<[u8]>);

impl Packed {
    pub(super) fn new(key: &[u8], value: &[u8], version: Version) -> Self {
        let key_length = u32::try_from(key.len()).expect("keys are limited to 64 KiB");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + key.len() + value.len());
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&key_length.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        Self(bytes.into_boxed_slice())
    }

    pub(super) fn key(&self) -> &[u8] {
        self.parts().0
    }

    pub(super) fn row(&self) -> RowRef<'_> {
        self.parts().1
    }

    fn parts(&self) -> (&[u8], RowRef<'_>) {
        const WHY: &str = "it was made with a header";
        let (version, rest) = self.0.split_first_chunk::<VERSION_BYTES>().expect(WHY);
        let (key_length, rest) = rest.split_first_chunk::<KEY_LENGTH_BYTES>().expect(WHY);
        let (key, value) = rest.split_at(u32::from_le_bytes(*key_length) as usize);
        (key, RowRef { value, version: Version::from_le_bytes(*version) })
    }

    /// Looks at the beginning of each piece, the first one only unless `values` are wanted.
    fn touch(&self, values: bool) {
        let lines = if values { NEAR_LINES } else { 1 };
        black_box(self.0.iter().step_by(LINE_BYTES).take(lines).fold(0, |all, byte| all ^ byte));
    }

    /// What it counts: its key and its value.
    pub(super) fn size(&self) -> u64 {
        (self.0.len() - HEADER_BYTES) as u64
    }

    fn digest(&self) -> u64 {
        let (key, row) = self.parts();
        row.digest(key)
    }
}

impl Borrow<[u8]> for Packed {
    fn borrow(&self) -> &[u8] {
        self.key()
    }
}

impl PartialEq for Packed {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Packed {}

impl PartialOrd for Packed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Packed {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(other.key())
    }
}

/// Rows in key order.
#[derive(Debug, Default)]
pub(super) struct Table {
    rows: BTreeSet<Packed>,
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
}

impl Table {
    /// A table of rows in strictly ascending order of keys.
    pub(super) fn from_ascending(rows: Vec<Packed>) -> Self {
        let mut table = Self::default();
        for row in &rows {
            table.bytes += row.size();
            table.digest = table.digest.wrapping_add(row.digest());
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

    pub(super) fn get(&self, key: &[u8]) -> Option<RowRef<'_>> {
        self.rows.get(key).map(Packed::row)
    }

    /// The rows of a span that is not empty.
    pub(super) fn range(&self, span: &Span) -> impl DoubleEndedIterator<Item = &Packed> {
        self.rows.range::<[u8], _>(span.bounds())
    }

    /// Stores a row; the row that it replaces.
    pub(super) fn put(&mut self, row: Packed) -> Option<Packed> {
        self.bytes += row.size();
        self.digest = self.digest.wrapping_add(row.digest());
        if self.undo.is_none() {
            let before = self.rows.replace(row)?;
            self.gone(&before);
            return Some(before);
        }
        let key: Box<[u8]> = row.key().into();
        let before = self.rows.replace(row);
        self.changed(&key, before.as_ref());
        before
    }

    /// Removes a row.
    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Packed> {
        let before = self.rows.take(key)?;
        self.changed(key, Some(&before));
        Some(before)
    }

    fn gone(&mut self, before: &Packed) {
        self.bytes -= before.size();
        self.digest = self.digest.wrapping_sub(before.digest());
    }

    fn changed(&mut self, key: &[u8], before: Option<&Packed>) {
        if let Some(row) = before {
            self.gone(row);
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
                let (left, right): (Vec<_>, Vec<_>) = rows.partition(|row| *position_of_token(token(row.key())) < *at);
                self.rows = left.into_iter().collect();
                right.into_iter().collect()
            }
        };
        for row in &right {
            self.changed(row.key(), Some(row));
        }
        Self::from_ascending(right.into_iter().collect())
    }

    /// Takes all rows of another table, whose keys are others.
    pub(super) fn extend(&mut self, other: Self) {
        for row in other.rows {
            self.put(row);
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

/// The same rows. Neighbours may lie anywhere in memory, so it is asked for some rows ahead, which halves the time of a
/// walk; for their values as well, if those are wanted.
pub(super) fn ahead<'a>(
    mut rows: impl Iterator<Item = &'a Packed>,
    values: bool,
) -> impl Iterator<Item = (&'a [u8], RowRef<'a>)> {
    let mut near: Vec<&Packed> = Vec::with_capacity(NEAR_ROWS);
    let mut given = 0;
    std::iter::from_fn(move || {
        if given == near.len() {
            // Whoever wants few rows does not wait for many.
            let count = (near.len() * 2).clamp(4, NEAR_ROWS);
            near.clear();
            near.extend(rows.by_ref().take(count));
            near.iter().for_each(|row| row.touch(values));
            given = 0;
        }
        let row = near.get(given)?;
        given += 1;
        Some(row.parts())
    })
}

/// The rows after the cursor as of the freeze; `None` for a key that had none.
fn frozen_rows<'a>(rows: &'a BTreeSet<Packed>, undo: &'a Undo) -> impl Iterator<Item = (&'a [u8], Option<RowRef<'a>>)> {
    let after = (undo.cursor.as_deref().map_or(Unbounded, Excluded), Unbounded);
    let mut live: Peekable<_> = ahead(rows.range::<[u8], _>(after), true).peekable();
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

/// A row of a snapshot: flags (none yet), version, key, value.
fn encode_row(key: &[u8], row: RowRef<'_>, out: &mut Vec<u8>) {
    out.put(&[0]);
    put_u64(out, row.version);
    put_bytes(out, key);
    put_bytes(out, row.value);
}
