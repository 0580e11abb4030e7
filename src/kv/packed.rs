//! One row, as it lies in memory, and the walk over many of them.
//!
//! Memory: a row is one allocation of its key, its value and [`HEADER_BYTES`]. It is copied there when it is stored and
//! copied out when it is read: what arrives is a slice of a Raft entry, which may itself be a slice of a frame of several
//! megabytes and would be kept alive as a whole; what leaves is copied into an answer anyway. Counting references would
//! cost 32 bytes per row and a cache miss per read more.

use super::codec::mix;
use crate::key::Version;
use bytes::Bytes;
use std::hint::black_box;

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

    /// A number that differs between different rows; `key_crc` is the key's CRC-32.
    pub(super) fn digest(&self, key_crc: u32) -> u64 {
        let value_crc = crc32fast::hash(self.value);
        mix(mix((u64::from(key_crc) << 32) | u64::from(value_crc)) ^ self.version)
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

/// A row in one piece: version, length of the key, key, value.
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

    pub(super) fn parts(&self) -> (&[u8], RowRef<'_>) {
        const WHY: &str = "it was made with a header";
        let (version, rest) = self.0.split_first_chunk::<VERSION_BYTES>().expect(WHY);
        let (key_length, rest) = rest.split_first_chunk::<KEY_LENGTH_BYTES>().expect(WHY);
        let (key, value) = rest.split_at(u32::from_le_bytes(*key_length) as usize);
        (key, RowRef { value, version: Version::from_le_bytes(*version) })
    }

    /// Gives it another value. A value as long as the one before is written over it: no other memory is asked for, and rows
    /// that were stored in order stay in order.
    pub(super) fn set(&mut self, value: &[u8], version: Version) {
        let (key, row) = self.parts();
        if row.value.len() == value.len() {
            let value_at = HEADER_BYTES + key.len();
            self.0[value_at..].copy_from_slice(value);
            self.0[..VERSION_BYTES].copy_from_slice(&version.to_le_bytes());
        } else {
            *self = Self::new(key, value, version);
        }
    }

    /// Where it lies: to know it, the memory is asked as well.
    pub(super) fn at(&self) -> *const u8 {
        self.0.as_ptr()
    }

    /// Looks at the beginning of each piece, the first one only unless `values` are wanted.
    pub(super) fn touch(&self, values: bool) {
        let lines = if values { NEAR_LINES } else { 1 };
        black_box(self.0.iter().step_by(LINE_BYTES).take(lines).fold(0, |all, byte| all ^ byte));
    }

    /// What it counts: its key and its value.
    pub(super) fn size(&self) -> u64 {
        (self.0.len() - HEADER_BYTES) as u64
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
