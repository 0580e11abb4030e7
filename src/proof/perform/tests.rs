//! A client against a door that answers what it was told to.

use super::*;
use crate::proof::history::ReadMode;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::VecDeque;

/// Answers in this order; sessions are opened always.
#[derive(Default)]
struct Script {
    answers: Mutex<VecDeque<Result<reply::Result, Error>>>,
    asked: Mutex<Vec<request::Op>>,
}

impl Door for Script {
    fn node(&self) -> Option<String> {
        Some("n1".to_owned())
    }

    fn ask(&self, request: v1::Request, _: Instant) -> BoxFuture<'_, Result<reply::Result, Error>> {
        let op = request.op.unwrap();
        if let request::Op::OpenSession(_) = op {
            let opened = v1::OpenSessionReply { client_id: Bytes::from_static(&[7; 16]), opened: 1 };
            return Box::pin(async { Ok(reply::Result::OpenSession(opened)) });
        }
        self.asked.lock().push(op);
        let answer = self.answers.lock().pop_front().expect("the script goes on");
        Box::pin(async { answer })
    }
}

impl Script {
    /// Sequences of the writes that came.
    fn sequences(&self) -> Vec<Option<u64>> {
        let asked = self.asked.lock();
        let put = |op: &request::Op| match op {
            request::Op::Put(put) => put.session.as_ref().map(|session| session.sequence),
            other => panic!("no put: {other:?}"),
        };
        asked.iter().map(put).collect()
    }
}

/// A client that keeps a session if its number is even, and its door.
fn client(number: u64, drop_replies: f64, answers: Vec<Result<reply::Result, Error>>) -> (Client, Arc<Script>) {
    let script = Arc::new(Script { answers: Mutex::new(answers.into()), ..Script::default() });
    let settings = Settings { drop_replies, ..Settings::new(Workload::Register, "k", 1) };
    let doors = [Arc::clone(&script) as Arc<dyn Door>];
    let recorder = Recorder::new(Instant::now(), None);
    (Client::new(Arc::new(settings), doors.into(), recorder, number), script)
}

fn put() -> Op {
    Op::Write { key: "k".to_owned(), value: "0:1".to_owned() }
}

fn written() -> Result<reply::Result, Error> {
    let info = Some(v1::WriteInfo { node: 2, log_index: 9, ..Default::default() });
    Ok(reply::Result::Write(v1::WriteReply { applied: true, version: 5, info, ..Default::default() }))
}

fn error(reason: Reason, outcome: Outcome) -> Result<reply::Result, Error> {
    Err(Error::new(reason, "so the script says").outcome(outcome))
}

#[tokio::test(start_paused = true)]
async fn a_write_is_repeated_under_its_sequence_until_it_is_answered() {
    let (mut client, script) = client(
        0,
        0.0,
        vec![
            error(Reason::Unreachable, Outcome::NotApplied),
            error(Reason::OutcomeUnknown, Outcome::Unknown),
            written(),
            written(),
        ],
    );
    let event = client.perform(&put()).await;
    assert_eq!((event.kind, event.attempts), (Kind::Ok, Some(3)));
    let srv = event.srv.unwrap();
    assert_eq!((srv.node.as_deref(), srv.log, srv.version), (Some("n2"), Some(9), Some(5)));
    let event = client.perform(&put()).await;
    assert_eq!((event.kind, event.attempts, event.req), (Kind::Ok, None, Some(format!("{}/2", "07".repeat(16)))));
    assert_eq!(script.sequences(), [Some(1), Some(1), Some(1), Some(2)]);
}

#[tokio::test(start_paused = true)]
async fn a_write_that_may_have_happened_does_not_fail_whatever_comes_last() {
    let (mut client, script) = client(
        0,
        0.0,
        vec![
            error(Reason::OutcomeUnknown, Outcome::Unknown),
            error(Reason::SessionExpired, Outcome::NotApplied),
            error(Reason::KeyspaceUnknown, Outcome::NotApplied),
        ],
    );
    let first = client.perform(&put()).await;
    assert_eq!((first.kind, first.attempts), (Kind::Info, Some(2)));
    assert!(first.error.is_some_and(|error| error.code == "SESSION_EXPIRED" && !error.definite));
    let second = client.perform(&put()).await;
    assert_ne!(first.process, second.process);
    assert_eq!(second.kind, Kind::Fail, "that one was never taken");
    assert_eq!(script.sequences(), [Some(1), Some(1), Some(1)], "the session that was forgotten was left");
}

#[tokio::test(start_paused = true)]
async fn answers_are_thrown_away_so_that_writes_are_repeated() {
    let answers = (0..=DROPS_MAX).map(|_| written()).collect();
    let (mut client, script) = client(0, 1.0, answers);
    let event = client.perform(&put()).await;
    assert_eq!((event.kind, event.attempts), (Kind::Ok, Some(DROPS_MAX + 1)));
    assert!(script.sequences().iter().all(|sequence| *sequence == Some(1)));
}

#[tokio::test(start_paused = true)]
async fn without_a_session_nothing_is_sent_again_or_thrown_away() {
    let (mut client, script) = client(
        1,
        1.0,
        vec![written(), error(Reason::Unreachable, Outcome::Unknown), Err(Error::new(Reason::NoQuorum, "alone"))],
    );
    assert_eq!(client.perform(&put()).await.kind, Kind::Ok);
    assert_eq!(client.perform(&put()).await.kind, Kind::Info);
    assert_eq!(script.sequences(), [None, None]);
    let read = client.perform(&Op::Read { key: "k".to_owned(), mode: ReadMode::default() }).await;
    assert_eq!(read.kind, Kind::Fail, "a read changes nothing");
}

#[tokio::test(start_paused = true)]
async fn an_unmet_condition_is_a_failure_that_says_what_was_found() {
    let unmet = |previous| {
        let info = Some(v1::WriteInfo::default());
        Ok(reply::Result::Write(v1::WriteReply { applied: false, previous, info, ..Default::default() }))
    };
    let row = v1::Row { value: "3:9".into(), ..Default::default() };
    let (mut client, _) = client(0, 0.0, vec![unmet(Some(row)), unmet(None)]);
    let cas = Op::Cas { key: "k".to_owned(), old: Some("0:1".to_owned()), new: None };
    for found in [json!("3:9"), Json::Null] {
        let event = client.perform(&cas).await;
        assert_eq!((event.kind, event.observed), (Kind::Fail, Some(found)));
        assert!(event.error.is_some_and(|error| error.code == "cas-mismatch" && error.definite));
    }
}
