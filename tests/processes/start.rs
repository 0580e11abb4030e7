//! How a process begins and ends.

use crate::fleet::{Fleet, meridian, refused};
use std::fs;

#[tokio::test]
async fn two_faults_are_both_reported_and_an_unknown_name_with_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("node.toml");
    fs::write(&file, "zonne = \"a\"\n[raft]\nheartbeat_ms = \"soon\"\n").unwrap();
    let data = dir.path().join("data");
    let mut command = meridian();
    command.args(["start", "--weight", "heavy", "--listen", "here", "--config"]).arg(&file).arg("--data").arg(&data);
    let (code, stderr) = refused(command).await;
    assert_eq!(code, Some(2), "{stderr}");
    for part in ["zonne", "the nearest is `zone`", "raft.heartbeat_ms", "weight", "\"heavy\"", "listen", "\"here\""] {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    assert!(!data.exists(), "a wrong configuration touches nothing");
}

#[tokio::test]
async fn an_address_in_use_is_named_once_with_its_setting() {
    let fleet = Fleet::start(1, &[]).await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = meridian();
    command.args(["start", "--listen", &fleet.address(0), "--http", "127.0.0.1:0", "--data"]).arg(dir.path());
    let (code, stderr) = refused(command).await;
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains(&fleet.address(0)) && stderr.contains("(listen)"), "{stderr}");
    assert_eq!(stderr.matches("in use").count(), 1, "{stderr}");
}

#[tokio::test]
async fn sigterm_stops_cleanly_and_the_data_is_there_afterwards() {
    let mut fleet = Fleet::start(3, &[]).await;
    let rows = fleet.client().await.keyspace("default");
    rows.put("k", "v").await.unwrap();
    for index in 0..3 {
        assert_eq!(fleet.terminate(index).await.code(), Some(0), "node {index}");
    }
    fleet.start_all();
    fleet.healthy().await;
    let row = fleet.client().await.keyspace("default").get("k").await.unwrap();
    assert_eq!(row.unwrap().value, "v");
}
