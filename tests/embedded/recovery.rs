//! Partitions whose quorum is lost for good, and somebody who accepts the loss of data.

use crate::support::{Cluster, equal_digests, eventually, get, increment, level, put, reason, refusal, shared};
use meridian::{
    client::Reason,
    key::{PartitionId, ReplicaId},
    proto::v1::{self, Consistency as Level},
};
use std::collections::BTreeSet;

/// Rows that all replicas have.
const EARLY: usize = 20;
/// Rows that the last of them may have missed.
const LATE: usize = 50;

fn recover(partition: u64, accept_data_loss: bool, from: u64) -> v1::RecoverPartitionRequest {
    v1::RecoverPartitionRequest { partition, accept_data_loss, from }
}

/// What `partition why` tells of the recovery.
async fn audit(cluster: &Cluster, partition: u64) -> v1::Decision {
    eventually("a record of what was done", async || {
        let mut admin = cluster.admin(*cluster.living().last()?).await;
        let told = admin.explain_partition(v1::ExplainPartitionRequest { partition }).await.ok()?.into_inner();
        told.decisions.into_iter().find(|decision| decision.what.contains("without a quorum"))
    })
    .await
}

/// Kills the leader of the only partition and one follower; answers with their places and that of the one that is left.
async fn kill_quorum(cluster: &mut Cluster) -> (Vec<usize>, usize) {
    let partition = cluster.led("rows").await;
    let (leader, mut others): (Vec<u64>, Vec<u64>) =
        partition.replicas.iter().map(|replica| replica.node).partition(|node| *node == partition.leader);
    let left = cluster.index_of(others.pop().unwrap());
    let lost: Vec<usize> = leader.into_iter().chain(others).map(|id| cluster.index_of(id)).collect();
    for index in &lost {
        cluster.dev.kill(*index);
    }
    (lost, left)
}

