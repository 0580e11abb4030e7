//! More than there is room for: what is refused was not applied and says when to come back, what was let in is applied,
//! deletes and reads go on, no leader changes, and when it is over it is over.

use crate::support::{Cluster, PATIENCE, eventually, get, keys_of, level, pages, put, refusal, scan, shared};
use meridian::{
    client::{Outcome, Reason},
    error::Error,
    key::PartitionId,
    node::config::{BudgetSettings, NodeConfig, RaftTimings, bounds},
    proto::{error_of, v1},
};
use tokio::time::Instant;
use v1::request::Op;

/// Writes that a node lets in, half of them of one partition.
const WRITES_MAX: u64 = 16;
/// Writes sent in one message: many times what fits.
const OFFERED: usize = 600;
const ROUNDS: usize = 20;

fn delete(key: &str) -> v1::DeleteRequest {
    v1::DeleteRequest { keyspace: "rows".into(), key: key.to_owned().into(), ..Default::default() }
}

/// The terms in which the partition is led, as each replica knows.
fn terms(cluster: &Cluster, partition: u64) -> Vec<u64> {
    let term = |index| {
        let node = cluster.dev.node(index)?.node()?;
        Some(node.partition(PartitionId(partition))?.group().leadership().term)
    };
    cluster.living().into_iter().filter_map(term).collect()
}

#[track_caller]
fn is_refused(error: &Error, reason: Reason) {
    assert_eq!((error.reason, error.outcome), (reason, Some(Outcome::NotApplied)), "{error}");
    assert!((10..=2_000).contains(&error.retry_after_ms), "{error:?}");
    assert!(error.metadata.iter().any(|(name, _)| name == "budget"), "{error:?}");
    assert!(error.message.contains("deletes and reads go on"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_times_what_fits_is_refused_and_the_rest_goes_on() {
    let _turn = shared().await;
    let budgets = BudgetSettings { writes_max: WRITES_MAX, ..BudgetSettings::default() };
    let cluster = Cluster::on_disk_with(3, 3, NodeConfig { budgets, ..NodeConfig::default() }).await;
    cluster.create_cut("rows", &[], 3).await;
    let partition = cluster.followed("rows").await;
    let mut pipe = cluster.pipe(cluster.index_of(partition.leader)).await;
    let mut kv = cluster.kv(0).await;
    kv.put(put("rows", "kept", "v")).await.unwrap();
    let before = terms(&cluster, partition.id);

    let (mut applied, mut refused) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let keys: Vec<String> = (0..OFFERED).map(|n| format!("{round}/{n}")).collect();
        let mut ops: Vec<Op> = keys.iter().map(|key| Op::Put(put("rows", key, "v"))).collect();
        // Where the room has long been used up.
        ops.insert(OFFERED / 2, Op::Delete(delete(&format!("{}/0", round.wrapping_sub(1)))));
        ops.push(Op::Get(get("rows", "kept", None)));
        let mut answers = pipe.together(partition.id, ops).await;
        answers.pop().unwrap().unwrap();
        answers.remove(OFFERED / 2).unwrap();
        for (key, answer) in keys.into_iter().zip(answers) {
            match answer {
                Ok(_) => applied.push(key),
                Err(error) => {
                    is_refused(&Error::from(error), Reason::Overloaded);
                    refused.push(key);
                }
            }
        }
    }
    assert!(refused.len() > ROUNDS * OFFERED / 2, "only {} were refused", refused.len());
    assert!(applied.len() >= ROUNDS * WRITES_MAX as usize / 2, "only {} were let in", applied.len());

    // It is over: the very next one has room.
    kv.put(put("rows", "after", "v")).await.unwrap();
    let found: Vec<String> = (0..ROUNDS - 1).map(|round| format!("{round}/0")).collect();
    applied.retain(|key| !found.contains(key));
    applied.extend(["kept".to_owned(), "after".to_owned()]);
    let mut there = keys_of(&pages(&mut kv, scan("rows", None)).await.unwrap());
    applied.sort();
    there.sort();
    assert_eq!(there, applied, "what was let in is there but for what was deleted, and nothing else");
    assert_eq!(terms(&cluster, partition.id), before, "a leader has changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_memory_takes_deletes_and_clears_by_itself() {
    let _turn = shared().await;
    let budgets = BudgetSettings { memory_bytes_max: Some(bounds::MEMORY_BYTES_MIN), ..BudgetSettings::default() };
    let raft = RaftTimings { snapshot_bytes: 32 << 10, log_keep_bytes: 4 << 10, ..RaftTimings::default() };
    let cluster = Cluster::on_disk_with(3, 3, NodeConfig { budgets, raft, ..NodeConfig::default() }).await;
    cluster.create_cut("rows", &[], 3).await;
    let partition = cluster.followed("rows").await;
    let before = terms(&cluster, partition.id);
    let mut kv = cluster.kv(0).await;
    let value = "v".repeat(20_000);
    let mut rows = 0;
    let deadline = Instant::now() + PATIENCE;
    let full = loop {
        match kv.put(put("rows", &format!("{rows:06}"), &value)).await {
            Ok(_) => rows += 1,
            Err(status) => break status,
        }
        assert!(Instant::now() < deadline, "{rows} rows fit");
    };
    assert_eq!(full.code(), tonic::Code::ResourceExhausted);
    let full = error_of(&full);
    is_refused(&full, Reason::MemoryFull);
    assert!(full.retry_after_ms >= 1_000 && full.message.contains("memory.bytes_max"), "{full:?}");

    // The library says so at once, and does not wait for somebody to delete.
    let client = cluster.client().await;
    let refused = client.keyspace("rows").put("more", value.clone()).await.unwrap_err();
    assert_eq!((refused.reason(), refused.maybe_applied()), (Reason::MemoryFull, false));
    // Reads and deletes go on, and a batch that only deletes; one that writes, too, does not.
    kv.get(get("rows", "000000", level(v1::Consistency::Linearizable))).await.unwrap();
    kv.delete(delete("000000")).await.unwrap();
    let item = |op| v1::BatchItem { op: Some(op) };
    let batch = |items| v1::BatchRequest { keyspace: "rows".into(), items, atomic: true, ..Default::default() };
    let less = item(v1::batch_item::Op::Delete(v1::DeleteRequest { key: "000001".into(), ..Default::default() }));
    let more = item(v1::batch_item::Op::Put(v1::PutRequest { key: "x".into(), ..Default::default() }));
    kv.write(batch(vec![less.clone()])).await.unwrap();
    is_refused(&refusal(kv.write(batch(vec![less, more])).await), Reason::MemoryFull);

    let everything = v1::DeleteRangeRequest { keyspace: "rows".into(), ..Default::default() };
    let deleted = kv.delete_range(everything).await.unwrap().into_inner().deleted;
    assert_eq!(deleted, rows - 2);
    eventually("room again", async || {
        // What the log holds goes with the next snapshot: further deletes are enough to bring it about.
        let _existed = kv.delete(delete(&"x".repeat(1_000))).await.unwrap();
        kv.put(put("rows", "after", "v")).await.ok()
    })
    .await;
    assert_eq!(terms(&cluster, partition.id), before, "a leader has changed");
}
