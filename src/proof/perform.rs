//! A client of a workload: carries out one operation at a time and writes down what it was told.
//!
//! Invariants:
//! * an operation is one pair of events, however often it was sent;
//! * it fails only if it has certainly not happened; when any attempt is in doubt and the last one failed, nobody knows;
//! * after an outcome that is not known the client goes on as another process;
//! * a write is sent again only under its session and sequence.

use super::{
    door::Door,
    history::{Event, Failure, Kind, Mode, Process, ReadMode},
    recorder::Recorder,
    wire::{Op, Scan, Written, served, served_all},
    workload::{Settings, Workload},
};
use crate::{
    client::token::SessionToken,
    error::{Error, Outcome, Reason},
    proto::v1::{self, reply, request},
};
use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value as Json, json};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

/// Times that one write, or one page, is sent.
const ATTEMPTS_MAX: u32 = 16;
/// An attempt that may be followed by another gets this part of the time left.
const ATTEMPT_SHARE: u32 = 3;
/// Answers to one write that are thrown away.
const DROPS_MAX: u32 = 3;
/// Pause between attempts, in milliseconds.
const RETRY_PAUSE_MS: std::ops::RangeInclusive<u64> = 5..=80;
/// Pages of one scan; it stops there, and says so.
const PAGES_MAX: usize = 200;
/// Share of pages that are asked of another door than the page before.
const TURN_SHARE: f64 = 0.3;

/// One client.
pub(crate) struct Client {
    pub(crate) rng: StdRng,
    settings: Arc<Settings>,
    doors: Arc<[Arc<dyn Door>]>,
    recorder: Arc<Recorder>,
    process: Process,
    values: u64,
    /// Keeps a write session of its own; otherwise it leaves repeating to whoever it asks.
    keeps_session: bool,
    session: Option<Session>,
    chain: Option<Chain>,
}

/// A write session.
struct Session {
    name: String,
    opened: v1::OpenSessionReply,
    sequence: u64,
}

/// What one user has seen, from answer to answer.
struct Chain {
    name: String,
    seen: SessionToken,
}

/// The end of a write: its answer, or why there is none.
struct Sent {
    answer: Result<reply::Result, Error>,
    /// An attempt may have been applied, or may still be.
    in_doubt: bool,
    attempts: u32,
    door: usize,
}

impl Client {
    /// The client of this number; numbers of one run differ.
    pub(crate) fn new(
        settings: Arc<Settings>,
        doors: Arc<[Arc<dyn Door>]>,
        recorder: Arc<Recorder>,
        number: u64,
    ) -> Self {
        assert!(!doors.is_empty(), "a workload needs a door");
        let follows = settings.levels.iter().any(|level| level.mode == Mode::Session);
        let chain = follows.then(|| Chain { name: format!("s{number}"), seen: SessionToken::default() });
        Self {
            rng: StdRng::seed_from_u64(settings.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number)),
            process: recorder.process(),
            values: 0,
            keeps_session: number.is_multiple_of(2),
            session: None,
            chain,
            settings,
            doors,
            recorder,
        }
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A value that nobody has written before.
    pub(crate) fn fresh_value(&mut self) -> String {
        let Process::Client(process) = self.process else { unreachable!("clients are not the nemesis") };
        self.values += 1;
        format!("{process}:{}", self.values)
    }

    /// One of the levels to read at.
    pub(crate) fn draw_level(&mut self) -> ReadMode {
        let n = self.rng.random_range(0..self.settings.levels.len());
        self.settings.levels[n]
    }

    /// Waits as the settings say.
    pub(crate) async fn pause(&mut self) {
        let (least, most) = (*self.settings.pause.start(), *self.settings.pause.end());
        let us = self.rng.random_range(least.as_micros() as u64..=most.as_micros() as u64);
        sleep(Duration::from_micros(us)).await;
    }

    /// Carries out an operation through any door; returns its last event.
    pub(crate) async fn perform(&mut self, op: &Op) -> Event {
        let door = self.draw_door();
        self.perform_at(op, door).await
    }

