//! From the wire to checked domain types, and back. What is wrong in itself is refused here, before anything is
//! proposed, with the field, the value and the limit.

use crate::{
    client::query,
    error::{Error, Outcome, Reason},
    key::{KeyKind, Span, Tokens, printable},
    kv,
    node::config::Limits,
    placement::Keyspace,
    proto::v1,
};
use bytes::Bytes;

/// What requests of one keyspace are checked against.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) kind: KeyKind,
    pub(crate) limits: &'a Limits,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(keyspace: &Keyspace, limits: &'a Limits) -> Self {
        Self { kind: keyspace.kind, limits }
    }

    /// A key that can name a row.
    pub(crate) fn key(&self, key: Bytes) -> Result<Bytes, Error> {
        self.length("key", &key)?;
        query::check_key(self.kind, &key)?;
        Ok(key)
    }

    fn length(&self, field: &'static str, key: &[u8]) -> Result<(), Error> {
        let limit = self.limits.key_bytes_max;
        if key.len() <= limit {
            return Ok(());
        }
        let message = format!("the key {} has {} bytes; the limit is {limit}", printable(key), key.len());
        Err(Error::new(Reason::KeyTooLarge, message).with("limit", limit).in_field(field))
    }

    fn value(&self, value: Bytes) -> Result<Bytes, Error> {
        let limit = self.limits.value_bytes_max;
        if value.len() <= limit {
            return Ok(value);
        }
        let message = format!("the value has {} bytes; the limit is {limit}: cut it into several rows", value.len());
        Err(Error::new(Reason::ValueTooLarge, message).with("limit", limit).in_field("value"))
    }

    /// The interval of keys that a routed request means. Whoever routed it has checked the user's own bounds; these are
    /// where a page or a partition ended, and need not be keys.
    pub(crate) fn span(&self, range: Option<&v1::KeyRange>) -> Result<Span, Error> {
        let Some(range) = range else { return Ok(Span::all()) };
        for bound in [&range.lower, &range.upper].into_iter().flatten() {
            // One more byte: the key just after the largest one.
            if bound.key.len() != self.limits.key_bytes_max + 1 {
                self.length("range", &bound.key)?;
            }
        }
        Ok(query::span_of_range(range))
    }

    fn item(
        &self,
        key: Bytes,
        condition: kv::Condition,
        action: kv::Action,
        return_previous: bool,
    ) -> Result<kv::Item, Error> {
        Ok(kv::Item { key: self.key(key)?, condition, action, return_previous })
    }

    fn put(&self, put: v1::PutRequest) -> Result<kv::Item, Error> {
        let action = kv::Action::Put { value: self.value(put.value)? };
        self.item(put.key, condition(put.condition)?, action, put.return_previous)
    }

    fn delete(&self, delete: v1::DeleteRequest) -> Result<kv::Item, Error> {
        let action = kv::Action::Delete { must_exist: delete.must_exist };
        self.item(delete.key, condition(delete.condition)?, action, delete.return_previous)
    }

    fn compare_and_set(&self, cas: v1::CompareAndSetRequest) -> Result<kv::Item, Error> {
        let condition = condition(cas.condition)?;
        let action = match cas.value {
            Some(value) => kv::Action::Put { value: self.value(value)? },
            None => kv::Action::Delete { must_exist: false },
        };
        self.item(cas.key, condition, action, cas.return_previous)
    }

    fn increment(&self, increment: v1::IncrementRequest) -> Result<kv::Item, Error> {
        let action = kv::Action::Increment { delta: increment.delta };
        self.item(increment.key, kv::Condition::Any, action, increment.return_previous)
    }

    fn batch_item(&self, item: v1::BatchItem) -> Result<kv::Item, Error> {
        use v1::batch_item::Op;
        match item.op {
            Some(Op::Put(put)) => self.put(put),
            Some(Op::Delete(delete)) => self.delete(delete),
            Some(Op::CompareAndSet(cas)) => self.compare_and_set(cas),
            Some(Op::Increment(increment)) => self.increment(increment),
            None => Err(Error::field("items", "an item of the batch is empty")),
        }
    }

    fn batch(&self, items: Vec<v1::BatchItem>) -> Result<kv::Op, Error> {
        let (count, limit) = (items.len(), self.limits.batch_items_max);
        if count == 0 {
            return Err(Error::field("items", "the batch is empty; give 1 item or more"));
        }
        if count > limit {
            let message = format!("the batch has {count} items; the limit is {limit}: send several");
            return Err(Error::new(Reason::BatchTooLarge, message).with("limit", limit).in_field("items"));
        }
        let items = items.into_iter().map(|item| self.batch_item(item)).collect::<Result<Vec<_>, _>>()?;
        let write = kv::Write { session: None, op: kv::Op::Batch(items) };
        let (bytes, limit) = (write.bytes_max(), self.limits.batch_bytes_max);
        if bytes > limit {
            let message = format!("the batch has {bytes} bytes; the limit is {limit}: send several");
            return Err(Error::new(Reason::BatchTooLarge, message).with("limit", limit).in_field("items"));
        }
        Ok(write.op)
    }

    /// The write that a request means; `None` when it is not a write.
    ///
    /// # Errors
    /// Everything that is wrong with it in itself; outcome `not applied`.
    pub(crate) fn write(&self, op: v1::request::Op, tokens: Option<Tokens>) -> Result<Option<kv::Write>, Error> {
        use v1::request::Op;
        query::check_write(&op).map_err(|error| error.outcome(Outcome::NotApplied))?;
        let (op, session) = match op {
            Op::Put(mut put) => {
                let session = put.session.take();
                (self.put(put).map(kv::Op::Single), session)
            }
            Op::Delete(mut delete) => {
                let session = delete.session.take();
                (self.delete(delete).map(kv::Op::Single), session)
            }
            Op::CompareAndSet(mut cas) => {
                let session = cas.session.take();
                (self.compare_and_set(cas).map(kv::Op::Single), session)
            }
            Op::Increment(mut increment) => {
                let session = increment.session.take();
                (self.increment(increment).map(kv::Op::Single), session)
            }
            Op::Write(batch) => (self.batch(batch.items), batch.session),
            Op::DeleteRange(range) => {
                let span = self.span(range.range.as_ref());
                (span.map(|span| kv::Op::DeleteRange { span, tokens }), range.session)
            }
            Op::Get(_) | Op::BatchGet(_) | Op::Scan(_) | Op::Count(_) | Op::OpenSession(_) => return Ok(None),
        };
        let checked = || Ok(kv::Write { session: session_of(session)?, op: op? });
        checked().map(Some).map_err(|error: Error| error.outcome(Outcome::NotApplied))
    }
}

