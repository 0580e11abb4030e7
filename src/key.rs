//! Ids, keys and intervals: the words that every other module is written in.
//!
//! Pure. Inside Meridian every interval is half-open over raw bytes ([`Span`]); inclusive and exclusive bounds of
//! the API are turned into spans at the border, once. A partition's bounds are a span of *positions*: a position is
//! the key itself in an ordered keyspace and its [`token`], 8 bytes big-endian, in a hashed one.
//!
//! Invariants:
//! * ids are handed out by the placement driver, start at 1 and are never reused; 0 means "none" on the wire;
//! * a span never has `end <= start`, except the empty span.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
        pub struct $name(pub u64);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(
    /// A node: one server process with a persistent identity.
    NodeId, "n"
);
id!(
    /// A partition, and the Raft group that serves it. [`DRIVER`] is the placement driver's.
    PartitionId, "p"
);
id!(
    /// One incarnation of a group's member on a node; never reused, not even when a partition returns to a node.
    ReplicaId, "r"
);
id!(
    /// A keyspace.
    KeyspaceId, "k"
);

/// The placement driver's group.
pub const DRIVER: PartitionId = PartitionId(0);

/// Index of the log at which a group that begins with a state begins: that of a partition split off another.
pub const SEED_INDEX: u64 = 1;

/// Hybrid logical time of a row's last write: milliseconds since 1970 in the upper 44 bits, a counter in the lower 20.
pub type Version = u64;

/// Bits of a [`Version`] below its milliseconds.
pub const VERSION_COUNTER_BITS: u32 = 20;

/// The smallest version whose milliseconds are `wall_ms`.
#[must_use]
pub const fn version_at(wall_ms: u64) -> Version {
    wall_ms << VERSION_COUNTER_BITS
}

/// Version of a partition's shape: goes up with every split, merge and member change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Epoch {
    /// Raised when the bounds change.
    pub bounds: u64,
    /// Raised when the members change.
    pub members: u64,
}

/// One member of a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize, serde::Deserialize)]
pub struct Replica {
    /// Incarnation.
    pub id: ReplicaId,
    /// Node it lives on, for its whole life.
    pub node: NodeId,
}

/// How a keyspace is cut into partitions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub enum Layout {
    /// Partitions are intervals of keys: a range touches few of them.
    Ordered,
    /// Partitions are intervals of tokens: load is even for any key pattern; a range asks all of them.
    Hashed,
}

/// Kind of a keyspace's keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub enum KeyKind {
    /// Any bytes, also none.
    Bytes,
    /// Integers in `[0, max)`, stored as 8 bytes big-endian.
    Integer {
        /// The first integer that is not a key.
        max: u64,
    },
}

/// A half-open interval `[start, end)` over raw bytes; `end: None` has no upper bound.
#[derive(Clone, PartialEq, Eq, Debug, Hash, Default)]
pub struct Span {
    /// First key or position.
    pub start: Bytes,
    /// First key or position after the interval.
    pub end: Option<Bytes>,
}

impl Span {
    /// Every key.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// `[start, end)`; the empty span if `end <= start`.
    #[must_use]
    pub fn new(start: Bytes, end: Option<Bytes>) -> Self {
        match end {
            Some(end) if end <= start => Self { end: Some(start.clone()), start },
            end => Self { start, end },
        }
    }

    /// Every key that begins with `prefix`.
    #[must_use]
    pub fn prefix(prefix: &Bytes) -> Self {
        Self { start: prefix.clone(), end: prefix_end(prefix) }
    }

    /// True when no key lies inside.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    /// Whether `key` lies inside.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_ref() && self.end.as_ref().is_none_or(|end| key < end.as_ref())
    }

    /// Whether every key of `other` lies inside.
    #[must_use]
    pub fn contains_span(&self, other: &Self) -> bool {
        other.is_empty() || (self.start <= other.start && end_le(other.end.as_ref(), self.end.as_ref()))
    }

    /// The keys that lie in both; empty if none.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        let start = (&self.start).max(&other.start).clone();
        let end = if end_le(self.end.as_ref(), other.end.as_ref()) { &self.end } else { &other.end };
        Self::new(start, end.clone())
    }

    /// Whether any key lies in both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        !self.intersect(other).is_empty()
    }

    /// Bounds for `BTreeMap::range`.
    #[must_use]
    pub fn bounds(&self) -> (std::ops::Bound<&[u8]>, std::ops::Bound<&[u8]>) {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        (Included(self.start.as_ref()), self.end.as_ref().map_or(Unbounded, |end| Excluded(end.as_ref())))
    }
}

/// `a <= b` for upper ends, where `None` is above everything.
fn end_le(a: Option<&Bytes>, b: Option<&Bytes>) -> bool {
    match (a, b) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(a), Some(b)) => a <= b,
    }
}

