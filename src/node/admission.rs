//! What a node lets in: budgets of the writes that are not answered yet, by number, bytes and time, and of memory.
//!
//! A write takes its place when it is looked at and gives it back when it is answered. One that has no room is refused at
//! once, which costs little, so that what was let in is answered in time however much is asked for.
//!
//! Invariants:
//! * a write counts until it is answered or dropped, also when nobody waits for the answer any more;
//! * what only deletes counts and is never refused here, and reads never come here: whatever is full can be relieved. The
//!   partition's queue ([`super::partition::QUEUE_MAX`]) bounds it;
//! * one partition has half of the node's budgets at most: one that is stuck leaves room for the others;
//! * a refused write was never queued, so "not applied" is true;
//! * nothing but writes of clients comes here: what nodes tell each other is not refused.

use super::partition::QUEUE_MAX;
use crate::{
    error::{Error, Outcome, Reason},
    key::{NodeId, PartitionId},
    kv, telemetry,
};
use parking_lot::Mutex;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Writes of one partition that are let in and not answered; deletes find as much room again in its queue.
const PARTITION_WRITES_MAX: u64 = QUEUE_MAX as u64 / 2;
/// A write that would wait longer than this is refused: later answers come when the caller has asked again already.
const WAIT_MAX: Duration = Duration::from_millis(500);
/// While a node has let in so few writes, of so few bytes, none is refused for the time it waits: fewer would not be faster.
const UNHURRIED: Amount = Amount { writes: 256, bytes: 4 << 20 };
/// The same for the writes of one partition on a node that is busy.
const UNHURRIED_PARTITION_WRITES: u64 = 16;
/// Shortest and longest time after which whoever is refused is to try again.
const RETRY_MS: (u64, u64) = (10, 2_000);
/// The same when memory is full: somebody has to delete rows first.
const RETRY_MEMORY_MS: u32 = 2_000;
/// One in so many counts of what is new in the smoothed wait of a partition.
const SMOOTHING: u64 = 8;
/// Bytes that a row takes besides its key and its value, about.
const ROW_BYTES: u64 = 64;

/// How much a node lets in and holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budgets {
    /// Writes that are let in and not answered yet.
    pub writes_max: u64,
    /// Their bytes.
    pub bytes_max: u64,
    /// Bytes of rows and logs; none: no limit.
    pub memory_bytes_max: Option<u64>,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { writes_max: 65_536, bytes_max: 256 << 20, memory_bytes_max: None }
    }
}

/// Writes and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Amount {
    writes: u64,
    bytes: u64,
}

impl Amount {
    fn add(&mut self, more: Self) {
        self.writes += more.writes;
        self.bytes += more.bytes;
    }

    fn subtract(&mut self, less: Self) {
        self.writes -= less.writes;
        self.bytes -= less.bytes;
    }
}

/// What a node has let in.
#[derive(Debug)]
pub struct Admission {
    budgets: Budgets,
    used: Mutex<Amount>,
    memory: AtomicU64,
}

/// The writes of one partition that were let in, and how long the last ones had to wait.
#[derive(Debug)]
struct Line {
    used: Amount,
    /// Smoothed time from being let in to the answer.
    wait_us: u64,
    /// Smoothed number of writes that were let in when those came.
    length: u64,
    /// The last answer, or when the first write came.
    moved: Instant,
}

impl Line {
    /// How long a write that comes now would wait: as the last ones did, or less if fewer wait than did then.
    fn wait(&self) -> Duration {
        Duration::from_micros(self.wait_us.saturating_mul(self.used.writes.min(self.length)) / self.length.max(1))
    }

    fn enter(&mut self, more: Amount) {
        if self.used.writes == 0 {
            self.moved = Instant::now();
        }
        self.used.add(more);
    }

    fn leave(&mut self, less: Amount, waited: Duration, length: u64) {
        let smooth = |old: u64, new: u64| if old == 0 { new } else { old - old / SMOOTHING + new / SMOOTHING };
        self.wait_us = smooth(self.wait_us, waited.as_micros() as u64);
        self.length = smooth(self.length, length);
        self.used.subtract(less);
        self.moved = Instant::now();
    }
}

/// The line before one partition.
#[derive(Clone, Debug)]
pub(super) struct Entrance {
    id: PartitionId,
    admission: Arc<Admission>,
    line: Arc<Mutex<Line>>,
}

