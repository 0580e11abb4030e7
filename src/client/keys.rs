//! Keys, ranges and rows as users write them.

use super::Error;
use crate::{error::Reason, key::integer_key, key::integer_of_key, proto::v1};
use bytes::Bytes;
use std::{
    fmt,
    ops::{Bound, Range, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive},
};

mod sealed {
    pub trait Sealed {}
}

/// What kind of keys a keyspace handle takes: [`RawKeys`] or [`IntegerKeys`].
pub trait KeyType: sealed::Sealed + Copy + Ord + fmt::Debug + Send + Sync + Unpin + 'static {
    /// A key as it comes back.
    type Key: Clone + Ord + fmt::Debug + Send + Sync + Unpin + 'static;

    /// The key behind its bytes.
    ///
    /// # Errors
    /// When the keyspace turns out to hold keys of another kind.
    fn decode(key: Bytes) -> Result<Self::Key, Error>;
}

/// Keys of any bytes, strings among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RawKeys {}

/// Keys in `[0, M)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IntegerKeys {}

impl sealed::Sealed for RawKeys {}
impl sealed::Sealed for IntegerKeys {}

impl KeyType for RawKeys {
    type Key = Bytes;

    fn decode(key: Bytes) -> Result<Bytes, Error> {
        Ok(key)
    }
}

impl KeyType for IntegerKeys {
    type Key = u64;

    fn decode(key: Bytes) -> Result<u64, Error> {
        integer_of_key(&key).ok_or_else(|| {
            let what = "this keyspace does not hold integers; open it with Client::keyspace";
            crate::error::Error::new(Reason::KeyOutOfDomain, what).into()
        })
    }
}

/// Anything that is bytes: a key of [`RawKeys`], or a value.
pub trait IntoBytes {
    /// The bytes.
    fn into_bytes(self) -> Bytes;
}

macro_rules! into_bytes {
    ($($type:ty, $this:ident => $bytes:expr;)*) => {
        $(impl IntoBytes for $type {
            fn into_bytes(self) -> Bytes {
                let $this = self;
                $bytes
            }
        })*
    };
}

into_bytes! {
    &str, this => Bytes::copy_from_slice(this.as_bytes());
    &String, this => Bytes::copy_from_slice(this.as_bytes());
    &[u8], this => Bytes::copy_from_slice(this);
    String, this => this.into();
    Vec<u8>, this => this.into();
    Bytes, this => this;
    &Bytes, this => this.clone();
}

impl<const N: usize> IntoBytes for &[u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self)
    }
}

impl<const N: usize> IntoBytes for [u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self)
    }
}

/// Anything that is a key of `K`.
pub trait IntoKey<K: KeyType> {
    /// The key as stored.
    fn into_key(self) -> Bytes;
}

impl<T: IntoBytes> IntoKey<RawKeys> for T {
    fn into_key(self) -> Bytes {
        self.into_bytes()
    }
}

impl IntoKey<IntegerKeys> for u64 {
    fn into_key(self) -> Bytes {
        integer_key(self)
    }
}

/// Anything that is a range of keys of `K`: `a..b`, `a..=b`, `a..`, `..b`, `..=b`, `..`, or a pair of [`Bound`]s.
pub trait IntoRange<K: KeyType> {
    /// The range as sent.
    fn into_range(self) -> v1::KeyRange;
}

fn range(lower: Option<(Bytes, bool)>, upper: Option<(Bytes, bool)>) -> v1::KeyRange {
    let bound = |(key, inclusive)| v1::Bound { key, inclusive };
    v1::KeyRange { lower: lower.map(bound), upper: upper.map(bound) }
}

impl<K: KeyType> IntoRange<K> for RangeFull {
    fn into_range(self) -> v1::KeyRange {
        range(None, None)
    }
}

impl<K: KeyType, Q: IntoKey<K>> IntoRange<K> for Range<Q> {
    fn into_range(self) -> v1::KeyRange {
        range(Some((self.start.into_key(), true)), Some((self.end.into_key(), false)))
    }
}

impl<K: KeyType, Q: IntoKey<K>> IntoRange<K> for RangeInclusive<Q> {
    fn into_range(self) -> v1::KeyRange {
        let (start, end) = self.into_inner();
        range(Some((start.into_key(), true)), Some((end.into_key(), true)))
    }
}

impl<K: KeyType, Q: IntoKey<K>> IntoRange<K> for RangeFrom<Q> {
    fn into_range(self) -> v1::KeyRange {
        range(Some((self.start.into_key(), true)), None)
    }
}

impl<K: KeyType, Q: IntoKey<K>> IntoRange<K> for RangeTo<Q> {
    fn into_range(self) -> v1::KeyRange {
        range(None, Some((self.end.into_key(), false)))
    }
}

impl<K: KeyType, Q: IntoKey<K>> IntoRange<K> for RangeToInclusive<Q> {
    fn into_range(self) -> v1::KeyRange {
        range(None, Some((self.end.into_key(), true)))
    }
}

impl<K: KeyType, Q: IntoKey<K>> IntoRange<K> for (Bound<Q>, Bound<Q>) {
    fn into_range(self) -> v1::KeyRange {
        let end = |bound| match bound {
            Bound::Included(key) => Some((IntoKey::into_key(key), true)),
            Bound::Excluded(key) => Some((IntoKey::into_key(key), false)),
            Bound::Unbounded => None,
        };
        range(end(self.0), end(self.1))
    }
}

/// One row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row<K: KeyType = RawKeys> {
    /// Its key.
    pub key: K::Key,
    /// Its value; empty when only keys were asked for.
    pub value: Bytes,
    /// Version of its last write: a hybrid logical time that only goes up.
    pub version: u64,
}

impl<K: KeyType> Row<K> {
    pub(super) fn of_pb(row: v1::Row) -> Result<Self, Error> {
        Ok(Self { key: K::decode(row.key)?, value: row.value, version: row.version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(range: impl IntoRange<RawKeys>) -> (Option<(Bytes, bool)>, Option<(Bytes, bool)>) {
        let v1::KeyRange { lower, upper } = range.into_range();
        (lower.map(|b| (b.key, b.inclusive)), upper.map(|b| (b.key, b.inclusive)))
    }

    #[test]
    fn ranges_are_written_as_in_rust() {
        let key = |text: &'static str, inclusive| Some((Bytes::from(text), inclusive));
        assert_eq!(raw("a".."b"), (key("a", true), key("b", false)));
        assert_eq!(raw("a"..="b"), (key("a", true), key("b", true)));
        assert_eq!(raw("a".to_owned()..), (key("a", true), None));
        assert_eq!(raw(..b"b"), (None, key("b", false)));
        assert_eq!(raw(..), (None, None));
        assert_eq!(raw((Bound::Excluded("a"), Bound::Unbounded)), (key("a", false), None));
    }

    #[test]
    fn integers_keep_their_order_as_bytes() {
        let range = IntoRange::<IntegerKeys>::into_range(2..300);
        assert!(range.lower.unwrap().key < range.upper.unwrap().key);
        assert!(IntegerKeys::decode("no".into()).is_err());
    }
}
