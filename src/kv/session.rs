//! Sessions: what each client has been answered, so that a repeated write is answered again and not applied again.
//!
//! Time is the log's own: the partition's last version. Nothing here depends on when or where it runs.
//!
//! Every limit and constant here decides in apply: replicas must agree on them, so the limits are part of the state
//! and a constant may change only together with the command format.
//!
//! Invariants:
//! * a sequence at or above a client's floor is either remembered or was never applied;
//! * a client that is not in the table and was opened after the horizon has never been applied here;
//! * so a write that is neither remembered nor refused is new.

use super::codec::{DecodeError, Reader, Sink, mix, put_u64, put_varint};
use super::command::Session;
use super::reply::{self, Answer, Refusal};
use crate::key::{Version, version_at};
use crate::plant::{Bug, planted};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// How far ahead of the partition's time a session may claim to have been opened. One that lies would otherwise push
/// the horizon, when it is forgotten, past every honest one.
pub const SESSION_AHEAD_MAX_MS: u64 = 5 * 60 * 1000;

/// A session's last use is noted this coarsely, so that most writes leave the order of use alone.
const USE_GRAIN_MS: u64 = 1000;

/// What an answer counts besides its keys and values. A fixed number, not what this build's types happen to take:
/// it decides what is forgotten, and replicas of different builds must decide alike.
const REMEMBERED_BYTES: u64 = 128;

/// What one partition remembers of its clients. Part of the replicated state: equal on every replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionLimits {
    /// Clients; the one that was used longest ago makes room. At least 1.
    pub sessions_max: u64,
    /// Answers per client; the lowest sequence makes room. At least 1.
    pub replies_per_session_max: u64,
    /// Bytes of answers per client; the lowest sequence makes room. A single answer that is larger (rows asked for with
    /// `return_previous`) is not remembered: its repetition is refused as of a session that has expired.
    pub session_bytes_max: u64,
    /// Bytes of answers of all clients.
    pub bytes_max: u64,
    /// A client that has not written for this long of log time is forgotten.
    pub idle_ms_max: u64,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            sessions_max: 16_384,
            replies_per_session_max: 4_096,
            session_bytes_max: 2 << 20,
            bytes_max: 32 << 20,
            idle_ms_max: 60 * 60 * 1000,
        }
    }
}

impl SessionLimits {
    pub(super) fn encode(&self, out: &mut impl Sink) {
        put_varint(out, self.sessions_max);
        put_varint(out, self.replies_per_session_max);
        put_varint(out, self.session_bytes_max);
        put_varint(out, self.bytes_max);
        put_varint(out, self.idle_ms_max);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            sessions_max: reader.varint()?,
            replies_per_session_max: reader.varint()?,
            session_bytes_max: reader.varint()?,
            bytes_max: reader.varint()?,
            idle_ms_max: reader.varint()?,
        })
    }
}

/// The clients of a snapshot: shared with the table until it changes them.
pub(super) type Clients = BTreeMap<u128, Arc<Client>>;

/// What is remembered of one client.
#[derive(Clone, Debug)]
pub(super) struct Client {
    opened: Version,
    /// Every sequence below is refused unless remembered: it may have been applied and forgotten.
    floor: u64,
    last_used: Version,
    bytes: u64,
    /// Ascending sequences, all at or above `floor`.
    replies: VecDeque<Remembered>,
}

#[derive(Clone, Debug)]
struct Remembered {
    sequence: u64,
    fingerprint: u64,
    answer: Answer,
}

impl Remembered {
    fn bytes(&self) -> u64 {
        REMEMBERED_BYTES + reply::heap_bytes(&self.answer)
    }

    fn digest(&self, client: u128) -> u64 {
        let name = mix((client >> 64) as u64) ^ client as u64;
        mix(mix(name ^ mix(self.sequence)) ^ self.fingerprint)
    }
}

/// Sums over every answer remembered.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    bytes: u64,
    digest: u64,
}

/// Every client of a partition.
#[derive(Clone, Debug)]
pub(super) struct Sessions {
    limits: SessionLimits,
    clients: Clients,
    by_use: BTreeSet<(Version, u128)>,
    horizon: Version,
    totals: Totals,
}

impl Sessions {
    pub(super) fn new(limits: SessionLimits, horizon: Version) -> Self {
        Self { limits, clients: BTreeMap::new(), by_use: BTreeSet::new(), horizon, totals: Totals::default() }
    }

    pub(super) fn limits(&self) -> &SessionLimits {
        &self.limits
    }

    /// Sessions opened at or before this may have been forgotten.
    pub(super) fn horizon(&self) -> Version {
        self.horizon
    }

    /// Clients remembered.
    pub(super) fn len(&self) -> usize {
        self.clients.len()
    }

    /// Bytes of the answers remembered.
    pub(super) fn bytes(&self) -> u64 {
        self.totals.bytes
    }

    /// A number that differs between different tables.
    pub(super) fn digest(&self) -> u64 {
        mix(self.totals.digest ^ mix(self.horizon ^ mix(self.clients.len() as u64)))
    }

