use super::{
    super::{
        memory::MemoryLog,
        testing::{A, append, outcome, records},
    },
    *,
};
use crate::control::{Disk, Orders};
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

const SMALL: FjallOptions = FjallOptions {
    memtable_bytes: 64 << 10,
    write_stall_max: WRITE_STALL_MAX,
    on_fatal: |error| panic!("{error}"),
    control: None,
};

fn open(dir: &Path) -> FjallLog {
    FjallLog::open(dir.join("log"), SMALL).unwrap()
}

/// Submits and waits for the outcome.
fn put(log: &FjallLog, place: Place, record: Record) -> io::Result<()> {
    log.push_and_wait(|done| Job::Record { place, record, done: Some(done) })
}

fn journals(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir.join("log/db")).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "jnl")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The engine on disk and the one in memory agree on every answer and on everything recovered, live and reopened.
    #[test]
    fn it_is_the_memory_log_on_disk(script in records(), reopen_at in 0_usize..60) {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, model) = (open(dir.path()), MemoryLog::immediate());
        let mut answers = Vec::new();
        for (n, (place, record)) in script.into_iter().enumerate() {
            if n == reopen_at {
                drop(log);
                log = open(dir.path());
                prop_assert_eq!(log.recover().unwrap(), model.recover().unwrap());
            }
            let (on_disk, done) = outcome();
            log.submit(place.0, place.1, record.clone(), Some(done));
            let (in_memory, done) = outcome();
            model.submit(place.0, place.1, record, Some(done));
            answers.push((on_disk, in_memory));
        }
        prop_assert_eq!(log.recover().unwrap(), model.recover().unwrap());
        for (on_disk, in_memory) in answers {
            let ok = |result: &Mutex<Option<io::Result<()>>>| result.lock().as_ref().map(Result::is_ok);
            prop_assert_eq!(ok(&on_disk), ok(&in_memory));
        }
        drop(log);
        prop_assert_eq!(open(dir.path()).recover().unwrap(), model.recover().unwrap());
    }
}

#[test]
fn a_destroyed_replica_stays_destroyed() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    put(&log, A, append(0, 5)).unwrap();
    put(&log, A, Record::Vote("v".into())).unwrap();
    put(&log, A, Record::Tombstone).unwrap();
    drop(log);
    let log = open(dir.path());
    assert_eq!(log.recover().unwrap()[&A], Recovered { tombstone: true, ..Recovered::default() });
    assert_eq!(put(&log, A, append(0, 1)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(put(&log, A, Record::Vote("v".into())).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn meta_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    assert_eq!(log.get_meta("uuid").unwrap(), None);
    log.put_meta("uuid", "one".into()).unwrap();
    log.put_meta("uuid", "two".into()).unwrap();
    drop(log);
    assert_eq!(open(dir.path()).get_meta("uuid").unwrap(), Some("two".into()));
}

#[test]
fn a_directory_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _log = open(dir.path());
    let error = FjallLog::open(dir.path().join("log"), SMALL).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
}

/// Bytes that the files below `dir` take on the disk.
fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut bytes = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes += disk_bytes(&entry.path()),
            Ok(meta) => bytes += meta.blocks() * 512,
            Err(_) => {} // Removed by fjall in the meantime.
        }
    }
    bytes
}

