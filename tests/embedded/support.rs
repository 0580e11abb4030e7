//! A cluster with clients, and bounded patience.

use bytes::Bytes;
use meridian::{
    client::{Client, Reason},
    key::PartitionId,
    node::config::NodeConfig,
    proto::{
        batch::{Replies, Requests},
        error_of, v1,
    },
    server::dev::{DevCluster, DevConfig},
    telemetry::{LogFormat, install_logs},
};
use std::{collections::BTreeMap, time::Duration};
use tempfile::TempDir;
use tokio::{
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};
use v1::{admin_client::AdminClient, kv_client::KvClient, reply, request, topology_client::TopologyClient};

/// How long a test waits for what has to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

static MACHINE: RwLock<()> = RwLock::const_new(());

/// A turn beside other tests.
pub(crate) async fn shared() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().await
}

/// A turn with no other test of this binary running.
pub(crate) async fn alone() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().await
}

/// Waits until something is there.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the partition has so many replicas on nodes that run, and all have applied the same and are equal.
pub(crate) async fn equal_digests(cluster: &Cluster, partition: u64, replicas: usize) {
    eventually("equal replicas", async || {
        let held: Vec<(u64, u64)> = cluster
            .living()
            .into_iter()
            .filter_map(|index| cluster.dev.node(index)?.node()?.partition(PartitionId(partition)))
            .map(|held| held.group().read(|machine, at| (at.index, machine.store().digest())))
            .collect();
        (held.len() == replicas && held.iter().all(|one| *one == held[0])).then_some(())
    })
    .await;
}

/// A cluster.
pub(crate) struct Cluster {
    pub(crate) dev: DevCluster,
    /// Ids of the nodes as they started.
    ids: Vec<u64>,
    _data: Option<TempDir>,
}

impl Cluster {
    /// Nodes that keep everything in memory.
    pub(crate) async fn start(nodes: usize, replicas: u32) -> Self {
        Self::new(nodes, replicas, None, NodeConfig::default()).await
    }

    /// Nodes with data directories.
    pub(crate) async fn on_disk(nodes: usize, replicas: u32) -> Self {
        Self::on_disk_with(nodes, replicas, NodeConfig::default()).await
    }

    /// Nodes with data directories and these settings.
    pub(crate) async fn on_disk_with(nodes: usize, replicas: u32, template: NodeConfig) -> Self {
        Self::new(nodes, replicas, Some(TempDir::new().unwrap()), template).await
    }

    async fn new(nodes: usize, replicas: u32, data: Option<TempDir>, template: NodeConfig) -> Self {
        install_logs(&std::env::var("RUST_LOG").unwrap_or_else(|_| "error".to_owned()), LogFormat::Text);
        let folder = data.as_ref().map(|data| data.path().to_owned());
        let config = DevConfig { nodes, replicas, data: folder, template, ..DevConfig::default() };
        let dev = DevCluster::start(config).await.unwrap();
        let ids = (0..nodes).map(|index| dev.node(index).unwrap().node().unwrap().id().0).collect();
        Self { dev, ids, _data: data }
    }

    /// The library, connected to every node that runs.
    pub(crate) async fn client(&self) -> Client {
        let living = self.living().into_iter().map(|index| self.dev.addresses()[index].clone());
        Client::connect(living).await.unwrap()
    }

    pub(crate) async fn channel(&self, index: usize) -> Channel {
        let address = format!("http://{}", self.dev.addresses()[index]);
        Channel::from_shared(address).unwrap().connect().await.unwrap()
    }

    /// A plain client of one node.
    pub(crate) async fn kv(&self, index: usize) -> KvClient<Channel> {
        KvClient::new(self.channel(index).await)
    }

    pub(crate) async fn topology(&self, index: usize) -> TopologyClient<Channel> {
        TopologyClient::new(self.channel(index).await)
    }

    pub(crate) async fn admin(&self, index: usize) -> AdminClient<Channel> {
        AdminClient::new(self.channel(index).await)
    }

    /// Places of the nodes that run.
    pub(crate) fn living(&self) -> Vec<usize> {
        (0..self.ids.len()).filter(|index| self.dev.node(*index).is_some()).collect()
    }

