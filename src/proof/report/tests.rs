use super::{
    Gate, Judged, Outcome, Report,
    faults::{faults, outages},
    html,
    leaders::leaders,
    ops::{self, Class, ops},
    results,
    stats::{BUCKETS_MAX, bucket_ns, counts, latencies, percentile, series},
};
use crate::proof::{
    check::{Valid, Verdict, Violation},
    history::{Event, Failure, Kind, Mode, Process, ReadMode, RunInfo, Served},
};
use serde_json::{Value as Json, json};
use std::collections::BTreeSet;

const MS: u64 = 1_000_000;

/// A history from `(time in ms, event)`, in any order.
fn history(mut said: Vec<(u64, Event)>) -> Vec<Event> {
    said.sort_by_key(|(at, _)| *at);
    let place = |(index, (at, event)): (usize, (u64, Event))| Event { index: index as u64, time: at * MS, ..event };
    said.into_iter().enumerate().map(place).collect()
}

/// One operation: who, what, from, to, how it ended.
fn op(process: u64, f: &str, from: u64, to: u64, kind: Kind) -> [(u64, Event); 2] {
    let event = |kind| Event::new(Process::Client(process), kind, f);
    [(from, event(Kind::Invoke)), (to, event(kind))]
}

fn fault(at: u64, f: &str, id: u64, state: &str) -> (u64, Event) {
    let value = json!({ "id": id, "state": state, "nodes": ["n1"], "what": "for people" });
    (at, Event { value, ..Event::new(Process::Nemesis, Kind::Info, f) })
}

fn verdict(valid: Valid, violations: Vec<Violation>) -> Verdict {
    Verdict { checker: "linearizable".to_owned(), valid, violations, looked_at: [("keys".to_owned(), 1)].into() }
}

fn report(events: Vec<Event>, verdicts: Vec<Verdict>) -> Report {
    let run = RunInfo { tool: "drill".to_owned(), workload: "register".to_owned(), seed: 7, ..RunInfo::default() };
    Report { run: run.clone(), workloads: vec![Judged { run, events, verdicts }], ..Report::default() }
}

