//! The tour of `meridian dev --demo`: write, read, range over partitions, lose a node, read on.
//!
//! Invariant: the tour checks what it shows: a wrong answer ends it with an error, so that its exit code means something.

use super::{
    cluster::holds,
    failure::Failure,
    options::{Format, Given, Level, Options},
    output::{Output, ReadView},
    remote::Remote,
};
use crate::{proto::v1, server::dev::DevCluster};
use anyhow::ensure;
use bytes::Bytes;
use std::time::Duration;
use tokio::time::Instant;

const KEYSPACE: &str = "fruit";
/// Longer than an election, so that the tour shows the failover as a pause and not as an error.
const DEADLINE_S: u64 = 10;
const ROWS: [(&str, &str); 12] = [
    ("apple", "red"),
    ("banana", "yellow"),
    ("cherry", "dark red"),
    ("date", "brown"),
    ("elderberry", "black"),
    ("fig", "purple"),
    ("grape", "green"),
    ("kiwi", "green"),
    ("lemon", "yellow"),
    ("mango", "orange"),
    ("orange", "orange"),
    ("plum", "blue"),
];

struct Tour<'a> {
    remote: Remote,
    output: &'a mut Output,
}

/// Shows the tour.
///
/// # Errors
/// When a step fails or answers wrongly.
pub async fn run(cluster: &mut DevCluster, output: &mut Output) -> Result<(), Failure> {
    let options = Options {
        endpoints: cluster.addresses(),
        keyspace: KEYSPACE.to_owned(),
        consistency: Level::Linearizable,
        deadline: Duration::from_secs(DEADLINE_S),
        output: Format::Table,
        hex: false,
        given: Given::default(),
    };
    let mut tour = Tour { remote: Remote::connect(&options).await?, output };
    tour.load().await?;
    tour.get("banana", &Level::Linearizable, "yellow").await?;
    tour.get("banana", &Level::Eventual, "yellow").await?;
    tour.range("cherry", "lemon", 7).await?;
    tour.lose_leader_of("banana", cluster).await?;
    tour.get("banana", &Level::Eventual, "yellow").await?;
    tour.get("banana", &Level::Linearizable, "yellow").await?;
    tour.put("quince", "golden").await?;
    tour.range("cherry", "quince", 11).await?;
    tour.say("That was: writes to a quorum, reads as fresh as asked for, ordered ranges, and a node lost without harm.")
}

impl Tour<'_> {
    fn say(&mut self, text: &str) -> Result<(), Failure> {
        self.output.line(text)?;
        self.output.flush()
    }

    async fn load(&mut self) -> Result<(), Failure> {
        self.say(
            "\n1. A keyspace of three partitions, cut at \"e\" and \"m\", each held by every node; twelve rows in it.",
        )?;
        let request = v1::CreateKeyspaceRequest {
            name: KEYSPACE.to_owned(),
            split_at: vec![Bytes::from_static(b"e"), Bytes::from_static(b"m")],
            ..Default::default()
        };
        let reply = self.remote.create_keyspace(request).await?;
        ensure_that(reply.keyspace.is_some_and(|keyspace| keyspace.partitions == 3), "three partitions")?;
        for (key, value) in ROWS {
            self.write(key, value).await?;
        }
        Ok(())
    }

    async fn write(&mut self, key: &'static str, value: &'static str) -> Result<v1::WriteReply, Failure> {
        let request = v1::PutRequest {
            keyspace: KEYSPACE.to_owned(),
            key: Bytes::from_static(key.as_bytes()),
            value: Bytes::from_static(value.as_bytes()),
            ..Default::default()
        };
        let reply = self.remote.put(request).await?;
        ensure_that(reply.applied, "the write is applied")?;
        Ok(reply)
    }

    async fn put(&mut self, key: &'static str, value: &'static str) -> Result<(), Failure> {
        let reply = self.write(key, value).await?;
        let info = reply.info.unwrap_or_default();
        self.say(&format!("   put {key} = {value}: acknowledged by n{} for p{}", info.node, info.partition))
    }

    async fn get(&mut self, key: &'static str, level: &Level, expected: &str) -> Result<(), Failure> {
        let request = v1::GetRequest {
            keyspace: KEYSPACE.to_owned(),
            key: Bytes::from_static(key.as_bytes()),
            options: Some(level.read_options()),
        };
        let began = Instant::now();
        let reply = self.remote.get(request).await?;
        let took_ms = began.elapsed().as_secs_f64() * 1_000.0;
        let value = reply.row.map(|row| row.value).unwrap_or_default();
        ensure_that(value == expected.as_bytes(), "the value that was written")?;
        let read = ReadView::from(&reply.read.unwrap_or_default());
        self.say(&format!("   get {key} = {expected}  ({took_ms:.1} ms) {}", read.sentence()))
    }

    async fn range(&mut self, from: &'static str, to: &'static str, rows: usize) -> Result<(), Failure> {
        let bound = |key: &'static str| Some(v1::Bound { key: Bytes::from_static(key.as_bytes()), inclusive: true });
        let request = v1::ScanRequest {
            keyspace: KEYSPACE.to_owned(),
            range: Some(v1::KeyRange { lower: bound(from), upper: bound(to) }),
            ..Default::default()
        };
        let page = self.remote.scan(request).await?;
        let keys: Vec<String> = page.rows.iter().map(|row| String::from_utf8_lossy(&row.key).into_owned()).collect();
        ensure_that(keys.len() == rows && keys.is_sorted(), "every key of the range, in order")?;
        let parts: Vec<String> =
            page.reads.iter().map(|read| format!("p{} by n{}", read.partition, read.node)).collect();
        self.say(&format!("   scan {from}..={to}: {}\n     from {}", keys.join(" "), parts.join(", ")))
    }

    async fn lose_leader_of(&mut self, key: &'static str, cluster: &mut DevCluster) -> Result<(), Failure> {
        let reply = self.remote.keyspace(KEYSPACE).await?;
        let settings = reply.keyspace.unwrap_or_default();
        let key_bytes = Bytes::from_static(key.as_bytes());
        let found = reply.partitions.into_iter().find(|partition| holds(&settings, partition, &key_bytes));
        let partition = found.unwrap_or_default();
        ensure_that(partition.leader != 0, "a leader that is known")?;
        self.say(&format!("\n2. n{} leads p{}, which holds {key}: it is killed now.", partition.leader, partition.id))?;
        let nodes = self.remote.nodes().await?;
        let leader = nodes.into_iter().filter_map(|status| status.node).find(|node| node.id == partition.leader);
        let address = leader.unwrap_or_default().address;
        let index = cluster.addresses().iter().position(|other| *other == address);
        ensure_that(index.is_some(), "the leader's address")?;
        index.into_iter().for_each(|index| cluster.kill(index));
        Ok(())
    }
}

fn ensure_that(holds: bool, expected: &str) -> Result<(), Failure> {
    let check = || -> anyhow::Result<()> {
        ensure!(holds, "the tour expected {expected}");
        Ok(())
    };
    Ok(check()?)
}
