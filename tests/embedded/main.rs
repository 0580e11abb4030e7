//! The embedded cluster over real gRPC: what a user of the library, or of any language, sees.
//!
//! Every test has a cluster of its own on loopback ports of its own. Tests with a time bar have the machine for
//! themselves ([`support::alone`]); the others share it ([`support::shared`]).

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod acceptance;
mod balance;
mod edges;
mod failures;
mod healing;
mod overload;
mod ranges;
mod reads;
mod recovery;
mod sessions;
mod sizing;
mod splits;
mod support;
mod surface;
