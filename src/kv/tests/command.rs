//! The bytes of commands.

use super::*;

fn one_of_each() -> Command {
    let session = Session {
        client: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        opened: 0x1122_3344_5566_7788,
        sequence: 300,
        acknowledged_below: 7,
    };
    let write = |op| Write { session: None, op };
    Command {
        stamp: 0x0102_0304_0506_0708,
        writes: vec![
            Write { session: Some(session), op: Op::Single(put("k", "v").with_previous()) },
            write(Op::Batch(vec![
                delete("d").when(Condition::Version(5)),
                item("m", Action::Delete { must_exist: true }).when(Condition::Present).with_previous(),
                increment("i", -2).when(Condition::Value("1".into())),
                put("", "").when(Condition::Absent),
            ])),
            write(Op::DeleteRange { span: Span::all(), tokens: None }),
            write(Op::DeleteRange {
                span: span("a", Some("b")),
                tokens: Some(crate::key::Tokens { first: 1, last: 2 }),
            }),
        ],
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn golden_bytes() {
    let bytes = one_of_each().encode();
    assert_eq!(hex(&bytes), GOLDEN);
    assert_eq!(Command::decode(&bytes).unwrap(), one_of_each());
}

/// Entries like this lie in logs: the test may gain another constant, this one never changes.
const GOLDEN: &str = "\
    0100080706050403020104010102030405060708090a0b0c0d0e0f108877665544332211ac020701010001016b0176000204\
    02030001640500000000000000020203016d03040001690131feffffffffffffff0101000000000300000000030161010162\
    0101000000000000000200000000000000";

/// Fingerprints lie in session tables, and replicas of different builds must agree on them.
#[test]
fn golden_fingerprints() {
    let prints: Vec<u64> = one_of_each().writes.iter().map(|write| write.op.fingerprint()).collect();
    assert_eq!(prints, [36_219_673_375, 173_987_840_554, 18_051_330_290, 102_356_735_852]);
}

#[test]
fn unknown_formats_flags_and_tags_are_refused() {
    let good = one_of_each().encode();
    for (at, value) in [(0, 2), (0, 0), (1, 1), (11, 2)] {
        let mut bytes = good.to_vec();
        bytes[at] = value;
        assert!(Command::decode(&bytes.into()).is_err(), "byte {at}");
    }
}

#[test]
fn every_shorter_or_longer_text_is_refused() {
    let good = one_of_each().encode();
    for length in 0..good.len() {
        assert!(Command::decode(&good.slice(..length)).is_err(), "{length} bytes");
    }
    let longer = [&good[..], &[0]].concat();
    assert!(Command::decode(&longer.into()).is_err());
}

#[test]
fn decoding_shares_the_buffer() {
    let bytes =
        Command { stamp: 1, writes: vec![Write { session: None, op: Op::Single(put("key", "value")) }] }.encode();
    let decoded = Command::decode(&bytes).unwrap();
    let Op::Single(Item { key, action: Action::Put { value }, .. }) = &decoded.writes[0].op else { panic!() };
    let inside = bytes.as_ptr_range();
    assert!(inside.contains(&key.as_ptr()) && inside.contains(&value.as_ptr()));
}

#[test]
fn stored_rows_do_not_keep_the_entry_alive() {
    let mut log = Log::all();
    let command = Command {
        stamp: 1,
        writes: vec![
            Write { session: Some(Session { opened: 1, ..session(1, 1) }), op: Op::Single(put("key", vec![7; 5000])) },
            Write {
                session: Some(Session { opened: 1, ..session(1, 2) }),
                op: Op::Single(item("none", Action::Delete { must_exist: true })),
            },
            Write {
                session: Some(Session { opened: 1, ..session(1, 3) }),
                op: Op::DeleteRange { span: span("x", Some("y")), tokens: None },
            },
        ],
    };
    let bytes = command.encode();
    log.store.apply(1, &Command::decode(&bytes).unwrap());
    assert_eq!(log.store.sessions(), 1);
    assert!(bytes.is_unique(), "the store holds a slice of the entry");
}

proptest! {
    #[test]
    fn commands_round_trip(
        stamp in any::<u64>(),
        writes in prop::collection::vec(
            (prop::option::of((any::<u128>(), any::<u64>(), any::<u64>(), any::<u64>())), any_op()), 0..10),
    ) {
        let writes: Vec<Write> = writes
            .into_iter()
            .map(|(session, op)| Write {
                session: session.map(|(client, opened, sequence, acknowledged_below)| {
                    Session { client, opened, sequence, acknowledged_below }
                }),
                op,
            })
            .collect();
        let bytes_max: usize = writes.iter().map(Write::bytes_max).sum();
        let command = Command { stamp, writes };
        let bytes = command.encode();
        prop_assert!(bytes.len() <= bytes_max + 20);
        prop_assert_eq!(Command::decode(&bytes), Ok(command));
    }

    #[test]
    fn damaged_bytes_never_panic(at in any::<prop::sample::Index>(), flip in 1..=255u8, junk in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = one_of_each().encode().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let _ = Command::decode(&bytes.into());
        let _ = Command::decode(&[&[1, 0], &junk[..]].concat().into());
    }

    #[test]
    fn different_operations_have_different_fingerprints(a in any_op(), b in any_op()) {
        prop_assert_eq!(a == b, a.fingerprint() == b.fingerprint());
    }
}
