//! A history of the size that a drill makes.

use super::{
    super::{Valid, judge},
    generate::{Settings, generate},
};
use crate::proof::history::{RunInfo, SCHEMA, read, write};
use std::{fs, io::Write as _, path::PathBuf};

fn settings() -> Settings {
    Settings { seed: 50, operations: 50_000, keys: 75, clients: 20, unknown: 0.02, stall_ns: 500_000_000 }
}

#[test]
fn fifty_thousand_operations_are_judged() {
    let mut events = generate(&settings());
    for verdict in judge("register", &events) {
        assert_eq!(verdict.valid, Valid::True, "{verdict:#?}");
    }
    // And one wrong read among them is found.
    let key = events.iter().rev().find(|event| event.f == "read").unwrap().key.clone();
    let first = events.iter().find(|event| event.f == "write" && event.key == key).unwrap().value.clone();
    events.iter_mut().rfind(|event| event.f == "read" && event.key == key).unwrap().value = first;
    let verdicts = judge("register", &events);
    let linear = verdicts.iter().find(|verdict| verdict.checker == "linear").unwrap();
    assert_eq!(linear.valid, Valid::False);
    assert!(linear.violations[0].events.len() < 20, "{linear:#?}");
}

/// With `MERIDIAN_HISTORY=DIR` the folder stays, and `meridian check DIR` says how long it takes.
#[test]
fn a_large_history_survives_its_file() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("MERIDIAN_HISTORY").map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("history.jsonl");
    let mut file = std::io::BufWriter::new(fs::File::create(&path).unwrap());
    let events = generate(&settings());
    for event in &events {
        write(&mut file, event).unwrap();
    }
    file.flush().unwrap();
    let run = RunInfo { schema: SCHEMA.to_owned(), workload: "register".to_owned(), ..RunInfo::default() };
    fs::write(folder.join("run.json"), serde_json::to_vec_pretty(&run).unwrap()).unwrap();
    let read = read(std::io::BufReader::new(fs::File::open(&path).unwrap())).unwrap();
    assert!(read == events, "{} of {} events", read.len(), events.len());
}
