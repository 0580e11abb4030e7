//! What the driver's leader is told of loads and remembers of its decisions, and how any node asks it for both.
//!
//! Soft state: a report that is lost is followed by the next, and a new leader of the driver begins with nothing.

use super::{DriverMachine, Node};
use crate::{
    key::{DRIVER, NodeId, PartitionId},
    placement::{
        Loads, PartitionLoad,
        journal::{Entry, Journal, Question, Told},
        sizing::{SAMPLES_MAX, Sizing},
        uniting::Uniting,
    },
    raft::Group,
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    sync::{
        Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often a node tells of the partitions that it leads.
pub(super) const REPORT_EVERY: Duration = Duration::from_secs(2);
/// Partitions in one report.
const LOADS_PER_REPORT_MAX: usize = 4_096;
/// Patience with the driver's leader when it is asked.
const ASK_DEADLINE: Duration = Duration::from_millis(1_000);

/// One request in so many says which key it was for. A prime: what repeats after a round number of requests is not missed.
const SAMPLE_EVERY: u64 = 17;

/// What was asked of a partition here since that was last told, and for which keys.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    bytes: AtomicU64,
    /// Requests until the next one that is noted.
    unnoted: AtomicU64,
    /// The first keys of some of the latest requests, the oldest first.
    keys: Mutex<VecDeque<Bytes>>,
}

impl Counters {
    /// Counts a request for this key, and perhaps others behind it, that read so many bytes.
    pub fn read(&self, key: &Bytes, bytes: u64) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.note(key, bytes);
    }

    /// Counts a request for this key, and perhaps others behind it, that writes so many bytes.
    pub fn write(&self, key: &Bytes, bytes: u64) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.note(key, bytes);
    }

    fn note(&self, key: &Bytes, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if !self.unnoted.fetch_add(1, Ordering::Relaxed).is_multiple_of(SAMPLE_EVERY) {
            return;
        }
        let mut keys = self.keys.lock();
        if keys.len() >= SAMPLES_MAX {
            keys.pop_front();
        }
        // Not a part of the frame that it came with, which would stay as long.
        keys.push_back(Bytes::copy_from_slice(key));
    }

    /// The keys that were noted, the oldest first.
    pub(super) fn sampled(&self) -> Vec<Bytes> {
        self.keys.lock().iter().cloned().collect()
    }

    /// Reads, writes and bytes per second over `elapsed`; counting starts again.
    fn take(&self, elapsed: Duration) -> [u32; 3] {
        let elapsed_ms = elapsed.as_millis().max(1) as u64;
        [&self.reads, &self.writes, &self.bytes].map(|counter| {
            let per_s = counter.swap(0, Ordering::Relaxed).saturating_mul(1_000) / elapsed_ms;
            u32::try_from(per_s).unwrap_or(u32::MAX)
        })
    }
}

/// What the driver's leader knows beyond its log.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) loads: Loads,
    pub(super) journal: Journal,
    pub(super) sizing: Sizing,
    pub(super) uniting: Uniting,
    began: Instant,
}

impl Observed {
    /// Nothing yet; partitions are cut from so many bytes on, and merged after having been small and idle for so long.
    pub(super) fn new(split_bytes: u64, merge_after: Duration) -> Self {
        let (loads, journal) = (Loads::default(), Journal::default());
        let uniting = Uniting::new(split_bytes, merge_after.as_millis() as u64);
        Self { loads, journal, sizing: Sizing::new(split_bytes), uniting, began: Instant::now() }
    }

    /// Time for those parts that see no clock.
    pub(super) fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// `kept` are the decisions that the driver's state tells of.
    fn answer(&self, question: &Question, kept: Vec<Entry>) -> Told {
        let load = |id: &PartitionId| Some((*id, *self.loads.0.get(id)?));
        Told {
            loads: question.loads_of.iter().filter_map(load).collect(),
            entries: question.why.map(|id| self.journal.with(id, kept)).unwrap_or_default(),
        }
    }
}

/// Takes reports of loads, and answers questions about them and about decisions, while this node leads the driver.
pub(super) struct ObservedService(pub(super) Weak<Node>, pub(super) Kind);

impl Service for ObservedService {
    fn handle(&self, from: NodeId, body: Bytes, reply: Reply) {
        let Some(node) = self.0.upgrade() else { return };
        // Silence: whoever asks finds another leader, or says that there is none.
        if !node.leads_driver() {
            return;
        }
        if self.1 == Kind::Load {
            match Loads::decode(&body) {
                Ok(report) => node.take_loads(&report),
                Err(error) => tracing::error!(%from, %error, "an unreadable report of loads"),
            }
            return;
        }
        match Question::decode(&body) {
            Ok(question) => reply.send(node.answer(&question).encode()),
            Err(error) => tracing::error!(%from, %error, "an unreadable question"),
        }
    }
}