/// Says what would be done, once it is sure that there is no quorum. Nothing changes.
async fn rehearse(cluster: &Cluster, partition: u64) -> v1::RecoverPartitionReply {
    let before = cluster.partitions("rows").await;
    let said = eventually("no quorum", async || {
        let mut admin = cluster.admin(cluster.living()[0]).await;
        Some(admin.recover_partition(recover(partition, false, 0)).await.ok()?.into_inner())
    })
    .await;
    assert!(!said.recovered);
    let now = cluster.partitions("rows").await;
    assert_eq!((&now[0].replicas, now[0].epoch), (&before[0].replicas, before[0].epoch), "nothing was changed");
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_without_a_quorum_goes_on_from_the_replica_that_is_left() {
    let _turn = shared().await;
    let mut cluster = Cluster::on_disk(5, 3).await;
    cluster.create_cut("rows", &[], 3).await;
    let before = cluster.led("rows").await;
    let (id, mut kv) = (before.id, cluster.kv(cluster.index_of(before.leader)).await);
    for n in 0..EARLY {
        kv.put(put("rows", &format!("early{n:02}"), "kept")).await.unwrap();
    }
    let v1::OpenSessionReply { client_id, opened } =
        kv.open_session(v1::OpenSessionRequest {}).await.unwrap().into_inner();
    let session = Some(v1::WriteSession { client_id, opened, sequence: 1, acknowledged_below: 1 });
    let counted = v1::IncrementRequest { session, ..increment("rows", "n", 5) };
    let first = kv.increment(counted.clone()).await.unwrap().into_inner();
    equal_digests(&cluster, id, 3).await;
    let refused = refusal(cluster.admin(0).await.recover_partition(recover(id, true, 0)).await);
    assert_eq!(refused.reason, Reason::InvalidField);
    assert!(refused.message.contains("are in contact"), "{}", refused.message);
    for n in 0..LATE {
        kv.put(put("rows", &format!("late{n:02}"), "perhaps")).await.unwrap();
    }
    let (lost, left) = kill_quorum(&mut cluster).await;
    let mut kv = cluster.kv(left).await;
    eventually("no write", async || {
        (reason(kv.put(put("rows", "early00", "new")).await) == Reason::NoQuorum).then_some(())
    })
    .await;
    let survivor = cluster.id_of(left);
    let said = rehearse(&cluster, id).await;
    assert_eq!(said.survivor, survivor);
    assert_eq!(said.replicas.iter().filter(|replica| replica.runs).count(), 1, "{said:?}");
    assert!(said.losses.iter().any(|loss| loss.contains("are lost")), "{said:?}");
    let mut admin = cluster.admin(left).await;
    let problems = admin.diagnose(v1::DiagnoseRequest::default()).await.unwrap().into_inner().problems;
    assert!(problems.iter().any(|problem| problem.contains("partition recover")), "{problems:?}");
    for (partition, from, why) in
        [(99, 0, "no partition"), (0, 0, "placement driver"), (id, cluster.id_of(lost[0]), "no replica of it runs")]
    {
        let refused = refusal(admin.recover_partition(recover(partition, true, from)).await);
        assert!(refused.message.contains(why), "{}", refused.message);
    }

    let done = admin.recover_partition(recover(id, true, 0)).await.unwrap().into_inner();
    assert_eq!((done.recovered, done.survivor), (true, survivor));
    holds_what_was_left(&cluster, &counted, &first).await;
    let decision = audit(&cluster, id).await;
    assert!(decision.what.contains(&format!("n{survivor} alone")), "{decision:?}");
    gives_up(&mut cluster, &before, &lost).await;
    for index in 0..5 {
        cluster.dev.kill(index);
    }
    for index in 0..5 {
        cluster.dev.restart(index).await.unwrap();
    }
    assert_eq!(audit(&cluster, id).await, decision, "it is kept for good");
    cluster.dev.stop().await;
}

/// Every level answers again, of the late rows the first ones are there, and what was applied is not applied again.
async fn holds_what_was_left(cluster: &Cluster, counted: &v1::IncrementRequest, first: &v1::WriteReply) {
    let old = first.info.clone().unwrap();
    for index in cluster.living() {
        let mut kv = cluster.kv(index).await;
        for n in 0..EARLY {
            let row = kv.get(get("rows", &format!("early{n:02}"), None)).await.unwrap().into_inner().row;
            assert_eq!(row.unwrap().value, "kept");
        }
        let again = kv.increment(counted.clone()).await.unwrap().into_inner();
        let now = again.info.unwrap();
        assert_eq!((now.replayed, again.number, again.version), (true, Some(5), first.version));
        assert!(now.log_index > old.log_index, "{now:?}");
        let options = v1::ReadOptions { session_token: old.session_token.clone(), ..level(Level::Session).unwrap() };
        let seen = kv.get(get("rows", "n", Some(options))).await.unwrap().into_inner();
        assert_eq!(seen.row.unwrap().value, "5");
    }
    let mut kv = cluster.kv(cluster.living()[0]).await;
    let mut there = Vec::new();
    for n in 0..LATE {
        let reply = kv.get(get("rows", &format!("late{n:02}"), None)).await.unwrap().into_inner();
        there.push(reply.row.is_some());
    }
    assert!(there.is_sorted_by(|one, next| one >= next), "a prefix of what was written: {there:?}");
    println!("{} of {LATE} late rows are there", there.iter().filter(|is| **is).count());
    let new = kv.put(put("rows", "early00", "new")).await.unwrap().into_inner();
    assert!(new.applied && new.version > first.version);
}

/// Replicas are built anew, and nodes that come back after all have nothing of the old ones.
async fn gives_up(cluster: &mut Cluster, before: &v1::Partition, lost: &[usize]) {
    equal_digests(cluster, before.id, 3).await;
    for index in lost {
        cluster.dev.restart(*index).await.unwrap();
    }
    let old: BTreeSet<ReplicaId> = before.replicas.iter().map(|replica| ReplicaId(replica.replica)).collect();
    eventually("no old replica anywhere", async || {
        let now = cluster.partitions("rows").await.remove(0);
        let old_named = now.replicas.iter().any(|replica| old.contains(&ReplicaId(replica.replica)));
        let gone = |index: usize| {
            let node = cluster.dev.node(index)?.node()?;
            let held = node.partition(PartitionId(before.id)).map(|held| held.group().replica().id);
            // Its map is as new, so that what it has is what it keeps.
            let knows = node.routing().map().partition(PartitionId(before.id))?.epoch.members > before.epoch?.members;
            (knows && held.is_none_or(|held| !old.contains(&held))).then_some(())
        };
        let all_gone = (0..5).all(|index| gone(index).is_some());
        (all_gone && !old_named && now.replicas.len() == 3).then_some(())
    })
    .await;
    equal_digests(cluster, before.id, 3).await;
    let mut kv = cluster.kv(lost[0]).await;
    let row = kv.get(get("rows", "early00", None)).await.unwrap().into_inner().row;
    assert_eq!(row.unwrap().value, "new", "also through a node that was away");
}
