//! What a request asks for, checked and in the words of the inside: spans instead of bounds, levels instead of numbers.
//!
//! Pure. Every check that needs nothing but the request and its keyspace is here, so that the library and the server
//! refuse the same things with the same words.

use super::scan::{Coverage, Edge};
use crate::{
    error::{Error, Reason},
    key::{KeyKind, KeyspaceId, PartitionId, Span, Tokens, integer_key, integer_of_key, printable, successor},
    placement::Map,
    proto::v1,
};
use bytes::Bytes;

/// Most items in a batch, and most keys in a batch read.
pub const BATCH_ITEMS_MAX: usize = 1_000;
/// Most bytes of keys and values in a batch that is not atomic; an atomic one is measured where it is proposed.
pub const BATCH_BYTES_MAX: usize = 2 << 20;
/// Most rows in one page.
pub const PAGE_ROWS_MAX: u32 = 10_000;
/// Rows in one page when the request does not say.
pub const PAGE_ROWS_DEFAULT: u32 = 1_000;
/// A page is cut at this many bytes of keys and values.
pub const PAGE_BYTES_MAX: usize = 1 << 20;
/// The keyspace of requests that name none.
pub const KEYSPACE_DEFAULT: &str = "default";

/// The keyspace that a request means.
pub(crate) fn keyspace_name(name: &str) -> &str {
    if name.is_empty() { KEYSPACE_DEFAULT } else { name }
}

/// Checks that a key can exist.
///
/// # Errors
/// `KEY_OUT_OF_DOMAIN`.
pub fn check_key(kind: KeyKind, key: &[u8]) -> Result<(), Error> {
    match kind {
        KeyKind::Bytes => Ok(()),
        KeyKind::Integer { max } => match integer_of_key(key) {
            Some(n) if n < max => Ok(()),
            _ => Err(out_of_domain(key, max, "a key of this keyspace is an integer in").in_field("key")),
        },
    }
}

fn out_of_domain(key: &[u8], max: u64, rule: &str) -> Error {
    let got = shown(KeyKind::Integer { max }, key);
    Error::new(Reason::KeyOutOfDomain, format!("{rule} [0, {max}), sent as 8 bytes big-endian; this one is {got}"))
        .with("max", max)
        .with("key", got)
}

/// A key for people: integers in decimal.
fn shown(kind: KeyKind, key: &[u8]) -> String {
    match (kind, integer_of_key(key)) {
        (KeyKind::Integer { .. }, Some(n)) => n.to_string(),
        _ => printable(key),
    }
}

/// The keys of a range, or of a prefix in its place.
///
/// # Errors
/// `RANGE_INVERTED`; `KEY_OUT_OF_DOMAIN` for a bound outside of an integer keyspace; `INVALID_FIELD` for both at once.
pub fn span_of_query(kind: KeyKind, range: Option<&v1::KeyRange>, prefix: &Bytes) -> Result<Span, Error> {
    if !prefix.is_empty() {
        if range.is_some_and(|range| range.lower.is_some() || range.upper.is_some()) {
            return Err(Error::field("prefix", "give either a range or a prefix, not both"));
        }
        if kind != KeyKind::Bytes {
            return Err(Error::field("prefix", "integer keys have no prefix; give a range"));
        }
        return Ok(Span::prefix(prefix));
    }
    let Some(range) = range else { return Ok(Span::all()) };
    check_order(kind, range)?;
    match kind {
        KeyKind::Bytes => Ok(span_of_range(range)),
        KeyKind::Integer { max } => integer_span(range, max),
    }
}

fn check_order(kind: KeyKind, range: &v1::KeyRange) -> Result<(), Error> {
    match (&range.lower, &range.upper) {
        (Some(lower), Some(upper)) if lower.key > upper.key => {
            let (low, high) = (shown(kind, &lower.key), shown(kind, &upper.key));
            Err(Error::new(
                Reason::RangeInverted,
                format!("the lower bound {low} lies above the upper bound {high}; for descending order ask for it"),
            )
            .in_field("range")
            .with("lower", low)
            .with("upper", high))
        }
        _ => Ok(()),
    }
}

