//! The client library: the same code outside, over gRPC, and inside every server, over frames.
//!
//! ```no_run
//! # async fn example() -> Result<(), meridian::client::Error> {
//! use futures_util::TryStreamExt as _;
//! use meridian::client::{Client, Consistency};
//!
//! let client = Client::connect(["127.0.0.1:7170"]).await?;
//! let users = client.keyspace("users");
//! users.put("anna", "1").if_absent().await?;
//! let row = users.get("anna").consistency(Consistency::Eventual).await?;
//! let mut rows = users.scan("a".."m").reverse().limit(10).rows();
//! while let Some(row) = rows.try_next().await? {
//!     println!("{:?} = {:?}", row.key, row.value);
//! }
//! # drop(row);
//! # Ok(())
//! # }
//! ```
//!
//! From the outside in: [`Client`], [`Keyspace`] and the operations build requests of the API; [`router::Router`]
//! finds the partitions they concern and asks their replicas, through a [`router::Caller`]: [`pipeline::Pipeline`]s in
//! the library, frames in the server. `scan` and `page` are the pure parts of reading ranges.
//!
//! Invariants:
//! * an error of a write says "not applied" only if it has not happened and will not;
//! * a write is sent again only under the same session and sequence;
//! * nothing here panics or waits without a bound.

mod admin;
mod attempt;
mod connection;
mod error;
mod gather;
mod horizon;
pub mod keys;
mod page;
pub mod pipeline;
pub mod query;
mod reads;
mod remote;
pub mod router;
pub mod routing;
mod scan;
mod sessions;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod token;
mod writes;

pub use admin::Admin;
pub use connection::{Builder, Client, DEADLINE_DEFAULT, Keyspace, Session};
pub use error::Error;
pub use keys::{IntegerKeys, IntoBytes, IntoKey, IntoRange, KeyType, RawKeys, Row};
pub use reads::{Consistency, Count, Get, GetMany, Page, Running, Scan};
pub use router::{Caller, Question, Router};
pub use routing::Routing;
pub use writes::{
    Batch, BatchWritten, CompareAndSet, Delete, DeleteRange, Expected, Increment, Put, SingleWrite, Write, Written,
};

/// What is known of a failed write, and why anything failed.
pub use crate::error::{Outcome, Reason};
