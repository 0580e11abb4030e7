//! Bytes of a segment.
//!
//! ```text
//! segment: magic 8 · format u32 · id u64 · number of the segment u64 · number of its first frame u64 · CRC-32 of the above
//!          frame*
//! frame:   id u64 · number u64 · oldest segment needed u64 · bytes of payload u64 · CRC-32 of the payload · CRC-32 of the above
//!          payload: item*
//! item:    kind u8 · group u64 · replica u64 · what the kind says
//! ```
//!
//! Numbers are little-endian. The id is drawn once for a log, so that neither another log's bytes nor a row that holds
//! the bytes of a frame is taken for one of ours.

use super::{super::Record, Place};
use crate::key::{PartitionId, ReplicaId};

/// Bytes at the beginning of a segment, and of a frame.
pub(super) const HEAD_BYTES: usize = 40;

const MAGIC: [u8; 8] = *b"MRDNLOG\n";
const FORMAT: u32 = 1;

const APPEND: u8 = 1;
const VOTE: u8 = 2;
const TRUNCATE: u8 = 3;
const PURGE: u8 = 4;
const COMMITTED: u8 = 5;
const TOMBSTONE: u8 = 6;
const META: u8 = 7;
const END: u8 = 8;

/// The beginning of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SegmentHead {
    pub(super) id: u64,
    pub(super) segment: u64,
    /// Number of its first frame.
    pub(super) first: u64,
}

impl SegmentHead {
    pub(super) fn encode(self) -> Vec<u8> {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&FORMAT.to_le_bytes());
        for number in [self.id, self.segment, self.first] {
            put_u64(&mut head, number);
        }
        let crc = crc32fast::hash(&head);
        head.extend_from_slice(&crc.to_le_bytes());
        head
    }

    /// # Errors
    /// What is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let head = bytes.get(..HEAD_BYTES).ok_or("it is shorter than its head")?;
        let mut rest = Reader(&head[MAGIC.len()..]);
        let format = rest.u32().unwrap_or_default();
        if !head.starts_with(&MAGIC) {
            return Err("it does not begin as a segment of a log".into());
        }
        if format != FORMAT {
            return Err(format!("format {format} is not known, {FORMAT} is"));
        }
        let (covered, crc) = head.split_at(HEAD_BYTES - 4);
        if crc32fast::hash(covered).to_le_bytes() != crc {
            return Err("the checksum of its head is wrong".into());
        }
        let mut number = || rest.u64().unwrap_or_default();
        Ok(Self { id: number(), segment: number(), first: number() })
    }
}

/// The beginning of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FrameHead {
    pub(super) number: u64,
    /// The oldest segment that was needed when the frame was written.
    pub(super) oldest: u64,
    /// Bytes of the payload.
    pub(super) len: u64,
    payload_crc: u32,
}

impl FrameHead {
    /// `None` if there is none of this log at the beginning of `bytes`, or a damaged one.
    pub(super) fn decode(id: u64, bytes: &[u8]) -> Option<Self> {
        let head = bytes.get(..HEAD_BYTES).filter(|head| head.starts_with(&id.to_le_bytes()))?;
        let mut rest = Reader(&head[8..]);
        let found = Self { number: rest.u64()?, oldest: rest.u64()?, len: rest.u64()?, payload_crc: rest.u32()? };
        (rest.u32()? == crc32fast::hash(&head[..HEAD_BYTES - 4])).then_some(found)
    }

    /// The payload behind the head that `bytes` begin with, if all of it is there and as it was written.
    pub(super) fn payload<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let end = usize::try_from(self.len).ok()?.checked_add(HEAD_BYTES)?;
        bytes.get(HEAD_BYTES..end).filter(|payload| crc32fast::hash(payload) == self.payload_crc)
    }
}

/// Makes an empty frame of `frame`: room for its head.
pub(super) fn begin(frame: &mut Vec<u8>) {
    frame.clear();
    frame.resize(HEAD_BYTES, 0);
}

/// Fills in the head.
pub(super) fn finish(frame: &mut [u8], id: u64, number: u64, oldest: u64) {
    let (head, payload) = frame.split_at_mut(HEAD_BYTES);
    for (place, value) in [id, number, oldest, payload.len() as u64].into_iter().enumerate() {
        head[place * 8..][..8].copy_from_slice(&value.to_le_bytes());
    }
    head[32..36].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let crc = crc32fast::hash(&head[..36]);
    head[36..].copy_from_slice(&crc.to_le_bytes());
}

