//! Nodes that die, leave, drain and come back: the cluster looks after its replicas by itself.

use crate::support::{Cluster, equal_digests, eventually, put, shared};
use meridian::{
    client::{Client, Reason},
    key::{NodeId, PartitionId, Replica},
    node::config::NodeConfig,
    proto::v1,
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{task::JoinHandle, time::Instant};

/// A cluster that takes a node for down soon, with rows in three partitions of three replicas.
async fn with_rows(nodes: usize) -> Cluster {
    let template = NodeConfig { down_after_ms: 2_000, ..NodeConfig::default() };
    let cluster = Cluster::on_disk_with(nodes, 3, template).await;
    cluster.create_cut("rows", &["h", "p"], 3).await;
    let mut kv = cluster.kv(0).await;
    for key in ["a", "i", "q"] {
        kv.put(put("rows", key, "kept")).await.unwrap();
    }
    cluster
}

/// Nodes with a replica of each partition, as a living node knows; none while members change.
fn placed(cluster: &Cluster) -> Option<Vec<BTreeSet<u64>>> {
    let node = cluster.dev.node(cluster.living()[0])?.node()?;
    let map = node.routing().map();
    let nodes = |partition: &meridian::placement::Partition| {
        partition.is_at_rest().then(|| partition.members.iter().map(|member| member.node.0).collect())
    };
    map.partitions().values().map(nodes).collect()
}

/// Increments through the library until it is told to stop; answers how often it was told that it worked. No error is
/// expected: its retries see to that.
fn load(client: &Client) -> (Arc<AtomicBool>, JoinHandle<i64>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, rows) = (Arc::clone(&stop), client.keyspace("rows"));
    let task = meridian::env::spawn(async move {
        let mut count = 0;
        while !stopped.load(Ordering::Relaxed) {
            for key in ["b", "j", "r"] {
                rows.increment(key, 1).await.unwrap();
                rows.get(key).await.unwrap().unwrap();
            }
            count += 1;
        }
        count
    });
    (stop, task)
}