    /// Place of the node with this id.
    pub(crate) fn index_of(&self, id: u64) -> usize {
        self.ids.iter().position(|known| *known == id).unwrap()
    }

    pub(crate) fn id_of(&self, index: usize) -> u64 {
        self.ids[index]
    }

    /// Creates a keyspace.
    pub(crate) async fn create(&self, request: v1::CreateKeyspaceRequest) {
        let mut admin = self.admin(self.living()[0]).await;
        assert!(admin.create_keyspace(request).await.unwrap().into_inner().created);
    }

    /// A keyspace of bytes in key order, cut at these keys.
    pub(crate) async fn create_cut(&self, name: &str, cuts: &[&str], replicas: u32) {
        let split_at = cuts.iter().map(|cut| Bytes::copy_from_slice(cut.as_bytes())).collect();
        self.create(v1::CreateKeyspaceRequest { name: name.into(), split_at, replicas, ..Default::default() }).await;
    }

    /// A keyspace of integers in `[0, max)`, or of bytes for a `max` of 0, cut evenly.
    pub(crate) async fn create_even(&self, name: &str, max: u64, layout: v1::Layout, partitions: u32) {
        let keys = if max > 0 { v1::KeyKind::Integer } else { v1::KeyKind::Bytes };
        let (name, keys, layout) = (name.into(), keys as i32, layout as i32);
        self.create(v1::CreateKeyspaceRequest { name, keys, max, layout, partitions, ..Default::default() }).await;
    }

    /// The partitions of a keyspace, as the first living node knows them.
    pub(crate) async fn partitions(&self, keyspace: &str) -> Vec<v1::Partition> {
        let request = v1::ListPartitionsRequest { keyspace: keyspace.into() };
        let mut topology = self.topology(self.living()[0]).await;
        topology.list_partitions(request).await.unwrap().into_inner().partitions
    }

    /// The only partition of a keyspace, once it is led by a node that runs.
    pub(crate) async fn led(&self, keyspace: &str) -> v1::Partition {
        eventually("a leader that runs", async || {
            let partition = self.partitions(keyspace).await.remove(0);
            let runs = partition.leader != 0 && self.dev.node(self.index_of(partition.leader)).is_some();
            runs.then_some(partition)
        })
        .await
    }

    /// The only partition of a keyspace, once each of its replicas knows who leads it: the last may hear of it after writes
    /// are answered.
    pub(crate) async fn followed(&self, keyspace: &str) -> v1::Partition {
        let partition = self.led(keyspace).await;
        let id = PartitionId(partition.id);
        eventually("a leader that everybody knows", async || {
            let here = |index| self.dev.node(index)?.node()?.partition(id);
            let known: Vec<_> =
                self.living().into_iter().filter_map(here).map(|here| here.group().leadership()).collect();
            let agreed = known.iter().all(|one| one.leader.is_some() && *one == known[0]);
            (agreed && known.len() == partition.replicas.len()).then_some(())
        })
        .await;
        self.led(keyspace).await
    }

    /// Kills the leader of a keyspace's only partition; answers with its place.
    pub(crate) async fn kill_leader(&mut self, keyspace: &str) -> usize {
        let leader = self.index_of(self.led(keyspace).await.leader);
        self.dev.kill(leader);
        leader
    }

    /// A pipeline to one node.
    pub(crate) async fn pipe(&self, index: usize) -> Pipe {
        Pipe::new(self.kv(index).await).await
    }
}

/// A pipeline as a user of any language would speak it, one message at a time.
pub(crate) struct Pipe {
    requests: mpsc::Sender<Requests>,
    replies: Streaming<Replies>,
    last: u64,
}

impl Pipe {
    async fn new(mut kv: KvClient<Channel>) -> Self {
        let (requests, sent) = mpsc::channel(16);
        let replies = kv.pipeline(ReceiverStream::new(sent)).await.unwrap().into_inner();
        Self { requests, replies, last: 0 }
    }

    /// Asks the node's own replica of a partition.
    pub(crate) async fn routed(&mut self, partition: u64, op: request::Op) -> Result<reply::Result, v1::Error> {
        self.together(partition, vec![op]).await.remove(0)
    }

