//! `deploy/cluster.sh`, with this binary.

use crate::fleet::Ports;
use std::{path::Path, process::Command, process::Output, process::Stdio};

/// A cluster of the script; `wipe` signals only what the script itself started.
struct Script {
    dir: tempfile::TempDir,
    ports: Ports,
}

impl Script {
    fn run(&self, words: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/cluster.sh");
        let mut command = Command::new("bash");
        command.arg(script).args(words).arg("--dir").arg(self.cluster());
        command.env("MERIDIAN_BIN", env!("CARGO_BIN_EXE_meridian")).env_remove("MERIDIAN_ENDPOINTS");
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn up(&self) -> Output {
        self.run(&["up", "--nodes", "3", "--replicas", "3", "--base-port", &self.ports.port(0).to_string()])
    }

    fn cluster(&self) -> std::path::PathBuf {
        self.dir.path().join("cluster")
    }

    fn row(&self, words: &[&str]) -> String {
        let output = crate::fleet::meridian().args(["--endpoints", &self.ports.address(0), "kv"]).args(words).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.run(&["wipe"]);
    }
}

#[test]
fn up_status_kill_start_down_and_up_again_keep_the_data() {
    let script = Script { dir: tempfile::tempdir().unwrap(), ports: Ports::reserve() };
    let up = script.up();
    assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
    assert!(String::from_utf8(up.stdout).unwrap().contains("kv put hello world"), "a command to try");
    script.row(&["put", "hello", "world"]);
    let status = script.ok(&["status"]);
    assert!(status.matches("runs, pid").count() == 3 && status.contains("3 of 3 alive"), "{status}");
    script.ok(&["kill", "2"]);
    assert!(script.ok(&["status"]).contains(&format!("n2  {}  does not run", script.ports.address(1))));
    assert_eq!(script.row(&["get", "hello", "-o", "plain"]), "world\n");
    script.ok(&["start", "2"]);
    script.ok(&["down"]);
    assert_eq!(script.run(&["status"]).status.code(), Some(5), "nobody answers");
    assert!(script.up().status.success());
    assert_eq!(script.row(&["get", "hello", "-o", "plain"]), "world\n");
    script.ok(&["wipe"]);
    assert!(!script.cluster().exists());
}

#[test]
fn up_starts_nothing_when_a_port_is_taken() {
    let script = Script { dir: tempfile::tempdir().unwrap(), ports: Ports::reserve() };
    let taken = std::net::TcpListener::bind(script.ports.address(2)).unwrap();
    let up = script.up();
    let stderr = String::from_utf8(up.stderr).unwrap();
    assert_eq!(up.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&format!("port {}", script.ports.port(2))) && !stderr.contains("started, pid"), "{stderr}");
    assert!(!script.cluster().exists());
    drop(taken);
}
