//! Snapshots: the state as of one moment, given out in chunks while writes go on, and put together again.
//!
//! A snapshot is a sequence of frames: length (4 bytes), body, CRC-32 of length and body that begins with the CRC of
//! the frame before. A frame that is changed, missing, repeated or moved therefore breaks the chain. The first body
//! byte is the frame's kind; frames come as one header, sessions, rows in ascending order, one end with row count
//! and digest. Where the bytes are cut on their way does not matter.
//!
//! Nothing is copied to freeze: the table saves rows that change before they were given out, sessions are shared
//! until they change.

use super::bounds::Bounds;
use super::codec::{DecodeError, Reader, Sink, put_span, put_u64, put_varint};
use super::packed::Packed;
use super::session::{Clients, SessionLimits, Sessions};
use super::store::Store;
use super::table::Table;
use crate::key::{Layout, Span, Version};
use crate::plant::{Bug, planted};
use bytes::Bytes;
use std::fmt;
use std::ops::Bound::{Excluded, Unbounded};

/// First bytes of the header's body, after its kind.
const MAGIC: &[u8] = b"MERIDIAN-KV";
/// The format that is written. Format 1 had neither epoch nor seal.
const SNAPSHOT_FORMAT: u8 = 2;

const HEADER: u8 = 1;
const SESSIONS: u8 = 2;
const ROWS: u8 = 3;
const END: u8 = 4;

const LENGTH_BYTES: usize = 4;
const CRC_BYTES: usize = 4;
/// A longer frame is damage: limits of keys, values and remembered answers lie far below.
const FRAME_BYTES_MAX: usize = 256 << 20;

/// Larger chunks are not made, whatever is asked for.
const CHUNK_BYTES_MAX: usize = 64 << 20;

/// Bugs whose snapshots would be found out at once, were they checked.
const UNCHECKED: [Bug; 4] =
    [Bug::SnapshotWithoutSessions, Bug::SnapshotWithoutLastRow, Bug::SnapshotAhead, Bug::ChecksumIgnored];

/// Most rows that one chunk looks at: rows written after the freeze cost time and fill nothing.
pub const FREEZE_LOOKED_MAX: usize = 65_536;

/// Why bytes are not a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotError {
    /// Offset, in the whole snapshot, of the frame at fault.
    pub frame_at: u64,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot of a partition damaged in the frame at byte {}: {}", self.frame_at, self.what)
    }
}

impl std::error::Error for SnapshotError {}

/// How far a freeze has been given out.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Header,
    /// After this client.
    Sessions(Option<u128>),
    Rows,
    End,
}

/// A running freeze.
#[derive(Debug)]
pub(super) struct Freeze {
    stage: Stage,
    crc: u32,
    header: Vec<u8>,
    clients: Clients,
    /// Rows given out.
    rows: u64,
    digest: u64,
}

impl Store {
    /// Fixes the state as it is now for [`Store::freeze_next`]; apply goes on. A freeze that is running is dropped.
    pub fn freeze(&mut self) {
        let sessions = self.session_table();
        let mut header = Vec::new();
        header.put(MAGIC);
        header.put(&[SNAPSHOT_FORMAT, 0]);
        header.put(&[match self.layout() {
            Layout::Ordered => 0,
            Layout::Hashed => 1,
        }]);
        put_span(&mut header, self.span());
        put_u64(&mut header, self.epoch());
        // Versions of maps begin at 1.
        put_u64(&mut header, self.sealed().unwrap_or(0));
        put_u64(&mut header, self.applied());
        put_u64(&mut header, self.last_version());
        put_u64(&mut header, sessions.horizon());
        sessions.limits().encode(&mut header);
        let clients = sessions.clients().clone();
        let freeze = Freeze { stage: Stage::Header, crc: 0, header, clients, rows: 0, digest: self.digest() };
        let (place, table) = self.freeze_parts();
        table.freeze();
        *place = Some(freeze);
    }

    /// The next chunk of the state as of the freeze, of about `bytes_max` bytes (more if one row is larger, a little
    /// less otherwise); `None` after the last, or without a freeze. Looks at no more than [`FREEZE_LOOKED_MAX`] rows.
    pub fn freeze_next(&mut self, bytes_max: usize) -> Option<Bytes> {
        let (place, table) = self.freeze_parts();
        let freeze = place.as_mut()?;
        let chunk = freeze.next(table, bytes_max.min(CHUNK_BYTES_MAX));
        if chunk.is_none() {
            self.thaw();
        }
        chunk
    }

