//! Page tokens: where a scan goes on, as bytes that mean nothing to anyone else.
//!
//! Pure. A token holds a position in key order and the rows still wanted; no partition, node or leader is named in it,
//! so it outlives splits, merges and moves. It is bound to the query it came from.
//!
//! Layout, version 1: version (1), flags (1: limit, end), query (8), rows left (8 if limited), start (4 + n),
//! end (4 + n if bounded), crc32 of all that (4); numbers big-endian.

use crate::{
    error::{Error, Reason},
    key::{KeyspaceId, Span, first_u64},
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use sha2::{Digest as _, Sha256};

const VERSION: u8 = 1;
const HAS_LIMIT: u8 = 1;
const HAS_END: u8 = 2;

/// What must be the same on every page of a scan.
#[derive(Clone, Debug)]
pub(crate) struct Query<'a> {
    /// The keyspace.
    pub(crate) keyspace: KeyspaceId,
    /// All keys of the scan.
    pub(crate) whole: &'a Span,
    /// Descending.
    pub(crate) reverse: bool,
    /// Rows wanted over all pages.
    pub(crate) limit: Option<u64>,
    /// Without values.
    pub(crate) keys_only: bool,
}

impl Query<'_> {
    fn hash(&self) -> u64 {
        let mut hash = Sha256::new();
        hash.update(self.keyspace.0.to_be_bytes());
        hash.update([u8::from(self.reverse), u8::from(self.keys_only), u8::from(self.limit.is_some())]);
        hash.update(self.limit.unwrap_or(0).to_be_bytes());
        hash.update((self.whole.start.len() as u64).to_be_bytes());
        hash.update(&self.whole.start);
        if let Some(end) = &self.whole.end {
            hash.update(end);
            hash.update([1]);
        }
        first_u64(&hash.finalize())
    }
}

/// Where a scan goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Position {
    /// Keys not returned yet.
    pub(crate) rest: Span,
    /// Rows still wanted.
    pub(crate) limit: Option<u64>,
}

/// The token of a position.
pub(crate) fn encode(query: &Query<'_>, position: &Position) -> Bytes {
    let mut token = BytesMut::with_capacity(64 + position.rest.start.len());
    token.put_u8(VERSION);
    let limited = if position.limit.is_some() { HAS_LIMIT } else { 0 };
    let ended = if position.rest.end.is_some() { HAS_END } else { 0 };
    token.put_u8(limited | ended);
    token.put_u64(query.hash());
    if let Some(limit) = position.limit {
        token.put_u64(limit);
    }
    put_key(&mut token, &position.rest.start);
    if let Some(end) = &position.rest.end {
        put_key(&mut token, end);
    }
    let sum = crc32fast::hash(&token);
    token.put_u32(sum);
    token.freeze()
}

fn put_key(token: &mut BytesMut, key: &Bytes) {
    token.put_u32(u32::try_from(key.len()).expect("keys are far below 4 GiB"));
    token.put_slice(key);
}

/// The position behind a token.
///
/// # Errors
/// `PAGE_TOKEN_INVALID` when it is damaged, of another version, or of another query.
pub(crate) fn decode(query: &Query<'_>, token: &Bytes) -> Result<Position, Error> {
    let position = parse(query, token).map_err(|what| {
        Error::new(Reason::PageTokenInvalid, format!("the page token {what}; begin the scan again without it"))
            .in_field("page_token")
    })?;
    if !query.whole.contains_span(&position.rest) {
        return Err(Error::new(Reason::PageTokenInvalid, "the page token lies outside of the range"));
    }
    Ok(position)
}

fn parse(query: &Query<'_>, token: &Bytes) -> Result<Position, &'static str> {
    let Some((body, sum)) = token.split_last_chunk::<4>() else { return Err("is too short") };
    if crc32fast::hash(body) != u32::from_be_bytes(*sum) {
        return Err("is damaged");
    }
    let mut rest = token.slice(..body.len());
    if rest.len() < 10 {
        return Err("is too short");
    }
    if rest.get_u8() != VERSION {
        return Err("comes from another version of Meridian");
    }
    let flags = rest.get_u8();
    if rest.get_u64() != query.hash() {
        return Err("belongs to another query");
    }
    let limit = match flags & HAS_LIMIT != 0 {
        true if rest.len() >= 8 => Some(rest.get_u64()),
        true => return Err("is too short"),
        false => None,
    };
    let start = get_key(&mut rest)?;
    let end = if flags & HAS_END != 0 { Some(get_key(&mut rest)?) } else { None };
    if rest.has_remaining() {
        return Err("is too long");
    }
    Ok(Position { rest: Span::new(start, end), limit })
}

fn get_key(rest: &mut Bytes) -> Result<Bytes, &'static str> {
    if rest.len() < 4 {
        return Err("is too short");
    }
    let len = rest.get_u32() as usize;
    if rest.len() < len {
        return Err("is too short");
    }
    Ok(rest.split_to(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(whole: &Span) -> Query<'_> {
        Query { keyspace: KeyspaceId(3), whole, reverse: false, limit: Some(9), keys_only: false }
    }

    proptest! {
        #[test]
        fn positions_round_trip_and_damage_is_seen(
            start in proptest::collection::vec(any::<u8>(), 0..9),
            end in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..9)),
            limit in proptest::option::of(any::<u64>()),
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let all = Span::all();
            let position = Position { rest: Span::new(start.into(), end.map(Into::into)), limit };
            let token = encode(&query(&all), &position);
            prop_assert_eq!(decode(&query(&all), &token).unwrap(), position);
            let mut damaged = token.to_vec();
            damaged[at.index(token.len())] ^= 1_u8 << bit;
            let error = decode(&query(&all), &damaged.into()).unwrap_err();
            prop_assert_eq!(error.reason, Reason::PageTokenInvalid);
            prop_assert!(decode(&query(&all), &token.slice(..at.index(token.len()))).is_err());
        }
    }

    #[test]
    fn a_token_is_bound_to_its_query() {
        let (all, part) = (Span::all(), Span::prefix(&Bytes::from_static(b"a")));
        let token = encode(&query(&all), &Position { rest: all.clone(), limit: None });
        let others = [
            Query { reverse: true, ..query(&all) },
            Query { keys_only: true, ..query(&all) },
            Query { limit: None, ..query(&all) },
            Query { limit: Some(8), ..query(&all) },
            Query { keyspace: KeyspaceId(4), ..query(&all) },
            query(&part),
        ];
        for other in others {
            assert_eq!(decode(&other, &token).unwrap_err().reason, Reason::PageTokenInvalid, "{other:?}");
        }
    }

    #[test]
    fn the_bytes_are_those_of_version_1() {
        let all = Span::all();
        let token = encode(&query(&all), &Position { rest: Span::new("b".into(), Some("c".into())), limit: Some(2) });
        let hex: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(&hex[..4], "0103");
        assert_eq!(&hex[20..56], "000000000000000200000001620000000163");
    }
}
