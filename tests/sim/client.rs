//! A client: asks any node, keeps one session, and repeats a write under its sequence until it knows the outcome.

use crate::world::{PATIENCE, World};
use meridian::{
    env::spawn,
    error::{Error, Outcome, Reason},
    proto::v1,
};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use v1::{reply::Result as Answer, request::Op};

/// Time that a request is given.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// No answer comes later than this after its deadline.
const LATE: Duration = Duration::from_millis(100);

/// Asks one node. A node that does not run, or crashes meanwhile, is an error with what is known of a write.
pub(crate) async fn ask(world: &World, n: u64, op: Op, patience: Duration) -> Result<Answer, Error> {
    let Some(life) = world.life(n) else {
        return Err(Error::new(Reason::Unreachable, format!("node {n} is down")).outcome(Outcome::NotApplied));
    };
    let request = v1::Request { id: 0, deadline_ms: 0, route: None, op: Some(op) };
    let deadline = Instant::now() + patience;
    let responder = life.responder;
    let asked = life.scope.enter(|| spawn(async move { responder.answer(request, deadline).await }));
    let answer = match asked.await {
        Ok(answer) => answer,
        Err(ended) if ended.is_cancelled() => {
            Err(Error::new(Reason::Unreachable, format!("node {n} crashed")).outcome(Outcome::Unknown))
        }
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    };
    assert!(Instant::now() <= deadline + LATE, "an answer came {:?} late: {answer:?}", Instant::now() - deadline);
    answer
}

/// What a read asks for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Level {
    Linearizable,
    Lease,
    Eventual,
}

impl Level {
    fn options(self) -> Option<v1::ReadOptions> {
        let consistency = match self {
            Self::Linearizable => return None,
            Self::Lease => v1::Consistency::Lease,
            Self::Eventual => v1::Consistency::Eventual,
        };
        Some(v1::ReadOptions { consistency: consistency as i32, ..Default::default() })
    }
}

pub(crate) async fn get(
    world: &World,
    n: u64,
    keyspace: &str,
    key: &str,
    level: &Level,
    patience: Duration,
) -> Result<v1::GetReply, Error> {
    let get = v1::GetRequest { keyspace: keyspace.into(), key: key.to_owned().into(), options: level.options() };
    match ask(world, n, Op::Get(get), patience).await? {
        Answer::Get(reply) => Ok(reply),
        other => panic!("asked for a row, got {other:?}"),
    }
}

/// Every row of a range, in order, through one node; as many pages as it takes.
pub(crate) async fn scan(world: &World, n: u64, keyspace: &str, page_rows: u32) -> Result<Vec<v1::Row>, Error> {
    let mut scan = v1::ScanRequest { keyspace: keyspace.into(), page_rows, ..Default::default() };
    let mut rows = Vec::new();
    loop {
        let page = match ask(world, n, Op::Scan(scan.clone()), DEADLINE).await? {
            Answer::Scan(page) => page,
            other => panic!("asked for a page, got {other:?}"),
        };
        assert!(page.missing.is_empty());
        rows.extend(page.rows);
        if page.next_page_token.is_empty() {
            return Ok(rows);
        }
        scan.page_token = page.next_page_token;
    }
}

/// A writer with a session of its own.
pub(crate) struct Writer {
    world: World,
    name: String,
    session: v1::OpenSessionReply,
    sequence: u64,
}

impl Writer {
    pub(crate) async fn open(world: &World, name: &str) -> Self {
        loop {
            let nodes = world.running();
            if !nodes.is_empty() {
                let n = nodes[world.draw(nodes.len() as u64) as usize];
                if let Ok(Answer::OpenSession(session)) =
                    ask(world, n, Op::OpenSession(v1::OpenSessionRequest {}), DEADLINE).await
                {
                    return Self { world: world.clone(), name: name.to_owned(), session, sequence: 0 };
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// The session of the next write.
    pub(crate) fn next(&mut self) -> v1::WriteSession {
        self.sequence += 1;
        self.again()
    }

    /// The session of the last write, to repeat it.
    pub(crate) fn again(&self) -> v1::WriteSession {
        v1::WriteSession {
            client_id: self.session.client_id.clone(),
            opened: self.session.opened,
            sequence: self.sequence,
            acknowledged_below: self.sequence,
        }
    }

    /// Repeats a write through any node until its outcome is known.
    ///
    /// Errors that are about the write itself, not about the cluster, fail the test: there is nothing wrong with it.
    pub(crate) async fn settle(&mut self, op: Op) -> v1::WriteReply {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let nodes = self.world.all();
            let n = nodes[self.world.draw(nodes.len() as u64) as usize];
            let answer = ask(&self.world, n, op.clone(), DEADLINE).await;
            self.world.note(format_args!("{} #{} via {n}: {answer:?}", self.name, self.sequence));
            match answer {
                Ok(Answer::Write(reply)) => {
                    return reply;
                }
                Ok(other) => panic!("wrote, got {other:?}"),
                Err(error) => {
                    assert!(error.outcome.is_some(), "an error of a write says what is known of it: {error:?}");
                    let cluster = error.is_retryable() || error.reason == Reason::DeadlineExceeded;
                    assert!(cluster, "{} #{} was refused: {error:?}", self.name, self.sequence);
                    assert!(Instant::now() < give_up, "{} #{} in vain: {error:?}", self.name, self.sequence);
                }
            }
            sleep(Duration::from_millis(20 + self.world.draw(80))).await;
        }
    }

    pub(crate) async fn put(&mut self, keyspace: &str, key: &str, value: &str) -> v1::WriteReply {
        let op = Op::Put(v1::PutRequest {
            keyspace: keyspace.into(),
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            session: Some(self.next()),
            ..Default::default()
        });
        self.settle(op).await
    }

    /// An increment by one under the next sequence.
    pub(crate) fn increment(&mut self, keyspace: &str, key: &str) -> Op {
        Op::Increment(v1::IncrementRequest {
            keyspace: keyspace.into(),
            key: key.to_owned().into(),
            delta: 1,
            return_previous: false,
            session: Some(self.next()),
        })
    }
}