/// Writes of one partition that are let in together. They count until this is dropped.
#[derive(Debug)]
pub struct Ticket {
    entrance: Entrance,
    /// A member of the partition that can hold no more.
    full_member: Option<NodeId>,
    holds: Amount,
    length: u64,
    began: Instant,
    deadline: Instant,
}

/// Why there is no room.
#[derive(Debug)]
struct Refused {
    budget: &'static str,
    message: String,
    limit: u64,
    used: u64,
}

impl Admission {
    /// Nothing was let in yet.
    #[must_use]
    pub fn new(budgets: Budgets) -> Arc<Self> {
        Arc::new(Self { budgets, used: Mutex::default(), memory: AtomicU64::new(0) })
    }

    /// Takes note of what the node holds.
    pub(super) fn holds(&self, rows: u64, row_bytes: u64, log_bytes: u64) {
        let memory = row_bytes + rows * ROW_BYTES + log_bytes;
        self.memory.store(memory, Ordering::Relaxed);
        let Amount { writes, bytes } = *self.used.lock();
        metrics::gauge!(telemetry::ADMISSION_USED, "budget" => "node_writes").set(writes as f64);
        metrics::gauge!(telemetry::ADMISSION_USED, "budget" => "node_bytes").set(bytes as f64);
        metrics::gauge!(telemetry::ADMISSION_USED, "budget" => "memory").set(memory as f64);
        let Budgets { writes_max, bytes_max, memory_bytes_max } = self.budgets;
        metrics::gauge!(telemetry::ADMISSION_LIMIT, "budget" => "node_writes").set(writes_max as f64);
        metrics::gauge!(telemetry::ADMISSION_LIMIT, "budget" => "node_bytes").set(bytes_max as f64);
        metrics::gauge!(telemetry::ADMISSION_LIMIT, "budget" => "memory").set(memory_bytes_max.unwrap_or(0) as f64);
    }

    /// Whether the node holds as much as it may.
    pub(super) fn is_full(&self) -> bool {
        self.budgets.memory_bytes_max.is_some_and(|most| self.memory.load(Ordering::Relaxed) >= most)
    }

    /// The line before a partition.
    pub(super) fn entrance(self: &Arc<Self>, id: PartitionId) -> Entrance {
        let line = Line { used: Amount::default(), wait_us: 0, length: 0, moved: Instant::now() };
        Entrance { id, admission: Arc::clone(self), line: Arc::new(Mutex::new(line)) }
    }
}

impl Entrance {
    /// A ticket for writes that have to be answered by `deadline`.
    pub(super) fn ticket(&self, deadline: Instant, full_member: Option<NodeId>) -> Ticket {
        let (entrance, holds) = (self.clone(), Amount::default());
        Ticket { entrance, full_member, holds, length: 0, began: Instant::now(), deadline }
    }

    fn room(&self, node: Amount, line: &Line, more: u64, left: Duration) -> Result<(), Refused> {
        let Budgets { writes_max, bytes_max, .. } = self.admission.budgets;
        let id = self.id;
        let counted = [
            ("node_writes", node.writes, 1, writes_max),
            ("node_bytes", node.bytes, more, bytes_max),
            ("partition_writes", line.used.writes, 1, (writes_max / 2).min(PARTITION_WRITES_MAX)),
            ("partition_bytes", line.used.bytes, more, bytes_max / 2),
        ];
        if let Some((budget, used, _, limit)) = counted.into_iter().find(|(_, used, more, limit)| used + more > *limit)
        {
            let what = if budget.ends_with("writes") { "writes" } else { "bytes of writes" };
            let where_ = if budget.starts_with("node") { "on this node".to_owned() } else { format!("for {id}") };
            let message = format!("{used} {what} {where_} are not answered yet, and {limit} is the limit");
            return Err(Refused { budget, message, limit, used });
        }
        let at_rest = node.writes < UNHURRIED.writes && node.bytes < UNHURRIED.bytes;
        if at_rest || line.used.writes < UNHURRIED_PARTITION_WRITES {
            return Ok(());
        }
        let (wait, limit) = (line.wait(), WAIT_MAX.min(left / 2));
        if wait <= limit {
            return Ok(());
        }
        let (used, limit) = (wait.as_millis() as u64, limit.as_millis() as u64);
        let (budget, why) = match left / 2 < WAIT_MAX {
            true => ("deadline", "half of what is left of this one's deadline"),
            false => ("queue_time", "the limit"),
        };
        let message = format!("writes for {id} wait {used} ms at present, and {limit} ms is {why}");
        Err(Refused { budget, message, limit, used })
    }

