//! The state machine of one partition: applies commands in log order, answers reads.

use super::bounds::{Bounds, NotOwned};
use super::codec::mix;
use super::command::{Action, Command, Condition, Item, Op, Write};
use super::packed::{Packed, Row, RowRef};
use super::reply::{Answer, Deleted, Done, Refusal, Reply, Written};
use super::rows::CALLED_ROWS;
use super::session::{SessionLimits, Sessions};
use super::snapshot::Freeze;
use super::table::Table;
use crate::key::{Layout, Span, Tokens, Version};
use crate::plant::{Bug, planted};
use bytes::Bytes;

/// How a partition begins. Equal on every replica of it; afterwards it is part of the state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreConfig {
    /// The keyspace's layout.
    pub layout: Layout,
    /// Positions that the partition owns.
    pub span: Span,
    /// What it remembers of its clients.
    pub limits: SessionLimits,
}

/// The rows and sessions of one partition.
#[derive(Debug)]
pub struct Store {
    bounds: Bounds,
    table: Table,
    sessions: Sessions,
    applied: u64,
    /// The last version given, or just below the highest stamp seen: the partition's time.
    last_version: Version,
    freeze: Option<Freeze>,
}

/// What an item is about to do, decided before anything changes.
enum Step {
    Put(Bytes),
    Delete,
    Increment(i64),
}

impl Store {
    /// An empty partition.
    #[must_use]
    pub fn new(config: StoreConfig) -> Self {
        Self {
            bounds: Bounds::new(config.layout, config.span),
            table: Table::default(),
            sessions: Sessions::new(config.limits, 0),
            applied: 0,
            last_version: 0,
            freeze: None,
        }
    }

    pub(super) fn from_parts(
        bounds: Bounds,
        table: Table,
        sessions: Sessions,
        applied: u64,
        last_version: Version,
    ) -> Self {
        Self { bounds, table, sessions, applied, last_version, freeze: None }
    }

    /// Applies one log entry; one reply per write, in order.
    ///
    /// Everything is decided here, in log order: who owns a key, whether a condition holds, whether a write is a
    /// repetition. The same commands at the same indexes make the same state and the same replies on every replica.
    ///
    /// # Panics
    /// If `index` does not lie above every index applied before: the log would be applied twice.
    pub fn apply(&mut self, index: u64, command: &Command) -> Vec<Reply> {
        self.advance(index);
        // The next version is one above: at least the stamp.
        let stamp = command.stamp.saturating_sub(1);
        self.last_version = if planted(Bug::VersionsGoBack) { stamp } else { self.last_version.max(stamp) };
        self.sessions.expire(self.last_version);
        let mut replies = Vec::with_capacity(command.writes.len());
        for writes in command.writes.chunks(CALLED_ROWS) {
            self.call_for(writes.iter().filter_map(|write| match &write.op {
                Op::Single(item) => Some(&item.key),
                _ => None,
            }));
            replies.extend(writes.iter().map(|write| self.apply_write(write)));
        }
        replies
    }

    pub(super) fn advance(&mut self, index: u64) {
        assert!(index > self.applied, "entry {index} after {} was applied: entries are applied once", self.applied);
        self.applied = index;
    }

    fn apply_write(&mut self, write: &Write) -> Reply {
        let fresh = |answer| Reply { answer, replayed: false };
        let Some(session) = &write.session else {
            return fresh(self.check_owned(&write.op).and_then(|()| self.perform(&write.op)));
        };
        let fingerprint = write.op.fingerprint();
        // What was answered here is answered again even if its keys have moved since: only this table may know.
        if !planted(Bug::DedupeDisabled)
            && let Some(mut answer) = self.sessions.recall(session, fingerprint, self.last_version)
        {
            if let Op::Single(item) = &write.op
                && planted(Bug::RetryJudgedAgain)
                && matches!(self.decide(item), Ok(None))
            {
                answer = Ok(Done::Single(self.unmet(item)));
            }
            let replayed = answer.as_ref().err().is_none_or(Refusal::is_final);
            return Reply { answer, replayed };
        }
        let admitted = self.check_owned(&write.op).and_then(|()| self.sessions.admit(session, self.last_version));
        if let Err(refusal) = admitted {
            return fresh(Err(refusal));
        }
        let answer = self.perform(&write.op);
        if answer.as_ref().err().is_none_or(Refusal::is_final) {
            self.sessions.record(session, fingerprint, answer.clone(), self.last_version);
        }
        fresh(answer)
    }

