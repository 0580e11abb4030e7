//! Tests of the whole module through its public door: a log that applies commands, a plain map as the model.

mod command;
mod model;
mod scan;
mod session;
mod snapshot;
mod store;

use super::*;
use crate::key::{Layout, Span, position_of_token, version_at};
use bytes::Bytes;
use proptest::prelude::*;

/// When the tests' logs begin.
const START_MS: u64 = 1_700_000_000_000;

/// A store and the end of its log.
struct Log {
    store: Store,
    index: u64,
    now_ms: u64,
}

impl Log {
    fn new(layout: Layout, span: Span) -> Self {
        Self::with_limits(layout, span, SessionLimits::default())
    }

    fn with_limits(layout: Layout, span: Span, limits: SessionLimits) -> Self {
        Self { store: Store::new(StoreConfig { layout, span, limits }), index: 0, now_ms: START_MS }
    }

    fn all() -> Self {
        Self::new(Layout::Ordered, Span::all())
    }

    /// Applies a command through its bytes, as a replica does.
    fn command(&mut self, writes: Vec<Write>) -> Vec<Reply> {
        self.index += 1;
        let command = Command { stamp: version_at(self.now_ms), writes };
        let decoded = Command::decode(&command.encode()).unwrap();
        assert_eq!(decoded, command);
        self.store.apply(self.index, &decoded)
    }

    fn write(&mut self, session: Option<Session>, op: Op) -> Reply {
        self.command(vec![Write { session, op }]).pop().unwrap()
    }

    fn op(&mut self, op: Op) -> Answer {
        self.write(None, op).answer
    }

    fn single(&mut self, item: Item) -> Written {
        match self.op(Op::Single(item)) {
            Ok(Done::Single(written)) => written,
            other => panic!("{other:?}"),
        }
    }

    fn value(&self, key: &'static str) -> Option<Bytes> {
        self.store.get(&Bytes::from(key)).unwrap().map(|row| row.value)
    }
}

fn item(key: impl Into<Bytes>, action: Action) -> Item {
    Item { key: key.into(), condition: Condition::Any, action, return_previous: false }
}

fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Item {
    item(key, Action::Put { value: value.into() })
}

fn delete(key: impl Into<Bytes>) -> Item {
    item(key, Action::Delete { must_exist: false })
}

fn increment(key: impl Into<Bytes>, delta: i64) -> Item {
    item(key, Action::Increment { delta })
}

impl Item {
    fn when(self, condition: Condition) -> Self {
        Self { condition, ..self }
    }

    fn with_previous(self) -> Self {
        Self { return_previous: true, ..self }
    }
}

fn session(client: u128, sequence: u64) -> Session {
    Session { client, opened: version_at(START_MS), sequence, acknowledged_below: 1 }
}

fn span(start: &'static str, end: Option<&'static str>) -> Span {
    Span::new(start.into(), end.map(Into::into))
}

/// Every row, in order.
fn rows(store: &Store) -> Vec<(Bytes, Row)> {
    let start = store.span().start.clone();
    let span = match store.layout() {
        Layout::Ordered => Span { start, end: store.span().end.clone() },
        Layout::Hashed => Span::all(),
    };
    look(store, &everything(span)).unwrap().rows
}

/// A page and its rows.
#[derive(Debug)]
struct Seen {
    page: Page,
    rows: Vec<(Bytes, Row)>,
}

fn look(store: &Store, spec: &ScanSpec) -> Result<Seen, NotOwned> {
    let mut rows = Vec::new();
    let page = store.scan(spec, |key, row| rows.push((Bytes::copy_from_slice(key), row.to_row())))?;
    let bytes: usize = rows.iter().map(|(key, row)| key.len() + row.value.len()).sum();
    assert!(spec.count_only || (page.count, page.bytes) == (rows.len() as u64, bytes as u64), "{page:?} {rows:?}");
    Ok(Seen { page, rows })
}

fn everything(span: Span) -> ScanSpec {
    ScanSpec {
        span,
        tokens: None,
        reverse: false,
        rows_max: u64::MAX,
        bytes_max: u64::MAX,
        keys_only: false,
        count_only: false,
    }
}

/// All chunks of a freeze that has begun.
fn chunks(store: &mut Store, bytes_max: usize) -> Vec<Bytes> {
    std::iter::from_fn(|| store.freeze_next(bytes_max)).collect()
}

fn restore(chunks: &[Bytes]) -> Result<Store, SnapshotError> {
    let mut restore = Restore::new();
    chunks.iter().try_for_each(|chunk| restore.feed(chunk))?;
    restore.finish()
}

/// Few and short keys, so that they meet often; the empty key, prefixes and the largest byte among them.
fn any_key() -> impl Strategy<Value = Bytes> {
    let byte = prop::sample::select(vec![0u8, b'a', b'b', 0xFF]);
    prop::collection::vec(byte, 0..3).prop_map(Bytes::from)
}

fn any_value() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        4 => any::<i8>().prop_map(|n| Bytes::from(n.to_string())),
        1 => prop::collection::vec(any::<u8>(), 0..6).prop_map(Bytes::from),
        1 => Just(Bytes::from(i64::MAX.to_string())),
    ]
}

fn any_item() -> impl Strategy<Value = Item> {
    let condition = prop_oneof![
        4 => Just(Condition::Any),
        1 => Just(Condition::Absent),
        1 => Just(Condition::Present),
        1 => (0..40u64).prop_map(|n| Condition::Version(version_at(START_MS) + n)),
        1 => any_value().prop_map(Condition::Value),
    ];
    let action = prop_oneof![
        4 => any_value().prop_map(|value| Action::Put { value }),
        2 => any::<bool>().prop_map(|must_exist| Action::Delete { must_exist }),
        2 => any::<i8>().prop_map(|delta| Action::Increment { delta: delta.into() }),
        1 => any::<i64>().prop_map(|delta| Action::Increment { delta }),
    ];
    (any_key(), condition, action, any::<bool>()).prop_map(|(key, condition, action, return_previous)| Item {
        key,
        condition,
        action,
        return_previous,
    })
}

fn any_span() -> impl Strategy<Value = Span> {
    (any_key(), prop::option::of(any_key())).prop_map(|(start, end)| Span::new(start, end))
}

fn any_tokens() -> impl Strategy<Value = Option<crate::key::Tokens>> {
    prop::option::of((any::<u64>(), any::<u64>()))
        .prop_map(|ends| ends.map(|(a, b)| crate::key::Tokens { first: a.min(b), last: a.max(b) }))
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => any_item().prop_map(Op::Single),
        2 => prop::collection::vec(any_item(), 0..4).prop_map(Op::Batch),
        1 => (any_span(), any_tokens()).prop_map(|(span, tokens)| Op::DeleteRange { span, tokens }),
    ]
}

/// A partition that owns all keys, some of them, or some tokens.
fn any_partition() -> impl Strategy<Value = (Layout, Span)> {
    prop_oneof![
        Just((Layout::Ordered, Span::all())),
        any_span().prop_filter("empty", |span| !span.is_empty()).prop_map(|span| (Layout::Ordered, span)),
        Just((Layout::Hashed, Span::all())),
        (1..u64::MAX).prop_map(|middle| (Layout::Hashed, Span::new(position_of_token(middle), None))),
        (1..u64::MAX).prop_map(|middle| (Layout::Hashed, Span::new(Bytes::new(), Some(position_of_token(middle))))),
    ]
}
