//! The rules, each a function from a file to its faults, and for each a snippet that breaks it.

use crate::source::{code_of, functions, paths, without_tests};

/// A file of `src/`.
pub(crate) struct File<'a> {
    /// Path below `src/`, with `/`.
    pub(crate) path: &'a str,
    /// Its text.
    pub(crate) text: &'a str,
}

type Rule = fn(&File<'_>) -> Vec<String>;

/// Every rule, with its name.
pub(crate) const RULES: &[(&str, Rule)] = &[
    ("layering", layering),
    ("purity", purity),
    ("consensus stays in raft/", openraft),
    ("wire types stay at the border", wire_types),
    ("one place spawns", spawning),
    ("one place reads clocks", clocks),
    ("one word per idea", words),
    ("files are short", file_length),
    ("functions are short", function_length),
    ("modules say what they are", module_docs),
];

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// What a module must not import. Modules below are allowed, modules above are not.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "key",
        &[
            "error",
            "env",
            "proto",
            "telemetry",
            "kv",
            "placement",
            "log",
            "raft",
            "transport",
            "client",
            "node",
            "server",
            "cli",
        ],
    ),
    (
        "error",
        &[
            "env",
            "proto",
            "telemetry",
            "kv",
            "placement",
            "log",
            "raft",
            "transport",
            "client",
            "node",
            "server",
            "cli",
        ],
    ),
    (
        "plant",
        &[
            "key",
            "error",
            "env",
            "proto",
            "telemetry",
            "kv",
            "placement",
            "log",
            "raft",
            "transport",
            "client",
            "node",
            "server",
            "cli",
        ],
    ),
    ("env", &["proto", "kv", "placement", "log", "raft", "transport", "client", "node", "server", "cli"]),
    ("proto", &["env", "kv", "placement", "log", "raft", "transport", "client", "node", "server", "cli"]),
    ("telemetry", &["kv", "placement", "log", "raft", "transport", "client", "node", "server", "cli"]),
    ("kv", &["env", "proto", "telemetry", "placement", "log", "raft", "transport", "client", "node", "server", "cli"]),
    ("placement", &["env", "proto", "telemetry", "kv", "log", "raft", "transport", "client", "node", "server", "cli"]),
    ("log", &["kv", "placement", "raft", "transport", "client", "node", "server", "cli"]),
    ("transport", &["kv", "placement", "log", "raft", "client", "node", "server", "cli"]),
    ("raft", &["kv", "placement", "client", "node", "server", "cli"]),
    ("client", &["kv", "log", "raft", "node", "server", "cli"]),
    ("node", &["server", "cli"]),
    ("server", &["cli"]),
    ("cli", &["kv", "placement", "log", "raft", "transport"]),
    ("proof", &["kv", "placement", "log", "raft", "transport", "node", "server", "cli", "drill"]),
    ("drill", &["kv", "placement", "log", "raft", "transport", "node", "server", "cli"]),
];

/// Where `proto::` may be named: the border itself, and what sends.
const WIRE: &[&str] =
    &["proto.rs", "server/", "client/", "cli/", "proof/", "drill/", "transport/grpc.rs", "transport/grpc/"];

/// Words of other systems for what is called partition, replica or node here.
const BANNED: &[&str] = &["region", "shard", "tablet"];

/// First part of the path: the module of the crate that a file belongs to.
fn module<'a>(file: &File<'a>) -> &'a str {
    file.path.split('/').next().unwrap_or_default().trim_end_matches(".rs")
}

fn is_test_file(file: &File<'_>) -> bool {
    file.path.ends_with("/tests.rs") || file.path.ends_with("_tests.rs") || file.path.contains("/tests/")
}

/// Paths named outside of tests, `super::` chains that reach the crate written as `crate::`.
fn product_paths(file: &File<'_>) -> Vec<(usize, String)> {
    if is_test_file(file) {
        return Vec::new();
    }
    let inner = file.path.trim_end_matches(".rs").trim_end_matches("/mod");
    let up = "super::".repeat(inner.split('/').count());
    let in_crate = |path: String| match path.strip_prefix(&up) {
        Some(rest) => format!("crate::{rest}"),
        None => path,
    };
    paths(&without_tests(&code_of(file.text))).into_iter().map(|(line, path)| (line, in_crate(path))).collect()
}

/// Faults at the paths for which `wrong` gives a reason.
fn faults_at(file: &File<'_>, wrong: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let faults = product_paths(file).into_iter();
    faults.filter_map(|(line, path)| Some(format!("src/{}:{line}: {path}: {}", file.path, wrong(&path)?))).collect()
}