/// Bounds of integers become 8-byte keys again, so that partitions and pages meet at whole integers.
fn integer_span(range: &v1::KeyRange, max: u64) -> Result<Span, Error> {
    let number = |bound: &v1::Bound, last: u64| {
        integer_of_key(&bound.key).filter(|n| *n <= last).ok_or_else(|| {
            out_of_domain(&bound.key, max, "a bound of a range in this keyspace lies in").in_field("range")
        })
    };
    let start = match &range.lower {
        None => 0,
        Some(bound) => number(bound, max)?.saturating_add(u64::from(!bound.inclusive)),
    };
    let end = match &range.upper {
        None => return Ok(Span::new(integer_key(start), None)),
        Some(bound) if bound.inclusive => number(bound, max - 1)? + 1,
        Some(bound) => number(bound, max)?,
    };
    Ok(Span::new(integer_key(start), Some(integer_key(end))))
}

/// The keys between two bounds, not checked; empty if they are inverted.
#[must_use]
pub fn span_of_range(range: &v1::KeyRange) -> Span {
    let start = match &range.lower {
        None => Bytes::new(),
        Some(bound) if bound.inclusive => bound.key.clone(),
        Some(bound) => successor(&bound.key),
    };
    let end = range.upper.as_ref().map(|bound| if bound.inclusive { successor(&bound.key) } else { bound.key.clone() });
    Span::new(start, end)
}

/// The same keys as bounds: inclusive below, exclusive above.
#[must_use]
pub fn range_of_span(span: &Span) -> v1::KeyRange {
    let bound = |key: &Bytes, inclusive| v1::Bound { key: key.clone(), inclusive };
    v1::KeyRange {
        lower: (!span.start.is_empty()).then(|| bound(&span.start, true)),
        upper: span.end.as_ref().map(|end| bound(end, false)),
    }
}

/// Tokens for the wire; `None` for all of them.
#[must_use]
pub fn tokens_to_pb(tokens: &Tokens) -> Option<v1::Tokens> {
    (*tokens != Tokens::ALL).then_some(v1::Tokens { first: tokens.first, last: tokens.last })
}

/// Tokens from the wire.
#[must_use]
pub fn tokens_of_pb(tokens: Option<&v1::Tokens>) -> Tokens {
    tokens.map_or(Tokens::ALL, |tokens| Tokens { first: tokens.first, last: tokens.last })
}

/// What an answer speaks for.
pub(crate) fn coverage_of_pb(covered: Option<&v1::Covered>) -> Result<Coverage, Error> {
    let Some(covered) = covered else {
        return Err(Error::new(Reason::Internal, "the answer of a partition does not say what it covers"));
    };
    Ok(Coverage {
        span: covered.range.as_ref().map_or_else(Span::all, span_of_range),
        tokens: tokens_of_pb(covered.tokens.as_ref()),
    })
}

/// The partition at an edge of a scan, with its bounds.
pub(crate) fn partition_at(map: &Map, keyspace: KeyspaceId, edge: &Edge) -> Option<(PartitionId, Span)> {
    let partition = match edge {
        Edge::At(position) => map.locate(keyspace, position),
        Edge::Below(None) => map.partitions_of(keyspace).next_back(),
        Edge::Below(Some(end)) => map.overlapping(keyspace, &Span::new(Bytes::new(), Some(end.clone()))).next_back(),
    }?;
    Some((partition.id, partition.span.clone()))
}

/// Which replicas may serve a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Serve {
    /// The leader only: writes, and reads on its lease.
    Leader,
    /// Any, the leader at the least cost: linearizable reads.
    LeaderFirst,
    /// Any, the nearest first.
    Anyone,
}

/// Checks read options and says who may serve them.
///
/// # Errors
/// `INVALID_FIELD` for values that are unknown or missing.
pub(crate) fn serve_of(options: Option<&v1::ReadOptions>) -> Result<Serve, Error> {
    let Some(options) = options else { return Ok(Serve::LeaderFirst) };
    if v1::OnUnavailable::try_from(options.on_unavailable).is_err() {
        return Err(Error::field("options.on_unavailable", "not a value of OnUnavailable; use FAIL or DEGRADE"));
    }
    match v1::Consistency::try_from(options.consistency) {
        Ok(v1::Consistency::Unspecified | v1::Consistency::Linearizable) => Ok(Serve::LeaderFirst),
        Ok(v1::Consistency::Lease) => Ok(Serve::Leader),
        Ok(v1::Consistency::Bounded) if options.max_staleness_ms == 0 => {
            Err(Error::field("options.max_staleness_ms", "a BOUNDED read needs max_staleness_ms, at least 1"))
        }
        Ok(v1::Consistency::Bounded | v1::Consistency::Session | v1::Consistency::Eventual) => Ok(Serve::Anyone),
        Err(_) => Err(Error::field("options.consistency", "not a value of Consistency; nothing was read")),
    }
}

