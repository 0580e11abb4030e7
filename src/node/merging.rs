//! Merges, as a node takes part in them.
//!
//! The map marks two neighbours ([`placement::Merge`]). The leader of the left one does the work: it asks the leader of
//! the right one, which seals that in its own log and answers with all that it holds; it proposes to take that in, in the
//! left one's log; and it reports what the log has decided. When the merge is withdrawn it proposes a fence instead, and
//! reports that. Nothing is remembered in between: every step follows from the map and from what the log has decided.
//!
//! Invariants:
//! * the right one is sealed only for a left one whose leader asks for it now;
//! * what is taken in was sealed for this merge: no order of an older map undoes that, and a newer map does only once
//!   what was proposed here is void. So what a replica holds that knows the seal is final, whoever leads;
//! * who is sealed, and is not to be merged any more, serves again by itself.

mod step;

pub(super) use step::Step;

use super::{Node, cutting::nothing, machines::DriverMachine, observed::Observed};
use crate::{
    env,
    error::{Error, Outcome, Reason},
    key::{NodeId, PartitionId},
    kv,
    placement::{self, Command, Duty, Map, limits::MERGE_BYTES_MAX, uniting::Union},
    raft::Group,
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

/// A merge that has not come about after this long is withdrawn: clients of the right one wait meanwhile.
const MERGE_PATIENCE: Duration = Duration::from_secs(2);
/// Patience with one entry.
const ENTRY_DEADLINE: Duration = Duration::from_secs(3);
/// Patience with the leader of the right one, which may have to seal it. No step begins before the last one has ended: a
/// fence waits for so long at most.
const YIELD_DEADLINE: Duration = Duration::from_millis(1_500);
/// Patience with a partition's leader that is asked how much it holds.
const SIZE_DEADLINE: Duration = Duration::from_secs(2);
/// Patience with the driver.
const DRIVE_DEADLINE: Duration = Duration::from_secs(3);
/// Patience with a merge that nobody waits for.
const UNION_DEADLINE: Duration = Duration::from_secs(10);
/// In place of the version that asks for a merge: nothing is to be sealed, only the size is asked.
const SIZE_ONLY: u64 = u64::MAX;

/// Says how much a partition led here holds, and once it is sealed, what.
pub(super) struct MergeService(pub(super) Weak<Node>);

impl Service for MergeService {
    fn handle(&self, _from: NodeId, mut body: Bytes, reply: Reply) {
        let Some(node) = self.0.upgrade() else { return };
        let (Ok(id), Ok(since)) = (body.try_get_u64(), body.try_get_u64()) else { return };
        env::spawn(async move {
            let Some((bytes, state)) = node.yield_up(PartitionId(id), since).await else { return };
            let mut out = BytesMut::with_capacity(8 + state.len());
            out.put_u64(bytes);
            out.put(state);
            reply.send(out.freeze());
        });
    }
}

impl Node {
    /// Seals a partition led here for the merge that the map of this version was the first to ask for; its size, and its
    /// state unless that is too large.
    async fn yield_up(&self, id: PartitionId, since: u64) -> Option<(u64, Bytes)> {
        let here = self.partition(id).filter(|here| here.group().is_leader())?;
        let (bytes, sealed) = here.group().read(|machine, _| {
            let store = machine.store();
            (store.bytes() + store.session_bytes(), store.sealed())
        });
        if since == SIZE_ONLY || bytes > MERGE_BYTES_MAX {
            return Some((bytes, Bytes::new()));
        }
        if sealed.is_none_or(|at| at < since) {
            let deadline = Instant::now() + ENTRY_DEADLINE;
            timeout_at(deadline, self.map_at_least(since)).await.ok()?;
            let map = self.routing().map();
            let (partition, seal) = step::sealing(&map, id, since)?;
            self.propose(partition, seal).await?;
        }
        let state = here.group().read(|machine, _| {
            let store = machine.store();
            store.sealed().is_some_and(|at| at >= since).then(|| store.export())
        })?;
        let bytes = state.len() as u64;
        Some((bytes, if bytes > MERGE_BYTES_MAX { Bytes::new() } else { state }))
    }

    /// Asks the leader of a partition for its size and, once it is sealed for a merge, its state.
    async fn ask_to_yield(&self, id: PartitionId, since: u64, patience: Duration) -> Option<(u64, Bytes)> {
        let leader = self.routing().leader(id)?;
        let mut body = BytesMut::with_capacity(16);
        body.put_u64(id.0);
        body.put_u64(since);
        let mut answer = self.endpoint().call(leader.node, Kind::Merge, body.freeze(), patience).await.ok()?;
        Some((answer.try_get_u64().ok()?, answer))
    }

    /// Proposes a change in the log of a partition led here, at the epoch that the map knows; none if it was not decided
    /// in time.
    async fn propose(&self, partition: &placement::Partition, change: kv::Change) -> Option<()> {
        let here = self.partition(partition.id)?;
        let term = here.group().leadership().term;
        let reshape = kv::Reshape { epoch: partition.epoch.bounds, term, change };
        match here.group().write(reshape.encode(), Instant::now() + ENTRY_DEADLINE).await {
            Ok(_) => Some(()),
            Err(error) => {
                tracing::info!(partition = %partition.id, ?error, "a step of a merge was not decided yet");
                None
            }
        }
    }

    /// What this node has to do for a merge as the leader of a partition, now and after it.
    pub(super) fn merge_step(&self, map: &Map, partition: &placement::Partition) -> Option<Step> {
        let here = self.partition(partition.id)?;
        here.group().read(|machine, _| step::step(map.version(), partition, machine.store()))
    }

    /// Takes one step.
    pub(super) async fn take_step(&self, map: &Map, id: PartitionId, step: Step) {
        let Some(partition) = map.partition(id) else { return };
        let decided = match step {
            Step::Absorb => self.absorb(map, partition).await,
            Step::Propose(change) => self.propose(partition, change).await,
            // With the next map there is nothing more to be told.
            Step::Report(command) => return self.tell(&command).await,
        };
        if decided.is_some() {
            self.stewarding.notify_one();
        }
    }

    async fn tell(&self, command: &Command) {
        if let Err(error) = self.drive(command, Instant::now() + DRIVE_DEADLINE).await {
            tracing::info!(?command, %error, "a step of a merge is not reported yet");
        }
    }

    /// Has the right one sealed and takes it in; none if that was not done, for now or for good.
    async fn absorb(&self, map: &Map, partition: &placement::Partition) -> Option<()> {
        let (id, merge) = (partition.id, partition.merge.as_ref()?);
        let right = map.partition(merge.with)?;
        let (bytes, state) = self.ask_to_yield(right.id, merge.since, YIELD_DEADLINE).await?;
        if bytes > MERGE_BYTES_MAX {
            tracing::info!(partition = %id, right = %right.id, bytes, "it holds too much to be merged");
            self.tell(&Command::Unmerge { pair: [id, right.id] }).await;
            return None;
        }
        let mut restore = kv::Restore::new();
        match restore.feed(&state).and_then(|()| restore.finish()) {
            Ok(store) if *store.span() == right.span => {}
            Ok(store) => {
                let span = store.span();
                tracing::error!(right = %right.id, ?span, "what is sealed has other bounds than the map says");
                return None;
            }
            Err(error) => {
                tracing::error!(right = %right.id, %error, "what is sealed cannot be read");
                return None;
            }
        }
        self.propose(partition, kv::Change::Absorb { state }).await?;
        tracing::info!(partition = %id, right = %right.id, bytes, "merged");
        // The others hear of a commit with the next entry, not before: they are to serve what was taken in.
        let here = self.partition(id)?;
        let _told_later = here.group().write(nothing(), Instant::now() + ENTRY_DEADLINE).await;
        Some(())
    }

    /// Has neighbours merged that hold little and have been asked little for long. Each pair is seen to by itself.
    pub(super) fn merge_idle(self: &Arc<Self>, map: &Map) {
        let unions = {
            let mut observed = self.observed.lock();
            let now_ms = observed.now_ms();
            let Observed { uniting, loads, .. } = &mut *observed;
            uniting.plan(map, loads, now_ms)
        };
        for union in unions {
            let this = Arc::clone(self);
            env::spawn(async move { this.merge_one(&union).await });
        }
    }

    async fn merge_one(&self, union: &Union) {
        let Union { left, right, why } = union;
        tracing::info!(%left, %right, %why, "to be merged");
        let result = match self.merge(*left, Some(*right), Instant::now() + UNION_DEADLINE).await {
            Ok(_) => "done".to_owned(),
            Err(error) => format!("not done: {}", error.message),
        };
        let mut observed = self.observed.lock();
        observed.journal.note(self.clock().wall_ms(), *left, format!("{right} is merged into it"), why, result);
    }

    /// Has two neighbours become one and waits until the map says so; `with` is the right neighbour by default. Returns the
    /// one that stays and the one that is gone.
    ///
    /// # Errors
    /// When they cannot be merged, or that was withdrawn, or not done in time: it may still be done then.
    pub async fn merge(
        &self,
        id: PartitionId,
        with: Option<PartitionId>,
        deadline: Instant,
    ) -> Result<[PartitionId; 2], Error> {
        let (pair, since) = loop {
            let seen = self.routing().changes();
            let (pair, bounds) = self.neighbours(id, with)?;
            self.check_size(pair[1], deadline).await?;
            match self.drive(&Command::Merge { pair, bounds }, deadline).await {
                Ok(placement::Reply::Merging { since }) => break (pair, since),
                Ok(other) => {
                    return Err(Error::new(Reason::Internal, format!("the placement driver answered {other:?}")));
                }
                // It is changing in another way, or this map is old: what comes next may be merged.
                Err(error) if error.reason == Reason::WrongPartition => {
                    timeout_at(deadline, self.routing().changed_since(seen)).await.map_err(|_elapsed| error)?;
                }
                Err(error) => return Err(error),
            }
        };
        let [left, right] = pair;
        loop {
            let seen = self.routing().changes();
            let map = self.routing().map();
            if map.version() >= since {
                let Some(partition) = map.partition(right) else { return Ok(pair) };
                if partition.merge.as_ref().is_none_or(|merge| merge.since != since) {
                    let message = format!(
                        "merging {right} into {left} took longer than {} s, or {right} has grown beyond {MERGE_BYTES_MAX} \
                         bytes; it was withdrawn, and both are as before",
                        MERGE_PATIENCE.as_secs()
                    );
                    return Err(Error::new(Reason::Overloaded, message).outcome(Outcome::NotApplied));
                }
            }
            timeout_at(deadline, self.routing().changed_since(seen)).await.map_err(|_elapsed| {
                let message = format!("{right} is being merged into {left}, and that was not done in time; it goes on");
                Error::new(Reason::DeadlineExceeded, message).outcome(Outcome::Unknown)
            })?;
        }
    }

    /// A partition and its neighbour in order, and the epochs of their bounds.
    fn neighbours(&self, id: PartitionId, with: Option<PartitionId>) -> Result<([PartitionId; 2], [u64; 2]), Error> {
        let map = self.routing().map();
        let known = |field: &'static str, id: PartitionId| {
            let unknown = || format!("there is no partition {id}; `meridian partition list` shows all");
            map.partition(id).ok_or_else(|| Error::field(field, unknown()))
        };
        let one = known("partition", id)?;
        let other = match (with, &one.span.end) {
            (Some(with), _) => known("with", with)?,
            (None, Some(end)) => map.locate(one.keyspace, end).expect("a map has no gaps"),
            (None, None) => {
                let message =
                    format!("{id} is the last of its keyspace; name the neighbour before it as the other one");
                return Err(Error::field("with", message));
            }
        };
        let (left, right) = if one.span.start <= other.span.start { (one, other) } else { (other, one) };
        Ok(([left.id, right.id], [left.epoch.bounds, right.epoch.bounds]))
    }

    /// Refuses what is too large, if its leader can be asked; otherwise the merge finds out.
    async fn check_size(&self, right: PartitionId, deadline: Instant) -> Result<(), Error> {
        let patience = SIZE_DEADLINE.min(deadline.saturating_duration_since(Instant::now()));
        let Some((bytes, _)) = self.ask_to_yield(right, SIZE_ONLY, patience).await else { return Ok(()) };
        if bytes <= MERGE_BYTES_MAX {
            return Ok(());
        }
        let message = format!(
            "{right} holds {bytes} bytes of rows and remembered answers; at most {MERGE_BYTES_MAX} are merged into a neighbour"
        );
        Err(Error::field("partition", message).with("bytes", bytes).with("limit", MERGE_BYTES_MAX))
    }
}