    /// When it is worth trying again.
    fn retry_ms(line: &Line) -> u32 {
        let stuck = if line.used.writes == 0 { Duration::ZERO } else { line.moved.elapsed() };
        (line.wait().max(stuck).as_millis() as u64).clamp(RETRY_MS.0, RETRY_MS.1) as u32
    }
}

impl Ticket {
    /// When its writes have to be answered.
    pub(super) const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Lets one more write in.
    ///
    /// # Errors
    /// `MEMORY_FULL` or `OVERLOADED`, never for what only deletes: the write is not to be queued.
    pub fn take(&mut self, write: &kv::Write) -> Result<(), Error> {
        let adds = write.op.adds();
        if adds {
            self.has_memory()?;
        }
        let more = Amount { writes: 1, bytes: write.bytes_max() as u64 };
        let mut node = self.entrance.admission.used.lock();
        let mut line = self.entrance.line.lock();
        if adds {
            let left = self.deadline.saturating_duration_since(self.began);
            if let Err(refused) = self.entrance.room(*node, &line, more.bytes, left) {
                let retry_ms = Entrance::retry_ms(&line);
                drop((line, node));
                let advice = "send less at once or spread it over more nodes; deletes and reads go on";
                let message = format!("{}; try again in {retry_ms} ms, {advice}", refused.message);
                return Err(refused.error(Reason::Overloaded, message).retry_after(retry_ms));
            }
        }
        node.add(more);
        line.enter(more);
        self.length = line.used.writes;
        self.holds.add(more);
        Ok(())
    }

    fn has_memory(&self) -> Result<(), Error> {
        let admission = &self.entrance.admission;
        let limit = admission.budgets.memory_bytes_max.unwrap_or(u64::MAX);
        let used = admission.memory.load(Ordering::Relaxed);
        let advice = "delete rows, add nodes or raise memory.bytes_max; deletes and reads go on";
        let message = match self.full_member {
            _ if used >= limit => {
                format!("this node holds {used} bytes of rows and logs, and {limit} is its limit: {advice}")
            }
            Some(node) => format!("node {node}, a member of {}, holds as much as it may: {advice}", self.entrance.id),
            None => return Ok(()),
        };
        let refused = Refused { budget: "memory", message: String::new(), limit, used };
        Err(refused.error(Reason::MemoryFull, message).retry_after(RETRY_MEMORY_MS))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.holds.writes > 0 {
            self.entrance.admission.used.lock().subtract(self.holds);
            self.entrance.line.lock().leave(self.holds, self.began.elapsed(), self.length);
        }
    }
}

