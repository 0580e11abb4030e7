//! Replies: what became of a write, and the bytes in which a session remembers it.

use super::bounds::NotOwned;
use super::codec::{DecodeError, Reader, Sink, put_bytes, put_span, put_tokens, put_u64, put_varint};
use super::packed::Row;
use crate::error::{Error, Outcome, Reason};
use crate::key::{Span, Tokens, VERSION_COUNTER_BITS, Version, printable};
use bytes::Bytes;

/// The answer to one write of a command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// What became of it.
    pub answer: Answer,
    /// True when an earlier attempt got this answer, and this one did nothing.
    pub replayed: bool,
}

/// Done, or refused with nothing changed.
pub type Answer = Result<Done, Refusal>;

/// What a write did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Done {
    /// To [`super::Op::Single`].
    Single(Written),
    /// To [`super::Op::Batch`].
    Batch {
        /// Whether every condition held and everything was written.
        applied: bool,
        /// One per item, in order.
        items: Vec<Written>,
    },
    /// To [`super::Op::DeleteRange`].
    DeleteRange(Box<Deleted>),
}

/// What became of one row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Written {
    /// False when the condition (or, in a batch, any condition) did not hold: nothing was written.
    pub applied: bool,
    /// Version of the write; of the existing row (0 if none) when it was not applied.
    pub version: Version,
    /// Whether the row existed before.
    pub existed: bool,
    /// The row before, when asked for and there was one.
    pub previous: Option<Row>,
    /// The number after an increment.
    pub number: Option<i64>,
}

/// What a range deletion did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Deleted {
    /// Rows deleted.
    pub count: u64,
    /// Interval of keys that this speaks for: the part that lies in this partition.
    pub covered: Span,
    /// Hashed layout: interval of tokens that this speaks for.
    pub covered_tokens: Option<Tokens>,
}

/// Why a write changed nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A key lies in another partition. Not remembered: the write may be repeated where it belongs.
    NotOwned(Box<NotOwned>),
    /// The partition has forgotten the session, or this answer of it. An earlier attempt may have been applied.
    SessionExpired {
        /// Sessions opened at or before this are refused, unless the partition still knows them.
        horizon: Version,
    },
    /// The session claims to have been opened further in the future than clocks may differ.
    SessionAhead {
        /// When it claims to have been opened.
        opened: Version,
    },
    /// The client's sequence (or id) was used for something else before.
    SequenceReused {
        /// The sequence.
        sequence: u64,
    },
    /// A deletion with `must_exist` found no row.
    NotFound {
        /// Its key.
        key: Bytes,
    },
    /// An increment met a value that is not a decimal 64-bit number.
    NotANumber {
        /// Its key.
        key: Bytes,
    },
    /// An increment's sum does not fit 64 bits.
    NumberOverflow {
        /// Its key.
        key: Bytes,
    },
    /// A batch names a key twice.
    KeyRepeated {
        /// The key.
        key: Bytes,
    },
}

impl From<NotOwned> for Refusal {
    fn from(refusal: NotOwned) -> Self {
        Self::NotOwned(Box::new(refusal))
    }
}

impl From<Refusal> for Error {
    /// Every refusal changed nothing, so the outcome is "not applied", with one exception: a session that was
    /// forgotten may have had this very write applied by an earlier attempt. Only the client knows if there was one.
    fn from(refusal: Refusal) -> Self {
        let outcome = match &refusal {
            Refusal::SessionExpired { .. } => Outcome::Unknown,
            Refusal::NotOwned(_)
            | Refusal::SessionAhead { .. }
            | Refusal::SequenceReused { .. }
            | Refusal::NotFound { .. }
            | Refusal::NotANumber { .. }
            | Refusal::NumberOverflow { .. }
            | Refusal::KeyRepeated { .. } => Outcome::NotApplied,
        };
        refusal.into_plain_error().outcome(outcome)
    }
}