/// A change, as it is read back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Item<'a> {
    /// A record of a replica.
    Of(Place, Change<'a>),
    /// A fact of the node.
    Meta { name: &'a str, value: &'a [u8] },
    /// The next frame is in the next segment.
    End,
}

/// What a record changes; see [`Record`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Change<'a> {
    Append { first: u64, entries: Vec<&'a [u8]> },
    Vote(&'a [u8]),
    Truncate { from: u64 },
    Purge { upto: u64, marker: &'a [u8] },
    Committed(&'a [u8]),
    Tombstone,
}

pub(super) fn put_record(frame: &mut Vec<u8>, place: Place, record: &Record) {
    match record {
        Record::Append { first, entries } => put_append(frame, place, *first, entries.iter().map(AsRef::as_ref)),
        Record::Vote(vote) => put_vote(frame, place, vote),
        Record::Truncate { from } => {
            put_kind(frame, TRUNCATE, place);
            put_u64(frame, *from);
        }
        Record::Purge { upto, marker } => put_purge(frame, place, *upto, marker),
        Record::Committed(hint) => put_committed(frame, place, hint),
        Record::Tombstone => put_tombstone(frame, place),
    }
}

pub(super) fn put_append<'a>(
    frame: &mut Vec<u8>,
    place: Place,
    first: u64,
    entries: impl ExactSizeIterator<Item = &'a [u8]>,
) {
    put_kind(frame, APPEND, place);
    put_u64(frame, first);
    put_u64(frame, entries.len() as u64);
    for entry in entries {
        put_bytes(frame, entry);
    }
}

pub(super) fn put_vote(frame: &mut Vec<u8>, place: Place, vote: &[u8]) {
    put_kind(frame, VOTE, place);
    put_bytes(frame, vote);
}

pub(super) fn put_purge(frame: &mut Vec<u8>, place: Place, upto: u64, marker: &[u8]) {
    put_kind(frame, PURGE, place);
    put_u64(frame, upto);
    put_bytes(frame, marker);
}

pub(super) fn put_committed(frame: &mut Vec<u8>, place: Place, hint: &[u8]) {
    put_kind(frame, COMMITTED, place);
    put_bytes(frame, hint);
}

pub(super) fn put_tombstone(frame: &mut Vec<u8>, place: Place) {
    put_kind(frame, TOMBSTONE, place);
}

pub(super) fn put_meta(frame: &mut Vec<u8>, name: &str, value: &[u8]) {
    put_kind(frame, META, Place::default());
    put_bytes(frame, name.as_bytes());
    put_bytes(frame, value);
}

pub(super) fn put_end(frame: &mut Vec<u8>) {
    put_kind(frame, END, Place::default());
}

fn put_kind(frame: &mut Vec<u8>, kind: u8, place: Place) {
    frame.push(kind);
    put_u64(frame, place.0.0);
    put_u64(frame, place.1.0);
}

fn put_u64(frame: &mut Vec<u8>, number: u64) {
    frame.extend_from_slice(&number.to_le_bytes());
}

fn put_bytes(frame: &mut Vec<u8>, bytes: &[u8]) {
    put_u64(frame, bytes.len() as u64);
    frame.extend_from_slice(bytes);
}

/// The items of a payload, in order; `None` if it is not made of items.
pub(super) fn items(payload: &[u8]) -> Option<Vec<Item<'_>>> {
    let mut rest = Reader(payload);
    let mut items = Vec::new();
    while !rest.0.is_empty() {
        items.push(rest.item()?);
    }
    Some(items)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let count = usize::try_from(self.u64()?).ok()?;
        self.take(count)
    }

    fn item(&mut self) -> Option<Item<'a>> {
        let kind = self.take(1)?[0];
        let place = (PartitionId(self.u64()?), ReplicaId(self.u64()?));
        let change = match kind {
            APPEND => {
                let (first, count) = (self.u64()?, self.u64()?);
                first.checked_add(count)?;
                Change::Append { first, entries: (0..count).map(|_| self.bytes()).collect::<Option<_>>()? }
            }
            VOTE => Change::Vote(self.bytes()?),
            TRUNCATE => Change::Truncate { from: self.u64()? },
            PURGE => Change::Purge { upto: self.u64()?, marker: self.bytes()? },
            COMMITTED => Change::Committed(self.bytes()?),
            TOMBSTONE => Change::Tombstone,
            META => {
                return Some(Item::Meta { name: std::str::from_utf8(self.bytes()?).ok()?, value: self.bytes()? });
            }
            END => return Some(Item::End),
            _ => return None,
        };
        Some(Item::Of(place, change))
    }
}