/// Whether a read falls back to EVENTUAL.
pub(crate) fn degrades(options: Option<&v1::ReadOptions>) -> bool {
    options.is_some_and(|options| {
        options.on_unavailable() == v1::OnUnavailable::Degrade && options.consistency() != v1::Consistency::Eventual
    })
}

/// Whether an EVENTUAL "not found" is to be confirmed elsewhere.
pub(crate) fn confirms_absent(options: Option<&v1::ReadOptions>) -> bool {
    options.is_some_and(|options| {
        options.consistency() == v1::Consistency::Eventual && options.confirm_absent.unwrap_or(true)
    })
}

/// Checks the number of items of a batch.
///
/// # Errors
/// `BATCH_TOO_LARGE`, or `INVALID_FIELD` for none.
pub fn check_items(field: &'static str, items: usize) -> Result<(), Error> {
    match items {
        0 => Err(Error::field(field, "the batch is empty")),
        1..=BATCH_ITEMS_MAX => Ok(()),
        _ => Err(Error::new(
            Reason::BatchTooLarge,
            format!("the batch has {items} items, the limit is {BATCH_ITEMS_MAX}; send several"),
        )
        .in_field(field)),
    }
}

/// Checks the size of a batch that is not atomic.
///
/// # Errors
/// `BATCH_TOO_LARGE`.
pub(crate) fn check_batch_bytes(items: &[v1::BatchItem]) -> Result<(), Error> {
    use v1::batch_item::Op;
    let size = |item: &v1::BatchItem| match &item.op {
        Some(Op::Put(put)) => put.key.len() + put.value.len(),
        Some(Op::Delete(delete)) => delete.key.len(),
        Some(Op::CompareAndSet(cas)) => cas.key.len() + cas.value.as_ref().map_or(0, Bytes::len),
        Some(Op::Increment(increment)) => increment.key.len(),
        None => 0,
    };
    let bytes: usize = items.iter().map(size).sum();
    if bytes <= BATCH_BYTES_MAX {
        return Ok(());
    }
    let message = format!("the batch has {bytes} bytes, the limit is {BATCH_BYTES_MAX}; send several");
    Err(Error::new(Reason::BatchTooLarge, message).with("limit", BATCH_BYTES_MAX).in_field("items"))
}

/// Checks the fields of a scan besides its range and token.
///
/// # Errors
/// `INVALID_FIELD`.
pub fn check_scan(scan: &v1::ScanRequest) -> Result<(), Error> {
    if v1::Order::try_from(scan.order).is_err() {
        return Err(Error::field("order", "not a value of Order; use ASCENDING or DESCENDING"));
    }
    if v1::OnPartitionFailure::try_from(scan.on_partition_failure).is_err() {
        return Err(Error::field("on_partition_failure", "not a value of OnPartitionFailure; use FAIL or SKIP"));
    }
    if scan.limit == Some(0) {
        return Err(Error::field("limit", "a limit of 0 asks for nothing; leave it out to get every row"));
    }
    if scan.page_rows > PAGE_ROWS_MAX {
        return Err(Error::field(
            "page_rows",
            format!("{} rows in a page, the limit is {PAGE_ROWS_MAX}", scan.page_rows),
        ));
    }
    serve_of(scan.options.as_ref()).map(|_| ())
}

/// Checks what a single write asks for, besides its key.
///
/// # Errors
/// `INVALID_FIELD`.
pub fn check_write(op: &v1::request::Op) -> Result<(), Error> {
    use v1::request::Op;
    match op {
        Op::CompareAndSet(cas) if cas.condition.as_ref().is_none_or(|condition| condition.must.is_none()) => {
            Err(Error::field("condition", "compare-and-set needs a condition; to write in any case use put or delete"))
        }
        Op::Increment(increment) if increment.delta == 0 => {
            Err(Error::field("delta", "an increment by 0 changes nothing; to read the number use get"))
        }
        _ => Ok(()),
    }
}

