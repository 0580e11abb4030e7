//! The real binary, as processes that are killed and started again.
//!
//! `fleet` starts and ends the processes; the other modules hold the promises: `crash` what survives kill -9,
//! `identity` who may join, `start` how a process begins and ends, `disk` that the log stays bounded, `data` that files
//! of skewed keys come back as they went in, `script` that `deploy/cluster.sh` does what it says.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod crash;
mod data;
mod disk;
mod fleet;
mod identity;
mod script;
mod start;