impl Refused {
    fn error(self, reason: Reason, message: String) -> Error {
        metrics::counter!(telemetry::ADMISSION_REJECTED_TOTAL, "budget" => self.budget).increment(1);
        let error = Error::new(reason, message).outcome(Outcome::NotApplied);
        error.with("budget", self.budget).with("limit", self.limit).with("used", self.used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use kv::{Action, Condition, Item, Op};

    fn item(action: Action) -> Item {
        Item { key: "a".into(), condition: Condition::Any, action, return_previous: false }
    }

    fn of(op: Op) -> kv::Write {
        kv::Write { session: None, op }
    }

    fn put(bytes: usize) -> kv::Write {
        of(Op::Single(item(Action::Put { value: Bytes::from(vec![0; bytes]) })))
    }

    fn delete() -> kv::Write {
        of(Op::Single(item(Action::Delete { must_exist: false })))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn budget(refused: &Error) -> &str {
        &refused.metadata.iter().find(|(name, _)| name == "budget").expect("every refusal names its budget").1
    }

    fn used(admission: &Admission) -> u64 {
        admission.used.lock().writes
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_has_its_place_until_its_ticket_is_dropped() {
        let admission = Admission::new(Budgets { writes_max: 6, ..Budgets::default() });
        let (one, two) = (admission.entrance(PartitionId(1)), admission.entrance(PartitionId(2)));
        let mut first = one.ticket(soon(), None);
        (0..3).for_each(|_| first.take(&put(1)).unwrap());
        let refused = first.take(&put(1)).unwrap_err();
        assert_eq!((refused.reason, refused.outcome), (Reason::Overloaded, Some(Outcome::NotApplied)));
        assert_eq!(budget(&refused), "partition_writes", "a partition has half of it");
        let mut second = two.ticket(soon(), None);
        (0..3).for_each(|_| second.take(&put(1)).unwrap());
        assert_eq!(budget(&second.take(&put(1)).unwrap_err()), "node_writes");
        assert_eq!(used(&admission), 6);
        drop(first);
        assert_eq!(used(&admission), 3);
        one.ticket(soon(), None).take(&put(1)).unwrap();
        drop(second);
        assert_eq!(*admission.used.lock(), Amount::default());
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_are_counted_and_what_only_deletes_is_never_refused() {
        let admission =
            Admission::new(Budgets { bytes_max: 20_000, memory_bytes_max: Some(1_000), ..Budgets::default() });
        let entrance = admission.entrance(PartitionId(1));
        let mut ticket = entrance.ticket(soon(), None);
        ticket.take(&put(9_000)).unwrap();
        assert_eq!(budget(&ticket.take(&put(9_000)).unwrap_err()), "partition_bytes");
        admission.holds(5, 680, 0);
        assert!(admission.is_full());
        let refused = ticket.take(&put(1)).unwrap_err();
        assert_eq!((refused.reason, refused.retry_after_ms), (Reason::MemoryFull, 2_000));
        assert!(refused.message.contains("1000 bytes of rows and logs"), "{refused}");
        let put_and_delete = vec![item(Action::Delete { must_exist: true }), item(Action::Increment { delta: 1 })];
        assert_eq!(ticket.take(&of(Op::Batch(put_and_delete))).unwrap_err().reason, Reason::MemoryFull);
        let all = Op::DeleteRange { span: crate::key::Span::all(), tokens: None };
        let relief = [delete(), of(Op::Batch(vec![item(Action::Delete { must_exist: true })])), of(all)];
        relief.iter().for_each(|write| ticket.take(write).unwrap());
        assert_eq!(used(&admission), 4, "it counts all the same");
        admission.holds(5, 679, 0);
        ticket.take(&put(1)).unwrap();
        let refused = entrance.ticket(soon(), Some(NodeId(3))).take(&put(1)).unwrap_err();
        assert!(refused.reason == Reason::MemoryFull && refused.message.starts_with("node n3, a member"), "{refused}");
    }

    /// Has `count` writes answered together after `wait`.
    async fn answered(entrance: &Entrance, count: u64, wait: Duration) {
        let mut ticket = entrance.ticket(soon(), None);
        (0..count).for_each(|_| ticket.take(&put(1)).unwrap());
        tokio::time::sleep(wait).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_would_wait_too_long_is_refused_until_the_line_is_shorter() {
        let entrance = Admission::new(Budgets::default()).entrance(PartitionId(1));
        answered(&entrance, 1_000, Duration::from_millis(800)).await;
        let mut line = entrance.ticket(soon(), None);
        // Nobody else waits: the first ones are not refused for what others had to wait.
        let fits = (0..1_000).take_while(|_| line.take(&put(1)).is_ok()).count();
        assert_eq!(fits, 626, "500 of 800 ms, and the one that reaches it");
        let refused = line.take(&put(1)).unwrap_err();
        assert_eq!((budget(&refused), refused.retry_after_ms), ("queue_time", 500), "{refused}");
        assert_eq!(
            budget(&entrance.ticket(Instant::now() + Duration::from_millis(900), None).take(&put(1)).unwrap_err()),
            "deadline"
        );
        line.take(&delete()).unwrap();
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(entrance.ticket(soon(), None).take(&put(1)).unwrap_err().retry_after_ms, 2_000, "it is stuck");
        drop(line);
        entrance.ticket(Instant::now() + Duration::from_millis(10), None).take(&put(1)).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_moves_again_is_thought_quick_again() {
        let entrance = Admission::new(Budgets::default()).entrance(PartitionId(1));
        answered(&entrance, 1_000, Duration::from_secs(2)).await;
        for _ in 0..30 {
            answered(&entrance, UNHURRIED.writes, Duration::from_millis(10)).await;
        }
        let mut line = entrance.ticket(soon(), None);
        (0..PARTITION_WRITES_MAX).for_each(|_| line.take(&put(1)).unwrap());
    }
}
