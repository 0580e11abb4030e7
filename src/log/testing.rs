//! What the tests of the engines share.

use super::{Done, Record};
use crate::key::{PartitionId, ReplicaId};
use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;
use std::{io, sync::Arc};

pub(super) type Place = (PartitionId, ReplicaId);

pub(super) const A: Place = (PartitionId(1), ReplicaId(1));
pub(super) const B: Place = (PartitionId(1), ReplicaId(2));

/// Entries at `first`, …, whose bytes tell their index.
pub(super) fn append(first: u64, count: u64) -> Record {
    Record::Append { first, entries: (first..first + count).map(|n| Bytes::from(format!("e{n}"))).collect() }
}

/// A `done`, and where it puts its result.
pub(super) fn outcome() -> (Arc<Mutex<Option<io::Result<()>>>>, Done) {
    let result = Arc::new(Mutex::new(None));
    let slot = result.clone();
    (result, Box::new(move |outcome| *slot.lock() = Some(outcome)))
}

/// Scripts of records for two replicas, most of which can follow one another.
pub(super) fn records() -> impl Strategy<Value = Vec<(Place, Record)>> {
    let step = (any::<bool>(), 0_u8..12, 0_u64..6, 1_u64..5);
    proptest::collection::vec(step, 0..60).prop_map(|steps| {
        let mut ends = [0_u64; 2];
        let mut made = Vec::new();
        for (n, (which, what, back, count)) in steps.into_iter().enumerate() {
            let (end, place) = (&mut ends[usize::from(which)], if which { A } else { B });
            let record = match what {
                0..5 => {
                    *end += count;
                    append(*end - count, count)
                }
                5 | 6 => {
                    *end = end.saturating_sub(back);
                    Record::Truncate { from: *end }
                }
                7 => {
                    let upto = (*end + 2).saturating_sub(back);
                    *end = (*end).max(upto + 1);
                    Record::Purge { upto, marker: format!("m{upto}").into() }
                }
                8 => Record::Vote(format!("v{n}").into()),
                9 | 10 => Record::Committed(format!("c{n}").into()),
                _ if n % 7 == 0 => Record::Tombstone,
                _ => append(*end + back, count), // Mostly a hole, to be refused.
            };
            made.push((place, record));
        }
        made
    })
}
