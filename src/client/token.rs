//! Session tokens: what a client has seen, so that a later read at `SESSION` sees at least that.
//!
//! Pure. A token is a row of records of [`RECORD_BYTES`]: format (1), partition (8), log index (8), version (8), numbers
//! big-endian. Two tokens are joined by putting one behind the other, in any language; [`SessionToken::join`] also
//! drops what is implied. The record of partition 0, the placement driver's own, has the version of the map as its
//! index.

use crate::{
    error::Error,
    key::{DRIVER, PartitionId, Version},
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use std::collections::BTreeMap;

/// Bytes of one record.
pub const RECORD_BYTES: usize = 25;
/// Most records in a token.
pub const RECORDS_MAX: usize = 16_384;
const FORMAT: u8 = 1;

/// What was seen of one partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Log index applied by the replica that answered.
    pub index: u64,
    /// Highest version in it at that index.
    pub version: Version,
}

/// What was seen, by partition.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SessionToken {
    seen: BTreeMap<PartitionId, Seen>,
}

impl SessionToken {
    /// The token of one answer.
    #[must_use]
    pub fn of(partition: PartitionId, seen: Seen) -> Self {
        Self { seen: BTreeMap::from([(partition, seen)]) }
    }

    /// The token of one who has been served by this version of the map.
    #[must_use]
    pub fn of_map(version: u64) -> Self {
        Self::of(DRIVER, Seen { index: version, version: 0 })
    }

    /// The latest version of the map that was seen; 0 if none was needed.
    #[must_use]
    pub fn map_version(&self) -> u64 {
        self.seen(DRIVER).map_or(0, |seen| seen.index)
    }

    /// Reads a token, or several put behind each other. Empty: nothing seen yet.
    ///
    /// # Errors
    /// `INVALID_FIELD` when it is damaged or too long.
    pub fn decode(mut bytes: Bytes) -> Result<Self, Error> {
        if !bytes.len().is_multiple_of(RECORD_BYTES) || bytes.len() > RECORD_BYTES * RECORDS_MAX {
            return Err(Error::field("session_token", "the session token is damaged or too long"));
        }
        let mut token = Self::default();
        while bytes.has_remaining() {
            if bytes.get_u8() != FORMAT {
                return Err(Error::field("session_token", "the session token comes from another version of Meridian"));
            }
            let partition = PartitionId(bytes.get_u64());
            token.see(partition, Seen { index: bytes.get_u64(), version: bytes.get_u64() });
        }
        Ok(token)
    }

    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.seen.len() * RECORD_BYTES);
        for (partition, seen) in &self.seen {
            bytes.put_u8(FORMAT);
            bytes.put_u64(partition.0);
            bytes.put_u64(seen.index);
            bytes.put_u64(seen.version);
        }
        bytes.freeze()
    }

    /// Adds what another token has seen. Nothing is ever forgotten, for that would break the promise silently.
    pub fn join(&mut self, other: &Self) {
        for (partition, seen) in &other.seen {
            self.see(*partition, *seen);
        }
    }

    /// What was seen of a partition.
    #[must_use]
    pub fn seen(&self, partition: PartitionId) -> Option<Seen> {
        self.seen.get(&partition).copied()
    }

    /// Everything seen, by partition.
    pub fn iter(&self) -> impl Iterator<Item = (PartitionId, Seen)> {
        self.seen.iter().map(|(partition, seen)| (*partition, *seen))
    }

    fn see(&mut self, partition: PartitionId, seen: Seen) {
        let entry = self.seen.entry(partition).or_default();
        entry.index = entry.index.max(seen.index);
        entry.version = entry.version.max(seen.version);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_is_the_same_as_putting_one_behind_the_other() {
        let a = SessionToken::of(PartitionId(1), Seen { index: 5, version: 50 });
        let mut b = SessionToken::of(PartitionId(1), Seen { index: 9, version: 40 });
        b.join(&SessionToken::of(PartitionId(2), Seen { index: 1, version: 1 }));
        let behind = SessionToken::decode([a.encode(), b.encode()].concat().into()).unwrap();
        let mut joined = a;
        joined.join(&b);
        assert_eq!(joined, behind);
        assert_eq!(joined.seen(PartitionId(1)), Some(Seen { index: 9, version: 50 }));
        assert_eq!(SessionToken::decode(joined.encode()).unwrap(), joined);
    }

    #[test]
    fn damage_is_refused() {
        let token = SessionToken::of(PartitionId(1), Seen::default()).encode();
        assert!(SessionToken::decode(token.slice(1..)).is_err());
        let mut other = token.to_vec();
        other[0] = 2;
        assert!(SessionToken::decode(other.into()).is_err());
        assert!(SessionToken::decode(vec![FORMAT; RECORD_BYTES * (RECORDS_MAX + 1)].into()).is_err());
    }

    #[test]
    fn the_bytes_are_those_of_format_1() {
        let token = SessionToken::of(PartitionId(2), Seen { index: 3, version: 4 }).encode();
        assert_eq!(
            token.as_ref(),
            [[1].as_slice(), &2u64.to_be_bytes(), &3u64.to_be_bytes(), &4u64.to_be_bytes()].concat()
        );
    }
}