impl Refusal {
    fn into_plain_error(self) -> Error {
        match self {
            Self::NotOwned(refusal) => (*refusal).into(),
            Self::SessionExpired { horizon } => Error::new(
                Reason::SessionExpired,
                "the partition no longer remembers this session's answers; open a new session, and repeat the write \
                 only if no earlier attempt can have been applied",
            )
            .with("horizon", horizon),
            Self::SessionAhead { opened } => Error::new(
                Reason::SessionAhead,
                format!(
                    "the session was opened at {} ms, too far ahead of the partition's time: use `opened` as \
                     OpenSession gave it, open the session through another node, and check the nodes' clocks",
                    opened >> VERSION_COUNTER_BITS
                ),
            )
            .in_field("session.opened"),
            Self::SequenceReused { sequence } => Error::new(
                Reason::SequenceReused,
                format!("sequence {sequence} of this session was used for another request"),
            ),
            Self::NotFound { key } => {
                Error::new(Reason::NotFound, format!("there is no row {} to delete", printable(&key)))
            }
            Self::NotANumber { key } => {
                Error::new(Reason::NotANumber, format!("the value of {} is not a decimal number", printable(&key)))
            }
            Self::NumberOverflow { key } => {
                Error::new(Reason::NumberOverflow, format!("the sum for {} does not fit 64 bits", printable(&key)))
            }
            Self::KeyRepeated { key } => Error::new(
                Reason::InvalidField,
                format!("{} is written twice; the keys of a batch must be distinct", printable(&key)),
            )
            .in_field("items"),
        }
    }

    /// Whether this answers the write for good. The others depend on where and when the write arrived.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::NotFound { .. }
            | Self::NotANumber { .. }
            | Self::NumberOverflow { .. }
            | Self::KeyRepeated { .. } => true,
            Self::NotOwned(_)
            | Self::SessionExpired { .. }
            | Self::SessionAhead { .. }
            | Self::SequenceReused { .. } => false,
        }
    }
}

const SINGLE: u8 = 1;
const BATCH: u8 = 2;
const DELETE_RANGE: u8 = 3;
const NOT_FOUND: u8 = 16;
const NOT_A_NUMBER: u8 = 17;
const NUMBER_OVERFLOW: u8 = 18;
const KEY_REPEATED: u8 = 19;
const FORGOTTEN: u8 = 20;

const APPLIED: u8 = 1;
const EXISTED: u8 = 2;
const PREVIOUS: u8 = 4;
const NUMBER: u8 = 8;

/// What one row's answer in a batch counts, besides its value. Fixed: see the session's own constants.
const WRITTEN_BYTES: usize = 80;
/// What a range deletion's answer counts, besides its keys.
const DELETED_BYTES: usize = 96;

/// Bytes that a session counts for remembering `answer`, beyond a fixed share.
pub(super) fn heap_bytes(answer: &Answer) -> u64 {
    let previous = |written: &Written| written.previous.as_ref().map_or(0, |row| row.value.len());
    let bytes = match answer {
        Ok(Done::Single(written)) => previous(written),
        Ok(Done::Batch { items, .. }) => items.iter().map(|written| WRITTEN_BYTES + previous(written)).sum::<usize>(),
        Ok(Done::DeleteRange(deleted)) => {
            DELETED_BYTES + deleted.covered.start.len() + deleted.covered.end.as_ref().map_or(0, Bytes::len)
        }
        Err(
            Refusal::NotFound { key }
            | Refusal::NotANumber { key }
            | Refusal::NumberOverflow { key }
            | Refusal::KeyRepeated { key },
        ) => key.len(),
        Err(
            Refusal::NotOwned(_)
            | Refusal::SessionExpired { .. }
            | Refusal::SessionAhead { .. }
            | Refusal::SequenceReused { .. },
        ) => 0,
    };
    bytes as u64
}

