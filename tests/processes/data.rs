//! A file of real-looking, skewed keys, in and out through the command line.

use crate::fleet::Fleet;
use std::{collections::BTreeMap, fs};

const ROWS: u32 = 20_000;

/// Names as packages have them: most begin with a few prefixes, some differ late, some hold bytes above ASCII.
fn rows() -> BTreeMap<String, String> {
    const PREFIXES: [&str; 6] = ["python3-", "lib", "python3", "golang-github-", "é-", "r-cran-"];
    let name = |n: u32| {
        let mixed = n.wrapping_mul(2_654_435_761);
        // Squaring makes the first prefixes by far the most common.
        let skew = (mixed >> 16) as usize % 36;
        let prefix = PREFIXES[5 - skew.isqrt()];
        format!("{prefix}{:x}-{n}", mixed % 4_099)
    };
    (0..ROWS).map(|n| (name(n), format!("What \\ {n} is good for: \"{}\"", n % 7))).collect()
}

fn tsv<'a>(rows: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    rows.map(|(key, value)| format!("{key}\t{}\n", value.replace('\\', "\\\\"))).collect()
}

#[tokio::test]
async fn a_prefix_of_skewed_keys_is_what_grep_finds_at_every_level_and_a_dump_loads_again() {
    const PREFIX: &str = "python3-";
    let fleet = Fleet::start(5, &[]).await;
    let rows = rows();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    // Not in key order, as files are.
    fs::write(path("rows.tsv"), tsv(rows.iter().rev())).unwrap();
    let all = tsv(rows.iter());
    let found: String = all.split_inclusive('\n').filter(|line| line.starts_with(PREFIX)).collect();
    assert!(found.lines().count() > 2_000);
    fleet.ok(&["keyspace", "create", "ordered", "--split-at", "lib,m,python3-8,r"]);
    fleet.ok(&["keyspace", "create", "hashed", "--layout", "hashed", "--partitions", "8"]);
    fleet.ok(&["kv", "load", &path("rows.tsv"), "--keyspace", "ordered"]);
    fleet.ok(&["kv", "dump", &path("rows.jsonl"), "--keyspace", "ordered"]);
    fleet.ok(&["kv", "load", &path("rows.jsonl"), "--keyspace", "hashed"]);
    for keyspace in ["ordered", "hashed"] {
        // First the levels that miss nothing, so that every replica may have caught up before the others.
        for level in ["linearizable", "lease", "bounded=1ms", "bounded=10s"] {
            let scan =
                ["kv", "scan", "--prefix", PREFIX, "-o", "plain", "--keyspace", keyspace, "--consistency", level];
            let scanned = String::from_utf8(fleet.ok(&scan)).unwrap();
            if level != "bounded=10s" {
                assert!(scanned == found, "{keyspace} {level}: {} rows", scanned.lines().count());
            }
        }
        crate::fleet::eventually(crate::fleet::PATIENCE, "an eventual scan that has caught up", || async {
            let scan = ["kv", "scan", "--prefix", PREFIX, "-o", "plain", "--keyspace", keyspace];
            let scanned = fleet.ok(&[&scan[..], &["--consistency", "eventual"]].concat());
            if scanned == found.as_bytes() { Ok(()) } else { Err(format!("{} bytes", scanned.len())) }
        })
        .await;
        let count = fleet.ok(&["kv", "count", "--prefix", PREFIX, "--keyspace", keyspace]);
        assert_eq!(String::from_utf8(count).unwrap().trim(), found.lines().count().to_string());
        let dumped = fleet.ok(&["kv", "dump", "--keyspace", keyspace]);
        assert!(dumped == all.as_bytes(), "{keyspace}");
    }
}