/// The key of one item of a batch.
///
/// # Errors
/// `INVALID_FIELD` for an item without a write.
pub(crate) fn key_of_item(item: &v1::BatchItem) -> Result<&Bytes, Error> {
    use v1::batch_item::Op;
    match &item.op {
        Some(Op::Put(put)) => Ok(&put.key),
        Some(Op::Delete(delete)) => Ok(&delete.key),
        Some(Op::CompareAndSet(cas)) => Ok(&cas.key),
        Some(Op::Increment(increment)) => Ok(&increment.key),
        None => Err(Error::field("items", "an item of the batch names no write")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(key: &[u8], inclusive: bool) -> Option<v1::Bound> {
        Some(v1::Bound { key: Bytes::copy_from_slice(key), inclusive })
    }

    fn numbers(lower: Option<(u64, bool)>, upper: Option<(u64, bool)>) -> v1::KeyRange {
        let of = |b: Option<(u64, bool)>| b.map(|(n, inclusive)| v1::Bound { key: integer_key(n), inclusive });
        v1::KeyRange { lower: of(lower), upper: of(upper) }
    }

    #[test]
    fn bounds_mean_what_they_say() {
        for (low_in, high_in, want) in
            [(true, true, "abc"), (true, false, "ab"), (false, true, "bc"), (false, false, "b")]
        {
            let range = v1::KeyRange { lower: bound(b"a", low_in), upper: bound(b"c", high_in) };
            let span = span_of_query(KeyKind::Bytes, Some(&range), &Bytes::new()).unwrap();
            let got: String =
                ["", "a", "b", "c", "d"].into_iter().filter(|key| span.contains(key.as_bytes())).collect();
            assert_eq!(got, want);
            assert_eq!(span_of_range(&range_of_span(&span)), span);
        }
    }

    #[test]
    fn inverted_bounds_are_an_error_and_equal_ones_are_empty() {
        let inverted = v1::KeyRange { lower: bound(b"b", true), upper: bound(b"a", true) };
        let error = span_of_query(KeyKind::Bytes, Some(&inverted), &Bytes::new()).unwrap_err();
        assert_eq!(error.reason, Reason::RangeInverted);
        let integers = numbers(Some((20, true)), Some((3, false)));
        let error = span_of_query(KeyKind::Integer { max: 99 }, Some(&integers), &Bytes::new()).unwrap_err();
        assert!(error.message.contains("bound 20 lies above the upper bound 3;"), "{error}");
        let equal = v1::KeyRange { lower: bound(b"a", true), upper: bound(b"a", false) };
        assert!(span_of_query(KeyKind::Bytes, Some(&equal), &Bytes::new()).unwrap().is_empty());
        let one = v1::KeyRange { lower: bound(b"a", true), upper: bound(b"a", true) };
        assert!(span_of_query(KeyKind::Bytes, Some(&one), &Bytes::new()).unwrap().contains(b"a"));
    }

    #[test]
    fn integer_ranges_stay_inside_the_domain() {
        let kind = KeyKind::Integer { max: 10 };
        let span = |range| span_of_query(kind, Some(&range), &Bytes::new());
        assert_eq!(span(numbers(Some((2, true)), Some((10, false)))).unwrap().end, Some(integer_key(10)));
        assert_eq!(span(numbers(Some((2, false)), Some((9, true)))).unwrap().start, integer_key(3));
        assert!(span(numbers(Some((10, true)), Some((10, false)))).unwrap().is_empty());
        for wrong in
            [numbers(None, Some((10, true))), numbers(Some((11, true)), None), numbers(None, Some((11, false)))]
        {
            assert_eq!(span(wrong).unwrap_err().reason, Reason::KeyOutOfDomain);
        }
        let short = v1::KeyRange { lower: bound(b"abc", true), upper: None };
        assert_eq!(span(short).unwrap_err().reason, Reason::KeyOutOfDomain);
        assert!(check_key(kind, &integer_key(9)).is_ok());
        assert_eq!(check_key(kind, &integer_key(10)).unwrap_err().reason, Reason::KeyOutOfDomain);
        let top = KeyKind::Integer { max: u64::MAX };
        let all = numbers(Some((u64::MAX, false)), Some((u64::MAX, false)));
        assert!(span_of_query(top, Some(&all), &Bytes::new()).unwrap().is_empty());
    }

    #[test]
    fn a_weaker_read_is_never_assumed() {
        let options = |consistency| v1::ReadOptions { consistency, ..Default::default() };
        assert_eq!(serve_of(None).unwrap(), Serve::LeaderFirst);
        assert_eq!(serve_of(Some(&options(0))).unwrap(), Serve::LeaderFirst);
        assert!(serve_of(Some(&options(77))).is_err());
        assert!(serve_of(Some(&options(v1::Consistency::Bounded as i32))).is_err());
    }
}
