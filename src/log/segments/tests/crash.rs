//! A log that dies at every byte it writes, and between any two operations on files.

use super::*;
use std::{fs::File, os::unix::fs::FileExt as _};

/// What was done to the files, in order, if somebody wants to know.
#[derive(Clone)]
pub(in super::super) struct Trace {
    pub(in super::super) ops: Option<Arc<Mutex<Vec<Op>>>>,
}

#[derive(Clone, Debug)]
pub(in super::super) enum Op {
    Write {
        path: PathBuf,
        offset: u64,
        bytes: Vec<u8>,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    /// So many records have been acknowledged.
    Acknowledged(usize),
}

impl Trace {
    pub(in super::super) fn write(&self, path: &Path, offset: u64, bytes: &[u8]) {
        self.note(|| Op::Write { path: path.to_owned(), offset, bytes: bytes.to_vec() });
    }

    pub(in super::super) fn rename(&self, from: &Path, to: &Path) {
        self.note(|| Op::Rename { from: from.to_owned(), to: to.to_owned() });
    }

    fn note(&self, op: impl FnOnce() -> Op) {
        if let Some(ops) = &self.ops {
            ops.lock().push(op());
        }
    }
}

/// Records of a group that is written to all the time, and of some that are hardly ever.
fn script(rounds: u64) -> Vec<(Place, Record)> {
    let cold = |n: u64| (PartitionId(7), ReplicaId(n));
    let mut records = vec![
        (cold(1), append(0, 3)),
        (cold(2), append(5, 1)),
        (cold(2), Record::Tombstone),
        (cold(1), Record::Vote("cold".into())),
        (cold(3), Record::Purge { upto: 8, marker: "m8".into() }),
        (cold(3), append(9, 2)),
        (cold(1), Record::Truncate { from: 1 }),
        (cold(1), append(1, 1)),
    ];
    for round in 0..rounds {
        records.push((A, append(round * 2, 2)));
        records.push((A, Record::Committed(format!("c{round}").into())));
        match round % 8 {
            1 => records.push((A, Record::Vote(format!("v{round}").into()))),
            4 => records.push((A, Record::Purge { upto: round * 2 - 4, marker: format!("m{round}").into() })),
            5 => records.push((B, append(round / 8, 1))),
            6 => {
                records.push((A, Record::Truncate { from: round * 2 }));
                records.push((A, append(round * 2, 2)));
            }
            _ => {}
        }
    }
    records.into_iter().enumerate().map(|(n, (place, record))| (place, told_apart(record, n))).collect()
}

type Everything = BTreeMap<Place, Recovered>;

/// Commit hints need not be there.
fn without_hints(mut found: Everything) -> Everything {
    found.values_mut().for_each(|found| found.committed = None);
    found.retain(|_, found| *found != Recovered::default());
    found
}

/// Runs the script on a log of tiny segments. What was done, and what should be found after each record.
fn traced(dir: &Path, rounds: u64) -> (Vec<Op>, Vec<Everything>) {
    let model = MemoryLog::immediate();
    let (mut files, found) = Files::open(dir).unwrap();
    let trace = Trace { ops: Some(Arc::default()) };
    files.trace = trace.clone();
    let log = SegmentLog::start(dir.to_owned(), TINY, files, found).unwrap();
    let mut states = vec![Everything::new()];
    for (n, (place, record)) in script(rounds).into_iter().enumerate() {
        model.submit(place.0, place.1, record.clone(), None);
        states.push(without_hints(model.recover().unwrap()));
        put(&log, place, record).unwrap();
        trace.note(|| Op::Acknowledged(n + 1));
    }
    drop(log);
    let ops = trace.ops.as_ref().unwrap().lock().clone();
    (ops, states)
}

fn read_only(dir: &Path) -> io::Result<Everything> {
    let found = read::load(dir, &read::segments(dir)?)?;
    Ok(without_hints(writer::all_found(&found)))
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    open_file(path).write_all_at(bytes, offset).unwrap();
}

/// Makes `bytes` the content. Not by `fs::write`: a file that is cut to nothing goes to the disk when it is closed.
fn set(path: &Path, bytes: &[u8]) {
    let file = open_file(path);
    file.write_all_at(bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

fn open_file(path: &Path) -> File {
    File::options().create(true).truncate(false).write(true).open(path).unwrap()
}

/// The directory after a new log was made.
fn fresh(written: &Path) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(written, dir.path());
    let path = dir.path().to_owned();
    (dir, path)
}

#[test]
fn a_crash_at_any_byte_loses_nothing_that_was_acknowledged() {
    let (start, written) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    drop(Files::open(written.path()).unwrap());
    copy_dir(written.path(), start.path());
    let (ops, states) = traced(written.path(), 40);
    let (_replay, dir) = fresh(start.path());
    let here = |path: &Path| dir.join(path.file_name().unwrap());
    let (mut acknowledged, mut crashes, mut recycled) = (0, 0, 0);
    for op in &ops {
        match op {
            Op::Acknowledged(count) => acknowledged = *count,
            Op::Rename { from, to } => {
                recycled += usize::from(to.ends_with("spare"));
                fs::rename(here(from), here(to)).unwrap();
            }
            Op::Write { path, offset, bytes } => {
                let (bytes_before, before) = (fs::read(here(path)).unwrap_or_default(), read_only(&dir).unwrap());
                write_at(&here(path), *offset, bytes);
                let after = read_only(&dir).unwrap();
                for (cut, zeros) in (0..bytes.len()).flat_map(|cut| [(cut, false), (cut, true)]) {
                    set(&here(path), &bytes_before);
                    write_at(&here(path), *offset, &bytes[..cut]);
                    if zeros {
                        write_at(&here(path), *offset + cut as u64, &vec![0; bytes.len() - cut]);
                    }
                    let found = read_only(&dir).unwrap_or_else(|error| panic!("{path:?} {offset}+{cut}: {error}"));
                    // Zeros at the end of what is written may be what belongs there.
                    let whole = zeros && bytes[cut..].iter().all(|byte| *byte == 0);
                    assert!(found == before || whole && found == after, "{path:?} {offset}+{cut} {zeros}: {found:?}");
                    crashes += 1;
                }
                write_at(&here(path), *offset, bytes);
            }
        }
        let found = read_only(&dir).unwrap();
        // What was acknowledged, or with the record under way; hints between them need no write.
        assert!(states[acknowledged..].iter().take(4).any(|state| *state == found), "after {op:?}: {found:?}");
    }
    assert_eq!(acknowledged + 1, states.len());
    assert_eq!(read_only(&dir).unwrap(), *states.last().unwrap());
    assert!(crashes > 10_000 && recycled > 10, "{crashes} crashes, {recycled} segments recycled");
}

#[test]
fn a_log_that_died_between_any_two_operations_goes_on() {
    let (start, written) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    drop(Files::open(written.path()).unwrap());
    copy_dir(written.path(), start.path());
    let (ops, _) = traced(written.path(), 16);
    let (_replay, dir) = fresh(start.path());
    let here = |path: &Path| dir.join(path.file_name().unwrap());
    for op in &ops {
        let torn = match op {
            Op::Acknowledged(_) => continue,
            Op::Rename { from, to } => {
                fs::rename(here(from), here(to)).unwrap();
                None
            }
            Op::Write { path, offset, bytes } => {
                let before = fs::read(here(path)).unwrap_or_default();
                write_at(&here(path), *offset, &bytes[..bytes.len() - 1]);
                Some((here(path), before, *offset, bytes))
            }
        };
        let (_copy, copy) = fresh(&dir);
        let expected = read_only(&copy).unwrap();
        // A second life, which dies without a word, and a third one.
        let before = expected.get(&B).map_or(0, |found| found.entries.len() as u64);
        let (mut files, found) = Files::open(&copy).unwrap();
        files.trace = Trace { ops: Some(Arc::default()) };
        let second = SegmentLog::start(copy.clone(), TINY, files, found).unwrap();
        put(&second, B, append(before, 1)).unwrap();
        second.recover().unwrap(); // It is done with its files.
        let (_dead, dead) = fresh(&copy);
        let mut found = read_only(&dead).unwrap();
        let entries = &mut found.get_mut(&B).unwrap().entries;
        assert_eq!(entries.remove(&before), Some(format!("e{before}").into()));
        found.retain(|_, found| *found != Recovered::default());
        assert_eq!(found, expected, "{op:?}");
        let third = SegmentLog::open(&dead, TINY).unwrap();
        for n in 1..4 {
            put(&third, B, append(before + n, 1)).unwrap();
        }
        drop(third);
        assert_eq!(read_only(&dead).unwrap()[&B].entries.len() as u64, before + 4, "{op:?}");
        if let Some((path, before, offset, bytes)) = torn {
            set(&path, &before);
            write_at(&path, offset, bytes);
        }
    }
}

#[test]
fn a_cut_or_zeroed_end_leaves_what_was_acknowledged_up_to_some_moment() {
    let written = tempfile::tempdir().unwrap();
    let (_, states) = traced(written.path(), 20);
    let last = path_of_last(written.path());
    let whole = fs::read(&last).unwrap();
    for cut in frame::HEAD_BYTES..whole.len() {
        let mut zeroed = whole.clone();
        zeroed[cut..].fill(0);
        for bytes in [&whole[..cut], &zeroed] {
            set(&last, bytes);
            let found = read_only(written.path()).unwrap();
            assert!(states.contains(&found), "{cut}: {found:?}");
        }
    }
}

fn path_of_last(dir: &Path) -> PathBuf {
    read::path_of(dir, *read::segments(dir).unwrap().last().unwrap())
}

#[test]
fn every_changed_bit_of_what_was_synced_is_found() {
    let written = tempfile::tempdir().unwrap();
    let (_, states) = traced(written.path(), 20);
    let dir = written.path();
    let segments = read::segments(dir).unwrap();
    let end = usize::try_from(read::load(dir, &segments).unwrap().end).unwrap();
    let mut refused = 0;
    for segment in &segments {
        let path = read::path_of(dir, *segment);
        let whole = fs::read(&path).unwrap();
        // Behind the end of a segment there may be bytes of its earlier life.
        let last = *segment == *segments.last().unwrap();
        for place in 0..if last { end } else { frames_end(&whole) } {
            let mut rotten = whole.clone();
            rotten[place] ^= 1 << (place % 8);
            set(&path, &rotten);
            match read_only(dir) {
                Ok(found) => {
                    // The frame that a log ends with when it is closed holds nothing itself, but for hints.
                    assert!(last && place >= frames_end_before(&whole, end), "{path:?} {place}");
                    assert_eq!(found, *states.last().unwrap());
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
                    assert!(error.to_string().contains(path.file_name().unwrap().to_str().unwrap()), "{error}");
                    refused += 1;
                }
            }
        }
        set(&path, &whole);
    }
    assert!(segments.len() > 2 && refused > 1_000, "{refused} in {segments:?}");
}

/// Where each frame of a segment begins, and where the last one ends.
fn borders(bytes: &[u8]) -> Vec<usize> {
    let head = frame::SegmentHead::decode(bytes).unwrap();
    let (mut borders, mut number) = (vec![frame::HEAD_BYTES], head.first);
    loop {
        let here = *borders.last().unwrap();
        let found = frame::FrameHead::decode(head.id, &bytes[here..]).filter(|found| found.number == number);
        let Some(found) = found else { return borders };
        borders.push(here + frame::HEAD_BYTES + usize::try_from(found.len).unwrap());
        number += 1;
    }
}

fn frames_end(bytes: &[u8]) -> usize {
    *borders(bytes).last().unwrap()
}

fn frames_end_before(bytes: &[u8], end: usize) -> usize {
    *borders(&bytes[..end]).iter().nth_back(1).unwrap()
}

#[test]
fn a_missing_segment_is_named() {
    let written = tempfile::tempdir().unwrap();
    traced(written.path(), 20);
    let segments = read::segments(written.path()).unwrap();
    for segment in &segments {
        let (_copy, copy) = fresh(written.path());
        let gone = read::path_of(&copy, *segment);
        fs::remove_file(&gone).unwrap();
        let error = SegmentLog::open(&copy, TINY).unwrap_err().to_string();
        let name = gone.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(name) && error.contains("missing"), "{error}");
    }
    let (_copy, copy) = fresh(written.path());
    segments.iter().for_each(|segment| fs::remove_file(read::path_of(&copy, *segment)).unwrap());
    let error = SegmentLog::open(&copy, TINY).unwrap_err().to_string();
    assert!(error.contains("its segments are missing"), "{error}");
}
