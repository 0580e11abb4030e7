//! The surface of a node: gRPC and HTTP, and how a process becomes part of a cluster.
//!
//! [`start`] opens the data directory, listens, and from then on the process is in one of two states: waiting (for
//! `init`, or for a node that lets it join) or running. Requests that come while it waits are answered
//! `NOT_INITIALIZED`.
//!
//! Invariant: the identity is durable before anything is done under it.

mod admin;
mod convert;
pub mod dev;
mod exec;
mod explain;
mod http;
mod inside;
mod internode;
mod join;
mod kv;
mod listen;
mod memory;
mod pipeline;
mod read;
mod recover;
mod responder;
mod topology;

pub use responder::Responder;

use crate::{
    control::{Control, ControlledClock},
    env::{Clock, Scope, SystemClock},
    error::{Error, Reason},
    key::NodeId,
    log::{
        LogEngine,
        memory::MemoryLog,
        segments::{SegmentLog, SegmentOptions},
        snapshots::{FileSnapshots, MemorySnapshots, SnapshotStore},
    },
    node::{
        Budgets, Node, Parts,
        config::{Fault, Limits, NodeConfig, Storage},
        identity::{DataDir, DataDirError, Identity},
    },
    placement::Map,
    proto::{DESCRIPTORS, HTTP2_FRAME_BYTES, internal::internode_server::InternodeServer, v1},
    raft::{RaftConfig, RaftHub},
    telemetry,
    transport::{
        endpoint::Endpoint,
        grpc::{FrameServer, GrpcTransport},
    },
};
use arc_swap::ArcSwapOption;
use listen::KillSwitch;
use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

/// Largest gRPC message taken or sent: a page of rows with one row of the largest size, and room for framing.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// HTTP/2 pings to clients that have gone silent.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
/// Half of its cores in use, or so many, and a node is short of CPU: one group is served by little more than one core, and
/// has no use for those that are free.
const BUSY_CORES_MAX: f64 = 1.0;

/// Why a node did not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Faults of the configuration, all of them.
    #[error("the configuration has {} fault(s):\n{}", .0.len(), lines(.0))]
    Config(Vec<Fault>),
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({setting}): {source}; is another node running there?")]
    Listen {
        /// Setting that names it.
        setting: &'static str,
        /// Address.
        address: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The log or the snapshots cannot be opened.
    #[error("the log in {path} cannot be opened: {source}")]
    Log {
        /// Folder.
        path: String,
        /// Cause.
        source: io::Error,
    },
    /// The orders of a drill cannot be read.
    #[error(transparent)]
    Control(io::Error),
    /// The cluster refused this process, or the other way round.
    #[error("this node was refused: {0}")]
    Refused(Error),
}

fn cores() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64)
}

fn lines(faults: &[Fault]) -> String {
    faults.iter().map(|fault| format!("  {fault}")).collect::<Vec<_>>().join("\n")
}

/// Where a node keeps its log and its snapshots.
type Storages = (Arc<dyn LogEngine>, Arc<dyn SnapshotStore>);

/// What all services share.
pub(crate) struct Core {
    config: NodeConfig,
    advertised: String,
    limits: Arc<Limits>,
    deadline_default: Duration,
    budgets: Budgets,
    scope: Arc<Scope>,
    data: Option<DataDir>,
    control: Option<Arc<Control>>,
    running: ArcSwapOption<Running>,
    /// Held while the process becomes part of a cluster, so that `init` and joining do not race.
    becoming: tokio::sync::Mutex<Identity>,
    failed: watch::Sender<Option<Error>>,
}

/// What there is once the process is part of a cluster.
pub(crate) struct Running {
    pub(crate) cluster_id: String,
    pub(crate) responder: Responder,
    pub(crate) frames: FrameServer,
}

impl Core {
    pub(crate) fn running(&self) -> Result<Arc<Running>, Error> {
        self.running.load_full().ok_or_else(|| {
            let message = "this node is not part of a cluster yet; run `meridian init` once, against any node";
            Error::new(Reason::NotInitialized, message).retry_after(500)
        })
    }

    fn identity_saved(&self, identity: &Identity) -> Result<(), Error> {
        let Some(data) = &self.data else { return Ok(()) };
        data.save_identity(identity).map_err(|error| Error::new(Reason::Internal, error.to_string()))
    }

