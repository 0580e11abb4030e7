//! One register, one writer, many readers, and what must hold between them.
//!
//! The writer increments: the n-th increment answers n, whatever was repeated, so nothing is lost and nothing is applied
//! twice. A strong read returns at least what was acknowledged, or seen by another strong read, before it began, and at
//! most what was begun when it ended: with a single writer that is linearizability. A weaker read is held to what it
//! claims.

use crate::{
    client::{DEADLINE, Level, Writer, get},
    world::World,
};
use bytes::Bytes;
use meridian::{env::spawn, error::Error, proto::v1};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};

#[derive(Default)]
struct Facts {
    /// Begun increments.
    begun: i64,
    /// Acknowledged increments: when, and the session token of each.
    acked: Vec<(Instant, Bytes)>,
    /// The most that a finished strong read returned.
    seen: i64,
    version: u64,
    strong_reads: u64,
    weak_reads: u64,
}

impl Facts {
    fn acked_before(&self, at: Instant) -> i64 {
        self.acked.iter().take_while(|(when, _)| *when < at).count() as i64
    }
}

/// The register.
#[derive(Clone)]
pub(crate) struct Register {
    world: World,
    keyspace: String,
    key: String,
    facts: Arc<Mutex<Facts>>,
    over: Arc<AtomicBool>,
}

/// How much was done.
#[derive(Debug)]
pub(crate) struct Sum {
    pub(crate) acked: i64,
    pub(crate) strong_reads: u64,
    pub(crate) weak_reads: u64,
}

impl Register {
    pub(crate) fn new(world: &World, keyspace: &str, key: &str) -> Self {
        Self {
            world: world.clone(),
            keyspace: keyspace.to_owned(),
            key: key.to_owned(),
            facts: Arc::default(),
            over: Arc::default(),
        }
    }

    /// Writes until told to stop.
    pub(crate) fn spawn_writer(&self, pause: Duration) -> JoinHandle<()> {
        let register = self.clone();
        spawn(async move {
            let mut writer = Writer::open(&register.world, &register.key).await;
            while !register.over.load(Ordering::Relaxed) {
                register.write(&mut writer).await;
                sleep(pause).await;
            }
        })
    }

    /// Reads through any node, or always the same, until told to stop. Reads that fail prove nothing.
    pub(crate) fn spawn_reader(&self, via: Option<u64>, pause: Duration) -> JoinHandle<()> {
        let register = self.clone();
        spawn(async move {
            while !register.over.load(Ordering::Relaxed) {
                let nodes = register.world.all();
                let n = via.unwrap_or_else(|| nodes[register.world.draw(nodes.len() as u64) as usize]);
                let level = register.draw_level();
                let _failed = register.read(n, &level).await;
                sleep(pause).await;
            }
        })
    }

    fn draw_level(&self) -> Level {
        match self.world.draw(8) {
            0..=2 => Level::Linearizable,
            3 | 4 => Level::Lease,
            5 => Level::Bounded(Duration::from_millis(1 + self.world.draw(500))),
            6 => Level::Session(
                self.facts.lock().unwrap().acked.last().map(|(_, token)| token.clone()).unwrap_or_default(),
            ),
            _ => Level::Eventual,
        }
    }

    /// One increment, repeated until it is acknowledged.
    pub(crate) async fn write(&self, writer: &mut Writer) {
        let expected = {
            let mut facts = self.facts.lock().unwrap();
            facts.begun += 1;
            facts.begun
        };
        let op = writer.increment(&self.keyspace, &self.key);
        let reply = writer.settle(op).await;
        let mut facts = self.facts.lock().unwrap();
        assert_eq!(reply.number, Some(expected), "{}: lost or applied twice: {reply:?}", self.key);
        assert!(reply.version > facts.version, "{}: versions go up: {reply:?} after {}", self.key, facts.version);
        facts.version = reply.version;
        facts.acked.push((Instant::now(), reply.info.unwrap().session_token));
    }

    /// One read, checked.
    pub(crate) async fn read(&self, n: u64, level: &Level) -> Result<i64, Error> {
        let began = Instant::now();
        let floor = {
            let facts = self.facts.lock().unwrap();
            let acked = facts.acked.len() as i64;
            match level {
                Level::Linearizable | Level::Lease => acked.max(facts.seen),
                Level::Bounded(bound) => facts.acked_before(began.checked_sub(*bound).unwrap()),
                Level::Session(token) if token.is_empty() => 0,
                Level::Session(token) => facts.acked.iter().position(|(_, of)| of == token).unwrap() as i64 + 1,
                Level::Eventual => 0,
            }
        };
        let reply = get(&self.world, n, &self.keyspace, &self.key, level, DEADLINE).await;
        self.world.note(format_args!("{} read {level:?} via {n}: {reply:?}", self.key));
        let reply = reply?;
        let value = reply.row.as_ref().map_or(0, |row| std::str::from_utf8(&row.value).unwrap().parse().unwrap());
        let mut facts = self.facts.lock().unwrap();
        let what = format!("{} via {n} at {:?} read {value}: {reply:?}", self.key, self.world.trace().now());
        assert!(value >= floor, "stale: at least {floor} was due. {what}");
        assert!(value <= facts.begun, "from nowhere: {} were begun. {what}", facts.begun);
        let read = reply.read.unwrap();
        if let Some(v1::staleness::Known::AtMostUs(us)) = read.staleness.and_then(|staleness| staleness.known) {
            let known = facts.acked_before(began.checked_sub(Duration::from_micros(us)).unwrap());
            assert!(value >= known, "staler than it says: {known} was due. {what}");
        }
        if matches!(level, Level::Linearizable | Level::Lease) {
            facts.seen = facts.seen.max(value);
            facts.strong_reads += 1;
        } else {
            facts.weak_reads += 1;
        }
        Ok(value)
    }

    /// Acknowledged so far.
    pub(crate) fn acked(&self) -> i64 {
        self.facts.lock().unwrap().acked.len() as i64
    }

    /// Tells writers and readers to stop, and waits for them: in a sound cluster they can. Then every node must return
    /// exactly what was acknowledged.
    pub(crate) async fn finish(&self, clients: Vec<JoinHandle<()>>) -> Sum {
        self.over.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        let acked = self.acked();
        for n in self.world.running() {
            assert_eq!(self.read(n, &Level::Linearizable).await.unwrap(), acked, "through node {n}");
        }
        let facts = self.facts.lock().unwrap();
        let Facts { strong_reads, weak_reads, .. } = *facts;
        Sum { acked, strong_reads, weak_reads }
    }
}
