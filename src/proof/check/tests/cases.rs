//! One small history per kind of violation, beside the nearest good one.

use super::{super::judge, history, kinds};

/// What it shows, workload, the history, what is found.
type Case = (&'static str, &'static str, &'static [&'static str], &'static [&'static str]);

fn run(cases: &[Case]) {
    for (name, workload, lines, expected) in cases {
        let verdicts = judge(workload, &history(lines));
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(kinds(&verdicts), expected, "{name}: {verdicts:#?}");
    }
}

#[test]
fn registers() {
    run(&[
        (
            "an unknown write takes effect late",
            "register",
            &["0 0..5 write a 1", "1 6..9? write a 2", "2 20..21 read a null -> 1", "2 30..31 read a null -> 2"],
            &[],
        ),
        (
            "an unknown write takes effect, and is not undone",
            "register",
            &["0 0..5 write a 1", "1 6..9? write a 2", "2 20..21 read a null -> 2", "2 30..31 read a null -> 1"],
            &["linear:not-linearizable", "levels:stale-read"],
        ),
        (
            "an operation that never completes may have happened",
            "register",
            &["0 0..5 write a 1", "1 6..? delete a null", "2 20..21 read a null -> null"],
            &[],
        ),
        (
            "a refused write is not there",
            "register",
            &["0 0..5 write a 1", "1 6..9! write a 2", "2 20..21 read a null -> 1"],
            &[],
        ),
        (
            "a refused write is seen",
            "register",
            &["0 0..5 write a 1", "1 6..9! write a 2", "2 20..21 read a null -> 2"],
            &["linear:not-linearizable", "levels:aborted-read"],
        ),
        (
            "equal times are concurrent",
            "register",
            &["0 0..5 write a 1", "1 5..6 read a null -> null", "2 6..7 read a null -> 1"],
            &[],
        ),
        (
            "a cas that did not match is a read",
            "register",
            &["0 0..5 write a 1", "1 6..9! cas a [7,8] -> 1 mismatch", "1 10..11 read a null -> 1"],
            &[],
        ),
        (
            "a cas that did not match found what is long gone",
            "register",
            &["0 0..5 write a 1", "0 6..7 write a 2", "1 8..9! cas a [7,8] -> 1 mismatch", "1 10..11 read a null -> 2"],
            &["linear:not-linearizable"],
        ),
        (
            "two win the same cas",
            "register",
            &["0 0..5 write a 1", "1 6..9 cas a [1,2]", "2 6..9 cas a [1,3]", "1 10..11 read a null -> 3"],
            &["linear:not-linearizable"],
        ),
        (
            "nothing was read",
            "register",
            &["0 0..5 write a 1"],
            &["linear:?nothing-to-judge", "levels:?nothing-to-judge"],
        ),
        (
            "a deleted value comes back",
            "register",
            &["0 0..5 write a 1", "0 6..7 delete a null", "1 8..9 read a null -> 1"],
            &["linear:not-linearizable", "levels:resurrected"],
        ),
        (
            "two strong reads go back while a write is open",
            "register",
            &["0 0..50 write a 1", "1 1..2 read a null -> 1 lease", "2 3..4 read a null -> null"],
            &["linear:not-linearizable", "levels:lost-write"],
        ),
    ]);
}

