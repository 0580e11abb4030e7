//! How a process becomes, or becomes again, part of a cluster.
//!
//! * A stored identity with a node id: the node runs at once, and greets the cluster in the background so that a
//!   changed address is known and a stranger is refused by name.
//! * No node id, but addresses to join: they are asked in turn until one admits the process.
//! * `init`: unless one of the addresses to join knows a cluster, this node forms one and is its first member.

use super::{Core, StartError};
use crate::{
    error::{Error, Reason},
    key::NodeId,
    node::{
        Node,
        identity::{DataDirError, Identity},
    },
    placement::{Command, Map, RegisterNode},
    proto::{
        error_of,
        internal::{self as pb, internode_client::InternodeClient},
        v1,
    },
    transport::PROTOCOL_VERSION,
};
use futures_util::future::join_all;
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// Pause before the addresses are asked again.
const JOIN_EVERY: Duration = Duration::from_millis(100);
/// Longest pause, reached by doubling.
const JOIN_EVERY_MAX: Duration = Duration::from_secs(2);
/// Patience with one address.
const JOIN_DEADLINE: Duration = Duration::from_secs(6);
/// Patience with the driver before others are told where this node is.
const GREET_DEADLINE: Duration = Duration::from_secs(2);
/// Patience with forming the cluster.
const FOUND_DEADLINE: Duration = Duration::from_secs(10);
/// Node id of whoever forms the cluster.
const FOUNDER: NodeId = NodeId(1);

impl Core {
    /// Continues under the stored identity, if it names a place in a cluster.
    pub(super) async fn resume(self: Arc<Self>) -> Result<(), StartError> {
        let identity = self.becoming.lock().await.clone();
        let (Some(cluster_id), Some(id)) = (identity.cluster_id.clone(), identity.node) else { return Ok(()) };
        let map = match self.data.as_ref().map(|data| data.map()).transpose()?.flatten() {
            Some(bytes) => Map::decode(&bytes).map_err(|error| DataDirError::Damaged {
                path: self.config.data.join("map.bin"),
                cause: error.to_string(),
            })?,
            None => Map::default(),
        };
        if map.version() == 0 && !identity.founder {
            // It was admitted and stopped before it kept the map: it joins again, as the node that it is.
            return Ok(());
        }
        let is_new = map.version() == 0;
        let node = self.run(cluster_id.clone(), id, map).await?;
        if is_new {
            let (core, node) = (Arc::clone(&self), node);
            crate::env::spawn(async move {
                if let Err(error) = core.found(&node, cluster_id, 0).await {
                    tracing::error!(%error, "the cluster could not be formed yet; run `meridian init` again");
                }
            });
        }
        Ok(())
    }

    fn register(&self, uuid: String, cluster_id: String, previous: Option<NodeId>) -> RegisterNode {
        RegisterNode {
            cluster_id,
            uuid,
            address: self.advertised.clone(),
            zone: self.config.zone.clone(),
            weight_milli: (self.config.weight * 1_000.0).round() as u32,
            previous,
            ephemeral: self.data.is_none(),
        }
    }

    async fn found(&self, node: &Arc<Node>, cluster_id: String, replicas: u32) -> Result<(), Error> {
        let uuid = self.becoming.lock().await.uuid.clone();
        let register = self.register(uuid, cluster_id.clone(), Some(FOUNDER));
        let found = node.found(cluster_id, register, replicas, Instant::now() + FOUND_DEADLINE);
        self.scope.run(found).await?;
        timeout(FOUND_DEADLINE, node.map_at_least(1)).await.map_err(|_| {
            Error::new(Reason::Internal, "the cluster was formed, but its map has not come back; ask for its status")
        })
    }

    /// Forms the cluster, unless there is one.
    pub(crate) async fn init(self: &Arc<Self>, replicas: u32) -> Result<v1::InitReply, Error> {
        let existing = || {
            let running = self.running.load_full()?;
            Some(v1::InitReply { cluster_id: running.cluster_id.clone(), created: false })
        };
        if let Some(reply) = existing() {
            // An earlier attempt may have stopped half-way: what it began is finished, under the same id.
            let node = self.running()?.responder.node().clone();
            if node.routing().map().version() == 0 {
                self.found(&node, reply.cluster_id.clone(), replicas).await?;
            }
            return Ok(reply);
        }
        // Somebody to join may have been initialized already: then there is nothing to form.
        if self.try_join().await? {
            return existing().ok_or_else(|| Error::new(Reason::Internal, "joined, and yet not running"));
        }
        let (cluster_id, node) = {
            let mut identity = self.becoming.lock().await;
            if let Some(reply) = existing() {
                return Ok(reply);
            }
            let cluster_id = uuid::Uuid::new_v4().to_string();
            let mut next = identity.clone();
            (next.cluster_id, next.node, next.founder) = (Some(cluster_id.clone()), Some(FOUNDER), true);
            self.identity_saved(&next)?;
            *identity = next;
            let run = self.run(cluster_id.clone(), FOUNDER, Map::default());
            let node = self.scope.run(run).await;
            (cluster_id, node.map_err(|error| Error::new(Reason::Internal, error.to_string()))?)
        };
        self.found(&node, cluster_id.clone(), replicas).await?;
        Ok(v1::InitReply { cluster_id, created: true })
    }