    /// Ends a freeze, finished or not. Without one it does nothing.
    pub fn thaw(&mut self) {
        let (place, table) = self.freeze_parts();
        *place = None;
        table.thaw();
    }
}

impl Freeze {
    fn next(&mut self, table: &mut Table, bytes_max: usize) -> Option<Bytes> {
        if let Stage::Header = self.stage {
            self.stage = Stage::Sessions(None);
            let mut frame = begin_frame(HEADER);
            frame.append(&mut self.header);
            return Some(self.end_frame(frame));
        }
        if let Stage::Sessions(after) = self.stage {
            if let Some(frame) = self.next_sessions(after, bytes_max) {
                return Some(self.end_frame(frame));
            }
            self.clients = Clients::new();
            self.stage = Stage::Rows;
        }
        if let Stage::Rows = self.stage {
            let mut frame = begin_frame(ROWS);
            if let Some(rows) = table.next_frozen(bytes_max, FREEZE_LOOKED_MAX, &mut frame) {
                self.rows += rows;
                return Some(self.end_frame(frame));
            }
            self.stage = Stage::End;
            let mut frame = begin_frame(END);
            put_varint(&mut frame, self.rows);
            put_u64(&mut frame, self.digest);
            return Some(self.end_frame(frame));
        }
        None
    }

    fn next_sessions(&mut self, after: Option<u128>, bytes_max: usize) -> Option<Vec<u8>> {
        let mut frame = begin_frame(SESSIONS);
        let mut last = None;
        for (id, client) in self.clients.range((after.map_or(Unbounded, Excluded), Unbounded)) {
            if last.is_some() && frame.len() >= bytes_max {
                break;
            }
            client.encode(*id, &mut frame);
            last = Some(*id);
        }
        last?;
        self.stage = Stage::Sessions(last);
        Some(frame)
    }

    fn end_frame(&mut self, mut frame: Vec<u8>) -> Bytes {
        let length = frame.len() - LENGTH_BYTES;
        let length = u32::try_from(length).expect("a frame is bounded by the limits of keys, values and answers");
        frame[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        self.crc = chained_crc(self.crc, &frame);
        frame.put(&self.crc.to_le_bytes());
        frame.into()
    }
}

/// A frame whose length is still missing.
fn begin_frame(kind: u8) -> Vec<u8> {
    vec![0, 0, 0, 0, kind]
}

fn chained_crc(before: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    hasher.update(bytes);
    hasher.finalize()
}

/// Puts a snapshot together again. Whatever is wrong with the bytes is an error, here or in [`Restore::finish`].
#[derive(Debug, Default)]
pub struct Restore {
    /// Bytes of a frame that is not complete yet.
    pending: Vec<u8>,
    /// Offset of `pending` in the whole snapshot.
    frame_at: u64,
    crc: u32,
    kind: u8,
    header: Option<Header>,
    rows: Vec<Packed>,
    end: Option<(u64, u64)>,
}

#[derive(Debug)]
struct Header {
    bounds: Bounds,
    applied: u64,
    last_version: Version,
    sessions: Sessions,
}

impl Restore {
    /// Nothing fed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the snapshot, cut anywhere. Rows are copied out of them.
    ///
    /// # Errors
    /// At the first frame that is damaged, out of place, or of a format that this version does not know. What was
    /// fed before is of no use then.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut pending = std::mem::take(&mut self.pending);
        pending.extend_from_slice(bytes);
        let mut taken = 0;
        while let Some(length) = self.next_frame(&pending[taken..])? {
            self.take_frame(&pending[taken..taken + length])?;
            self.frame_at += length as u64;
            taken += length;
        }
        pending.drain(..taken);
        self.pending = pending;
        Ok(())
    }

    /// The partition, once everything was fed.
    ///
    /// # Errors
    /// When the snapshot is not complete, or its rows are not those that were frozen.
    pub fn finish(mut self) -> Result<Store, SnapshotError> {
        let frame_at = self.frame_at;
        let fail = |what: String| Err(SnapshotError { frame_at, what });
        let (Some(mut header), Some((rows, digest)), true) = (self.header, self.end, self.pending.is_empty()) else {
            return fail("the snapshot ends too early".to_owned());
        };
        if rows != self.rows.len() as u64 {
            return fail(format!("{rows} rows were written and {} are here", self.rows.len()));
        }
        if planted(Bug::SnapshotWithoutLastRow) {
            self.rows.pop();
        }
        if planted(Bug::SnapshotWithoutSessions) {
            header.sessions = Sessions::new(*header.sessions.limits(), header.sessions.horizon());
        }
        let table = Table::from_ascending(self.rows);
        let store = Store::from_parts(header.bounds, table, header.sessions, header.applied, header.last_version);
        if store.digest() != digest && !UNCHECKED.iter().any(|bug| planted(*bug)) {
            return fail(format!("the digest is {:016x} and should be {digest:016x}", store.digest()));
        }
        Ok(store)
    }

