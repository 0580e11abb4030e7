//! One request to one partition: which replica to ask, what an error means, when to try again and when to stop.
//!
//! Invariants:
//! * a write is tried again only if nothing of it can have been proposed, or it carries a session and goes out under
//!   the same sequence with the same content;
//! * an error says "not applied" only if every attempt was refused before it was proposed, or the last one was settled
//!   by the log itself;
//! * every wait is bounded, by its own constant and by the deadline;
//! * a node that is overloaded is asked less, not more: a refused write is not taken to other members, is sent again no
//!   earlier than the node says, and only while such repetitions are few beside the requests ([`Repeats`]).

use super::{
    horizon,
    query::Serve,
    router::{Caller, Question, Router, session_mut},
};
use crate::{
    env,
    error::{Code, Error, Outcome, Reason},
    key::{NodeId, PartitionId},
    placement::{Map, Partition},
    plant::{Bug, planted},
    proto::v1::{self, reply, request},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::time::Instant;

/// No attempt at an idempotent request is given less than this, unless the deadline is nearer.
pub(crate) const ATTEMPT_MIN: Duration = Duration::from_millis(500);
/// Wait after the first round of attempts in which every replica refused.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest wait between two rounds.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Longest wait for a node that is overloaded, and half as much again: as long as one asks for.
const OVERLOADED_MAX: Duration = Duration::from_secs(2);
/// Repetitions after an overload that may be saved up.
const REPEATS_MAX: u64 = 512;
/// Requests that earn one.
const REQUESTS_PER_REPEAT: u64 = 5;
/// Without a quorum, any contact or a replica that is fresh enough for this long, a request fails instead of waiting for its deadline.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// The same once a member has said that it has no quorum: it has waited for the others already.
const NO_QUORUM_PATIENCE: Duration = Duration::from_millis(500);
/// Longest wait for a newer map at once.
pub(crate) const REFRESH_MAX: Duration = Duration::from_millis(300);
/// Changes of the map that a request follows without waiting.
const MOVES_FREE: u32 = 3;

/// How long a request goes on while nobody can serve it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Patience {
    /// To the deadline while an election may be going on, [`PATIENCE`] or less without a quorum.
    Usual,
    /// [`PATIENCE`] in either case: there is another way to answer.
    Short,
    /// Every replica is asked once.
    Once,
}

/// Whether a request writes, and whether it may be sent twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    /// It reads.
    Read,
    /// It writes under a session and sequence: sending it again is safe.
    Write,
    /// It writes under its caller's session: there may have been attempts of which this router knows nothing.
    WriteForCaller,
}

/// Where a request belongs in a map: `None` if the map does not know, an error if nowhere.
pub(crate) type Place<'a> = &'a (dyn Fn(&Map) -> Result<Option<PartitionId>, Error> + Send + Sync);

/// One request to the partition that `place` finds.
pub(crate) struct Job<'a> {
    pub(crate) place: Place<'a>,
    pub(crate) op: &'a request::Op,
    pub(crate) tokens: Option<v1::Tokens>,
    pub(crate) serve: Serve,
    pub(crate) effect: Effect,
    pub(crate) patience: Patience,
    /// It may take long by itself: counts and ranged deletes.
    pub(crate) heavy: bool,
    pub(crate) deadline: Instant,
}

/// An answer and where it came from.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) partition: PartitionId,
    pub(crate) node: NodeId,
    pub(crate) result: reply::Result,
    /// Nodes asked until one answered.
    pub(crate) attempts: u32,
}

/// How many requests may be sent again because a node was overloaded: so many at once, then one for every few requests.
/// Without that, repetitions would keep up an overload whose cause is gone.
#[derive(Debug)]
pub(crate) struct Repeats(AtomicU64);

impl Default for Repeats {
    fn default() -> Self {
        Self(AtomicU64::new(REPEATS_MAX * REQUESTS_PER_REPEAT))
    }
}

impl Repeats {
    fn earn(&self) {
        // Lost races only make it a little less exact.
        let saved = self.0.load(Ordering::Relaxed);
        if saved < REPEATS_MAX * REQUESTS_PER_REPEAT {
            self.0.store(saved + 1, Ordering::Relaxed);
        }
    }

