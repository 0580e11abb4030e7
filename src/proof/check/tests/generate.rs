//! Makes good histories of any size: clients of a store that really is linearizable, with stalls and unknown outcomes.

use crate::proof::history::{Event, Failure, Kind, Process};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;

/// What history to make.
#[derive(Clone, Debug)]
pub(in super::super) struct Settings {
    pub(in super::super) seed: u64,
    pub(in super::super) operations: u64,
    pub(in super::super) keys: u64,
    pub(in super::super) clients: u64,
    /// Share of writes whose outcome stays unknown.
    pub(in super::super) unknown: f64,
    /// Length of a stall, in nanoseconds: what is called in it returns after it. One in ten times that.
    pub(in super::super) stall_ns: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { seed: 1, operations: 1_000, keys: 10, clients: 10, unknown: 0.01, stall_ns: 50_000_000 }
    }
}

/// What happens next, to whom.
enum Due {
    Call { client: usize },
    Effect { client: usize, at: usize },
    Return { client: usize, at: usize },
}

struct World {
    rng: StdRng,
    settings: Settings,
    store: BTreeMap<String, String>,
    /// By time, and a number that keeps equal times apart.
    due: BTreeMap<(u64, u64), Due>,
    events: Vec<Event>,
    /// Completions, filled in when operations take effect; none for those that never return.
    answers: Vec<Event>,
    processes: Vec<u64>,
    next: u64,
}

/// A linearizable history of registers.
pub(in super::super) fn generate(settings: &Settings) -> Vec<Event> {
    let mut world = World {
        rng: StdRng::seed_from_u64(settings.seed),
        settings: settings.clone(),
        store: BTreeMap::new(),
        due: BTreeMap::new(),
        events: Vec::new(),
        answers: Vec::new(),
        processes: (0..settings.clients).collect(),
        next: settings.clients,
    };
    for client in 0..world.processes.len() {
        world.plan(client as u64, Due::Call { client });
    }
    while let Some(((now, _), due)) = world.due.pop_first() {
        match due {
            Due::Call { client } => world.call(now, client),
            Due::Effect { client, at } => world.effect(now, client, at),
            Due::Return { client, at } => world.complete(now, client, at),
        }
    }
    world.events
}

impl World {
    fn plan(&mut self, time: u64, due: Due) {
        self.next += 1;
        self.due.insert((time, self.next), due);
    }

    fn call(&mut self, now: u64, client: usize) {
        let at = self.answers.len();
        if at as u64 >= self.settings.operations {
            return;
        }
        let key = format!("r/{}", self.rng.random_range(0..self.settings.keys));
        let fresh = json!(format!("{}:{at}", self.processes[client]));
        let held = self.store.get(&key).map_or(Json::Null, |value| json!(value));
        let (f, value) = match self.rng.random_range(0..20) {
            0..=8 => ("read", Json::Null),
            9..=15 => ("write", fresh),
            16..=18 => ("cas", json!([held, fresh])),
            _ => ("delete", Json::Null),
        };
        let mut invoke = Event::new(Process::Client(self.processes[client]), Kind::Invoke, f);
        (invoke.key, invoke.value) = (Some(key), value);
        self.answers.push(invoke.clone());
        self.log(now, invoke);
        let effect = self.after_stall(now) + self.rng.random_range(0..3_000_000);
        self.plan(effect, Due::Effect { client, at });
    }

    /// A time, or the end of the stall that it falls in.
    fn after_stall(&self, now: u64) -> u64 {
        let stall_ns = self.settings.stall_ns;
        if stall_ns > 0 && (now / stall_ns) % 10 == 9 { (now / stall_ns + 1) * stall_ns } else { now }
    }

    fn effect(&mut self, now: u64, client: usize, at: usize) {
        let is_read = self.answers[at].f == "read";
        if !is_read && client != usize::MAX && self.rng.random_bool(self.settings.unknown) {
            // The client gives up; what it asked for happens later, or never.
            self.answers[at].kind = Kind::Info;
            self.complete(now, client, at);
            if self.rng.random_bool(0.5) {
                let late = now + self.rng.random_range(0..200_000_000);
                self.plan(late, Due::Effect { client: usize::MAX, at });
            }
            return;
        }
        self.apply(at);
        if client != usize::MAX {
            let ret = self.after_stall(now) + self.rng.random_range(0..2_000_000);
            self.plan(ret, Due::Return { client, at });
        }
    }

    fn apply(&mut self, at: usize) {
        let answer = &mut self.answers[at];
        let key = answer.key.clone().unwrap();
        let held = self.store.get(&key).map_or(Json::Null, |value| json!(value));
        let left = match answer.f.as_str() {
            "read" => {
                answer.value = held.clone();
                held
            }
            "write" => answer.value.clone(),
            "delete" => Json::Null,
            _ if answer.value[0] == held => answer.value[1].clone(),
            _ => {
                answer.kind = Kind::Fail;
                answer.error = Some(Failure { code: "cas-mismatch".to_owned(), definite: true, msg: String::new() });
                answer.observed = Some(held.clone());
                held
            }
        };
        match left.as_str() {
            Some(value) => self.store.insert(key, value.to_owned()),
            None => self.store.remove(&key),
        };
        if answer.kind == Kind::Invoke {
            answer.kind = Kind::Ok;
        }
    }

    fn complete(&mut self, now: u64, client: usize, at: usize) {
        let answer = self.answers[at].clone();
        if answer.kind == Kind::Info {
            self.next += 1;
            self.processes[client] = self.next;
        }
        self.log(now, answer);
        let pause = self.rng.random_range(0..1_000_000);
        self.plan(now + pause, Due::Call { client });
    }

    fn log(&mut self, now: u64, event: Event) {
        self.events.push(Event { index: self.events.len() as u64, time: now, ..event });
    }
}