    /// Asks each address to join once. True when this process is part of a cluster now.
    async fn try_join(self: &Arc<Self>) -> Result<bool, Error> {
        let mut identity = self.becoming.lock().await;
        if self.running.load().is_some() {
            return Ok(true);
        }
        for address in self.config.join.iter().filter(|address| **address != self.advertised) {
            match self.ask(address, self.join_request(&identity)).await {
                Ok(reply) => {
                    let map = Map::decode(&reply.map)?;
                    let mut next = identity.clone();
                    (next.cluster_id, next.node) = (Some(reply.cluster_id.clone()), Some(NodeId(reply.node)));
                    self.identity_saved(&next)?;
                    self.keep_map(&map).map_err(|error| Error::new(Reason::Internal, error.to_string()))?;
                    *identity = next;
                    let run = self.run(reply.cluster_id, NodeId(reply.node), map);
                    let ran = self.scope.run(run).await;
                    ran.map_err(|error| Error::new(Reason::Internal, error.to_string()))?;
                    tracing::info!(node = reply.node, via = %address, "joined the cluster");
                    return Ok(true);
                }
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => tracing::debug!(%address, %error, "not admitted yet"),
            }
        }
        Ok(false)
    }

    fn join_request(&self, identity: &Identity) -> pb::JoinRequest {
        pb::JoinRequest {
            cluster_id: identity.cluster_id.clone().unwrap_or_default(),
            uuid: identity.uuid.clone(),
            node: identity.node.map_or(0, |node| node.0),
            address: self.advertised.clone(),
            zone: self.config.zone.clone(),
            weight: self.config.weight,
            protocol_version: PROTOCOL_VERSION,
            ephemeral: self.data.is_none(),
        }
    }

    async fn ask(&self, address: &str, request: pb::JoinRequest) -> Result<pb::JoinReply, Error> {
        let unreachable =
            |error: &dyn std::fmt::Display| Error::new(Reason::Unreachable, format!("{address}: {error}"));
        let via = self.config.dial.get(address).map_or(address, String::as_str);
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{via}"))
            .map_err(|error| unreachable(&error))?
            .connect_timeout(JOIN_DEADLINE)
            .timeout(JOIN_DEADLINE);
        let channel = endpoint.connect().await.map_err(|error| unreachable(&error))?;
        let client = InternodeClient::new(channel);
        let mut client = client.max_decoding_message_size(crate::transport::grpc::MESSAGE_BYTES_MAX);
        client.join(request).await.map(tonic::Response::into_inner).map_err(|status| error_of(&status))
    }

    /// Tells the cluster that this node is back. True when the cluster has heard it.
    ///
    /// The driver is asked over the addresses of the map. If it cannot be reached there, because many nodes have moved at
    /// once, the addresses to join are told where this node is now: that alone brings the others back into contact. They
    /// are asked in any case: data of one cluster that is started among the nodes of another is refused, also when it is
    /// that of a founder, whose driver is itself and never refuses it.
    async fn greet(&self, node: &Node) -> Result<bool, Error> {
        let identity = self.becoming.lock().await.clone();
        let cluster_id = identity.cluster_id.clone().unwrap_or_default();
        let register = self.register(identity.uuid.clone(), cluster_id, identity.node);
        let heard = async {
            match node.drive(&Command::RegisterNode(register), Instant::now() + GREET_DEADLINE).await {
                Ok(_) => Ok(true),
                Err(error) if is_final(&error) => Err(error),
                Err(error) => {
                    tracing::debug!(%error, "the driver has not heard this node yet");
                    Ok(false)
                }
            }
        };
        // All of them, at once: some may have been away as long, and know as old a map.
        let others = self.config.join.iter().filter(|address| **address != self.advertised);
        let greeted = others.map(async |address| {
            match self.ask(address, self.join_request(&identity)).await {
                Ok(reply) => {
                    // Sooner than the driver can tell: what this node was to give up while it was away.
                    if let Ok(map) = Map::decode(&reply.map) {
                        let _as_new = node.take_map(map.full());
                    }
                    Ok(true)
                }
                Err(error) if is_final(&error) => Err(error),
                Err(error) => {
                    tracing::debug!(%address, %error, "not greeted yet");
                    Ok(false)
                }
            }
        });
        let (heard, greeted) = tokio::join!(heard, join_all(greeted));
        let heard = heard?;
        if greeted.iter().any(|greeted| matches!(greeted, Ok(true))) {
            return Ok(true);
        }
        greeted.into_iter().try_fold(heard, |heard, greeted| greeted.map(|_not_yet| heard))
    }
}

/// Whether asking again cannot help.
fn is_final(error: &Error) -> bool {
    matches!(error.reason, Reason::ClusterMismatch | Reason::IdentityMismatch | Reason::VersionMismatch)
        || matches!(error.reason, Reason::InvalidField | Reason::NodeRemoved)
}

/// Joins, or greets, until it has succeeded.
pub(super) async fn run(core: Arc<Core>) {
    let mut pause = JOIN_EVERY;
    loop {
        let running = core.running.load_full();
        let done = match &running {
            Some(running) => core.greet(running.responder.node()).await,
            None => core.try_join().await,
        };
        match done {
            Ok(true) if running.is_some() => return,
            // Just joined: the admission was the greeting.
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                tracing::error!(%error, "the cluster refuses this node");
                core.failed.send_replace(Some(error));
                return;
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(JOIN_EVERY_MAX);
    }
}
