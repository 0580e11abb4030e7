//! Exactly once: the same write sent again, by whatever way and whoever leads, is applied once and answered again.

use crate::support::{Cluster, get, increment, put, reason, refusal, shared};
use meridian::{
    client::{Outcome, Reason},
    proto::v1,
};
use std::collections::BTreeMap;
use tonic::transport::Channel;
use v1::kv_client::KvClient;

/// A write session as a user of any language keeps it.
struct Writer {
    opened: v1::OpenSessionReply,
}

impl Writer {
    async fn open(kv: &mut KvClient<Channel>) -> Self {
        let opened = kv.open_session(v1::OpenSessionRequest {}).await.unwrap().into_inner();
        assert_eq!(opened.client_id.len(), 16);
        Self { opened }
    }

    fn at(&self, sequence: u64, acknowledged_below: u64) -> Option<v1::WriteSession> {
        let (client_id, opened) = (self.opened.client_id.clone(), self.opened.opened);
        Some(v1::WriteSession { client_id, opened, sequence, acknowledged_below })
    }

    fn add(&self, sequence: u64, delta: i64) -> v1::IncrementRequest {
        v1::IncrementRequest { session: self.at(sequence, 1), ..increment("once", "n", delta) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_sequence_through_other_nodes_and_after_the_leaders_death_is_applied_once() {
    let _turn = shared().await;
    let mut cluster = Cluster::on_disk(3, 3).await;
    cluster.create_cut("once", &[], 3).await;
    let writer = Writer::open(&mut cluster.kv(0).await).await;
    let first = cluster.kv(0).await.increment(writer.add(1, 5)).await.unwrap().into_inner();
    assert_eq!((first.number, first.info.as_ref().unwrap().replayed), (Some(5), false));
    let again = async |cluster: &Cluster, what: &str| {
        for index in cluster.living() {
            let reply = cluster.kv(index).await.increment(writer.add(1, 5)).await.unwrap().into_inner();
            let (now, then) = (reply.info.as_ref().unwrap(), first.info.as_ref().unwrap());
            assert!(now.replayed, "{what}, through node {index}: applied again");
            assert_eq!((reply.number, reply.version, reply.applied), (first.number, first.version, true), "{what}");
            assert!(now.log_index > then.log_index, "{what}: the index is that of this answer");
        }
    };
    again(&cluster, "at once").await;
    let dead = cluster.kill_leader("once").await;
    again(&cluster, "after the leader's death").await;
    cluster.dev.restart(dead).await.unwrap();
    cluster.dev.healthy().await.unwrap();
    let dead = cluster.kill_leader("once").await;
    again(&cluster, "after the next leader's death").await;
    cluster.dev.restart(dead).await.unwrap();
    cluster.dev.healthy().await.unwrap();
    let row = cluster.kv(0).await.get(get("once", "n", None)).await.unwrap().into_inner().row.unwrap();
    assert_eq!((&row.value[..], row.version), (&b"5"[..], first.version), "one increment, one version");
    // A sequence of the same session that was never sent is new.
    let second = cluster.kv(1).await.increment(writer.add(2, 1)).await.unwrap().into_inner();
    assert_eq!((second.number, second.info.unwrap().replayed), (Some(6), false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_write_is_answered_again_and_not_applied_again() {
    let _turn = shared().await;
    let mut cluster = Cluster::start(3, 3).await;
    cluster.create_cut("once", &[], 3).await;
    let mut kv = cluster.kv(0).await;
    let writer = Writer::open(&mut kv).await;
    kv.put(put("once", "old", "was here")).await.unwrap();
    let put = v1::PutRequest {
        session: writer.at(1, 1),
        return_previous: true,
        condition: Some(v1::Condition { must: Some(v1::condition::Must::Absent(true)) }),
        ..put("once", "a", "1")
    };
    let unmet = v1::PutRequest { session: writer.at(2, 1), key: "old".into(), ..put.clone() };
    let delete = v1::DeleteRequest {
        keyspace: "once".into(),
        key: "old".into(),
        must_exist: true,
        session: writer.at(3, 1),
        ..Default::default()
    };
    let item = |key: &str| v1::IncrementRequest { session: None, ..increment("", key, 2) };
    let items = ["x", "y"].map(|key| v1::BatchItem { op: Some(v1::batch_item::Op::Increment(item(key))) });
    let batch =
        v1::BatchRequest { keyspace: "once".into(), items: items.into(), atomic: true, session: writer.at(4, 1) };
    let range = crate::support::between((b"x", true), (b"z", false));
    let ranged = v1::DeleteRangeRequest { keyspace: "once".into(), range, session: writer.at(5, 1) };
    let mut answers = Vec::new();
    for round in 0..3 {
        if round == 2 {
            cluster.kill_leader("once").await;
        }
        let mut kv = cluster.kv(*cluster.living().last().unwrap()).await;
        let replayed = |info: &v1::WriteInfo| assert_eq!(info.replayed, round > 0, "round {round}");
        let a = kv.put(put.clone()).await.unwrap().into_inner();
        replayed(a.info.as_ref().unwrap());
        let b = kv.put(unmet.clone()).await.unwrap().into_inner();
        replayed(b.info.as_ref().unwrap());
        let c = kv.delete(delete.clone()).await.unwrap().into_inner();
        replayed(c.info.as_ref().unwrap());
        let d = kv.write(batch.clone()).await.unwrap().into_inner();
        let numbers: Vec<_> = d.items.iter().map(number_of).collect();
        let e = kv.delete_range(ranged.clone()).await.unwrap().into_inner();
        replayed(&e.infos[0]);
        answers
            .push((a.applied, a.version, a.previous, b.applied, b.previous, c.existed, d.applied, numbers, e.deleted));
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
    let (a, _, _, b, previous, existed, d, numbers, deleted) = &answers[0];
    assert!(*a && !*b && *existed && *d);
    assert_eq!(&previous.as_ref().unwrap().value[..], b"was here");
    assert_eq!((numbers, deleted), (&vec![Some(2), Some(2)], &2));
}

fn number_of(item: &v1::BatchItemReply) -> Option<i64> {
    match &item.result {
        Some(v1::batch_item_reply::Result::Write(write)) => write.number,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_with_other_content_or_already_forgotten_is_refused_and_never_guessed() {
    let _turn = shared().await;
    let cluster = Cluster::start(3, 3).await;
    cluster.create_cut("once", &[], 3).await;
    let mut kv = cluster.kv(1).await;
    let writer = Writer::open(&mut kv).await;
    kv.increment(writer.add(7, 5)).await.unwrap();
    let reused = refusal(kv.increment(writer.add(7, 6)).await);
    assert_eq!((reused.reason, reused.outcome), (Reason::SequenceReused, Some(Outcome::NotApplied)));
    let other_key = v1::IncrementRequest { session: writer.at(7, 1), ..increment("once", "m", 5) };
    assert_eq!(reason(kv.increment(other_key).await), Reason::SequenceReused);
    let replayed = kv.increment(writer.add(7, 5)).await.unwrap().into_inner();
    assert!(replayed.info.unwrap().replayed, "the refusals have not harmed the answer");
    // "All below 9 is answered" lets the partition forget, and then it refuses.
    let next = v1::IncrementRequest { session: writer.at(9, 9), ..increment("once", "n", 1) };
    assert_eq!(kv.increment(next).await.unwrap().into_inner().number, Some(6));
    for sequence in [7, 8] {
        let late = refusal(kv.increment(writer.add(sequence, 5)).await);
        assert_eq!(late.reason, Reason::SessionExpired, "sequence {sequence}");
    }
    for (session, field) in [
        (v1::WriteSession { sequence: 0, ..writer.at(1, 1).unwrap() }, "session.sequence"),
        (v1::WriteSession { client_id: vec![1, 2, 3].into(), ..writer.at(1, 1).unwrap() }, "session.client_id"),
    ] {
        let malformed = v1::IncrementRequest { session: Some(session), ..increment("once", "n", 1) };
        let refused = refusal(kv.increment(malformed).await);
        assert_eq!((refused.reason, &*refused.field), (Reason::InvalidField, field));
        assert_eq!(refused.outcome, Some(Outcome::NotApplied));
    }
    let row = kv.get(get("once", "n", None)).await.unwrap().into_inner().row.unwrap();
    assert_eq!(row.value, "6", "5 and 1, each once");
}

/// The library repeats writes by itself, under sessions of its own: counters end exactly where they should.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn increments_of_the_library_beside_dying_leaders_are_counted_once_each() {
    const WRITERS: usize = 8;
    let _turn = shared().await;
    let mut cluster = Cluster::on_disk(3, 3).await;
    cluster.create_cut("once", &[], 3).await;
    let client = cluster.client().await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (once, stopped) = (client.keyspace("once"), stopped.clone());
        writers.spawn(async move {
            let (key, mut applied) = (format!("counter {writer}"), 0);
            while !*stopped.borrow() {
                // Longer than any election, so that nothing ends unknown.
                let written = once.increment(&key, 1).deadline(crate::support::PATIENCE).await.unwrap();
                applied += 1;
                assert_eq!(written.number, Some(applied), "{key}: an increment was lost or applied twice");
            }
            (key, applied)
        });
    }
    for _ in 0..2 {
        let dead = cluster.kill_leader("once").await;
        cluster.led("once").await;
        cluster.dev.restart(dead).await.unwrap();
        cluster.dev.healthy().await.unwrap();
    }
    stop.send(true).unwrap();
    let mut totals = BTreeMap::new();
    while let Some(done) = writers.join_next().await {
        let (key, applied) = done.unwrap();
        totals.insert(key, applied);
    }
    assert_eq!(totals.len(), WRITERS);
    for (key, applied) in totals {
        let row = client.keyspace("once").get(&key).await.unwrap().unwrap();
        assert_eq!(row.value, applied.to_string(), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_of_a_key_only_go_up_while_leaders_change() {
    let _turn = shared().await;
    let mut cluster = Cluster::on_disk(3, 3).await;
    cluster.create_cut("rows", &[], 3).await;
    let mut highest = BTreeMap::new();
    let mut terms = Vec::new();
    for round in 0..4 {
        for index in cluster.living() {
            let mut kv = cluster.kv(index).await;
            for key in ["a", "b"] {
                let written = kv.put(put("rows", key, &round.to_string())).await.unwrap().into_inner();
                let before = highest.insert(key, written.version).unwrap_or(0);
                assert!(written.version > before, "{key} went from {before} to {}", written.version);
                let row = kv.get(get("rows", key, None)).await.unwrap().into_inner().row.unwrap();
                assert_eq!(row.version, written.version, "the row has the version that its writer was told");
                terms.push(written.info.unwrap().term);
            }
        }
        let deleted = v1::DeleteRequest { keyspace: "rows".into(), key: "b".into(), ..Default::default() };
        cluster.kv(cluster.living()[0]).await.delete(deleted).await.unwrap();
        let dead = cluster.kill_leader("rows").await;
        cluster.led("rows").await;
        cluster.dev.restart(dead).await.unwrap();
        cluster.dev.healthy().await.unwrap();
    }
    assert!(terms.is_sorted() && terms.first() < terms.last(), "leaders have changed: {terms:?}");
}
