//! The log on disk: what it keeps, what it refuses, how long it gets.

pub(super) mod crash;

use super::{
    super::{
        memory::MemoryLog,
        testing::{A, B, append, outcome, records},
    },
    *,
};
use crate::control::{Disk, Orders};
use proptest::prelude::*;
use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering},
};

/// Segments of some frames each.
const TINY: SegmentOptions = SegmentOptions {
    segment_bytes: 400,
    write_stall_max: WRITE_STALL_MAX,
    on_fatal: |error| panic!("{error}"),
    control: None,
};

fn open(dir: &Path) -> SegmentLog {
    SegmentLog::open(dir.join("log"), TINY).unwrap()
}

/// Submits and waits for the outcome.
fn put(log: &SegmentLog, place: Place, record: Record) -> io::Result<()> {
    log.push_and_wait(|sender| Job::Record { place, record, done: Some(telling(sender)) })
}

/// Reads entries, and waits for them.
fn read(log: &dyn LogEngine, place: Place, indexes: Range<u64>, bytes_max: usize) -> Vec<Bytes> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let done = move |entries| drop(sender.send(entries));
    log.read(place.0, place.1, indexes, bytes_max, Box::new(done));
    receiver.recv().unwrap().unwrap()
}

/// The same record, with entries that no other record has.
fn told_apart(mut record: Record, n: usize) -> Record {
    if let Record::Append { entries, .. } = &mut record {
        entries.iter_mut().for_each(|entry| *entry = [entry.as_ref(), format!(" of {n}").as_bytes()].concat().into());
    }
    record
}

/// A log whose segment is really `device`, which must not be there to keep anything.
fn open_on_device(dir: &Path, device: &str, options: SegmentOptions) -> SegmentLog {
    let (mut files, found) = Files::open(dir).unwrap();
    files.current = fs::File::options().write(true).open(device).unwrap();
    SegmentLog::start(dir.to_owned(), options, files, found).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// The engine on disk and the one in memory agree on every answer and on everything recovered, live and reopened.
    #[test]
    fn it_is_the_memory_log_on_disk(
        script in records(), reopen_every in 1_usize..40, together in 1_usize..12, segment_bytes in 50_u64..2_000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let open = || SegmentLog::open(dir.path().join("log"), SegmentOptions { segment_bytes, ..TINY }).unwrap();
        let (mut log, model) = (open(), MemoryLog::immediate());
        let mut answers = Vec::new();
        for (n, (place, record)) in script.into_iter().enumerate() {
            if n % reopen_every == reopen_every - 1 {
                drop(log);
                log = open();
                prop_assert_eq!(log.recover().unwrap(), model.recover().unwrap());
            }
            let record = told_apart(record, n);
            let (on_disk, done) = outcome();
            log.submit(place.0, place.1, record.clone(), Some(done));
            let (in_memory, done) = outcome();
            model.submit(place.0, place.1, record, Some(done));
            answers.push((on_disk, in_memory));
            if n % together == 0 {
                prop_assert_eq!(log.recover().unwrap(), model.recover().unwrap());
                let (from, count, bytes_max) = (n as u64 % 40, 1 + n as u64 % 9, n % 30);
                prop_assert_eq!(
                    read(&log, place, from..from + count, bytes_max),
                    read(&model, place, from..from + count, bytes_max)
                );
            }
        }
        prop_assert_eq!(log.recover().unwrap(), model.recover().unwrap());
        for (on_disk, in_memory) in answers {
            let ok = |result: &Mutex<Option<io::Result<()>>>| result.lock().as_ref().map(Result::is_ok);
            prop_assert_eq!(ok(&on_disk), ok(&in_memory));
        }
        drop(log);
        prop_assert_eq!(open().recover().unwrap(), model.recover().unwrap());
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
fn meta_is_durable_and_goes_along_when_its_segment_goes() {
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
    let error = SegmentLog::open(dir.path().join("log"), TINY).unwrap_err();
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
            Err(_) => {} // Removed in the meantime.
        }
    }
    bytes
}