#[test]
fn disk_use_is_bounded_under_endless_appends_and_purges() {
    const ROUNDS: u64 = 300;
    const GROUPS: u64 = 4;
    let dir = tempfile::tempdir().unwrap();
    let options = FjallOptions { memtable_bytes: 4 << 20, ..SMALL };
    let log = FjallLog::open(dir.path().join("log"), options).unwrap();
    let payload = Bytes::from(vec![7; 32 << 10]);
    let (mut written, mut most) = (0, 0);
    for round in 0..ROUNDS {
        for group in 0..GROUPS {
            let place = (PartitionId(group), ReplicaId(group));
            let record = Record::Append { first: round * 16, entries: vec![payload.clone(); 16] };
            written += 16 * payload.len() as u64;
            log.submit(place.0, place.1, record, None);
            log.submit(place.0, place.1, Record::Vote("v".into()), None);
            if let Some(upto) = (round * 16).checked_sub(32) {
                log.submit(place.0, place.1, Record::Purge { upto, marker: "m".into() }, None);
            }
        }
        log.push_and_wait(Job::Barrier).unwrap();
        if round % 10 == 0 {
            most = most.max(disk_bytes(dir.path()));
        }
    }
    assert!(written > 8 * JOURNAL_BYTES_MAX, "{written}");
    assert!(most < 4 * JOURNAL_BYTES_MAX, "{most} bytes on disk at most, {written} written");
    let live: usize = log.recover().unwrap().values().map(|replica| replica.entries.len()).sum();
    assert_eq!(live as u64, GROUPS * (16 + 31));
    drop(log);
    let tables = disk_bytes(&dir.path().join("log/db/keyspaces"));
    assert!(tables < JOURNAL_BYTES_MAX, "{tables} bytes of tables for {live} live entries");
}

#[test]
fn a_failed_write_goes_through_the_hook_and_nothing_is_acknowledged_after() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    let dir = tempfile::tempdir().unwrap();
    let on_fatal = |_: &io::Error| {
        FATAL.fetch_add(1, Ordering::SeqCst);
    };
    let log = FjallLog::open(dir.path().join("log"), FjallOptions { on_fatal, ..SMALL }).unwrap();
    put(&log, A, append(0, 1)).unwrap();
    // fjall cannot write its tables any more, and refuses everything once it has noticed.
    fs::remove_dir_all(dir.path().join("log/db/keyspaces")).unwrap();
    let payload = Bytes::from(vec![7; 32 << 10]);
    let (mut next, mut failed) = (1, false);
    while !failed {
        failed = put(&log, A, Record::Append { first: next, entries: vec![payload.clone()] }).is_err();
        next += 1;
        assert!(next < 100_000, "never failed");
    }
    assert_eq!(FATAL.load(Ordering::SeqCst), 1);
    put(&log, A, Record::Vote("v".into())).unwrap_err();
    log.put_meta("m", "v".into()).unwrap_err();
    assert_eq!(FATAL.load(Ordering::SeqCst), 1);
}

#[test]
fn a_write_that_hangs_goes_through_the_hook() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    let dir = tempfile::tempdir().unwrap();
    let on_fatal = |error: &io::Error| {
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        FATAL.fetch_add(1, Ordering::SeqCst);
    };
    let options = FjallOptions { write_stall_max: Duration::from_millis(20), on_fatal, ..SMALL };
    let log = FjallLog::open(dir.path().join("log"), options).unwrap();
    let (release, hung) = mpsc::channel::<()>();
    let hang = move |_| hung.recv().unwrap();
    log.submit(A.0, A.1, append(0, 1), Some(Box::new(hang)));
    while FATAL.load(Ordering::SeqCst) == 0 {
        log.submit(A.0, A.1, Record::Committed("c".into()), None);
        thread::yield_now();
    }
    release.send(()).unwrap();
    log.recover().unwrap();
}

