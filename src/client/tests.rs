//! The router against a scripted cluster, in virtual time.

use super::{
    router::Router,
    testing::{Fake, Fault},
    token::SessionToken,
};
use crate::{
    error::{Error, Outcome, Reason},
    key::{KeyKind, Layout, NodeId, integer_key, position_of_token},
    proto::v1::{self, batch_item, batch_item_reply, reply, request},
};
use bytes::Bytes;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

mod ranges;

type TestRouter = Router<Arc<Fake>>;

fn ordered(cuts: &[&'static str]) -> (TestRouter, Arc<Fake>) {
    let cuts: Vec<Bytes> = cuts.iter().map(|cut| Bytes::from(*cut)).collect();
    let fake = Fake::new(Layout::Ordered, &cuts);
    (Router::new(Arc::clone(&fake)), fake)
}

fn in_5_s() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

async fn run(router: &TestRouter, op: request::Op) -> Result<reply::Result, Error> {
    let request = v1::Request { op: Some(op), ..Default::default() };
    router.execute(request, in_5_s()).await
}

fn put_of(key: &'static str) -> request::Op {
    request::Op::Put(v1::PutRequest { key: key.into(), value: "v".into(), ..Default::default() })
}

async fn put(router: &TestRouter, key: &'static str) -> Result<v1::WriteReply, Error> {
    match run(router, put_of(key)).await? {
        reply::Result::Write(reply) => Ok(reply),
        other => panic!("{other:?}"),
    }
}

async fn get(router: &TestRouter, key: &'static str, level: v1::Consistency) -> Result<v1::GetReply, Error> {
    get_with(router, key, v1::ReadOptions { consistency: level as i32, max_staleness_ms: 1, ..Default::default() })
        .await
}

async fn get_with(router: &TestRouter, key: &'static str, options: v1::ReadOptions) -> Result<v1::GetReply, Error> {
    let get = v1::GetRequest { key: key.into(), options: Some(options), ..Default::default() };
    match run(router, request::Op::Get(get)).await? {
        reply::Result::Get(reply) => Ok(reply),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_leader_is_learned_from_a_refusal_and_kept() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().lead(0, Some(3));
    put(&router, "a").await.unwrap();
    put(&router, "b").await.unwrap();
    assert_eq!(fake.world.lock().calls, [(1, "write"), (3, "write"), (3, "write")]);
}

#[tokio::test(start_paused = true)]
async fn an_election_is_waited_out() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().lead(0, None);
    let began = Instant::now();
    let (written, ()) = tokio::join!(put(&router, "a"), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        fake.world.lock().lead(0, Some(2));
    });
    assert!(written.unwrap().applied);
    assert!(began.elapsed() < Duration::from_millis(2_300), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_does_not_apply_a_write_twice() {
    for fault in [Fault::AnswerLost, Fault::AnswerHangs, Fault::RequestLost] {
        let (router, fake) = ordered(&[]);
        fake.world.lock().faults = vec![fault, fault];
        assert!(put(&router, "a").await.unwrap().applied, "{fault:?}");
        assert_eq!(fake.world.lock().applied[b"a".as_ref()], 1, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_may_have_been_proposed_is_never_called_not_applied() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().faults = vec![Fault::Refused(Reason::Unreachable); 200];
    fake.world.lock().faults[0] = Fault::AnswerLost;
    let error = put(&router, "a").await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::OutcomeUnknown, Some(Outcome::Unknown)));
    assert_eq!(fake.world.lock().applied[b"a".as_ref()], 1);

    fake.world.lock().down = [1, 2, 3].into();
    let error = put(&router, "b").await.unwrap_err();
    assert_eq!(error.outcome, Some(Outcome::NotApplied), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_by_the_log_settles_what_was_unknown() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().faults = vec![Fault::RequestLost];
    let delete = v1::DeleteRequest { key: "a".into(), must_exist: true, ..Default::default() };
    let error = run(&router, request::Op::Delete(delete)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::NotFound, Some(Outcome::NotApplied)));
}

#[tokio::test(start_paused = true)]
async fn without_a_quorum_a_request_fails_within_a_second_and_says_what_still_works() {
    let (router, fake) = ordered(&[]);
    {
        let mut world = fake.world.lock();
        world.no_quorum.insert(1);
        world.down.insert(3);
        world.put("a", "1");
    }
    let began = Instant::now();
    let error = put(&router, "a").await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::NoQuorum, Some(Outcome::NotApplied)));
    let fact = |name| error.metadata.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let asked = fact("asked").unwrap();
    assert!(asked.contains("n1: NO_QUORUM") && asked.contains("n3: UNREACHABLE"), "{error:?}");
    assert_eq!(fact("still_possible"), Some("EVENTUAL reads"));
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(500) && took < Duration::from_millis(1_000), "{took:?}");
    assert!(get(&router, "a", v1::Consistency::Eventual).await.unwrap().found);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_hangs_costs_one_attempt_and_is_then_asked_last() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().put("a", "1");
    fake.world.lock().hanging.insert(1);
    fake.world.lock().lead(0, Some(2));
    let began = Instant::now();
    assert!(get(&router, "a", v1::Consistency::Linearizable).await.unwrap().found);
    assert!(began.elapsed() <= Duration::from_millis(1_300), "{:?}", began.elapsed());
    let began = Instant::now();
    assert!(get(&router, "a", v1::Consistency::Linearizable).await.unwrap().found);
    assert!(began.elapsed() < Duration::from_millis(10), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_read_that_others_can_answer_as_well_waits_half_a_second_for_a_node_that_hangs() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().put("a", "1");
    fake.world.lock().hanging = [1, 2].into();
    // Of six, some begin with a node that hangs; each is met once.
    for _ in 0..6 {
        let began = Instant::now();
        assert!(get(&router, "a", v1::Consistency::Eventual).await.unwrap().found);
        assert!(began.elapsed() <= Duration::from_millis(1_100), "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_holds_when_nobody_answers() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().hanging = [1, 2, 3].into();
    let began = Instant::now();
    let error = get(&router, "a", v1::Consistency::Linearizable).await.unwrap_err();
    assert!(began.elapsed() <= Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!((error.reason, error.outcome), (Reason::DeadlineExceeded, None));
    // Opening the session comes first and cannot be reached either: nothing was proposed.
    let error = put(&router, "a").await.unwrap_err();
    assert_eq!(error.outcome, Some(Outcome::NotApplied), "{error}");
}

#[tokio::test(start_paused = true)]
async fn reads_that_any_replica_may_serve_are_spread_or_stay_near() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().put("a", "1");
    for _ in 0..6 {
        get(&router, "a", v1::Consistency::Bounded).await.unwrap();
    }
    let mut nodes: Vec<u64> = fake.world.lock().calls.iter().map(|(node, _)| *node).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, [1, 1, 2, 2, 3, 3]);

    let near = Arc::new(Fake { prefer: Some(NodeId(2)), ..Arc::into_inner(Fake::new(Layout::Ordered, &[])).unwrap() });
    let router = Router::new(Arc::clone(&near));
    for _ in 0..3 {
        get(&router, "a", v1::Consistency::Bounded).await.unwrap();
    }
    assert_eq!(near.world.lock().calls, [(2, "get"); 3]);
}

#[tokio::test(start_paused = true)]
async fn an_eventual_miss_is_confirmed_before_it_is_believed() {
    let (router, fake) = ordered(&[]);
    {
        let mut world = fake.world.lock();
        world.put("a", "1");
        world.missing = [(2, "a".into()), (3, "a".into())].into();
    }
    for _ in 0..3 {
        assert!(get(&router, "a", v1::Consistency::Eventual).await.unwrap().found, "the leader has it");
    }
    // Without a leader the other members are asked; only node 1 has the row.
    fake.world.lock().no_quorum.insert(1);
    for _ in 0..3 {
        assert!(get(&router, "a", v1::Consistency::Eventual).await.unwrap().found, "a member has it");
    }
    fake.world.lock().down.insert(1);
    assert!(!get(&router, "a", v1::Consistency::Eventual).await.unwrap().found, "no member that runs has it");
    fake.world.lock().down.clear();
    // By then node 1 is no longer asked last for having been down.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let only_here = v1::ReadOptions {
        consistency: v1::Consistency::Eventual as i32,
        confirm_absent: Some(false),
        ..Default::default()
    };
    let mut found = 0;
    for _ in 0..3 {
        found += u32::from(get_with(&router, "a", only_here.clone()).await.unwrap().found);
    }
    assert_eq!(found, 1);
}

