//! A store behind doors: one log of states, followers that lag behind, answers that get lost; and lies on request.

use crate::{
    client::token::{Seen, SessionToken},
    error::{Error, Outcome, Reason},
    key::PartitionId,
    proof::door::Door,
    proto::v1::{self, batch_item, batch_item_reply, condition::Must, reply, request},
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

/// What the model does wrong, now and then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lie {
    /// Nothing.
    No,
    /// Answers a strong read from the past.
    StaleRead,
    /// Answers a read from further back than its level allows, and claims otherwise.
    StaleFollower,
    /// Acknowledges a write that it does not apply.
    LostWrite,
    /// Applies a repeated write again.
    DoubleApply,
    /// Applies half of a batch.
    TornBatch,
    /// Leaves a row out of a page.
    ScanGap,
}

/// Rows with their versions.
type Rows = BTreeMap<Bytes, (Bytes, u64)>;

/// The store. The version of a row is the log index of its write.
pub(super) struct Model {
    rng: StdRng,
    lie: Lie,
    /// The log: when, and the rows from then on.
    states: Vec<(Instant, Rows)>,
    answered: BTreeMap<(Bytes, u64), reply::Result>,
    sessions: u64,
}

/// A way to one node of the model; node 1 leads.
pub(super) struct Node {
    number: u64,
    model: Arc<Mutex<Model>>,
}

const NODES: u64 = 3;
/// Followers are at most this far behind.
const LAG_MS_MAX: u64 = 12;

pub(super) fn doors(seed: u64, lie: Lie) -> Vec<Arc<dyn Door>> {
    let model = Arc::new(Mutex::new(Model {
        rng: StdRng::seed_from_u64(seed),
        lie,
        states: vec![(Instant::now(), Rows::new())],
        answered: BTreeMap::new(),
        sessions: 0,
    }));
    let node = |number| Arc::new(Node { number, model: Arc::clone(&model) }) as Arc<dyn Door>;
    (1..=NODES).map(node).collect()
}

impl Door for Node {
    fn node(&self) -> Option<String> {
        Some(format!("n{}", self.number))
    }

    fn ask(&self, request: v1::Request, deadline: Instant) -> BoxFuture<'_, Result<reply::Result, Error>> {
        Box::pin(async move {
            let op = request.op.expect("a request names its operation");
            self.travel().await;
            let lost = self.model.lock().rng.random_range(0..100);
            if lost < 3 {
                return Err(Error::new(Reason::Unreachable, "refused").outcome(Outcome::NotApplied));
            }
            if lost < 5 {
                // Not applied either, but who knows.
                sleep(deadline.saturating_duration_since(Instant::now())).await;
                return Err(Error::new(Reason::OutcomeUnknown, "no answer").outcome(Outcome::Unknown));
            }
            let result = self.model.lock().answer(op, self.number);
            self.travel().await;
            if (5..8).contains(&lost) {
                return Err(Error::new(Reason::Unreachable, "the answer was lost").outcome(Outcome::Unknown));
            }
            Ok(result)
        })
    }
}

impl Node {
    async fn travel(&self) {
        let us = self.model.lock().rng.random_range(50..4_000);
        sleep(Duration::from_micros(us)).await;
    }
}

impl Model {
    fn lies(&mut self, lie: Lie, percent: u32) -> bool {
        self.lie == lie && self.rng.random_range(0..100) < percent
    }

    fn rows(&self) -> &Rows {
        &self.states.last().expect("there is a first state").1
    }

    fn answer(&mut self, op: request::Op, node: u64) -> reply::Result {
        match op {
            request::Op::Get(get) => {
                let (index, read) = self.serve(get.options, node);
                let row = self.states[index].1.get(&get.key).map(|found| row(&get.key, found));
                reply::Result::Get(v1::GetReply { found: row.is_some(), row, read: Some(read) })
            }
            request::Op::Scan(scan) => reply::Result::Scan(self.scan(scan, node)),
            request::Op::OpenSession(_) => {
                self.sessions += 1;
                let client_id = Bytes::copy_from_slice(&u128::from(self.sessions).to_be_bytes());
                reply::Result::OpenSession(v1::OpenSessionReply { client_id, opened: self.sessions })
            }
            write => self.write(write),
        }
    }

