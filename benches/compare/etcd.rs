//! etcd: three processes, asked by unary gRPC calls with the few messages that are needed, written by hand.

use crate::{
    load::key_of,
    process::{Servers, free_addresses},
    system::{Aim, Channels, Cluster, Form, Leaders, Level, REPLICAS, System, ready},
};
use anyhow::{Context as _, ensure};
use bytes::Bytes;
use std::{
    ops::Range,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};
use tonic::{client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;

/// Larger than its default of 2 GiB: it keeps every value that was ever written.
const QUOTA_BYTES: u64 = 16 << 30;
/// Rows of one request of a long scan.
const PAGE_ROWS: usize = 10_000;
/// Requests in one transaction, its default limit.
const TXN_OPS_MAX: usize = 128;

#[derive(Clone, PartialEq, prost::Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    range_end: Bytes,
    #[prost(int64, tag = "3")]
    limit: i64,
    /// 2 is descending, by key if nothing else is said.
    #[prost(int32, tag = "5")]
    sort_order: i32,
    #[prost(bool, tag = "7")]
    serializable: bool,
    #[prost(bool, tag = "8")]
    keys_only: bool,
    #[prost(bool, tag = "9")]
    count_only: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
    #[prost(int64, tag = "4")]
    count: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(bytes = "bytes", tag = "5")]
    value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
    #[prost(int64, tag = "3")]
    revision: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TxnRequest {
    #[prost(message, repeated, tag = "2")]
    success: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RequestOp {
    #[prost(message, optional, tag = "2")]
    put: Option<PutRequest>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TxnResponse {
    #[prost(bool, tag = "2")]
    succeeded: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

pub(crate) async fn start(program: &Path, dir: &Path) -> anyhow::Result<Cluster> {
    let (addresses, peers) = (free_addresses(REPLICAS)?, free_addresses(REPLICAS)?);
    let members: Vec<String> =
        peers.iter().enumerate().map(|(index, peer)| format!("n{index}=http://{peer}")).collect();
    let mut servers = Servers::default();
    for (index, (address, peer)) in addresses.iter().zip(&peers).enumerate() {
        let (client, peer) = (format!("http://{address}"), format!("http://{peer}"));
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ETCD_")) {
            command.env_remove(name);
        }
        command.args(["--name", &format!("n{index}"), "--log-level", "warn"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &members.join(","), "--initial-cluster-state", "new"]);
        command.args(["--quota-backend-bytes", &QUOTA_BYTES.to_string()]);
        command.arg("--data-dir").arg(dir.join(format!("n{index}")));
        servers.start(format!("n{index}"), dir, command)?;
    }
    let channels = Channels::new(&addresses)?;
    ready(&mut servers, async || leaders(&channels).await).await?;
    Ok(Cluster { system: System::Etcd, servers, addresses })
}

/// Who leads, when all nodes agree.
pub(crate) async fn leaders(channels: &Channels) -> anyhow::Result<Leaders> {
    let mut found = None;
    for (index, channel) in channels.of(0).into_iter().enumerate() {
        let request = StatusRequest {};
        let status: StatusResponse = call(&mut Grpc::new(channel), "/etcdserverpb.Maintenance/Status", request).await?;
        let member = status.header.context("a status without its header")?.member_id;
        ensure!(status.leader != 0, "there is no leader");
        if status.leader == member {
            found = Some(index);
        }
    }
    Ok(Leaders { intervals: vec![(Bytes::new(), found.context("no node leads")?)] })
}

async fn call<Q, R>(grpc: &mut Grpc<Channel>, path: &'static str, request: Q) -> anyhow::Result<R>
where
    Q: prost::Message + 'static,
    R: prost::Message + Default + 'static,
{
    grpc.ready().await?;
    let codec = ProstCodec::default();
    Ok(grpc.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await?.into_inner())
}

/// A caller of plain gRPC.
pub(crate) struct Unary {
    nodes: Vec<Grpc<Channel>>,
    pub(crate) aim: Aim,
}

impl Unary {
    pub(crate) fn new(channels: &Channels, client: usize) -> Self {
        let nodes = channels.of(client).into_iter().map(Grpc::new).collect();
        Self { nodes, aim: Aim::new(channels, client) }
    }

    fn node(&mut self, level: Level) -> &mut Grpc<Channel> {
        let index = self.aim.at(&[], level);
        &mut self.nodes[index]
    }

    pub(crate) async fn put(&mut self, key: Bytes, value: Bytes) -> anyhow::Result<()> {
        let node = self.node(Level::Linearizable);
        let _done: PutResponse = call(node, "/etcdserverpb.KV/Put", PutRequest { key, value }).await?;
        Ok(())
    }

    pub(crate) async fn get(&mut self, key: Bytes, level: Level) -> anyhow::Result<bool> {
        let serializable = level == Level::Eventual;
        let request = RangeRequest { key, serializable, ..Default::default() };
        let found: RangeResponse = call(self.node(level), "/etcdserverpb.KV/Range", request).await?;
        Ok(!found.kvs.is_empty())
    }

    pub(crate) async fn scan(&mut self, form: Form, (from, to): (Bytes, Bytes), limit: u32) -> anyhow::Result<u64> {
        let request = RangeRequest {
            key: from,
            range_end: to,
            limit: limit.into(),
            sort_order: if form == Form::Reverse { 2 } else { 0 },
            keys_only: form == Form::Keys,
            count_only: form == Form::Count,
            serializable: false,
        };
        let found: RangeResponse = call(self.node(Level::Linearizable), "/etcdserverpb.KV/Range", request).await?;
        Ok(if form == Form::Count { found.count.unsigned_abs() } else { found.kvs.len() as u64 })
    }

    pub(crate) async fn scan_long(&mut self, numbers: Range<u64>, seen: &AtomicU64) -> anyhow::Result<()> {
        for from in numbers.clone().step_by(PAGE_ROWS) {
            let to = (from + PAGE_ROWS as u64).min(numbers.end);
            let page = self.scan(Form::Rows, (key_of(from), key_of(to)), PAGE_ROWS as u32).await?;
            seen.fetch_add(page, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(crate) async fn put_many(&mut self, rows: Vec<(Bytes, Bytes)>) -> anyhow::Result<()> {
        for rows in rows.chunks(TXN_OPS_MAX) {
            let put = |(key, value): &(Bytes, Bytes)| Some(PutRequest { key: key.clone(), value: value.clone() });
            let request = TxnRequest { success: rows.iter().map(|row| RequestOp { put: put(row) }).collect() };
            let done: TxnResponse = call(self.node(Level::Linearizable), "/etcdserverpb.KV/Txn", request).await?;
            ensure!(done.succeeded, "the transaction did not succeed");
        }
        Ok(())
    }
}
