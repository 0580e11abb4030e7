//! How fast a node sends snapshots: all its transfers together stay below a rate, so that replicas which are built anew or
//! moved leave room for what clients ask.
//!
//! Invariant: pieces go out in the order in which they were announced, each once those before it have had their time.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// A rate that several transfers share.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_s: u64,
    /// When what was announced so far has had its time.
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    /// So many bytes per second, at least one.
    pub(super) fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), free_at: Mutex::default() }
    }

    /// Announces so many bytes and waits until they may go out.
    pub(super) async fn take(&self, bytes: usize) {
        let begin = {
            let mut free_at = self.free_at.lock();
            let now = Instant::now();
            let begin = free_at.map_or(now, |at| at.max(now));
            *free_at = Some(begin + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64));
            begin
        };
        sleep_until(begin).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn transfers_share_the_rate_and_idle_time_is_not_saved_up() {
        let (pace, began) = (Pace::new(1_000), Instant::now());
        pace.take(500).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "the first goes at once");
        tokio::join!(pace.take(1_000), pace.take(250));
        assert_eq!(began.elapsed().as_millis(), 1_500, "500 and 1,000 bytes are before the last");
        tokio::time::sleep(Duration::from_secs(60)).await;
        let again = Instant::now();
        pace.take(2_000).await;
        pace.take(1).await;
        assert_eq!(again.elapsed().as_millis(), 2_000);
    }
}
