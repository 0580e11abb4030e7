//! Checkers against histories that are known to be good or bad.

mod brute;
mod cases;
mod files;
pub(super) mod generate;
mod large;

use super::{Valid, Verdict};
use crate::proof::history::{Event, Failure, Kind, Mode, Phase, Process, ReadMode, Served};
use serde_json::{Value as Json, json};

/// A history in short: one operation a line, `PROCESS CALL..RETURN F KEY VALUE [-> RESULT] [WORDS]`.
///
/// Times are milliseconds; `?` for the return: unknown, never completed; `N?`: an `info` then; `N!`: a `fail` then; `.`
/// stands for no key; values are JSON without blanks. Words: `lease`, `bounded=MS`, `session`, `eventual`, `degraded`,
/// `#SESSION`, `v=VERSION`, `lag=MS`, `part=N`, `log=N`, `load`, `final`, `mismatch` (of a `cas`; RESULT is what it found).
pub(super) fn history(lines: &[&str]) -> Vec<Event> {
    let mut events: Vec<Event> = lines.iter().flat_map(|line| operation(line)).collect();
    // Completions first: of equal times the order says nothing, but a process must be free before it goes on.
    events.sort_by_key(|event| (event.time, event.kind == Kind::Invoke));
    for (index, event) in events.iter_mut().enumerate() {
        event.index = index as u64;
    }
    events
}

fn operation(line: &str) -> Vec<Event> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [process, times, f, key, value, rest @ ..] = words.as_slice() else { panic!("{line}") };
    let (call, ret) = times.split_once("..").unwrap();
    let mut invoke = Event::new(Process::Client(process.parse().unwrap()), Kind::Invoke, *f);
    invoke.time = call.parse::<u64>().unwrap() * 1_000_000;
    invoke.key = (*key != ".").then(|| (*key).to_owned());
    invoke.value = serde_json::from_str(value).unwrap();
    let (result, rest) = match rest {
        ["->", result, rest @ ..] => (serde_json::from_str(result).unwrap(), rest),
        rest => (invoke.value.clone(), rest),
    };
    let mut srv = Served::default();
    let mut done = Event { kind: Kind::Ok, value: result, ..invoke.clone() };
    for word in rest {
        annotate(word, &mut invoke, &mut done, &mut srv);
    }
    (done.read, done.session, done.phase) = (invoke.read, invoke.session.clone(), invoke.phase);
    done.srv = (srv != Served::default()).then_some(srv);
    if ret.ends_with('?') {
        done.kind = Kind::Info;
    } else if ret.ends_with('!') {
        done.kind = Kind::Fail;
        let code = if done.observed.is_some() { "cas-mismatch" } else { "no-quorum" };
        done.error = Some(Failure { code: code.to_owned(), definite: true, msg: String::new() });
    }
    let Ok(time) = ret.trim_end_matches(['?', '!']).parse::<u64>() else { return vec![invoke] };
    done.time = time * 1_000_000;
    vec![invoke, done]
}

fn annotate(word: &str, invoke: &mut Event, done: &mut Event, srv: &mut Served) {
    let (name, number) = word.split_once('=').map_or((word, None), |(name, n)| (name, Some(n.parse().unwrap())));
    let level = |mode| Some(ReadMode { mode, bound_ms: number });
    match name {
        "lease" => invoke.read = level(Mode::Lease),
        "bounded" => invoke.read = level(Mode::Bounded),
        "session" => invoke.read = level(Mode::Session),
        "eventual" => invoke.read = level(Mode::Eventual),
        "degraded" => srv.degraded = Some(true),
        "v" => srv.version = number,
        "lag" => srv.lag_ms = number,
        "part" => srv.part = number,
        "log" => srv.log = number,
        "load" => invoke.phase = Phase::Load,
        "final" => invoke.phase = Phase::Final,
        "mismatch" => done.observed = Some(std::mem::take(&mut done.value)),
        _ => invoke.session = Some(word.strip_prefix('#').unwrap_or_else(|| panic!("{word}")).to_owned()),
    }
}

/// What the nemesis noted at a time.
pub(super) fn noted(time_ms: u64, f: &str, value: Json) -> Event {
    Event { time: time_ms * 1_000_000, value, ..Event::new(Process::Nemesis, Kind::Info, f) }
}

/// Kinds of violations found, `checker:kind`, and `checker:?kind` for what is unknown; sorted, each once.
pub(super) fn kinds(verdicts: &[Verdict]) -> Vec<String> {
    let of = |verdict: &Verdict| {
        let mark = if verdict.valid == Valid::Unknown { "?" } else { "" };
        assert_eq!(verdict.valid == Valid::True, verdict.violations.is_empty(), "{verdict:?}");
        let kinds = verdict.violations.iter().map(|violation| format!("{}:{mark}{}", verdict.checker, violation.kind));
        kinds.collect::<Vec<_>>()
    };
    let mut kinds: Vec<String> = verdicts.iter().flat_map(of).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

#[test]
fn a_digest_is_compared_at_equal_positions_only() {
    let digest = |applied: Json, one: &str, two: &str| {
        let value = json!({"part": 3, "epoch": 1, "applied": applied, "digests": {"n1": one, "n2": two}});
        let mut events = history(&["0 1..2 write a \"0:1\"", "0 3..4 read a null -> \"0:1\""]);
        events.push(Event { index: 4, ..noted(9, "digest", value) });
        kinds(&super::judge("register", &events))
    };
    assert_eq!(digest(json!(7), "aa", "aa"), Vec::<String>::new());
    assert_eq!(digest(json!(7), "aa", "ab"), ["replicas:replicas-differ"]);
    assert_eq!(digest(json!({"n1": 7, "n2": 8}), "aa", "ab"), ["replicas:?nothing-to-judge"]);
}
