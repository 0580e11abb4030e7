//! Meridian: three processes of this build (or of another binary), asked through the library and as plain gRPC.

use crate::{
    load::key_of,
    process::{Servers, free_addresses},
    system::{Aim, Channels, Cluster, Elections, Form, Leaders, Level, REPLICAS, System, ready},
};
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use meridian::{
    client::{Client, Consistency, Keyspace},
    proto::v1::{self, kv_client::KvClient},
};
use std::{
    ops::Range,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};
use tonic::transport::Channel;

/// Where all rows are.
pub(crate) const KEYSPACE: &str = "compare";
/// Rows of one page of a long scan.
const PAGE_ROWS: u32 = 10_000;

/// A follower campaigns when the lease, 550 ms, has ended, and 450 to 550 ms later.
const A_SECOND: [&str; 3] = ["raft.heartbeat_ms=100ms", "raft.election_min_ms=450ms", "raft.election_max_ms=550ms"];

pub(crate) async fn start(
    program: &Path,
    dir: &Path,
    (partitions, rows): (u64, u64),
    elections: Elections,
) -> anyhow::Result<Cluster> {
    let addresses = free_addresses(REPLICAS)?;
    let mut servers = Servers::default();
    for (index, address) in addresses.iter().enumerate() {
        let others: Vec<&str> = addresses.iter().filter(|other| *other != address).map(String::as_str).collect();
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MERIDIAN_")) {
            command.env_remove(name);
        }
        // As deploy/cluster.sh does: a thread for which there is no core only makes others wait.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        command.env("TOKIO_WORKER_THREADS", (cores / REPLICAS).max(1).to_string());
        command.args(["start", "--listen", address, "--http", "127.0.0.1:0", "--join", &others.join(",")]);
        command.arg("--data").arg(dir.join(format!("n{index}")));
        if elections == Elections::Equal {
            command.args(A_SECOND.iter().flat_map(|setting| ["--set", setting]));
        }
        servers.start(format!("n{index}"), dir, command)?;
    }
    let client = ready(&mut servers, async || connect(addresses.clone()).await).await?;
    client.admin().init(REPLICAS as u32).await.context("forming the cluster")?;
    ready(&mut servers, async || is_whole(&addresses).await).await?;
    let split_at = (1..partitions).map(|n| key_of(n * rows / partitions)).collect();
    let request = v1::CreateKeyspaceRequest {
        name: KEYSPACE.to_owned(),
        layout: v1::Layout::Ordered.into(),
        replicas: REPLICAS as u32,
        split_at,
        ..Default::default()
    };
    client.admin().create_keyspace(request).await.context("creating the keyspace")?;
    ready(&mut servers, async || {
        let partitions = client.admin().partitions(KEYSPACE).await?.partitions;
        ensure!(partitions.iter().all(|partition| partition.leader != 0), "a partition has no leader");
        Ok(())
    })
    .await?;
    Ok(Cluster { system: System::Meridian, servers, addresses })
}

/// Fails unless every node is alive and every partition complete, as each node sees it.
pub(crate) async fn is_whole(addresses: &[String]) -> anyhow::Result<()> {
    for address in addresses {
        let status = connect(vec![address.clone()]).await?.admin().status().await?;
        let alive = status.nodes.iter().filter(|node| node.alive).count();
        ensure!(status.healthy && alive == REPLICAS, "{alive} nodes are alive; {:?}", status.problems);
    }
    Ok(())
}

pub(crate) async fn connect(addresses: Vec<String>) -> anyhow::Result<Client> {
    Ok(Client::connect(addresses).await?)
}

/// Who leads what, as the nodes say.
pub(crate) async fn leaders(channels: &Channels) -> anyhow::Result<Leaders> {
    let admin = connect(channels.addresses.clone()).await?.admin();
    let nodes = admin.nodes().await?;
    let mut intervals = Vec::new();
    for partition in admin.partitions(KEYSPACE).await?.partitions {
        let leader = nodes.iter().filter_map(|status| status.node.as_ref()).find(|node| node.id == partition.leader);
        let index = leader.and_then(|node| channels.addresses.iter().position(|address| *address == node.address));
        intervals.push((partition.start, index.context("a partition has no leader")?));
    }
    Ok(Leaders { intervals })
}

pub(crate) async fn get(keyspace: &Keyspace, key: Bytes, level: Level) -> anyhow::Result<bool> {
    let consistency = match level {
        Level::Linearizable => Consistency::Linearizable,
        Level::Lease => Consistency::Lease,
        Level::Eventual => Consistency::Eventual,
    };
    Ok(keyspace.get(key).consistency(consistency).await?.is_some())
}

