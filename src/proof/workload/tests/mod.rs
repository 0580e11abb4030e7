//! The workloads against a model of a store: their histories are well-formed, repeatable, and full of what they are for.

mod model;

use super::*;
use crate::proof::{
    check::{self, Valid},
    history::{self, Event},
};
use model::{Lie, doors};
use std::collections::BTreeMap;

/// How long a workload runs: many operations of each kind.
const RUN: Duration = Duration::from_secs(12);

/// Loads, runs, stops and reads at the end.
async fn run(workload: Workload, seed: u64, lie: Lie) -> (Vec<Event>, Summary) {
    let recorder = Recorder::new(Instant::now(), None);
    let doors = doors(seed, lie);
    let settings = Settings { deadline: Duration::from_millis(300), ..Settings::new(workload, "k", seed) };
    let until = || Instant::now() + Duration::from_secs(60);
    load(&settings, &doors, &recorder, until()).await.unwrap();
    let running = start(settings.clone(), doors.clone(), Arc::clone(&recorder));
    tokio::time::sleep(RUN).await;
    running.stop().await;
    final_reads(settings, doors, Arc::clone(&recorder), until()).await.unwrap();
    let events = recorder.events();
    let summary = Summary::of(&events);
    (events, summary)
}

/// The rules of the format, and those of the workloads on top.
fn check_form(events: &[Event]) {
    let mut open: BTreeMap<Process, Event> = BTreeMap::new();
    let mut retired = BTreeSet::new();
    let mut written = BTreeSet::new();
    for (n, event) in events.iter().enumerate() {
        assert_eq!(event.index, n as u64);
        assert!(n == 0 || events[n - 1].time <= event.time);
        assert!(!retired.contains(&event.process), "{event:?} after an operation whose outcome is not known");
        if event.kind == Kind::Invoke {
            assert!(open.insert(event.process, event.clone()).is_none(), "{event:?} while another is open");
            let values = match (event.f.as_str(), &event.value) {
                ("write", value) if event.phase != Phase::Load => vec![value.clone()],
                ("cas", value) => vec![value[1].clone()],
                _ => Vec::new(),
            };
            for value in values.iter().filter(|value| !value.is_null()) {
                assert!(written.insert(value.to_string()), "{value} is written twice");
            }
            continue;
        }
        let began = open.remove(&event.process).expect("what ends has begun");
        assert_eq!(
            (&began.f, &began.key, &began.read, &began.session, &began.req),
            (&event.f, &event.key, &event.read, &event.session, &event.req)
        );
        match event.kind {
            Kind::Ok => assert!(event.error.is_none() && event.srv.is_some(), "{event:?}"),
            Kind::Fail => assert!(event.error.as_ref().is_some_and(|error| error.definite), "{event:?}"),
            _ => {
                assert!(event.error.as_ref().is_some_and(|error| !error.definite), "{event:?}");
                retired.insert(event.process);
            }
        }
    }
    assert!(open.is_empty(), "clients finish what they have begun");
}

