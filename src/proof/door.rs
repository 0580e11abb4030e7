//! Where clients send their requests: what the simulation and the drill have in common.
//!
//! Invariant: a request that came back without an answer says what is known of it, as every error of the catalogue does:
//! a door never says `NotApplied` of a write that may have been taken.

use crate::{
    client::{Client, pipeline::Pipeline},
    error::{Error, Outcome, Reason},
    proto::{
        batch,
        v1::{self, reply},
    },
};
use futures_util::future::BoxFuture;
use tokio::time::Instant;

/// A way into the cluster: the client library, one node, or a node of the simulation.
pub trait Door: Send + Sync + 'static {
    /// The node that it leads to; none for a door that chooses by itself.
    fn node(&self) -> Option<String>;

    /// Sends one request of the API, without a route, and waits for its answer at most until `deadline`.
    ///
    /// Resolves to an [`Error`] of the catalogue when the request failed; that of a write says what is known of it.
    fn ask(&self, request: v1::Request, deadline: Instant) -> BoxFuture<'_, Result<reply::Result, Error>>;
}

/// The client library: finds leaders and repeats by itself.
#[derive(Debug)]
pub struct Library(pub Client);

impl Door for Library {
    fn node(&self) -> Option<String> {
        None
    }

    fn ask(&self, request: v1::Request, deadline: Instant) -> BoxFuture<'_, Result<reply::Result, Error>> {
        Box::pin(self.0.router().execute(request, deadline))
    }
}

/// One node, whatever it is asked: it forwards where needed.
#[derive(Debug)]
pub struct OneNode {
    name: String,
    pipeline: Pipeline,
}

impl OneNode {
    /// The node called `name` at this address (`host:port`), connected to when first asked.
    ///
    /// # Errors
    /// When the address is malformed.
    pub fn new(name: impl Into<String>, address: &str) -> Result<Self, Error> {
        Ok(Self { name: name.into(), pipeline: Pipeline::new(address)? })
    }
}

impl Door for OneNode {
    fn node(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn ask(&self, request: v1::Request, deadline: Instant) -> BoxFuture<'_, Result<reply::Result, Error>> {
        let body = batch::request_body(request.route.as_ref(), request.op.as_ref());
        Box::pin(async move {
            match self.pipeline.call(body, deadline).await?.result {
                Some(reply::Result::Error(error)) => Err(error.into()),
                Some(result) => Ok(result),
                None => {
                    Err(Error::new(Reason::Internal, format!("{} answered nothing", self.name))
                        .outcome(Outcome::Unknown))
                }
            }
        })
    }
}