    /// Carries out an operation through this door (first).
    pub(crate) async fn perform_at(&mut self, op: &Op, door: usize) -> Event {
        let session = match op.mode() {
            None if self.keeps_session => self.next_write(door).await,
            _ => None,
        };
        let mut event = op.event(self.process);
        event.node = self.doors[door].node();
        event.req = session.as_ref().map(|(req, _)| req.clone());
        event.session = self.chain.as_ref().filter(|_| is_chained(op)).map(|chain| chain.name.clone());
        self.recorder.invoke(event.clone());
        let deadline = Instant::now() + self.settings.deadline;
        match op {
            Op::Read { .. } => self.read(op, door, deadline, &mut event).await,
            Op::Scan(scan) => self.scan(op, scan, door, deadline, &mut event).await,
            _ => self.write(op, session.map(|(_, session)| session), door, deadline, &mut event).await,
        }
        self.recorder.complete(event.clone());
        if event.kind == Kind::Info {
            self.process = self.recorder.process();
            self.values = 0;
        }
        event
    }

    fn draw_door(&mut self) -> usize {
        self.rng.random_range(0..self.doors.len())
    }

    /// Where the next write stands in the client's session. None if there is none to be had at the moment.
    async fn next_write(&mut self, door: usize) -> Option<(String, v1::WriteSession)> {
        if self.session.is_none() {
            let open = request::Op::OpenSession(v1::OpenSessionRequest {});
            let request = v1::Request { op: Some(open), ..Default::default() };
            let deadline = Instant::now() + self.settings.deadline;
            if let Ok(reply::Result::OpenSession(opened)) = self.doors[door].ask(request, deadline).await {
                let name = opened.client_id.iter().map(|byte| format!("{byte:02x}")).collect();
                self.session = Some(Session { name, opened, sequence: 0 });
            }
        }
        let session = self.session.as_mut()?;
        session.sequence += 1;
        let next = v1::WriteSession {
            client_id: session.opened.client_id.clone(),
            opened: session.opened.opened,
            sequence: session.sequence,
            acknowledged_below: session.sequence,
        };
        Some((format!("{}/{}", session.name, session.sequence), next))
    }

    async fn read(&mut self, op: &Op, door: usize, deadline: Instant, event: &mut Event) {
        let request = op.request(&self.settings.keyspace, None, self.token(), Bytes::new());
        match self.doors[door].ask(request, deadline).await {
            Ok(reply::Result::Get(get)) => {
                event.kind = Kind::Ok;
                event.value = get.row.as_ref().map_or(Json::Null, |row| self.value_of(&row.value));
                let version = get.row.as_ref().map(|row| row.version);
                event.srv = get.read.as_ref().map(|read| served(read, version));
                if event.session.is_some() {
                    self.see(get.read.map(|read| read.session_token).unwrap_or_default());
                }
            }
            Ok(_) => fail(event, &mismatched()),
            Err(error) => fail(event, &error),
        }
    }

    async fn write(
        &mut self,
        op: &Op,
        session: Option<v1::WriteSession>,
        door: usize,
        deadline: Instant,
        event: &mut Event,
    ) {
        let repeats = session.is_some();
        let request = op.request(&self.settings.keyspace, session, Bytes::new(), Bytes::new());
        let sent = self.send(&request, repeats, door, deadline).await;
        event.node = self.doors[sent.door].node();
        event.attempts = (sent.attempts > 1).then_some(sent.attempts);
        let written = sent.answer.and_then(|result| Written::of(result).ok_or_else(mismatched));
        match written {
            Ok(written) => {
                self.take(op, &written, event);
                event.srv = written.srv;
                if event.session.is_some() {
                    self.see(written.token);
                }
            }
            Err(error) => {
                // A session that partitions refuse is of no use to the next write.
                if matches!(error.reason, Reason::SessionExpired | Reason::SessionAhead | Reason::SequenceReused) {
                    self.session = None;
                }
                let definite = !sent.in_doubt && error.outcome == Some(Outcome::NotApplied);
                event.kind = if definite { Kind::Fail } else { Kind::Info };
                event.error = Some(failure(&error, definite));
            }
        }
    }

    /// What an answer says of its write.
    fn take(&self, op: &Op, written: &Written, event: &mut Event) {
        event.kind = if written.applied { Kind::Ok } else { Kind::Fail };
        if written.applied {
            if let Some(number) = written.number {
                event.value = json!(number);
            }
            return;
        }
        let msg = String::new();
        event.error = Some(Failure { code: "cas-mismatch".to_owned(), definite: true, msg });
        if matches!(op, Op::Cas { .. }) {
            event.observed = Some(written.previous.as_ref().map_or(Json::Null, |value| self.value_of(value)));
        }
    }