#[test]
fn levels() {
    run(&[
        (
            "a value from nowhere",
            "levels",
            &["0 0..5 write a 1", "1 6..7 read a null -> 9 eventual"],
            &["levels:phantom-read"],
        ),
        (
            "a value from the future",
            "levels",
            &["0 8..9 write a 1", "1 6..7 read a null -> 1 eventual"],
            &["levels:future-read"],
        ),
        (
            "as old as the bound allows",
            "levels",
            &["0 0..5 write a 1", "0 6..10 write a 2", "1 110..111 read a null -> 1 bounded=100"],
            &[],
        ),
        (
            "older than the bound allows",
            "levels",
            &["0 0..5 write a 1", "0 6..10 write a 2", "1 111..112 read a null -> 1 bounded=100"],
            &["levels:stale-beyond-bound"],
        ),
        (
            "nothing, later than the bound allows",
            "levels",
            &["0 0..5 write a 1", "1 111..112 read a null -> null bounded=100"],
            &["levels:stale-beyond-bound"],
        ),
        (
            "nothing, because of a delete that may have happened",
            "levels",
            &["0 0..5 write a 1", "2 6..7? delete a null", "1 111..112 read a null -> null bounded=100"],
            &[],
        ),
        (
            "nothing, because of a delete that came before",
            "levels",
            &["0 0..1 delete a null", "0 2..5 write a 1", "1 111..112 read a null -> null bounded=100"],
            &["levels:stale-beyond-bound"],
        ),
        (
            "older than the answer says",
            "levels",
            &["0 0..5 write a 1", "0 6..10 write a 2", "1 31..32 read a null -> 1 eventual lag=20"],
            &["levels:stale-beyond-bound"],
        ),
        (
            "as old as it likes",
            "levels",
            &["0 0..5 write a 1", "0 6..10 write a 2", "1 9000..9001 read a null -> 1 eventual"],
            &[],
        ),
        (
            "weaker than asked for, and says so",
            "levels",
            &[
                "0 0..5 write a 1",
                "0 6..10 write a 2",
                "1 20..21 read a null -> 1 degraded",
                "1 22..23 read a null -> 2",
            ],
            &[],
        ),
        (
            "a session reads its own delete",
            "levels",
            &[
                "0 0..5 write a 1 #s",
                "0 6..7 delete a null #s",
                "0 8..9 read a null -> 1 session #s",
                "1 10..11 read a null -> null",
            ],
            &["levels:session-went-back"],
        ),
        (
            "a session goes back to nothing",
            "levels",
            &["0 0..5 write a 1", "1 6..7 read a null -> 1 session #s", "1 8..9 read a null -> null session #s"],
            &["levels:session-went-back"],
        ),
        (
            "another session does not know",
            "levels",
            &["0 0..5 write a 1 #s", "1 8..9 read a null -> null session #t"],
            &[],
        ),
        (
            "a session goes back in the log of a partition",
            "levels",
            &[
                "0 0..5 write a 1 #s part=3 log=9",
                "0 6..7 read b null -> null session #s part=3 log=8",
                "0 8..9 read b null -> null session #s part=4 log=8",
            ],
            &["levels:session-went-back"],
        ),
        (
            "concurrent writes whose versions tell them apart",
            "levels",
            &["0 0..5 write a 1 v=7", "1 0..5 write a 2 v=8", "2 20..21 read a null -> 1 v=7 bounded=1"],
            &["levels:stale-beyond-bound"],
        ),
        (
            "a version goes back",
            "levels",
            &["0 0..5 write a 1 v=7", "1 6..7 write a 2 v=7", "2 8..9 read a null -> 2 eventual"],
            &["levels:version-of-two-values", "levels:version-went-back"],
        ),
        (
            "a value under another version",
            "levels",
            &["0 0..5 write a 1 v=7", "1 0..5 write a 2 v=8", "2 8..9 read a null -> 2 v=7 eventual"],
            &["levels:version-of-two-values"],
        ),
    ]);
}

#[test]
fn counters() {
    run(&[
        (
            "an unknown increment may count",
            "counter",
            &[
                "0 0..5 incr n 1 -> 1",
                "1 6..9? incr n 1",
                "0 10..11 incr n 1 -> 3",
                "2 12..13 read n null -> \"3\" final",
            ],
            &[],
        ),
        (
            "an increment is lost",
            "counter",
            &["0 0..5 incr n 1 -> 1", "0 6..9 incr n 1 -> 2", "2 12..13 read n null -> \"1\" final"],
            &["counter:lost-increment", "counter:went-back", "durable:lost-increment", "linear:not-linearizable"],
        ),
        (
            "an increment is applied twice",
            "counter",
            &["0 0..5 incr n 1 -> 1", "0 6..9 incr n 1 -> 3", "2 12..13 read n null -> \"3\""],
            &["counter:applied-twice", "linear:not-linearizable"],
        ),
        (
            "two get the same number",
            "counter",
            &["0 0..5 incr n 1 -> 1", "1 0..5 incr n 1 -> 1", "2 12..13 read n null -> \"2\""],
            &["counter:lost-increment", "linear:not-linearizable"],
        ),
        (
            "a weak read may be old, a session's may not go back",
            "counter",
            &[
                "0 0..5 incr n 1 -> 1 #s",
                "1 6..7 read n null -> null eventual",
                "0 8..9 read n null -> null session #s",
            ],
            &["counter:session-went-back"],
        ),
        (
            "an unknown increment counts once",
            "counter",
            &["0 0..5? incr n 1", "1 6..9 incr n 1 -> 2", "1 10..11 read n null -> 3"],
            &["counter:applied-twice", "linear:not-linearizable"],
        ),
    ]);
}

