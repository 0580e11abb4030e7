//! Meridian: a strongly consistent, distributed, in-memory key-value store with range queries.

// Layer 0: words and seams.
pub mod env;
pub mod error;
pub mod key;
pub mod proto;
pub mod telemetry;
// Layer 1: pure logic.
pub mod kv;
pub mod placement;
// Layer 2: the world behind narrow doors.
pub mod log;
pub mod raft;
pub mod transport;
// Layer 3: the library outside and inside.
pub mod client;
pub mod node;
// Layer 4: the surface.
pub mod cli;
pub mod server;
