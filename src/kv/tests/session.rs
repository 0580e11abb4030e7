//! Exactly once: what is remembered, what is forgotten, and that the forgotten is refused.

use super::*;
use crate::error::{Error, Outcome, Reason};
use std::collections::BTreeMap;

fn small(sessions_max: u64, replies_per_session_max: u64) -> Log {
    let limits = SessionLimits { sessions_max, replies_per_session_max, ..SessionLimits::default() };
    Log::with_limits(Layout::Ordered, Span::all(), limits)
}

fn add(log: &mut Log, session: Session) -> Reply {
    log.write(Some(session), Op::Single(increment("n", 1)))
}

fn expired(reply: &Reply) -> bool {
    matches!(reply.answer, Err(Refusal::SessionExpired { .. }))
}

#[test]
fn a_repetition_gets_the_same_answer() {
    let mut log = Log::all();
    let first = add(&mut log, session(1, 1));
    add(&mut log, session(1, 2));
    let again = add(&mut log, session(1, 1));
    assert!(!first.replayed && again.replayed);
    assert_eq!(first.answer, again.answer);
    assert_eq!(log.value("n"), Some("2".into()));
}

#[test]
fn refusals_and_unmet_conditions_are_remembered_too() {
    let mut log = Log::all();
    let refused = item("k", Action::Delete { must_exist: true });
    let unmet = put("k", "2").when(Condition::Present);
    let first = [
        log.write(Some(session(1, 1)), Op::Single(refused.clone())),
        log.write(Some(session(1, 2)), Op::Single(unmet.clone())),
    ];
    log.single(put("k", "1"));
    let again =
        [log.write(Some(session(1, 1)), Op::Single(refused)), log.write(Some(session(1, 2)), Op::Single(unmet))];
    for (first, again) in first.iter().zip(&again) {
        assert_eq!(first.answer, again.answer);
        assert!(again.replayed);
    }
    assert_eq!(log.value("k"), Some("1".into()));
}

#[test]
fn a_sequence_used_for_another_request_is_refused() {
    let mut log = Log::all();
    add(&mut log, session(1, 1));
    let other = log.write(Some(session(1, 1)), Op::Single(increment("n", 2)));
    assert_eq!(other.answer, Err(Refusal::SequenceReused { sequence: 1 }));
    assert!(!other.replayed);
    let reopened = Session { opened: version_at(START_MS) + 1, ..session(1, 2) };
    assert_eq!(add(&mut log, reopened).answer, Err(Refusal::SequenceReused { sequence: 2 }));
    assert_eq!(log.value("n"), Some("1".into()));
}

#[test]
fn acknowledged_answers_are_forgotten_and_then_refused() {
    let mut log = Log::all();
    for sequence in 1..=100 {
        add(&mut log, session(1, sequence));
    }
    let full = log.store.session_bytes();
    add(&mut log, Session { acknowledged_below: 100, ..session(1, 101) });
    assert!(log.store.session_bytes() * 10 < full);
    let late = add(&mut log, session(1, 99));
    let error = Error::from(late.answer.unwrap_err());
    assert_eq!((error.reason, error.outcome), (Reason::SessionExpired, Some(Outcome::Unknown)));
    assert!(add(&mut log, session(1, 100)).replayed);
    assert_eq!(log.value("n"), Some("101".into()));
}

#[test]
fn answers_beyond_the_limit_are_forgotten_lowest_first() {
    let mut log = small(10, 3);
    for sequence in [1, 2, 4, 3, 5] {
        assert!(!add(&mut log, session(1, sequence)).replayed);
    }
    assert!(expired(&add(&mut log, session(1, 1))) && expired(&add(&mut log, session(1, 2))));
    for sequence in 3..=5 {
        assert!(add(&mut log, session(1, sequence)).replayed);
    }
    assert_eq!(log.value("n"), Some("5".into()));
}

