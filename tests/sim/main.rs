//! Whole clusters of production nodes in one paused, single-threaded runtime: network, disks, clocks, randomness and
//! tasks are the simulated ones, everything behind those seams is what runs in production.
//!
//! `cargo test --test sim` runs the directed scenarios, the same seed twice, every plan that once found a bug, and fresh
//! seeds. `cargo test --test sim -- help` tells of the commands for people: `run`, `soak`, `shrink`, `plan`.
//!
//! A test is a function of its seed. Set `SIM_LOG=info` (any `tracing` filter) to see the nodes' own log lines.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod client;
mod cuts;
mod forming;
mod keyspaces;
mod register;
mod restarts;
mod scenario;
mod trace;
mod world;

use libtest_mimic::{Arguments, Trial};

/// Directed scenarios of a module: private functions that are not listed are dead code, and the compiler says so.
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        pub(crate) const SCENARIOS: &[(&str, fn())] =
            &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}
pub(crate) use scenarios;

fn main() {
    let directed = [cuts::SCENARIOS, forming::SCENARIOS, keyspaces::SCENARIOS, restarts::SCENARIOS, scenario::SCENARIOS];
    let trials = directed.concat().into_iter().map(|(name, run)| {
        let name = name.trim_start_matches("sim::");
        Trial::test(name, move || {
            run();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}
