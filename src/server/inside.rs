//! How a server reaches partitions on other nodes for clients that do not know the map: the client library's router,
//! over frames instead of gRPC.

use super::{exec::Executor, responder::WeakResponder};
use crate::{
    client::{
        router::{Caller, Question},
        routing::Routing,
    },
    env,
    error::{Error, Outcome, Reason},
    key::NodeId,
    proto::v1,
    transport::{
        Kind,
        endpoint::{CallError, Reply, Service},
    },
};
use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;

/// Calls this node's own replicas directly, and other nodes by frames.
#[derive(Clone)]
pub(crate) struct Inside {
    pub(crate) executor: Executor,
}

impl Caller for Inside {
    async fn call(&self, to: NodeId, question: Question<'_>, deadline: Instant) -> Result<v1::Reply, Error> {
        let node = &self.executor.node;
        let request = question.to_request(deadline);
        if to == node.id() {
            return Ok(reply_of(0, self.executor.execute(request, deadline).await));
        }
        let patience = deadline.saturating_duration_since(Instant::now());
        let is_write = super::exec::is_write(request.op.as_ref());
        let body = Bytes::from(request.encode_to_vec());
        let answer = node.endpoint().call(to, Kind::Kv, body, patience).await;
        let body = answer.map_err(|error| unanswered(to, error, is_write))?;
        v1::Reply::decode(body).map_err(|error| {
            let mut unreadable =
                Error::new(Reason::Unreachable, format!("node {to} sent an unreadable answer: {error}"));
            unreadable.outcome = is_write.then_some(Outcome::Unknown);
            unreadable
        })
    }

    fn routing(&self) -> &Routing {
        self.executor.node.routing()
    }

    /// The map is pushed; there is nothing to ask for, only to wait.
    async fn refresh(&self, than: u64) {
        self.routing().newer_than(than).await;
    }

    fn repeats_overloaded(&self) -> bool {
        false
    }

    fn prefer(&self) -> Option<NodeId> {
        Some(self.executor.node.id())
    }
}

/// The answer as a reply to the request of this id.
pub(crate) fn reply_of(id: u64, answer: Result<v1::reply::Result, Error>) -> v1::Reply {
    v1::Reply { id, result: Some(answer.unwrap_or_else(|error| v1::reply::Result::Error(v1::Error::from(&error)))) }
}

fn unanswered(to: NodeId, error: CallError, is_write: bool) -> Error {
    let outcome = match (is_write, error.may_have_arrived()) {
        (false, _) => None,
        (true, true) => Some(Outcome::Unknown),
        (true, false) => Some(Outcome::NotApplied),
    };
    let mut answer = Error::new(Reason::Unreachable, format!("node {to}: {error}")).with("node", to.0);
    answer.outcome = outcome;
    answer
}

/// Whether this node answers a request by itself: nothing is passed on twice.
fn may_be_passed_on(request: &v1::Request) -> bool {
    request.route.is_some() || matches!(request.op, Some(v1::request::Op::OpenSession(_)))
}

/// Answers requests that other nodes pass on.
pub(crate) struct PassedOn(pub(crate) WeakResponder);

impl Service for PassedOn {
    fn handle(&self, from: NodeId, body: Bytes, reply: Reply) {
        let Some(responder) = self.0.upgrade() else { return };
        match v1::Request::decode(body) {
            Ok(request) if may_be_passed_on(&request) => {
                env::spawn(async move {
                    let answer = responder.reply(request).await;
                    reply.send(Bytes::from(answer.encode_to_vec()));
                });
            }
            Ok(_) => tracing::error!(%from, "a request was passed on without its partition; dropped"),
            Err(error) => tracing::error!(%from, %error, "an unreadable request was passed on; dropped"),
        }
    }
}