/// The smallest key above `key`.
#[must_use]
pub fn successor(key: &[u8]) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}

/// The smallest key above every key that begins with `prefix`; `None` if there is none.
#[must_use]
pub fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != 0xFF)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}

/// An interval of tokens, both ends inclusive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Tokens {
    /// Smallest token.
    pub first: u64,
    /// Largest token.
    pub last: u64,
}

impl Tokens {
    /// Every token.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// The tokens of a hashed partition's span of positions. `None` when it is empty.
    #[must_use]
    pub fn of_span(span: &Span) -> Option<Self> {
        let first = token_of_position(&span.start);
        let last = match &span.end {
            None => u64::MAX,
            Some(end) => token_of_position(end).checked_sub(1)?,
        };
        (first <= last).then_some(Self { first, last })
    }

    /// Whether `token` lies inside.
    #[must_use]
    pub const fn contains(&self, token: u64) -> bool {
        self.first <= token && token <= self.last
    }

    /// The tokens in both.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }
}

/// Token of a key: the first 8 bytes of its SHA-256, big-endian.
#[must_use]
pub fn token(key: &[u8]) -> u64 {
    first_u64(&Sha256::digest(key))
}

/// The first 8 bytes, big-endian.
#[must_use]
pub fn first_u64(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    u64::from_be_bytes(first)
}

/// Position of a key in its keyspace's order.
#[must_use]
pub fn position(layout: Layout, key: &Bytes) -> Bytes {
    match layout {
        Layout::Ordered => key.clone(),
        Layout::Hashed => position_of_token(token(key)),
    }
}

/// A token as a position.
#[must_use]
pub fn position_of_token(token: u64) -> Bytes {
    Bytes::copy_from_slice(&token.to_be_bytes())
}

/// A position as a token; missing bytes count as 0.
fn token_of_position(position: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let n = position.len().min(8);
    bytes[..n].copy_from_slice(&position[..n]);
    u64::from_be_bytes(bytes)
}

/// The integer key `n` as stored.
#[must_use]
pub fn integer_key(n: u64) -> Bytes {
    Bytes::copy_from_slice(&n.to_be_bytes())
}

/// The integer behind a stored key of 8 bytes.
#[must_use]
pub fn integer_of_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

/// A key for people: itself if printable, else hexadecimal; cut after 64 bytes.
#[must_use]
pub fn printable(key: &[u8]) -> String {
    let (shown, more) = if key.len() > 64 { (&key[..64], "…") } else { (key, "") };
    match std::str::from_utf8(shown) {
        Ok(text) if !text.chars().any(char::is_control) => format!("\"{text}\"{more}"),
        _ => {
            let hex: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("0x{hex}{more}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: &'static str, end: Option<&'static str>) -> Span {
        Span::new(start.into(), end.map(Into::into))
    }

    #[test]
    fn spans_intersect_like_sets_of_keys() {
        let keys: Vec<Bytes> = ["", "a", "b", "ba", "c", "zz"].map(Bytes::from).to_vec();
        let spans = [span("", None), span("a", Some("c")), span("b", Some("b")), span("ba", None), span("", Some("b"))];
        for x in &spans {
            for y in &spans {
                let both = x.intersect(y);
                for key in &keys {
                    assert_eq!(both.contains(key), x.contains(key) && y.contains(key), "{x:?} {y:?} {key:?}");
                }
                assert!(x.contains_span(&both) && y.contains_span(&both));
            }
        }
    }

    #[test]
    fn prefix_covers_exactly_the_keys_that_begin_with_it() {
        let a = Span::prefix(&Bytes::from_static(&[1, 0xFF]));
        assert!(a.contains(&[1, 0xFF]) && a.contains(&[1, 0xFF, 0xFF, 0xFF]));
        assert!(!a.contains(&[2]) && !a.contains(&[1, 0xFE, 0xFF]));
        assert_eq!(Span::prefix(&Bytes::from_static(&[0xFF, 0xFF])).end, None);
        assert_eq!(Span::prefix(&Bytes::new()), Span::all());
    }

    #[test]
    fn tokens_of_spans_tile_without_gap_or_overlap() {
        let middle = position_of_token(1 << 63);
        let low = Tokens::of_span(&Span::new(Bytes::new(), Some(middle.clone())));
        let high = Tokens::of_span(&Span::new(middle, None));
        assert_eq!(low, Some(Tokens { first: 0, last: (1 << 63) - 1 }));
        assert_eq!(high, Some(Tokens { first: 1 << 63, last: u64::MAX }));
    }

    #[test]
    fn token_is_the_start_of_sha256() {
        assert_eq!(token(b"abc"), 0xba78_16bf_8f01_cfea);
    }

    #[test]
    fn successor_is_the_next_key() {
        assert!(successor(b"a").as_ref() > b"a".as_ref());
        assert!(successor(b"a").as_ref() <= b"a\0".as_ref());
    }
}