    /// Length of the complete frame at the start of `bytes`, if there is one.
    fn next_frame(&self, bytes: &[u8]) -> Result<Option<usize>, SnapshotError> {
        let Some(length) = bytes.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || length > FRAME_BYTES_MAX {
            return Err(self.fail(format!("a frame of {length} bytes")));
        }
        let frame = LENGTH_BYTES + length + CRC_BYTES;
        Ok((bytes.len() >= frame).then_some(frame))
    }

    fn take_frame(&mut self, frame: &[u8]) -> Result<(), SnapshotError> {
        let (covered, crc) = frame.split_at(frame.len() - CRC_BYTES);
        self.crc = chained_crc(self.crc, covered);
        if self.crc.to_le_bytes() != crc && !planted(Bug::ChecksumIgnored) {
            return Err(self.fail("the checksum does not match".to_owned()));
        }
        let mut reader = Reader::new(&covered[LENGTH_BYTES..]);
        self.take_body(&mut reader).map_err(|error| self.fail(error.to_string()))
    }

    fn take_body(&mut self, reader: &mut Reader<'_>) -> Result<(), DecodeError> {
        let kind = reader.u8()?;
        // Header first, end last and both once; sessions before rows.
        let in_place = match (self.kind, kind) {
            (before, HEADER) => before == 0,
            (before, SESSIONS) => before == HEADER || before == SESSIONS,
            (before, ROWS | END) => before != 0 && before != END,
            _ => false,
        };
        if !in_place {
            return reader.fail("a frame of an unknown kind or out of place");
        }
        self.kind = kind;
        match (kind, &mut self.header) {
            (SESSIONS, Some(header)) => {
                while reader.left() > 0 {
                    header.sessions.restore(reader)?;
                }
            }
            (ROWS, Some(header)) => {
                while reader.left() > 0 {
                    take_row(reader, &header.bounds, &mut self.rows)?;
                }
            }
            (END, _) => self.end = Some((reader.varint()?, reader.u64()?)),
            (_, header) => *header = Some(Header::decode(reader)?),
        }
        reader.end()
    }

    fn fail(&self, what: String) -> SnapshotError {
        SnapshotError { frame_at: self.frame_at, what }
    }
}

impl Header {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        if reader.take(MAGIC.len())? != MAGIC {
            return reader.fail("this is not a snapshot of a partition");
        }
        let format = reader.u8()?;
        if !(1..=SNAPSHOT_FORMAT).contains(&format) {
            return reader.fail("a snapshot of an unknown format");
        }
        if reader.u8()? != 0 {
            return reader.fail("a snapshot with unknown flags");
        }
        let layout = if reader.flag()? { Layout::Hashed } else { Layout::Ordered };
        let span: Span = reader.span(Bytes::copy_from_slice)?;
        let (epoch, sealed) = if format == 1 { (1, 0) } else { (reader.u64()?, reader.u64()?) };
        let (applied, last_version, horizon) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let limits = SessionLimits::decode(reader)?;
        let sessions = Sessions::new(limits, horizon);
        let bounds = Bounds::at(layout, span, epoch, (sealed > 0).then_some(sealed));
        Ok(Self { bounds, applied, last_version, sessions })
    }
}

fn take_row(reader: &mut Reader<'_>, bounds: &Bounds, rows: &mut Vec<Packed>) -> Result<(), DecodeError> {
    if reader.u8()? != 0 {
        return reader.fail("a row with unknown flags");
    }
    let version = reader.u64()?;
    let key = reader.bytes()?;
    let value = reader.bytes()?;
    if rows.last().is_some_and(|before| before.key() >= key) {
        return reader.fail("rows out of order");
    }
    if !bounds.holds(key) {
        return reader.fail("a row that lies outside of the partition");
    }
    rows.push(Packed::new(key, value, version));
    Ok(())
}