#[tokio::test(start_paused = true)]
async fn a_read_degrades_only_when_asked_and_says_so() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().put("a", "1");
    fake.world.lock().lead(0, None);
    fake.world.lock().no_quorum.insert(1);
    let error = get(&router, "a", v1::Consistency::Linearizable).await.unwrap_err();
    assert_eq!(error.reason, Reason::NoQuorum);
    let degrade = v1::ReadOptions { on_unavailable: v1::OnUnavailable::Degrade as i32, ..Default::default() };
    let reply = get_with(&router, "a", degrade.clone()).await.unwrap();
    assert!(reply.found && reply.read.unwrap().degraded);
    // What only one member still has is found by a degraded read as well.
    fake.world.lock().missing = [(1, "a".into()), (3, "a".into())].into();
    for _ in 0..3 {
        let reply = get_with(&router, "a", degrade.clone()).await.unwrap();
        assert!(reply.found && reply.read.unwrap().degraded);
    }
    fake.world.lock().no_quorum.clear();
    fake.world.lock().lead(0, Some(1));
    assert!(!get_with(&router, "a", degrade).await.unwrap().read.unwrap().degraded);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_too_stale_is_left_for_another() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().put("a", "1");
    fake.world.lock().faults = vec![Fault::Refused(Reason::TooStale); 2];
    assert!(get(&router, "a", v1::Consistency::Bounded).await.unwrap().found);
    fake.world.lock().faults = vec![Fault::Refused(Reason::TooStale); 200];
    let error = get(&router, "a", v1::Consistency::Bounded).await.unwrap_err();
    assert_eq!(error.reason, Reason::TooStale);
}