    /// Opens log and snapshots and starts the node under its identity. `map` is already kept.
    async fn run(self: &Arc<Self>, cluster_id: String, id: NodeId, map: Map) -> Result<Arc<Node>, StartError> {
        let transport = GrpcTransport::new(cluster_id.clone(), id, self.config.dial.clone());
        let endpoint = Endpoint::new(id, transport);
        let clock: Arc<dyn Clock> = match &self.control {
            Some(control) => Arc::new(ControlledClock(Arc::clone(control))),
            None => Arc::new(SystemClock),
        };
        let (log, snapshots) = self.open_storage()?;
        let timings = &self.config.raft;
        let raft_config = RaftConfig {
            heartbeat_ms: timings.heartbeat_ms,
            election_ms: timings.election_ms.clone(),
            sleep_after_ms: timings.sleep_after_ms,
            snapshot_bytes: timings.snapshot_bytes,
            log_keep_bytes: timings.log_keep_bytes,
            log_bytes_max: timings.log_bytes_max,
            snapshot_bytes_per_s: timings.snapshot_bytes_per_s,
            ..RaftConfig::default()
        };
        let damaged = |source| StartError::Log { path: self.config.data.display().to_string(), source };
        let recovered = log.recover().map_err(damaged)?;
        let raft = RaftHub::new(Arc::clone(&endpoint), log, snapshots, Arc::clone(&clock), raft_config)
            .map_err(|error| damaged(io::Error::other(error)))?;
        let weak = Arc::downgrade(self);
        let keep_map = Box::new(move |map: &Map| match weak.upgrade() {
            Some(core) => core.keep_map(map),
            None => Err(io::Error::other("the server is gone")),
        });
        let down_after = Duration::from_millis(self.config.down_after_ms);
        let split_bytes = self.config.split_bytes;
        let merge_after = Duration::from_millis(self.config.merge_after_ms);
        let endpoint_of_parts = Arc::clone(&endpoint);
        let parts = Parts {
            clock,
            endpoint: endpoint_of_parts,
            raft,
            recovered,
            map,
            keep_map,
            down_after,
            split_bytes,
            busy_cores: (cores() / 2.0).min(BUSY_CORES_MAX),
            merge_after,
            budgets: self.budgets,
        };
        let node = Node::start(parts);
        let responder = Responder::start(Arc::clone(&node), Arc::clone(&self.limits), self.deadline_default);
        let frames = FrameServer::new(cluster_id.clone(), id, endpoint);
        self.running.store(Some(Arc::new(Running { cluster_id, responder, frames })));
        Ok(node)
    }

    fn keep_map(&self, map: &Map) -> io::Result<()> {
        let Some(data) = &self.data else { return Ok(()) };
        data.save_map(&map.encode()).map_err(io::Error::other)
    }

    fn open_storage(&self) -> Result<Storages, StartError> {
        let Some(data) = &self.data else {
            return Ok((Arc::new(MemoryLog::immediate()), Arc::new(MemorySnapshots::default())));
        };
        let (log, snapshots) = (data.join("log"), data.join("snapshots"));
        let at = |path: &Path| {
            let path = path.display().to_string();
            |source| StartError::Log { path, source }
        };
        let options = SegmentOptions { control: self.control.clone(), ..SegmentOptions::default() };
        let engine = SegmentLog::open(&log, options).map_err(at(&log))?;
        let store = FileSnapshots::open(&snapshots).map_err(at(&snapshots))?;
        Ok((Arc::new(engine), Arc::new(store.controlled(self.control.clone()))))
    }

    /// Whether the node can serve, or why not.
    fn ready(&self) -> Result<(), String> {
        let running = self.running().map_err(|error| error.message.into_owned())?;
        let node = running.responder.node();
        let leaderless = node
            .partitions()
            .iter()
            // Without a quorum a replica goes on naming the leader that it had, itself among them.
            .filter(|partition| {
                let status = partition.group().status();
                let led = status.leader.is_some_and(|leader| node.liveness().is_alive(leader.node));
                !led || node.liveness().quorum_lost(&status.voters)
            })
            .map(|partition| partition.id.to_string())
            .collect::<Vec<_>>();
        if leaderless.is_empty() {
            Ok(())
        } else {
            Err(format!("no leader with a quorum for {}", leaderless.join(", ")))
        }
    }
}

/// A started node.
pub struct ServerHandle {
    core: Arc<Core>,
    address: SocketAddr,
    http: SocketAddr,
    switch: KillSwitch,
    failed: watch::Receiver<Option<Error>>,
}

impl ServerHandle {
    /// Address that clients and nodes connect to.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address of `/metrics`, `/livez` and `/readyz`.
    #[must_use]
    pub const fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// The node, once the process is part of a cluster.
    #[must_use]
    pub fn node(&self) -> Option<Arc<Node>> {
        self.core.running.load_full().map(|running| Arc::clone(running.responder.node()))
    }

