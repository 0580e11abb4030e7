//! A node that comes later takes its share, leaders return to where they are preferred, and then all is calm; and the
//! cluster says why.

use crate::support::{Cluster, alone, eventually};
use meridian::proto::v1;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep};

/// Longest time that moving may take: two replicas at a time, after nodes have been steady.
const MOVED_WITHIN: Duration = Duration::from_secs(90);
/// Calm for so long is calm.
const CALM: Duration = Duration::from_secs(15);

async fn keyspace(cluster: &Cluster, name: &str) -> v1::GetKeyspaceReply {
    let mut admin = cluster.admin(cluster.living()[0]).await;
    admin.get_keyspace(v1::GetKeyspaceRequest { name: name.into() }).await.unwrap().into_inner()
}

/// Bytes on the fullest node in shares of the mean of so many nodes; none while loads are not known.
fn max_over_mean(reply: &v1::GetKeyspaceReply, nodes: usize) -> Option<f64> {
    let mut held: BTreeMap<u64, u64> = BTreeMap::new();
    for (partition, status) in reply.partitions.iter().zip(&reply.statuses) {
        for replica in &partition.replicas {
            *held.entry(replica.node).or_default() += status.load?.bytes;
        }
    }
    let sum: u64 = held.values().sum();
    Some(*held.values().max()? as f64 * nodes as f64 / sum as f64)
}

/// Waits for what the balancer has to do, longer than for anything else.
async fn in_time<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < MOVED_WITHIN, "in vain: {what}");
        sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_later_takes_its_share_and_calm_returns() {
    let _turn = alone().await;
    let mut cluster = Cluster::on_disk(4, 3).await;
    let late = (0..4).rev().find(|index| cluster.id_of(*index) != 1).unwrap();
    let late_id = cluster.id_of(late);
    cluster.dev.kill(late);
    let first = cluster.living()[0];
    eventually("the node is missed", async || {
        let status = cluster.admin(first).await.cluster_status(v1::ClusterStatusRequest {}).await.unwrap().into_inner();
        status.nodes.iter().any(|node| node.id == late_id && !node.alive).then_some(())
    })
    .await;
    cluster.create_even("wide", 0, v1::Layout::Hashed, 12).await;
    let client = cluster.client().await;
    let value = "v".repeat(8 << 10);
    for i in 0..600 {
        client.keyspace("wide").put(format!("key{i:05}"), value.clone()).await.unwrap();
    }
    let before = keyspace(&cluster, "wide").await;
    assert!(before.partitions.iter().all(|partition| partition.replicas.iter().all(|replica| replica.node != late_id)));

    cluster.dev.restart(late).await.unwrap();
    let share = in_time("the late node has its share", async || {
        let now = keyspace(&cluster, "wide").await;
        let even = max_over_mean(&now, 4).is_some_and(|most| most <= 1.25);
        let calm = now.statuses.iter().all(|status| status.state == "active");
        let of = |partition: &&v1::Partition| partition.replicas.iter().any(|replica| replica.node == late_id);
        let held = now.partitions.iter().filter(of).count();
        (even && calm && held >= 7).then_some(held)
    })
    .await;
    assert!(share <= 11, "{share} of 36 replicas, 9 are ideal");

    let asked = before.partitions[0].id;
    let why = in_time("a decision is remembered", async || {
        let mut found = None;
        for partition in &before.partitions {
            let request = v1::ExplainPartitionRequest { partition: partition.id };
            let told = cluster.admin(first).await.explain_partition(request).await.unwrap().into_inner();
            assert_eq!(told.keyspace, "wide");
            found = told.decisions.into_iter().find(|decision| decision.why.contains("moves to")).or(found);
        }
        found
    })
    .await;
    assert_eq!(why.result, "done", "{why:?}");

    // Two members lost of those of the first partition: it would lack its quorum.
    let members: Vec<u64> = keyspace(&cluster, "wide").await.partitions[0].replicas.iter().map(|r| r.node).collect();
    let if_lost = members[..2].to_vec();
    let found = cluster.admin(first).await.diagnose(v1::DiagnoseRequest { if_lost }).await.unwrap().into_inner();
    assert!(found.without_quorum.contains(&asked), "{found:?}");
    assert!(found.problems.iter().any(|problem| problem.contains("EVENTUAL reads only")), "{found:?}");

    // Replicas come preferred leader first. Whoever is preferred may change once more; then nothing moves any more.
    let mut last = (Vec::new(), Instant::now());
    in_time("leaders are where they are preferred, and stay", async || {
        let now = keyspace(&cluster, "wide").await.partitions;
        let at_home = now.iter().all(|partition| partition.leader == partition.replicas[0].node);
        if now != last.0 {
            last = (now, Instant::now());
        }
        (at_home && last.1.elapsed() >= CALM).then_some(())
    })
    .await;
    let read = client.keyspace("wide").get("key00007").await.unwrap();
    assert_eq!(read.map(|row| row.value.len()), Some(value.len()));
}
