//! Drills: a cluster of real processes on this machine, workloads against it, faults into it, and a judgement.
//!
//! `meridian drill` (see [`crate::cli::drill`]) is Jepsen in the box: its nodes are this very binary (`meridian start`,
//! data on disk, every write synced), killed with `kill -9`, stopped with SIGSTOP, cut off from each other by proxies or
//! in network namespaces, and hurt from the inside by [`crate::control`]. Clients stand outside of every cut: each node
//! can always be asked directly, on whatever side it is. What they are told is recorded as `kvhist/1` and judged by
//! [`crate::proof`].
//!
//! | module | |
//! |---|---|
//! | [`settings`], [`schedule`] | what was asked for; which fault comes when (pure, seeded) |
//! | [`process`], [`proxy`], [`network`], [`namespaces`], [`cluster`] | processes, the network between them, and both together |
//! | [`nemesis`], [`operator`] | picks victims, installs faults, heals them; asks the cluster for changes |
//! | [`run`], [`verdicts`], [`export`] | one run from the empty directory to the verdicts; what is judged besides histories; files |
//!
//! Invariants:
//! * no process, namespace or route outlives the drill; processes are signalled only by the child that was started here;
//! * a failure of the drill itself is an [`Error`], never a violation;
//! * unless all nodes are hit on purpose, faults take no more nodes, together, than every group of replicas can miss.

pub mod api;
pub mod cluster;
pub mod export;
pub mod namespaces;
pub mod nemesis;
pub mod network;
pub mod operator;
pub mod process;
pub mod proxy;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod verdicts;

/// Why a drill could not do its work. Says nothing of the product.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was asked for cannot be done.
    #[error("{0}")]
    Impossible(String),
    /// A file, a process or a socket.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Cause.
        source: std::io::Error,
    },
    /// The cluster did not do in time what it must do before anything has been done to it.
    #[error("{0}")]
    NotReady(String),
}

impl Error {
    /// An error of the system, with what was tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
