//! Accounts of one partition: atomic transfers between them, and scans of all. The total never changes.
//!
//! A scan asks for all accounts in one page, so that it sees one state of the partition at any level.

use crate::proof::{
    history::Kind,
    perform::Client,
    wire::{Op, Scan, Swap},
};
use parking_lot::Mutex;
use rand::RngExt as _;
use std::collections::BTreeMap;

/// What every account begins with.
pub(super) const OPENING: i64 = 100;
/// Accounts at most: one page holds them, and few transfers meet.
const ACCOUNTS_MAX: u32 = 40;
/// Transfers that first look at the accounts; others trust what was last seen.
const LOOK_SHARE: f64 = 0.5;

/// The accounts.
#[derive(Debug)]
pub(super) struct Bank {
    accounts: Vec<String>,
    /// What accounts were last seen to hold.
    seen: Mutex<BTreeMap<String, i64>>,
}

/// From the first possible account to the first key after them.
pub(super) fn range() -> (String, String) {
    ("bank/".to_owned(), "bank0".to_owned())
}

impl Bank {
    pub(super) fn new(accounts: u32) -> Self {
        let accounts = (0..accounts.clamp(2, ACCOUNTS_MAX)).map(|n| format!("bank/{n:02}")).collect();
        Self { accounts, seen: Mutex::default() }
    }

    pub(super) fn accounts(&self) -> &[String] {
        &self.accounts
    }

    pub(super) async fn step(&self, client: &mut Client) {
        if client.rng.random_bool(LOOK_SHARE) || self.seen.lock().len() < self.accounts.len() {
            self.look(client).await;
        } else {
            self.transfer(client).await;
        }
    }

    async fn look(&self, client: &mut Client) {
        let ((from, to), mode) = (range(), client.draw_level());
        let reverse = client.rng.random_bool(0.3);
        let scan = Scan { from, to, limit: None, page_rows: ACCOUNTS_MAX, reverse, mode };
        let seen = client.perform(&Op::Scan(scan)).await;
        let kvs = seen.value.get("kvs").and_then(|kvs| kvs.as_array()).into_iter().flatten();
        let mut last = self.seen.lock();
        for kv in kvs {
            if let (Some(account), Some(balance)) = (kv[0].as_str(), kv[1].as_str().and_then(|text| text.parse().ok()))
            {
                last.insert(account.to_owned(), balance);
            }
        }
    }

    async fn transfer(&self, client: &mut Client) {
        let from = client.rng.random_range(0..self.accounts.len());
        let to = (from + client.rng.random_range(1..self.accounts.len())) % self.accounts.len();
        let amount = client.rng.random_range(1..=10);
        let (from, to) = (&self.accounts[from], &self.accounts[to]);
        let (rich, poor) = {
            let seen = self.seen.lock();
            let (Some(rich), Some(poor)) = (seen.get(from), seen.get(to)) else { return };
            (*rich, *poor)
        };
        let swap =
            |key: &String, old: i64, new: i64| Swap { key: key.clone(), old: old.to_string(), new: new.to_string() };
        let mut swaps = [swap(from, rich, rich - amount), swap(to, poor, poor + amount)];
        if client.rng.random_bool(0.5) {
            swaps.reverse();
        }
        let done = client.perform(&Op::Batch(swaps.to_vec())).await;
        let mut seen = self.seen.lock();
        if done.kind == Kind::Ok {
            seen.extend([(from.clone(), rich - amount), (to.clone(), poor + amount)]);
        } else {
            // Somebody was faster, or may have been: look again before the next transfer.
            seen.clear();
        }
    }
}