    pub(super) fn clients(&self) -> &Clients {
        &self.clients
    }

    /// The answer that an earlier attempt of this write got, or why there can be none. `None`: not remembered.
    pub(super) fn recall(&mut self, session: &Session, fingerprint: u64, now: Version) -> Option<Answer> {
        let client = self.clients.get(&session.client)?;
        let reused = || Some(Err(Refusal::SequenceReused { sequence: session.sequence }));
        if client.opened != session.opened {
            return reused();
        }
        let found = client.replies.binary_search_by_key(&session.sequence, |remembered| remembered.sequence).ok()?;
        let remembered = &client.replies[found];
        if remembered.fingerprint != fingerprint {
            return reused();
        }
        let answer = remembered.answer.clone();
        let client = Arc::make_mut(self.clients.get_mut(&session.client).expect("it was found above"));
        client.touch(session.client, now, &mut self.by_use);
        client.raise_floor(session.client, session.acknowledged_below, &mut self.totals);
        Some(answer)
    }

    /// Whether a write that is not remembered is surely new.
    pub(super) fn admit(&self, session: &Session, now: Version) -> Result<(), Refusal> {
        let known = self.clients.get(&session.client);
        let floor = known.map_or(1, |client| client.floor).max(session.acknowledged_below);
        let below = session.sequence < floor && !planted(Bug::LateDuplicateApplied);
        if below || (known.is_none() && session.opened <= self.horizon) {
            return Err(Refusal::SessionExpired { horizon: self.horizon });
        }
        if known.is_none() && session.opened > now.saturating_add(version_at(SESSION_AHEAD_MAX_MS)) {
            return Err(Refusal::SessionAhead { opened: session.opened });
        }
        Ok(())
    }

    /// Remembers the answer of an admitted write, and forgets what the limits demand.
    pub(super) fn record(&mut self, session: &Session, fingerprint: u64, answer: Answer, now: Version) {
        let id = session.client;
        if planted(Bug::LateDuplicateApplied) && self.clients.get(&id).is_some_and(|c| session.sequence < c.floor) {
            return; // A snapshot that held its answer could not be restored.
        }
        let client = Arc::make_mut(self.clients.entry(id).or_insert_with(|| {
            self.by_use.insert((now, id));
            let replies = VecDeque::with_capacity(1);
            Arc::new(Client { opened: session.opened, floor: 1, last_used: now, bytes: 0, replies })
        }));
        let too_large = reply::heap_bytes(&answer) > self.limits.session_bytes_max.min(self.limits.bytes_max);
        let answer = if too_large { Err(Refusal::SessionExpired { horizon: self.horizon }) } else { answer };
        client.remember(id, Remembered { sequence: session.sequence, fingerprint, answer }, &mut self.totals);
        client.touch(id, now, &mut self.by_use);
        client.raise_floor(id, session.acknowledged_below, &mut self.totals);
        client.trim(id, &self.limits, &mut self.totals);
        self.evict_beyond_limits(id);
    }

    /// Forgets clients that have not written for too long.
    pub(super) fn expire(&mut self, now: Version) {
        while let Some((last_used, id)) = self.by_use.first().copied() {
            if last_used.saturating_add(version_at(self.limits.idle_ms_max)) >= now {
                return;
            }
            self.evict(id);
        }
    }

    /// Takes in what a neighbour remembers, so that nothing that either side has applied is judged new.
    pub(super) fn merge(&mut self, other: Self) {
        // A client that one side has never heard of, or has forgotten, is as good as forgotten if it was opened before
        // that side's horizon.
        let doubtful = |mine: &Self, theirs: &Self| -> Vec<u128> {
            let unknown = |id: &&u128| !theirs.clients.contains_key(id);
            let before = |id: &u128| mine.clients[id].opened <= theirs.horizon;
            mine.clients.keys().filter(unknown).copied().filter(before).collect()
        };
        let (forget, leave) = (doubtful(self, &other), doubtful(&other, self));
        self.horizon = self.horizon.max(other.horizon);
        for id in forget {
            self.evict(id);
        }
        for (id, client) in other.clients {
            if leave.contains(&id) {
                self.horizon = self.horizon.max(client.opened);
            } else {
                self.take_in(id, Arc::unwrap_or_clone(client));
            }
        }
        self.evict_beyond_limits(0);
    }

