//! Freezing while writes go on, and that damage is found.

use super::command::hex;
use super::model::any_history;
use super::*;

/// A small state with something of everything.
fn sample() -> Log {
    let mut log = Log::new(Layout::Ordered, span("", Some("z")));
    log.write(Some(session(1, 1)), Op::Single(put("a", "1")));
    log.write(Some(session(1, 2)), Op::Single(put("a", "2").with_previous()));
    log.write(Some(session(1, 3)), Op::Single(increment("a", 5)));
    log.write(Some(session(2, 1)), Op::Batch(vec![put("b", "x"), put("c", "")]));
    log.write(Some(session(2, 2)), Op::Single(increment("b", 1)));
    log.write(Some(session(2, 3)), Op::DeleteRange { span: span("c", None), tokens: None });
    log.write(Some(session(2, 4)), Op::Single(item("none", Action::Delete { must_exist: true })));
    log
}

fn frozen(log: &mut Log, bytes_max: usize) -> Vec<Bytes> {
    log.store.freeze();
    chunks(&mut log.store, bytes_max)
}

fn bytes_of(hex: &str) -> Bytes {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn golden_bytes() {
    let chunks = frozen(&mut sample(), 1 << 20);
    let shown: Vec<String> = chunks.iter().map(|chunk| hex(chunk)).collect();
    assert_eq!(shown, GOLDEN);
}

/// Header, sessions, rows, end, as they are written now.
const GOLDEN: [&str; 4] = [
    "\
    4c000000014d4552494449414e2d4b560200000001017a010000000000000000000000000000000700000000000000030000\
    8056febc1800000000000000008080018020808080018080801080dddb0106d0505d",
    "\
    da00000002000000000000000000000000000000010000008056febc18010000008056febc1803014a2393b6080000000101\
    0000008056febc1802405bfa120800000001070100008056febc180000008056febc18013103c204441d0e000000010b0200\
    008056febc180700000000000000000000000000000000000000000000020000008056febc18010300008056febc18040166\
    7299490f000000020102010300008056febc18010300008056febc1802fd3683a00e00000011016203d19faf730500000003\
    01016301017a000488dfcb550900000010046e6f6e655c55e194",
    "\
    1b00000003000200008056febc1801610137000300008056febc18016201784a8534b4",
    "\
    0a0000000402fc9765725d4e0236eb744815",
];

#[test]
fn snapshots_of_the_first_format_are_still_read() {
    let chunks: Vec<Bytes> = GOLDEN_1.iter().map(|chunk| bytes_of(chunk)).collect();
    let restored = restore(&chunks).unwrap();
    assert_eq!(restored.digest(), sample().store.digest());
    assert_eq!((restored.epoch(), restored.sealed()), (1, None));
}

/// Snapshots like this lie on disks: this constant never changes.
const GOLDEN_1: [&str; 4] = [
    "\
    3c000000014d4552494449414e2d4b560100000001017a07000000000000000300008056febc180000000000000000808001\
    8020808080018080801080dddb012ae8fc29",
    "\
    da00000002000000000000000000000000000000010000008056febc18010000008056febc1803014a2393b6080000000101\
    0000008056febc1802405bfa120800000001070100008056febc180000008056febc18013103c204441d0e000000010b0200\
    008056febc180700000000000000000000000000000000000000000000020000008056febc18010300008056febc18040166\
    7299490f000000020102010300008056febc18010300008056febc1802fd3683a00e00000011016203d19faf730500000003\
    01016301017a000488dfcb550900000010046e6f6e6538116280",
    "\
    1b00000003000200008056febc1801610137000300008056febc1801620178a24b9f3b",
    "\
    0a0000000402fc9765725d4e02365563c323",
];

#[test]
fn a_restored_store_is_the_same_store() {
    let mut log = sample();
    let chunks = frozen(&mut log, 1);
    assert!(chunks.len() > 5, "rows and sessions went one by one");
    let restored = restore(&chunks).unwrap();
    assert_eq!(restored.digest(), log.store.digest());
    assert_eq!(rows(&restored), rows(&log.store));
    assert_eq!((restored.bytes(), restored.rows()), (log.store.bytes(), log.store.rows()));
    assert_eq!((restored.applied(), restored.last_version()), (log.store.applied(), log.store.last_version()));
    assert_eq!((restored.sessions(), restored.session_bytes()), (log.store.sessions(), log.store.session_bytes()));
    assert_eq!((restored.span(), restored.layout()), (log.store.span(), log.store.layout()));
    let mut again = Log { store: restored, ..log };
    assert_eq!(frozen(&mut again, 1), chunks);
    assert!(again.write(Some(session(2, 4)), Op::Single(item("none", Action::Delete { must_exist: true }))).replayed);
}

#[test]
fn an_empty_store_has_a_snapshot() {
    let chunks = frozen(&mut Log::new(Layout::Hashed, Span::all()), 100);
    assert_eq!(chunks.len(), 2);
    assert_eq!(restore(&chunks).unwrap().rows(), 0);
}

#[test]
fn bytes_may_be_cut_anywhere() {
    let mut log = sample();
    let whole = frozen(&mut log, 50).concat();
    for size in [1, 2, 3, 7, 64, whole.len()] {
        let mut restore = Restore::new();
        whole.chunks(size).for_each(|piece| restore.feed(piece).unwrap());
        assert_eq!(restore.finish().unwrap().digest(), log.store.digest());
    }
}

#[test]
fn chunks_stay_within_what_was_asked() {
    let mut log = Log::all();
    for n in 0..1000u32 {
        log.single(put(n.to_be_bytes().to_vec(), vec![7; 100]));
    }
    let chunks = frozen(&mut log, 4096);
    assert!(chunks.iter().all(|chunk| chunk.len() <= 4096 + 200));
    assert!(chunks.len() < 40);
}

#[test]
fn without_a_freeze_there_is_nothing_and_thawing_drops_it() {
    let mut log = sample();
    assert_eq!(log.store.freeze_next(100), None);
    log.store.freeze();
    assert!(log.store.freeze_next(100).is_some());
    log.store.thaw();
    assert_eq!(log.store.freeze_next(100), None);
    let first = frozen(&mut log, 100);
    assert_eq!(log.store.freeze_next(100), None, "the last chunk ended it");
    log.store.freeze();
    log.store.freeze_next(100);
    assert_eq!(frozen(&mut log, 100), first, "a new freeze begins from the start");
}

#[test]
fn damage_of_any_byte_is_found() {
    let whole = frozen(&mut sample(), 60).concat();
    for at in 0..whole.len() {
        for flip in [1, 2, 4, 8, 16, 32, 64, 128, 255] {
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            assert!(restore(&[damaged.into()]).is_err(), "byte {at} ^ {flip}");
        }
    }
}

#[test]
fn missing_repeated_moved_and_added_bytes_are_found() {
    let chunks = frozen(&mut sample(), 1);
    let whole = chunks.concat();
    for length in 0..whole.len() {
        assert!(restore(&[Bytes::copy_from_slice(&whole[..length])]).is_err(), "{length} bytes");
    }
    for at in 0..chunks.len() {
        let mut missing = chunks.clone();
        missing.remove(at);
        assert!(restore(&missing).is_err(), "chunk {at} is missing");
        let mut twice = chunks.clone();
        twice.insert(at, chunks[at].clone());
        assert!(restore(&twice).is_err(), "chunk {at} comes twice");
        let mut moved = chunks.clone();
        moved.swap(at, (at + 1) % chunks.len());
        assert!(restore(&moved).is_err(), "chunk {at} has moved");
    }
    assert!(restore(&[whole.clone().into(), Bytes::from_static(&[0])]).is_err());
    assert!(restore(&[whole.into(), Bytes::from_static(&[1, 0, 0, 0, 2, 0, 0, 0, 0])]).is_err());
}

#[test]
fn an_error_names_the_frame() {
    let chunks = frozen(&mut sample(), 1);
    let mut damaged = chunks.concat();
    let at = chunks[0].len() + chunks[1].len();
    damaged[at + 6] ^= 1;
    let error = restore(&[damaged.into()]).unwrap_err();
    assert_eq!(error.frame_at, at as u64);
    assert!(error.to_string().contains("checksum"), "{error}");
}

#[test]
fn rows_written_after_the_freeze_take_bounded_steps() {
    let mut log = Log::all();
    log.store.freeze();
    let write = |n: u64| Write { session: None, op: Op::Single(put(n.to_be_bytes().to_vec(), "")) };
    log.command((0..FREEZE_LOOKED_MAX as u64 + 10).map(write).collect());
    let chunks = chunks(&mut log.store, 1 << 20);
    assert_eq!(chunks.len(), 4, "header, two frames of nothing, end");
    assert_eq!(restore(&chunks).unwrap().rows(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_freeze_is_the_state_at_its_moment_whatever_is_applied_meanwhile(
        (layout, span) in any_partition(),
        before in any_history(60),
        meanwhile in prop::collection::vec(prop::collection::vec((prop::option::of(1..4u128), any_op()), 0..4), 0..60),
        bytes_max in 1..200usize,
    ) {
        let mut log = Log::new(layout, span);
        for write in before {
            log.command(vec![write]);
        }
        log.store.freeze();
        let still = { // The same state, with nothing applied meanwhile.
            let chunks = chunks(&mut log.store, 1 << 20);
            restore(&chunks).unwrap()
        };
        let (digest, at_freeze) = (log.store.digest(), rows(&log.store));
        prop_assert_eq!(rows(&still), at_freeze.clone());
        log.store.freeze();
        let (mut taken, mut sequence) = (Vec::new(), 1000);
        for ops in meanwhile {
            sequence += 1;
            let writes = ops
                .into_iter()
                .map(|(client, op)| Write { session: client.map(|client| session(client, sequence)), op })
                .collect();
            log.command(writes);
            taken.extend(log.store.freeze_next(bytes_max));
        }
        // What is left, if the writes were over first; nothing, if the freeze was.
        taken.extend(chunks(&mut log.store, bytes_max));
        let restored = restore(&taken);
        prop_assert!(restored.is_ok(), "{:?}", restored.err());
        let restored = restored.unwrap();
        prop_assert_eq!(rows(&restored), at_freeze);
        prop_assert_eq!(restored.digest(), digest);
        prop_assert_eq!(restored.applied(), still.applied());
        // Nothing of the freeze is left behind in the store that went on.
        let (digest, after) = (log.store.digest(), rows(&log.store));
        log.store.freeze();
        let again = restore(&chunks(&mut log.store, 1 << 20)).unwrap();
        prop_assert_eq!((again.digest(), rows(&again)), (digest, after));
    }

    #[test]
    fn random_damage_never_panics(at in any::<prop::sample::Index>(), junk in prop::collection::vec(any::<u8>(), 1..40)) {
        let mut whole = frozen(&mut sample(), 60).concat();
        let at = at.index(whole.len());
        let end = (at + junk.len()).min(whole.len());
        let before = whole[at..end].to_vec();
        whole.splice(at..end, junk.clone());
        prop_assert_eq!(restore(&[whole.into()]).is_ok(), before == junk);
    }
}