    /// Asks the same replica for several things in one message; the answers in the order of the questions.
    pub(crate) async fn together(
        &mut self,
        partition: u64,
        ops: Vec<request::Op>,
    ) -> Vec<Result<reply::Result, v1::Error>> {
        let first = self.last + 1;
        self.last += ops.len() as u64;
        let route = Some(v1::Route { partition, tokens: None });
        let request = |(id, op)| v1::Request { id, deadline_ms: 5_000, route, op: Some(op) };
        let requests: Vec<v1::Request> = (first..).zip(ops).map(request).collect();
        self.requests.send(Requests::of(&requests)).await.unwrap();
        let mut answers = BTreeMap::new();
        while answers.len() as u64 <= self.last - first {
            let batch = timeout(PATIENCE, self.replies.message()).await.expect("an answer in time");
            for reply in batch.unwrap().expect("an answer").items().unwrap() {
                assert!((first..=self.last).contains(&reply.id), "{} was not asked", reply.id);
                let answer = match reply.result.unwrap() {
                    reply::Result::Error(error) => Err(error),
                    result => Ok(result),
                };
                assert!(answers.insert(reply.id, answer).is_none(), "{} was answered twice", reply.id);
            }
        }
        answers.into_values().collect()
    }

    /// Reads a row from the node's own replica.
    pub(crate) async fn get(&mut self, partition: u64, get: v1::GetRequest) -> Result<v1::GetReply, v1::Error> {
        match self.routed(partition, request::Op::Get(get)).await? {
            reply::Result::Get(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }
}

/// Read options of one level.
pub(crate) fn level(consistency: v1::Consistency) -> Option<v1::ReadOptions> {
    Some(v1::ReadOptions { consistency: consistency as i32, ..Default::default() })
}

pub(crate) fn get(keyspace: &str, key: &str, options: Option<v1::ReadOptions>) -> v1::GetRequest {
    v1::GetRequest { keyspace: keyspace.into(), key: key.to_owned().into(), options }
}

pub(crate) fn put(keyspace: &str, key: &str, value: &str) -> v1::PutRequest {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    v1::PutRequest { keyspace: keyspace.into(), key, value, ..Default::default() }
}

pub(crate) fn increment(keyspace: &str, key: &str, delta: i64) -> v1::IncrementRequest {
    v1::IncrementRequest { keyspace: keyspace.into(), key: key.to_owned().into(), delta, ..Default::default() }
}

/// Keys from `lower` to `upper`, each with whether it belongs to them.
pub(crate) fn between(lower: (&[u8], bool), upper: (&[u8], bool)) -> Option<v1::KeyRange> {
    let bound = |(key, inclusive): (&[u8], bool)| Some(v1::Bound { key: Bytes::copy_from_slice(key), inclusive });
    Some(v1::KeyRange { lower: bound(lower), upper: bound(upper) })
}

pub(crate) fn scan(keyspace: &str, range: Option<v1::KeyRange>) -> v1::ScanRequest {
    v1::ScanRequest { keyspace: keyspace.into(), range, ..Default::default() }
}

/// Every page of a streamed scan.
pub(crate) async fn pages(kv: &mut KvClient<Channel>, request: v1::ScanRequest) -> Result<Vec<v1::ScanReply>, Status> {
    let mut stream = kv.scan_stream(request).await?.into_inner();
    let mut pages = Vec::new();
    while let Some(page) = stream.message().await? {
        pages.push(page);
    }
    Ok(pages)
}

/// The keys of pages, as text.
pub(crate) fn keys_of(pages: &[v1::ScanReply]) -> Vec<String> {
    pages.iter().flat_map(|page| &page.rows).map(|row| text(&row.key)).collect()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The reason of a refused unary call.
#[track_caller]
pub(crate) fn reason<T: std::fmt::Debug>(answer: Result<tonic::Response<T>, Status>) -> Reason {
    refusal(answer).reason
}

/// The error behind a refused unary call.
#[track_caller]
pub(crate) fn refusal<T: std::fmt::Debug>(answer: Result<tonic::Response<T>, Status>) -> meridian::error::Error {
    error_of(&answer.expect_err("it is to be refused"))
}