    fn take_in(&mut self, id: u128, theirs: Client) {
        let Some(mine) = self.clients.get(&id).cloned() else {
            let mut client = Client { bytes: 0, replies: VecDeque::new(), ..theirs.clone() };
            for remembered in theirs.replies {
                client.remember(id, remembered, &mut self.totals);
            }
            self.by_use.insert((client.last_used, id));
            self.clients.insert(id, Arc::new(client));
            return;
        };
        if mine.opened != theirs.opened {
            // Ids are random: this is a client that reuses one. Neither is known any more.
            self.horizon = self.horizon.max(theirs.opened);
            self.evict(id);
            return;
        }
        let client = Arc::make_mut(self.clients.get_mut(&id).expect("it was found above"));
        client.raise_floor(id, theirs.floor, &mut self.totals);
        let known: BTreeSet<u64> = client.replies.iter().map(|remembered| remembered.sequence).collect();
        // What both were answered before they were cut apart is the same.
        let news =
            |remembered: &Remembered| remembered.sequence >= client.floor && !known.contains(&remembered.sequence);
        for remembered in theirs.replies.into_iter().filter(news).collect::<Vec<_>>() {
            client.remember(id, remembered, &mut self.totals);
        }
        if theirs.last_used > client.last_used {
            self.by_use.remove(&(client.last_used, id));
            self.by_use.insert((theirs.last_used, id));
            client.last_used = theirs.last_used;
        }
        client.trim(id, &self.limits, &mut self.totals);
    }

    fn evict_beyond_limits(&mut self, current: u128) {
        while self.clients.len() as u64 > self.limits.sessions_max || self.totals.bytes > self.limits.bytes_max {
            match self.by_use.iter().find(|(_, id)| *id != current) {
                Some((_, id)) => self.evict(*id),
                None => return,
            }
        }
    }

    fn evict(&mut self, id: u128) {
        let client = self.clients.remove(&id).expect("every client in the order of use is known");
        self.by_use.remove(&(client.last_used, id));
        self.horizon = self.horizon.max(client.opened);
        self.totals.bytes -= client.bytes;
        for remembered in &client.replies {
            self.totals.digest = self.totals.digest.wrapping_sub(remembered.digest(id));
        }
    }

    /// Puts a client back that [`Client::encode`] wrote.
    pub(super) fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), DecodeError> {
        let id = u128::from_be_bytes(reader.array()?);
        let (opened, floor, last_used) = (reader.u64()?, reader.varint()?, reader.u64()?);
        let count = reader.count()?;
        let mut client = Client { opened, floor, last_used, bytes: 0, replies: VecDeque::new() };
        for _ in 0..count {
            let (sequence, fingerprint) = (reader.varint()?, reader.u64()?);
            let lowest = client.replies.back().map_or(floor, |before| before.sequence.saturating_add(1));
            if sequence < lowest {
                return reader.fail("answers of a session out of order");
            }
            let remembered = Remembered { sequence, fingerprint, answer: reply::decode(reader)? };
            client.remember(id, remembered, &mut self.totals);
        }
        self.by_use.insert((last_used, id));
        if self.clients.insert(id, Arc::new(client)).is_some() {
            return reader.fail("a session comes twice");
        }
        Ok(())
    }
}

impl Client {
    fn remember(&mut self, id: u128, remembered: Remembered, totals: &mut Totals) {
        self.bytes += remembered.bytes();
        totals.bytes += remembered.bytes();
        totals.digest = totals.digest.wrapping_add(remembered.digest(id));
        // Sequences come nearly in order: the place is at or close to the back.
        let place = self.replies.partition_point(|earlier| earlier.sequence < remembered.sequence);
        self.replies.insert(place, remembered);
    }

    fn touch(&mut self, id: u128, now: Version, by_use: &mut BTreeSet<(Version, u128)>) {
        if now.saturating_sub(self.last_used) >= version_at(USE_GRAIN_MS) {
            by_use.remove(&(self.last_used, id));
            by_use.insert((now, id));
            self.last_used = now;
        }
    }

    /// From now on sequences below `floor` are refused; their answers are forgotten.
    fn raise_floor(&mut self, id: u128, floor: u64, totals: &mut Totals) {
        if floor <= self.floor {
            return;
        }
        self.floor = floor;
        while self.replies.front().is_some_and(|lowest| lowest.sequence < floor) {
            let lowest = self.replies.pop_front().expect("there is a front");
            self.bytes -= lowest.bytes();
            totals.bytes -= lowest.bytes();
            totals.digest = totals.digest.wrapping_sub(lowest.digest(id));
        }
        // After a burst was acknowledged its room is given back.
        if self.replies.len() < self.replies.capacity() / 4 {
            self.replies.shrink_to(self.replies.len() * 2);
        }
    }

    /// Forgets the lowest sequences while there are too many answers or bytes.
    fn trim(&mut self, id: u128, limits: &SessionLimits, totals: &mut Totals) {
        let bytes_max = limits.session_bytes_max.min(limits.bytes_max);
        while self.replies.len() as u64 > limits.replies_per_session_max.max(1)
            || (self.bytes > bytes_max && self.replies.len() > 1)
        {
            let lowest = self.replies.front().expect("there are several").sequence;
            self.raise_floor(id, lowest + 1, totals);
        }
    }

    pub(super) fn encode(&self, id: u128, out: &mut Vec<u8>) {
        out.put(&id.to_be_bytes());
        put_u64(out, self.opened);
        put_varint(out, self.floor);
        put_u64(out, self.last_used);
        put_varint(out, self.replies.len() as u64);
        for remembered in &self.replies {
            put_varint(out, remembered.sequence);
            put_u64(out, remembered.fingerprint);
            reply::encode(&remembered.answer, out);
        }
    }
}