#[test]
fn rows() {
    const RANGE: &str = "{\"from\":\"a\",\"to\":\"n\"}";
    let scan = |answer: &str| format!("9 20..30 scan . {RANGE} -> {answer}");
    let written =
        ["0 0..5 write b 1", "1 0..5 write c 2", "2 0..5 write z 3", "3 6..7! write f 4", "4 50..51 write h 5"];
    let judged = |lines: &[&str], answer: &str| {
        let scan = scan(answer);
        let lines: Vec<&str> = written.iter().chain(lines).copied().chain([scan.as_str()]).collect();
        kinds(&judge("rows", &history(&lines)))
    };
    let none: [&str; 0] = [];
    assert_eq!(judged(&[], r#"{"kvs":[["b",1],["c",2]],"more":false}"#), none);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1]],"more":true}"#), none);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1]],"more":false}"#), ["rows:missing-row"]);
    assert_eq!(judged(&[], r#"{"kvs":[["c",2]],"more":true}"#), ["rows:missing-row"]);
    assert_eq!(judged(&[], r#"{"kvs":[["c",2],["b",1]]}"#), ["rows:out-of-order"]);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1],["b",1],["c",2]]}"#), ["rows:duplicate-row"]);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1],["c",2],["z",3]]}"#), ["rows:out-of-range"]);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1],["c",2],["e",9]]}"#), ["rows:phantom-row"]);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1],["c",2],["f",4]]}"#), ["rows:aborted-row"]);
    assert_eq!(judged(&[], r#"{"kvs":[["b",1],["c",2],["h",5]]}"#), ["rows:future-row"]);
    let deleted = ["5 10..11 delete b null"];
    assert_eq!(judged(&deleted, r#"{"kvs":[["c",2]]}"#), none);
    assert_eq!(judged(&deleted, r#"{"kvs":[["b",1],["c",2]]}"#), ["rows:resurrected-row"]);
    let deleting = ["5 25..40 delete b null"];
    assert_eq!(judged(&deleting, r#"{"kvs":[["c",2]]}"#), none);
    assert_eq!(judged(&deleting, r#"{"kvs":[["b",1],["c",2]]}"#), none);
}

#[test]
fn rows_in_other_ways() {
    run(&[
        (
            "backwards, with a limit",
            "rows",
            &[
                "0 0..5 write b 1",
                "1 0..5 write c 2",
                "2 6..7 scan . {\"limit\":1,\"reverse\":true} -> {\"kvs\":[[\"c\",2]]}",
                "2 8..9 scan . {\"limit\":1} -> {\"kvs\":[[\"c\",2],[\"b\",1]]}",
            ],
            &["rows:out-of-order", "rows:over-limit"],
        ),
        (
            "a bounded scan",
            "rows",
            &[
                "0 0..5 write b 1",
                "2 50..51 scan . {} -> {\"kvs\":[]} bounded=100",
                "2 150..151 scan . {} -> {\"kvs\":[]} bounded=100",
            ],
            &["rows:stale-beyond-bound"],
        ),
        (
            "a scan older than its stalest answer says",
            "rows",
            &["0 0..5 write b 1", "2 50..51 scan . {} -> {\"kvs\":[]} eventual lag=20"],
            &["rows:stale-beyond-bound"],
        ),
        ("an eventual scan", "rows", &["0 0..5 write b 1", "2 50..51 scan . {} -> {\"kvs\":[]} eventual"], &[]),
        (
            "lost in the end",
            "rows",
            &["0 0..5 write b 1", "2 50..51 scan . {} -> {\"kvs\":[]} final"],
            &["durable:missing-row", "rows:missing-row"],
        ),
        (
            "keys that are no text are ordered by their bytes",
            "rows",
            &[
                "0 0..5 write b64:/w== 1",
                "1 0..5 write z 2",
                "2 6..7 scan . {} -> {\"kvs\":[[\"z\",2],[\"b64:/w==\",1]]}",
            ],
            &[],
        ),
    ]);
}

#[test]
fn banks() {
    const LOAD: [&str; 2] = ["0 0..1 write a 10 load", "0 2..3 write b 10 load"];
    let judged = |lines: &[&str]| {
        let lines: Vec<&str> = LOAD.iter().chain(lines).copied().collect();
        kinds(&judge("bank", &history(&lines)))
    };
    let batch = "1 5..8 batch . [[\"r\",\"a\",10],[\"r\",\"b\",10],[\"w\",\"a\",7],[\"w\",\"b\",13]]";
    let none: [&str; 0] = [];
    assert_eq!(judged(&[batch, "2 6..7 scan . {} -> {\"kvs\":[[\"a\",10],[\"b\",10]]}"]), none);
    assert_eq!(judged(&[batch, "2 9..10 scan . {} -> {\"kvs\":[[\"a\",7],[\"b\",13]]}"]), none);
    let half = "2 9..10 scan . {} -> {\"kvs\":[[\"a\",7],[\"b\",10]]} eventual";
    assert_eq!(judged(&[batch, half]), ["bank:broken-sum"]);
    let old = "2 9..10 scan . {} -> {\"kvs\":[[\"a\",10],[\"b\",10]]}";
    assert_eq!(judged(&[batch, old]), ["bank:not-linearizable"]);
    assert_eq!(judged(&[batch, "2 9..10 scan . {} -> {\"kvs\":[[\"a\",7]]}"]), ["bank:missing-row"]);
    let unique = "2 9..10 scan . {} -> {\"kvs\":[[\"a\",\"9#x\"],[\"b\",\"12#y\"]]} eventual";
    assert_eq!(judged(&[batch, unique]), ["bank:broken-sum"]);
    assert_eq!(judged(&[batch]), ["bank:?nothing-to-judge"]);
    let pages = "2 9..10 scan . {} -> {\"kvs\":[[\"a\",7],[\"b\",10]],\"pages\":[{},{}]}";
    assert_eq!(judged(&[batch, pages]), ["bank:?nothing-to-judge"]);
}

#[test]
fn durability() {
    run(&[
        (
            "an acknowledged write is gone",
            "levels",
            &["0 0..5 write a 1", "1 6..7 read a null -> 1 eventual", "1 60..61 read a null -> null final"],
            &["durable:lost-write", "levels:lost-write", "linear:not-linearizable"],
        ),
        (
            "an unknown write may be there or not",
            "register",
            &["0 0..5 write a 1", "1 6..7? write a 2", "2 60..61 read a null -> 2 final"],
            &[],
        ),
        (
            "a deleted row is back",
            "register",
            &["0 0..5 write a 1", "0 6..7 delete a null", "2 60..61 read a null -> 1 final"],
            &["durable:resurrected", "levels:resurrected", "linear:not-linearizable"],
        ),
        (
            "only a weak read looked",
            "levels",
            &["0 0..5 write a 1", "2 60..61 read a null -> 1 final eventual"],
            &["durable:?not-looked-at", "durable:?nothing-to-judge"],
        ),
        (
            "nobody looked",
            "register",
            &["0 0..5 write a 1", "0 6..7 write b 2", "2 60..61 read a null -> 1 final"],
            &["durable:?not-looked-at"],
        ),
    ]);
}

#[test]
fn the_form_of_a_history() {
    run(&[
        ("good", "", &["0 0..5 write a 1"], &[]),
        (
            "goes on after an unknown outcome",
            "",
            &["0 0..5? write a 1", "0 6..7 read a null -> 1"],
            &["format:not-well-formed"],
        ),
        ("does two things at once", "", &["0 0..5 write a 1", "0 3..4 read a null -> 1"], &["format:not-well-formed"]),
        ("reads no key", "", &["0 3..4 read . null -> 1"], &["format:no-key"]),
        ("nothing at all", "", &[], &["format:?nothing-to-judge"]),
    ]);
    let mut events = history(&["0 0..5! write a 1"]);
    events[1].error.as_mut().unwrap().definite = false;
    assert_eq!(kinds(&judge("", &events)), ["format:fail-not-definite"]);
}
