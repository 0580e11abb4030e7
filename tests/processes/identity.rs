//! Who may be a node, and under which id.

use crate::fleet::{Fleet, PATIENCE, eventually, refused};
use meridian::proto::v1::NodeStatus;
use std::fs;

/// Node ids by address.
async fn ids(fleet: &Fleet) -> Vec<(String, u64, bool)> {
    let nodes = fleet.client().await.admin().nodes().await.unwrap();
    let mut nodes: Vec<_> = nodes.into_iter().filter_map(|NodeStatus { node, .. }| node).collect();
    nodes.sort_by_key(|node| (node.address.clone(), node.id));
    nodes.into_iter().map(|node| (node.address, node.id, node.alive)).collect()
}

#[tokio::test]
async fn a_node_restarted_with_its_data_rejoins_under_its_id() {
    let mut fleet = Fleet::start(3, &[]).await;
    let before = ids(&fleet).await;
    fleet.client().await.keyspace("default").put("k", "v").await.unwrap();
    for index in 0..3 {
        fleet.kill([index]);
        fleet.start_node(index);
        fleet.healthy().await;
    }
    assert_eq!(ids(&fleet).await, before);
    assert_eq!(before.len(), 3);
}

#[tokio::test]
async fn a_wiped_data_directory_under_the_same_address_is_refused() {
    let mut fleet = Fleet::start(3, &[]).await;
    fleet.kill([1]);
    let (data, aside) = (fleet.data(1), fleet.data(1).with_extension("aside"));
    fs::rename(&data, &aside).unwrap();
    let (code, stderr) = refused(fleet.command(1)).await;
    assert_eq!(code, Some(1), "{stderr}");
    for part in ["IDENTITY_MISMATCH", &fleet.address(1), "whose data directory this is not"] {
        assert!(stderr.contains(part), "{part} in {stderr}");
    }
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&aside, &data).unwrap();
    fleet.start_node(1);
    fleet.healthy().await;
}

#[tokio::test]
async fn a_second_process_on_one_data_directory_is_refused() {
    let fleet = Fleet::start(1, &[]).await;
    let mut command = crate::fleet::meridian();
    command.args(["start", "--listen", "127.0.0.1:0", "--data"]).arg(fleet.data(0));
    let (code, stderr) = refused(command).await;
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("is in use by another process") && stderr.contains("--data"), "{stderr}");
    fleet.client().await.keyspace("default").put("k", "v").await.unwrap();
}

#[tokio::test]
async fn a_node_of_another_cluster_is_refused_whether_it_formed_that_cluster_or_joined_it() {
    let home = Fleet::start(1, &[]).await;
    let mut other = Fleet::start(2, &[]).await;
    let cluster =
        |fleet: &Fleet| serde_json::from_slice::<serde_json::Value>(&fleet.ok(&["init", "-o", "json"])).unwrap();
    let (ours, theirs) = (cluster(&home), cluster(&other));
    other.kill_all();
    for index in 0..2 {
        let mut command = crate::fleet::meridian();
        command.args(["start", "--listen", &other.address(index), "--join", &home.address(0), "--data"]);
        command.arg(other.data(index));
        let (code, stderr) = refused(command).await;
        assert_eq!(code, Some(1), "{stderr}");
        for part in ["CLUSTER_MISMATCH", ours["cluster_id"].as_str().unwrap(), theirs["cluster_id"].as_str().unwrap()] {
            assert!(stderr.contains(part), "{part} in {stderr}");
        }
    }
    home.healthy().await;
    assert_eq!(ids(&home).await.len(), 1);
    other.start_all();
    other.healthy().await;
}

#[tokio::test]
async fn a_memory_node_comes_back_as_a_new_node_and_its_replicas_are_replaced() {
    let mut fleet = Fleet::start(3, &["--storage", "memory"]).await;
    let rows = fleet.client().await.keyspace("default");
    rows.put("k", "v").await.unwrap();
    for index in [1, 0, 2] {
        let known: Vec<_> = ids(&fleet).await;
        fleet.kill([index]);
        fleet.start_node(index);
        let address = fleet.address(index);
        eventually(PATIENCE, "a new node", || async {
            let now = ids(&fleet).await;
            let new =
                now.iter().any(|(at, id, alive)| *at == address && *alive && known.iter().all(|(_, old, _)| old != id));
            if new { Ok(()) } else { Err(format!("{now:?}")) }
        })
        .await;
        fleet.healthy().await;
        assert_eq!(rows.get("k").await.unwrap().unwrap().value, "v");
    }
    let partitions = fleet.client().await.admin().partitions("default").await.unwrap().partitions;
    let holders: Vec<u64> = partitions[0].replicas.iter().map(|replica| replica.node).collect();
    let alive: Vec<u64> = ids(&fleet).await.into_iter().filter(|(_, _, alive)| *alive).map(|(_, id, _)| id).collect();
    assert!(holders.len() == 3 && holders.iter().all(|node| alive.contains(node)), "{holders:?} of {alive:?}");
}

#[tokio::test]
async fn init_is_idempotent_and_says_on_every_node_that_the_cluster_exists() {
    let fleet = Fleet::start(3, &[]).await;
    let mut clusters = Vec::new();
    for address in fleet.addresses() {
        for _ in 0..2 {
            let reply = fleet.client_of(vec![address.clone()]).await.admin().init(5).await.unwrap();
            assert!(!reply.created);
            clusters.push(reply.cluster_id);
        }
    }
    clusters.dedup();
    assert_eq!(clusters.len(), 1);
}
