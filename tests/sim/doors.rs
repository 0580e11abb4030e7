//! The ways of simulated clients into the cluster: one node, or a router of their own with a map of its own.

use crate::world::World;
use futures_util::future::BoxFuture;
use meridian::{
    client::{Caller, Question, Router, Routing},
    env::spawn,
    error::{Error, Hint, Outcome, Reason},
    key::NodeId,
    proof::door::Door,
    proto::v1::{self, reply},
};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, timeout_at};

/// Longest way from a client to a node, and back.
const WAY_MAX_US: u64 = 2_000;

/// One way of a message between a client and a node.
async fn way(world: &World) {
    sleep(Duration::from_micros(50 + world.draw(WAY_MAX_US))).await;
}

/// Asks one node, over a link that takes its time. A node that is down refuses; one that crashes or is paused meanwhile
/// does not answer.
async fn ask(world: &World, n: u64, request: v1::Request, deadline: Instant) -> Result<v1::Reply, Error> {
    way(world).await;
    let Some(life) = world.life(n) else {
        return Err(Error::new(Reason::Unreachable, format!("node {n} is down")).outcome(Outcome::NotApplied));
    };
    let responder = life.responder;
    let asked = life.scope.enter(|| spawn(async move { responder.reply(request).await }));
    match timeout_at(deadline, asked).await {
        Ok(Ok(reply)) => {
            way(world).await;
            Ok(reply)
        }
        Ok(Err(ended)) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
        Ok(Err(_aborted)) => {
            Err(Error::new(Reason::Unreachable, format!("node {n} crashed")).outcome(Outcome::Unknown))
        }
        Err(_elapsed) => {
            Err(Error::new(Reason::DeadlineExceeded, format!("node {n} did not answer")).outcome(Outcome::Unknown))
        }
    }
}

fn result_of(reply: v1::Reply) -> Result<reply::Result, Error> {
    match reply.result {
        Some(reply::Result::Error(error)) => Err(error.into()),
        Some(result) => Ok(result),
        None => Err(Error::new(Reason::Internal, "an empty answer").outcome(Outcome::Unknown)),
    }
}

/// One node.
pub(crate) struct NodeDoor {
    world: World,
    n: u64,
}

impl Door for NodeDoor {
    fn node(&self) -> Option<String> {
        Some(NodeId(self.n).to_string())
    }

    fn ask(&self, mut request: v1::Request, deadline: Instant) -> BoxFuture<'_, Result<reply::Result, Error>> {
        request.deadline_ms = (deadline.saturating_duration_since(Instant::now()).as_millis() as u32).max(1);
        Box::pin(async move { result_of(ask(&self.world, self.n, request, deadline).await?) })
    }
}

/// The client library's router, over simulated links. Its map is the one it last asked for.
pub(crate) struct RouterDoor(Router<Links>);

impl Door for RouterDoor {
    fn node(&self) -> Option<String> {
        None
    }

    fn ask(&self, request: v1::Request, deadline: Instant) -> BoxFuture<'_, Result<reply::Result, Error>> {
        Box::pin(self.0.execute(request, deadline))
    }
}

/// How a router of a client reaches nodes.
struct Links {
    world: World,
    routing: Routing,
}

impl Links {
    /// Takes the map, and the leaders, that some node knows.
    async fn learn(&self) {
        way(&self.world).await;
        let running = self.world.awake();
        if running.is_empty() {
            return;
        }
        let node = self.world.node(running[self.world.draw(running.len() as u64) as usize]);
        self.routing.set_map(node.routing().map());
        for (partition, leader) in node.routing().leaders() {
            let hint = Hint { partition, leader: Some(leader.node), term: leader.term, map_version: 0 };
            self.routing.learn(&hint);
        }
    }
}

impl Caller for Links {
    async fn call(&self, to: NodeId, question: Question<'_>, deadline: Instant) -> Result<v1::Reply, Error> {
        ask(&self.world, to.0, question.to_request(deadline), deadline).await
    }

    fn routing(&self) -> &Routing {
        &self.routing
    }

    async fn refresh(&self, than: u64) {
        while self.routing.map().version() <= than {
            self.learn().await;
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn prefer(&self) -> Option<NodeId> {
        None
    }
}

/// A door to each of these nodes, and so many routers.
pub(crate) async fn doors(world: &World, nodes: &[u64], routers: u32) -> Vec<Arc<dyn Door>> {
    let mut doors: Vec<Arc<dyn Door>> = Vec::new();
    for n in nodes {
        doors.push(Arc::new(NodeDoor { world: world.clone(), n: *n }));
    }
    for _ in 0..routers {
        let links = Links { world: world.clone(), routing: Routing::new() };
        links.learn().await;
        doors.push(Arc::new(RouterDoor(Router::new(links))));
    }
    doors
}