async fn sum_is(client: &Client, stop: &AtomicBool, task: JoinHandle<i64>) {
    stop.store(true, Ordering::Relaxed);
    let count = task.await.unwrap();
    assert!(count > 0);
    for key in ["b", "j", "r"] {
        let row = client.keyspace("rows").get(key).await.unwrap().unwrap();
        assert_eq!(row.value, count.to_string().as_bytes(), "{key}: every increment once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_of_a_dead_node_are_built_anew_and_it_gives_them_up_when_it_is_back() {
    let _turn = shared().await;
    let mut cluster = with_rows(5).await;
    let client = cluster.client().await;
    let (stop, task) = load(&client);
    let partition = cluster.led("rows").await;
    let dead = cluster.index_of(partition.leader);
    let id = cluster.id_of(dead);
    // Nothing of it is held on to: its next life needs the log.
    let lost = {
        let node = cluster.dev.node(dead).unwrap().node().unwrap();
        node.partition(PartitionId(partition.id)).unwrap().group().replica()
    };
    let died = Instant::now();
    cluster.dev.kill(dead);
    eventually("replicas elsewhere", async || {
        // Five voters of five nodes: nobody can take its place in the driver's group, the first.
        placed(&cluster)?.iter().skip(1).all(|nodes| !nodes.contains(&id) && nodes.len() == 3).then_some(())
    })
    .await;
    println!("whole again {:?} after the death", died.elapsed());
    sum_is(&client, &stop, task).await;
    for partition in cluster.partitions("rows").await {
        equal_digests(&cluster, partition.id, 3).await;
    }
    cluster.dev.restart(dead).await.unwrap();
    eventually("only what the map names", async || {
        let node = cluster.dev.node(dead)?.node()?;
        let map = node.routing().map();
        let held: Vec<_> = node.partitions().iter().map(|held| (held.id, held.group().replica())).collect();
        let named = |(id, replica): &(PartitionId, Replica)| map.partition(*id)?.replicas().find(|r| r == replica);
        // Another replica of the same partition may come to it, this one does not come back.
        let replaced = held.iter().all(|(_, replica)| *replica != lost);
        (replaced && held.iter().all(|one| named(one).is_some())).then_some(())
    })
    .await;
    cluster.dev.healthy().await.unwrap();
    cluster.create_even("more", 1 << 20, v1::Layout::Ordered, 16).await;
    let more = cluster.partitions("more").await;
    let taken = more.iter().filter(|partition| partition.replicas.iter().any(|replica| replica.node == id));
    assert!(taken.count() > 0, "it takes its share again");
    cluster.dev.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_leaves_under_load_and_is_refused_when_it_comes_back() {
    let _turn = shared().await;
    let mut cluster = with_rows(4).await;
    let client = cluster.client().await;
    let leaver = cluster.index_of(cluster.led("rows").await.leader);
    let id = cluster.id_of(leaver);
    let admin = client.admin();
    let dry = admin.set_node_standing(id, v1::NodeStanding::Leaving, true).await.unwrap();
    assert!(dry.refused.is_empty() && dry.replicas > 0 && dry.leaders > 0, "{dry:?}");
    assert_eq!(dry.standing(), v1::NodeStanding::Active);
    let (stop, task) = load(&client);
    admin.set_node_standing(id, v1::NodeStanding::Leaving, false).await.unwrap();
    eventually("removed", async || {
        let now = admin.set_node_standing(id, v1::NodeStanding::Leaving, true).await.ok()?;
        (now.standing() == v1::NodeStanding::Removed).then_some(())
    })
    .await;
    sum_is(&client, &stop, task).await;
    assert!(placed(&cluster).unwrap().iter().all(|nodes| !nodes.contains(&id)));
    let node = cluster.dev.node(leaver).unwrap().node().unwrap();
    eventually("a node without replicas that knows it", async || {
        let standing = node.routing().map().node(NodeId(id))?.standing;
        let empty = node.partitions().is_empty() && node.driver_group().is_none();
        (empty && standing == meridian::placement::Standing::Removed).then_some(())
    })
    .await;
    // Three are left for three replicas.
    let next = cluster.index_of(cluster.led("rows").await.leader);
    let refused = admin.set_node_standing(cluster.id_of(next), v1::NodeStanding::Leaving, false).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NodeNeeded);
    assert!(refused.to_string().contains("2 nodes are left"), "{refused}");
    drop(node);
    cluster.dev.kill(leaver);
    cluster.dev.restart(leaver).await.unwrap();
    let refused = tokio::time::timeout(crate::support::PATIENCE, cluster.dev.failed(leaver)).await.unwrap();
    assert!(refused.to_string().contains("removed from the cluster for good"), "{refused}");
    cluster.dev.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_in_turn_is_drained_restarted_and_resumed_and_no_request_fails() {
    let _turn = shared().await;
    let mut cluster = with_rows(3).await;
    let client = cluster.client().await;
    let admin = client.admin();
    let (stop, task) = load(&client);
    for index in 0..3 {
        let id = cluster.id_of(index);
        admin.set_node_standing(id, v1::NodeStanding::Draining, false).await.unwrap();
        eventually("nothing led", async || {
            let now = admin.set_node_standing(id, v1::NodeStanding::Draining, true).await.ok()?;
            (now.leaders == 0).then_some(())
        })
        .await;
        let other = cluster.id_of((index + 1) % 3);
        let refused = admin.set_node_standing(other, v1::NodeStanding::Draining, false).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::NodeNeeded, "one at a time: {refused}");
        cluster.dev.stop_node(index).await;
        cluster.dev.restart(index).await.unwrap();
        cluster.dev.healthy().await.unwrap();
        admin.set_node_standing(id, v1::NodeStanding::Active, false).await.unwrap();
    }
    sum_is(&client, &stop, task).await;
    cluster.dev.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_stopped_hands_over_what_it_leads_first() {
    let _turn = shared().await;
    let mut cluster = with_rows(3).await;
    let leader = cluster.index_of(cluster.led("rows").await.leader);
    let id = NodeId(cluster.id_of(leader));
    let node = cluster.dev.node(leader).unwrap().node().unwrap();
    cluster.dev.node(leader).unwrap().hand_over().await;
    for partition in node.partitions() {
        assert!(!partition.group().is_leader());
        assert!(partition.group().leadership().leader.is_some_and(|leader| leader.node != id), "somebody else does");
    }
    drop(node);
    cluster.dev.stop_node(leader).await;
    cluster.dev.restart(leader).await.unwrap();
    cluster.dev.healthy().await.unwrap();
    cluster.dev.stop().await;
}