/// The merges that the driver's leader has seen begin.
#[derive(Default)]
pub(super) struct UnderWay {
    /// Version of the map that was looked at last.
    looked: u64,
    /// When each was first looked at, by the version of the map that asked for it.
    begun: BTreeMap<u64, ([PartitionId; 2], Instant)>,
}

impl UnderWay {
    /// Withdraws what does not come about.
    pub(super) async fn withdraw_late(&mut self, group: &Group<DriverMachine>) {
        let now = Instant::now();
        group.read(|machine, _| self.look(machine.state().map(), now));
        for (pair, began) in self.begun.values() {
            if now.duration_since(*began) < MERGE_PATIENCE {
                continue;
            }
            tracing::info!(left = %pair[0], right = %pair[1], "a merge does not come about; it is withdrawn");
            let command = Command::Unmerge { pair: *pair }.encode();
            if let Err(error) = group.write(command, now + DRIVE_DEADLINE).await {
                tracing::debug!(?error, "a merge was not withdrawn yet");
                return;
            }
        }
    }

    fn look(&mut self, map: &Map, now: Instant) {
        if std::mem::replace(&mut self.looked, map.version()) == map.version() {
            return;
        }
        let merges = map.partitions().values().filter_map(|partition| Some((partition.id, partition.merge.as_ref()?)));
        let asked: BTreeMap<u64, [PartitionId; 2]> = merges
            .filter(|(_, merge)| merge.duty == Duty::Absorb)
            .map(|(id, merge)| (merge.since, [id, merge.with]))
            .collect();
        self.begun.retain(|since, _| asked.contains_key(since));
        for (since, pair) in asked {
            self.begun.entry(since).or_insert((pair, now));
        }
    }
}
