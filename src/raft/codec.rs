//! Bytes of log entries, votes, positions and memberships, on disk and between nodes.
//!
//! Written by hand: openraft's own serialization is no storage format. Integers are big-endian. A decoded command
//! shares the bytes it was decoded from.
//!
//! Invariants:
//! * what stands alone on disk begins with [`FORMAT`]; another first byte is refused by name;
//! * decoding never panics and never reads past the end, whatever the bytes.

use super::types::{Cmd, Entry, LogId, Membership, Payload, SnapshotMeta, StoredMembership, Vote, log_id};
use crate::key::NodeId;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

/// First byte of everything that this module writes to disk.
pub(super) const FORMAT: u8 = 1;

/// Members that one membership may name; more is damage.
const MEMBERS_MAX: usize = 1 << 10;

const BLANK: u8 = 0;
const NORMAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// Bytes that are not what they should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("damaged {what}: {why}")]
pub struct Damaged {
    /// What was being read.
    pub what: &'static str,
    /// What is wrong with it.
    pub why: &'static str,
}

impl From<Damaged> for io::Error {
    fn from(damaged: Damaged) -> Self {
        Self::new(io::ErrorKind::InvalidData, damaged)
    }
}

/// Reads fields off the front of some bytes.
#[derive(Debug)]
pub(super) struct Reader {
    bytes: Bytes,
    what: &'static str,
}

impl Reader {
    /// Reads `bytes`, which are a `what`.
    #[must_use]
    pub(super) fn new(what: &'static str, bytes: Bytes) -> Self {
        Self { bytes, what }
    }

    /// Reads `bytes` that begin with the format byte.
    ///
    /// # Errors
    /// When they begin with another one.
    pub(super) fn versioned(what: &'static str, bytes: Bytes) -> Result<Self, Damaged> {
        let mut reader = Self::new(what, bytes);
        if reader.u8()? == FORMAT { Ok(reader) } else { Err(reader.damaged("of an unknown format version")) }
    }

    /// The error that says `why`.
    #[must_use]
    pub(super) fn damaged(&self, why: &'static str) -> Damaged {
        Damaged { what: self.what, why }
    }

    fn need(&self, len: usize) -> Result<(), Damaged> {
        if self.bytes.len() < len { Err(self.damaged("too short")) } else { Ok(()) }
    }

    /// One byte.
    ///
    /// # Errors
    /// At the end, as for every field.
    pub(super) fn u8(&mut self) -> Result<u8, Damaged> {
        self.need(1)?;
        Ok(self.bytes.get_u8())
    }

    /// Two bytes.
    ///
    /// # Errors
    /// At the end.
    pub(super) fn u16(&mut self) -> Result<u16, Damaged> {
        self.need(2)?;
        Ok(self.bytes.get_u16())
    }

    /// Four bytes.
    ///
    /// # Errors
    /// At the end.
    pub(super) fn u32(&mut self) -> Result<u32, Damaged> {
        self.need(4)?;
        Ok(self.bytes.get_u32())
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// At the end.
    pub(super) fn u64(&mut self) -> Result<u64, Damaged> {
        self.need(8)?;
        Ok(self.bytes.get_u64())
    }

    /// A byte that is 0 or 1.
    ///
    /// # Errors
    /// At the end, and for other values.
    pub(super) fn bool(&mut self) -> Result<bool, Damaged> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.damaged("neither true nor false")),
        }
    }

    /// Bytes with their length in four bytes before them, shared with the input.
    ///
    /// # Errors
    /// At the end.
    pub(super) fn chunk(&mut self) -> Result<Bytes, Damaged> {
        let len = self.u32()? as usize;
        self.need(len)?;
        Ok(self.bytes.split_to(len))
    }

    /// Everything that is left.
    pub(super) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes)
    }

    /// Ends reading.
    ///
    /// # Errors
    /// When something is left.
    pub(super) fn end(&self) -> Result<(), Damaged> {
        if self.bytes.is_empty() { Ok(()) } else { Err(self.damaged("too long")) }
    }

    /// A position.
    ///
    /// # Errors
    /// At the end.
    pub(super) fn log_id(&mut self) -> Result<LogId, Damaged> {
        Ok(log_id(self.u64()?, self.u64()?, self.u64()?))
    }

    /// A position or none.
    ///
    /// # Errors
    /// At the end, and for a wrong mark.
    pub(super) fn log_id_opt(&mut self) -> Result<Option<LogId>, Damaged> {
        if self.bool()? { self.log_id().map(Some) } else { Ok(None) }
    }

    /// A vote.
    ///
    /// # Errors
    /// At the end, and for a wrong mark.
    pub(super) fn vote(&mut self) -> Result<Vote, Damaged> {
        let (term, replica) = (self.u64()?, self.u64()?);
        Ok(if self.bool()? { Vote::new_committed(term, replica) } else { Vote::new(term, replica) })
    }

    /// A membership.
    ///
    /// # Errors
    /// At the end, and for one that cannot be.
    pub(super) fn membership(&mut self) -> Result<Membership, Damaged> {
        let mut configs = Vec::new();
        for _ in 0..self.u8()? {
            let count = self.count()?;
            configs.push((0..count).map(|_| self.u64()).collect::<Result<BTreeSet<_>, _>>()?);
        }
        let count = self.count()?;
        let nodes: BTreeMap<u64, NodeId> =
            (0..count).map(|_| Ok((self.u64()?, NodeId(self.u64()?)))).collect::<Result<_, Damaged>>()?;
        if configs.is_empty() && nodes.is_empty() {
            return Ok(Membership::default());
        }
        Membership::new(configs, nodes).map_err(|_| self.damaged("a membership without voters or without their nodes"))
    }

    fn count(&mut self) -> Result<usize, Damaged> {
        let count = usize::from(self.u16()?);
        if count > MEMBERS_MAX { Err(self.damaged("too many members")) } else { Ok(count) }
    }

    /// An entry, without the format byte.
    ///
    /// # Errors
    /// When it is not one.
    pub(super) fn entry(&mut self) -> Result<Entry, Damaged> {
        let log_id = self.log_id()?;
        let payload = match self.u8()? {
            BLANK => Payload::Blank,
            NORMAL => Payload::Normal(Cmd(self.chunk()?)),
            MEMBERSHIP => Payload::Membership(self.membership()?),
            _ => return Err(self.damaged("of an unknown kind")),
        };
        Ok(Entry { log_id, payload })
    }
}

