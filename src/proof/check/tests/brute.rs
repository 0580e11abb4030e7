//! The search against a naive one that tries every order, on small random histories; and good histories made bad.

use super::{
    super::{History, Valid, levels, linear},
    generate::{Settings, generate},
};
use crate::proof::history::{Event, Failure, Kind, Process};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value as Json, json};

/// Random histories compared.
const HISTORIES: u64 = 6_000;

/// An operation as the naive search knows it.
#[derive(Clone, Debug)]
struct Naive {
    call: u64,
    /// None: may take effect at any time, or never.
    ret: Option<u64>,
    f: &'static str,
    args: [Option<i64>; 2],
    /// What it found, for a read or a `cas` that did not match; the result of an increment.
    found: Option<Option<i64>>,
}

/// State after an operation; none when it does not fit.
fn apply(state: Option<i64>, op: &Naive) -> Option<Option<i64>> {
    match (op.f, op.found) {
        ("read" | "mismatch", Some(found)) => (found == state).then_some(state),
        ("mismatch", None) => (op.args[0] != state).then_some(state),
        ("write", _) => Some(op.args[0]),
        ("delete", _) => Some(None),
        ("cas", _) => (op.args[0] == state).then_some(op.args[1]),
        ("incr", found) => {
            let after = Some(state.unwrap_or(0) + 1);
            found.is_none_or(|found| found == after).then_some(after)
        }
        _ => unreachable!("{op:?}"),
    }
}

/// Tries every order.
fn has_order(left: &[Naive], state: Option<i64>) -> bool {
    if left.iter().all(|op| op.ret.is_none()) {
        return true;
    }
    let first_ret = left.iter().filter_map(|op| op.ret).min().unwrap();
    (0..left.len()).any(|at| {
        if left[at].call > first_ret {
            return false;
        }
        let mut rest = left.to_vec();
        let op = rest.remove(at);
        apply(state, &op).is_some_and(|after| has_order(&rest, after))
    })
}

fn draw(rng: &mut StdRng) -> Vec<Naive> {
    let unique = rng.random_bool(0.5);
    let counts = rng.random_bool(0.2);
    let count = rng.random_range(2..=7);
    let mut ops: Vec<Naive> = Vec::new();
    for at in 0..count {
        let call = rng.random_range(0..12);
        let fresh = if unique { at } else { rng.random_range(0..2) };
        let any = |rng: &mut StdRng| match rng.random_range(0..5) {
            0 => None,
            _ => Some(if unique { rng.random_range(0..count) } else { rng.random_range(0..2) }),
        };
        let (f, args, found) = match rng.random_range(0..10) {
            0..=3 => ("read", [None; 2], Some(any(rng))),
            4 | 5 if counts => ("incr", [None; 2], rng.random_bool(0.7).then(|| Some(rng.random_range(1..4)))),
            4..=6 => ("write", [Some(fresh), None], None),
            7 => ("delete", [None; 2], None),
            8 => ("cas", [any(rng), if rng.random_bool(0.9) { Some(fresh) } else { None }], None),
            _ => {
                let found = any(rng);
                ("mismatch", [any(rng), Some(fresh)], rng.random_bool(0.5).then_some(found))
            }
        };
        // A cas that did not match has not found what it looked for.
        if f == "mismatch" && found == Some(args[0]) {
            continue;
        }
        let is_open = rng.random_bool(0.25) && !matches!(f, "read" | "mismatch");
        let ret = (!is_open).then(|| call + rng.random_range(0..6));
        let found = if is_open { None } else { found };
        ops.push(Naive { call, ret, f, args, found });
    }
    ops
}