#[test]
fn disk_use_is_bounded_under_endless_appends_and_purges_beside_groups_that_are_cold() {
    const SEGMENT: u64 = 256 << 10;
    const ROUNDS: u64 = 400;
    let dir = tempfile::tempdir().unwrap();
    let options = SegmentOptions { segment_bytes: SEGMENT, ..TINY };
    let log = SegmentLog::open(dir.path().join("log"), options.clone()).unwrap();
    let model = MemoryLog::immediate();
    let do_put = |place: Place, record: Record| {
        model.submit(place.0, place.1, record.clone(), None);
        put(&log, place, record).unwrap();
    };
    log.put_meta("name", "value".into()).unwrap();
    let payload = Bytes::from(vec![7; 4 << 10]);
    let entries = |count| vec![payload.clone(); count];
    let cold = |n| (PartitionId(100 + n), ReplicaId(n));
    do_put(cold(99), append(0, 1));
    do_put(cold(99), Record::Tombstone);
    let (mut written, mut most) = (0, 0);
    for round in 0..ROUNDS {
        if round % 20 == 0 {
            // One more that is never heard of again; there will be 20, of 16 KiB each.
            do_put(cold(round / 20), Record::Append { first: 5, entries: entries(4) });
            do_put(cold(round / 20), Record::Vote("v".into()));
        }
        for group in 0..2 {
            let place = (PartitionId(group), ReplicaId(group));
            do_put(place, Record::Append { first: round * 8, entries: entries(8) });
            written += 8 * payload.len() as u64;
            if let Some(upto) = (round * 8).checked_sub(16) {
                do_put(place, Record::Purge { upto, marker: format!("m{upto}").into() });
            }
        }
        if round % 4 == 0 {
            most = most.max(disk_bytes(dir.path()));
        }
    }
    let live = 20 * (16 << 10) + 2 * (24 * (4 << 10));
    // A spare one, one that was begun, and one that is being copied besides.
    let bound = 3 * live + (SEGMENTS_KEPT + 3) * SEGMENT;
    assert!(written > 8 * bound, "{written} written, {bound} allowed");
    assert!(most < bound, "{most} bytes on disk at most, {bound} allowed, {live} live");
    assert_eq!(log.recover().unwrap(), model.recover().unwrap());
    drop(log);
    let log = SegmentLog::open(dir.path().join("log"), options).unwrap();
    assert_eq!(log.recover().unwrap(), model.recover().unwrap());
    assert_eq!(log.get_meta("name").unwrap(), Some("value".into()));
}

#[test]
fn what_was_written_twice_in_one_frame_is_copied_as_it_is_now() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let (release, held) = mpsc::channel::<()>();
    log.submit(B.0, B.1, append(0, 1), Some(Box::new(move |_| held.recv().unwrap())));
    for (n, record) in [append(0, 5), Record::Truncate { from: 2 }, append(2, 2)].into_iter().enumerate() {
        log.submit(A.0, A.1, told_apart(record, n), None);
    }
    release.send(()).unwrap();
    let before = log.recover().unwrap().remove(&A);
    for n in 1..100 {
        put(&log, B, append(n, 1)).unwrap();
        put(&log, B, Record::Purge { upto: n - 1, marker: "m".into() }).unwrap();
    }
    assert!(read::segments(&dir.path().join("log")).unwrap()[0] > 1, "the frame has gone");
    assert_eq!(log.recover().unwrap().remove(&A), before);
    assert_eq!(
        before.unwrap().entries.values().map(Bytes::as_ref).collect::<Vec<_>>(),
        [b"e0 of 0", b"e1 of 0", b"e2 of 2", b"e3 of 2"]
    );
}

