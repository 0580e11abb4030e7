//! What is judged besides the histories: the cluster as a whole, and whether the run means anything. Pure.
//!
//! Invariant: a gate that fails makes a run vacuous, never a violation, and never a pass.

use super::settings::Fault;
use crate::proof::{
    check::{VIOLATIONS_MAX, Valid, Verdict, Violation},
    history::{Event, Kind, Phase, Process},
    report::Gate,
    workload::{Summary, Workload},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// No workload may go without an answer from the leader's level for longer while a majority is whole.
pub const UNAVAILABLE_MAX: Duration = Duration::from_secs(15);
/// Successful operations of each kind that a run must have.
const OK_MIN: u64 = 10;
/// Share of operations of unknown outcome above which a run says little.
const UNKNOWN_MAX: f64 = 0.3;

/// A verdict on the cluster as a whole: everything said is a violation.
#[must_use]
pub fn verdict(checker: &str, said: &[String], looked_at: (&str, u64)) -> Verdict {
    let violation = |what: &String| Violation {
        what: what.clone(),
        kind: checker.to_owned(),
        key: None,
        events: Vec::new(),
        window_ns: (0, 0),
    };
    Verdict {
        checker: checker.to_owned(),
        valid: if said.is_empty() { Valid::True } else { Valid::False },
        violations: said.iter().take(VIOLATIONS_MAX).map(violation).collect(),
        looked_at: BTreeMap::from([(looked_at.0.to_owned(), looked_at.1)]),
    }
}

/// Whether strong operations went on being answered while a majority of every group was whole: of each workload the
/// longest time without one, outages of all nodes (and as long after them) apart.
#[must_use]
pub fn availability(workloads: &[(String, Vec<Event>)]) -> Verdict {
    let mut said = Vec::new();
    let mut looked_at = 0;
    for (name, events) in workloads {
        let answered = |event: &&Event| {
            event.kind == Kind::Ok && event.phase == Phase::Main && (event.f != "read" || event.mode().mode.is_strong())
        };
        let outage = |event: &&Event| event.process == Process::Nemesis && event.value["outage"] == true;
        let excused: Vec<u64> = events.iter().filter(outage).map(|event| event.time).collect();
        let times: Vec<u64> = events.iter().filter(answered).map(|event| event.time).collect();
        looked_at += times.len() as u64;
        for (from, to) in times.iter().zip(times.iter().skip(1)) {
            let length = Duration::from_nanos(to - from);
            let excused = excused.iter().any(|at| at >= from && at <= to);
            if length > UNAVAILABLE_MAX && !excused {
                said.push(format!(
                    "{name}: no strong answer for {:.1} s, from {:.1} s on, although a majority was whole",
                    length.as_secs_f64(),
                    Duration::from_nanos(*from).as_secs_f64()
                ));
            }
        }
    }
    verdict("availability", &said, ("strong answers", looked_at))
}

/// Changes of leaders that clients have seen: terms beyond the first of each partition.
#[must_use]
pub fn leader_changes<'a>(events: impl Iterator<Item = &'a Event>) -> u64 {
    let served = events.filter_map(|event| event.srv.as_ref());
    let terms: BTreeSet<(u64, u64)> = served.filter_map(|srv| srv.part.zip(srv.term)).collect();
    let partitions: BTreeSet<u64> = terms.iter().map(|(part, _)| *part).collect();
    (terms.len() - partitions.len()) as u64
}

/// What must have happened for a run to mean something.
#[derive(Debug)]
pub struct Happened<'a> {
    /// Faults asked for.
    pub wanted: &'a [Fault],
    /// Faults installed.
    pub installed: &'a BTreeMap<Fault, u64>,
    /// Faults that cannot be installed here.
    pub skipped: &'a BTreeMap<Fault, String>,
    /// Changes that the cluster was asked for in vain, and why the last time.
    pub in_vain: &'a BTreeMap<Fault, String>,
    /// Leaders that changed.
    pub leader_changes: u64,
    /// Snapshots that replicas got from leaders.
    pub snapshots: u64,
    /// Operations of each workload.
    pub summaries: &'a [(Workload, Summary)],
}

