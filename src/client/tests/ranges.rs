//! Scans, counts and ranged deletes over partitions that change under them.

use super::{TestRouter, ordered, run};
use crate::{
    client::{
        query,
        router::Router,
        testing::{Fake, Fault},
    },
    error::{Error, Reason},
    key::{Layout, Span, position, position_of_token},
    proto::v1::{self, reply, request},
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use proptest::prelude::*;
use std::{sync::Arc, time::Duration};

async fn page(router: &TestRouter, scan: v1::ScanRequest) -> Result<v1::ScanReply, Error> {
    match run(router, request::Op::Scan(scan)).await? {
        reply::Result::Scan(reply) => Ok(reply),
        other => panic!("{other:?}"),
    }
}

/// Something that happens between two pages, or while one is read.
#[derive(Clone, Debug)]
enum Event {
    Split(Bytes, bool),
    Merge(usize),
    Lead(usize, Option<u64>),
    Down(u64),
    AllUp,
    Fault(Fault),
    RowsMax(usize),
}

fn happen(fake: &Fake, event: &Event) {
    let mut world = fake.world.lock();
    match event {
        Event::Split(key, fresh) => {
            let at = position(world.layout.unwrap(), key);
            world.split(&at, *fresh);
        }
        Event::Merge(index) => world.merge(*index),
        Event::Lead(index, node) => world.lead(*index, *node),
        Event::Down(node) => world.down = [*node].into(),
        Event::AllUp => world.down.clear(),
        Event::Fault(fault) => world.faults.push(*fault),
        Event::RowsMax(rows) => world.rows_max = *rows,
    }
}

fn key() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(prop_oneof![Just(0_u8), Just(b'a'), Just(b'b'), Just(0xFF)], 0..5).prop_map(Bytes::from)
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (key(), any::<bool>()).prop_map(|(key, fresh)| Event::Split(key, fresh)),
        2 => any::<usize>().prop_map(Event::Merge),
        // A scan is a linearizable read here: with a leader somewhere it can be served.
        2 => (any::<usize>(), 1..4_u64).prop_map(|(index, node)| Event::Lead(index, Some(node))),
        1 => (1..4_u64).prop_map(Event::Down),
        1 => Just(Event::AllUp),
        1 => prop_oneof![
            Just(Fault::AnswerLost),
            Just(Fault::Refused(Reason::LeaderUnknown)),
            Just(Fault::Refused(Reason::Overloaded)),
        ].prop_map(Event::Fault),
        1 => (1..6_usize).prop_map(Event::RowsMax),
    ]
}

#[derive(Clone, Debug)]
struct Case {
    hashed: bool,
    cuts: Vec<Bytes>,
    rows: Vec<Bytes>,
    range: v1::KeyRange,
    reverse: bool,
    limit: Option<u64>,
    pages: Vec<u32>,
    events: Vec<(Event, Event)>,
    /// One cursor over all pages, or a token from page to page.
    stream: bool,
}

fn bound() -> impl Strategy<Value = Option<v1::Bound>> {
    proptest::option::of((key(), any::<bool>()).prop_map(|(key, inclusive)| v1::Bound { key, inclusive }))
}

prop_compose! {
    fn case()(
        hashed in any::<bool>(),
        cuts in proptest::collection::btree_set(key(), 0..5),
        tokens in proptest::collection::btree_set(1..u64::MAX, 0..5),
        rows in proptest::collection::btree_set(key(), 0..60),
        bounds in (bound(), bound()),
        reverse in any::<bool>(),
        limit in proptest::option::of(1..40_u64),
        pages in proptest::collection::vec(1..8_u32, 1..4),
        events in proptest::collection::vec((event(), event()), 0..12),
        stream in any::<bool>(),
    ) -> Case {
        let (lower, upper) = match bounds {
            (Some(low), Some(high)) if low.key > high.key => (Some(high), Some(low)),
            bounds => bounds,
        };
        let cuts = if hashed {
            tokens.into_iter().map(position_of_token).collect()
        } else {
            cuts.into_iter().filter(|cut| !cut.is_empty()).collect()
        };
        let rows = rows.into_iter().collect();
        Case { hashed, cuts, rows, range: v1::KeyRange { lower, upper }, reverse, limit, pages, events, stream }
    }
}

