//! Rows all over the key order: inserted once, perhaps deleted once, and scanned all the time.

use crate::proof::{
    history::Kind,
    perform::Client,
    wire::{Op, Scan},
};
use parking_lot::Mutex;
use rand::RngExt as _;
use std::collections::BTreeSet;

/// Points of the key order: keys begin with one of them in hexadecimal.
const POINTS: u32 = 1 << 16;
/// Points that a scan covers at most, except the few that cover all.
const WIDTH_MAX: u32 = POINTS / 6;
/// Scans of the whole range.
const WHOLE_SHARE: f64 = 0.02;

/// The rows that are there.
#[derive(Debug, Default)]
pub(super) struct Rows {
    live: Mutex<BTreeSet<String>>,
}

impl Rows {
    pub(super) async fn step(&self, client: &mut Client) {
        let live = self.live.lock().len();
        let crowded = live > client.settings().keys as usize;
        let doomed = match client.rng.random_range(0..100) {
            0..45 => return scan(client).await,
            45..60 => true,
            _ => crowded,
        };
        let delete = if doomed { self.draw_live(client) } else { None };
        match delete {
            Some(key) => {
                client.perform(&Op::Delete { key }).await;
            }
            None => self.insert(client).await,
        }
    }

    async fn insert(&self, client: &mut Client) {
        let value = client.fresh_value();
        // The value makes the key unique as well: it is never inserted again.
        let key = format!("{:04x}/{}", client.rng.random_range(0..POINTS), value.replace(':', "."));
        let inserted = client.perform(&Op::Write { key: key.clone(), value }).await;
        if inserted.kind == Kind::Ok {
            self.live.lock().insert(key);
        }
    }

    /// A row that nobody else will delete.
    fn draw_live(&self, client: &mut Client) -> Option<String> {
        let from = format!("{:04x}", client.rng.random_range(0..POINTS));
        let mut live = self.live.lock();
        let key = live.range(from..).next().or_else(|| live.first()).cloned()?;
        live.remove(&key);
        Some(key)
    }
}

async fn scan(client: &mut Client) {
    let (from, to) = if client.rng.random_bool(WHOLE_SHARE) {
        (0, POINTS)
    } else {
        let from = client.rng.random_range(0..POINTS);
        (from, (from + client.rng.random_range(1..=WIDTH_MAX)).min(POINTS))
    };
    let (from, to) = (point(from), point(to));
    let limit = client.rng.random_bool(0.25).then(|| client.rng.random_range(1..=40));
    let page_rows = client.settings().page_rows.clone();
    let page_rows = client.rng.random_range(page_rows);
    let reverse = client.rng.random_bool(0.3);
    let mode = client.draw_level();
    client.perform(&Op::Scan(Scan { from, to, limit, page_rows, reverse, mode })).await;
}

/// The first possible key at a point.
fn point(n: u32) -> String {
    if n == POINTS { "g".to_owned() } else { format!("{n:04x}") }
}

/// The whole range in so many parts.
pub(super) fn parts(count: u32) -> Vec<(String, String)> {
    (0..count).map(|n| (point(n * POINTS / count), point((n + 1) * POINTS / count))).collect()
}
