//! The few primitives behind every stored byte of this module: fixed and variable integers, length-prefixed bytes.
//!
//! Integers are little-endian; variable ones are LEB128, at most 10 bytes. A [`Reader`] never allocates by a length
//! it has only been told, and never panics on damaged bytes.

use crate::key::{Span, Tokens};
use bytes::Bytes;
use std::fmt;

/// Bytes that are not what they claim to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DecodeError {
    /// Offset of the first byte that cannot be read.
    pub at: usize,
    /// What was expected there.
    pub what: &'static str,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}: {}", self.at, self.what)
    }
}

impl std::error::Error for DecodeError {}

/// Where encoded bytes go: into a buffer, or only into a checksum.
pub(super) trait Sink {
    /// Takes the next bytes.
    fn put(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Length and CRC-32 of what is put, as one number.
#[derive(Default)]
pub(super) struct Fingerprint {
    crc: crc32fast::Hasher,
    length: u32,
}

impl Sink for Fingerprint {
    fn put(&mut self, bytes: &[u8]) {
        self.crc.update(bytes);
        self.length = self.length.wrapping_add(bytes.len() as u32);
    }
}

impl Fingerprint {
    pub(super) fn finish(self) -> u64 {
        (u64::from(self.length) << 32) | u64::from(self.crc.finalize())
    }
}

pub(super) fn put_u64(out: &mut impl Sink, n: u64) {
    out.put(&n.to_le_bytes());
}

pub(super) fn put_varint(out: &mut impl Sink, mut n: u64) {
    let mut bytes = [0; VARINT_BYTES_MAX];
    let mut length = 0;
    loop {
        bytes[length] = (n as u8) & 0x7F;
        n >>= 7;
        if n == 0 {
            break;
        }
        bytes[length] |= 0x80;
        length += 1;
    }
    out.put(&bytes[..=length]);
}

pub(super) fn put_bytes(out: &mut impl Sink, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.put(bytes);
}

pub(super) fn put_span(out: &mut impl Sink, span: &Span) {
    put_bytes(out, &span.start);
    match &span.end {
        None => out.put(&[0]),
        Some(end) => {
            out.put(&[1]);
            put_bytes(out, end);
        }
    }
}

pub(super) fn put_tokens(out: &mut impl Sink, tokens: Option<Tokens>) {
    match tokens {
        None => out.put(&[0]),
        Some(Tokens { first, last }) => {
            out.put(&[1]);
            put_u64(out, first);
            put_u64(out, last);
        }
    }
}

/// Most bytes of a variable integer.
pub(super) const VARINT_BYTES_MAX: usize = 10;

/// Reads what the `put_` functions wrote.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes not yet read.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn fail<T>(&self, what: &'static str) -> Result<T, DecodeError> {
        Err(DecodeError { at: self.at, what })
    }

    pub(super) fn end(&self) -> Result<(), DecodeError> {
        if self.left() == 0 { Ok(()) } else { self.fail("nothing more was expected") }
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        if length > self.left() {
            return self.fail("the bytes end too early");
        }
        let taken = &self.bytes[self.at..self.at + length];
        self.at += length;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        Ok(self.take(N)?.try_into().expect("took N bytes"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => self.fail("0 or 1 was expected before here"),
        }
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut n = 0;
        for i in 0..VARINT_BYTES_MAX {
            let byte = self.u8()?;
            if i == VARINT_BYTES_MAX - 1 && byte > 1 {
                break;
            }
            n |= u64::from(byte & 0x7F) << (7 * i);
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        self.fail("a variable integer is longer than 64 bits")
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.varint()?;
        match usize::try_from(length) {
            Ok(length) => self.take(length),
            Err(_) => self.fail("a length does not fit this machine"),
        }
    }

    /// A count of things of at least one byte each.
    pub(super) fn count(&mut self) -> Result<usize, DecodeError> {
        let count = self.varint()?;
        match usize::try_from(count) {
            Ok(count) if count <= self.left() => Ok(count),
            _ => self.fail("more things are announced than bytes are left"),
        }
    }

    /// A span; `own` makes bytes of slices (a share of the buffer, or a copy).
    pub(super) fn span(&mut self, own: impl Fn(&'a [u8]) -> Bytes) -> Result<Span, DecodeError> {
        let start = own(self.bytes()?);
        let end = if self.flag()? { Some(own(self.bytes()?)) } else { None };
        Ok(Span { start, end })
    }

    pub(super) fn tokens(&mut self) -> Result<Option<Tokens>, DecodeError> {
        if !self.flag()? {
            return Ok(None);
        }
        let (first, last) = (self.u64()?, self.u64()?);
        if first > last { self.fail("tokens in the wrong order") } else { Ok(Some(Tokens { first, last })) }
    }
}

/// Spreads the bits of `n` (the finalizer of SplitMix64), so that sums of such numbers tell sets apart.
pub(super) const fn mix(mut n: u64) -> u64 {
    n = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_integers_round_trip_at_every_length() {
        for shift in 0..64 {
            for n in [(1u64 << shift) - 1, 1 << shift, u64::MAX >> shift] {
                let mut out = Vec::new();
                put_varint(&mut out, n);
                let mut reader = Reader::new(&out);
                assert_eq!(reader.varint(), Ok(n));
                assert_eq!(reader.end(), Ok(()));
            }
        }
    }

    #[test]
    fn a_variable_integer_beyond_64_bits_is_refused() {
        let mut bytes = vec![0xFF; 9];
        bytes.push(2);
        assert!(Reader::new(&bytes).varint().is_err());
        assert!(Reader::new(&[0x80; 11]).varint().is_err());
    }

    #[test]
    fn a_length_beyond_the_end_is_refused_without_allocating() {
        let mut out = Vec::new();
        put_varint(&mut out, u64::MAX);
        assert!(Reader::new(&out).bytes().is_err());
        assert!(Reader::new(&out).count().is_err());
    }
}