/// Appends a position.
pub(super) fn put_log_id(out: &mut BytesMut, log_id: &LogId) {
    out.put_u64(log_id.leader_id.term);
    out.put_u64(log_id.leader_id.node_id);
    out.put_u64(log_id.index);
}

/// Appends a position or none.
pub(super) fn put_log_id_opt(out: &mut BytesMut, log_id: Option<&LogId>) {
    out.put_u8(u8::from(log_id.is_some()));
    if let Some(log_id) = log_id {
        put_log_id(out, log_id);
    }
}

/// Appends a vote.
pub(super) fn put_vote(out: &mut BytesMut, vote: &Vote) {
    out.put_u64(vote.leader_id.term);
    out.put_u64(vote.leader_id.node_id);
    out.put_u8(u8::from(vote.committed));
}

/// Appends bytes with their length.
pub(super) fn put_chunk(out: &mut BytesMut, chunk: &[u8]) {
    out.put_u32(u32::try_from(chunk.len()).expect("commands and chunks are far below 4 GiB"));
    out.put_slice(chunk);
}

/// Appends a membership.
pub(super) fn put_membership(out: &mut BytesMut, membership: &Membership) {
    let configs = membership.get_joint_config();
    out.put_u8(u8::try_from(configs.len()).expect("a membership has at most two configurations"));
    for config in configs {
        out.put_u16(u16::try_from(config.len()).expect("members are few"));
        config.iter().for_each(|id| out.put_u64(*id));
    }
    out.put_u16(u16::try_from(membership.nodes().count()).expect("members are few"));
    for (id, node) in membership.nodes() {
        out.put_u64(*id);
        out.put_u64(node.0);
    }
}

/// Appends an entry, without the format byte.
pub(super) fn put_entry(out: &mut BytesMut, entry: &Entry) {
    put_log_id(out, &entry.log_id);
    match &entry.payload {
        Payload::Blank => out.put_u8(BLANK),
        Payload::Normal(command) => {
            out.put_u8(NORMAL);
            put_chunk(out, &command.0);
        }
        Payload::Membership(membership) => {
            out.put_u8(MEMBERSHIP);
            put_membership(out, membership);
        }
    }
}

/// About how many bytes an entry takes.
#[must_use]
pub(super) fn entry_len(entry: &Entry) -> usize {
    const FIXED: usize = 30;
    FIXED
        + match &entry.payload {
            Payload::Blank => 0,
            Payload::Normal(command) => command.0.len(),
            Payload::Membership(membership) => 64 + 32 * membership.nodes().count(),
        }
}

fn stored(len: usize, put: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(len);
    out.put_u8(FORMAT);
    put(&mut out);
    out.freeze()
}

