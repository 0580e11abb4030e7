//! Whole clusters of production nodes in one paused, single-threaded runtime: network, disks, clocks, randomness and
//! tasks are the simulated ones, everything behind those seams is what runs in production.
//!
//! `cargo test --test sim` runs the directed scenarios, the same seed twice, every plan that once found a bug, and fresh
//! seeds. `cargo test --test sim -- help` tells of the commands for people: `run`, `soak`, `shrink`, `plan`.
//!
//! A test is a function of its seed. Set `SIM_LOG=info` (any `tracing` filter) to see the nodes' own log lines.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod client;
mod command;
mod coverage;
mod crew;
mod cuts;
mod dividing;
mod doors;
mod faults;
mod forming;
mod handing;
mod invariants;
mod keep;
mod keyspaces;
mod nemesis;
mod operator;
mod plan;
#[cfg(feature = "planted")]
mod planted;
mod recoveries;
mod rest;
mod restarts;
mod run;
mod shrink;
mod suite;
mod trace;
mod verdict;
mod world;

/// Directed scenarios of a module: private functions that are not listed are dead code, and the compiler says so.
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        pub(crate) const SCENARIOS: &[(&str, fn())] =
            &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}
pub(crate) use scenarios;

fn main() -> std::process::ExitCode {
    #[cfg(feature = "planted")]
    meridian::plant::set_from_env().unwrap();
    match command::asked() {
        Some(command) => command.run(),
        None => libtest_mimic::run(&libtest_mimic::Arguments::from_args(), suite::trials()).exit_code(),
    }
}