#[test]
fn a_log_that_lives_long_does_not_grow_without_entries() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.put_meta("once", "and never again".into()).unwrap();
    for n in 0..500 {
        put(&log, A, Record::Vote(format!("v{n}").into())).unwrap();
        if n % 10 == 9 {
            log.put_meta("n", format!("{n}").into()).unwrap();
        }
        log.recover().unwrap(); // It is done with its files.
        let path = dir.path().join("log");
        let found = read::load(&path, &read::segments(&path).unwrap()).unwrap();
        assert!(found.meta.contains_key("once"), "{n}");
    }
    let segments = read::segments(&dir.path().join("log")).unwrap();
    assert!(segments.len() < 8 && segments[0] > 50, "{segments:?}");
    drop(log);
    let log = open(dir.path());
    assert_eq!(log.recover().unwrap()[&A].vote, Some("v499".into()));
    assert_eq!(log.get_meta("n").unwrap(), Some("499".into()));
    assert_eq!(log.get_meta("once").unwrap(), Some("and never again".into()));
}

/// Opens on a file that fails as `device` does, and says how often the hook ran.
fn fails_on(device: &str, fatal: &'static AtomicUsize, on_fatal: fn(&io::Error)) {
    let dir = tempfile::tempdir().unwrap();
    let log = open_on_device(dir.path(), device, SegmentOptions { on_fatal, ..TINY });
    let (first, done) = outcome();
    log.submit(A.0, A.1, append(0, 1), Some(done));
    put(&log, A, append(1, 1)).unwrap_err();
    assert!(matches!(*first.lock(), Some(Err(_))));
    assert_eq!(fatal.load(Ordering::SeqCst), 1);
    put(&log, A, Record::Vote("v".into())).unwrap_err();
    put(&log, A, Record::Committed("c".into())).unwrap_err();
    log.put_meta("m", "v".into()).unwrap_err();
    assert_eq!(fatal.load(Ordering::SeqCst), 1);
}

#[test]
fn a_full_disk_goes_through_the_hook_and_nothing_is_acknowledged_after() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    fails_on("/dev/full", &FATAL, |error| {
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        FATAL.fetch_add(1, Ordering::SeqCst);
    });
}

#[test]
fn a_sync_that_fails_goes_through_the_hook_and_nothing_is_acknowledged_after() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    // It takes every write, and knows of no sync.
    fails_on("/dev/null", &FATAL, |_| {
        FATAL.fetch_add(1, Ordering::SeqCst);
    });
}

#[test]
fn a_segment_that_cannot_be_begun_goes_through_the_hook() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    let dir = tempfile::tempdir().unwrap();
    let on_fatal = |_: &io::Error| {
        FATAL.fetch_add(1, Ordering::SeqCst);
    };
    let log = SegmentLog::open(dir.path().join("log"), SegmentOptions { on_fatal, ..TINY }).unwrap();
    put(&log, A, append(0, 1)).unwrap();
    fs::remove_dir_all(dir.path().join("log")).unwrap();
    let failed = (1..1_000).find(|n| put(&log, A, append(*n, 1)).is_err()).unwrap();
    assert!(failed > 1, "the file is still there, without its name");
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
    let options = SegmentOptions { write_stall_max: Duration::from_millis(20), on_fatal, ..TINY };
    let log = SegmentLog::open(dir.path().join("log"), options).unwrap();
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
    let options = SegmentOptions { segment_bytes: 1 << 20, ..TINY };
    let log = SegmentLog::open(dir.path().join("log"), options.clone()).unwrap();
    for n in 0..10 {
        put(&log, A, append(n, 1)).unwrap();
    }
    drop(log);
    let segment = read::path_of(&dir.path().join("log"), 1);
    let mut whole = fs::read(&segment).unwrap();
    // Where the frame begins that the log was closed with.
    let end = usize::try_from(read::load(&dir.path().join("log"), &[1]).unwrap().end).unwrap() - frame::HEAD_BYTES;
    whole.extend([0; 1_000]);
    let entry = |n: u64| {
        let text = format!("e{n}");
        whole.windows(text.len()).position(|window| window == text.as_bytes()).unwrap()
    };
    let reopen = |bytes: &[u8]| {
        // The directory as it was after the writes, with these bytes for its segment.
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&dir.path().join("log"), &copy.path().join("log"));
        fs::write(copy.path().join("log").join(segment.file_name().unwrap()), bytes).unwrap();
        let log = SegmentLog::open(copy.path().join("log"), options.clone())?;
        log.recover().map(|mut found| found.remove(&A))
    };
    assert_eq!(reopen(&whole).unwrap().unwrap().entries.len(), 10);
    // The last write did not reach the disk completely.
    for cut in [entry(9), end - 1] {
        let mut torn = whole.clone();
        torn[cut..].fill(0);
        assert_eq!(reopen(&torn).unwrap().unwrap().entries.len(), 9);
        assert_eq!(reopen(&whole[..cut]).unwrap().unwrap().entries.len(), 9);
    }
    // A byte of the fourth write changed: refused, and named.
    for place in entry(3) - 60..entry(4) - 60 {
        let mut rotten = whole.clone();
        rotten[place] ^= 0x40;
        let error = reopen(&rotten).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{place}: {error}");
        assert!(error.to_string().contains("0000000000000001.segment at offset"), "{error}");
    }
}