/// The gates.
#[must_use]
pub fn gates(happened: &Happened<'_>) -> Vec<Gate> {
    let gate = |name: String, want: String, got: String, ok: bool| Gate { name, want, got, ok };
    let mut gates = Vec::new();
    for fault in happened.wanted {
        let count = happened.installed.get(fault).copied().unwrap_or(0);
        let got = match happened.skipped.get(fault) {
            Some(why) if count == 0 => format!("skipped: {why}"),
            _ => match happened.in_vain.get(fault) {
                Some(why) if count == 0 => format!("0, in vain: {why}"),
                _ => count.to_string(),
            },
        };
        let ok = count > 0 || happened.skipped.contains_key(fault);
        gates.push(gate(format!("fault {fault}"), "at least 1".to_owned(), got, ok));
    }
    let any = |of: fn(Fault) -> bool| happened.installed.keys().any(|fault| of(*fault));
    for (name, count, wanted) in [
        ("leaders changed", happened.leader_changes, any(Fault::moves_leaders)),
        ("snapshots installed", happened.snapshots, any(Fault::leaves_behind)),
    ] {
        if wanted {
            gates.push(gate(name.to_owned(), "at least 1".to_owned(), count.to_string(), count > 0));
        }
    }
    for (workload, summary) in happened.summaries {
        for f in kinds(*workload) {
            let count = summary.ok_of(f);
            gates.push(gate(format!("{workload}: {f}"), format!("{OK_MIN} ok"), count.to_string(), count >= OK_MIN));
        }
        if *workload == Workload::Levels {
            let count = summary.follower_reads;
            let name = format!("{workload}: reads served by followers");
            gates.push(gate(name, "at least 1".to_owned(), count.to_string(), count > 0));
        }
        let share = summary.unknown_ratio();
        let name = format!("{workload}: outcome unknown");
        let (want, got) = (format!("below {:.0} %", UNKNOWN_MAX * 100.0), format!("{:.1} %", share * 100.0));
        gates.push(gate(name, want, got, share < UNKNOWN_MAX));
    }
    gates
}

/// Operations that a workload consists of.
const fn kinds(workload: Workload) -> &'static [&'static str] {
    match workload {
        Workload::Register | Workload::Levels => &["read", "write", "cas", "delete"],
        Workload::Counter => &["read", "incr"],
        Workload::Rows => &["write", "delete", "scan"],
        Workload::Bank => &["scan", "batch"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::history::Served;
    use serde_json::json;

    fn ok_at(seconds: u64) -> Event {
        let event = Event::new(Process::Client(0), Kind::Ok, "write");
        Event { time: seconds * 1_000_000_000, ..event }
    }

    #[test]
    fn a_long_silence_is_a_violation_unless_all_nodes_were_hit_in_it() {
        let events = vec![ok_at(1), ok_at(10), ok_at(40)];
        let verdict = availability(&[("register".to_owned(), events.clone())]);
        assert_eq!(verdict.valid, Valid::False);
        assert!(verdict.violations[0].what.contains("30.0 s"), "{:?}", verdict.violations);
        let mut excused = events;
        let hit = Event::new(Process::Nemesis, Kind::Info, "restart-all");
        excused.insert(2, Event { time: 11_000_000_000, value: json!({ "outage": true }), ..hit });
        assert_eq!(availability(&[("register".to_owned(), excused)]).valid, Valid::True);
    }

    #[test]
    fn another_term_of_a_partition_is_another_leader() {
        let served = |part, term| {
            let srv = Served { part: Some(part), term: Some(term), ..Served::default() };
            Event { srv: Some(srv), ..ok_at(1) }
        };
        assert_eq!(leader_changes([served(1, 1), served(2, 4), served(1, 1)].iter()), 0);
        assert_eq!(leader_changes([served(1, 1), served(2, 4), served(1, 2)].iter()), 1);
    }

    #[test]
    fn a_fault_that_never_came_and_operations_that_never_succeeded_are_gates_that_fail() {
        let (installed, skipped) = (BTreeMap::from([(Fault::Kill, 1)]), BTreeMap::new());
        let in_vain = BTreeMap::from([(Fault::Divide, "too small".to_owned())]);
        let summaries = [(Workload::Counter, Summary::default())];
        let gates = gates(&Happened {
            wanted: &[Fault::Kill, Fault::Pause, Fault::Divide],
            installed: &installed,
            skipped: &skipped,
            in_vain: &in_vain,
            leader_changes: 0,
            snapshots: 0,
            summaries: &summaries,
        });
        let failed: Vec<&str> = gates.iter().filter(|gate| !gate.ok).map(|gate| gate.name.as_str()).collect();
        let of_counter = ["counter: read", "counter: incr"];
        assert_eq!(failed[..4], ["fault pause", "fault divide", "leaders changed", "snapshots installed"]);
        assert_eq!(failed[4..], of_counter);
        assert!(gates.iter().any(|gate| gate.got.contains("too small")), "{gates:?}");
    }
}
