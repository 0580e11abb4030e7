//! The node's hybrid logical clock: wall time that never goes back, shared by all partitions it leads.
//!
//! Pure but for the wall time handed in. Safety never rests on it: `kv` raises every stamp above the last version of
//! its partition.

use crate::key::{Version, version_at};
use std::sync::atomic::{AtomicU64, Ordering};

/// Hands out stamps that only go up.
#[derive(Debug, Default)]
pub struct Hlc {
    last: AtomicU64,
}

impl Hlc {
    /// A stamp at `wall_ms`, above every stamp handed out or observed before.
    pub fn stamp(&self, wall_ms: u64) -> Version {
        let at = version_at(wall_ms);
        let before = self
            .last
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(at.max(last + 1)))
            .expect("the closure always gives a value");
        at.max(before + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_go_up_even_when_the_wall_clock_goes_back() {
        let hlc = Hlc::default();
        let first = hlc.stamp(1_000);
        let second = hlc.stamp(1_000);
        let third = hlc.stamp(10);
        assert!(first < second && second < third);
        assert_eq!(hlc.stamp(2_000), version_at(2_000));
    }
}
