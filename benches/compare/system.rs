//! The systems that are compared, the ways in which they are asked, and what all ways have in common.
//!
//! Every system has three replicas, keeps its data on the same disk, and syncs it before it answers a write.

use crate::{etcd, meridian, process::Servers, redis};
use anyhow::Context as _;
use arc_swap::ArcSwap;
use bytes::Bytes;
use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};

/// Replicas of every row, and nodes of every system.
pub(crate) const REPLICAS: usize = 3;
/// Connections to one node that callers of plain gRPC share.
const CHANNELS_PER_NODE: usize = 8;
/// Patience with a system that has been started.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How often something awaited is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// When the others elect a new leader.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Elections {
    /// As each system has it if nothing is said.
    AsTheyAre,
    /// Everywhere a second after the last message at the earliest, as etcd has it.
    Equal,
}

/// A system.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum System {
    Meridian,
    Etcd,
    Redis,
}

/// A system, and how it is asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum)]
pub(crate) enum Way {
    /// Meridian through its client library
    Meridian,
    /// Meridian through unary gRPC calls, as from any client
    MeridianUnary,
    /// etcd through unary gRPC calls, the only way there is
    Etcd,
    /// Redis through a connection per client
    Redis,
}

/// How fresh a read is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Level {
    Linearizable,
    /// From the leader, without asking the others each time.
    Lease,
    /// Any replica, whatever it holds (etcd calls it serializable).
    Eventual,
}

/// What is wanted of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    Rows,
    /// The last rows, the last one first.
    Reverse,
    /// Rows without their values.
    Keys,
    /// How many there are; a limit means nothing.
    Count,
}

impl System {
    pub(crate) const ALL: [Self; 3] = [Self::Meridian, Self::Etcd, Self::Redis];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Meridian => "Meridian",
            Self::Etcd => "etcd",
            Self::Redis => "Redis",
        }
    }

    /// How to get it.
    pub(crate) const fn install(self) -> &'static str {
        match self {
            Self::Meridian => "cargo build --release",
            Self::Etcd => "apt install etcd-server",
            Self::Redis => "apt install redis-server",
        }
    }

    /// The way in which it is filled.
    pub(crate) const fn filler(self) -> Way {
        match self {
            Self::Meridian => Way::Meridian,
            Self::Etcd => Way::Etcd,
            Self::Redis => Way::Redis,
        }
    }

    /// Starts it with everything of its own in `dir`, and waits until it is ready. The program is on the path, or this.
    pub(crate) async fn start(
        self,
        program: &Path,
        dir: &Path,
        (partitions, rows): (u64, u64),
        elections: Elections,
    ) -> anyhow::Result<Cluster> {
        let dir = dir.join(self.name());
        std::fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
        match self {
            Self::Meridian => meridian::start(program, &dir, (partitions, rows), elections).await,
            Self::Etcd => etcd::start(program, &dir).await,
            Self::Redis => redis::start(program, &dir).await,
        }
    }

    /// Fails unless every node takes part.
    pub(crate) async fn is_whole(self, addresses: &[String]) -> anyhow::Result<()> {
        match self {
            Self::Meridian => meridian::is_whole(addresses).await,
            Self::Etcd => etcd::leaders(&Channels::new(addresses)?).await.map(drop),
            Self::Redis => redis::is_whole(addresses).await,
        }
    }

    pub(crate) fn program(self, meridian: &Path) -> PathBuf {
        match self {
            Self::Meridian => meridian.to_owned(),
            Self::Etcd => "etcd".into(),
            Self::Redis => "redis-server".into(),
        }
    }
}

impl Way {
    pub(crate) const fn system(self) -> System {
        match self {
            Self::Meridian | Self::MeridianUnary => System::Meridian,
            Self::Etcd => System::Etcd,
            Self::Redis => System::Redis,
        }
    }

    /// As shown to people.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Meridian => "Meridian, library",
            Self::MeridianUnary => "Meridian, unary gRPC",
            Self::Etcd => "etcd",
            Self::Redis => "Redis (weaker)",
        }
    }

    pub(crate) const fn can_read(self, level: Level) -> bool {
        !matches!(level, Level::Lease) || matches!(self.system(), System::Meridian)
    }

    /// Nobody takes over from Redis's master.
    pub(crate) const fn can_lose_its_leader(self) -> bool {
        !matches!(self, Self::Redis)
    }

    /// Redis has no ranges over its keys.
    pub(crate) const fn can_scan(self) -> bool {
        !matches!(self, Self::Redis)
    }
}

