//! The histories under `tests/histories`, which other tools read too.

use super::{super::judge, kinds};
use crate::proof::{
    check::infer,
    history::{Event, read},
};
use std::{fs::File, io::BufReader, path::Path};

/// File, its workload, and what is wrong with it.
const FILES: &[(&str, &str, &[&str])] = &[
    ("bounded_ok.jsonl", "levels", &[]),
    ("example.jsonl", "levels", &[]),
    ("good.jsonl", "register", &[]),
    ("lost.jsonl", "register", &["levels:lost-write", "linear:not-linearizable"]),
    ("session_bad.jsonl", "levels", &["levels:session-went-back"]),
    ("stale.jsonl", "register", &["levels:stale-read", "linear:not-linearizable"]),
];

fn load(name: &str) -> Vec<Event> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/histories").join(name);
    read(BufReader::new(File::open(path).unwrap())).unwrap()
}

#[test]
fn every_file_is_judged_as_known() {
    for (name, workload, expected) in FILES {
        let events = load(name);
        assert_eq!(infer(&events), Some(*workload), "{name}");
        assert_eq!(kinds(&judge(workload, &events)), *expected, "{name}");
    }
}

#[test]
fn a_counterexample_is_as_small_as_can_be() {
    let stale = judge("register", &load("stale.jsonl"));
    let violation = &stale.iter().find(|verdict| verdict.checker == "linear").unwrap().violations[0];
    assert_eq!(violation.events, [0, 1, 2, 3, 4, 5]);
    assert_eq!((violation.window_ns, violation.key.as_deref()), ((0, 12_000_000), Some("a")));
}