/// Writes a remembered answer.
///
/// # Panics
/// For a refusal that depends on when and where the write arrived: it is never remembered.
pub(super) fn encode(answer: &Answer, out: &mut Vec<u8>) {
    let refusal = |out: &mut Vec<u8>, tag, key: &Bytes| {
        out.put(&[tag]);
        put_bytes(out, key);
    };
    match answer {
        Ok(Done::Single(written)) => {
            out.put(&[SINGLE]);
            encode_written(written, out);
        }
        Ok(Done::Batch { applied, items }) => {
            out.put(&[BATCH, u8::from(*applied)]);
            put_varint(out, items.len() as u64);
            for written in items {
                encode_written(written, out);
            }
        }
        Ok(Done::DeleteRange(deleted)) => {
            out.put(&[DELETE_RANGE]);
            put_varint(out, deleted.count);
            put_span(out, &deleted.covered);
            put_tokens(out, deleted.covered_tokens);
        }
        Err(Refusal::NotFound { key }) => refusal(out, NOT_FOUND, key),
        Err(Refusal::NotANumber { key }) => refusal(out, NOT_A_NUMBER, key),
        Err(Refusal::NumberOverflow { key }) => refusal(out, NUMBER_OVERFLOW, key),
        Err(Refusal::KeyRepeated { key }) => refusal(out, KEY_REPEATED, key),
        Err(Refusal::SessionExpired { horizon }) => {
            out.put(&[FORGOTTEN]);
            put_u64(out, *horizon);
        }
        Err(refusal @ (Refusal::NotOwned(_) | Refusal::SessionAhead { .. } | Refusal::SequenceReused { .. })) => {
            unreachable!("{refusal:?} is never remembered")
        }
    }
}

/// Reads a remembered answer; copies what it holds.
pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Answer, DecodeError> {
    Ok(match reader.u8()? {
        SINGLE => Ok(Done::Single(decode_written(reader)?)),
        BATCH => {
            let applied = reader.flag()?;
            let count = reader.count()?;
            let mut items = Vec::new();
            for _ in 0..count {
                items.push(decode_written(reader)?);
            }
            Ok(Done::Batch { applied, items })
        }
        DELETE_RANGE => Ok(Done::DeleteRange(Box::new(Deleted {
            count: reader.varint()?,
            covered: reader.span(Bytes::copy_from_slice)?,
            covered_tokens: reader.tokens()?,
        }))),
        NOT_FOUND => Err(Refusal::NotFound { key: copy(reader)? }),
        NOT_A_NUMBER => Err(Refusal::NotANumber { key: copy(reader)? }),
        NUMBER_OVERFLOW => Err(Refusal::NumberOverflow { key: copy(reader)? }),
        KEY_REPEATED => Err(Refusal::KeyRepeated { key: copy(reader)? }),
        FORGOTTEN => Err(Refusal::SessionExpired { horizon: reader.u64()? }),
        _ => return reader.fail("an unknown answer"),
    })
}

fn copy(reader: &mut Reader<'_>) -> Result<Bytes, DecodeError> {
    Ok(Bytes::copy_from_slice(reader.bytes()?))
}

fn encode_written(written: &Written, out: &mut Vec<u8>) {
    let flag = |set: bool, bit: u8| if set { bit } else { 0 };
    out.put(&[flag(written.applied, APPLIED)
        | flag(written.existed, EXISTED)
        | flag(written.previous.is_some(), PREVIOUS)
        | flag(written.number.is_some(), NUMBER)]);
    put_u64(out, written.version);
    if let Some(row) = &written.previous {
        put_u64(out, row.version);
        put_bytes(out, &row.value);
    }
    if let Some(number) = written.number {
        put_u64(out, number.cast_unsigned());
    }
}

fn decode_written(reader: &mut Reader<'_>) -> Result<Written, DecodeError> {
    let flags = reader.u8()?;
    if flags & !(APPLIED | EXISTED | PREVIOUS | NUMBER) != 0 {
        return reader.fail("an answer with unknown flags");
    }
    let version = reader.u64()?;
    let previous = if flags & PREVIOUS == 0 {
        None
    } else {
        let version = reader.u64()?;
        Some(Row { value: copy(reader)?, version })
    };
    let number = if flags & NUMBER == 0 { None } else { Some(reader.u64()?.cast_signed()) };
    Ok(Written { applied: flags & APPLIED != 0, version, existed: flags & EXISTED != 0, previous, number })
}