#[test]
fn a_write_below_what_was_forgotten_is_refused_even_if_it_is_new() {
    let mut log = small(10, 2);
    for sequence in [2, 4, 5] {
        add(&mut log, session(1, sequence));
    }
    assert!(expired(&add(&mut log, session(1, 1))));
    assert!(add(&mut log, session(1, 3)).answer.is_ok());
    assert!(expired(&add(&mut log, session(1, 0))));
}

#[test]
fn bytes_of_answers_are_bounded_per_client_and_in_all() {
    let limits = SessionLimits { session_bytes_max: 10_000, bytes_max: 25_000, ..SessionLimits::default() };
    let mut log = Log::with_limits(Layout::Ordered, Span::all(), limits);
    log.single(put("k", vec![1; 3000]));
    let session =
        |client, sequence| Session { opened: version_at(START_MS) + client as u64, ..session(client, sequence) };
    for client in 1..=6 {
        for sequence in 1..=6 {
            log.write(Some(session(client, sequence)), Op::Single(put("k", vec![2; 3000]).with_previous()));
            assert!(log.store.session_bytes() <= 25_000);
        }
        assert!(add(&mut log, session(client, 7)).answer.is_ok());
    }
    assert!((2..6).contains(&log.store.sessions()), "some clients made room");
    assert!(add(&mut log, session(6, 7)).replayed);
    assert!(expired(&add(&mut log, session(6, 1))));
}

#[test]
fn an_answer_too_large_to_remember_is_not_computed_again() {
    let limits = SessionLimits { session_bytes_max: 1000, ..SessionLimits::default() };
    let mut log = Log::with_limits(Layout::Ordered, Span::all(), limits);
    log.single(put("k", vec![1; 3000]));
    let op = Op::Single(put("k", "2").with_previous());
    assert!(log.write(Some(session(1, 2)), op.clone()).answer.is_ok());
    log.single(put("k", "3"));
    let again = log.write(Some(session(1, 2)), op);
    assert!(expired(&again) && !again.replayed);
    assert_eq!(log.value("k"), Some("3".into()));
    assert!(add(&mut log, session(1, 1)).answer.is_ok(), "lower sequences may still come");
}

#[test]
fn a_forgotten_client_is_refused_and_a_newer_one_is_not() {
    let mut log = small(2, 10);
    for client in 1..=3 {
        log.now_ms += 2000;
        let opened = version_at(START_MS + client as u64);
        assert!(add(&mut log, Session { opened, ..session(client, 1) }).answer.is_ok());
    }
    assert_eq!(log.store.sessions(), 2);
    let late = add(&mut log, Session { opened: version_at(START_MS + 1), ..session(1, 1) });
    assert_eq!(late.answer, Err(Refusal::SessionExpired { horizon: version_at(START_MS + 1) }));
    let older = add(&mut log, session(9, 1));
    assert!(expired(&older), "opened before the forgotten one: it cannot be told from it");
    assert!(add(&mut log, Session { opened: version_at(START_MS + 2), ..session(8, 1) }).answer.is_ok());
    assert_eq!(log.value("n"), Some("4".into()));
}

#[test]
fn the_client_unused_for_longest_makes_room() {
    let mut log = small(2, 10);
    for client in [1, 2, 1] {
        log.now_ms += 2000;
        let sequence = log.now_ms;
        add(&mut log, session(client, sequence));
    }
    add(&mut log, Session { opened: version_at(START_MS + 1), ..session(3, 1) });
    assert!(add(&mut log, session(1, START_MS + 2000)).replayed);
    assert!(expired(&add(&mut log, session(2, START_MS + 4000))));
}

#[test]
fn an_idle_client_is_forgotten_in_log_time() {
    let mut log = Log::all();
    add(&mut log, session(1, 1));
    log.now_ms += 59 * 60 * 1000;
    assert!(add(&mut log, session(1, 1)).replayed, "and a repetition is a use");
    log.now_ms += 59 * 60 * 1000;
    assert!(add(&mut log, session(1, 1)).replayed);
    log.now_ms += 61 * 60 * 1000;
    assert!(expired(&add(&mut log, session(1, 1))));
    assert_eq!((log.store.sessions(), log.store.session_bytes()), (0, 0));
}