#[test]
fn the_log_hands_nothing_over_before_it_syncs_and_a_full_disk_is_fatal() {
    static FATAL: AtomicUsize = AtomicUsize::new(0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("orders.toml");
    let order = |disk| Orders { disk, ..Orders::default() }.write(&path).unwrap();
    order(Disk::Good);
    let control = Control::open(&path).unwrap();
    let on_fatal = |error: &io::Error| {
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        FATAL.fetch_add(1, Ordering::SeqCst);
    };
    let options = SegmentOptions { segment_bytes: 1 << 20, control: Some(Arc::clone(&control)), on_fatal, ..TINY };
    let log = SegmentLog::open(dir.path().join("log"), options).unwrap();
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
    let (mut files, found) = Files::open(dir.path()).unwrap();
    let mut bytes = Vec::new();
    frame::begin(&mut bytes);
    frame::put_record(&mut bytes, A, &append(0, 2));
    frame::put_record(&mut bytes, A, &append(3, 1));
    files.append(&mut bytes, found.next).unwrap();
    drop(files);
    let error = SegmentLog::open(dir.path(), TINY).unwrap_err().to_string();
    assert!(error.contains("p1 r1") && error.contains("entry 3 follows 1"), "{error}");
}

#[test]
fn a_commit_hint_causes_no_write_and_is_kept_when_the_log_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let written = || fs::read(read::path_of(&dir.path().join("log"), 1)).unwrap();
    put(&log, A, append(0, 1)).unwrap();
    let before = written();
    put(&log, A, Record::Committed("c".into())).unwrap();
    assert_eq!(written(), before);
    assert_eq!(log.recover().unwrap()[&A].committed, Some("c".into()));
    drop(log);
    assert_eq!(open(dir.path()).recover().unwrap()[&A].committed, Some("c".into()));
}

#[test]
fn the_log_of_an_older_build_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("log/db")).unwrap();
    let error = SegmentLog::open(dir.path().join("log"), TINY).unwrap_err().to_string();
    assert!(error.contains("older build") && error.contains("fjall") && error.contains("dump"), "{error}");
    assert_eq!(fs::read_dir(dir.path().join("log")).unwrap().count(), 1);
}

#[test]
fn another_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let path = read::path_of(&dir.path().join("log"), 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 9;
    fs::write(&path, bytes).unwrap();
    let error = SegmentLog::open(dir.path().join("log"), TINY).unwrap_err().to_string();
    assert!(error.contains("format 9 is not known"), "{error}");
}