fn condition(pb: Option<v1::Condition>) -> Result<kv::Condition, Error> {
    use v1::condition::Must;
    let Some(pb) = pb else { return Ok(kv::Condition::Any) };
    match pb.must {
        Some(Must::Absent(true)) => Ok(kv::Condition::Absent),
        Some(Must::Present(true)) => Ok(kv::Condition::Present),
        Some(Must::Version(version)) => Ok(kv::Condition::Version(version)),
        Some(Must::Value(value)) => Ok(kv::Condition::Value(value)),
        Some(Must::Absent(false) | Must::Present(false)) => {
            Err(Error::field("condition", "`absent` and `present` are asked for with true; leave the other unset"))
        }
        // A condition of a newer version must not be taken for "anything".
        None => Err(Error::field("condition", "the condition is empty or unknown to this server")),
    }
}

fn session_of(pb: Option<v1::WriteSession>) -> Result<Option<kv::Session>, Error> {
    let Some(pb) = pb.filter(|pb| !pb.client_id.is_empty()) else { return Ok(None) };
    let client: [u8; 16] = pb.client_id.as_ref().try_into().map_err(|_| {
        Error::field("session.client_id", format!("has {} bytes; OpenSession gives 16", pb.client_id.len()))
    })?;
    if pb.sequence == 0 {
        return Err(Error::field("session.sequence", "is 0; the first sequence of a session is 1"));
    }
    Ok(Some(kv::Session {
        client: u128::from_be_bytes(client),
        opened: pb.opened,
        sequence: pb.sequence,
        acknowledged_below: pb.acknowledged_below,
    }))
}

/// The tokens of a route.
pub(crate) fn tokens_of(pb: Option<v1::Tokens>) -> Option<Tokens> {
    pb.map(|pb| Tokens { first: pb.first, last: pb.last })
}

/// How far an answer reaches, for the wire.
pub(crate) fn covered_to_pb(span: &Span, tokens: Option<Tokens>) -> v1::Covered {
    let tokens = tokens.map(|tokens| v1::Tokens { first: tokens.first, last: tokens.last });
    v1::Covered { range: Some(query::range_of_span(span)), tokens }
}

/// A single write's result, for the wire.
pub(crate) fn written_to_pb(key: &Bytes, written: kv::Written, info: v1::WriteInfo) -> v1::WriteReply {
    v1::WriteReply {
        applied: written.applied,
        version: written.version,
        existed: written.existed,
        previous: written.previous.map(|row| v1::Row { key: key.clone(), value: row.value, version: row.version }),
        number: written.number,
        info: Some(info),
    }
}

/// The keys that a write's answer speaks of, in order.
pub(crate) fn keys_of(op: &kv::Op) -> Vec<Bytes> {
    match op {
        kv::Op::Single(item) => vec![item.key.clone()],
        kv::Op::Batch(items) => items.iter().map(|item| item.key.clone()).collect(),
        kv::Op::DeleteRange { .. } => Vec::new(),
    }
}