#[test]
fn a_torn_end_is_cut_and_damage_before_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    for n in 0..10 {
        put(&log, A, append(n, 1)).unwrap();
    }
    drop(log);
    let journal = journals(dir.path()).pop().unwrap();
    let mut whole = fs::read(&journal).unwrap();
    let end = whole.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    whole.truncate(end + 1_000); // Of the 64 MiB of zeros that fjall writes ahead, a few will do.
    let entry = |n: u64| {
        let text = format!("e{n}");
        whole.windows(text.len()).position(|window| window == text.as_bytes()).unwrap()
    };
    let reopen = |bytes: &[u8]| {
        // The directory as it was after the writes, with these bytes for its journal.
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&dir.path().join("log"), &copy.path().join("log"));
        fs::write(copy.path().join("log/db").join(journal.file_name().unwrap()), bytes).unwrap();
        FjallLog::open(copy.path().join("log"), SMALL).and_then(|log| log.recover()).map(|mut found| found.remove(&A))
    };
    assert_eq!(reopen(&whole).unwrap().unwrap().entries.len(), 10);
    // The last write did not reach the disk completely.
    for cut in [entry(9), end - 1] {
        let mut torn = whole.clone();
        torn[cut..].fill(0);
        assert_eq!(reopen(&torn).unwrap().unwrap().entries.len(), 9);
        assert_eq!(reopen(&whole[..cut]).unwrap().unwrap().entries.len(), 9);
    }
    // A byte of the fourth write changed: refused, unless it is one that nobody needs.
    let (mut refused, intact) = (0, reopen(&whole).unwrap());
    for place in entry(3) - 60..entry(4) - 60 {
        let mut rotten = whole.clone();
        rotten[place] ^= 0x40;
        match reopen(&rotten) {
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{place}: {error}");
                refused += 1;
            }
            Ok(found) => assert_eq!(found, intact, "{place}"),
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn a_lossy_log_hands_nothing_over_before_it_syncs_and_a_full_disk_is_fatal() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("orders.toml");
    let order = |disk| Orders { disk, lossy: true, ..Orders::default() }.write(&path).unwrap();
    order(Disk::Good);
    let control = Control::open(&path).unwrap();
    let on_fatal = |error: &io::Error| {
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        FATAL.fetch_add(1, Ordering::SeqCst);
    };
    let options = FjallOptions { control: Some(Arc::clone(&control)), on_fatal, ..SMALL };
    let log = FjallLog::open(dir.path().join("log"), options).unwrap();
    // What the system has been given, as it is found after a power cut.
    let survives = || {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&dir.path().join("log"), &copy.path().join("log"));
        let found = open(copy.path()).recover().unwrap().remove(&A).unwrap();
        (found.entries.len(), found.committed)
    };
    put(&log, A, append(0, 1)).unwrap();
    put(&log, A, Record::Committed("c".into())).unwrap();
    assert_eq!(survives(), (1, None), "a hint that was not synced is lost");
    put(&log, A, append(1, 1)).unwrap();
    assert_eq!(survives(), (2, Some("c".into())), "and kept with the next sync");
    order(Disk::Stalled);
    while control.disk() != Disk::Stalled {
        thread::yield_now();
    }
    let (waiting, done) = outcome();
    log.submit(A.0, A.1, append(2, 1), Some(done));
    assert_eq!(survives().0, 2);
    assert!(waiting.lock().is_none(), "not told durable");
    order(Disk::Full);
    put(&log, A, append(3, 1)).unwrap_err();
    assert!(matches!(*waiting.lock(), Some(Err(_))));
    assert_eq!((survives().0, FATAL.load(Ordering::SeqCst)), (2, 1));
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.metadata().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

#[test]
fn a_hole_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    put(&log, A, append(0, 5)).unwrap();
    let key = [b"r".as_slice(), &1_u64.to_be_bytes(), &1_u64.to_be_bytes(), &[4], &2_u64.to_be_bytes()].concat();
    log.records.remove(key).unwrap();
    let error = log.recover().unwrap_err().to_string();
    assert!(error.contains("p1 r1") && error.contains("entry 3 follows 1"), "{error}");
}

#[test]
fn a_commit_hint_alone_is_kept_but_not_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let sealed = || log.records.get(layout::SEAL_KEY).unwrap().map(|seal| seal.to_vec());
    put(&log, A, append(0, 1)).unwrap();
    let before = sealed();
    put(&log, A, Record::Committed("c".into())).unwrap();
    assert_eq!(sealed(), before, "no sync of its own");
    put(&log, A, append(1, 1)).unwrap();
    assert_ne!(sealed(), before);
    drop(log);
    assert_eq!(open(dir.path()).recover().unwrap()[&A].committed, Some("c".into()));
}