/// Tells the driver's leader of the partitions led here, again and again.
pub(super) async fn report(node: Weak<Node>) {
    let mut ticks = interval(REPORT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    let mut cpu_last = node.upgrade().map_or(Duration::ZERO, |this| this.clock().cpu());
    loop {
        let now = ticks.tick().await;
        let Some(this) = node.upgrade() else { return };
        let elapsed = now.duration_since(last);
        let loads = this.loads_led(elapsed);
        let cpu = this.clock().cpu();
        this.cores_used_milli.store(cores_milli(cpu.saturating_sub(cpu_last), elapsed), Ordering::Relaxed);
        (last, cpu_last) = (now, cpu);
        let Some(leader) = this.routing.leader(DRIVER) else { continue };
        let map = this.routing.map();
        // Of partitions that are no more nobody tells anything again.
        this.observed.lock().loads.0.retain(|id, _| map.partition(*id).is_some());
        for chunk in loads.chunks(LOADS_PER_REPORT_MAX) {
            let report = Loads(chunk.iter().copied().collect());
            if leader.node == this.id() {
                this.take_loads(&report);
            } else {
                // A lost report is followed by the next.
                let _lost = this.endpoint.cast(leader.node, Kind::Load, report.encode());
            }
        }
    }
}

/// Thousandths of a core that were in use over `elapsed`.
fn cores_milli(cpu: Duration, elapsed: Duration) -> u64 {
    (cpu.as_micros() * 1_000 / elapsed.as_micros().max(1)) as u64
}

impl Node {
    /// Cores that the process of this node used lately, over as long as a report of loads covers.
    pub(super) fn cores_used(&self) -> f64 {
        self.cores_used_milli.load(Ordering::Relaxed) as f64 / 1e3
    }

    fn leads_driver(&self) -> bool {
        self.driver_group().is_some_and(|group| group.is_leader())
    }

    fn answer(&self, question: &Question) -> Told {
        let recoveries =
            |group: Group<DriverMachine>| group.read(|m, _| question.why.map(|id| m.state().recoveries_of(id)));
        let kept = self.driver_group().and_then(recoveries).unwrap_or_default();
        self.observed.lock().answer(question, kept)
    }

    fn take_loads(&self, report: &Loads) {
        self.observed.lock().loads.take(report, REPORT_EVERY.as_millis() as u64);
    }

    /// The loads of the partitions led here over the last `elapsed`. Those of others start again, too: a new leader
    /// tells of its own time.
    fn loads_led(&self, elapsed: Duration) -> Vec<(PartitionId, PartitionLoad)> {
        let mut loads = Vec::new();
        for partition in self.partitions() {
            let [reads_per_s, writes_per_s, traffic_per_s] = partition.counters().take(elapsed);
            if partition.group().is_leader() {
                let (bytes, rows) = partition.group().read(|m, _| (m.store().bytes(), m.store().rows()));
                let load = PartitionLoad { bytes, rows, reads_per_s, writes_per_s, traffic_per_s };
                loads.push((partition.id, load));
            }
        }
        loads
    }

    /// Asks the driver's leader, wherever it is; none if it does not answer.
    pub async fn ask_driver(&self, question: &Question) -> Option<Told> {
        let leader = self.routing.leader(DRIVER)?;
        if leader.node == self.id() {
            return self.leads_driver().then(|| self.answer(question));
        }
        let answer = self.endpoint.call(leader.node, Kind::Ask, question.encode(), ASK_DEADLINE).await.ok()?;
        Told::decode(&answer).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_rates_and_start_again() {
        let (counters, key) = (Counters::default(), Bytes::new());
        (0..30).for_each(|_| counters.read(&key, 100));
        (0..10).for_each(|_| counters.write(&key, 50));
        assert_eq!(counters.take(Duration::from_secs(2)), [15, 5, 1_750]);
        assert_eq!(counters.take(Duration::from_secs(2)), [0, 0, 0]);
        counters.write(&key, u64::MAX);
        assert_eq!(counters.take(Duration::ZERO)[2], u32::MAX);
    }

    #[test]
    fn cpu_time_is_told_in_thousandths_of_a_core() {
        assert_eq!(cores_milli(Duration::from_millis(2_500), Duration::from_secs(2)), 1_250);
        assert_eq!(cores_milli(Duration::ZERO, Duration::ZERO), 0);
    }

    #[test]
    fn the_latest_of_some_requests_say_which_keys_they_were_for() {
        let counters = Counters::default();
        let many = SAMPLE_EVERY * (SAMPLES_MAX as u64 + 2);
        (0..many).for_each(|i| counters.read(&Bytes::copy_from_slice(&i.to_be_bytes()), 0));
        let sampled = counters.sampled();
        let expected = (2..SAMPLES_MAX as u64 + 2).map(|i| Bytes::copy_from_slice(&(i * SAMPLE_EVERY).to_be_bytes()));
        assert_eq!(sampled, expected.collect::<Vec<_>>());
    }
}
