//! Rows in key order: a tree of two levels, leaves of rows and a directory of leaves.
//!
//! A row is a box somewhere in memory, so comparing with its key means waiting for the memory. Within a leaf a key is
//! therefore found by a byte of its checksum, kept beside the rows as in F14 and Swiss tables, and only a row that has
//! the same byte is looked at. The directory holds one key for some hundred rows, which the caches keep. In a tree whose nodes
//! hold the rows, as the standard library's, a dozen rows are looked at for each search.
//!
//! Memory: by arithmetic, 17 to 19 bytes per row besides the row.
//!
//! Invariants: a leaf's rows are in strictly ascending order, at or above its key in the directory and below the next;
//! `prints[i]` belongs to `rows[i]`; the leaf at the empty key is there once there are rows, and no other leaf is empty.

use super::packed::Packed;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::ops::Bound::{self, Excluded, Included, Unbounded};

/// Most rows of a leaf.
const LEAF_ROWS: usize = if cfg!(test) { 8 } else { 128 };
/// Room for so many rows is added at once: little of it stays empty.
const ROOM_ROWS: usize = LEAF_ROWS / 8;
/// A leaf that has lost rows joins the one before it when both have no more than this.
const JOIN_ROWS: usize = LEAF_ROWS / 2;

/// Most rows that are called for together.
pub const CALLED_ROWS: usize = 16;

/// A key to look for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe<'a> {
    pub(super) key: &'a [u8],
    /// CRC-32 of the key.
    pub(super) crc: u32,
}

impl<'a> Probe<'a> {
    pub(super) fn new(key: &'a [u8]) -> Self {
        Self { key, crc: crc32fast::hash(key) }
    }

    fn print(self) -> u8 {
        self.crc.to_le_bytes()[0]
    }
}

/// Rows in key order.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    leaves: BTreeMap<Box<[u8]>, Leaf>,
    len: usize,
}

#[derive(Clone, Debug, Default)]
struct Leaf {
    prints: Vec<u8>,
    rows: Vec<Packed>,
}

impl Leaf {
    fn find(&self, probe: Probe<'_>) -> Option<usize> {
        memchr::memchr_iter(probe.print(), &self.prints).find(|at| self.rows[*at].key() == probe.key)
    }

    fn insert(&mut self, at: usize, print: u8, row: Packed) {
        if self.rows.len() == self.rows.capacity() {
            self.rows.reserve_exact(ROOM_ROWS);
            self.prints.reserve_exact(ROOM_ROWS);
        }
        self.prints.insert(at, print);
        self.rows.insert(at, row);
    }

    fn split_off(&mut self, at: usize) -> Self {
        Self { prints: self.prints.split_off(at), rows: self.rows.split_off(at) }
    }

    /// The rows within bounds; the leaf's own key in the directory is `first`.
    fn part(&self, first: &[u8], start: Bound<&[u8]>, end: Bound<&[u8]>) -> &[Packed] {
        let whole_start = match start {
            Unbounded => true,
            Included(start) => start <= first,
            Excluded(start) => start < first,
        };
        let from = if whole_start {
            0
        } else {
            self.rows.partition_point(|row| match start {
                Included(start) => row.key() < start,
                Excluded(start) => row.key() <= start,
                Unbounded => false,
            })
        };
        let inside = |row: &Packed| match end {
            Included(end) => row.key() <= end,
            Excluded(end) => row.key() < end,
            Unbounded => true,
        };
        let rows = &self.rows[from..];
        if rows.last().is_none_or(inside) { rows } else { &rows[..rows.partition_point(inside)] }
    }
}

/// Everything up to a key, this included.
fn upto(key: &[u8]) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (Unbounded, Included(key))
}

impl Rows {
    /// Rows in strictly ascending order of keys.
    pub(super) fn from_ascending(rows: Vec<Packed>) -> Self {
        let len = rows.len();
        let mut leaves = BTreeMap::new();
        let mut rows = rows.into_iter();
        loop {
            let leaf: Vec<Packed> = rows.by_ref().take(LEAF_ROWS).collect();
            let Some(first) = leaf.first() else { break };
            let first: Box<[u8]> = if leaves.is_empty() { Box::default() } else { first.key().into() };
            let prints = leaf.iter().map(|row| Probe::new(row.key()).print()).collect();
            leaves.insert(first, Leaf { prints, rows: leaf });
        }
        Self { leaves, len }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, probe: Probe<'_>) -> Option<&Packed> {
        let (_, leaf) = self.leaves.range::<[u8], _>(upto(probe.key)).next_back()?;
        Some(&leaf.rows[leaf.find(probe)?])
    }

