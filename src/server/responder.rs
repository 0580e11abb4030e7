//! What one node answers: a request that names its partition from its own replica, any other by asking those concerned.
//!
//! The gRPC services, the frames of other nodes, and whoever runs a [`Node`] without either of them, all ask here.
//!
//! Invariant: what another node passes on is answered here or refused, never passed on again.

use super::{
    exec::{self, Executor},
    inside::{Inside, PassedOn, reply_of},
};
use crate::{
    client::router::Router,
    error::Error,
    node::{Node, config::Limits},
    proto::v1,
    telemetry,
    transport::Kind,
};
use futures_util::Stream;
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::Instant;
use v1::{reply::Result as Answer, request::Op};

/// Longest deadline that a request may ask for.
pub(crate) const DEADLINE_MAX: Duration = Duration::from_secs(3_600);

/// Answers the requests of the API on behalf of one node. Cheap to clone.
#[derive(Clone)]
pub struct Responder(Arc<Inner>);

struct Inner {
    executor: Executor,
    router: Router<Inside>,
    deadline_default: Duration,
}

impl Responder {
    /// Answers for `node`, also what other nodes pass on, for as long as a clone of this exists.
    #[must_use]
    pub fn start(node: Arc<Node>, limits: Arc<Limits>, deadline_default: Duration) -> Self {
        let executor = Executor { node, limits };
        let router = Router::new(Inside { executor: executor.clone() });
        let responder = Self(Arc::new(Inner { executor, router, deadline_default }));
        let passed_on = PassedOn(WeakResponder(Arc::downgrade(&responder.0)));
        responder.node().endpoint().register(Kind::Kv, Arc::new(passed_on));
        responder
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.0.executor.node
    }

    /// The largest requests that it accepts.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.0.executor.limits
    }

    /// Answers one request, at most until `deadline`.
    ///
    /// # Errors
    /// Of the catalogue; those of writes say what is known of the write.
    pub async fn answer(&self, request: v1::Request, deadline: Instant) -> Result<Answer, Error> {
        let started = Instant::now();
        let method = exec::method(request.op.as_ref());
        let result = self.answer_uncounted(request, deadline).await;
        telemetry::observe_rpcs(method, code_of(&result), started.elapsed(), 1);
        result
    }

    async fn answer_uncounted(&self, request: v1::Request, deadline: Instant) -> Result<Answer, Error> {
        if request.route.is_some() {
            return self.0.executor.execute(request, deadline).await;
        }
        if let Some(Op::OpenSession(_)) = request.op {
            return Ok(Answer::OpenSession(self.0.executor.open_session()));
        }
        self.0.router.execute(request, deadline).await
    }

    /// Answers one request of a stream, within the deadline that it states or else the default.
    pub async fn reply(&self, request: v1::Request) -> v1::Reply {
        let (id, deadline) = (request.id, Instant::now() + self.patience(&request));
        reply_of(id, self.answer(request, deadline).await)
    }

    /// Answers requests of a stream that are [`exec::alike`], or one of any kind: gives `out` one reply for each, in order.
    /// The longest deadline counts for all; whoever stated a shorter one does not wait longer for that.
    pub(crate) async fn reply_alike(&self, mut requests: Vec<v1::Request>, mut out: impl FnMut(v1::Reply)) {
        if requests.len() == 1 {
            let request = requests.pop().expect("there is one");
            return out(self.reply(request).await);
        }
        let started = Instant::now();
        let patience = requests.iter().map(|request| self.patience(request)).max().unwrap_or_default();
        let asked: Vec<(u64, &'static str)> =
            requests.iter().map(|request| (request.id, exec::method(request.op.as_ref()))).collect();
        let answers = self.0.executor.execute_alike(requests, started + patience).await;
        let mut counted: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for ((id, method), answer) in asked.into_iter().zip(answers) {
            *counted.entry((method, code_of(&answer))).or_default() += 1;
            out(reply_of(id, answer));
        }
        for ((method, code), count) in counted {
            telemetry::observe_rpcs(method, code, started.elapsed(), count);
        }
    }

    fn patience(&self, request: &v1::Request) -> Duration {
        let asked = Duration::from_millis(request.deadline_ms.into());
        if asked.is_zero() { self.0.deadline_default } else { asked.min(DEADLINE_MAX) }
    }

    /// Every page of a scan, one after the other, each within `page_deadline`.
    pub fn scan_pages(
        &self,
        scan: v1::ScanRequest,
        page_deadline: Duration,
    ) -> impl Stream<Item = Result<v1::ScanReply, Error>> + Send + use<> {
        self.0.router.scan_pages(scan, page_deadline)
    }
}

fn code_of(result: &Result<Answer, Error>) -> &'static str {
    result.as_ref().map_or_else(|error| error.reason.as_str(), |_| "OK")
}

impl std::fmt::Debug for Responder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Responder").field("node", &self.node().id()).finish_non_exhaustive()
    }
}

/// A responder that may be gone: what its node's endpoint holds, so that the two do not keep each other alive.
pub(crate) struct WeakResponder(Weak<Inner>);

impl WeakResponder {
    pub(crate) fn upgrade(&self) -> Option<Responder> {
        self.0.upgrade().map(Responder)
    }
}
