//! The files for deployment: their form, and that they agree with the binary.
//!
//! `cluster.sh` is run against a stand-in for the binary: what is tested here is its bookkeeping of processes.

use crate::root;
use meridian::{
    cli::config::{Layers, resolve},
    node::config::NodeConfig,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn scripts_are_executable_and_well_formed() {
    for path in [
        "deploy/cluster.sh",
        "deploy/try-debian.sh",
        "deploy/try-healing.sh",
        "deploy/try-idle.sh",
        "deploy/try-overload.sh",
        "deploy/try-spread.sh",
        ".ci/run",
    ] {
        let mode = fs::metadata(root().join(path)).unwrap().permissions().mode();
        assert!(mode & 0o111 != 0, "{path} is not executable");
        assert!(read(path).starts_with("#!/usr/bin/env bash\n"), "{path}");
        assert!(read(path).contains("\nset -euo pipefail\n"), "{path}");
        let parsed = Command::new("bash").arg("-n").arg(root().join(path)).status().unwrap();
        assert!(parsed.success(), "{path}");
    }
}

#[test]
fn the_example_settings_are_the_defaults() {
    let path = root().join("deploy/node.example.toml");
    let file = Some((path, read("deploy/node.example.toml")));
    let (config, _) = resolve(&Layers { file, ..Layers::default() }).unwrap();
    assert_eq!(config, NodeConfig::default());
}

/// Sections and settings of a unit file; a line that is neither is a fault.
fn unit(text: &str) -> Result<Vec<(String, String, String)>, String> {
    let mut section = None;
    let mut settings = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = Some(name.to_owned());
        } else {
            let (name, value) = line.split_once('=').ok_or(line)?;
            settings.push((section.clone().ok_or(line)?, name.to_owned(), value.to_owned()));
        }
    }
    Ok(settings)
}

#[test]
fn the_systemd_unit_is_well_formed() {
    let settings = unit(&read("deploy/systemd/meridian.service")).unwrap();
    let value = |section: &str, name: &str| {
        settings.iter().find(|(s, n, _)| s == section && n == name).map(|(_, _, value)| value.as_str())
    };
    assert!(value("Service", "ExecStart").unwrap().starts_with("/usr/local/bin/meridian start --config "));
    assert_eq!(value("Service", "KillSignal"), Some("SIGTERM"));
    assert_eq!(value("Install", "WantedBy"), Some("multi-user.target"));
    assert!(unit("[Service]\nExecStart").is_err() && unit("A=b").is_err(), "a broken one is noticed");
}

/// Names at each depth of a YAML file in block style with two blanks per level; anything else is a fault.
fn yaml_names(text: &str) -> Result<Vec<String>, String> {
    let mut names: Vec<String> = Vec::new();
    let mut at: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')) {
        let indent = line.len() - line.trim_start().len();
        let (name, value) = line.trim().split_once(':').ok_or(line)?;
        let value_ok = value.is_empty() || value.starts_with(' ');
        if indent % 2 != 0 || indent / 2 > at.len() || line.contains('\t') || !value_ok {
            return Err(line.to_owned());
        }
        at.truncate(indent / 2);
        at.push(name.to_owned());
        names.push(at.join("/"));
    }
    Ok(names)
}

#[test]
fn the_compose_file_is_well_formed_and_names_known_settings() {
    let text = read("deploy/compose.yaml");
    let names = yaml_names(&text).unwrap();
    for needed in
        ["x-node/build/dockerfile", "services/n1/ports", "services/n3/volumes", "services/init/command", "volumes/n2"]
    {
        assert!(names.iter().any(|name| name == needed), "{needed} is missing in {names:?}");
    }
    let variables: Vec<_> =
        names.iter().filter_map(|name| name.split_once("/environment/")).map(|(_, name)| name).collect();
    assert_eq!(variables.len(), 6);
    for variable in variables {
        let layers = Layers { variables: vec![(variable.into(), "a:1".into())], ..Layers::default() };
        let (config, warnings) = resolve(&layers).unwrap();
        assert!(warnings.is_empty() && config != NodeConfig::default(), "{variable} is not a setting");
    }
    assert!(yaml_names("a:\n   b: 1").is_err() && yaml_names("a:1").is_err(), "a broken one is noticed");
}

#[test]
fn the_image_starts_a_node_with_arguments_that_exist() {
    let text = read("deploy/Dockerfile");
    let command = text.lines().find_map(|line| line.strip_prefix("CMD ")).unwrap();
    let words: Vec<String> = serde_json::from_str(command).unwrap();
    let checked = Command::new(env!("CARGO_BIN_EXE_meridian"))
        .args(&words)
        .args(["--advertise", "n1:7170", "--check"])
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let copied: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("COPY ")).flat_map(str::split_whitespace).collect();
    for needed in ["Cargo.toml", "Cargo.lock", "build.rs", "proto", "src"] {
        assert!(copied.contains(&needed), "{needed} is not copied");
    }
}

