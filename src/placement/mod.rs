//! Who owns what, and what to do next: the map, the ring, the placement driver's replicated state and its planner.
//!
//! Pure: no clock, no randomness, no IO, no openraft; time and ids of the outside come in as arguments. The driver is
//! group 0, replicated by the same code as the data: its log holds encoded [`Command`]s and its machine is [`State`].
//! [`plan()`] looks at a state and at who is alive and proposes further commands; whoever leads group 0 performs them.
//!
//! Invariants:
//! * the partitions of every keyspace tile its order: no gap, no overlap ([`Map::check`]);
//! * ids of nodes, keyspaces, partitions and replicas are handed out in [`State::apply`] and never twice;
//! * every change of the map raises its version by one; a command that changes nothing does not;
//! * the same commands in the same order give the same bytes on every machine;
//! * no step lowers the number of live members above a partition's quorum.

pub mod balance;
pub mod command;
mod cutting;
pub mod doctor;
pub mod journal;
pub mod limits;
pub mod load;
pub mod map;
mod merging;
pub mod plan;
pub mod recovery;
pub mod ring;
pub mod sizing;
mod standing;
pub mod state;
pub mod uniting;

pub use balance::Balancer;
pub use command::{Answer, Command, CreateKeyspace, Cuts, Refusal, RegisterNode, Reply, Step};
pub use load::{Loads, PartitionLoad};
pub use map::{Cut, Fit, Keyspace, Map, MapDelta, Node, Partition, Phase, Standing};
pub use merging::{Duty, Merge};
pub use plan::{Decision, Health, Liveness, driver_replicas, plan};
pub use recovery::{Recover, Recovery};
pub use ring::{Placer, Ring};
pub use sizing::Sizing;
pub use standing::{Assessment, Blocker, assess};
pub use state::State;

use crate::error::{Error, Reason};
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// Format of every encoding of this module, its first byte. Fields are never reordered within one format.
const FORMAT: u8 = 3;

/// Bytes that are not what they should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct DecodeError {
    /// What was expected.
    pub what: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Self {
        Self::new(Reason::Corrupt, error.to_string())
    }
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    postcard::to_extend(value, vec![FORMAT]).expect("a growing buffer takes any value of ours").into()
}

fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, DecodeError> {
    let wrong = |why: String| DecodeError { what, why };
    let (format, body) = bytes.split_first().ok_or_else(|| wrong("no bytes at all".to_owned()))?;
    if *format != FORMAT {
        return Err(wrong(format!("format {format}, this program reads format {FORMAT}")));
    }
    let (value, rest) = postcard::take_from_bytes(body).map_err(|error| wrong(error.to_string()))?;
    if !rest.is_empty() {
        return Err(wrong(format!("{} bytes too many", rest.len())));
    }
    Ok(value)
}

/// Bytes for golden tests.
#[cfg(test)]
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