    fn spend(&self) -> bool {
        let less = |saved: u64| saved.checked_sub(REQUESTS_PER_REPEAT);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

/// What has been tried so far.
struct Tries {
    /// Nodes asked in this round.
    asked: BTreeSet<NodeId>,
    /// The last refusal of each node, for the error at the end.
    refusals: BTreeMap<NodeId, Error>,
    round_began: Instant,
    /// Nobody in this round had contact with a quorum, or was fresh enough.
    round_hopeless: bool,
    /// The only one who can serve it has no room: asking the others is of no use.
    round_over: bool,
    /// The map may be old.
    map_doubtful: bool,
    hopeless_since: Option<Instant>,
    /// An attempt may have been proposed.
    ambiguous: bool,
    attempts: u32,
    rounds: u32,
    moves: u32,
    last: Option<Error>,
}

impl<C: Caller> Router<C> {
    /// Runs a request to its answer or to the error that the user sees.
    pub(crate) async fn run(&self, job: &Job<'_>) -> Result<Served, Error> {
        self.repeats().earn();
        match self.run_first(job).await {
            First::Served(served) => Ok(served),
            First::Failed(failed) => Box::pin(self.run_on(job, Some(failed))).await,
            First::NotAsked => Box::pin(self.run_on(job, None)).await,
        }
    }

    /// The first attempt, if all is as usual: nearly every request is answered by the first node that is asked.
    async fn run_first(&self, job: &Job<'_>) -> First {
        let map = self.routing().map();
        let is_new_enough = horizon::least_map(job.op).is_ok_and(|least| map.version() >= least);
        let place = (job.place)(&map).ok().flatten().filter(|_| is_new_enough);
        let Some(partition) = place.and_then(|id| map.partition(id)) else { return First::NotAsked };
        let Some(node) = self.pick(partition, job.serve, &BTreeSet::new()) else { return First::NotAsked };
        let began = Instant::now();
        let Some(deadline) = attempt_deadline(job, began, None) else { return First::NotAsked };
        match self.ask(partition.id, node, (job.op, job.tokens), deadline).await {
            Ok(mut result) => {
                horizon::tag(&mut result, partition.epoch.bounds, map.version());
                First::Served(Served { partition: partition.id, node, result, attempts: 1 })
            }
            Err(error) => First::Failed(Failed { node, error, map_version: map.version(), began }),
        }
    }

    /// Goes on after a first attempt, if there was one.
    async fn run_on(&self, job: &Job<'_>, failed: Option<Failed>) -> Result<Served, Error> {
        let mut tries = Tries::new();
        if let Some(Failed { node, error, map_version, began }) = failed {
            tries.attempts = 1;
            tries.round_began = began;
            self.failed(job, &mut tries, node, error, map_version).await?;
        }
        self.catch_up(job).await?;
        loop {
            let map = self.routing().map();
            let place = (job.place)(&map).map_err(|error| tries.finish(job, error))?;
            let partition = place.and_then(|id| map.partition(id));
            tries.map_doubtful |= partition.is_none();
            let open = partition.filter(|_| !tries.round_over);
            let node = open.and_then(|partition| self.pick(partition, job.serve, &tries.asked));
            let (Some(partition), Some(node)) = (partition, node) else {
                self.next_round(job, &mut tries, &map).await?;
                continue;
            };
            // A pause may end a little late: what was said before it tells more than that the time is over.
            if tries.last.is_some() && Instant::now() >= job.deadline {
                return Err(tries.give_up(job));
            }
            let error = match self.attempt(job, partition.id, node, &mut tries).await {
                Ok(mut result) => {
                    horizon::tag(&mut result, partition.epoch.bounds, map.version());
                    return Ok(Served { partition: partition.id, node, result, attempts: tries.attempts });
                }
                Err(error) => error,
            };
            self.failed(job, &mut tries, node, error, map.version()).await?;
        }
    }

    /// Learns from the error of one attempt, made by a map of this version: the error that ends the request, or go on.
    async fn failed(
        &self,
        job: &Job<'_>,
        tries: &mut Tries,
        node: NodeId,
        error: Error,
        version: u64,
    ) -> Result<(), Error> {
        let hint = error.hint;
        let elsewhere = error.reason == Reason::WrongPartition;
        tries.judge(job, node, error)?;
        if let Some(hint) = hint {
            self.routing().learn(&hint);
            if elsewhere && hint.map_version > version {
                let deadline = (Instant::now() + REFRESH_MAX).min(job.deadline);
                self.refresh_until(version, deadline).await;
                tries.moved(self.routing().look().version() > version);
            }
        }
        Ok(())
    }

    /// Waits for a map as new as what the session has seen.
    async fn catch_up(&self, job: &Job<'_>) -> Result<(), Error> {
        let least = horizon::least_map(job.op)?;
        if least == 0 {
            return Ok(());
        }
        loop {
            let version = self.routing().look().version();
            if version >= least {
                return Ok(());
            }
            if Instant::now() >= job.deadline {
                let message = format!(
                    "the session has seen version {least} of the map, and only {version} has come here; try again, or ask \
                     another node"
                );
                return Err(Error::new(Reason::TooStale, message).with("wanted", least));
            }
            self.refresh_until(version, job.deadline).await;
        }
    }

    /// Sends a request to one node's replica and waits for what it says.
    pub(crate) async fn ask(
        &self,
        partition: PartitionId,
        node: NodeId,
        (op, tokens): (&request::Op, Option<v1::Tokens>),
        deadline: Instant,
    ) -> Result<reply::Result, Error> {
        let question = Question { route: Some(v1::Route { partition: partition.0, tokens }), op };
        let answer = match self.caller().call(node, question, deadline).await {
            Ok(v1::Reply { result: Some(reply::Result::Error(error)), .. }) => Err(Error::from(error)),
            Ok(v1::Reply { result: Some(result), .. }) => Ok(result),
            Ok(v1::Reply { result: None, .. }) => Err(Error::new(Reason::Internal, format!("{node} answered nothing"))),
            Err(error) => Err(error),
        };
        match &answer {
            Err(error) if is_contact_lost(error.reason) => self.suspect(node),
            _ => self.trust(node),
        }
        answer
    }

    async fn attempt(
        &self,
        job: &Job<'_>,
        partition: PartitionId,
        node: NodeId,
        tries: &mut Tries,
    ) -> Result<reply::Result, Error> {
        let Some(deadline) = attempt_deadline(job, Instant::now(), Some(tries)) else {
            return Err(Error::new(Reason::DeadlineExceeded, "the deadline passed").outcome(Outcome::NotApplied));
        };
        tries.attempts += 1;
        if tries.attempts > 1 && planted(Bug::RetryRenumbered) {
            let mut op = job.op.clone();
            if let Some(Some(session)) = session_mut(&mut op) {
                session.sequence += u64::from(tries.attempts) << 32;
            }
            return self.ask(partition, node, (&op, job.tokens), deadline).await;
        }
        self.ask(partition, node, (job.op, job.tokens), deadline).await
    }

    /// The next replica to ask: the leader or the nearest first, nodes that just failed last.
    fn pick(&self, partition: &Partition, serve: Serve, asked: &BTreeSet<NodeId>) -> Option<NodeId> {
        let members = &partition.members;
        let (first, start) = match serve {
            Serve::Leader | Serve::LeaderFirst => (self.routing().leader(partition.id).map(|leader| leader.node), 0),
            Serve::Anyone => {
                let near = self.caller().prefer().filter(|node| members.iter().any(|member| member.node == *node));
                (near, if near.is_some() { 0 } else { self.rotate() })
            }
        };
        let others = (0..members.len()).map(|i| members[(start + i) % members.len()].node);
        let mut open = first.into_iter().chain(others).filter(|node| !asked.contains(node));
        if !self.has_suspects() {
            return open.next();
        }
        let open: Vec<NodeId> = open.collect();
        open.iter().find(|node| !self.is_suspect(**node)).or_else(|| open.first()).copied()
    }

    /// Everyone was asked: gives up, or waits a little and begins again.
    async fn next_round(&self, job: &Job<'_>, tries: &mut Tries, map: &Map) -> Result<(), Error> {
        let now = Instant::now();
        if job.patience == Patience::Once && tries.attempts > 0 {
            return Err(tries.give_up(job));
        }
        let waits = job.patience == Patience::Usual && !tries.round_hopeless;
        let patience = if tries.no_quorum().is_some() { NO_QUORUM_PATIENCE } else { PATIENCE };
        tries.hopeless_since = if waits { None } else { tries.hopeless_since.or(Some(tries.round_began)) };
        if tries.hopeless_since.is_some_and(|since| now.saturating_duration_since(since) >= patience) {
            return Err(tries.give_up(job));
        }
        if tries.is_overloaded() && !(self.caller().repeats_overloaded() && self.repeats().spend()) {
            return Err(tries.give_up(job));
        }
        let pause = tries.pause();
        if now + pause >= job.deadline {
            return Err(tries.give_up(job));
        }
        if tries.map_doubtful {
            self.refresh_until(map.version(), (now + REFRESH_MAX).min(job.deadline)).await;
        }
        tokio::time::sleep_until(now + pause).await;
        tries.begin_round();
        Ok(())
    }

    pub(crate) async fn refresh_until(&self, than: u64, deadline: Instant) {
        // Without a newer map the request goes on with the one it has.
        let _ = tokio::time::timeout_at(deadline, self.caller().refresh(than)).await;
    }
}

/// What became of a first attempt.
enum First {
    Served(Served),
    Failed(Failed),
    NotAsked,
}

/// A first attempt that was not answered.
struct Failed {
    node: NodeId,
    error: Error,
    /// Version of the map that led to the node.
    map_version: u64,
    began: Instant,
}

/// Until when an attempt may take, after those `tries`; none if the time is over.
fn attempt_deadline(job: &Job<'_>, now: Instant, tries: Option<&Tries>) -> Option<Instant> {
    let left = job.deadline.checked_duration_since(now).filter(|left| !left.is_zero())?;
    let share = match job.serve {
        // The members that are left are away too, or answer soon.
        _ if tries.is_some_and(|tries| tries.no_quorum().is_some()) => Duration::ZERO,
        _ if job.heavy => left / 2,
        // Others can answer as well: one that is silent is not waited for. Whoever is merely busy gets more the next time.
        Serve::Anyone => (left / 4).min(ATTEMPT_MIN * 4_u32.pow(tries.map_or(0, |tries| tries.rounds.min(4)))),
        Serve::Leader | Serve::LeaderFirst => left / 4,
    };
    Some((now + share.max(ATTEMPT_MIN)).min(job.deadline))
}

impl Tries {
    fn new() -> Self {
        Self {
            asked: BTreeSet::new(),
            refusals: BTreeMap::new(),
            round_began: Instant::now(),
            round_hopeless: true,
            round_over: false,
            map_doubtful: false,
            hopeless_since: None,
            ambiguous: false,
            attempts: 0,
            rounds: 0,
            moves: 0,
            last: None,
        }
    }

    fn begin_round(&mut self) {
        self.asked.clear();
        self.round_began = Instant::now();
        self.round_hopeless = true;
        self.round_over = false;
        self.map_doubtful = false;
        self.rounds += 1;
    }

    /// A newer map has come, or has not.
    fn moved(&mut self, newer: bool) {
        if newer && self.moves < MOVES_FREE {
            self.moves += 1;
            self.asked.clear();
        }
    }

    /// Takes an error of one attempt: the error that ends the request, or go on.
    fn judge(&mut self, job: &Job<'_>, node: NodeId, error: Error) -> Result<(), Error> {
        if job.effect != Effect::Read && !is_definite(&error) {
            self.ambiguous = true;
        }
        tracing::debug!(%node, %error, attempt = self.attempts, "an attempt failed");
        self.refusals.insert(node, error.clone());
        self.asked.insert(node);
        let over = Instant::now() >= job.deadline;
        match error.reason {
            Reason::NoQuorum | Reason::TooStale => {}
            reason if is_contact_lost(reason) => {}
            Reason::NotLeader | Reason::LeaderUnknown | Reason::OutcomeUnknown => self.round_hopeless = false,
            Reason::Overloaded => {
                self.round_hopeless = false;
                self.round_over = job.effect != Effect::Read;
            }
            Reason::WrongPartition => {
                self.round_hopeless = false;
                self.map_doubtful = true;
            }
            _ => return Err(self.finish(job, error)),
        }
        self.last = Some(error);
        if over { Err(self.give_up(job)) } else { Ok(()) }
    }

    fn pause(&self) -> Duration {
        let part = |of: Duration| of.mul_f64((env::random_u64() % 1_000) as f64 / 2_000.0);
        let full = PAUSE_MIN.saturating_mul(1 << self.rounds.min(5)).min(PAUSE_MAX);
        match &self.last {
            Some(error) if error.reason == Reason::Overloaded => {
                let asked = Duration::from_millis(error.retry_after_ms.into()).clamp(PAUSE_MIN, OVERLOADED_MAX);
                asked + part(asked)
            }
            _ => full / 2 + part(full),
        }
    }

    fn is_overloaded(&self) -> bool {
        self.last.as_ref().is_some_and(|error| error.reason == Reason::Overloaded)
    }

    /// The error of a request that nobody could serve.
    fn give_up(&self, job: &Job<'_>) -> Error {
        let lost = |error: &Error| error.reason == Reason::NoQuorum || is_contact_lost(error.reason);
        let lost = self.refusals.values().all(lost);
        let asked: Vec<String> =
            self.refusals.iter().map(|(node, error)| format!("{node}: {}", error.reason.as_str())).collect();
        let asked = asked.join(", ");
        // Whoever answered knows more than a connection that failed.
        let telling = self.refusals.values().find(|error| !is_contact_lost(error.reason)).or(self.last.as_ref());
        let error = match (telling, self.no_quorum()) {
            (None, _) => Error::new(Reason::LeaderUnknown, "no node is known that holds this part of the keyspace"),
            (_, Some(error)) if lost => error.clone().with("still_possible", "EVENTUAL reads"),
            (Some(last), _) if lost && last.reason != Reason::NotInitialized => {
                let reason = if last.reason == Reason::DeadlineExceeded { last.reason } else { Reason::Unreachable };
                Error::new(reason, format!("no member of the partition answered ({asked}): {}", last.message))
            }
            (Some(last), _) if matches!(last.reason, Reason::NotLeader | Reason::WrongPartition) => Error::new(
                Reason::LeaderUnknown,
                format!("no replica accepted the request before its deadline ({asked}): {}", last.message),
            ),
            (Some(last), _) => last.clone(),
        };
        self.finish(job, Error { hint: None, ..error }.with("asked", asked).with("attempts", self.attempts))
    }

    /// What a member says that has too few others in contact.
    fn no_quorum(&self) -> Option<&Error> {
        self.refusals.values().find(|error| error.reason == Reason::NoQuorum)
    }

    /// An error with what is known of the write over all attempts.
    fn finish(&self, job: &Job<'_>, error: Error) -> Error {
        match job.effect {
            Effect::Read => Error { outcome: None, ..error },
            Effect::WriteForCaller if error.reason == Reason::SessionExpired => error.outcome(Outcome::Unknown),
            Effect::Write | Effect::WriteForCaller if planted(Bug::UnknownToldAsNotApplied) => {
                error.outcome(Outcome::NotApplied)
            }
            Effect::Write | Effect::WriteForCaller if self.ambiguous && !is_settled(error.reason) => Error {
                metadata: error.metadata,
                ..Error::new(
                    Reason::OutcomeUnknown,
                    format!(
                        "the write was sent and may have been applied, or may still be; the last attempt ended with {}: {}",
                        error.reason.as_str(),
                        error.message
                    ),
                )
            }
            .with("cause", error.reason.as_str())
            .outcome(Outcome::Unknown),
            Effect::Write | Effect::WriteForCaller => error.outcome(Outcome::NotApplied),
        }
    }
}

/// The log itself decided, under the write's own sequence: earlier attempts have been or will be answered the same.
const fn is_settled(reason: Reason) -> bool {
    matches!(reason, Reason::NotFound | Reason::NotANumber | Reason::NumberOverflow)
}

/// Whether a refused write has certainly not been applied by that attempt, and will not be.
fn is_definite(error: &Error) -> bool {
    match error.outcome {
        // It is unknown of earlier attempts, which have been judged already.
        _ if error.reason == Reason::SessionExpired => true,
        Some(outcome) => outcome == Outcome::NotApplied,
        None => {
            matches!(error.reason, Reason::NotLeader | Reason::WrongPartition | Reason::NotInitialized)
                || error.reason.code() == Code::InvalidArgument
        }
    }
}

const fn is_contact_lost(reason: Reason) -> bool {
    matches!(reason, Reason::Unreachable | Reason::Stopping | Reason::DeadlineExceeded | Reason::NotInitialized)
}

/// Whether a read may be answered in a weaker way, or a part of a scan left out, after this error.
pub(crate) const fn is_unavailable(reason: Reason) -> bool {
    matches!(reason, Reason::NoQuorum | Reason::LeaderUnknown | Reason::TooStale | Reason::Overloaded)
        || (is_contact_lost(reason) && !matches!(reason, Reason::NotInitialized))
}