fn begins_with(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn layering(file: &File<'_>) -> Vec<String> {
    let module = module(file);
    let Some((_, forbidden)) = FORBIDDEN.iter().find(|(name, _)| *name == module) else { return Vec::new() };
    faults_at(file, |path| {
        let target = forbidden.iter().find(|target| begins_with(path, &format!("crate::{target}")))?;
        Some(format!("{module} must not import {target}"))
    })
}

fn purity(file: &File<'_>) -> Vec<String> {
    const IMPURE: &[&str] = &[
        "tokio",
        "tonic",
        "openraft",
        "rand",
        "rustix",
        "std::fs",
        "std::net",
        "std::thread",
        "std::env",
        "std::process",
        "std::time::Instant",
        "std::time::SystemTime",
    ];
    if !["kv", "placement", "key", "error"].contains(&module(file)) {
        return Vec::new();
    }
    faults_at(file, |path| {
        let impure = IMPURE.iter().find(|impure| begins_with(path, impure))?;
        Some(format!("a pure layer must not see {impure}"))
    })
}

fn openraft(file: &File<'_>) -> Vec<String> {
    if module(file) == "raft" {
        return Vec::new();
    }
    faults_at(file, |path| {
        let first = path.split("::").next()?;
        first.starts_with("openraft").then(|| "only raft/ knows openraft".to_owned())
    })
}

fn wire_types(file: &File<'_>) -> Vec<String> {
    if WIRE.iter().any(|place| file.path == *place || (place.ends_with('/') && file.path.starts_with(place))) {
        return Vec::new();
    }
    faults_at(file, |path| {
        begins_with(path, "crate::proto").then(|| "wire types belong to the border; see WIRE".to_owned())
    })
}

fn spawning(file: &File<'_>) -> Vec<String> {
    const SPAWNS: &[&str] = &["tokio::spawn", "tokio::task::spawn", "tokio::task::spawn_local", "task::spawn"];
    if file.path == "env.rs" {
        return Vec::new();
    }
    faults_at(file, |path| {
        SPAWNS.contains(&path).then(|| "use env::spawn, so that the task belongs to a node".to_owned())
    })
}

fn clocks(file: &File<'_>) -> Vec<String> {
    const CLOCKS: &[&str] = &["std::time::Instant", "std::time::SystemTime", "rustix::time"];
    if file.path == "env.rs" {
        return Vec::new();
    }
    faults_at(file, |path| {
        CLOCKS
            .iter()
            .any(|clock| begins_with(path, clock))
            .then(|| "use env::Clock or tokio::time, so that time can be simulated".to_owned())
    })
}

fn words(file: &File<'_>) -> Vec<String> {
    let mut faults = Vec::new();
    for (number, line) in file.text.lines().enumerate() {
        for word in line.split(|c: char| !c.is_alphanumeric()) {
            let word = word.to_lowercase();
            if BANNED.iter().any(|banned| word == *banned || word == format!("{banned}s")) {
                faults.push(format!("src/{}:{}: \"{word}\" has another name here", file.path, number + 1));
            }
        }
    }
    faults
}

fn file_length(file: &File<'_>) -> Vec<String> {
    if is_test_file(file) {
        return Vec::new();
    }
    let code = without_tests(&code_of(file.text));
    let blanked = code_of(file.text).lines().zip(code.lines()).filter(|(all, product)| all != product).count();
    let lines = file.text.lines().count() - blanked;
    if lines <= FILE_LINES_MAX {
        return Vec::new();
    }
    vec![format!("src/{}: {lines} lines without tests, at most {FILE_LINES_MAX}", file.path)]
}

fn function_length(file: &File<'_>) -> Vec<String> {
    if is_test_file(file) {
        return Vec::new();
    }
    let found = functions(&without_tests(&code_of(file.text))).into_iter();
    let long = found.filter(|(_, _, lines)| *lines > FUNCTION_LINES_MAX);
    long.map(|(line, name, lines)| {
        format!("src/{}:{line}: fn {name} has {lines} lines, at most {FUNCTION_LINES_MAX}", file.path)
    })
    .collect()
}

fn module_docs(file: &File<'_>) -> Vec<String> {
    if is_test_file(file) {
        return Vec::new();
    }
    let first = file.text.lines().next().unwrap_or_default();
    let says = first.strip_prefix("//!").is_some_and(|text| !text.trim().is_empty() && text.trim() != "To be written.");
    if says { Vec::new() } else { vec![format!("src/{}: does not begin with a `//!` that says what it is", file.path)] }
}

/// Faults of one rule in a planted file.
#[cfg(test)]
fn planted(rule: Rule, path: &str, text: &str) -> usize {
    rule(&File { path, text }).len()
}

#[test]
fn layering_can_fail() {
    assert_eq!(planted(layering, "kv/store.rs", "use crate::{key::Span, placement::map::Map};"), 1);
    assert_eq!(planted(layering, "placement/ring.rs", "fn f() { crate::kv::x() }"), 1);
    assert_eq!(planted(layering, "raft/group.rs", "use crate::kv::Store;\nuse crate::node::Node;"), 2);
    assert_eq!(planted(layering, "raft/mod.rs", "use super::server::Server;"), 1);
    assert_eq!(planted(layering, "raft/group.rs", "use super::super::client::Client;"), 1);
    assert_eq!(planted(layering, "raft/group.rs", "use super::network::Hub; use crate::transport::Frame;"), 0);
    assert_eq!(
        planted(layering, "kv/store.rs", "use crate::key::Span;\n#[cfg(test)]\nmod tests { use crate::node::X; }"),
        0
    );
    assert_eq!(planted(layering, "kv/store.rs", "// crate::node::X\nlet a = \"crate::node::X\";"), 0);
}

#[test]
fn purity_can_fail() {
    assert_eq!(planted(purity, "kv/store.rs", "use std::{fs::File, time::{Duration, Instant}};"), 2);
    assert_eq!(planted(purity, "placement/plan.rs", "let x = rand::random();"), 1);
    assert_eq!(planted(purity, "placement/plan.rs", "use std::time::Duration;"), 0);
    assert_eq!(planted(purity, "node/mod.rs", "use std::fs::File;"), 0);
}

#[test]
fn consensus_can_leak() {
    assert_eq!(planted(openraft, "node/mod.rs", "use openraft::Raft;"), 1);
    assert_eq!(planted(openraft, "node/mod.rs", "use openraft_rt::AsyncRuntime;"), 1);
    assert_eq!(planted(openraft, "raft/mod.rs", "use openraft::Raft;"), 0);
}

#[test]
fn wire_types_can_leak() {
    assert_eq!(planted(wire_types, "raft/network.rs", "use crate::proto::internal::Frame;"), 1);
    assert_eq!(planted(wire_types, "node/replicas.rs", "use crate::{key, proto::v1};"), 1);
    assert_eq!(planted(wire_types, "transport/grpc.rs", "use crate::proto::internal::Frame;"), 0);
    assert_eq!(planted(wire_types, "server/kv.rs", "use crate::proto::v1;"), 0);
}

#[test]
fn spawning_can_fail() {
    assert_eq!(planted(spawning, "node/mod.rs", "tokio::spawn(async {});"), 1);
    assert_eq!(planted(spawning, "node/mod.rs", "use tokio::{task::spawn, time};"), 1);
    assert_eq!(planted(spawning, "env.rs", "tokio::spawn(async {});"), 0);
    assert_eq!(planted(spawning, "raft/mod.rs", "tokio::task::spawn_blocking(f); env::spawn(g);"), 0);
}

#[test]
fn reading_clocks_can_fail() {
    assert_eq!(planted(clocks, "node/mod.rs", "use std::{sync::Arc, time::{Duration, Instant}};"), 1);
    assert_eq!(planted(clocks, "cli/bench.rs", "let now = std::time::SystemTime::now();"), 1);
    assert_eq!(planted(clocks, "node/mod.rs", "use tokio::time::Instant; use std::time::Duration;"), 0);
}

#[test]
fn words_can_be_wrong() {
    assert_eq!(planted(words, "node/mod.rs", "// each Region\nlet shards = tablet_of(x);"), 3);
    assert_eq!(planted(words, "node/mod.rs", "let partition = regional;"), 0);
}

#[test]
fn files_can_be_too_long() {
    let line = "fn f() {}\n";
    assert_eq!(planted(file_length, "node/mod.rs", &line.repeat(FILE_LINES_MAX)), 0);
    assert_eq!(planted(file_length, "node/mod.rs", &line.repeat(FILE_LINES_MAX + 1)), 1);
    let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", line.repeat(FILE_LINES_MAX));
    assert_eq!(planted(file_length, "node/mod.rs", &format!("{line}{tests}")), 0);
}

#[test]
fn functions_can_be_too_long() {
    let of = |lines: usize| format!("fn f() {{\n{}}}\n", "    g();\n".repeat(lines - 2));
    assert_eq!(planted(function_length, "node/mod.rs", &of(FUNCTION_LINES_MAX)), 0);
    assert_eq!(planted(function_length, "node/mod.rs", &of(FUNCTION_LINES_MAX + 1)), 1);
}

#[test]
fn modules_can_be_silent() {
    assert_eq!(planted(module_docs, "node/mod.rs", "use std::fmt;\n//! Late."), 1);
    assert_eq!(planted(module_docs, "node/mod.rs", "//! To be written."), 1);
    assert_eq!(planted(module_docs, "node/mod.rs", "//! One node."), 0);
    assert_eq!(planted(module_docs, "node/map_tests.rs", "use super::*;"), 0);
}