    /// Forms the cluster, or tells that there is one.
    ///
    /// # Errors
    /// When the cluster cannot be formed now.
    pub async fn init(&self, replicas: u32) -> Result<v1::InitReply, Error> {
        self.core.init(replicas).await
    }

    /// Waits until the node has to stop by itself: the cluster does not want it.
    pub async fn failed(&mut self) -> StartError {
        loop {
            if let Some(error) = self.failed.borrow_and_update().clone() {
                return StartError::Refused(error);
            }
            if self.failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Hands the leadership of every partition over to other nodes, as far as there are any and they take it at once;
    /// requests are answered meanwhile. For a stop that nobody notices.
    pub async fn hand_over(&self) {
        if let Some(node) = self.node() {
            self.core.scope.run(async move { node.hand_over().await }).await;
        }
    }

    /// Stops in order: connections end, replicas stop, the data directory is released with the handle.
    pub async fn stop(self) {
        let running = self.core.running.swap(None);
        if let Some(running) = running {
            running.responder.node().stop().await;
        }
        self.kill();
    }

    /// Stops like a crash: every task at whatever it was doing, every connection without a word.
    pub fn kill(self) {
        self.core.running.store(None);
        self.switch.kill();
        self.core.scope.abort_all();
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Starts a node. It serves when this returns; whether it is part of a cluster yet is another matter.
///
/// # Errors
/// See [`StartError`]; nothing is left running.
pub async fn start(config: NodeConfig) -> Result<ServerHandle, StartError> {
    config.validate().map_err(StartError::Config)?;
    telemetry::install_metrics();
    let control = config.drill_control.as_deref().map(Control::open).transpose().map_err(StartError::Control)?;
    let data = match config.storage {
        Storage::Disk => Some(DataDir::open(&config.data)?),
        Storage::Memory => None,
    };
    let stored = match &data {
        Some(data) => data.identity()?,
        None => None,
    };
    let identity = stored.unwrap_or_else(|| Identity::new(uuid::Uuid::new_v4().to_string()));
    if let Some(data) = &data {
        data.save_identity(&identity)?;
    }
    let (listener, address) = bind("listen", config.listen).await?;
    let (http_listener, http) = bind("http", config.http).await?;
    let advertised = config.advertise.clone().unwrap_or_else(|| address.to_string());
    let (failed, failures) = watch::channel(None);
    let scope = Scope::random();
    let core = Arc::new(Core {
        advertised,
        limits: Arc::new(config.limits.clone()),
        deadline_default: Duration::from_millis(config.deadline_default_ms.into()),
        budgets: config.budgets.of(memory::machine_bytes(Path::new("/"))),
        scope: Arc::clone(&scope),
        data,
        control,
        running: ArcSwapOption::empty(),
        becoming: tokio::sync::Mutex::new(identity),
        failed,
        config,
    });
    let switch = KillSwitch::default();
    let resumed = scope.run(Arc::clone(&core).resume()).await;
    resumed?;
    scope.enter(|| {
        crate::env::spawn(serve_grpc(Arc::clone(&core), listener, switch.clone()));
        let ready = Arc::clone(&core);
        crate::env::spawn(http::serve(http_listener, Arc::new(move || ready.ready())));
        crate::env::spawn(http::upkeep());
        crate::env::spawn(join::run(Arc::clone(&core)));
    });
    Ok(ServerHandle { core, address, http, switch, failed: failures })
}

async fn bind(setting: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { setting, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

async fn serve_grpc(core: Arc<Core>, listener: TcpListener, switch: KillSwitch) {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<v1::kv_server::KvServer<kv::KvService>>().await;
    reporter.set_serving::<v1::topology_server::TopologyServer<topology::TopologyService>>().await;
    reporter.set_serving::<v1::admin_server::AdminServer<admin::AdminService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors were made by the build");
    macro_rules! sized {
        ($server:expr) => {
            $server.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX)
        };
    }
    let served = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .max_frame_size(HTTP2_FRAME_BYTES)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(8 << 20)
        .add_service(health)
        .add_service(reflection)
        .add_service(sized!(v1::kv_server::KvServer::new(kv::KvService(Arc::clone(&core)))))
        .add_service(v1::topology_server::TopologyServer::new(topology::TopologyService(Arc::clone(&core))))
        .add_service(v1::admin_server::AdminServer::new(admin::AdminService(Arc::clone(&core))))
        .add_service(
            InternodeServer::new(internode::InternodeService(Arc::clone(&core)))
                .max_decoding_message_size(crate::transport::grpc::MESSAGE_BYTES_MAX),
        )
        .serve_with_incoming(listen::incoming(listener, switch))
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the gRPC endpoint stopped");
    }
}