fn recovered<T>(
    what: &'static str,
    bytes: &Bytes,
    read: impl FnOnce(&mut Reader) -> Result<T, Damaged>,
) -> Result<T, Damaged> {
    let mut reader = Reader::versioned(what, bytes.clone())?;
    let value = read(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// An entry as it is stored.
#[must_use]
pub(super) fn store_entry(entry: &Entry) -> Bytes {
    stored(1 + entry_len(entry), |out| put_entry(out, entry))
}

/// A stored entry.
///
/// # Errors
/// When it is damaged.
pub(super) fn recover_entry(bytes: &Bytes) -> Result<Entry, Damaged> {
    recovered("log entry", bytes, Reader::entry)
}

/// A vote as it is stored.
#[must_use]
pub(super) fn store_vote(vote: &Vote) -> Bytes {
    stored(18, |out| put_vote(out, vote))
}

/// A stored vote.
///
/// # Errors
/// When it is damaged.
pub(super) fn recover_vote(bytes: &Bytes) -> Result<Vote, Damaged> {
    recovered("vote", bytes, Reader::vote)
}

/// A position as it is stored.
#[must_use]
pub(super) fn store_log_id(log_id: &LogId) -> Bytes {
    stored(25, |out| put_log_id(out, log_id))
}

/// A stored position.
///
/// # Errors
/// When it is damaged.
pub(super) fn recover_log_id(bytes: &Bytes) -> Result<LogId, Damaged> {
    recovered("log position", bytes, Reader::log_id)
}

/// What stands beside a snapshot's bytes.
#[must_use]
pub(super) fn store_meta(meta: &SnapshotMeta) -> Bytes {
    stored(128, |out| {
        put_log_id_opt(out, meta.last_log_id.as_ref());
        put_log_id_opt(out, meta.last_membership.log_id().as_ref());
        put_membership(out, meta.last_membership.membership());
    })
}

/// What stands beside a snapshot's bytes, read back.
///
/// # Errors
/// When it is damaged.
pub(super) fn recover_meta(bytes: &Bytes) -> Result<SnapshotMeta, Damaged> {
    recovered("snapshot description", bytes, |reader| {
        let last_log_id = reader.log_id_opt()?;
        let membership_log_id = reader.log_id_opt()?;
        let last_membership = StoredMembership::new(membership_log_id, reader.membership()?);
        Ok(SnapshotMeta { last_log_id, last_membership })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn joint() -> Membership {
        let nodes: BTreeMap<u64, NodeId> = [(1, NodeId(10)), (2, NodeId(20)), (3, NodeId(30))].into();
        Membership::new(vec![[1, 2].into(), [2, 3].into()], nodes).unwrap()
    }

    fn entries() -> Vec<Entry> {
        [Payload::Blank, Payload::Normal(Cmd(Bytes::from_static(b"put"))), Payload::Membership(joint())]
            .into_iter()
            .map(|payload| Entry { log_id: log_id(2, 3, 4), payload })
            .collect()
    }

    #[test]
    fn stored_bytes_are_golden() {
        let position = "000000000000000200000000000000030000000000000004";
        let members = "02\
                       000200000000000000010000000000000002\
                       000200000000000000020000000000000003\
                       0003\
                       0000000000000001000000000000000a\
                       00000000000000020000000000000014\
                       0000000000000003000000000000001e";
        let stored: Vec<String> = entries().iter().map(|entry| hex(&store_entry(entry))).collect();
        assert_eq!(
            stored,
            [format!("01{position}00"), format!("01{position}0100000003707574"), format!("01{position}02{members}")]
        );
        assert_eq!(hex(&store_vote(&Vote::new_committed(7, 9))), "010000000000000007000000000000000901");
        assert_eq!(hex(&store_log_id(&log_id(2, 3, 4))), format!("01{position}"));
        let meta =
            SnapshotMeta { last_log_id: Some(log_id(2, 3, 4)), last_membership: StoredMembership::new(None, joint()) };
        assert_eq!(hex(&store_meta(&meta)), format!("0101{position}00{members}"));
        assert_eq!(recover_meta(&store_meta(&meta)).unwrap(), meta);
        assert_eq!(recover_meta(&store_meta(&SnapshotMeta::default())).unwrap(), SnapshotMeta::default());
    }

    #[test]
    fn what_is_stored_comes_back_and_shares_its_bytes() {
        for entry in entries() {
            let bytes = store_entry(&entry);
            let back = recover_entry(&bytes).unwrap();
            assert_eq!(back, entry);
            if let Payload::Normal(Cmd(command)) = back.payload {
                assert!(bytes.as_ptr_range().contains(&command.as_ptr()), "no copy");
            }
        }
        for vote in [Vote::new(1, 2), Vote::new_committed(3, 4)] {
            assert_eq!(recover_vote(&store_vote(&vote)).unwrap(), vote);
        }
    }

    #[test]
    fn damage_is_an_error_wherever_it_is() {
        for entry in entries() {
            let whole = store_entry(&entry);
            for len in 0..whole.len() {
                assert!(recover_entry(&whole.slice(..len)).is_err(), "cut to {len}");
            }
            let mut longer = whole.to_vec();
            longer.push(0);
            assert!(recover_entry(&longer.into()).is_err());
            let mut other = whole.to_vec();
            other[0] = 9;
            assert_eq!(recover_entry(&other.into()).unwrap_err().why, "of an unknown format version");
        }
    }
}
