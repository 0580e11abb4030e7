//! The library's way to the nodes: one pipeline per node, and a map kept fresh by `Topology.Watch`.

use super::{
    pipeline::{self, Pipeline},
    router::{Caller, Question},
    routing::Routing,
};
use crate::{
    env,
    error::{Error, Outcome, Reason},
    key::NodeId,
    placement::Fit,
    proto::{
        self, batch,
        v1::{self, topology_client::TopologyClient},
    },
};
use parking_lot::{Mutex, RwLock};
use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout_at},
};
use tonic::transport::Channel;

/// Shortest and longest wait before the map is followed at another node.
const WATCH_PAUSE_MIN: Duration = Duration::from_millis(20);
const WATCH_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Connections and the map of one client.
#[derive(Debug)]
pub(crate) struct Remote {
    seeds: Vec<String>,
    routing: Routing,
    pipelines: RwLock<BTreeMap<NodeId, Arc<Pipeline>>>,
    contact: Mutex<Contact>,
    contacted: Notify,
}

#[derive(Debug, Default)]
struct Contact {
    /// A node has answered: with a map, or that there is none yet.
    made: bool,
    last_error: Option<Error>,
}

impl Remote {
    pub(crate) fn new(seeds: Vec<String>) -> Arc<Self> {
        Arc::new(Self {
            seeds,
            routing: Routing::new(),
            pipelines: RwLock::default(),
            contact: Mutex::default(),
            contacted: Notify::new(),
        })
    }

    /// Waits until a node has answered.
    pub(crate) async fn wait_contact(&self, deadline: Instant) -> Result<(), Error> {
        loop {
            let contacted = self.contacted.notified();
            if self.contact.lock().made {
                return Ok(());
            }
            if timeout_at(deadline, contacted).await.is_err() {
                let last = self.contact.lock().last_error.take();
                let why = last.map_or_else(|| "no answer".to_owned(), |error| error.message.into_owned());
                return Err(Error::new(
                    Reason::Unreachable,
                    format!("no node answered at {}: {why}", self.seeds.join(", ")),
                ));
            }
        }
    }

    /// Follows the map for as long as the task lives.
    pub(crate) async fn watch(self: Arc<Self>) {
        let (mut turn, mut pause) = (0, WATCH_PAUSE_MIN);
        loop {
            let addresses = self.addresses();
            let address = &addresses[turn % addresses.len()];
            turn += 1;
            let version = self.routing.look().version();
            let error = self.follow(address).await;
            tracing::debug!(address, %error, "no longer following the map");
            if self.routing.look().version() > version {
                pause = WATCH_PAUSE_MIN;
            }
            {
                let mut contact = self.contact.lock();
                contact.made |= error.reason == Reason::NotInitialized;
                contact.last_error = Some(error);
            }
            self.contacted.notify_waiters();
            sleep(pause / 2 + pause.mul_f64((env::random_u64() % 1_000) as f64 / 2_000.0)).await;
            pause = (pause * 2).min(WATCH_PAUSE_MAX);
        }
    }

    /// Follows the map at one node until that fails.
    async fn follow(&self, address: &str) -> Error {
        let updates = async {
            let channel = pipeline::connect(address).await?;
            let mut client = TopologyClient::new(channel).max_decoding_message_size(pipeline::ANSWER_BYTES_MAX * 4);
            let updates = client.watch(v1::WatchRequest {}).await.map_err(|status| proto::error_of(&status))?;
            Ok::<_, Error>(updates.into_inner())
        };
        let mut updates = match updates.await {
            Ok(updates) => updates,
            Err(error) => return error,
        };
        let mut version = 0;
        loop {
            let update = match updates.message().await {
                Ok(Some(update)) => update,
                Ok(None) => return Error::new(Reason::Unreachable, format!("{address} ended the stream of maps")),
                Err(status) => return proto::error_of(&status),
            };
            let to = update.map_version;
            let cluster_id = update.cluster_id.clone();
            match self.routing.apply_update(update, version) {
                Fit::Applied | Fit::Old => version = to,
                Fit::Gap => return Error::new(Reason::Unreachable, format!("{address} left out a change of the map")),
                Fit::OtherCluster => {
                    tracing::error!(address, cluster_id, "this node belongs to another cluster");
                    return Error::new(Reason::ClusterMismatch, format!("{address} belongs to cluster {cluster_id}"));
                }
            }
            self.contact.lock().made = true;
            self.contacted.notify_waiters();
        }
    }

    /// Every address at which a node may answer: those of the map, then those given at the start.
    fn addresses(&self) -> Vec<String> {
        let map = self.routing.look();
        let known = map.nodes().values().map(|node| node.address.clone());
        let mut addresses: Vec<String> = self.seeds.clone();
        addresses.extend(known.filter(|address| !self.seeds.contains(address)));
        addresses
    }

    /// Makes a unary call at any node of the cluster that answers. The call may be made twice.
    pub(crate) async fn any<T, F>(&self, deadline: Instant, call: impl Fn(Channel) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let mut last: Option<Error> = None;
        for address in self.addresses() {
            let attempt = async {
                let channel = pipeline::connect(&address).await?;
                call(channel).await.map(tonic::Response::into_inner).map_err(|status| proto::error_of(&status))
            };
            match timeout_at(deadline, attempt).await {
                // A process that has yet to join, among others that have.
                Ok(Err(error)) if error.reason == Reason::NotInitialized => last = Some(error),
                Ok(Err(error)) if matches!(error.reason, Reason::Unreachable | Reason::Stopping) => {
                    last = last.filter(|last| last.reason == Reason::NotInitialized).or(Some(error));
                }
                Ok(done) => return done,
                Err(_) => {
                    return Err(Error::new(Reason::DeadlineExceeded, format!("{address} did not answer in time")));
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::new(Reason::Unreachable, "no address to call")))
    }

    fn pipeline(&self, to: NodeId) -> Result<Arc<Pipeline>, Error> {
        let map = self.routing.look();
        let Some(node) = map.node(to) else {
            return Err(Error::new(Reason::Unreachable, format!("the address of {to} is not known")));
        };
        if let Some(pipeline) = self.pipelines.read().get(&to).filter(|p| p.address() == node.address) {
            return Ok(Arc::clone(pipeline));
        }
        let mut pipelines = self.pipelines.write();
        pipelines.retain(|id, pipeline| map.node(*id).is_some_and(|node| node.address == pipeline.address()));
        if let Some(pipeline) = pipelines.get(&to) {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = Arc::new(Pipeline::new(&node.address)?);
        pipelines.insert(to, Arc::clone(&pipeline));
        Ok(pipeline)
    }
}

impl Caller for Arc<Remote> {
    async fn call(&self, to: NodeId, question: Question<'_>, deadline: Instant) -> Result<v1::Reply, Error> {
        let pipeline = self.pipeline(to).map_err(|error| error.outcome(Outcome::NotApplied))?;
        pipeline.call(batch::request_body(question.route.as_ref(), Some(question.op)), deadline).await
    }

    fn routing(&self) -> &Routing {
        &self.routing
    }

    async fn refresh(&self, than: u64) {
        self.routing.newer_than(than).await;
    }

    fn prefer(&self) -> Option<NodeId> {
        None
    }
}
