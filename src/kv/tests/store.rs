//! One rule of apply at a time.

use super::*;
use crate::error::{Error, Outcome, Reason};

#[test]
fn put_get_delete() {
    let mut log = Log::all();
    let first = log.single(put("k", "1"));
    assert_eq!((first.applied, first.existed, first.previous), (true, false, None));
    assert_eq!(first.version, version_at(START_MS));
    let second = log.single(put("k", "2").with_previous());
    assert_eq!(second.previous, Some(Row { value: "1".into(), version: first.version }));
    assert!(second.existed && second.version > first.version);
    let gone = log.single(delete("k"));
    assert!(gone.applied && gone.existed);
    assert_eq!(log.value("k"), None);
    let nothing = log.single(delete("k"));
    assert!(nothing.applied && !nothing.existed);
}

#[test]
fn versions_go_up_even_when_stamps_go_back() {
    let mut log = Log::all();
    let first = log.single(put("k", "1")).version;
    log.now_ms -= 5000;
    let second = log.single(put("k", "2")).version;
    log.now_ms += 5001;
    let third = log.single(put("k", "3")).version;
    assert_eq!((second, third), (first + 1, version_at(START_MS + 1)));
}

#[test]
fn each_write_of_a_command_has_its_own_version_and_a_batch_has_one() {
    let mut log = Log::all();
    let write = |op| Write { session: None, op };
    let replies = log.command(vec![
        write(Op::Single(put("a", "1"))),
        write(Op::Batch(vec![put("b", "1"), put("c", "1")])),
        write(Op::Single(put("d", "1"))),
    ]);
    assert_eq!(replies.len(), 3);
    let versions: Vec<u64> = rows(&log.store).iter().map(|(_, row)| row.version - version_at(START_MS)).collect();
    assert_eq!(versions, [0, 1, 1, 2]);
}

#[test]
fn an_unmet_condition_is_a_result_that_names_the_current_version() {
    let mut log = Log::all();
    let unmet = log.single(put("k", "1").when(Condition::Present));
    assert_eq!((unmet.applied, unmet.version, unmet.existed), (false, 0, false));
    let version = log.single(put("k", "1").when(Condition::Absent)).version;
    let unmet = log.single(put("k", "2").when(Condition::Version(version + 1)).with_previous());
    assert_eq!((unmet.applied, unmet.version, unmet.existed), (false, version, true));
    assert_eq!(unmet.previous.unwrap().value, "1");
    assert!(log.single(put("k", "2").when(Condition::Value("1".into()))).applied);
    assert!(!log.single(delete("k").when(Condition::Value("1".into()))).applied);
    assert_eq!(log.value("k"), Some("2".into()));
}

#[test]
fn must_exist_refuses() {
    let mut log = Log::all();
    let missing = item("k", Action::Delete { must_exist: true });
    let refusal = log.op(Op::Single(missing.clone())).unwrap_err();
    assert_eq!(refusal, Refusal::NotFound { key: "k".into() });
    let error = Error::from(refusal);
    assert_eq!((error.reason, error.outcome), (Reason::NotFound, Some(Outcome::NotApplied)));
    log.single(put("k", "1"));
    assert!(log.single(missing).existed);
}

#[test]
fn increments_count_and_refuse_what_is_no_number() {
    let mut log = Log::all();
    assert_eq!(log.single(increment("n", -3)).number, Some(-3));
    assert_eq!(log.single(increment("n", 10)).number, Some(7));
    assert_eq!(log.value("n"), Some("7".into()));
    log.single(put("max", i64::MAX.to_string()));
    let overflow = log.op(Op::Single(increment("max", 1))).unwrap_err();
    assert_eq!(overflow, Refusal::NumberOverflow { key: "max".into() });
    log.single(put("text", "seven"));
    let text = log.op(Op::Single(increment("text", 1))).unwrap_err();
    assert_eq!(Error::from(text).reason, Reason::NotANumber);
    assert_eq!((log.value("max"), log.value("text")), (Some(i64::MAX.to_string().into()), Some("seven".into())));
}