#[tokio::test(start_paused = true)]
async fn histories_are_well_formed_and_can_be_written_down() {
    for workload in Workload::ALL {
        let (events, _) = run(workload, 1, Lie::No).await;
        check_form(&events);
        let mut file = Vec::new();
        events.iter().for_each(|event| history::write(&mut file, event).unwrap());
        assert_eq!(history::read(file.as_slice()).unwrap(), events, "{workload}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_history_and_another_one_another() {
    for workload in Workload::ALL {
        let first = run(workload, 7, Lie::No).await;
        assert!(first == run(workload, 7, Lie::No).await, "{workload}");
        assert!(first.0 != run(workload, 8, Lie::No).await.0, "{workload}");
    }
}

#[tokio::test(start_paused = true)]
async fn every_workload_does_what_it_is_for() {
    let mut all = Summary::default();
    for workload in Workload::ALL {
        let (events, sum) = run(workload, 3, Lie::No).await;
        assert!(sum.ended as usize * 2 == events.len() && sum.repeated > 20 && sum.unknown > 0, "{workload}: {sum:?}");
        assert!(sum.unknown_ratio() < 0.1, "{workload}: {sum:?}");
        let f = match workload {
            Workload::Register | Workload::Levels => "cas",
            Workload::Counter => "incr",
            Workload::Rows => "scan",
            Workload::Bank => "batch",
        };
        assert!(sum.ok_of(f) > 100, "{workload}: {sum:?}");
        all.join(&sum);
    }
    let modes = ["linearizable", "lease", "bounded", "session", "eventual"];
    for name in
        modes.map(|mode| format!("read/{mode}/ok")).iter().chain(&["scan/bounded/ok".into(), "delete/ok".into()])
    {
        assert!(all.ops.get(name).is_some_and(|count| *count > 50), "{name}: {all:?}");
    }
    assert!(all.follower_reads > 100 && all.errors["cas/cas-mismatch"] > 20 && all.errors["batch/cas-mismatch"] > 20);
}

#[tokio::test(start_paused = true)]
async fn registers_make_room_and_the_end_reads_all_of_them_everywhere() {
    let recorder = Recorder::new(Instant::now(), None);
    let doors = doors(5, Lie::No);
    let settings = Settings { keys: 3, ops_per_key_max: 40, ..Settings::new(Workload::Register, "k", 5) };
    let running = start(settings.clone(), doors.clone(), Arc::clone(&recorder));
    tokio::time::sleep(RUN).await;
    running.stop().await;
    final_reads(settings, doors, Arc::clone(&recorder), Instant::now() + RUN).await.unwrap();
    let mut ops: BTreeMap<(Phase, String), BTreeMap<Option<String>, u32>> = BTreeMap::new();
    for event in recorder.events().iter().filter(|event| event.kind == Kind::Ok || event.phase == Phase::Main) {
        if event.kind != Kind::Invoke {
            let slot = ops.entry((event.phase, event.key.clone().unwrap())).or_default();
            *slot.entry(event.node.clone()).or_default() += 1;
        }
    }
    let (last, main): (Vec<_>, Vec<_>) = ops.into_iter().partition(|((phase, _), _)| *phase == Phase::Final);
    assert!(main.len() > 20 && main.len() == last.len());
    assert!(main.iter().all(|(_, by)| by.values().sum::<u32>() <= 40));
    assert!(last.iter().all(|(_, by)| by.len() == 3 && by.values().all(|count| *count == 1)), "{last:?}");
}

#[tokio::test(start_paused = true)]
async fn the_end_names_what_it_could_not_read() {
    struct Shut;
    impl Door for Shut {
        fn node(&self) -> Option<String> {
            Some("n9".to_owned())
        }

        fn ask(
            &self,
            _: crate::proto::v1::Request,
            _: Instant,
        ) -> futures_util::future::BoxFuture<'_, Result<crate::proto::v1::reply::Result, Error>> {
            Box::pin(async { Err(Error::new(Reason::NoQuorum, "alone")) })
        }
    }
    let recorder = Recorder::new(Instant::now(), None);
    let settings = Settings::new(Workload::Bank, "k", 5);
    let until = Instant::now() + RUN;
    let error = final_reads(settings, vec![Arc::new(Shut)], recorder, until).await.unwrap_err();
    assert!(error.message.contains("through n9 did not succeed in time: NO_QUORUM: alone"), "{error}");
    assert!(Instant::now() >= until && Instant::now() < until + Duration::from_secs(1));
}

#[test]
fn cuts_ascend_and_leave_the_bank_whole() {
    let cuts = cuts(5);
    assert_eq!(cuts, ["33", "66", "99", "cc"]);
    let (from, to) = bank::range();
    assert!((1..300).all(|count| super::cuts(count).iter().all(|cut| *cut <= from || *cut >= to)));
    assert_eq!(Workload::ALL.map(|workload| workload.name().parse::<Workload>().unwrap()), Workload::ALL);
    assert!("ledger".parse::<Workload>().unwrap_err().message.contains("register, levels"));
}

/// The checkers that say no, of one history.
async fn accusers(workload: Workload, seed: u64, lie: Lie) -> BTreeSet<String> {
    let (events, _) = run(workload, seed, lie).await;
    let verdicts = check::judge(workload.name(), &events);
    assert!(verdicts.iter().all(|verdict| verdict.valid != Valid::Unknown), "{workload} {lie:?}: {verdicts:?}");
    verdicts.into_iter().filter(|verdict| verdict.valid == Valid::False).map(|verdict| verdict.checker).collect()
}

#[tokio::test(start_paused = true)]
async fn a_store_that_keeps_its_promises_is_found_to() {
    for workload in Workload::ALL {
        for seed in 1..=3 {
            assert_eq!(accusers(workload, seed, Lie::No).await, BTreeSet::new(), "{workload} {seed}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_lies_is_caught_by_every_workload_that_could_notice() {
    use Workload::{Bank, Counter, Levels, Register, Rows};
    let caught: &[(Lie, Workload, &[&str])] = &[
        (Lie::StaleRead, Register, &["linear", "levels"]),
        (Lie::StaleRead, Levels, &["linear", "levels"]),
        (Lie::StaleRead, Counter, &["linear", "counter"]),
        (Lie::StaleRead, Rows, &["rows"]),
        (Lie::StaleRead, Bank, &["bank"]),
        (Lie::StaleFollower, Levels, &["levels"]),
        (Lie::StaleFollower, Rows, &["rows"]),
        (Lie::LostWrite, Register, &["linear", "levels"]),
        (Lie::LostWrite, Levels, &["linear", "levels"]),
        (Lie::LostWrite, Counter, &["linear", "counter", "durable"]),
        (Lie::LostWrite, Rows, &["rows", "durable"]),
        (Lie::LostWrite, Bank, &["bank"]),
        (Lie::DoubleApply, Register, &["linear"]),
        (Lie::DoubleApply, Counter, &["linear", "counter", "durable"]),
        (Lie::DoubleApply, Bank, &["bank"]),
        (Lie::TornBatch, Bank, &["bank"]),
        (Lie::ScanGap, Rows, &["rows", "durable"]),
        (Lie::ScanGap, Bank, &["bank"]),
    ];
    for (lie, workload, checkers) in caught {
        let accusers = accusers(*workload, 1, *lie).await;
        assert!(checkers.iter().all(|name| accusers.contains(*name)), "{workload} {lie:?}: only {accusers:?}");
    }
}
