//! Random commands, repeated and reordered, against a plain map that never forgets.

use super::*;
use crate::key::{Tokens, Version, position, token};
use std::collections::BTreeMap;

/// What a store should be, written as plainly as possible.
pub(super) struct Model {
    layout: Layout,
    span: Span,
    pub(super) rows: BTreeMap<Bytes, Row>,
    last_version: Version,
    answered: BTreeMap<(u128, u64), Answer>,
}

impl Model {
    pub(super) fn new(layout: Layout, span: Span) -> Self {
        Self { layout, span, rows: BTreeMap::new(), last_version: 0, answered: BTreeMap::new() }
    }

    pub(super) fn owns(&self, key: &Bytes) -> bool {
        self.span.contains(&position(self.layout, key))
    }

    /// `None`: the store must say that it does not own what is asked.
    pub(super) fn write(&mut self, stamp: Version, write: &Write) -> Option<Reply> {
        let id = write.session.map(|session| (session.client, session.sequence));
        if let Some(answer) = id.and_then(|id| self.answered.get(&id)) {
            return Some(Reply { answer: answer.clone(), replayed: true });
        }
        let answer = match &write.op {
            Op::Single(item) => self.batch(stamp, std::slice::from_ref(item))?.map(|done| match done {
                Done::Batch { mut items, .. } => Done::Single(items.pop().unwrap()),
                other => other,
            }),
            Op::Batch(items) => self.batch(stamp, items)?,
            Op::DeleteRange { span, tokens } => Ok(self.delete_range(span, *tokens)?),
        };
        if let Some(id) = id {
            self.answered.insert(id, answer.clone());
        }
        Some(Reply { answer, replayed: false })
    }

    fn batch(&mut self, stamp: Version, items: &[Item]) -> Option<Answer> {
        if items.iter().any(|item| !self.owns(&item.key)) {
            return None;
        }
        let mut keys: Vec<_> = items.iter().map(|item| item.key.clone()).collect();
        keys.sort();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Some(Err(Refusal::KeyRepeated { key: pair[0].clone() }));
        }
        let met = items.iter().all(|item| match (&item.condition, self.rows.get(&item.key)) {
            (Condition::Any, _) | (Condition::Absent, None) | (Condition::Present, Some(_)) => true,
            (Condition::Version(version), Some(row)) => row.version == *version,
            (Condition::Value(value), Some(row)) => row.value == *value,
            _ => false,
        });
        let mut numbers = BTreeMap::new();
        for item in items.iter().filter(|_| met) {
            let key = item.key.clone();
            match (&item.action, self.rows.get(&key)) {
                (Action::Delete { must_exist: true }, None) => return Some(Err(Refusal::NotFound { key })),
                (Action::Increment { delta }, row) => {
                    let text =
                        row.map_or_else(|| "0".to_owned(), |row| String::from_utf8_lossy(&row.value).into_owned());
                    let Ok(number) = text.parse::<i64>() else { return Some(Err(Refusal::NotANumber { key })) };
                    match i64::try_from(i128::from(number) + i128::from(*delta)) {
                        Ok(sum) => drop(numbers.insert(key, sum)),
                        Err(_) => return Some(Err(Refusal::NumberOverflow { key })),
                    }
                }
                _ => {}
            }
        }
        let version = stamp.max(self.last_version + 1);
        if met {
            self.last_version = version;
        }
        let mut answers = Vec::new();
        for item in items {
            let before = self.rows.get(&item.key).cloned();
            let number = numbers.get(&item.key).copied();
            let after = match &item.action {
                _ if !met => before.clone(),
                Action::Put { value } => Some(Row { value: value.clone(), version }),
                Action::Delete { .. } => None,
                Action::Increment { .. } => Some(Row { value: number.unwrap().to_string().into(), version }),
            };
            let existed = before.is_some();
            let version = if met { version } else { before.as_ref().map_or(0, |row| row.version) };
            let previous = before.filter(|_| item.return_previous);
            answers.push(Written { applied: met, version, existed, previous, number });
            self.rows.remove(&item.key);
            if let Some(row) = after {
                self.rows.insert(item.key.clone(), row);
            }
        }
        Some(Ok(Done::Batch { applied: met, items: answers }))
    }

    fn delete_range(&mut self, span: &Span, tokens: Option<Tokens>) -> Option<Done> {
        let (covered, covered_tokens) = match self.layout {
            Layout::Ordered if span.is_empty() => (span.clone(), None),
            Layout::Ordered if !self.span.contains(&span.start) => return None,
            Layout::Ordered => (span.intersect(&self.span), None),
            Layout::Hashed => {
                let both = tokens.unwrap_or(Tokens::ALL).intersect(&Tokens::of_span(&self.span)?)?;
                (span.clone(), Some(both))
            }
        };
        let before = self.rows.len();
        self.rows.retain(|key, _| {
            !covered.contains(key) || covered_tokens.is_some_and(|tokens| !tokens.contains(token(key)))
        });
        let count = (before - self.rows.len()) as u64;
        Some(Done::DeleteRange(Box::new(Deleted { count, covered, covered_tokens })))
    }
}

/// Writes with sequences in the order in which their clients made them, and the order in which they arrive: each at
/// least once, some again, none in its place.
pub(super) fn any_history(ops_max: usize) -> impl Strategy<Value = Vec<Write>> {
    let writes = prop::collection::vec((prop::option::weighted(0.8, 1..4u128), any_op()), 1..ops_max);
    (writes, prop::collection::vec(any::<prop::sample::Index>(), 0..ops_max)).prop_flat_map(|(writes, again)| {
        let mut sequences = BTreeMap::new();
        let writes: Vec<Write> = writes
            .into_iter()
            .map(|(client, op)| {
                let session = client.map(|client| {
                    let sequence = sequences.entry(client).and_modify(|n| *n += 1).or_insert(1);
                    session(client, *sequence)
                });
                Write { session, op }
            })
            .collect();
        let again: Vec<Write> = again.iter().map(|index| index.get(&writes).clone()).collect();
        Just([writes, again].concat()).prop_shuffle()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn repeated_and_reordered_writes_do_what_a_plain_map_does(
        (layout, span) in any_partition(),
        history in any_history(60),
        batches in prop::collection::vec((1..6usize, 0..3u64), 120),
    ) {
        let mut model = Model::new(layout, span.clone());
        let mut log = Log::new(layout, span);
        let mut history = history.as_slice();
        for (count, later_ms) in batches {
            let (writes, rest) = history.split_at(count.min(history.len()));
            history = rest;
            log.now_ms += later_ms;
            let replies = log.command(writes.to_vec());
            for (write, reply) in writes.iter().zip(replies) {
                match model.write(version_at(log.now_ms), write) {
                    Some(expected) => prop_assert_eq!(reply, expected, "{:?}", write),
                    None => prop_assert!(matches!(reply.answer, Err(Refusal::NotOwned(_))), "{:?} {:?}", write, reply),
                }
            }
        }
        prop_assert!(history.is_empty());
        let expected: Vec<_> = model.rows.into_iter().collect();
        let bytes: usize = expected.iter().map(|(key, row)| key.len() + row.value.len()).sum();
        prop_assert_eq!(log.store.bytes(), bytes as u64);
        prop_assert_eq!(log.store.rows(), expected.len() as u64);
        prop_assert_eq!(rows(&log.store), expected);
    }
}
