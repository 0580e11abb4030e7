//! What partitions hold and what they are asked: soft state, told by whoever leads them and forgotten with the
//! driver's leader. Nothing that has to be true may hang on it.
//!
//! A report is a list of [`PartitionLoad`]s in the order of ids, in variable-length integers: some ten bytes each.

use super::DecodeError;
use crate::key::PartitionId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a group costs a node before it holds anything, as bytes: what makes empty partitions count.
pub const REPLICA_BYTES: u64 = 4 << 20;
/// Bytes read or written that cost about as much as one request.
pub const REQUEST_BYTES: u64 = 4 << 10;
/// Bytes that count for a row which a range looks at, if it is shorter or not sent: a row costs about a twelfth of the CPU
/// time of a request (0.5 beside 6 µs, `meridian bench`).
pub const ROW_LOOKED_BYTES: u64 = REQUEST_BYTES / 12;
/// What leading a partition that nobody asks for counts, in requests per second: what spreads idle leaders.
pub const LEADER_REQUESTS: u64 = 10;
/// How much more a write costs than a read: it is logged, sent and applied.
pub const WRITE_COST: u64 = 4;
/// Rates are blended over about so long: what lasts less is not worth a move.
pub const BLEND_MS: u64 = 20_000;

/// One partition's load, as its leader sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PartitionLoad {
    /// Bytes of its rows.
    pub bytes: u64,
    /// Rows.
    pub rows: u64,
    /// Requests per second that read, lately.
    pub reads_per_s: u32,
    /// Requests per second that write, lately.
    pub writes_per_s: u32,
    /// Bytes read and written per second, lately; for what only costs CPU time, as many as cost the same.
    pub traffic_per_s: u32,
}

impl PartitionLoad {
    /// What a replica weighs on its node's memory.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.bytes + REPLICA_BYTES
    }

    /// What any member does per second: it logs and applies what is written.
    #[must_use]
    pub const fn member_work(&self) -> u64 {
        self.writes_per_s as u64 * (WRITE_COST - 1)
    }

    /// What the leader does per second on top of [`PartitionLoad::member_work`]: it answers.
    #[must_use]
    pub const fn leader_work(&self) -> u64 {
        LEADER_REQUESTS + self.reads_per_s as u64 + self.writes_per_s as u64 + self.traffic_per_s as u64 / REQUEST_BYTES
    }
}

/// The loads of partitions by id. Those that nobody has told of count as empty and idle.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loads(pub BTreeMap<PartitionId, PartitionLoad>);

impl Loads {
    /// The load of a partition.
    #[must_use]
    pub fn of(&self, partition: PartitionId) -> PartitionLoad {
        self.0.get(&partition).copied().unwrap_or_default()
    }

    /// Takes a report of what happened in the last `elapsed_ms`: sizes as they are, rates blended with those before.
    pub fn take(&mut self, report: &Self, elapsed_ms: u64) {
        let blend = |old: u32, new: u32| {
            let weighed = u64::from(old) * BLEND_MS + u64::from(new) * elapsed_ms;
            (weighed / (BLEND_MS + elapsed_ms).max(1)) as u32
        };
        for (id, new) in &report.0 {
            let old = self.0.entry(*id).or_insert(*new);
            *old = PartitionLoad {
                bytes: new.bytes,
                rows: new.rows,
                reads_per_s: blend(old.reads_per_s, new.reads_per_s),
                writes_per_s: blend(old.writes_per_s, new.writes_per_s),
                traffic_per_s: blend(old.traffic_per_s, new.traffic_per_s),
            };
        }
    }

    /// A partition was cut in two: each part counts half, until it is told what they hold and do now.
    pub fn cut(&mut self, partition: PartitionId, child: PartitionId) {
        let Some(whole) = self.0.get(&partition) else { return };
        let half = PartitionLoad {
            bytes: whole.bytes / 2,
            rows: whole.rows / 2,
            reads_per_s: whole.reads_per_s / 2,
            writes_per_s: whole.writes_per_s / 2,
            traffic_per_s: whole.traffic_per_s / 2,
        };
        self.0.extend([(partition, half), (child, half)]);
    }

    /// Versioned bytes of a report.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        super::encode(&self.0.iter().collect::<Vec<_>>())
    }

    /// The report behind these bytes.
    ///
    /// # Errors
    /// When they are none of ours or of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let loads: Vec<(PartitionId, PartitionLoad)> = super::decode("report of loads", bytes)?;
        Ok(Self(loads.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_counts_half_on_either_side() {
        let (parent, child) = (PartitionId(1), PartitionId(2));
        let load = |n: u32| PartitionLoad { reads_per_s: n, ..PartitionLoad::default() };
        let mut loads = Loads([(parent, load(1_000))].into());
        loads.cut(parent, child);
        assert_eq!((loads.of(parent), loads.of(child)), (load(500), load(500)));
        loads.take(&Loads([(parent, load(500))].into()), 2_000);
        assert_eq!(loads.of(parent), load(500), "it has not to forget what the whole did");
        loads.cut(PartitionId(3), PartitionId(4));
        assert_eq!(loads.0.len(), 2, "of which nothing was told");
    }

    #[test]
    fn reports_are_short_and_come_back() {
        let load =
            PartitionLoad { bytes: 64 << 20, rows: 500_000, reads_per_s: 1_200, writes_per_s: 90, traffic_per_s: 0 };
        let loads = Loads((1..=100).map(|id| (PartitionId(id * 977), load)).collect());
        let bytes = loads.encode();
        assert_eq!(Loads::decode(&bytes), Ok(loads));
        assert!(bytes.len() <= 100 * 16, "{} bytes", bytes.len());
        assert!(Loads::decode(&bytes[..bytes.len() - 1]).is_err());
    }
}