/// What the page's scripts will read.
fn embedded(page: &str) -> Json {
    let (_, data) = page.split_once("id=\"data\">").unwrap();
    serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn a_client_keeps_its_lane_when_an_unknown_outcome_uses_up_its_number() {
    let mut said = Vec::new();
    said.extend(op(0, "write", 0, 5, Kind::Ok));
    said.extend(op(1, "write", 1, 6, Kind::Info));
    said.extend(op(2, "write", 7, 8, Kind::Ok));
    said.extend(op(0, "write", 9, 10, Kind::Ok));
    said.push((11, Event::new(Process::Client(2), Kind::Invoke, "read")));
    said.push(fault(20, "kill", 0, "installed"));
    let events = history(said);
    let found = ops(&events);
    assert_eq!(found.iter().map(|op| op.lane).collect::<Vec<_>>(), [0, 1, 1, 0, 1]);
    let last = found.last().unwrap();
    assert_eq!((last.outcome, last.took_ns()), (ops::Outcome::Info, 9 * MS), "open to the end of the history");
}

#[test]
fn a_percentile_is_one_of_the_values() {
    let hundred: Vec<u64> = (1..=100).collect();
    assert_eq!(percentile(&hundred, 500), Some(50));
    assert_eq!(percentile(&hundred, 990), Some(99));
    assert_eq!(percentile(&hundred, 999), Some(100));
    assert_eq!(percentile(&[7], 0), Some(7));
    assert_eq!(percentile(&[], 500), None);
}

#[test]
fn a_curve_has_a_bounded_number_of_points() {
    for duration_ns in [0, 1, 60_000 * MS, 12_345_678_901, 86_400_000 * MS, u64::MAX / 8] {
        assert!(duration_ns / bucket_ns(duration_ns) < BUCKETS_MAX, "{duration_ns}");
    }
    assert_eq!(bucket_ns(60_000 * MS), 500 * MS);
}

#[test]
fn operations_are_counted_by_level_and_end_and_only_answered_ones_are_timed() {
    let mut said = Vec::new();
    said.extend(op(0, "write", 0, 10, Kind::Ok));
    said.extend(op(1, "write", 0, 900, Kind::Info));
    said.extend(op(2, "cas", 0, 20, Kind::Fail));
    said[5].1.error = Some(Failure { code: "cas-mismatch".to_owned(), definite: true, msg: String::new() });
    said.extend(op(3, "write", 0, 700, Kind::Fail));
    said.extend(op(4, "read", 100, 103, Kind::Ok));
    said[8].1.read = Some(ReadMode { mode: Mode::Eventual, bound_ms: None });
    let events = history(said);
    let found = ops(&events);
    let rows: Vec<_> =
        counts("w", &found).into_iter().map(|c| (c.f, c.mode, c.ok, c.fail, c.mismatch, c.info)).collect();
    let expected = [
        ("cas".to_owned(), None, 0, 1, 1, 0),
        ("read".to_owned(), Some("eventual"), 1, 0, 0, 0),
        ("write".to_owned(), None, 1, 1, 0, 1),
    ];
    assert_eq!(rows, expected);
    let timed: Vec<_> = latencies(&found).iter().map(|l| (l.class, l.answered, l.p50_us, l.max_us)).collect();
    assert_eq!(timed, [(Class::Writes, 2, 10_000, 20_000), (Class::Reads(Mode::Eventual), 1, 3_000, 3_000)]);
    let curves = series(&found, 1_000 * MS);
    assert_eq!(curves[0].answered.iter().sum::<u64>(), 2);
    assert_eq!(curves[0].bad.iter().sum::<u64>(), 2);
}

#[test]
fn faults_pair_by_id_and_the_same_one_in_two_histories_is_one() {
    let events = history(vec![
        fault(10, "kill", 1, "installed"),
        fault(15, "clock", 2, "skipped"),
        fault(20, "pause", 3, "installed"),
        fault(30, "kill", 1, "healed"),
        (40, Event::new(Process::Nemesis, Kind::Info, "restart")),
        (50, Event::new(Process::Nemesis, Kind::Info, "digest")),
    ]);
    let found = faults(events.iter().chain(&events));
    let told: Vec<_> =
        found.iter().map(|f| (f.f.as_str(), f.skipped, f.from_ns / MS, f.to_ns.map(|t| t / MS))).collect();
    let kill = ("kill", false, 10, Some(30));
    assert_eq!(told[..3], [kill, ("clock", true, 15, Some(15)), ("pause", false, 20, None)]);
    assert_eq!(told.len(), 5, "lines without an id are not known to be the same, and comparing replicas is no fault");
}

#[test]
fn an_outage_is_measured_to_the_next_answer_also_after_the_fault() {
    let mut said = vec![fault(100, "kill", 1, "installed"), fault(200, "kill", 1, "healed")];
    said.extend(op(0, "write", 10, 12, Kind::Ok));
    said.extend(op(0, "write", 40, 42, Kind::Ok));
    // On its way when the fault began.
    said.extend(op(0, "write", 95, 105, Kind::Ok));
    said.extend(op(0, "write", 110, 180, Kind::Info));
    said.extend(op(1, "write", 185, 350, Kind::Ok));
    said.extend(op(1, "write", 360, 370, Kind::Ok));
    let events = history(said);
    let told = outages(&faults(&events), &ops(&events));
    assert_eq!(told.len(), 2);
    assert_eq!((told[0].fault, told[0].longest_gap_us), (None, 30_000), "from 12 to 42, without a fault");
    let during = &told[1];
    assert_eq!((during.fault, during.asked, during.answered), (Some(0), 3, 1));
    assert_eq!(during.longest_gap_us, 245_000, "from 105 to 350");
    assert_eq!(during.first_ok_us, Some(250_000), "what was on its way does not count");
    assert!(!during.never_ended);
}

#[test]
fn an_outage_without_end_says_so_and_where_nobody_asks_there_is_none() {
    let mut said = vec![fault(100, "kill", 1, "installed"), fault(500, "kill", 2, "installed")];
    said.extend(op(0, "write", 10, 12, Kind::Ok));
    said.extend(op(0, "write", 110, 400, Kind::Info));
    let events = history(said);
    let told = outages(&faults(&events), &ops(&events));
    assert_eq!((told[1].longest_gap_us, told[1].never_ended, told[1].first_ok_us), (300_000, true, None));
    assert_eq!((told[2].asked, told[2].longest_gap_us, told[2].never_ended), (0, 0, false));
}

#[test]
fn a_late_answer_of_a_deposed_leader_does_not_bring_it_back() {
    let mut said = Vec::new();
    for (at, node, term) in [(10, "n1", 1), (20, "n1", 1), (30, "n2", 2), (40, "n1", 1), (50, "n2", 2)] {
        said.extend(op(0, "write", at, at + 1, Kind::Ok));
        let srv = Served { node: Some(node.to_owned()), part: Some(3), term: Some(term), ..Served::default() };
        said.last_mut().unwrap().1.srv = Some(srv);
    }
    let events = history(said);
    let strips = leaders(&ops(&events));
    let reigns: Vec<_> = strips[&3].iter().map(|r| (r.node.as_str(), r.from_ns / MS, r.to_ns / MS)).collect();
    assert_eq!(reigns, [("n1", 11, 21), ("n2", 31, 51)]);
}

#[test]
fn only_a_run_that_looked_and_found_nothing_passes() {
    let events = || history(op(0, "write", 0, 1, Kind::Ok).to_vec());
    let gate = |ok| Gate { name: "kills".to_owned(), want: "1".to_owned(), got: "0".to_owned(), ok };
    let outcome = |verdicts, gates| Report { gates, ..report(events(), verdicts) }.outcome();
    let says = |valid| verdict(valid, Vec::new());
    assert_eq!(outcome(vec![says(Valid::True)], vec![gate(true)]), Outcome::Pass);
    assert_eq!(outcome(vec![says(Valid::True)], vec![gate(false)]), Outcome::Vacuous);
    assert_eq!(outcome(Vec::new(), Vec::new()), Outcome::Vacuous);
    assert_eq!(outcome(vec![says(Valid::True), says(Valid::Unknown)], Vec::new()), Outcome::Unknown);
    assert_eq!(outcome(vec![says(Valid::Unknown), says(Valid::False)], vec![gate(false)]), Outcome::Violation);
}

#[test]
fn whatever_a_key_holds_stays_text() {
    let evil = "</script><script>alert(1)</script><!--\u{1b}[31m\u{2028}@@PAGE@@&lt;\"'";
    let mut said = Vec::from(op(0, "write", 0, 1, Kind::Ok));
    said[0].1.key = Some(evil.to_owned());
    said[1].1.error = Some(Failure { code: evil.to_owned(), definite: false, msg: evil.to_owned() });
    said.push(fault(1, evil, 1, "installed"));
    let violation = Violation {
        what: evil.to_owned(),
        kind: evil.to_owned(),
        key: Some(evil.to_owned()),
        events: vec![0, 1, 2, 99],
        window_ns: (0, MS),
    };
    let mut evil_report = report(history(said), vec![verdict(Valid::False, vec![violation])]);
    evil_report.run.workload = evil.to_owned();
    evil_report.reproduce = evil.to_owned();
    let page = html(&evil_report);
    let plain = html(&report(Vec::new(), Vec::new()));
    assert_eq!(page.matches("<script").count(), plain.matches("<script").count());
    assert_eq!(page.matches("</script").count(), plain.matches("</script").count());
    assert_eq!(page.matches("<!--").count(), 0);
    assert!(!page.contains('\u{1b}'));
    let data = embedded(&page);
    assert_eq!(data["reproduce"], evil, "and nothing of it is lost");
    assert_eq!(data["workloads"][0]["verdicts"][0]["violations"][0]["what"], evil);
    assert_eq!(data["workloads"][0]["verdicts"][0]["violations"][0]["others"].as_array().unwrap().len(), 2);
}

#[test]
fn the_page_loads_nothing() {
    let page = html(&report(history(op(0, "write", 0, 1, Kind::Ok).to_vec()), Vec::new()));
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(!page.contains("@@"), "every mark is filled in");
}

#[test]
fn a_sample_keeps_what_matters_first() {
    let mut said = Vec::new();
    for nth in 0..1_000 {
        let kind = if nth % 100 == 50 { Kind::Fail } else { Kind::Ok };
        said.extend(op(0, "write", nth * 10, nth * 10 + if nth == 777 { 9 } else { 1 }, kind));
    }
    let events = history(said);
    let found = [ops(&events)];
    let named = [BTreeSet::from([2 * 123 + 1])];
    let kept = super::data::keep(&found, &named, 5 * MS, 100);
    assert_eq!(kept[0].len(), 100);
    assert!(kept[0].contains(&123), "of a violation");
    assert!(kept[0].contains(&777), "slow");
    assert_eq!(kept[0].iter().filter(|at| *at % 100 == 50).count(), 10, "all that failed");
    let late = kept[0].iter().filter(|at| **at >= 500).count();
    assert!((45..=55).contains(&late), "from all of the run: {late}");
    assert_eq!(super::data::keep(&found, &named, 5 * MS, 1)[0], [123], "the violation before all else");
}

#[test]
fn both_outputs_say_the_same() {
    let mut said = vec![fault(0, "kill", 1, "installed"), fault(5, "kill", 1, "healed")];
    said.extend(op(0, "write", 1, 9, Kind::Ok));
    let report = report(history(said), vec![verdict(Valid::True, Vec::new())]);
    let (results, data) = (results(&report), embedded(&html(&report)));
    assert_eq!(results["verdict"], "pass");
    for (of_results, of_page) in [
        ("verdict", "verdict"),
        ("operations", "counts"),
        ("latency", "latency"),
        ("faults", "faults"),
        ("unavailability", "outages"),
    ] {
        assert_eq!(results[of_results], data[of_page], "{of_results}");
    }
    assert_eq!(results["unavailability"][1]["longest_gap_us"], 9_000);
    assert_eq!(results["latency"][0]["p50_us"], 8_000);
}
