//! Changes of what a partition owns: splits and merges, as entries of its log.
//!
//! A split cuts the partition in two at one entry: every replica keeps the rows below the cut and makes the same child
//! of the rest. A merge takes two: the right partition is sealed, then the left one absorbs what the right one held.
//! Whoever asks for a change names the epoch that it was decided at and the term in which it is proposed; an entry that
//! does not fit changes nothing, so a repetition or a late one is harmless.
//!
//! Invariants:
//! * the epoch goes up by one with every change of the span, and with every fence;
//! * what the left and the right of a split own together is what was owned before, and they share nothing;
//! * a sealed partition owns nothing: it answers nobody, and what it holds does not change until it is unsealed;
//! * of what maps say of a seal the newest counts: a late order of an older one changes nothing;
//! * after a split both sides know every answer given before it; after a merge a write is judged new only if neither
//!   side can have applied it.

use super::bounds::Bounds;
use super::codec::{DecodeError, Reader, Sink, put_bytes, put_u64, put_varint};
use super::session::Sessions;
use super::snapshot::Restore;
use super::store::Store;
use crate::key::{Layout, NodeId, PartitionId, Replica, ReplicaId, SEED_INDEX, Span, position_of_token, token};
use crate::plant::{Bug, planted};
use bytes::Bytes;

/// First byte of an encoded change, which no encoded [`super::Command`] begins with.
const RESHAPE_FORMAT: u8 = 0x81;

/// Most members of a child.
const MEMBERS_MAX: usize = 16;

const SPLIT: u8 = 1;
const SEAL: u8 = 2;
const UNSEAL: u8 = 3;
const ABSORB: u8 = 4;
const FENCE: u8 = 5;

/// An entry that changes what the partition owns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reshape {
    /// The epoch of the bounds that it was decided at.
    pub epoch: u64,
    /// The term in which it is proposed: members cannot have changed in between.
    pub term: u64,
    /// What to do.
    pub change: Change,
}

/// What becomes of a partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The rows from `at` on become another partition.
    Split(Box<Split>),
    /// Nothing is owned from now on, so that the neighbour can take it.
    Seal {
        /// Version of the map that asks for it: an older map says nothing about the seal.
        map_version: u64,
    },
    /// The span is owned again: the neighbour will not take it.
    Unseal {
        /// Version of the map that says so: it says nothing about a seal that the same or a newer one asked for.
        map_version: u64,
    },
    /// The neighbour to the right, sealed, becomes part of this one.
    Absorb {
        /// Its state, see [`Store::export`].
        state: Bytes,
    },
    /// Nothing changes but the epoch: what was decided before is void.
    Fence,
}

/// Where to cut, and who serves what is cut off.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Split {
    /// First position of the child.
    pub at: Bytes,
    /// The child.
    pub child: PartitionId,
    /// Its members, on the nodes of this partition's members.
    pub members: Vec<Replica>,
    /// The member that leads it at first.
    pub leader: ReplicaId,
    /// Version of the map that asks for it: an older map does not know the child.
    pub map_version: u64,
}

/// A child, as its replicas begin.
#[derive(Debug)]
pub struct Birth {
    /// How it came about.
    pub split: Split,
    /// Its state.
    pub store: Store,
}

impl Reshape {
    /// Versioned bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = vec![RESHAPE_FORMAT];
        put_u64(&mut out, self.epoch);
        put_u64(&mut out, self.term);
        match &self.change {
            Change::Split(split) => {
                out.put(&[SPLIT]);
                put_bytes(&mut out, &split.at);
                put_u64(&mut out, split.child.0);
                put_u64(&mut out, split.leader.0);
                put_u64(&mut out, split.map_version);
                put_varint(&mut out, split.members.len() as u64);
                for member in &split.members {
                    put_u64(&mut out, member.id.0);
                    put_u64(&mut out, member.node.0);
                }
            }
            Change::Seal { map_version } => {
                out.put(&[SEAL]);
                put_u64(&mut out, *map_version);
            }
            Change::Unseal { map_version } => {
                out.put(&[UNSEAL]);
                put_u64(&mut out, *map_version);
            }
            Change::Absorb { state } => {
                out.put(&[ABSORB]);
                put_bytes(&mut out, state);
            }
            Change::Fence => out.put(&[FENCE]),
        }
        out.into()
    }

    /// The change behind these bytes; `None` when they are a [`super::Command`]'s.
    ///
    /// # Errors
    /// When they are damaged.
    pub fn decode(bytes: &Bytes) -> Result<Option<Self>, DecodeError> {
        if bytes.first() != Some(&RESHAPE_FORMAT) {
            return Ok(None);
        }
        let mut reader = Reader::new(&bytes[1..]);
        let (epoch, term) = (reader.u64()?, reader.u64()?);
        let change = match reader.u8()? {
            SPLIT => Change::Split(Box::new(Split::decode(&mut reader)?)),
            SEAL => Change::Seal { map_version: reader.u64()? },
            UNSEAL => Change::Unseal { map_version: reader.u64()? },
            ABSORB => Change::Absorb { state: bytes.slice_ref(reader.bytes()?) },
            FENCE => Change::Fence,
            _ => return reader.fail("a change of bounds of an unknown kind"),
        };
        reader.end()?;
        Ok(Some(Self { epoch, term, change }))
    }
}

