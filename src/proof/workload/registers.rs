//! Single rows: read, written, replaced under a condition, deleted; or counted up.

use super::{Settings, Workload};
use crate::proof::{
    history::{Event, Kind},
    perform::Client,
    wire::Op,
};
use parking_lot::Mutex;
use rand::{RngExt as _, rngs::StdRng};
use std::collections::BTreeMap;

/// One of this many keys is hot; the hot ones get half of all operations.
const HOT_ONE_IN: usize = 6;
/// Conditional writes that guess the value right if nobody was faster.
const GUESS_SHARE: f64 = 0.85;

/// The registers, or counters, in use.
#[derive(Debug)]
pub(super) struct Registers {
    counts: bool,
    ops_per_key_max: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Operations on the register in each slot, and how many registers were in it before.
    slots: Vec<(u32, u32)>,
    /// What a register was last seen to hold: a hint for conditions.
    seen: BTreeMap<String, Option<String>>,
}

impl Registers {
    pub(super) fn new(settings: &Settings) -> Self {
        let slots = vec![(0, 0); settings.keys.max(1) as usize];
        Self {
            counts: settings.workload == Workload::Counter,
            ops_per_key_max: settings.ops_per_key_max.max(1),
            state: Mutex::new(State { slots, seen: BTreeMap::new() }),
        }
    }

    pub(super) async fn step(&self, client: &mut Client) {
        let key = self.draw_key(&mut client.rng);
        let op = if self.counts { count(client, key) } else { self.draw_op(client, key) };
        let event = client.perform(&op).await;
        if !self.counts {
            self.learn(&op, &event);
        }
    }

    fn draw_key(&self, rng: &mut StdRng) -> String {
        let mut state = self.state.lock();
        let hot = state.slots.len().div_ceil(HOT_ONE_IN);
        let among = if rng.random_bool(0.5) { hot } else { state.slots.len() };
        let slot = rng.random_range(0..among);
        if state.slots[slot].0 == self.ops_per_key_max {
            let old = key_of(slot, state.slots.len(), state.slots[slot].1);
            state.seen.remove(&old);
            state.slots[slot] = (0, state.slots[slot].1 + 1);
        }
        state.slots[slot].0 += 1;
        key_of(slot, state.slots.len(), state.slots[slot].1)
    }

    fn draw_op(&self, client: &mut Client, key: String) -> Op {
        match client.rng.random_range(0..100) {
            0..45 => Op::Read { key, mode: client.draw_level() },
            45..70 => Op::Write { key, value: client.fresh_value() },
            70..90 => {
                let seen = self.state.lock().seen.get(&key).cloned().flatten();
                let old = if client.rng.random_bool(GUESS_SHARE) { seen } else { None };
                let deletes = old.is_some() && client.rng.random_bool(0.1);
                let new = (!deletes).then(|| client.fresh_value());
                Op::Cas { key, old, new }
            }
            _ => Op::Delete { key },
        }
    }

    fn learn(&self, op: &Op, event: &Event) {
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let (key, seen) = match (op, event.kind) {
            (Op::Read { key, .. }, Kind::Ok) => (key, text(&event.value)),
            (Op::Write { key, value }, Kind::Ok) => (key, Some(value.clone())),
            (Op::Cas { key, new, .. }, Kind::Ok) => (key, new.clone()),
            (Op::Cas { key, .. }, Kind::Fail) => match &event.observed {
                Some(observed) => (key, text(observed)),
                None => return,
            },
            (Op::Delete { key }, Kind::Ok) => (key, None),
            _ => return,
        };
        self.state.lock().seen.insert(key.clone(), seen);
    }
}

fn count(client: &mut Client, key: String) -> Op {
    match client.rng.random_range(0..100) {
        0..70 => Op::Incr { key, n: client.rng.random_range(1..=3) },
        _ => Op::Read { key, mode: client.draw_level() },
    }
}

/// Keys are spread over the key order.
fn key_of(slot: usize, slots: usize, generation: u32) -> String {
    format!("{:02x}/{slot}.{generation}", slot * 256 / slots)
}