    /// Asks the memory for the rows of the first [`CALLED_ROWS`] of these keys, all together: one after the other, each would
    /// be waited for, place by place.
    pub(super) fn call_for<'a>(&self, keys: impl Iterator<Item = &'a [u8]>) {
        let mut keys = keys.take(CALLED_ROWS);
        // One alone has nobody to wait together with.
        let (Some(first), Some(second)) = (keys.next(), keys.next()) else { return };
        let mut leaves: Vec<(Probe<'_>, &Leaf)> = Vec::with_capacity(CALLED_ROWS);
        for key in [first, second].into_iter().chain(keys) {
            if let Some((_, leaf)) = self.leaves.range::<[u8], _>(upto(key)).next_back() {
                black_box((leaf.prints.first(), leaf.prints.last()));
                leaves.push((Probe::new(key), leaf));
            }
        }
        let mut rows: Vec<&Packed> = Vec::with_capacity(CALLED_ROWS);
        for (probe, leaf) in leaves {
            if let Some(at) = memchr::memchr(probe.print(), &leaf.prints) {
                black_box(leaf.rows[at].at());
                rows.push(&leaf.rows[at]);
            }
        }
        rows.iter().for_each(|row| row.touch(true));
    }

    pub(super) fn get_mut(&mut self, probe: Probe<'_>) -> Option<&mut Packed> {
        let (_, leaf) = self.leaves.range_mut::<[u8], _>(upto(probe.key)).next_back()?;
        let at = leaf.find(probe)?;
        Some(&mut leaf.rows[at])
    }

    /// Adds a row whose key, `probe`, is not there.
    pub(super) fn insert(&mut self, probe: Probe<'_>, row: Packed) {
        self.len += 1;
        let Some((_, leaf)) = self.leaves.range_mut::<[u8], _>(upto(probe.key)).next_back() else {
            self.leaves.insert(Box::default(), Leaf { prints: vec![probe.print()], rows: vec![row] });
            return;
        };
        let mut at = leaf.rows.partition_point(|other| other.key() < probe.key);
        if leaf.rows.len() < LEAF_ROWS {
            leaf.insert(at, probe.print(), row);
            return;
        }
        // Rows that come in order leave full leaves behind.
        let cut = if at == LEAF_ROWS { LEAF_ROWS } else { LEAF_ROWS / 2 };
        let mut right = leaf.split_off(cut);
        if at < cut {
            leaf.insert(at, probe.print(), row);
        } else {
            at -= cut;
            right.insert(at, probe.print(), row);
        }
        leaf.rows.shrink_to(cut + ROOM_ROWS);
        let first = right.rows[0].key().into();
        self.leaves.insert(first, right);
    }

    pub(super) fn remove(&mut self, probe: Probe<'_>) -> Option<Packed> {
        let (first, leaf) = self.leaves.range_mut::<[u8], _>(upto(probe.key)).next_back()?;
        let at = leaf.find(probe)?;
        leaf.prints.remove(at);
        let row = leaf.rows.remove(at);
        self.len -= 1;
        if leaf.rows.len() <= JOIN_ROWS / 2 && !first.is_empty() {
            let first = first.clone();
            self.join(&first);
        }
        Some(row)
    }

    /// Moves the rows of a leaf, which is not the first, to the one before it, if they have room there.
    fn join(&mut self, first: &[u8]) {
        let count = self.leaves[first].rows.len();
        let before = self.leaves.range::<[u8], _>((Unbounded, Excluded(first))).next_back();
        if !before.is_some_and(|(_, leaf)| count == 0 || leaf.rows.len() + count <= JOIN_ROWS) {
            return;
        }
        let leaf = self.leaves.remove(first).expect("it was found above");
        if let Some((_, before)) = self.leaves.range_mut::<[u8], _>((Unbounded, Excluded(first))).next_back() {
            before.prints.extend(leaf.prints);
            before.rows.extend(leaf.rows);
        }
    }

    /// The rows within bounds of which the first does not lie above the second.
    pub(super) fn range<'a>(
        &'a self,
        (start, end): (Bound<&'a [u8]>, Bound<&'a [u8]>),
    ) -> impl DoubleEndedIterator<Item = &'a Packed> {
        let first = match start {
            Included(start) | Excluded(start) => {
                self.leaves.range::<[u8], _>(upto(start)).next_back().map_or(Unbounded, |(first, _)| Included(&**first))
            }
            Unbounded => Unbounded,
        };
        let leaves = self.leaves.range::<[u8], _>((first, end));
        leaves.flat_map(move |(first, leaf)| leaf.part(first, start, end))
    }

    /// Takes the rows from `at` on away.
    pub(super) fn split_off(&mut self, at: &[u8]) -> Vec<Packed> {
        let after = self.leaves.split_off(at);
        let mut right = match self.leaves.last_entry() {
            Some(mut last) => {
                let leaf = last.get_mut();
                let right = leaf.split_off(leaf.rows.partition_point(|row| row.key() < at)).rows;
                if leaf.rows.is_empty() {
                    last.remove();
                }
                right
            }
            None => Vec::new(),
        };
        right.extend(after.into_values().flat_map(|leaf| leaf.rows));
        self.len -= right.len();
        right
    }

    pub(super) fn into_rows(self) -> impl Iterator<Item = Packed> {
        self.leaves.into_values().flat_map(|leaf| leaf.rows)
    }
}

#[cfg(test)]
#[path = "tests/rows.rs"]
mod tests;
