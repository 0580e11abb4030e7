//! The command line against a real cluster: the binary runs as `meridian dev` and, again and again, as its client.
//!
//! Exit codes and the answers of the README's edge-case table are checked here, as scripts see them.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use serde_json::Value;
use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Output, Stdio},
};

/// A cluster that ends with the test.
struct Cluster {
    child: Child,
    endpoints: String,
}

impl Cluster {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_meridian"))
            .args(["dev", "--base-port", "0", "-o", "json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap();
        let endpoints: Vec<&str> = ready["endpoints"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert_eq!(endpoints.len(), 3);
        Self { endpoints: endpoints.join(","), child }
    }

    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_meridian"))
            .args(words)
            .env("MERIDIAN_ENDPOINTS", &self.endpoints)
            .env_remove("MERIDIAN_OUTPUT")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs a command written with blanks between its words; its exit code and stdout.
    fn code(&self, line: &str) -> (i32, String) {
        let output = self.run(&line.split(' ').collect::<Vec<_>>());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let stdout = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap_or_else(|| panic!("{line}: killed; {stderr}")), stdout)
    }

    fn ok(&self, line: &str) -> String {
        let output = self.run(&line.split(' ').collect::<Vec<_>>());
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} -o json"))).unwrap()
    }

    /// Runs a command that must fail; its exit code and stderr.
    fn fault(&self, line: &str) -> (i32, String) {
        let output = self.run(&line.split(' ').collect::<Vec<_>>());
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn rows_are_written_read_and_deleted_with_the_exit_codes_of_the_readme() {
    let cluster = Cluster::start();
    assert_eq!(cluster.code("kv get k").0, 3);
    assert!(cluster.ok("kv put k v").starts_with("ok, version "));
    assert_eq!(cluster.ok("kv get k -o plain"), "v\n");
    let got = cluster.json("kv get k");
    assert_eq!(
        (got["found"].as_bool(), got["key"].as_str(), got["value"].as_str()),
        (Some(true), Some("k"), Some("v"))
    );
    for field in ["node", "role", "level", "staleness_ms", "partition", "applied_index"] {
        assert!(!got["read"][field].is_null(), "read.{field} in {got}");
    }
    let version = got["version"].as_str().unwrap();
    assert_eq!(cluster.code("kv put k w --if-absent").0, 4);
    assert_eq!(cluster.code(&format!("kv cas k w --if-version {version}")).0, 0);
    assert_eq!(cluster.code(&format!("kv cas k x --if-version {version}")).0, 4);
    assert_eq!(cluster.code("kv cas k --delete --if-value nothing").0, 4);
    assert_eq!(cluster.json("kv del k --return-previous")["previous"]["value"], "w");
    assert_eq!(cluster.json("kv del k")["existed"], false);
    assert_eq!(cluster.ok("kv del k"), "ok, there was no row \"k\"\n");
    assert_eq!(cluster.code("kv del k --must-exist").0, 3);
    assert_eq!(cluster.ok("kv incr n 5"), "5\n");
    assert_eq!(cluster.ok("kv incr n -7"), "-2\n");
    for level in ["linearizable", "lease", "bounded=10s", "eventual"] {
        let got = cluster.json(&format!("kv get n --consistency {level}"));
        assert_eq!(got["value"], "-2", "{level}");
        assert_eq!(got["read"]["level"], level.split('=').next().unwrap());
    }
    let token = cluster.json("kv put mine 1")["session_token"].as_str().unwrap().to_owned();
    assert_eq!(cluster.ok(&format!("kv get mine -o plain --consistency session={token}")), "1\n");
}

#[test]
fn edge_cases_are_answered_as_the_readme_says() {
    let cluster = Cluster::start();
    assert!(cluster.run(&["kv", "put", "", "empty"]).status.success(), "the empty key");
    assert_eq!(cluster.run(&["kv", "get", "", "-o", "plain"]).stdout, b"empty\n");
    cluster.ok("kv put --hex 00ff ff00");
    let got = cluster.json("kv get --hex 00ff");
    assert_eq!((got["key"].as_str(), got["value"].as_str()), (Some("b64:AP8="), Some("b64:/wA=")));
    let long = "k".repeat(4_097);
    let faults = [
        (format!("kv put {long} v"), 2, "KEY_TOO_LARGE"),
        ("kv scan --from b --to a".to_owned(), 2, "RANGE_INVERTED"),
        ("kv get k --keyspace nowhere".to_owned(), 3, "KEYSPACE_UNKNOWN"),
        ("keyspace create _mine".to_owned(), 2, "NAME_INVALID"),
        ("keyspace create Mine".to_owned(), 2, "NAME_INVALID"),
        ("keyspace drop default".to_owned(), 2, "NAME_INVALID"),
        ("kv get k --deadline 0ms".to_owned(), 5, "DEADLINE_EXCEEDED"),
    ];
    for (line, code, reason) in faults {
        let (found, stderr) = cluster.fault(&line);
        assert_eq!(found, code, "{line}: {stderr}");
        assert!(stderr.contains(reason), "{line}: {stderr}");
    }
    assert_eq!(cluster.ok("kv scan --from a --to a -o plain"), "", "start = end is empty");
    assert_eq!(cluster.ok("kv count --from x --to y"), "0\n");
    let created = cluster.run(&["keyspace", "create", "wide", "--replicas", "5"]);
    assert!(created.status.success() && !created.stderr.is_empty(), "more replicas than nodes is a warning");
    assert_eq!(cluster.json("keyspace create wide --replicas 5")["created"], false);
    assert_eq!(cluster.fault("keyspace create wide --replicas 3").0, 1);
}

#[test]
fn integer_keyspaces_take_and_show_decimal_numbers() {
    let cluster = Cluster::start();
    cluster.ok("keyspace create ids --keys integer --max 1000 --partitions 4");
    for n in [0, 7, 255, 256, 999] {
        cluster.ok(&format!("kv put {n} v{n} --keyspace ids"));
    }
    assert_eq!(cluster.ok("kv scan --keyspace ids -o plain --keys-only"), "0\n7\n255\n256\n999\n");
    assert_eq!(cluster.ok("kv scan --from 7 --to 256 --keyspace ids -o plain"), "7\tv7\n255\tv255\n");
    assert_eq!(
        cluster.ok("kv scan --from 7 --to 256 --inclusive --reverse --limit 2 --keyspace ids -o plain"),
        "256\tv256\n255\tv255\n"
    );
    assert_eq!(cluster.ok("kv count --from 0 --to 1000 --keyspace ids"), "5\n");
    assert_eq!(cluster.json("kv get 7 --keyspace ids")["key"], 7);
    for bad in ["-5", "1000", "x"] {
        let (code, stderr) = cluster.fault(&format!("kv get {bad} --keyspace ids"));
        assert_eq!(code, 2);
        assert!(stderr.contains("KEY_OUT_OF_DOMAIN") && stderr.contains(bad) && stderr.contains("1000"), "{stderr}");
    }
    let shown = cluster.json("partition show 600 --keyspace ids");
    assert_eq!((shown["from"].as_u64(), shown["to"].as_u64()), (Some(500), Some(750)));
}

#[test]
fn a_dump_loads_again_byte_for_byte_in_both_layouts_and_forms() {
    let cluster = Cluster::start();
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..3_000).map(|n| format!("key {n:05}\tline\\n{n}\\\\\\xff\n")).collect();
    let first = dir.path().join("rows.tsv");
    fs::write(&first, &rows).unwrap();
    cluster.ok("keyspace create here --split-at m,t");
    cluster.ok("keyspace create there --layout hashed --partitions 4");
    let load =
        |file: &str, keyspace: &str| cluster.json(&format!("kv load {file} --keyspace {keyspace}"))["rows"].as_u64();
    assert_eq!(load(first.to_str().unwrap(), "here"), Some(3_000));
    let jsonl = dir.path().join("rows.jsonl");
    cluster.ok(&format!("kv dump {} --keyspace here", jsonl.display()));
    assert_eq!(load(jsonl.to_str().unwrap(), "there"), Some(3_000));
    assert_eq!(cluster.ok("kv dump --keyspace there"), rows, "in key order, though hashed");
    assert_eq!(cluster.ok("kv dump --keyspace here"), rows);
    fs::write(&first, "a\t1\nno tab\n").unwrap();
    let (code, stderr) = cluster.fault(&format!("kv load {} --keyspace here", first.display()));
    assert_eq!(code, 1);
    assert!(stderr.contains("line 2"), "{stderr}");
}

#[test]
fn the_cluster_and_its_parts_are_shown() {
    let cluster = Cluster::start();
    let status = cluster.json("cluster status");
    assert_eq!((status["healthy"].as_bool(), status["nodes_alive"].as_u64()), (Some(true), Some(3)));
    assert_eq!(cluster.json("init")["created"], false, "dev has formed it");
    assert_eq!(cluster.ok("node list -o json").lines().count(), 3);
    cluster.ok("keyspace create names --split-at g,n --tolerate 1");
    assert_eq!(cluster.ok("partition list --keyspace names -o json").lines().count(), 3);
    let shown = cluster.json("keyspace show names");
    assert_eq!(
        (shown["failures_tolerated_strong"].as_u64(), shown["failures_tolerated_eventual"].as_u64()),
        (Some(1), Some(2))
    );
    let bench = cluster.json("bench mixed --clients 4 --seconds 1 --warmup 0 --keys 100 --read-percent 50");
    assert_eq!(bench["errors"], 0, "{bench}");
    assert!(
        bench["latency_us"]["get"]["p99"].as_u64() > Some(0) && bench["latency_us"]["put"]["max"].as_u64() > Some(0)
    );
    cluster.ok("keyspace drop names");
    assert_eq!(cluster.fault("keyspace drop names").0, 3);
}

#[test]
fn the_tour_ends_well() {
    let output = Command::new(env!("CARGO_BIN_EXE_meridian")).args(["dev", "--demo"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("it is killed now") && text.contains("get banana = yellow"), "{text}");
}

#[test]
fn without_a_cluster_the_command_says_what_to_do() {
    let output = Command::new(env!("CARGO_BIN_EXE_meridian"))
        .args(["kv", "get", "k", "--endpoints", "127.0.0.1:1", "--deadline", "100ms"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("UNREACHABLE") && stderr.contains("127.0.0.1:1") && stderr.contains("meridian dev"),
        "{stderr}"
    );
}

#[test]
fn histories_are_judged_without_a_cluster() {
    let judged = |words: &[&str]| {
        let histories = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/histories");
        let output = Command::new(env!("CARGO_BIN_EXE_meridian"))
            .args(["check", "-o", "json"])
            .args(words)
            .current_dir(histories)
            .output()
            .unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        let verdicts: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (output.status.code().unwrap(), verdicts, String::from_utf8(output.stderr).unwrap())
    };
    let (code, verdicts, _) = judged(&["good.jsonl", "bounded_ok.jsonl"]);
    assert_eq!(code, 0, "{verdicts:?}");
    assert!(verdicts.len() >= 5 && verdicts.iter().all(|verdict| verdict["valid"] == "true"), "{verdicts:?}");
    let (code, verdicts, stderr) = judged(&["stale.jsonl"]);
    assert_eq!((code, stderr.contains("violated")), (1, true), "{stderr}");
    let linear = verdicts.iter().find(|verdict| verdict["checker"] == "linear").unwrap();
    assert_eq!((&linear["valid"], &linear["violations"][0]["key"]), (&"false".into(), &"a".into()));
    let (code, verdicts, stderr) = judged(&["good.jsonl", "--workload", "counter"]);
    assert_eq!((code, stderr.contains("unknown")), (1, true), "{verdicts:?} {stderr}");
    let (code, _, stderr) = judged(&["nowhere.jsonl"]);
    assert_eq!((code, stderr.contains("nowhere.jsonl")), (2, true), "{stderr}");
}

#[test]
fn a_running_cluster_is_drilled_by_way_of_any_node_and_left_as_it_was() {
    let cluster = Cluster::start();
    let before = cluster.json("keyspace list");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("drill").display().to_string();
    let one = cluster.endpoints.split(',').next().unwrap();
    let drill = |more: &[&str]| {
        let what = ["drill", "--endpoints", one, "--out", &out, "--seconds", "3", "--workload", "register"];
        cluster.run(&[what.as_slice(), more].concat())
    };
    let refused = drill(&["--faults", "kill"]);
    assert_eq!(refused.status.code(), Some(7));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--endpoints"));
    let drilled = drill(&[]);
    assert!(drilled.status.success(), "{}", String::from_utf8_lossy(&drilled.stdout));
    let results: Value = serde_json::from_slice(&fs::read(dir.path().join("drill/results.json")).unwrap()).unwrap();
    assert_eq!(results["run"]["nodes"].as_array().unwrap().len(), 3);
    assert_eq!(cluster.json("keyspace list"), before);
}
