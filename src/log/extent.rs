//! Which indexes of a replica's log are live, and which records may follow: the rules that every engine shares.
//!
//! Pure. Invariant: the live indexes are one interval without a hole, which begins right after the purge point if there
//! is one. A record that would break this is refused and changes nothing.

use super::Record;
use std::{io, ops::Range};

/// The shape of one replica's log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Extent {
    /// Indexes of the live entries.
    pub(super) live: Range<u64>,
    /// Last index purged.
    pub(super) purged: Option<u64>,
    /// The replica was destroyed.
    pub(super) tombstone: bool,
}

impl Extent {
    /// Takes a record in. Returns the indexes of the entries that it removes.
    ///
    /// # Errors
    /// When the record cannot follow: a mistake of the caller, not of the disk.
    pub(super) fn admit(&mut self, record: &Record) -> io::Result<Range<u64>> {
        const NONE: Range<u64> = 0..0;
        if self.tombstone && *record != Record::Tombstone {
            return Err(refused("the replica was destroyed; its id is never used again"));
        }
        match record {
            Record::Append { first, entries } => self.append(*first, entries.len() as u64).map(|()| NONE),
            Record::Truncate { from } => {
                let from = (*from).max(self.live.start);
                let removed = from..self.live.end.max(from);
                self.live.end = self.live.end.min(from);
                Ok(removed)
            }
            Record::Purge { upto, .. } => self.purge(*upto),
            Record::Vote(_) | Record::Committed(_) => Ok(NONE),
            Record::Tombstone => {
                let before = std::mem::replace(self, Self { tombstone: true, ..Self::default() });
                Ok(before.live)
            }
        }
    }

    fn append(&mut self, first: u64, count: u64) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        let next = match self.purged {
            Some(purged) if self.live.is_empty() => Some(purged + 1),
            None if self.live.is_empty() => None,
            _ => Some(self.live.end),
        };
        if let Some(next) = next.filter(|next| *next != first) {
            return Err(refused(format!("entries at {first} cannot follow a log that goes on at {next}")));
        }
        let end = first.checked_add(count).ok_or_else(|| refused("log index overflow"))?;
        self.live = if self.live.is_empty() { first..end } else { self.live.start..end };
        Ok(())
    }

    fn purge(&mut self, upto: u64) -> io::Result<Range<u64>> {
        if let Some(purged) = self.purged.filter(|purged| upto < *purged) {
            return Err(refused(format!("purge up to {upto} comes after purge up to {purged}")));
        }
        let start = upto.checked_add(1).ok_or_else(|| refused("log index overflow"))?;
        if self.live.is_empty() {
            self.live = start..start;
        }
        if start < self.live.start {
            return Err(refused(format!("purge up to {upto} leaves a hole before {}", self.live.start)));
        }
        let removed = self.live.start..self.live.end.min(start);
        self.purged = Some(upto);
        self.live = start..self.live.end.max(start);
        Ok(removed)
    }
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.into())
}
