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
const OPENING: i64 = 100;
/// Accounts at most: one page holds them, and few transfers meet.
const ACCOUNTS_MAX: u32 = 40;
/// Transfers that first look at the accounts; others trust what was last seen.
const LOOK_SHARE: f64 = 0.5;

/// The accounts.
#[derive(Debug)]
pub(super) struct Bank {
    accounts: Vec<String>,
    /// What accounts were last seen to hold.
    seen: Mutex<BTreeMap<String, String>>,
}

/// From the first possible account to the first key after them.
pub(super) fn range() -> (String, String) {
    ("bank/".to_owned(), "bank0".to_owned())
}

/// A balance that nobody has written before.
fn balance(client: &mut Client, amount: i64) -> String {
    format!("{amount}#{}", client.fresh_value())
}

/// What an account begins with.
pub(super) fn opening_balance(client: &mut Client) -> String {
    balance(client, OPENING)
}

fn amount_of(balance: &str) -> Option<i64> {
    balance.split_once('#')?.0.parse().ok()
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
            if let (Some(account), Some(balance)) = (kv[0].as_str(), kv[1].as_str()) {
                last.insert(account.to_owned(), balance.to_owned());
            }
        }
    }

    async fn transfer(&self, client: &mut Client) {
        let from = client.rng.random_range(0..self.accounts.len());
        let to = (from + client.rng.random_range(1..self.accounts.len())) % self.accounts.len();
        let amount = client.rng.random_range(1..=10);
        let (from, to) = (&self.accounts[from], &self.accounts[to]);
        let (old_from, old_to) = {
            let seen = self.seen.lock();
            (seen[from].clone(), seen[to].clone())
        };
        let (Some(rich), Some(poor)) = (amount_of(&old_from), amount_of(&old_to)) else { return };
        let mut swaps = [
            Swap { key: from.clone(), old: old_from, new: balance(client, rich - amount) },
            Swap { key: to.clone(), old: old_to, new: balance(client, poor + amount) },
        ];
        if client.rng.random_bool(0.5) {
            swaps.reverse();
        }
        let done = client.perform(&Op::Batch(swaps.to_vec())).await;
        let mut seen = self.seen.lock();
        for swap in swaps {
            if done.kind == Kind::Ok {
                seen.insert(swap.key, swap.new);
            }
        }
        if done.error.is_some() {
            // Somebody was faster, or may have been: look again before the next transfer.
            seen.clear();
        }
    }
}