#[test]
fn a_session_from_the_future_cannot_push_the_horizon() {
    let mut log = small(1, 10);
    let opened = version_at(START_MS + SESSION_AHEAD_MAX_MS + 1000);
    let ahead = add(&mut log, Session { opened, ..session(1, 1) });
    let error = Error::from(ahead.answer.unwrap_err());
    assert_eq!((error.reason, error.outcome), (Reason::SessionAhead, Some(Outcome::NotApplied)));
    assert_eq!(log.store.sessions(), 0);
}

#[test]
fn what_was_answered_is_answered_again_where_it_is_remembered() {
    // As after a split: the table stays, the span shrinks.
    let mut log = Log::all();
    let op = Op::Batch(vec![put("a", "1"), put("z", "1")]);
    let first = log.write(Some(session(1, 1)), op.clone());
    let bounds = bounds::Bounds::new(Layout::Ordered, span("m", None));
    let sessions = log.store.session_table().clone();
    let table = table::Table::default();
    log.store = Store::from_parts(bounds, table, sessions, log.index, log.store.last_version());
    let again = log.write(Some(session(1, 1)), op.clone());
    assert!(again.replayed && again.answer == first.answer);
    assert!(matches!(log.write(Some(session(1, 2)), op).answer, Err(Refusal::NotOwned(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is repeated, reordered, acknowledged, forgotten or restored from a snapshot in between: nothing is
    /// applied twice, and two answers to one write never differ.
    #[test]
    fn with_tiny_limits_nothing_is_applied_twice(
        deliveries in prop::collection::vec((1..6u128, 1..8u64, 0..4u64, 0..3u64, 0..50u8), 1..150),
        limits in (1..4u64, 1..4u64, 200..1000u64, 300..2000u64),
    ) {
        let limits = SessionLimits {
            sessions_max: limits.0,
            replies_per_session_max: limits.1,
            session_bytes_max: limits.2,
            bytes_max: limits.3,
            idle_ms_max: 10 * 60 * 1000,
        };
        let mut log = Log::with_limits(Layout::Ordered, Span::all(), limits);
        let mut answers: BTreeMap<(u128, u64), Answer> = BTreeMap::new();
        for (client, sequence, later, behind, event) in deliveries {
            log.now_ms += [0, 10, 2000, 90_000][later as usize];
            if event == 0 {
                log.now_ms += 11 * 60 * 1000;
            }
            if event < 10 {
                log.store.freeze();
                let chunks = chunks(&mut log.store, 300);
                let restored = restore(&chunks).unwrap();
                prop_assert_eq!(restored.digest(), log.store.digest());
                log.store = restored;
            }
            let session = Session {
                client,
                opened: version_at(START_MS + client as u64 * 30_000),
                sequence,
                acknowledged_below: sequence.saturating_sub(behind),
            };
            let key = format!("{client} {sequence}");
            let reply = log.write(Some(session), Op::Single(increment(key, 1)));
            match (&reply.answer, answers.get(&(client, sequence))) {
                (Ok(_), None) => {
                    prop_assert!(!reply.replayed);
                    answers.insert((client, sequence), reply.answer);
                }
                (Ok(_), Some(first)) => {
                    prop_assert!(reply.replayed);
                    prop_assert_eq!(&reply.answer, first);
                }
                (Err(Refusal::SessionExpired { .. } | Refusal::SessionAhead { .. }), _) => {}
                (other, _) => prop_assert!(false, "{:?}", other),
            }
            prop_assert!(log.store.sessions() as u64 <= limits.sessions_max);
        }
        prop_assert_eq!(log.store.rows(), answers.len() as u64);
        for (key, row) in rows(&log.store) {
            prop_assert_eq!(row.value, Bytes::from("1"), "{:?} was applied twice", key);
        }
    }
}