impl Split {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = Bytes::copy_from_slice(reader.bytes()?);
        let (child, leader, map_version) = (PartitionId(reader.u64()?), ReplicaId(reader.u64()?), reader.u64()?);
        let count = reader.count()?;
        if count > MEMBERS_MAX {
            return reader.fail("a child of too many members");
        }
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            members.push(Replica { id: ReplicaId(reader.u64()?), node: NodeId(reader.u64()?) });
        }
        Ok(Self { at, child, members, leader, map_version })
    }
}

impl Store {
    /// Applies one change of what is owned, at `index` of the log and in `term`; a split gives a child. One that was
    /// decided at another epoch or proposed in another term changes nothing: [`Store::epoch`] tells.
    ///
    /// # Panics
    /// If `index` does not lie above every index applied before.
    pub fn reshape(&mut self, index: u64, term: u64, reshape: &Reshape) -> Option<Birth> {
        self.advance(index);
        if reshape.epoch != self.epoch() || reshape.term != term {
            return None;
        }
        let sealed = self.sealed();
        match &reshape.change {
            Change::Split(split) if sealed.is_none() => self.split(split),
            Change::Seal { map_version } if sealed.is_none_or(|at| at < *map_version) => {
                self.bounds_mut().seal(Some(*map_version));
                None
            }
            Change::Unseal { map_version } if sealed.is_some_and(|at| at < *map_version) => {
                self.bounds_mut().seal(None);
                None
            }
            Change::Absorb { state } if sealed.is_none() => {
                self.absorb(state);
                None
            }
            Change::Fence if sealed.is_none() => {
                let span = self.span().clone();
                self.bounds_mut().reshape(span);
                None
            }
            _ => None,
        }
    }

    fn split(&mut self, split: &Split) -> Option<Birth> {
        let whole = self.span().clone();
        let (left, right) = (
            Span::new(whole.start.clone(), Some(split.at.clone())),
            Span { start: split.at.clone(), end: whole.end.clone() },
        );
        if split.at <= whole.start || !whole.contains(&split.at) {
            return None;
        }
        let layout = self.layout();
        let table = self.table_mut().split_off(&split.at, layout);
        self.bounds_mut().reshape(left);
        let bounds = Bounds::at(layout, right, self.epoch(), None);
        let sessions = if planted(Bug::ChildWithoutSessions) {
            Sessions::new(*self.session_table().limits(), 0)
        } else {
            self.session_table().clone()
        };
        let store = Self::from_parts(bounds, table, sessions, SEED_INDEX, self.last_version());
        Some(Birth { split: split.clone(), store })
    }

    fn absorb(&mut self, state: &Bytes) {
        let mut restore = Restore::new();
        let right = restore.feed(state).and_then(|()| restore.finish());
        // The leader that proposed it has decoded it before.
        let right = right.expect("an absorbed state was whole when it was proposed");
        if self.span().end.as_ref() != Some(&right.span().start) || right.layout() != self.layout() {
            return;
        }
        let span = Span { start: self.span().start.clone(), end: right.span().end.clone() };
        let last_version = right.last_version();
        let (table, sessions) = right.into_rows();
        self.take_in(table, sessions, last_version);
        self.bounds_mut().reshape(span);
    }

    /// Makes it own `span` at `epoch` from `index` of a new log on, whatever it knew of splits and merges: what lies outside
    /// has another owner.
    pub fn confine(&mut self, index: u64, span: Span, epoch: u64) {
        self.advance(index);
        let layout = self.layout();
        let kept = self.table_mut().split_off(&span.start, layout);
        *self.table_mut() = kept;
        if let Some(end) = &span.end {
            self.table_mut().split_off(end, layout);
        }
        *self.bounds_mut() = Bounds::at(layout, span, epoch, None);
    }

    /// The whole state in one piece, as of now, for a partition that is sealed and small: what
    /// [`Change::Absorb`] takes.
    #[must_use]
    pub fn export(&self) -> Bytes {
        let mut copy = self.copy();
        copy.freeze();
        let mut state = Vec::new();
        while let Some(chunk) = copy.freeze_next(usize::MAX) {
            state.extend_from_slice(&chunk);
        }
        state.into()
    }

    /// A position that leaves about half of the bytes on either side; none if there is none: fewer than two rows, or one
    /// row that outweighs all others at the front.
    #[must_use]
    pub fn middle(&self) -> Option<Bytes> {
        let (start, half) = (self.span().start.as_ref(), self.bytes() / 2);
        let mut before = 0;
        let mut is_middle = |at: &[u8], bytes: u64| {
            let enough = before >= half && at > start;
            before += bytes;
            enough
        };
        let everything = Span::all();
        let mut rows = self.table().range(&everything).map(|row| (row.key(), row.size()));
        match self.layout() {
            Layout::Ordered => {
                rows.find(|(key, bytes)| is_middle(key, *bytes)).map(|(key, _)| Bytes::copy_from_slice(key))
            }
            Layout::Hashed => {
                let mut tokens: Vec<(u64, u64)> = rows.map(|(key, bytes)| (token(key), bytes)).collect();
                tokens.sort_unstable();
                let mut positions = tokens.into_iter().map(|(token, bytes)| (position_of_token(token), bytes));
                positions.find(|(at, bytes)| is_middle(at, *bytes)).map(|(at, _)| at)
            }
        }
    }
}

#[cfg(test)]
#[path = "tests/reshape.rs"]
mod tests;
