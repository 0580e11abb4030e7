//! The log in memory: what a crash loses, and the faults of a disk.

use super::{
    super::testing::{A, B, append, outcome, records},
    *,
};
use proptest::prelude::*;
use std::sync::Arc;

#[test]
fn an_immediate_log_answers_at_once_and_refuses_what_cannot_follow() {
    let log = MemoryLog::immediate();
    let put = |record| {
        let (result, done) = outcome();
        log.submit(A.0, A.1, record, Some(done));
        let result = result.lock().take();
        result.expect("answered at once")
    };
    put(append(0, 3)).unwrap();
    assert!(put(append(4, 1)).is_err(), "a hole");
    assert!(put(append(2, 1)).is_err(), "an overwrite");
    put(Record::Truncate { from: 2 }).unwrap();
    put(append(2, 2)).unwrap();
    put(Record::Purge { upto: 0, marker: "m0".into() }).unwrap();
    let found = log.recover().unwrap().remove(&A).unwrap();
    assert_eq!(found.entries.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(found.purged, Some((0, "m0".into())));
    put(Record::Purge { upto: 9, marker: "m9".into() }).unwrap();
    assert!(put(append(4, 1)).is_err(), "a hole behind the purge point");
    assert!(put(Record::Purge { upto: 8, marker: "m8".into() }).is_err(), "purging backwards");
    put(append(10, 1)).unwrap();
    put(Record::Tombstone).unwrap();
    put(Record::Tombstone).unwrap();
    assert!(put(Record::Vote("v".into())).is_err(), "destroyed");
    assert_eq!(log.recover().unwrap()[&A], Recovered { tombstone: true, ..Recovered::default() });
}

#[test]
fn a_simulated_disk_answers_when_synced_and_a_crash_loses_the_rest() {
    let log = MemoryLog::simulated();
    let (first, done) = outcome();
    log.submit(A.0, A.1, append(0, 2), Some(done));
    assert!(first.lock().is_none() && log.recover().unwrap().is_empty());
    log.sync();
    assert!(matches!(*first.lock(), Some(Ok(()))));
    let (second, done) = outcome();
    log.submit(A.0, A.1, append(2, 2), Some(done));
    log.crash(Lose::All);
    assert!(second.lock().is_none() && Arc::strong_count(&second) == 1, "dropped, not run");
    log.sync();
    assert_eq!(log.recover().unwrap()[&A].entries.len(), 2);
}

#[test]
fn after_a_failed_sync_nothing_is_told_or_written_until_a_crash_finds_what_it_has_left() {
    for (left, expected) in [(FailedSync::Lost, 1), (FailedSync::Kept, 3)] {
        let log = MemoryLog::simulated();
        log.submit(A.0, A.1, append(0, 1), None);
        log.sync();
        log.fail_next_sync(left);
        let (failed, done) = outcome();
        log.submit(A.0, A.1, append(1, 2), Some(done));
        log.sync();
        let (later, done) = outcome();
        log.submit(A.0, A.1, append(3, 2), Some(done));
        log.sync();
        assert!(failed.lock().is_none() && later.lock().is_none());
        assert_eq!(log.recover().unwrap()[&A].entries.len(), 1);
        log.crash(Lose::Tail { seed: 1 });
        assert!(Arc::strong_count(&failed) == 1 && Arc::strong_count(&later) == 1, "dropped, not run");
        assert_eq!(log.recover().unwrap()[&A].entries.len(), expected, "{left:?}");
        let (result, done) = outcome();
        log.submit(A.0, A.1, append(expected as u64, 1), Some(done));
        log.sync();
        assert!(matches!(*result.lock(), Some(Ok(()))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_ends_every_life_until_there_is_space() {
    let log = Arc::new(MemoryLog::simulated());
    let life = |first| {
        let scope = env::Scope::seeded(1);
        let disk = log.clone();
        scope.enter(|| env::spawn(async move { disk.run(SyncTime::default()).await }));
        let (result, done) = outcome();
        log.submit(A.0, A.1, append(first, 1), Some(done));
        (scope, result)
    };
    log.set_full(true);
    for _ in 0..2 {
        let (scope, result) = life(0);
        assert_eq!(log.failed().await, "no space on the disk");
        assert!(result.lock().is_none());
        scope.abort_all();
        log.crash(Lose::Tail { seed: 1 });
        assert!(log.recover().unwrap().is_empty());
    }
    assert_eq!(log.put_meta("node", "7".into()).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(log.failed().await, "no space on the disk");
    log.crash(Lose::All);
    log.set_full(false);
    let (scope, result) = life(0);
    sleep(SyncTime::default().slow_max).await;
    assert!(matches!(*result.lock(), Some(Ok(()))));
    scope.abort_all();
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_stalls_answers_late() {
    let log = Arc::new(MemoryLog::simulated());
    let disk = log.clone();
    let task = env::spawn(async move { disk.run(SyncTime::default()).await });
    let start = Instant::now();
    let (tx, rx) = tokio::sync::oneshot::channel();
    log.submit(A.0, A.1, append(0, 1), Some(Box::new(move |result| tx.send(result).unwrap())));
    tokio::task::yield_now().await;
    log.stall(Duration::from_secs(5));
    rx.await.unwrap().unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(5));
    task.abort();
}

#[test]
fn a_rotten_entry_is_named_and_gone_once_it_is_overwritten() {
    let log = MemoryLog::simulated();
    assert_eq!(log.rot(1), None);
    log.submit(A.0, A.1, append(4, 1), None);
    log.submit(B.0, B.1, append(7, 1), None);
    log.sync();
    let places: std::collections::BTreeSet<_> = (0..50).map(|seed| log.rot(seed).unwrap()).collect();
    assert_eq!(places.len(), 2, "every entry can be hit: {places:?}");
    let error = log.recover().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("entry 4 of p1 r1"), "{error}");
    for place in [A, B] {
        log.submit(place.0, place.1, Record::Truncate { from: 0 }, None);
    }
    log.submit(A.0, A.1, append(4, 1), None);
    log.sync();
    assert_eq!(log.recover().unwrap()[&A].entries.len(), 1);
}

#[test]
fn a_torn_append_leaves_its_first_entries() {
    let mut sizes = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let log = MemoryLog::simulated();
        log.submit(A.0, A.1, append(0, 3), None);
        log.submit(A.0, A.1, append(3, 3), None);
        log.crash(Lose::Torn { seed });
        let found = log.recover().unwrap();
        sizes.insert(found.get(&A).map_or(0, |found| found.entries.len()));
    }
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
}

#[tokio::test(start_paused = true)]
async fn the_disk_task_syncs_what_waits_and_takes_its_time() {
    let log = Arc::new(MemoryLog::simulated());
    let task = env::spawn({
        let log = log.clone();
        async move { log.run(SyncTime::default()).await }
    });
    let start = Instant::now();
    for n in 0..3 {
        let (tx, rx) = tokio::sync::oneshot::channel();
        log.submit(A.0, A.1, append(n, 1), Some(Box::new(move |result| tx.send(result).unwrap())));
        rx.await.unwrap().unwrap();
    }
    assert!(start.elapsed() >= 3 * SyncTime::default().min && start.elapsed() <= 3 * SyncTime::default().slow_max);
    assert_eq!(log.unsynced(), 0);
    task.abort();
}

#[test]
fn meta_survives_a_crash() {
    let log = MemoryLog::simulated();
    log.put_meta("node", "7".into()).unwrap();
    log.crash(Lose::All);
    assert_eq!(log.get_meta("node").unwrap(), Some("7".into()));
    assert_eq!(log.get_meta("other").unwrap(), None);
}

proptest! {
    /// For every replica, what survives is the state after some prefix of its records that contains all synced.
    #[test]
    fn a_crash_loses_exactly_a_tail_of_what_was_not_synced(
        script in records(), synced in 0_usize..60, seed in any::<u64>(), all in any::<bool>(),
    ) {
        let log = MemoryLog::simulated();
        let synced = synced.min(script.len());
        for (n, (place, record)) in script.iter().enumerate() {
            log.submit(place.0, place.1, record.clone(), None);
            if n + 1 == synced {
                log.sync();
            }
        }
        log.crash(if all { Lose::All } else { Lose::Tail { seed } });
        let found = log.recover().unwrap();
        for place in [A, B] {
            let found = found.get(&place).cloned().unwrap_or_default();
            let mut model = Replica::default();
            let mut possible = Vec::new();
            for (n, (at, record)) in script.iter().enumerate() {
                if n >= synced {
                    possible.push(model.kept.clone());
                }
                if *at == place {
                    let _ = model.apply(record);
                }
            }
            possible.push(model.kept);
            if all {
                prop_assert_eq!(&found, &possible[0]);
            }
            prop_assert!(possible.contains(&found));
            prop_assert!(found.entries.keys().zip(found.entries.keys().skip(1)).all(|(a, b)| a + 1 == *b));
            if let (Some((purged, _)), Some((first, _))) = (&found.purged, found.entries.first_key_value()) {
                prop_assert_eq!(*first, purged + 1);
            }
        }
    }
}