    /// The state that a node answers from, and what it says of it.
    fn serve(&mut self, options: Option<v1::ReadOptions>, node: u64) -> (usize, v1::ReadInfo) {
        let options = options.unwrap_or_default();
        let strong = matches!(
            options.consistency(),
            v1::Consistency::Unspecified | v1::Consistency::Linearizable | v1::Consistency::Lease
        );
        let newest = self.states.len() - 1;
        let leads = node == 1 || strong;
        let (mut index, mut lag_ms) = (newest, 0);
        if strong {
            if self.lies(Lie::StaleRead, 5) {
                index = newest.saturating_sub(10);
            }
        } else if !leads {
            let seen = SessionToken::decode(options.session_token).unwrap().seen(PartitionId(1)).unwrap_or_default();
            lag_ms = self.rng.random_range(0..=LAG_MS_MAX);
            let real_ms = if self.lies(Lie::StaleFollower, 30) { 5_000 } else { lag_ms };
            let then = Instant::now() - Duration::from_millis(real_ms);
            let reached = self.states.partition_point(|(at, _)| *at <= then).saturating_sub(1);
            index = if real_ms == lag_ms { reached.max(seen.index as usize) } else { reached };
        }
        let known = match leads {
            true => v1::staleness::Known::None(true),
            false => v1::staleness::Known::AtMostUs(lag_ms * 1_000),
        };
        let role = if leads { v1::Role::Leader } else { v1::Role::Follower };
        let read = v1::ReadInfo {
            partition: 1,
            term: 1,
            applied_index: index as u64,
            node: if leads { 1 } else { node },
            role: role as i32,
            staleness: Some(v1::Staleness { known: Some(known) }),
            session_token: token(index),
            ..Default::default()
        };
        (index, read)
    }

    /// A page; its token is the last key returned.
    fn scan(&mut self, scan: v1::ScanRequest, node: u64) -> v1::ScanReply {
        let (index, read) = self.serve(scan.options.clone(), node);
        let gap = self.lies(Lie::ScanGap, 20);
        let reverse = scan.order() == v1::Order::Descending;
        let range = scan.range.unwrap();
        let (mut from, mut to) = (range.lower.unwrap().key, range.upper.unwrap().key);
        let mut left = scan.limit.unwrap_or(u64::MAX);
        if let Some((count, key)) = scan.page_token.split_at_checked(8) {
            left -= u64::from_be_bytes(count.try_into().unwrap());
            match reverse {
                true => to = Bytes::copy_from_slice(key),
                false => from = [key, &[0]].concat().into(),
            }
        }
        let returned = scan.limit.unwrap_or(u64::MAX) - left;
        let mut rows: Vec<v1::Row> = match from < to {
            true => self.states[index].1.range(from..to).map(|(key, found)| row(key, found)).collect(),
            false => Vec::new(),
        };
        if reverse {
            rows.reverse();
        }
        let take = (scan.page_rows as usize).min(usize::try_from(left).unwrap_or(usize::MAX));
        let over = rows.len() <= take || take as u64 == left;
        rows.truncate(take);
        let mut next_page_token = Bytes::new();
        if let (false, Some(last)) = (over, rows.last()) {
            next_page_token = [&(returned + rows.len() as u64).to_be_bytes(), &last.key[..]].concat().into();
        }
        if gap && rows.len() > 2 {
            rows.remove(1);
        }
        v1::ScanReply { rows, next_page_token, reads: vec![read], ..Default::default() }
    }

