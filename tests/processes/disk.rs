//! Disk use under endless overwrites.

use crate::fleet::{Fleet, PATIENCE, eventually};
use futures_util::{StreamExt as _, stream};
use std::{fs, path::Path};

const KEYS: usize = 64;
const VALUE_BYTES: usize = 64 << 10;
const OVERWRITES: usize = 12_288;
/// The rows take 4 MiB, what is live of the log some more. The log engine keeps up to three segments of 32 MiB then, a
/// spare one and what is being written; the rest is for the snapshots.
const DISK_BYTES_MAX: u64 = 192 << 20;

fn size(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return fs::metadata(path).map_or(0, |file| file.len()) };
    // A file may go away while it is looked at.
    entries.flatten().map(|entry| size(&entry.path())).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_stays_bounded_under_endless_overwrites() {
    let mut fleet = Fleet::start(1, &["--set", "raft.snapshot_bytes=1MiB"]).await;
    let rows = fleet.client().await.keyspace("default");
    let mut largest = 0;
    for round in 0..OVERWRITES / KEYS {
        let puts = stream::iter(0..KEYS).map(|n| {
            let value = vec![round as u8; VALUE_BYTES];
            rows.put(format!("k{n}"), value).deadline(PATIENCE).into_future()
        });
        let written = puts.buffer_unordered(8).filter(|written| std::future::ready(written.is_ok())).count().await;
        assert_eq!(written, KEYS);
        largest = largest.max(size(&fleet.data(0)));
    }
    let written = (OVERWRITES * VALUE_BYTES) as u64;
    assert!(written >= 4 * DISK_BYTES_MAX, "else the bound shows nothing");
    assert!(largest <= DISK_BYTES_MAX, "{largest} bytes on disk, {written} written");
    fleet.kill_all();
    fleet.start_all();
    let last = (OVERWRITES / KEYS - 1) as u8;
    eventually(PATIENCE, "every row after kill -9", || async {
        let found = rows.scan_prefix("k").await.map_err(|error| error.to_string())?;
        assert!(found.len() == KEYS && found.iter().all(|row| row.value == vec![last; VALUE_BYTES]));
        Ok(())
    })
    .await;
}
