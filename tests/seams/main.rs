//! Whole clusters of production nodes in one paused, single-threaded runtime: network, disks, clocks, randomness and
//! tasks are the simulated ones, everything behind those seams is what runs in production.
//!
//! A test is a function of its seed. Set `SEAMS_LOG=info` (any `tracing` filter) to see the nodes' own log lines, and
//! `SEAMS_SEED=n` to run only that seed of the mixed scenario.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod client;
mod cuts;
mod forming;
mod history;
mod keyspaces;
mod register;
mod restarts;
mod scenario;
mod world;