pub(crate) async fn scan(
    keyspace: &Keyspace,
    form: Form,
    (from, to): (Bytes, Bytes),
    limit: u32,
) -> anyhow::Result<u64> {
    if form == Form::Count {
        return Ok(keyspace.count(from..to).await?);
    }
    let scan = keyspace.scan(from..to).limit(limit.into()).page_rows(limit);
    let rows = match form {
        Form::Reverse => scan.reverse().await?,
        Form::Keys => scan.keys_only().await?,
        Form::Rows | Form::Count => scan.await?,
    };
    Ok(rows.len() as u64)
}

pub(crate) async fn scan_long(keyspace: &Keyspace, numbers: Range<u64>, seen: &AtomicU64) -> anyhow::Result<()> {
    let mut pages = keyspace.scan(key_of(numbers.start)..key_of(numbers.end)).page_rows(PAGE_ROWS).pages();
    while let Some(page) = pages.try_next().await? {
        seen.fetch_add(page.rows.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

pub(crate) async fn put_many(keyspace: &Keyspace, rows: Vec<(Bytes, Bytes)>) -> anyhow::Result<()> {
    let batch = rows.into_iter().fold(keyspace.batch(), |batch, (key, value)| batch.put(key, value));
    for item in batch.await?.items {
        item?;
    }
    Ok(())
}

/// A caller of plain gRPC.
pub(crate) struct Unary {
    nodes: Vec<KvClient<Channel>>,
    pub(crate) aim: Aim,
}

impl Unary {
    pub(crate) fn new(channels: &Channels, client: usize) -> Self {
        let nodes = channels.of(client).into_iter().map(KvClient::new).collect();
        Self { nodes, aim: Aim::new(channels, client) }
    }

    fn node(&mut self, key: &[u8], level: Level) -> &mut KvClient<Channel> {
        let index = self.aim.at(key, level);
        &mut self.nodes[index]
    }

    pub(crate) async fn put(&mut self, key: Bytes, value: Bytes) -> anyhow::Result<()> {
        let node = self.node(&key, Level::Linearizable);
        let request = v1::PutRequest { keyspace: KEYSPACE.to_owned(), key, value, ..Default::default() };
        let reply = node.put(request).await?.into_inner();
        ensure!(reply.applied, "the put was not applied");
        Ok(())
    }

    pub(crate) async fn get(&mut self, key: Bytes, level: Level) -> anyhow::Result<bool> {
        let node = self.node(&key, level);
        let consistency = match level {
            Level::Linearizable => v1::Consistency::Linearizable,
            Level::Lease => v1::Consistency::Lease,
            Level::Eventual => v1::Consistency::Eventual,
        };
        let options = Some(v1::ReadOptions { consistency: consistency.into(), ..Default::default() });
        let request = v1::GetRequest { keyspace: KEYSPACE.to_owned(), key, options };
        Ok(node.get(request).await?.into_inner().found)
    }

    pub(crate) async fn scan(&mut self, form: Form, (from, to): (Bytes, Bytes), limit: u32) -> anyhow::Result<u64> {
        let node = self.node(&from, Level::Linearizable);
        let request = range(from, to);
        if form == Form::Count {
            let (keyspace, range) = (request.keyspace, request.range);
            let count = node.count(v1::CountRequest { keyspace, range, ..Default::default() }).await?;
            return Ok(count.into_inner().count);
        }
        let order = if form == Form::Reverse { v1::Order::Descending } else { v1::Order::Ascending };
        let keys_only = form == Form::Keys;
        let (limit, page_rows) = (Some(limit.into()), limit);
        let mut request = v1::ScanRequest { limit, page_rows, keys_only, order: order.into(), ..request };
        let mut rows = 0;
        loop {
            let page = node.scan(request.clone()).await?.into_inner();
            rows += page.rows.len() as u64;
            if page.next_page_token.is_empty() {
                return Ok(rows);
            }
            request.page_token = page.next_page_token;
        }
    }

    pub(crate) async fn scan_long(&mut self, numbers: Range<u64>, seen: &AtomicU64) -> anyhow::Result<()> {
        let range = range(key_of(numbers.start), key_of(numbers.end));
        let request = v1::ScanRequest { page_rows: PAGE_ROWS, ..range };
        let mut pages = self.node(&[], Level::Linearizable).scan_stream(request).await?.into_inner();
        while let Some(page) = pages.message().await? {
            seen.fetch_add(page.rows.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A scan of this range, linearizable.
fn range(from: Bytes, to: Bytes) -> v1::ScanRequest {
    let lower = Some(v1::Bound { key: from, inclusive: true });
    let upper = Some(v1::Bound { key: to, inclusive: false });
    let range = Some(v1::KeyRange { lower, upper });
    v1::ScanRequest { keyspace: KEYSPACE.to_owned(), range, ..Default::default() }
}
