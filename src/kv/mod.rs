//! What one partition replicates: an ordered map of rows, who may write to it, and what it has already answered.
//!
//! Pure: no clock, no task, no file, no randomness. Writes enter only through [`Store::apply`], in log order; reads
//! leave through [`Store::get`] and [`Store::scan`]; the whole state leaves through [`Store::freeze_next`] and comes
//! back through [`Restore`]. Equal logs make equal stores, byte for byte of their snapshots.
//!
//! Invariants:
//! * every row lies inside the partition's span (asserted when a snapshot is restored, decided in apply before);
//! * a version is given once per partition and goes up along the log, so a key's versions only go up;
//! * a write of a session is applied at most once, whatever is repeated, delayed or reordered: a session that has
//!   been forgotten is refused, never guessed;
//! * what decides in apply (layout, span, session limits) is part of the replicated state, never of a node's own
//!   configuration: replicas would part otherwise;
//! * no row keeps a received buffer alive: keys and values are copied when they are stored.

mod bounds;
mod codec;
mod command;
mod packed;
mod reply;
mod reshape;
mod rows;
mod scan;
mod session;
mod snapshot;
mod store;
mod table;
#[cfg(test)]
mod tests;

pub use bounds::NotOwned;
pub use codec::DecodeError;
pub use command::{Action, Command, Condition, Item, Op, Session, Write};
pub use packed::{Row, RowRef};
pub use reply::{Answer, Deleted, Done, Refusal, Reply, Written};
pub use reshape::{Birth, Change, Reshape, Split};
pub use rows::CALLED_ROWS;
pub use scan::{Page, SCAN_LOOKED_MAX, ScanSpec};
pub use session::{SESSION_AHEAD_MAX_MS, SessionLimits};
pub use snapshot::{FREEZE_LOOKED_MAX, Restore, SnapshotError};
pub use store::{Store, StoreConfig};
