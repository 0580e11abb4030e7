//! Rows of a page in one piece: the bytes of a [`v1::PackedRows`], written and read without a message per row.
//!
//! A generated message costs each row several calls and the handling of two shared buffers on the way out, which is most
//! of what a scan costs its server. Both directions are plain protobuf: any client can read them.

use super::v1;
use bytes::Bytes;
use prost::{
    DecodeError,
    encoding::{DecodeContext, WireType, check_wire_type, decode_key, decode_varint, skip_field},
};

/// Tags of the fields, with their wire types: `PackedRows.rows`; `Row.key`, `.value` and `.version`.
const ROW: u8 = 0x0A;
const KEY: u8 = 0x0A;
const VALUE: u8 = 0x12;
const VERSION: u8 = 0x18;

/// Bytes that a row takes besides its key and its value, about.
pub const ROW_OVERHEAD_BYTES: usize = 24;

/// Rows that are being packed.
#[derive(Debug, Default)]
pub struct Packer(Vec<u8>);

impl Packer {
    /// With room for so many bytes.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    /// Appends a row.
    pub fn push(&mut self, key: &[u8], value: &[u8], version: u64) {
        let row = RowBody::of(key, value, version);
        let head = Head::new(ROW, row.len() as u64);
        self.0.reserve(head.len + row.len());
        self.0.extend_from_slice(head.bytes());
        row.put(&mut self.0);
    }

    /// All rows.
    #[must_use]
    pub fn finish(self) -> Bytes {
        self.0.into()
    }
}

/// The bytes of a [`v1::Row`], about to be written.
pub(super) struct RowBody<'a> {
    key_head: Head,
    key: &'a [u8],
    value_head: Head,
    value: &'a [u8],
    tail: Head,
}

impl<'a> RowBody<'a> {
    pub(super) fn of(key: &'a [u8], value: &'a [u8], version: u64) -> Self {
        let (key_head, value_head) = (Head::of_bytes(KEY, key), Head::of_bytes(VALUE, value));
        Self { key_head, key, value_head, value, tail: Head::of_number(VERSION, version) }
    }

    pub(super) const fn len(&self) -> usize {
        self.key_head.len + self.key.len() + self.value_head.len + self.value.len() + self.tail.len
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        for part in [self.key_head.bytes(), self.key, self.value_head.bytes(), self.value, self.tail.bytes()] {
            out.extend_from_slice(part);
        }
    }
}

/// What stands before a field's content: its tag, and a number.
#[derive(Clone, Copy, Default)]
pub(super) struct Head {
    array: [u8; 11],
    len: usize,
}

impl Head {
    pub(super) fn new(tag: u8, mut number: u64) -> Self {
        let mut head = Self { array: [tag; 11], len: 1 };
        loop {
            let more = number > 0x7F;
            head.array[head.len] = (number & 0x7F) as u8 | if more { 0x80 } else { 0 };
            head.len += 1;
            number >>= 7;
            if !more {
                return head;
            }
        }
    }

    /// Of a field that is left out when it is empty.
    fn of_bytes(tag: u8, bytes: &[u8]) -> Self {
        if bytes.is_empty() { Self::default() } else { Self::new(tag, bytes.len() as u64) }
    }

    /// A whole field, which is left out when it is zero.
    pub(super) fn of_number(tag: u8, number: u64) -> Self {
        if number == 0 { Self::default() } else { Self::new(tag, number) }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.array[..self.len]
    }
}

/// The rows of packed bytes; keys and values are slices of them.
///
/// # Errors
/// When they are not those of a `PackedRows`.
pub fn unpack(packed: &Bytes) -> Result<Vec<v1::Row>, DecodeError> {
    let mut rows = Vec::new();
    let mut rest: &[u8] = packed;
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest)?;
        if tag != 1 {
            skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
            continue;
        }
        check_wire_type(WireType::LengthDelimited, wire_type)?;
        rows.push(read_row(packed, take(&mut rest)?)?);
        if rows.len() == 1 {
            // Most pages hold rows of about one length.
            rows.reserve(rest.len() / (packed.len() - rest.len()));
        }
    }
    Ok(rows)
}

fn read_row(packed: &Bytes, mut rest: &[u8]) -> Result<v1::Row, DecodeError> {
    let mut row = v1::Row::default();
    while !rest.is_empty() {
        match decode_key(&mut rest)? {
            (1, WireType::LengthDelimited) => row.key = packed.slice_ref(take(&mut rest)?),
            (2, WireType::LengthDelimited) => row.value = packed.slice_ref(take(&mut rest)?),
            (3, WireType::Varint) => row.version = decode_varint(&mut rest)?,
            (tag, wire_type) => skip_field(wire_type, tag, &mut rest, DecodeContext::default())?,
        }
    }
    Ok(row)
}

/// A length, and as many bytes.
fn take<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let length = decode_varint(rest)?;
    let taken = usize::try_from(length).ok().and_then(|length| rest.split_off(..length));
    taken.ok_or_else(cut_short)
}

/// What prost says of a message that ends too early.
pub(super) fn cut_short() -> DecodeError {
    <v1::Row as prost::Message>::decode(&[KEY, 1][..]).expect_err("a byte is missing")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;

    fn any_row() -> impl Strategy<Value = v1::Row> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        let version = prop_oneof![Just(0), 1..300_u64, any::<u64>()];
        (bytes(), bytes(), version).prop_map(|(key, value, version)| v1::Row { key, value, version })
    }

    fn pack(rows: &[v1::Row]) -> Bytes {
        let mut packer = Packer::default();
        rows.iter().for_each(|row| packer.push(&row.key, &row.value, row.version));
        packer.finish()
    }

    proptest! {
        #[test]
        fn packed_rows_are_the_bytes_of_the_message(rows in prop::collection::vec(any_row(), 0..20)) {
            let packed = pack(&rows);
            prop_assert_eq!(&packed, &v1::PackedRows { rows: rows.clone() }.encode_to_vec());
            prop_assert_eq!(unpack(&packed).unwrap(), rows);
        }

        #[test]
        fn damaged_bytes_are_an_error_or_what_prost_makes_of_them(
            rows in prop::collection::vec(any_row(), 1..4),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let mut bytes = pack(&rows).to_vec();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            let bytes = Bytes::from(bytes);
            match (unpack(&bytes), v1::PackedRows::decode(bytes)) {
                (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours, theirs.rows),
                (ours, theirs) => prop_assert!(ours.is_err() || theirs.is_err()),
            }
        }
    }

    #[test]
    fn fields_of_a_later_version_are_skipped() {
        let mut bytes = vec![ROW, 6, KEY, 1, b'a', 0x20, 0x80, 0x01];
        bytes.extend([0x12, 2, 1, 2]);
        let row = v1::Row { key: "a".into(), ..Default::default() };
        assert_eq!(unpack(&bytes.into()).unwrap(), [row]);
    }
}
