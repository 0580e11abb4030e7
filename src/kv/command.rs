//! Commands: what one Raft entry of a data partition asks of the [`super::Store`], and its bytes.
//!
//! One command carries a batch of writes of many clients, each answered on its own. The first byte is the format,
//! the second holds flags (none yet): a reader refuses what it does not know instead of guessing.
//!
//! Invariant: `decode(encode(command)) == command`; decoded keys and values are slices of the given buffer.

use super::codec::{DecodeError, Fingerprint, Reader, Sink, VARINT_BYTES_MAX};
use super::codec::{put_bytes, put_span, put_tokens, put_u64, put_varint};
use crate::key::{Span, Tokens, Version};
use bytes::Bytes;

/// The format that [`Command::encode`] writes.
const COMMAND_FORMAT: u8 = 1;

/// One Raft entry: writes to be applied in order, each with its own reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Command {
    /// The leader's hybrid logical time when it proposed this. Versions given are at least this.
    pub stamp: Version,
    /// Writes, in the order in which they are applied.
    pub writes: Vec<Write>,
}

/// One write of one client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// Identity under which a repetition is answered instead of applied. `None`: a repetition applies again.
    pub session: Option<Session>,
    /// What to do.
    pub op: Op,
}

/// Identity of a write: the same `(client, sequence)` is applied once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Session {
    /// The client's 16 random bytes, big-endian.
    pub client: u128,
    /// When the session began.
    pub opened: Version,
    /// 1, 2, 3 … never used for two writes.
    pub sequence: u64,
    /// Every sequence below this has been answered to the client and will not be repeated.
    pub acknowledged_below: u64,
}

/// What a write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Writes one row.
    Single(Item),
    /// Writes rows of distinct keys: all of them or, if one condition does not hold, none.
    Batch(Vec<Item>),
    /// Deletes every row of the part of `span` that lies in this partition.
    DeleteRange {
        /// Keys.
        span: Span,
        /// Hashed layout: only rows whose token lies here. `None`: all.
        tokens: Option<Tokens>,
    },
}

impl Op {
    /// The first key that it names; of a range, where it begins.
    #[must_use]
    pub fn first_key(&self) -> &Bytes {
        static EMPTY: Bytes = Bytes::new();
        match self {
            Self::Single(item) => &item.key,
            Self::Batch(items) => items.first().map_or(&EMPTY, |item| &item.key),
            Self::DeleteRange { span, .. } => &span.start,
        }
    }

    /// Whether it can make rows, or make them longer; else it only deletes.
    #[must_use]
    pub fn adds(&self) -> bool {
        let adds = |item: &Item| !matches!(item.action, Action::Delete { .. });
        match self {
            Self::Single(item) => adds(item),
            Self::Batch(items) => items.iter().any(adds),
            Self::DeleteRange { .. } => false,
        }
    }
}

/// One row's write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// The row's key.
    pub key: Bytes,
    /// What must hold of the row, or nothing happens.
    pub condition: Condition,
    /// What to do if it holds.
    pub action: Action,
    /// Answer with the row as it was before.
    pub return_previous: bool,
}

/// What must hold of a row before it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// Nothing.
    Any,
    /// There is no such row.
    Absent,
    /// There is one.
    Present,
    /// There is one of exactly this version.
    Version(Version),
    /// There is one of exactly this value.
    Value(Bytes),
}

/// What happens to a row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// The row gets this value.
    Put {
        /// New value.
        value: Bytes,
    },
    /// The row goes away.
    Delete {
        /// Refuse with [`super::Refusal::NotFound`] if there is none.
        must_exist: bool,
    },
    /// The row's value, a decimal number (0 if there is no row), grows by `delta`.
    Increment {
        /// What to add.
        delta: i64,
    },
}

const WITH_SESSION: u8 = 1;

const OP_SINGLE: u8 = 1;
const OP_BATCH: u8 = 2;
const OP_DELETE_RANGE: u8 = 3;

const CONDITION_ANY: u8 = 0;
const CONDITION_ABSENT: u8 = 1;
const CONDITION_PRESENT: u8 = 2;
const CONDITION_VERSION: u8 = 3;
const CONDITION_VALUE: u8 = 4;

