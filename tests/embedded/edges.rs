//! Edge cases, each with its documented answer.

use crate::support::{Cluster, between, get, increment, keys_of, level, pages, put, reason, refusal, scan, shared};
use bytes::Bytes;
use meridian::{
    client::{Outcome, Reason},
    error::Error,
    proto::{batch::Requests, error_of, v1},
};
use std::time::Duration;
use tonic::{Code, transport::Channel};
use v1::{admin_client::AdminClient, kv_client::KvClient, reply, request::Op};

/// Three nodes, and clients of the second one.
async fn three() -> (Cluster, KvClient<Channel>, AdminClient<Channel>) {
    let cluster = Cluster::start(3, 3).await;
    let (kv, admin) = (cluster.kv(1).await, cluster.admin(1).await);
    (cluster, kv, admin)
}

#[track_caller]
fn assert_not_applied(error: &Error, reason: Reason) {
    assert_eq!((error.reason, error.outcome), (reason, Some(Outcome::NotApplied)), "{error}");
}

fn put_bytes(key: impl Into<Bytes>, value: impl Into<Bytes>) -> v1::PutRequest {
    v1::PutRequest { key: key.into(), value: value.into(), ..Default::default() }
}

fn get_bytes(key: impl Into<Bytes>) -> v1::GetRequest {
    v1::GetRequest { key: key.into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_empty_key_and_keys_of_any_bytes_are_keys_like_others() {
    let _turn = shared().await;
    let (_cluster, mut kv, _) = three().await;
    let keys: [&[u8]; 7] = [b"", b"\0", b"\0\0", b"a\0b", b"\xfe\xff", b"\xff", b"\xff\xff\xff"];
    for key in keys {
        assert!(kv.put(put_bytes(key, key)).await.unwrap().into_inner().applied);
        let row = kv.get(get_bytes(key)).await.unwrap().into_inner().row.unwrap();
        assert_eq!((&row.key[..], &row.value[..]), (key, key));
    }
    let all = kv.scan(scan("", None)).await.unwrap().into_inner().rows;
    assert_eq!(all.iter().map(|row| &row.key[..]).collect::<Vec<_>>(), keys);
    let page = kv.scan(scan("", between((b"", true), (b"\0", true)))).await.unwrap().into_inner();
    assert_eq!(page.rows.iter().map(|row| &row.key[..]).collect::<Vec<_>>(), [&b""[..], b"\0"]);
    let page = kv.scan(scan("", between((b"", false), (b"\0", true)))).await.unwrap().into_inner();
    assert_eq!(page.rows.len(), 1, "the empty key may be left out of a range");
    for key in keys {
        let key = Bytes::copy_from_slice(key);
        let deleted = kv.delete(v1::DeleteRequest { key, ..Default::default() }).await.unwrap().into_inner();
        assert!(deleted.existed);
    }
    assert!(kv.scan(scan("", None)).await.unwrap().into_inner().rows.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_4_kib_and_values_of_1_mib_fit_and_one_byte_more_is_refused() {
    let _turn = shared().await;
    let (cluster, mut kv, _) = three().await;
    let (key, long) = (vec![0xff; 4 << 10], vec![0xff; (4 << 10) + 1]);
    let (value, large) = (vec![b'v'; 1 << 20], vec![b'v'; (1 << 20) + 1]);
    assert!(kv.put(put_bytes(key.clone(), value.clone())).await.unwrap().into_inner().applied);
    let row = kv.get(get_bytes(key.clone())).await.unwrap().into_inner().row.unwrap();
    assert!(row.key == key && row.value == value);
    let page = kv.scan(scan("", between((&key, true), (&key, true)))).await.unwrap().into_inner();
    assert_eq!(page.rows.len(), 1, "the longest key may be a bound");
    let refused = refusal(kv.put(put_bytes(long.clone(), "v")).await);
    assert_not_applied(&refused, Reason::KeyTooLarge);
    assert_eq!(&*refused.field, "key");
    assert!(refused.metadata.iter().any(|(name, value)| name == "limit" && value == "4096"), "{refused:?}");
    assert_eq!(reason(kv.get(get_bytes(long.clone())).await), Reason::KeyTooLarge);
    let delete = v1::DeleteRequest { key: long.clone().into(), ..Default::default() };
    assert_not_applied(&refusal(kv.delete(delete).await), Reason::KeyTooLarge);
    let add = v1::IncrementRequest { key: long.clone().into(), delta: 1, ..Default::default() };
    assert_not_applied(&refusal(kv.increment(add).await), Reason::KeyTooLarge);
    let refused = refusal(kv.put(put_bytes("k", large.clone())).await);
    assert_not_applied(&refused, Reason::ValueTooLarge);
    assert!(refused.metadata.iter().any(|(name, value)| name == "limit" && value == "1048576"), "{refused:?}");
    assert!(!kv.get(get_bytes("k")).await.unwrap().into_inner().found);
    // The library says the same.
    let rows = cluster.client().await.keyspace("default");
    let refused = rows.put(&long[..], "v").await.unwrap_err();
    assert_eq!((refused.reason(), refused.outcome()), (Reason::KeyTooLarge, Some(Outcome::NotApplied)));
    assert!(!refused.is_retryable() && !refused.maybe_applied());
    assert_eq!(rows.put("k", &large[..]).await.unwrap_err().reason(), Reason::ValueTooLarge);
    assert_eq!(rows.get(&key[..]).await.unwrap().unwrap().value.len(), 1 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inverted_ranges_are_refused_and_equal_or_empty_ones_are_empty() {
    let _turn = shared().await;
    let (_cluster, mut kv, _) = three().await;
    kv.put(put("", "b", "v")).await.unwrap();
    let inverted = between((b"c", true), (b"a", true));
    let error = refusal(kv.scan(scan("", inverted.clone())).await);
    assert_eq!((error.reason, &*error.field), (Reason::RangeInverted, "range"));
    assert!(error.message.contains('c') && error.message.contains('a'), "both ends are shown: {error}");
    let backwards = v1::ScanRequest { order: v1::Order::Descending as i32, ..scan("", inverted.clone()) };
    assert_eq!(reason(kv.scan(backwards).await), Reason::RangeInverted, "descending does not turn the bounds round");
    let stream = pages(&mut kv, scan("", inverted.clone())).await.unwrap_err();
    assert_eq!(error_of(&stream).reason, Reason::RangeInverted);
    let count = v1::CountRequest { range: inverted.clone(), ..Default::default() };
    assert_eq!(reason(kv.count(count).await), Reason::RangeInverted);
    let delete = v1::DeleteRangeRequest { range: inverted, ..Default::default() };
    assert_not_applied(&refusal(kv.delete_range(delete).await), Reason::RangeInverted);
    for (range, want) in [
        (between((b"b", true), (b"b", true)), 1),
        (between((b"b", true), (b"b", false)), 0),
        (between((b"b", false), (b"b", true)), 0),
        (between((b"b", false), (b"b", false)), 0),
        (between((b"x", true), (b"z", true)), 0),
    ] {
        let page = kv.scan(scan("", range.clone())).await.unwrap().into_inner();
        assert_eq!((page.rows.len(), page.next_page_token.len()), (want, 0), "{range:?}");
        let count = v1::CountRequest { range: range.clone(), ..Default::default() };
        assert_eq!(kv.count(count).await.unwrap().into_inner().count, want as u64);
        let delete = v1::DeleteRangeRequest { range: range.clone(), ..Default::default() };
        if want == 0 {
            assert_eq!(kv.delete_range(delete).await.unwrap().into_inner().deleted, 0);
        }
    }
    let both = v1::ScanRequest { prefix: "b".into(), ..scan("", between((b"a", true), (b"b", true))) };
    assert_eq!(reason(kv.scan(both).await), Reason::InvalidField, "a range or a prefix, not both");
    let none = v1::ScanRequest { limit: Some(0), ..scan("", None) };
    assert_eq!(refusal(kv.scan(none).await).field, "limit");
    let many = v1::ScanRequest { page_rows: 10_001, ..scan("", None) };
    assert_eq!(refusal(kv.scan(many).await).field, "page_rows");
}

/// A signed integer of another language, sent as its bytes, is never taken for a key by accident.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn negative_integers_and_integers_outside_of_the_domain_are_refused_at_the_border() {
    let _turn = shared().await;
    let (cluster, mut kv, _) = three().await;
    cluster.create_even("small", 1_000, v1::Layout::Ordered, 2).await;
    cluster.create_even("full", u64::MAX, v1::Layout::Hashed, 2).await;
    for keyspace in ["small", "full"] {
        for key in [&(-1_i64).to_be_bytes()[..], &(-1_i32).to_be_bytes(), b"7", b"", &[0; 9]] {
            let key = Bytes::copy_from_slice(key);
            let put = v1::PutRequest { keyspace: keyspace.into(), key: key.clone(), ..Default::default() };
            assert_not_applied(&refusal(kv.put(put).await), Reason::KeyOutOfDomain);
            let get = v1::GetRequest { keyspace: keyspace.into(), key: key.clone(), options: None };
            assert_eq!(reason(kv.get(get).await), Reason::KeyOutOfDomain);
            if !key.is_empty() {
                let range = between((&key, true), (&[0xff; 9], true));
                assert_eq!(reason(kv.scan(scan(keyspace, range)).await), Reason::KeyOutOfDomain);
            }
        }
    }
    let put =
        v1::PutRequest { keyspace: "small".into(), key: (-5_i64).to_be_bytes().to_vec().into(), ..Default::default() };
    let refused = refusal(kv.put(put).await);
    assert!(refused.metadata.iter().any(|(name, value)| name == "max" && value == "1000"), "{refused:?}");
    let prefix = v1::ScanRequest { prefix: vec![0].into(), ..scan("small", None) };
    assert_eq!(refusal(kv.scan(prefix).await).field, "prefix", "integers have no prefix");
    // In the library keys are u64: a negative number does not compile, and the largest ones are refused.
    let small = cluster.client().await.integer_keyspace("small");
    small.put(999, "last").await.unwrap();
    assert_eq!(small.put(1_000, "M").await.unwrap_err().reason(), Reason::KeyOutOfDomain);
    let wrapped = (-1_i64).cast_unsigned();
    assert_eq!(small.get(wrapped).await.unwrap_err().reason(), Reason::KeyOutOfDomain);
    let top = cluster.client().await.integer_keyspace("full");
    top.put(u64::MAX - 1, "the largest key there can be").await.unwrap();
    assert_eq!(top.scan(u64::MAX - 1..).await.unwrap().len(), 1);
    // A handle of the wrong kind is an error, not a panic.
    let raw = cluster.client().await.keyspace("small");
    assert_eq!(raw.put("abc", "v").await.unwrap_err().reason(), Reason::KeyOutOfDomain);
    cluster.client().await.keyspace("default").put("text", "v").await.unwrap();
    let wrong = cluster.client().await.integer_keyspace("default");
    assert_eq!(wrong.scan(..).await.unwrap_err().reason(), Reason::KeyOutOfDomain);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_keyspaces_and_reserved_names_are_refused_by_name() {
    let _turn = shared().await;
    let (_cluster, mut kv, mut admin) = three().await;
    for name in ["nobody", "_driver", "DEFAULT", "a b"] {
        let refused = refusal(kv.get(get(name, "k", None)).await);
        assert_eq!((refused.reason, &*refused.field), (Reason::KeyspaceUnknown, "keyspace"), "{name}: {refused}");
        assert_not_applied(&refusal(kv.put(put(name, "k", "v")).await), Reason::KeyspaceUnknown);
        assert_eq!(reason(kv.scan(scan(name, None)).await), Reason::KeyspaceUnknown, "{name}");
        let show = v1::GetKeyspaceRequest { name: name.into() };
        assert_eq!(reason(admin.get_keyspace(show).await), Reason::KeyspaceUnknown, "{name}");
    }
    let long = "x".repeat(65);
    for name in ["_mine", "_driver", "", "1st", "Upper", "with space", "ä", "-x", &long] {
        let create = v1::CreateKeyspaceRequest { name: name.into(), ..Default::default() };
        assert_eq!(reason(admin.create_keyspace(create).await), Reason::NameInvalid, "{name:?}");
    }
    for name in ["default", "_driver"] {
        let drop = v1::DropKeyspaceRequest { name: name.into() };
        assert_eq!(reason(admin.drop_keyspace(drop).await), Reason::NameInvalid, "{name}");
    }
    let drop = |name: &str| v1::DropKeyspaceRequest { name: name.into() };
    assert!(!admin.drop_keyspace(drop("nobody")).await.unwrap().into_inner().dropped);
    let create = v1::CreateKeyspaceRequest { name: "brief".into(), ..Default::default() };
    assert!(admin.create_keyspace(create.clone()).await.unwrap().into_inner().created);
    assert!(!admin.create_keyspace(create.clone()).await.unwrap().into_inner().created, "the same again: the same");
    let other = v1::CreateKeyspaceRequest { layout: v1::Layout::Hashed as i32, ..create };
    assert_eq!(reason(admin.create_keyspace(other).await), Reason::KeyspaceExists);
    assert!(admin.drop_keyspace(drop("brief")).await.unwrap().into_inner().dropped);
    assert_eq!(reason(kv.get(get("brief", "k", None)).await), Reason::KeyspaceUnknown, "dropped is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_replicas_than_nodes_work_with_a_warning() {
    let _turn = shared().await;
    let (_cluster, mut kv, mut admin) = three().await;
    let create = |replicas| v1::CreateKeyspaceRequest { name: "wide".into(), replicas, ..Default::default() };
    let reply = admin.create_keyspace(create(5)).await.unwrap().into_inner();
    assert!(reply.created && reply.warnings.iter().any(|warning| warning.contains('5')), "{:?}", reply.warnings);
    assert!(kv.put(put("wide", "k", "v")).await.unwrap().into_inner().applied);
    let shown = admin.get_keyspace(v1::GetKeyspaceRequest { name: "wide".into() }).await.unwrap().into_inner();
    assert_eq!(shown.partitions[0].replicas.len(), 3, "as many as there are nodes");
    assert_eq!((shown.failures_tolerated_strong, shown.failures_tolerated_eventual), (2, 4), "when all are there");
    let status = admin.cluster_status(v1::ClusterStatusRequest {}).await.unwrap().into_inner();
    assert!(status.partitions_underreplicated.contains(&shown.partitions[0].id), "the status says what is missing");
    let many = v1::CreateKeyspaceRequest { name: "wider".into(), ..create(10) };
    let refused = refusal(admin.create_keyspace(many).await);
    assert_eq!((refused.reason, &*refused.field), (Reason::InvalidField, "replicas"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_already_past_applies_nothing_and_says_so() {
    let _turn = shared().await;
    let (cluster, mut kv, _) = three().await;
    let rows = cluster.client().await.keyspace("default");
    let late = rows.put("late", "v").deadline(Duration::ZERO).await.unwrap_err();
    assert_eq!((late.reason(), late.outcome()), (Reason::DeadlineExceeded, Some(Outcome::NotApplied)));
    let late = rows.get("late").deadline(Duration::ZERO).await.unwrap_err();
    assert_eq!((late.reason(), late.outcome()), (Reason::DeadlineExceeded, None));
    let late = rows.scan(..).deadline(Duration::ZERO).await.unwrap_err();
    assert_eq!(late.reason(), Reason::DeadlineExceeded);
    for timeout in ["0m", "1n"] {
        let mut request = tonic::Request::new(put("default", "late", "v"));
        request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        // Whoever notices first says so: the node, or the caller's own gRPC library in its own words.
        let late = [Code::DeadlineExceeded, Code::Cancelled];
        let status = kv.put(request).await.unwrap_err();
        assert!(late.contains(&status.code()), "{timeout}: {status:?}");
        let mut request = tonic::Request::new(get("default", "late", None));
        request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        let status = kv.get(request).await.unwrap_err();
        assert!(late.contains(&status.code()), "{timeout}: {status:?}");
    }
    assert!(rows.get("late").await.unwrap().is_none(), "nothing was applied");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_enum_values_never_give_a_weaker_answer() {
    let _turn = shared().await;
    let (cluster, mut kv, mut admin) = three().await;
    kv.put(put("", "k", "v")).await.unwrap();
    let unknown = v1::ReadOptions { consistency: 77, ..Default::default() };
    let degrade = v1::ReadOptions { on_unavailable: 77, ..Default::default() };
    let unbounded = level(v1::Consistency::Bounded).unwrap();
    for (options, field) in
        [(unknown, "options.consistency"), (degrade, "options.on_unavailable"), (unbounded, "options.max_staleness_ms")]
    {
        let options = Some(options);
        let read = refusal(kv.get(get("", "k", options.clone())).await);
        assert_eq!((read.reason, &*read.field), (Reason::InvalidField, field));
        let many = v1::BatchGetRequest { keys: vec!["k".into()], options: options.clone(), ..Default::default() };
        assert_eq!(refusal(kv.batch_get(many).await).field, field);
        let page = v1::ScanRequest { options: options.clone(), ..scan("", None) };
        assert_eq!(refusal(kv.scan(page.clone()).await).field, field);
        assert_eq!(error_of(&pages(&mut kv, page).await.unwrap_err()).field, field);
        let count = v1::CountRequest { options: options.clone(), ..Default::default() };
        assert_eq!(refusal(kv.count(count).await).field, field);
        // The replica itself refuses too, whatever the way to it.
        let partition = cluster.led("default").await;
        let mut pipe = cluster.pipe(0).await;
        let routed = pipe.get(partition.id, get("", "k", options)).await.unwrap_err();
        assert_eq!((&*routed.reason, &*routed.field), (Reason::InvalidField.as_str(), field));
    }
    let order = v1::ScanRequest { order: 77, ..scan("", None) };
    assert_eq!(refusal(kv.scan(order).await).field, "order");
    let skip = v1::ScanRequest { on_partition_failure: 77, ..scan("", None) };
    assert_eq!(refusal(kv.scan(skip).await).field, "on_partition_failure");
    // A condition of a newer version is not taken for "anything".
    let condition = Some(v1::Condition { must: None });
    let refused = refusal(kv.put(v1::PutRequest { condition, ..put("", "k", "weaker") }).await);
    assert_not_applied(&refused, Reason::InvalidField);
    let create = v1::CreateKeyspaceRequest { name: "odd".into(), ..Default::default() };
    let kind = v1::CreateKeyspaceRequest { keys: 77, ..create.clone() };
    assert_eq!(refusal(admin.create_keyspace(kind).await).field, "keys");
    let layout = v1::CreateKeyspaceRequest { layout: 77, ..create };
    assert_eq!(refusal(admin.create_keyspace(layout).await).field, "layout");
    let row = kv.get(get("", "k", None)).await.unwrap().into_inner().row.unwrap();
    assert_eq!(row.value, "v", "nothing of all that has written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_none_ends_its_stream_with_the_reason() {
    let _turn = shared().await;
    let (_cluster, mut kv, _) = three().await;
    let cut_short = Requests::of_pieces(vec![Bytes::from_static(b"\x0a\x05id")]);
    let mut replies = kv.pipeline(tokio_stream::once(cut_short)).await.unwrap().into_inner();
    let refused = error_of(&replies.message().await.unwrap_err());
    assert_eq!((refused.reason, &*refused.field), (Reason::InvalidField, "requests"), "{refused}");
    kv.put(put("", "k", "v")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_one_message_are_answered_each_on_its_own() {
    let _turn = shared().await;
    let (cluster, _, _) = three().await;
    cluster.create_cut("halves", &["m"], 3).await;
    let lower = cluster.led("halves").await;
    let mut pipe = cluster.pipe(cluster.index_of(lower.leader)).await;
    let long = "a".repeat(4_097);
    let put = |key: &str| Op::Put(put("halves", key, "v"));
    let increment = Op::Increment(increment("halves", "a", 1));
    let ops = vec![put("a"), put(&long), put("z"), increment, put("b")];
    let written = pipe.together(lower.id, ops).await;
    let refused = |answer: &Result<reply::Result, v1::Error>, reason: Reason| {
        let error = Error::from(answer.clone().unwrap_err());
        assert_not_applied(&error, reason);
    };
    assert!(matches!(&written[0], Ok(reply::Result::Write(reply)) if reply.applied), "{:?}", written[0]);
    refused(&written[1], Reason::KeyTooLarge);
    refused(&written[2], Reason::WrongPartition);
    // It came after the put of the same message, and so finds what that one wrote.
    refused(&written[3], Reason::NotANumber);
    assert!(matches!(&written[4], Ok(reply::Result::Write(reply)) if reply.applied), "{:?}", written[4]);

    let get = |key: &str| Op::Get(get("halves", key, None));
    let read = pipe.together(lower.id, vec![get("b"), get(&long), get("z"), get("c"), get("a")]).await;
    let found = |answer: &Result<reply::Result, v1::Error>| match answer {
        Ok(reply::Result::Get(reply)) => reply.row.as_ref().map(|row| row.key.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(found(&read[0]).unwrap(), "b");
    assert_eq!(read[1].as_ref().unwrap_err().reason, Reason::KeyTooLarge.as_str());
    assert_eq!(read[2].as_ref().unwrap_err().reason, Reason::WrongPartition.as_str());
    assert_eq!(found(&read[3]), None);
    assert_eq!(found(&read[4]).unwrap(), "a");
}

fn batch(keyspace: &str, keys: &[&str], atomic: bool) -> v1::BatchRequest {
    let item = |key: &&str| v1::BatchItem { op: Some(v1::batch_item::Op::Put(put("", key, "v"))) };
    v1::BatchRequest { keyspace: keyspace.into(), items: keys.iter().map(item).collect(), atomic, session: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_atomic_batch_over_two_partitions_is_refused_with_the_split_and_applies_nothing() {
    let _turn = shared().await;
    let (cluster, mut kv, _) = three().await;
    cluster.create_cut("two", &["m"], 3).await;
    let refused = refusal(kv.write(batch("two", &["a", "b", "z"], true)).await);
    assert_not_applied(&refused, Reason::CrossPartition);
    let split = refused.metadata.iter().find(|(name, _)| name == "split").map(|(_, split)| split.clone()).unwrap();
    for partition in cluster.partitions("two").await {
        assert!(split.contains(&partition.id.to_string()), "partition {} is not in {split}", partition.id);
    }
    assert!(pages(&mut kv, scan("two", None)).await.unwrap()[0].rows.is_empty());
    assert!(kv.write(batch("two", &["a", "b"], true)).await.unwrap().into_inner().applied);
    assert!(kv.write(batch("two", &["c", "z"], false)).await.unwrap().into_inner().applied);
    let all = pages(&mut kv, scan("two", None)).await.unwrap();
    assert_eq!(keys_of(&all), ["a", "b", "c", "z"]);
    // One unmet condition, and nothing of an atomic batch happens.
    let two = cluster.client().await.keyspace("two");
    let unmet = two.batch().put("d", "v").put_when("a", meridian::client::Expected::Absent, "v").atomic().await;
    assert!(!unmet.unwrap().applied);
    assert!(two.get("d").await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_too_large_and_ambiguous_batches_are_refused() {
    let _turn = shared().await;
    let (_cluster, mut kv, _) = three().await;
    let names: Vec<String> = (0..1_001).map(|n| format!("key {n}")).collect();
    let keys: Vec<&str> = names.iter().map(String::as_str).collect();
    for atomic in [true, false] {
        let empty = refusal(kv.write(batch("", &[], atomic)).await);
        assert_not_applied(&empty, Reason::InvalidField);
        let many = refusal(kv.write(batch("", &keys, atomic)).await);
        assert_not_applied(&many, Reason::BatchTooLarge);
        let twice = refusal(kv.write(batch("", &["a", "b", "a"], atomic)).await);
        assert_not_applied(&twice, Reason::InvalidField);
        assert!(twice.message.contains("twice"), "{twice}");
        let mut hollow = batch("", &["a"], atomic);
        hollow.items.push(v1::BatchItem { op: None });
        assert_not_applied(&refusal(kv.write(hollow).await), Reason::InvalidField);
        let mut heavy = batch("", &["a", "b", "c"], atomic);
        for item in &mut heavy.items {
            let Some(v1::batch_item::Op::Put(put)) = &mut item.op else { unreachable!() };
            put.value = vec![b'v'; 1 << 20].into();
        }
        assert_not_applied(&refusal(kv.write(heavy).await), Reason::BatchTooLarge);
    }
    let count = v1::CountRequest::default();
    assert_eq!(kv.count(count).await.unwrap().into_inner().count, 0, "nothing of all that was applied");
    assert!(kv.write(batch("", &keys[..1_000], true)).await.unwrap().into_inner().applied, "1,000 items fit");
    let none = v1::BatchGetRequest::default();
    assert_eq!(reason(kv.batch_get(none).await), Reason::InvalidField);
    let keys = keys.iter().map(|key| Bytes::copy_from_slice(key.as_bytes())).collect();
    let many = v1::BatchGetRequest { keys, ..Default::default() };
    assert_eq!(reason(kv.batch_get(many).await), Reason::BatchTooLarge);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn increments_of_what_is_no_number_or_beyond_64_bits_change_nothing() {
    let _turn = shared().await;
    let (_cluster, mut kv, _) = three().await;
    for (value, delta, want) in [
        ("9223372036854775807", 1, Reason::NumberOverflow),
        ("-9223372036854775808", -1, Reason::NumberOverflow),
        ("9223372036854775808", 1, Reason::NotANumber),
        ("", 1, Reason::NotANumber),
        ("12a", 1, Reason::NotANumber),
        ("1.5", 1, Reason::NotANumber),
        ("5", 0, Reason::InvalidField),
    ] {
        kv.put(put("", "n", value)).await.unwrap();
        assert_not_applied(&refusal(kv.increment(increment("", "n", delta)).await), want);
        let row = kv.get(get("", "n", None)).await.unwrap().into_inner().row.unwrap();
        assert_eq!(row.value, value);
    }
    for (delta, want) in [(i64::MIN, i64::MIN), (i64::MAX, -1), (1, 0), (-7, -7)] {
        let sum = kv.increment(increment("", "from nothing", delta)).await.unwrap().into_inner();
        assert_eq!(sum.number, Some(want));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn must_exist_and_unmet_conditions_answer_differently() {
    let _turn = shared().await;
    let (_cluster, mut kv, _) = three().await;
    let delete = v1::DeleteRequest { key: "k".into(), must_exist: true, ..Default::default() };
    let refused = refusal(kv.delete(delete.clone()).await);
    assert_not_applied(&refused, Reason::NotFound);
    assert_eq!(kv.delete(delete.clone()).await.unwrap_err().code(), Code::NotFound);
    let version = kv.put(put("", "k", "v")).await.unwrap().into_inner().version;
    let condition = Some(v1::Condition { must: Some(v1::condition::Must::Version(version + 1)) });
    let unmet = kv.put(v1::PutRequest { condition, ..put("", "k", "w") }).await.unwrap().into_inner();
    assert_eq!((unmet.applied, unmet.version, unmet.existed), (false, version, true), "a result, not an error");
    let cas = v1::CompareAndSetRequest { key: "k".into(), value: Some("w".into()), ..Default::default() };
    assert_not_applied(&refusal(kv.compare_and_set(cas).await), Reason::InvalidField);
    assert!(kv.delete(delete).await.unwrap().into_inner().existed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_tokens_that_are_damaged_or_of_another_query_are_refused() {
    let _turn = shared().await;
    let (cluster, mut kv, _) = three().await;
    cluster.create_cut("other", &[], 3).await;
    for key in ["a", "b", "c", "d"] {
        kv.put(put("", key, "v")).await.unwrap();
    }
    let first = v1::ScanRequest { page_rows: 1, ..scan("", between((b"a", true), (b"d", true))) };
    let token = kv.scan(first.clone()).await.unwrap().into_inner().next_page_token;
    let next = v1::ScanRequest { page_token: token.clone(), ..first.clone() };
    assert_eq!(kv.scan(next.clone()).await.unwrap().into_inner().rows[0].key, "b");
    for at in 0..token.len() {
        let mut damaged = token.to_vec();
        damaged[at] ^= 0x40;
        let request = v1::ScanRequest { page_token: damaged.into(), ..first.clone() };
        let refused = refusal(kv.scan(request).await);
        assert_eq!((refused.reason, &*refused.field), (Reason::PageTokenInvalid, "page_token"), "byte {at}");
    }
    for part in [&token[..token.len() - 1], &token[..1], b"x"] {
        let page_token = Bytes::copy_from_slice(part);
        let request = v1::ScanRequest { page_token, ..first.clone() };
        assert_eq!(reason(kv.scan(request).await), Reason::PageTokenInvalid);
    }
    for other in [
        v1::ScanRequest { keyspace: "other".into(), ..next.clone() },
        v1::ScanRequest { range: between((b"a", true), (b"e", true)), ..next.clone() },
        v1::ScanRequest { order: v1::Order::Descending as i32, ..next.clone() },
        v1::ScanRequest { keys_only: true, ..next.clone() },
        v1::ScanRequest { limit: Some(3), ..next.clone() },
        v1::ScanRequest { range: None, prefix: "a".into(), ..next.clone() },
    ] {
        assert_eq!(reason(kv.scan(other.clone()).await), Reason::PageTokenInvalid, "{other:?}");
    }
    let bigger = v1::ScanRequest { page_rows: 2, ..next };
    assert_eq!(kv.scan(bigger).await.unwrap().into_inner().rows.len(), 2, "the size of a page may change");
}