impl Case {
    fn expected(&self) -> Vec<Bytes> {
        let span = query::span_of_range(&self.range);
        let mut keys: Vec<Bytes> = self.rows.iter().filter(|key| span.contains(key)).cloned().collect();
        if self.reverse {
            keys.reverse();
        }
        keys.truncate(self.limit.map_or(usize::MAX, |limit| limit as usize));
        keys
    }

    fn scan(&self) -> v1::ScanRequest {
        let order = if self.reverse { v1::Order::Descending } else { v1::Order::Ascending };
        v1::ScanRequest {
            range: Some(self.range.clone()),
            order: order as i32,
            limit: self.limit,
            page_rows: self.pages[0],
            ..Default::default()
        }
    }

    fn fake(&self) -> (TestRouter, Arc<Fake>) {
        let fake = Fake::new(if self.hashed { Layout::Hashed } else { Layout::Ordered }, &self.cuts);
        for key in &self.rows {
            fake.world.lock().put(key.clone(), key.clone());
        }
        (Router::new(Arc::clone(&fake)), fake)
    }

    /// Reads everything while things happen: before each page, and (a little later) during it.
    async fn read(&self) -> Result<Vec<Bytes>, Error> {
        let (router, fake) = self.fake();
        let mut events = self.events.iter();
        let mut keys = Vec::new();
        let mut scan = self.scan();
        let mut stream = std::pin::pin!(router.scan_pages(scan.clone(), Duration::from_secs(5)));
        for turn in 0.. {
            scan.page_rows = self.pages[turn % self.pages.len()];
            let during = events.next().map(|(before, during)| {
                happen(&fake, before);
                during
            });
            let reading = async {
                if self.stream {
                    return stream.next().await.expect("a stream ends after the last page");
                }
                page(&router, scan.clone()).await
            };
            let happening = async {
                tokio::time::sleep(Duration::from_millis(2)).await;
                during.inspect(|event| happen(&fake, event));
            };
            let (page, ()) = tokio::join!(reading, happening);
            let page = page?;
            let rows_max = if self.stream { self.pages[0] } else { scan.page_rows };
            assert!(page.rows.len() <= rows_max as usize, "{} rows in a page of {rows_max}", page.rows.len());
            keys.extend(page.rows.into_iter().map(|row| row.key));
            if page.next_page_token.is_empty() {
                return Ok(keys);
            }
            scan.page_token = page.next_page_token;
            assert!(turn < 500, "the scan does not end");
        }
        unreachable!("the loop has no end");
    }
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_scan_over_changing_partitions_equals_the_model(case in case()) {
        let keys = paused().block_on(case.read()).unwrap();
        prop_assert_eq!(keys, case.expected());
    }

    #[test]
    fn a_count_and_a_ranged_delete_over_changing_partitions_equal_the_model(case in case()) {
        let span: Span = query::span_of_range(&case.range);
        let inside = case.rows.iter().filter(|key| span.contains(key)).count() as u64;
        let (count, deleted, left) = paused().block_on(async {
            let (router, fake) = case.fake();
            let mut events = case.events.iter();
            // Ranged deletes are written under sequences that the fake does not remember: no lost answers here.
            let mut disturb = || events.by_ref().take(4).for_each(|(event, _)| {
                if !matches!(event, Event::Fault(Fault::AnswerLost)) {
                    happen(&fake, event);
                }
            });
            disturb();
            fake.world.lock().down.clear();
            let range = Some(case.range.clone());
            let count = request::Op::Count(v1::CountRequest { range: range.clone(), ..Default::default() });
            let count = run(&router, count).await.unwrap();
            disturb();
            fake.world.lock().down.clear();
            let delete = request::Op::DeleteRange(v1::DeleteRangeRequest { range, ..Default::default() });
            let deleted = run(&router, delete).await.unwrap();
            let left = fake.world.lock().rows.len();
            (count, deleted, left)
        });
        let reply::Result::Count(count) = count else { panic!() };
        let reply::Result::DeleteRange(deleted) = deleted else { panic!() };
        prop_assert_eq!((count.count, deleted.deleted), (inside, inside));
        prop_assert_eq!(left as u64, case.rows.len() as u64 - inside);
    }
}

