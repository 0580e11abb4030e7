//! A history of the size that a drill makes.

use super::{
    super::{Valid, judge},
    generate::{Settings, generate},
};
use crate::proof::history::{RunInfo, SCHEMA, write};
use std::{fs, io::Write as _};

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

/// `cargo test writes_a_large_history -- --ignored`, then `meridian check` on the folder says how long it takes.
#[test]
#[ignore = "only to measure `meridian check`"]
fn writes_a_large_history() {
    let folder = std::env::temp_dir().join("meridian-history-50000");
    fs::create_dir_all(&folder).unwrap();
    let mut file = std::io::BufWriter::new(fs::File::create(folder.join("history.jsonl")).unwrap());
    for event in generate(&settings()) {
        write(&mut file, &event).unwrap();
    }
    file.flush().unwrap();
    let run = RunInfo { schema: SCHEMA.to_owned(), workload: "register".to_owned(), ..RunInfo::default() };
    fs::write(folder.join("run.json"), serde_json::to_vec_pretty(&run).unwrap()).unwrap();
    println!("{}", folder.display());
}