/// Stands in for the binary: a node is a process that sleeps, the cluster is always healthy.
const STAND_IN: &str = r#"#!/usr/bin/env bash
case " $* " in
  *" cluster status "*) echo '{"healthy":true,"nodes_alive":3,"partitions":1}' ;;
  *" init "*) echo "$@" >>"$(dirname "$0")/inits" ;;
  *" node list "*)
    # Joined in another order than they are counted, and one address had another node before.
    for node in '17170 2 active' '17171 3 active' '17172 4 active' '17172 1 removed'; do
      set -- $node
      echo "{\"address\":\"127.0.0.1:$1\",\"alive\":true,\"id\":$2,\"standing\":\"$3\"}"
    done
    ;;
  *" node "*) echo "$@" >>"$(dirname "$0")/orders" ;;
  *" start "*) exec sleep 300 ;;
esac
"#;

struct Script<'a> {
    dir: &'a Path,
}

impl Script<'_> {
    fn run(&self, arguments: &str) -> Output {
        Command::new(root().join("deploy/cluster.sh"))
            .args(arguments.split_whitespace())
            .arg("--dir")
            .arg(self.dir.join("cluster"))
            .env("MERIDIAN_BIN", self.dir.join("meridian"))
            .output()
            .unwrap()
    }

    fn ok(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn pid(&self, node: u32) -> Option<String> {
        let text = fs::read_to_string(self.dir.join(format!("cluster/n{node}/pid"))).ok()?;
        Some(text.lines().next()?.to_owned())
    }
}

/// Whether the process lives. What has ended and was not waited for yet does not; what is only now becoming its program,
/// and has no command line for a moment, does.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !"ZX".contains(state))
}

#[test]
fn the_cluster_script_may_be_repeated_and_touches_only_its_own_processes() {
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("meridian");
    fs::write(&binary, STAND_IN).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    let script = Script { dir: dir.path() };

    assert_eq!(script.run("status").status.code(), Some(1), "there is no cluster yet");
    assert_eq!(script.run("fly").status.code(), Some(2));
    let hint = script.ok("up --nodes 3 --replicas 3 --base-port 17170");
    assert!(hint.contains("kv put hello world"), "{hint}");
    let first: Vec<String> = (1..=3).map(|node| script.pid(node).unwrap()).collect();
    assert!(first.iter().all(|pid| runs(pid)));

    script.ok("up --nodes 3 --replicas 3 --base-port 17170");
    let again: Vec<String> = (1..=3).map(|node| script.pid(node).unwrap()).collect();
    assert_eq!(first, again, "what runs is left alone");
    assert_eq!(fs::read_to_string(dir.path().join("inits")).unwrap().lines().count(), 1, "formed once");
    assert_eq!(script.run("up --nodes 2").status.code(), Some(1), "a cluster does not shrink");

    script.ok("kill 2");
    assert!(!runs(&first[1]) && script.pid(2).is_none() && runs(&first[0]) && runs(&first[2]));
    script.ok("kill 2");
    script.ok("start 2");
    assert!(runs(&script.pid(2).unwrap()));
    script.ok("stop 3");
    assert!(!runs(&first[2]));
    script.ok("start 3");
    let before: Vec<String> = (1..=3).map(|node| script.pid(node).unwrap()).collect();
    script.ok("roll");
    for (node, old) in (1..=3).zip(&before) {
        assert!(!runs(old) && runs(&script.pid(node).unwrap()), "n{node} was restarted");
    }
    let orders = fs::read_to_string(dir.path().join("orders")).unwrap();
    let orders: Vec<String> = orders
        .lines()
        .map(|line| line.split_whitespace().skip_while(|word| *word != "node").skip(1).take(2).collect::<Vec<_>>())
        .map(|words| words.join(" "))
        .collect();
    assert_eq!(orders, ["drain n2", "resume n2", "drain n3", "resume n3", "drain n4", "resume n4"]);
    script.ok("stop 3");

    assert_eq!(script.run("kill 4").status.code(), Some(1), "there is no such node");

    // A pid that now belongs to somebody else is never signalled.
    let mut stranger = Command::new("sleep").arg("300").spawn().unwrap();
    fs::write(dir.path().join("cluster/n3/pid"), format!("{}\n1\n", stranger.id())).unwrap();
    script.ok("kill 3");
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();

    script.ok("wipe");
    assert!(!runs(&first[0]) && !dir.path().join("cluster").exists());
    script.ok("wipe");
}