#[tokio::test(start_paused = true)]
async fn a_split_and_a_merge_are_followed() {
    let (router, fake) = ordered(&[]);
    put(&router, "a").await.unwrap();
    fake.world.lock().split(&"m".into(), true);
    put(&router, "a").await.unwrap();
    put(&router, "z").await.unwrap();
    fake.world.lock().merge(0);
    put(&router, "z").await.unwrap();
    assert_eq!(fake.world.lock().applied[b"z".as_ref()], 2);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_has_seen_a_newer_map_asks_nobody_by_an_older_one() {
    for (seen, asked) in [(0, 2), (2, 1)] {
        let (router, fake) = ordered(&[]);
        fake.world.lock().put("z", "v");
        fake.world.lock().split(&"m".into(), false);
        let session_token = SessionToken::of_map(seen).encode();
        let consistency = v1::Consistency::Session as i32;
        let options = v1::ReadOptions { consistency, session_token, ..Default::default() };
        assert!(get_with(&router, "z", options).await.unwrap().found);
        assert_eq!(fake.world.lock().calls.len(), asked, "by a map that is older, the partition that was cut is asked");
    }
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_session_is_replaced_only_if_nothing_is_unknown() {
    let (router, fake) = ordered(&[]);
    put(&router, "a").await.unwrap();
    fake.world.lock().forgotten = 1;
    put(&router, "b").await.unwrap();
    assert_eq!(fake.world.lock().sessions, 2);

    {
        let mut world = fake.world.lock();
        world.forgotten = 2;
        world.faults = vec![Fault::RequestLost];
    }
    let error = put(&router, "c").await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::OutcomeUnknown, Some(Outcome::Unknown)));
    assert_eq!(fake.world.lock().sessions, 2, "no second identity for a write that may have been proposed");
}