fn events(ops: &[Naive]) -> Vec<Event> {
    let json = |value: Option<i64>| value.map_or(Json::Null, |value| json!(value));
    let mut events = Vec::new();
    for (process, op) in ops.iter().enumerate() {
        let f = if op.f == "mismatch" { "cas" } else { op.f };
        let mut invoke = Event::new(Process::Client(process as u64), Kind::Invoke, f);
        (invoke.key, invoke.time) = (Some("k".to_owned()), op.call);
        invoke.value = match f {
            "cas" => json!([op.args[0], op.args[1]]),
            "incr" => json!(1),
            _ => json(op.args[0]),
        };
        let mut done = Event { kind: Kind::Ok, time: op.ret.unwrap_or(30), ..invoke.clone() };
        match (op.f, op.found) {
            _ if op.ret.is_none() => done.kind = Kind::Info,
            ("mismatch", found) => {
                done.kind = Kind::Fail;
                done.error = Some(Failure { code: "cas-mismatch".to_owned(), definite: true, msg: String::new() });
                done.observed = found.map(json);
            }
            (_, Some(found)) => done.value = json(found),
            ("incr", None) => done.value = Json::Null,
            _ => {}
        }
        events.extend([invoke, done]);
    }
    events.sort_by_key(|event| (event.time, event.kind != Kind::Invoke));
    for (index, event) in events.iter_mut().enumerate() {
        event.index = index as u64;
    }
    events
}

#[test]
fn the_search_agrees_with_one_that_tries_every_order() {
    let mut found = [0_u32; 2];
    for seed in 0..HISTORIES {
        let ops = draw(&mut StdRng::seed_from_u64(seed));
        let expected = has_order(&ops, None);
        let events = events(&ops);
        let verdict = linear::check(&History::of(&events));
        assert_eq!(verdict.valid != Valid::False, expected, "seed {seed}: {ops:#?} {verdict:#?}");
        found[usize::from(expected)] += 1;
        // What is left of a counterexample has no order by itself.
        if let [violation] = verdict.violations.as_slice()
            && verdict.valid == Valid::False
        {
            let shows = |process: usize| {
                let of = |event: &&Event| event.process == Process::Client(process as u64);
                events.iter().filter(of).any(|event| violation.events.contains(&event.index))
            };
            let kept: Vec<Naive> =
                ops.iter().enumerate().filter(|(at, _)| shows(*at)).map(|(_, op)| op.clone()).collect();
            assert!(!has_order(&kept, None), "seed {seed}: {ops:#?} {violation:#?}");
        }
        // The linear-time checker may miss what the search finds, but never the other way round.
        let levels = levels::check(&History::of(&events));
        assert!(!expected || levels.valid != Valid::False, "seed {seed}: {ops:#?} {levels:#?}");
    }
    assert!(found.iter().all(|count| *count > 500), "{found:?}");
}

#[test]
fn a_good_history_made_bad_is_found_out() {
    for seed in 0..30 {
        let settings = Settings { seed, operations: 400, keys: 3, clients: 6, ..Settings::default() };
        let good = generate(&settings);
        assert_eq!(linear::check(&History::of(&good)).valid, Valid::True, "seed {seed}");
        assert_eq!(levels::check(&History::of(&good)).valid, Valid::True, "seed {seed}");
        // The last read of each key returns what the first write left, long overwritten.
        let mut bad = good.clone();
        let key = Some("r/0".to_owned());
        let of_key = |event: &&Event| event.key == key && event.kind == Kind::Ok;
        let first = good.iter().filter(of_key).find(|event| event.f == "write").unwrap().value.clone();
        let last =
            bad.iter_mut().rfind(|event| event.key == key && event.kind == Kind::Ok && event.f == "read").unwrap();
        last.value = first;
        assert_eq!(linear::check(&History::of(&bad)).valid, Valid::False, "seed {seed}");
        assert_eq!(levels::check(&History::of(&bad)).valid, Valid::False, "seed {seed}");
        // A write that was seen was refused.
        let mut bad = good;
        let seen: Vec<Json> = bad
            .iter()
            .filter(|event| event.f == "read" && event.kind == Kind::Ok)
            .map(|event| event.value.clone())
            .collect();
        let write =
            bad.iter_mut().find(|event| event.f == "write" && event.kind == Kind::Ok && seen.contains(&event.value));
        write.unwrap().kind = Kind::Fail;
        assert_eq!(linear::check(&History::of(&bad)).valid, Valid::False, "seed {seed}");
        assert_eq!(levels::check(&History::of(&bad)).valid, Valid::False, "seed {seed}");
    }
}