    fn write(&mut self, op: request::Op) -> reply::Result {
        let session = match &op {
            request::Op::Put(put) => &put.session,
            request::Op::Delete(delete) => &delete.session,
            request::Op::CompareAndSet(cas) => &cas.session,
            request::Op::Increment(increment) => &increment.session,
            request::Op::Write(batch) => &batch.session,
            other => panic!("no write: {other:?}"),
        };
        let slot = session.as_ref().map(|session| (session.client_id.clone(), session.sequence));
        let remembered = slot.as_ref().and_then(|slot| self.answered.get(slot)).cloned();
        if let Some(answer) = remembered.filter(|_| self.lie != Lie::DoubleApply) {
            return answer;
        }
        let before = self.rows().clone();
        let answer = self.apply(op);
        if self.lies(Lie::LostWrite, 4) {
            self.states.last_mut().unwrap().1 = before;
        }
        if let Some(slot) = slot {
            self.answered.insert(slot, answer.clone());
        }
        answer
    }

    fn apply(&mut self, op: request::Op) -> reply::Result {
        let mut rows = self.rows().clone();
        let index = self.states.len();
        let torn = self.lies(Lie::TornBatch, 20);
        let answer = match op {
            request::Op::Write(batch) => {
                let mut items = Vec::new();
                for (n, item) in batch.items.into_iter().enumerate() {
                    let Some(batch_item::Op::Put(put)) = item.op else { panic!("only puts are expected") };
                    let mut unwritten = rows.clone();
                    let to = if torn && n > 0 { &mut unwritten } else { &mut rows };
                    items.push(put_if(to, index, put.key, put.condition, Some(put.value)));
                }
                let applied = items.iter().all(|item| item.applied);
                if !applied {
                    rows = self.rows().clone();
                }
                let item = |write| v1::BatchItemReply { result: Some(batch_item_reply::Result::Write(write)) };
                reply::Result::Batch(v1::BatchReply { applied, items: items.into_iter().map(item).collect() })
            }
            request::Op::Put(put) => {
                reply::Result::Write(put_if(&mut rows, index, put.key, put.condition, Some(put.value)))
            }
            request::Op::Delete(delete) => {
                reply::Result::Write(put_if(&mut rows, index, delete.key, delete.condition, None))
            }
            request::Op::CompareAndSet(cas) => {
                reply::Result::Write(put_if(&mut rows, index, cas.key, cas.condition, cas.value))
            }
            request::Op::Increment(increment) => {
                let text = rows.get(&increment.key).map_or_else(|| "0".into(), |(value, _)| value.clone());
                let number = std::str::from_utf8(&text).unwrap().parse::<i64>().unwrap() + increment.delta;
                let reply = put_if(&mut rows, index, increment.key, None, Some(number.to_string().into()));
                reply::Result::Write(v1::WriteReply { number: Some(number), ..reply })
            }
            other => panic!("no write: {other:?}"),
        };
        self.states.push((Instant::now(), rows));
        answer
    }
}

fn put_if(
    rows: &mut Rows,
    index: usize,
    key: Bytes,
    condition: Option<v1::Condition>,
    value: Option<Bytes>,
) -> v1::WriteReply {
    let before = rows.get(&key).cloned();
    let applied = match condition.and_then(|condition| condition.must) {
        None => true,
        Some(Must::Absent(_)) => before.is_none(),
        Some(Must::Present(_)) => before.is_some(),
        Some(Must::Value(value)) => before.as_ref().is_some_and(|(held, _)| *held == value),
        Some(Must::Version(version)) => before.as_ref().is_some_and(|(_, held)| *held == version),
    };
    match value {
        Some(value) if applied => drop(rows.insert(key.clone(), (value, index as u64))),
        None if applied => drop(rows.remove(&key)),
        _ => {}
    }
    let info = v1::WriteInfo {
        partition: 1,
        term: 1,
        log_index: index as u64,
        node: 1,
        session_token: token(index),
        ..Default::default()
    };
    v1::WriteReply {
        applied,
        version: index as u64,
        existed: before.is_some(),
        previous: before.map(|found| row(&key, &found)),
        info: Some(info),
        ..Default::default()
    }
}

fn token(index: usize) -> Bytes {
    SessionToken::of(PartitionId(1), Seen { index: index as u64, version: index as u64 }).encode()
}

fn row(key: &Bytes, (value, version): &(Bytes, u64)) -> v1::Row {
    v1::Row { key: key.clone(), value: value.clone(), version: *version }
}