    /// Sends a write until its answer comes: again, through any door, only if it `repeats` under its sequence.
    async fn send(&mut self, request: &v1::Request, repeats: bool, mut door: usize, deadline: Instant) -> Sent {
        let (mut in_doubt, mut attempts) = (false, 0);
        loop {
            attempts += 1;
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            let soon = if repeats { now + left / ATTEMPT_SHARE } else { deadline };
            let answer = self.doors[door].ask(request.clone(), soon).await;
            let drops = repeats && attempts <= DROPS_MAX && self.rng.random_bool(self.settings.drop_replies);
            let error = match answer {
                Ok(_) if drops => Error::new(Reason::Unreachable, "the answer was lost").outcome(Outcome::Unknown),
                Ok(result) => return Sent { answer: Ok(result), in_doubt, attempts, door },
                Err(error) => error,
            };
            in_doubt |= error.outcome != Some(Outcome::NotApplied);
            let pause = Duration::from_millis(self.rng.random_range(RETRY_PAUSE_MS));
            if !repeats || !may_repeat(&error) || attempts == ATTEMPTS_MAX || Instant::now() + pause >= deadline {
                return Sent { answer: Err(error), in_doubt, attempts, door };
            }
            sleep(pause).await;
            door = self.draw_door();
        }
    }

    async fn scan(&mut self, op: &Op, scan: &Scan, mut door: usize, deadline: Instant, event: &mut Event) {
        let (mut rows, mut pages, mut token) = (Vec::new(), Vec::new(), Bytes::new());
        let mut attempts = 0;
        let more = loop {
            let request = op.request(&self.settings.keyspace, None, self.token(), token.clone());
            let error = match self.doors[door].ask(request, deadline).await {
                Ok(reply::Result::Scan(page)) => {
                    let srv = served_all(page.reads.iter().map(|read| served(read, None)));
                    event.srv = served_all(event.srv.take().into_iter().chain(srv.clone()));
                    pages.push(json!({"n": page.rows.len(), "srv": srv}));
                    rows.extend(page.rows);
                    if event.session.is_some() {
                        page.reads.into_iter().for_each(|read| self.see(read.session_token));
                    }
                    token = page.next_page_token;
                    if token.is_empty() || pages.len() == PAGES_MAX {
                        break !token.is_empty() || scan.limit == Some(rows.len() as u64);
                    }
                    attempts = 0;
                    if self.rng.random_bool(TURN_SHARE) {
                        door = self.draw_door();
                    }
                    continue;
                }
                Ok(_) => mismatched(),
                Err(error) => error,
            };
            attempts += 1;
            let pause = Duration::from_millis(self.rng.random_range(RETRY_PAUSE_MS));
            if !may_repeat(&error) || attempts == ATTEMPTS_MAX || Instant::now() + pause >= deadline {
                if pages.is_empty() {
                    return fail(event, &error);
                }
                break true;
            }
            sleep(pause).await;
            door = self.draw_door();
        };
        let kvs = rows.iter().map(|row| json!([text(&row.key), self.value_of(&row.value)])).collect::<Json>();
        event.kind = Kind::Ok;
        event.value = json!({"kvs": kvs, "more": more, "pages": pages});
    }

    fn token(&self) -> Bytes {
        self.chain.as_ref().map(|chain| chain.seen.encode()).unwrap_or_default()
    }

    fn see(&mut self, token: Bytes) {
        if let Some(chain) = &mut self.chain {
            chain.seen.join(&SessionToken::decode(token).expect("nodes hand out well-formed tokens"));
        }
    }

    fn value_of(&self, bytes: &[u8]) -> Json {
        let text = text(bytes);
        match self.settings.workload {
            Workload::Counter => text.parse::<i64>().map_or_else(|_| json!(text), |number| json!(number)),
            _ => json!(text),
        }
    }
}

/// Whether an operation takes part in its client's session: it then sees what the session has seen.
fn is_chained(op: &Op) -> bool {
    op.mode().is_none_or(|read| matches!(read.mode, Mode::Linearizable | Mode::Lease | Mode::Session))
}

fn may_repeat(error: &Error) -> bool {
    error.is_retryable() || error.reason == Reason::DeadlineExceeded
}

fn mismatched() -> Error {
    Error::new(Reason::Internal, "the answer is not one to this request").outcome(Outcome::Unknown)
}

/// A read that failed has changed nothing.
fn fail(event: &mut Event, error: &Error) {
    event.kind = Kind::Fail;
    event.error = Some(failure(error, true));
}

fn failure(error: &Error, definite: bool) -> Failure {
    Failure { code: error.reason.as_str().to_owned(), definite, msg: error.message.to_string() }
}

/// Keys and values of the workloads are text.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests;