/// A system that runs.
pub(crate) struct Cluster {
    pub(crate) system: System,
    pub(crate) servers: Servers,
    /// `host:port` of every node, for clients.
    pub(crate) addresses: Vec<String>,
}

impl Cluster {
    /// Index of the node that leads, of a system with one group.
    pub(crate) async fn leader(&self) -> anyhow::Result<usize> {
        let channels = Channels::new(&self.addresses)?;
        let leaders = match self.system {
            System::Meridian => meridian::leaders(&channels).await?,
            System::Etcd => etcd::leaders(&channels).await?,
            System::Redis => return Ok(0),
        };
        leaders.of(&[]).context("no node leads")
    }
}

/// What makes callers of one way.
pub(crate) enum Door {
    Meridian(::meridian::client::Client),
    MeridianUnary(Channels),
    Etcd(Channels),
    Redis(Vec<String>),
}

impl Door {
    pub(crate) async fn open(way: Way, cluster: &Cluster) -> anyhow::Result<Self> {
        let addresses = cluster.addresses.clone();
        let mut door = match way {
            Way::Meridian => Self::Meridian(meridian::connect(addresses).await?),
            Way::MeridianUnary => Self::MeridianUnary(Channels::new(&addresses)?),
            Way::Etcd => Self::Etcd(Channels::new(&addresses)?),
            Way::Redis => Self::Redis(addresses),
        };
        door.look_for_leaders().await?;
        Ok(door)
    }

    /// Callers that must know who leads learn it anew.
    pub(crate) async fn look_for_leaders(&mut self) -> anyhow::Result<()> {
        match self {
            Self::MeridianUnary(channels) => channels.leaders.store(Arc::new(meridian::leaders(channels).await?)),
            Self::Etcd(channels) => channels.leaders.store(Arc::new(etcd::leaders(channels).await?)),
            Self::Meridian(_) | Self::Redis(_) => {}
        }
        Ok(())
    }

    /// So many callers.
    pub(crate) async fn callers(&self, clients: usize) -> anyhow::Result<Vec<Caller>> {
        let mut callers = Vec::new();
        for client in 0..clients {
            callers.push(self.caller(client).await?);
        }
        Ok(callers)
    }

    /// The caller of one client.
    pub(crate) async fn caller(&self, client: usize) -> anyhow::Result<Caller> {
        Ok(match self {
            Self::Meridian(library) => Caller::Meridian(library.keyspace(meridian::KEYSPACE)),
            Self::MeridianUnary(channels) => Caller::MeridianUnary(meridian::Unary::new(channels, client)),
            Self::Etcd(channels) => Caller::Etcd(etcd::Unary::new(channels, client)),
            Self::Redis(addresses) => Caller::Redis(redis::Caller::connect(addresses, client).await?),
        })
    }
}

/// One client's way to ask.
pub(crate) enum Caller {
    Meridian(::meridian::client::Keyspace),
    MeridianUnary(meridian::Unary),
    Etcd(etcd::Unary),
    Redis(redis::Caller),
}

impl Caller {
    pub(crate) async fn put(&mut self, key: Bytes, value: Bytes) -> anyhow::Result<()> {
        match self {
            Self::Meridian(keyspace) => Ok(keyspace.put(key, value).await.map(drop)?),
            Self::MeridianUnary(unary) => unary.put(key, value).await,
            Self::Etcd(unary) => unary.put(key, value).await,
            Self::Redis(redis) => redis.put(&key, &value).await,
        }
    }

    /// Whether there is such a row.
    pub(crate) async fn get(&mut self, key: Bytes, level: Level) -> anyhow::Result<bool> {
        match self {
            Self::Meridian(keyspace) => meridian::get(keyspace, key, level).await,
            Self::MeridianUnary(unary) => unary.get(key, level).await,
            Self::Etcd(unary) => unary.get(key, level).await,
            Self::Redis(redis) => redis.get(&key, level).await,
        }
    }

    /// Reads rows from `from` to below `to`, linearizably; how many there were, at most `limit`.
    pub(crate) async fn scan(&mut self, form: Form, range: (Bytes, Bytes), limit: u32) -> anyhow::Result<u64> {
        match self {
            Self::Meridian(keyspace) => meridian::scan(keyspace, form, range, limit).await,
            Self::MeridianUnary(unary) => unary.scan(form, range, limit).await,
            Self::Etcd(unary) => unary.scan(form, range, limit).await,
            Self::Redis(_) => anyhow::bail!("Redis has no ranges over its keys"),
        }
    }

