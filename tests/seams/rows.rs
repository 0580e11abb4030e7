//! Rows that are put one after the other, and scans that must find them: every row acknowledged before a scan began,
//! each once, in order, and none that was not begun.

use crate::{
    client::{Writer, scan},
    world::World,
};
use meridian::{env::spawn, error::Error};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{task::JoinHandle, time::sleep};

#[derive(Default)]
struct Facts {
    begun: AtomicU64,
    acked: AtomicU64,
    over: AtomicBool,
}

#[derive(Clone)]
pub(crate) struct Rows {
    world: World,
    keyspace: String,
    facts: Arc<Facts>,
}

/// Keys in another order than the one in which they are put.
fn key(i: u64) -> String {
    format!("{:03}-{i:04}", (i * 37) % 101)
}

impl Rows {
    pub(crate) fn new(world: &World, keyspace: &str) -> Self {
        Self { world: world.clone(), keyspace: keyspace.to_owned(), facts: Arc::default() }
    }

    pub(crate) fn spawn_writer(&self, pause: Duration) -> JoinHandle<()> {
        let rows = self.clone();
        spawn(async move {
            let mut writer = Writer::open(&rows.world, "rows").await;
            while !rows.facts.over.load(Ordering::Relaxed) {
                let i = rows.facts.begun.fetch_add(1, Ordering::Relaxed);
                let reply = writer.put(&rows.keyspace, &key(i), &i.to_string()).await;
                assert!(reply.applied && !reply.existed, "row {i} was put once: {reply:?}");
                rows.facts.acked.fetch_add(1, Ordering::Relaxed);
                sleep(pause).await;
            }
        })
    }

    pub(crate) fn spawn_scanner(&self, pause: Duration) -> JoinHandle<()> {
        let rows = self.clone();
        spawn(async move {
            while !rows.facts.over.load(Ordering::Relaxed) {
                let nodes = rows.world.all();
                let _failed = rows.check(nodes[rows.world.draw(nodes.len() as u64) as usize]).await;
                sleep(pause).await;
            }
        })
    }

    /// One scan of everything, checked.
    pub(crate) async fn check(&self, n: u64) -> Result<u64, Error> {
        let acked = self.facts.acked.load(Ordering::Relaxed);
        let found = scan(&self.world, n, &self.keyspace, 1 + self.world.draw(40) as u32).await;
        self.world.note(format_args!("scan via {n}: {:?}", found.as_ref().map(Vec::len)));
        let found = found?;
        let begun = self.facts.begun.load(Ordering::Relaxed);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let found: Vec<(String, String)> = found.iter().map(|row| (text(&row.key), text(&row.value))).collect();
        assert!(found.is_sorted_by(|a, b| a.0 < b.0), "in order, each once: {found:?}");
        let rows: Vec<u64> = found.iter().filter_map(|(_, value)| value.parse().ok()).collect();
        assert!(found.iter().zip(&rows).all(|((name, _), i)| *name == key(*i)), "{found:?}");
        assert!(rows.iter().all(|i| *i < begun), "{begun} were begun: {rows:?}");
        let missing = (0..acked).find(|i| !rows.contains(i));
        assert_eq!(missing, None, "{acked} were acknowledged before the scan through {n} began: {rows:?}");
        Ok(rows.len() as u64)
    }

    /// Tells the clients to stop, and waits for them; then every node finds every row.
    pub(crate) async fn finish(&self, clients: Vec<JoinHandle<()>>) {
        self.facts.over.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        for n in self.world.running() {
            assert_eq!(self.check(n).await.unwrap(), self.facts.acked.load(Ordering::Relaxed), "through node {n}");
        }
    }
}