#[tokio::test(start_paused = true)]
async fn a_session_of_a_node_whose_clock_is_ahead_is_replaced_by_one_of_another() {
    let (router, fake) = ordered(&[]);
    let nodes: Vec<u64> = router.routing().look().nodes().keys().map(|node| node.0).collect();
    fake.world.lock().ahead = nodes.iter().copied().take(nodes.len() - 1).collect();
    put(&router, "a").await.unwrap();
    put(&router, "b").await.unwrap();
    assert!(fake.world.lock().sessions <= nodes.len() as u64, "the good one is kept");

    fake.world.lock().ahead = nodes.into_iter().collect();
    fake.world.lock().forgotten = 100;
    let error = put(&router, "c").await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::SessionAhead, Some(Outcome::NotApplied)));
}

#[tokio::test(start_paused = true)]
async fn a_callers_own_session_that_was_forgotten_is_unknown_and_says_why() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().forgotten = 7;
    let session =
        v1::WriteSession { client_id: Bytes::from_static(&[9; 16]), opened: 7, sequence: 1, acknowledged_below: 1 };
    for faults in [vec![], vec![Fault::RequestLost]] {
        fake.world.lock().faults = faults;
        let put = v1::PutRequest { key: "a".into(), session: Some(session.clone()), ..Default::default() };
        let error = run(&router, request::Op::Put(put)).await.unwrap_err();
        assert_eq!((error.reason, error.outcome), (Reason::SessionExpired, Some(Outcome::Unknown)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_callers_own_session_is_passed_on_as_it_is() {
    let (router, fake) = ordered(&[]);
    let session =
        v1::WriteSession { client_id: Bytes::from_static(&[9; 16]), opened: 7, sequence: 1, acknowledged_below: 1 };
    for _ in 0..2 {
        let put = v1::PutRequest { key: "a".into(), session: Some(session.clone()), ..Default::default() };
        run(&router, request::Op::Put(put)).await.unwrap();
    }
    let world = fake.world.lock();
    assert_eq!((world.applied[b"a".as_ref()], world.sessions), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn overload_is_waited_out_where_it_is() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().faults = vec![Fault::Refused(Reason::Overloaded); 5];
    let began = Instant::now();
    assert!(put(&router, "a").await.unwrap().applied);
    assert_eq!(fake.world.lock().calls, [(1, "write"); 6], "nobody else is bothered");
    let waited = began.elapsed().as_millis();
    assert!((5 * 50..=5 * 75 + 50).contains(&waited), "{waited} ms: as long as the node says, and up to half more");
}

#[tokio::test(start_paused = true)]
async fn a_lasting_overload_is_not_made_worse_by_repetitions() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().faults = vec![Fault::Refused(Reason::Overloaded); 100_000];
    let requests = 2_000;
    for _ in 0..requests {
        let error = put(&router, "a").await.unwrap_err();
        assert_eq!((error.reason, error.outcome), (Reason::Overloaded, Some(Outcome::NotApplied)));
        assert!(error.retry_after_ms > 0);
    }
    let repeated = fake.world.lock().calls.len() - requests;
    assert!((512..=512 + requests / 5).contains(&repeated), "{repeated} repetitions of {requests} requests");
    fake.world.lock().faults.clear();
    assert!(put(&router, "a").await.unwrap().applied);
}

#[tokio::test(start_paused = true)]
async fn full_memory_is_not_waited_out() {
    let (router, fake) = ordered(&[]);
    fake.world.lock().faults = vec![Fault::Refused(Reason::MemoryFull)];
    let error = put(&router, "a").await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::MemoryFull, Some(Outcome::NotApplied)));
    assert_eq!(fake.world.lock().calls.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_in_itself_is_refused_without_a_call() {
    let (router, fake) = ordered(&[]);
    let wrong = [
        request::Op::Increment(v1::IncrementRequest { key: "a".into(), ..Default::default() }),
        request::Op::CompareAndSet(v1::CompareAndSetRequest { key: "a".into(), ..Default::default() }),
        request::Op::Write(v1::BatchRequest::default()),
        request::Op::Scan(v1::ScanRequest { limit: Some(0), ..Default::default() }),
        request::Op::Scan(v1::ScanRequest { page_rows: 10_001, ..Default::default() }),
        request::Op::Get(v1::GetRequest {
            options: Some(v1::ReadOptions { consistency: 99, ..Default::default() }),
            ..Default::default()
        }),
    ];
    for op in wrong {
        assert_eq!(run(&router, op).await.unwrap_err().reason, Reason::InvalidField);
    }
    let unknown = request::Op::Get(v1::GetRequest { keyspace: "nowhere".into(), ..Default::default() });
    assert_eq!(run(&router, unknown).await.unwrap_err().reason, Reason::KeyspaceUnknown);
    assert!(fake.world.lock().calls.is_empty());
}

#[tokio::test(start_paused = true)]
async fn integers_outside_of_the_keyspace_are_refused() {
    let fake = Fake::new(Layout::Ordered, &[]);
    {
        let mut world = fake.world.lock();
        world.kind = Some(KeyKind::Integer { max: 10 });
        world.version += 1;
    }
    fake.publish();
    let router = Router::new(Arc::clone(&fake));
    let put = |n| request::Op::Put(v1::PutRequest { key: integer_key(n), ..Default::default() });
    assert!(run(&router, put(9)).await.is_ok());
    let error = run(&router, put(10)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::KeyOutOfDomain, Some(Outcome::NotApplied)));
}

fn item(key: &'static str) -> v1::BatchItem {
    v1::BatchItem { op: Some(batch_item::Op::Put(v1::PutRequest { key: key.into(), ..Default::default() })) }
}

#[tokio::test(start_paused = true)]
async fn an_atomic_batch_must_lie_in_one_partition() {
    let (router, fake) = ordered(&["m"]);
    let batch = |keys: &[&'static str], atomic| {
        request::Op::Write(v1::BatchRequest {
            items: keys.iter().copied().map(item).collect(),
            atomic,
            ..Default::default()
        })
    };
    assert!(run(&router, batch(&["a", "b"], true)).await.is_ok());
    let error = run(&router, batch(&["a", "z"], true)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::CrossPartition, Some(Outcome::NotApplied)));
    assert!(error.message.contains("p1: 1, p2: 1"), "{error}");
    assert_eq!(run(&router, batch(&["a", "a"], false)).await.unwrap_err().reason, Reason::InvalidField);

    fake.world.lock().faults = vec![Fault::AnswerLost];
    fake.world.lock().split(&"f".into(), true);
    let reply::Result::Batch(reply) = run(&router, batch(&["a", "g", "z"], false)).await.unwrap() else { panic!() };
    assert!(reply.applied && reply.items.len() == 3);
    assert!(reply.items.iter().all(|item| matches!(item.result, Some(batch_item_reply::Result::Write(_)))));
    assert!(["a", "g", "z"].iter().all(|key| fake.world.lock().applied[key.as_bytes()] == 1));
}

#[tokio::test(start_paused = true)]
async fn a_batch_read_keeps_its_order_over_partitions_and_splits() {
    for layout in [Layout::Ordered, Layout::Hashed] {
        let cut = if layout == Layout::Ordered { "m".into() } else { position_of_token(1 << 63) };
        let fake = Fake::new(layout, &[cut]);
        let router = Router::new(Arc::clone(&fake));
        for key in ["a", "c", "e", "x"] {
            fake.world.lock().put(key, key);
        }
        let at = if layout == Layout::Ordered { "b".into() } else { position_of_token(1 << 62) };
        fake.world.lock().split(&at, false);
        let keys: Vec<Bytes> = ["x", "a", "no", "e", "a", "c"].map(Bytes::from).to_vec();
        let get = v1::BatchGetRequest { keys, ..Default::default() };
        let reply::Result::BatchGet(reply) = run(&router, request::Op::BatchGet(get)).await.unwrap() else { panic!() };
        let values: Vec<_> = reply.items.into_iter().map(|item| item.row.map(|row| row.value)).collect();
        let want = [Some("x"), Some("a"), None, Some("e"), Some("a"), Some("c")];
        assert_eq!(values, want.map(|value| value.map(Bytes::from)), "{layout:?}");
    }
}