const ACTION_PUT: u8 = 1;
const ACTION_DELETE: u8 = 2;
const ACTION_INCREMENT: u8 = 3;

const RETURN_PREVIOUS: u8 = 1;
const MUST_EXIST: u8 = 2;

/// Writes for which room is made before they are read.
const WRITES_RESERVED_MAX: usize = 1024;

/// Bytes of a command besides its writes, at most.
const COMMAND_HEAD_MAX: usize = 2 + 8 + VARINT_BYTES_MAX;
/// Bytes of a write besides its items or span, at most: flags, session, tag, count.
const WRITE_HEAD_MAX: usize = 1 + 16 + 8 + 2 * VARINT_BYTES_MAX + 1 + VARINT_BYTES_MAX;
/// Bytes of an item besides its key, value and condition's value, at most.
const ITEM_HEAD_MAX: usize = 3 + 3 * VARINT_BYTES_MAX + 8;
/// Bytes of a span and tokens besides the keys, at most.
const RANGE_HEAD_MAX: usize = 2 * VARINT_BYTES_MAX + 2 + 16;

impl Command {
    /// The bytes of this command.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let bytes_max = COMMAND_HEAD_MAX + self.writes.iter().map(Write::bytes_max).sum::<usize>();
        let mut out = Vec::with_capacity(bytes_max);
        out.put(&[COMMAND_FORMAT, 0]);
        put_u64(&mut out, self.stamp);
        put_varint(&mut out, self.writes.len() as u64);
        for write in &self.writes {
            write.encode(&mut out);
        }
        out.into()
    }

    /// The command behind these bytes; its keys and values share them.
    ///
    /// # Errors
    /// When the bytes are damaged or of a format or with flags that this version does not know. An entry that was
    /// committed and cannot be decoded must stop the replica: skipping it would part it from the others.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        if reader.u8()? != COMMAND_FORMAT {
            return reader.fail("a command of an unknown format");
        }
        if reader.u8()? != 0 {
            return reader.fail("a command with unknown flags");
        }
        let stamp = reader.u64()?;
        let count = reader.count()?;
        let mut writes = Vec::with_capacity(count.min(WRITES_RESERVED_MAX));
        for _ in 0..count {
            writes.push(Write::decode(&mut reader, bytes)?);
        }
        reader.end()?;
        Ok(Self { stamp, writes })
    }
}

impl Write {
    /// An upper bound of the bytes that this write takes in a command, close above what it does take.
    #[must_use]
    pub fn bytes_max(&self) -> usize {
        WRITE_HEAD_MAX
            + match &self.op {
                Op::Single(item) => item.bytes_max(),
                Op::Batch(items) => items.iter().map(Item::bytes_max).sum(),
                Op::DeleteRange { span, .. } => {
                    RANGE_HEAD_MAX + span.start.len() + span.end.as_ref().map_or(0, Bytes::len)
                }
            }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match &self.session {
            None => out.put(&[0]),
            Some(session) => {
                out.put(&[WITH_SESSION]);
                out.put(&session.client.to_be_bytes());
                put_u64(out, session.opened);
                put_varint(out, session.sequence);
                put_varint(out, session.acknowledged_below);
            }
        }
        self.op.encode(out);
    }

    fn decode(reader: &mut Reader<'_>, buffer: &Bytes) -> Result<Self, DecodeError> {
        let session = match reader.u8()? {
            0 => None,
            WITH_SESSION => Some(Session {
                client: u128::from_be_bytes(reader.array()?),
                opened: reader.u64()?,
                sequence: reader.varint()?,
                acknowledged_below: reader.varint()?,
            }),
            _ => return reader.fail("a write with unknown flags"),
        };
        Ok(Self { session, op: Op::decode(reader, buffer)? })
    }
}