#[test]
fn a_batch_is_all_or_nothing() {
    let mut log = Log::all();
    log.single(put("a", "x"));
    let before = (rows(&log.store), log.store.last_version());
    let unmet = log.op(Op::Batch(vec![put("b", "1"), put("a", "2").when(Condition::Absent)]));
    let Ok(Done::Batch { applied: false, items }) = unmet else { panic!("{unmet:?}") };
    assert_eq!(items.iter().map(|item| item.existed).collect::<Vec<_>>(), [false, true]);
    let refused = log.op(Op::Batch(vec![put("b", "1"), increment("a", 1)]));
    assert_eq!(refused, Err(Refusal::NotANumber { key: "a".into() }));
    let twice = log.op(Op::Batch(vec![put("b", "1"), put("c", "1"), delete("b")]));
    assert_eq!(twice, Err(Refusal::KeyRepeated { key: "b".into() }));
    assert_eq!((rows(&log.store), log.store.last_version()), before);
    let done = log.op(Op::Batch(vec![put("b", "1"), delete("a"), increment("n", 1)]));
    assert!(matches!(done, Ok(Done::Batch { applied: true, .. })));
    assert_eq!((log.value("a"), log.value("b"), log.value("n")), (None, Some("1".into()), Some("1".into())));
}

#[test]
fn what_lies_elsewhere_is_refused_and_not_remembered() {
    let mut log = Log::new(Layout::Ordered, span("b", Some("d")));
    for key in ["", "a", "d", "e"] {
        let reply = log.write(Some(session(1, 1)), Op::Single(put(key, "1")));
        let error = Error::from(reply.answer.unwrap_err());
        assert_eq!((error.reason, error.outcome), (Reason::WrongPartition, Some(Outcome::NotApplied)));
        assert!(log.store.get(&key.into()).is_err());
    }
    assert_eq!(log.store.sessions(), 0);
    assert!(log.write(Some(session(1, 1)), Op::Single(put("c", "1"))).answer.is_ok());
    let mixed = log.op(Op::Batch(vec![put("c", "2"), put("d", "2")]));
    assert!(matches!(mixed, Err(Refusal::NotOwned(_))));
    assert_eq!(log.value("c"), Some("1".into()));
}

#[test]
fn a_range_is_deleted_up_to_the_partitions_end() {
    let mut log = Log::new(Layout::Ordered, span("b", Some("e")));
    for key in ["b", "c", "cc", "d"] {
        log.single(put(key, "1"));
    }
    let done = log.op(Op::DeleteRange { span: span("c", Some("z")), tokens: None });
    let Ok(Done::DeleteRange(deleted)) = done else { panic!("{done:?}") };
    assert_eq!((deleted.count, deleted.covered), (3, span("c", Some("e"))));
    assert_eq!(log.store.rows(), 1);
    assert!(log.op(Op::DeleteRange { span: span("a", Some("c")), tokens: None }).is_err());
}

#[test]
#[should_panic(expected = "entries are applied once")]
fn an_entry_is_not_applied_twice() {
    let mut log = Log::all();
    let command = Command { stamp: 1, writes: Vec::new() };
    log.store.apply(3, &command);
    log.store.apply(3, &command);
}

#[test]
fn the_digest_tells_states_apart() {
    let state = |ops: &[(&'static str, &'static str)]| {
        let mut log = Log::all();
        for (key, value) in ops {
            log.single(put(*key, *value));
        }
        log.store.digest()
    };
    assert_eq!(state(&[("a", "1"), ("b", "2")]), state(&[("a", "1"), ("b", "2")]));
    assert_ne!(state(&[("a", "1"), ("b", "2")]), state(&[("a", "2"), ("b", "1")]));
    assert_ne!(state(&[("a", "1")]), state(&[("a", "1"), ("a", "1")]));
    let with_session = |sequence| {
        let mut log = Log::all();
        log.write(Some(session(1, sequence)), Op::Single(put("a", "1")));
        log.store.digest()
    };
    assert_ne!(with_session(1), with_session(2));
}