    fn check_owned(&self, op: &Op) -> Result<(), Refusal> {
        match op {
            Op::Single(item) => self.bounds.check(&item.key)?,
            Op::Batch(items) => items.iter().try_for_each(|item| self.bounds.check(&item.key))?,
            Op::DeleteRange { span, tokens } => drop(self.bounds.part(span, *tokens, false)?),
        }
        Ok(())
    }

    /// Does what is owned and new.
    fn perform(&mut self, op: &Op) -> Answer {
        match op {
            Op::Single(item) => {
                let written = match self.decide(item)? {
                    Some(step) => {
                        let version = self.next_version();
                        self.take(item, step, version)
                    }
                    None => self.unmet(item),
                };
                Ok(Done::Single(written))
            }
            Op::Batch(items) => self.perform_batch(items),
            Op::DeleteRange { span, tokens } => self.delete_range(span, *tokens),
        }
    }

    /// All or nothing: decides every item on the state before the batch. An unmet condition, which is a result, goes
    /// before a refusal; of several refusals the first counts.
    fn perform_batch(&mut self, items: &[Item]) -> Answer {
        let mut keys: Vec<&Bytes> = items.iter().map(|item| &item.key).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Refusal::KeyRepeated { key: Bytes::copy_from_slice(pair[0]) });
        }
        let mut steps = Vec::with_capacity(items.len());
        let (mut met, mut refused) = (true, None);
        for item in items {
            match self.decide(item) {
                Ok(Some(step)) => steps.push(step),
                Ok(None) => met = false,
                Err(refusal) => refused = refused.or(Some(refusal)),
            }
        }
        if !met {
            if planted(Bug::BatchHalfApplied) {
                self.perform_first(items);
            }
            return Ok(Done::Batch { applied: false, items: items.iter().map(|item| self.unmet(item)).collect() });
        }
        if let Some(refusal) = refused {
            return Err(refusal);
        }
        let version = self.next_version();
        let items = items.iter().zip(steps).map(|(item, step)| self.take(item, step, version)).collect();
        Ok(Done::Batch { applied: true, items })
    }

    /// Does the items before the first one that cannot be done.
    fn perform_first(&mut self, items: &[Item]) {
        for item in items {
            let Ok(Some(step)) = self.decide(item) else { return };
            let version = self.next_version();
            self.take(item, step, version);
        }
    }

    /// What an item would do; `None` when its condition does not hold.
    fn decide(&self, item: &Item) -> Result<Option<Step>, Refusal> {
        // Searching the tree is most of what a plain write costs: not twice.
        let looks = item.condition != Condition::Any
            || !matches!(item.action, Action::Put { .. } | Action::Delete { must_exist: false });
        let row = if looks { self.table.get(&item.key) } else { None };
        let met = match &item.condition {
            Condition::Any => true,
            Condition::Absent => row.is_none(),
            Condition::Present => row.is_some(),
            Condition::Version(version) => row.is_some_and(|row| row.version == *version),
            Condition::Value(value) => row.is_some_and(|row| row.value == value.as_ref()),
        };
        if !met && !planted(Bug::ConditionIgnored) {
            return Ok(None);
        }
        // Refusals are remembered: their key must not keep the entry alive.
        let key = || Bytes::copy_from_slice(&item.key);
        Ok(Some(match &item.action {
            Action::Put { value } => Step::Put(value.clone()),
            Action::Delete { must_exist: true } if row.is_none() => return Err(Refusal::NotFound { key: key() }),
            Action::Delete { .. } => Step::Delete,
            Action::Increment { delta } => {
                let number = match row {
                    None => 0,
                    Some(row) => number_of(row.value).ok_or_else(|| Refusal::NotANumber { key: key() })?,
                };
                Step::Increment(number.checked_add(*delta).ok_or_else(|| Refusal::NumberOverflow { key: key() })?)
            }
        }))
    }

    fn take(&mut self, item: &Item, step: Step, version: Version) -> Written {
        let previous = if item.return_previous { self.table.get(&item.key).as_ref().map(RowRef::to_row) } else { None };
        let (existed, number) = match step {
            Step::Put(value) => (self.table.put(&item.key, &value, version), None),
            Step::Delete => (self.table.remove(&item.key), None),
            Step::Increment(number) => {
                (self.table.put(&item.key, number.to_string().as_bytes(), version), Some(number))
            }
        };
        Written { applied: true, version, existed, previous, number }
    }

    fn unmet(&self, item: &Item) -> Written {
        let row = self.table.get(&item.key);
        Written {
            applied: false,
            version: row.map_or(0, |row| row.version),
            existed: row.is_some(),
            previous: row.filter(|_| item.return_previous).as_ref().map(RowRef::to_row),
            number: None,
        }
    }

    fn delete_range(&mut self, span: &Span, tokens: Option<Tokens>) -> Answer {
        let part = self.bounds.part(span, tokens, false)?;
        let keys: Vec<Box<[u8]>> = if part.span.is_empty() {
            Vec::new()
        } else {
            self.table.range(&part.span).map(Packed::key).filter(|key| part.wants(key)).map(Into::into).collect()
        };
        for key in &keys {
            self.table.remove(key);
        }
        // The answer is remembered: its bounds must not keep the entry alive.
        let covered = Span {
            start: Bytes::copy_from_slice(&part.span.start),
            end: part.span.end.as_deref().map(Bytes::copy_from_slice),
        };
        let count = keys.len() as u64;
        Ok(Done::DeleteRange(Box::new(Deleted { count, covered, covered_tokens: part.tokens })))
    }

    fn next_version(&mut self) -> Version {
        self.last_version = self.last_version.checked_add(1).expect("versions last until the year 2527");
        self.last_version
    }

    /// Reads one row.
    ///
    /// # Errors
    /// When the key lies in another partition.
    pub fn get(&self, key: &Bytes) -> Result<Option<Row>, NotOwned> {
        match self.bounds.check(key) {
            Err(_) if self.bounds.holds(key) && planted(Bug::SealIgnoredAtRead) => {}
            Err(refusal) if !planted(Bug::BoundsIgnoredAtRead) => return Err(refusal),
            _ => {}
        }
        Ok(self.table.get(key).as_ref().map(RowRef::to_row))
    }

    /// Asks the memory for the rows of the first [`CALLED_ROWS`] of these keys, which are about to be looked up.
    pub fn call_for<'a>(&self, keys: impl Iterator<Item = &'a Bytes>) {
        self.table.call_for(keys.map(|key| &**key));
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.table.len()
    }

    /// Bytes of keys and values.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.table.bytes()
    }

    /// Clients whose answers are remembered.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Bytes of the answers remembered.
    #[must_use]
    pub fn session_bytes(&self) -> u64 {
        self.sessions.bytes()
    }

    /// The highest version that a row can have: at least every version given.
    #[must_use]
    pub fn last_version(&self) -> Version {
        self.last_version
    }

    /// Index of the last entry applied; 0 if none.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Positions that the partition owns.
    #[must_use]
    pub fn span(&self) -> &Span {
        self.bounds.span()
    }

    /// How often what it owns has changed: 1 at first, one more with every split, merge and fence.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.bounds.epoch()
    }

    /// While it is sealed: the version of the map that asked for it.
    #[must_use]
    pub fn sealed(&self) -> Option<u64> {
        self.bounds.sealed()
    }

    /// The keyspace's layout.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.bounds.layout()
    }

    /// A number that is equal between replicas that have applied the same entries, and differs, but for a small
    /// chance, between those that have parted. Covers rows, versions and sessions; costs nothing to ask. Snapshots
    /// carry it: how it is computed is part of their format.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let shape = self.epoch() - 1; // Nothing for a partition that was created as it is.
        mix(self.table.digest() ^ mix(self.last_version ^ mix(self.sessions.digest() ^ shape)))
    }

    /// Keys that rows can have: those of the span, or any in the hashed layout.
    pub(super) fn keys_owned(&self) -> Span {
        match self.layout() {
            Layout::Ordered => self.span().clone(),
            Layout::Hashed => Span::all(),
        }
    }

    pub(super) fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    pub(super) fn session_table(&self) -> &Sessions {
        &self.sessions
    }

    pub(super) fn bounds_mut(&mut self) -> &mut Bounds {
        &mut self.bounds
    }

    pub(super) fn table_mut(&mut self) -> &mut Table {
        &mut self.table
    }

    /// The same state, not frozen.
    pub(super) fn copy(&self) -> Self {
        let table = self.table.copy();
        Self::from_parts(self.bounds.clone(), table, self.sessions.clone(), self.applied, self.last_version)
    }

    pub(super) fn into_rows(self) -> (Table, Sessions) {
        (self.table, self.sessions)
    }

    /// Takes in the rows and sessions of a neighbour.
    pub(super) fn take_in(&mut self, table: Table, sessions: Sessions, last_version: Version) {
        self.table.extend(table);
        self.sessions.merge(sessions);
        self.last_version = self.last_version.max(last_version);
    }

    pub(super) fn freeze_parts(&mut self) -> (&mut Option<Freeze>, &mut Table) {
        (&mut self.freeze, &mut self.table)
    }
}

/// The number that a value holds.
fn number_of(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}