impl Op {
    /// A number that differs, but for one chance in four billion, between different operations. Session tables hold
    /// it and replicas must agree on it, so it stays that of format 1, whatever later formats look like.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut out = Fingerprint::default();
        self.encode(&mut out);
        out.finish()
    }

    fn encode(&self, out: &mut impl Sink) {
        match self {
            Self::Single(item) => {
                out.put(&[OP_SINGLE]);
                item.encode(out);
            }
            Self::Batch(items) => {
                out.put(&[OP_BATCH]);
                put_varint(out, items.len() as u64);
                for item in items {
                    item.encode(out);
                }
            }
            Self::DeleteRange { span, tokens } => {
                out.put(&[OP_DELETE_RANGE]);
                put_span(out, span);
                put_tokens(out, *tokens);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>, buffer: &Bytes) -> Result<Self, DecodeError> {
        Ok(match reader.u8()? {
            OP_SINGLE => Self::Single(Item::decode(reader, buffer)?),
            OP_BATCH => {
                let count = reader.count()?;
                let mut items = Vec::new();
                for _ in 0..count {
                    items.push(Item::decode(reader, buffer)?);
                }
                Self::Batch(items)
            }
            OP_DELETE_RANGE => {
                Self::DeleteRange { span: reader.span(|slice| buffer.slice_ref(slice))?, tokens: reader.tokens()? }
            }
            _ => return reader.fail("an unknown operation"),
        })
    }
}

impl Item {
    fn bytes_max(&self) -> usize {
        let condition = if let Condition::Value(value) = &self.condition { value.len() } else { 0 };
        let action = if let Action::Put { value } = &self.action { value.len() } else { 0 };
        ITEM_HEAD_MAX + self.key.len() + condition + action
    }

    fn encode(&self, out: &mut impl Sink) {
        let (action, must_exist) = match self.action {
            Action::Put { .. } => (ACTION_PUT, false),
            Action::Delete { must_exist } => (ACTION_DELETE, must_exist),
            Action::Increment { .. } => (ACTION_INCREMENT, false),
        };
        let condition = match self.condition {
            Condition::Any => CONDITION_ANY,
            Condition::Absent => CONDITION_ABSENT,
            Condition::Present => CONDITION_PRESENT,
            Condition::Version(_) => CONDITION_VERSION,
            Condition::Value(_) => CONDITION_VALUE,
        };
        let previous = if self.return_previous { RETURN_PREVIOUS } else { 0 };
        out.put(&[action, condition, previous | if must_exist { MUST_EXIST } else { 0 }]);
        put_bytes(out, &self.key);
        match &self.condition {
            Condition::Any | Condition::Absent | Condition::Present => {}
            Condition::Version(version) => put_u64(out, *version),
            Condition::Value(value) => put_bytes(out, value),
        }
        match &self.action {
            Action::Put { value } => put_bytes(out, value),
            Action::Delete { .. } => {}
            Action::Increment { delta } => put_u64(out, delta.cast_unsigned()),
        }
    }

    fn decode(reader: &mut Reader<'_>, buffer: &Bytes) -> Result<Self, DecodeError> {
        let [action, condition, flags] = reader.array()?;
        let flags_known = if action == ACTION_DELETE { RETURN_PREVIOUS | MUST_EXIST } else { RETURN_PREVIOUS };
        if flags & !flags_known != 0 {
            return reader.fail("an item with unknown flags");
        }
        let key = buffer.slice_ref(reader.bytes()?);
        let condition = match condition {
            CONDITION_ANY => Condition::Any,
            CONDITION_ABSENT => Condition::Absent,
            CONDITION_PRESENT => Condition::Present,
            CONDITION_VERSION => Condition::Version(reader.u64()?),
            CONDITION_VALUE => Condition::Value(buffer.slice_ref(reader.bytes()?)),
            _ => return reader.fail("an unknown condition"),
        };
        let action = match action {
            ACTION_PUT => Action::Put { value: buffer.slice_ref(reader.bytes()?) },
            ACTION_DELETE => Action::Delete { must_exist: flags & MUST_EXIST != 0 },
            ACTION_INCREMENT => Action::Increment { delta: reader.u64()?.cast_signed() },
            _ => return reader.fail("an unknown action"),
        };
        Ok(Self { key, condition, action, return_previous: flags & RETURN_PREVIOUS != 0 })
    }
}
