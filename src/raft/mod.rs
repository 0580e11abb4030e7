//! Consensus: [`Group`] replicates a [`Machine`] over the nodes of its members, on openraft.
//!
//! The only module that knows openraft. Data partitions and the placement driver are groups of different machines; all
//! share one instantiation of openraft (`types`), one log engine and one stream of frames per pair of nodes.
//!
//! Invariants (beyond those of Raft):
//! * an error of a write says "not applied" only when openraft refused the write before appending it;
//! * a restarted replica neither votes nor campaigns until its leader's lease of before is over, and a restarted leader
//!   must be elected again: otherwise two leaders could hold a lease, or one could not know what it had committed;
//! * replica ids are never reused: a destroyed one is never opened again, and messages for another incarnation of a
//!   replica are not answered;
//! * a group that begins with a state begins with the same one on every member ([`seed`]), and is never initialized;
//! * no call into openraft is cancelled: openraft panics when a call that watches it stop is dropped half-way.

mod barrier;
mod codec;
mod config;
mod group;
mod hub;
mod machine;
mod members;
mod network;
mod pace;
mod quiet;
mod replica;
mod replicated;
mod runtime;
mod salvage;
mod seed;
mod serve;
mod sleep;
mod snapshots;
mod storage;
#[cfg(test)]
mod tests;
mod types;
pub mod watch;
mod wire;
mod witness;

pub use barrier::{BarrierError, Level};
pub use config::RaftConfig;
pub use group::{Group, Leadership, OpenError, ReadPoint, Role, Status, WriteError};
pub use hub::RaftHub;
pub use machine::{LogPosition, Machine, Restorer};
pub use members::{Goal, MembersError};
pub use salvage::{bury, salvage};
pub use seed::{SEED_AT, seed};