fn rows(fake: &Fake, keys: &[&'static str]) {
    for key in keys {
        fake.world.lock().put(*key, *key);
    }
}

#[tokio::test(start_paused = true)]
async fn a_small_limit_does_not_ask_every_partition() {
    let (router, fake) = ordered(&["b", "c", "d", "e", "f", "g"]);
    rows(&fake, &["a1", "a2", "b1"]);
    let reply = page(&router, v1::ScanRequest { limit: Some(2), ..Default::default() }).await.unwrap();
    assert_eq!((reply.rows.len(), reply.next_page_token.len()), (2, 0));
    assert_eq!(fake.world.lock().calls.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_page_token_belongs_to_its_query() {
    let (router, fake) = ordered(&[]);
    rows(&fake, &["a", "b", "c"]);
    let scan = v1::ScanRequest { page_rows: 1, ..Default::default() };
    let token = page(&router, scan.clone()).await.unwrap().next_page_token;
    let other = v1::ScanRequest { page_token: token.clone(), keys_only: true, ..scan.clone() };
    assert_eq!(page(&router, other).await.unwrap_err().reason, Reason::PageTokenInvalid);
    let same = page(&router, v1::ScanRequest { page_token: token, ..scan }).await.unwrap();
    assert_eq!(same.rows[0].key, "b");
}

#[tokio::test(start_paused = true)]
async fn a_partition_that_cannot_answer_fails_the_page_or_is_reported() {
    let (router, fake) = ordered(&["b", "c"]);
    rows(&fake, &["a1", "b1", "c1"]);
    fake.world.lock().no_quorum.insert(2);
    let error = page(&router, v1::ScanRequest::default()).await.unwrap_err();
    assert_eq!(error.reason, Reason::NoQuorum);
    let on_partition_failure = v1::OnPartitionFailure::Skip as i32;
    let reply = page(&router, v1::ScanRequest { on_partition_failure, ..Default::default() }).await.unwrap();
    let keys: Vec<_> = reply.rows.iter().map(|row| row.key.clone()).collect();
    assert_eq!(keys, ["a1", "c1"]);
    assert_eq!(reply.missing.len(), 1);
    let missing = query::span_of_range(reply.missing[0].range.as_ref().unwrap());
    assert_eq!((missing, reply.missing[0].partition), (Span::new("b".into(), Some("c".into())), 2));
    assert_eq!(reply.missing[0].error.as_ref().unwrap().reason, "NO_QUORUM");
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_with_its_error() {
    let (router, fake) = ordered(&["b"]);
    rows(&fake, &["a1", "b1"]);
    fake.world.lock().no_quorum.insert(2);
    let scan = v1::ScanRequest { page_rows: 1, ..Default::default() };
    let pages: Vec<_> = router.scan_pages(scan, Duration::from_secs(5)).collect().await;
    assert_eq!(pages.len(), 2);
    assert_eq!(pages[0].as_ref().unwrap().rows[0].key, "a1");
    assert_eq!(pages[1].as_ref().unwrap_err().reason, Reason::NoQuorum);
}

#[tokio::test(start_paused = true)]
async fn an_inverted_range_is_refused_and_an_empty_one_asks_nobody() {
    let (router, fake) = ordered(&[]);
    let range = |low: &'static str, high: &'static str| {
        let bound = |key: &'static str, inclusive| Some(v1::Bound { key: key.into(), inclusive });
        Some(v1::KeyRange { lower: bound(low, true), upper: bound(high, false) })
    };
    let scan = |range| v1::ScanRequest { range, ..Default::default() };
    assert_eq!(page(&router, scan(range("b", "a"))).await.unwrap_err().reason, Reason::RangeInverted);
    let empty = page(&router, scan(range("a", "a"))).await.unwrap();
    assert!(empty.rows.is_empty() && empty.next_page_token.is_empty());
    assert!(fake.world.lock().calls.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_ranged_delete_that_stopped_half_way_says_so() {
    let (router, fake) = ordered(&["b"]);
    rows(&fake, &["a1", "b1"]);
    fake.world.lock().no_quorum.insert(2);
    let error = run(&router, request::Op::DeleteRange(v1::DeleteRangeRequest::default())).await.unwrap_err();
    assert_eq!(error.reason, Reason::NoQuorum);
    assert_eq!(error.outcome, Some(crate::error::Outcome::Unknown));
    assert!(error.metadata.iter().any(|(name, value)| name == "deleted_at_least" && value == "1"), "{error:?}");
}