    /// Reads rows `from` to below `to`, with as few requests as is usual, and adds to `seen` as they come.
    pub(crate) async fn scan_long(&mut self, numbers: Range<u64>, seen: &AtomicU64) -> anyhow::Result<()> {
        match self {
            Self::Meridian(keyspace) => meridian::scan_long(keyspace, numbers, seen).await,
            Self::MeridianUnary(unary) => unary.scan_long(numbers, seen).await,
            Self::Etcd(unary) => unary.scan_long(numbers, seen).await,
            Self::Redis(_) => anyhow::bail!("Redis has no ranges over its keys"),
        }
    }

    /// Whether it turns to another node by itself.
    pub(crate) const fn finds_its_way(&self) -> bool {
        matches!(self, Self::Meridian(_))
    }

    /// Asks another node from now on.
    pub(crate) fn turn(&mut self) {
        match self {
            Self::MeridianUnary(unary) => unary.aim.turn(),
            Self::Etcd(unary) => unary.aim.turn(),
            Self::Meridian(_) | Self::Redis(_) => {}
        }
    }

    /// Writes many rows with few requests.
    pub(crate) async fn put_many(&mut self, rows: Vec<(Bytes, Bytes)>) -> anyhow::Result<()> {
        match self {
            Self::Meridian(keyspace) => meridian::put_many(keyspace, rows).await,
            Self::MeridianUnary(_) => anyhow::bail!("Meridian is filled through the library"),
            Self::Etcd(unary) => unary.put_many(rows).await,
            Self::Redis(redis) => redis.put_many(&rows).await,
        }
    }
}

/// Connections to every node, shared by all callers as a plain user of gRPC would, and who leads.
pub(crate) struct Channels {
    nodes: Vec<Vec<Channel>>,
    pub(crate) addresses: Vec<String>,
    pub(crate) leaders: Arc<ArcSwap<Leaders>>,
}

impl Channels {
    pub(crate) fn new(addresses: &[String]) -> anyhow::Result<Self> {
        let mut nodes = Vec::new();
        for address in addresses {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
            nodes.push((0..CHANNELS_PER_NODE).map(|_| endpoint.connect_lazy()).collect());
        }
        Ok(Self { nodes, addresses: addresses.to_vec(), leaders: Arc::default() })
    }

    /// One channel to each node for this client.
    pub(crate) fn of(&self, client: usize) -> Vec<Channel> {
        self.nodes.iter().map(|channels| channels[client / self.nodes.len() % channels.len()].clone()).collect()
    }
}

/// Which node leads which interval of keys.
#[derive(Default)]
pub(crate) struct Leaders {
    /// First key of each interval, in order, and the node's index.
    pub(crate) intervals: Vec<(Bytes, usize)>,
}

impl Leaders {
    pub(crate) fn of(&self, key: &[u8]) -> Option<usize> {
        let behind = self.intervals.partition_point(|(start, _)| start <= key);
        self.intervals.get(behind.checked_sub(1)?).map(|(_, node)| *node)
    }
}

/// Which nodes a caller of plain gRPC asks: the leader where it matters, else always the same one.
pub(crate) struct Aim {
    leaders: Arc<ArcSwap<Leaders>>,
    nodes: usize,
    home: usize,
    /// It has turned away from the leader.
    turned: bool,
}

impl Aim {
    pub(crate) fn new(channels: &Channels, client: usize) -> Self {
        let nodes = channels.nodes.len();
        Self { leaders: Arc::clone(&channels.leaders), nodes, home: client % nodes, turned: false }
    }

    /// Index of the node to ask.
    pub(crate) fn at(&self, key: &[u8], level: Level) -> usize {
        let leader = if self.turned || level == Level::Eventual { None } else { self.leaders.load().of(key) };
        leader.unwrap_or(self.home)
    }

    fn turn(&mut self) {
        (self.home, self.turned) = ((self.home + 1) % self.nodes, true);
    }
}

/// Waits until `look` succeeds; fails with what it said last, or when a server has ended.
pub(crate) async fn ready<T>(servers: &mut Servers, look: impl AsyncFn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(why) if Instant::now() >= deadline => return Err(why.context("not ready in time")),
            Err(_) => servers.check()?,
        }
        sleep(LOOK_EVERY).await;
    }
}
