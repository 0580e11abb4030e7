//! Splits, as a node takes part in them.
//!
//! The map asks for a cut ([`placement::Cut`]). The leader of the partition proposes it in the partition's log; every
//! replica makes the child when it applies that entry, and this node keeps the child and opens it. The leader of the
//! child, at first on the node of the parent's, tells the driver once a quorum holds the child.
//!
//! Invariants:
//! * a parent takes no snapshot, and so cuts no log, before every child made here is durable;
//! * the map names a child only after a quorum of its members holds its seed: a replica that is opened blank from then on
//!   is never needed to know what the child was made of;
//! * a child that an older map does not name is not taken for one that is gone.

use super::{Node, Partition, PartitionMachine, machines::Born, observed::Observed};
use crate::{
    env,
    error::{Error, Outcome, Reason},
    key::{DRIVER, NodeId, PartitionId, Replica, position},
    kv,
    placement::{
        self, Command, Map,
        sizing::{Halve, Wish, halve_work},
    },
    raft::{self, Group, Level, Role},
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::{Instant, timeout, timeout_at};

/// Patience with an entry that cuts, and with one that shows that a child has a quorum.
const ENTRY_DEADLINE: Duration = Duration::from_secs(3);
/// Patience with the driver.
const DRIVE_DEADLINE: Duration = Duration::from_secs(3);
/// Patience with a partition's leader that is asked for the middle.
const MIDDLE_DEADLINE: Duration = Duration::from_secs(2);
/// Patience with a cut that nobody waits for.
const WISH_DEADLINE: Duration = Duration::from_secs(5);
/// The first leader of a child asks for votes so often, so far apart: the others are born a moment later. Then the
/// ordinary election takes over.
const CAMPAIGNS: u32 = 10;
/// See [`CAMPAIGNS`].
const CAMPAIGN_EVERY: Duration = Duration::from_millis(40);

/// First byte of an answer of [`CutService`]; the epoch of bounds follows, then the position.
const CUT_AT: u8 = 0;
/// Another first byte: why no cut helps, in words, comes instead of the position.
const CUT_FUTILE: u8 = 1;
/// Asks for the middle of the bytes; another second part of the question, for that of the work.
const HALVE_BYTES: u8 = 0;

/// Where to cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CutAt {
    /// Here.
    Position(Bytes),
    /// Where this is halved.
    Middle(Halve),
}

/// Says where a partition led here would be cut, or why no cut helps.
pub(super) struct CutService(pub(super) Weak<Node>);

impl Service for CutService {
    fn handle(&self, _from: NodeId, mut body: Bytes, reply: Reply) {
        let Some(node) = self.0.upgrade() else { return };
        let (Ok(id), Ok(halve)) = (body.try_get_u64(), body.try_get_u8()) else { return };
        let Some(here) = node.partition(PartitionId(id)).filter(|here| here.group().is_leader()) else { return };
        // Apart from the frames that come behind: it looks at every row.
        env::spawn(async move {
            let halve = if halve == HALVE_BYTES { Halve::Bytes } else { Halve::Work };
            let (bounds, at) = here.cut_at(halve);
            let at = if halve == Halve::Work { node.short_of_cpu().and(at) } else { at };
            let mut out = BytesMut::new();
            out.put_u8(if at.is_ok() { CUT_AT } else { CUT_FUTILE });
            out.put_u64(bounds);
            out.put(at.unwrap_or_else(Bytes::from));
            reply.send(out.freeze());
        });
    }
}

impl Partition {
    /// Where to cut what is held here, at which epoch of bounds; or why no cut helps.
    fn cut_at(&self, halve: Halve) -> (u64, Result<Bytes, String>) {
        let middle = || self.group().read(|machine, _| (machine.store().epoch(), machine.store().middle()));
        if halve == Halve::Bytes {
            let (bounds, at) = middle();
            return (bounds, at.ok_or_else(|| "it has no two rows to cut between".to_owned()));
        }
        let own = |machine: &PartitionMachine| {
            let store = machine.store();
            (store.epoch(), store.layout(), store.span().clone())
        };
        let (bounds, layout, span) = self.group().read(|machine, _| own(machine));
        let mut positions: Vec<Bytes> = self.counters().sampled().iter().map(|key| position(layout, key)).collect();
        // From before it was cut last.
        positions.retain(|at| span.contains(at));
        (bounds, halve_work(&span, &positions).map_err(|futile| futile.to_string()))
    }
}

impl Node {
    /// Fails, with the reason in words, where work that goes elsewhere would make nothing faster: the part of a node's
    /// work that is done once for many requests is done again for each partition.
    fn short_of_cpu(&self) -> Result<(), String> {
        let (used, busy) = (self.cores_used(), self.busy_cores);
        if used >= busy {
            return Ok(());
        }
        Err(format!("the node that leads it uses {used:.2} cores, and is short of CPU from {busy:.2} on"))
    }

    /// Keeps and opens the children that splits have made here; false when something has to be tried again.
    pub(super) async fn deliver(self: &Arc<Self>, map: &Map) -> bool {
        let mut settled = true;
        for born in self.births.take() {
            let child = born.birth.split.child;
            if let Err((error, born)) = self.deliver_one(map, born).await {
                tracing::error!(partition = %child, %error, "a child could not be kept; it is tried again");
                self.births.put_back(born);
                settled = false;
            }
        }
        settled
    }

    async fn deliver_one(self: &Arc<Self>, map: &Map, born: Born) -> Result<(), (Error, Born)> {
        let Born { birth: kv::Birth { split, store }, unborn } = born;
        let Some(me) = split.members.iter().find(|member| member.node == self.id()).copied() else { return Ok(()) };
        if !is_expected(map, &split, me) || self.partition(split.child).is_some() || self.holds(split.child, me) {
            return Ok(());
        }
        let config = kv::StoreConfig {
            layout: store.layout(),
            span: store.span().clone(),
            limits: kv::SessionLimits::default(),
        };
        let mut machine = PartitionMachine::new(store, Arc::clone(&self.births));
        let (id, leader) = (split.child, split.leader);
        let found = match raft::seed(&self.raft, id, me.id, &split.members, leader, raft::SEED_AT, &mut machine).await {
            Ok(found) => found,
            Err(error) => {
                let error = Error::new(Reason::Internal, error.to_string());
                let birth = kv::Birth { split, store: machine.into_store() };
                return Err((error, Born { birth, unborn }));
            }
        };
        drop(unborn);
        // From here on it is opened like any other, at once or with the next map.
        self.recovered.lock().insert((id, me.id), found);
        match self.open_partition(id, me, config, split.map_version).await {
            Ok(group) if leader == me.id => {
                env::spawn(campaign(group));
            }
            Ok(_) => {}
            Err(error) => tracing::error!(partition = %id, %error, "a child could not be opened; it is tried again"),
        }
        Ok(())
    }

    /// Has partitions cut that hold too much or are asked too much. Each is seen to by itself: it may take a while.
    pub(super) fn cut_large(self: &Arc<Self>, map: &Map, health: &placement::Liveness) {
        let wishes = {
            let mut observed = self.observed.lock();
            let now_ms = observed.now_ms();
            let Observed { sizing, loads, .. } = &mut *observed;
            sizing.plan(map, health, loads, now_ms)
        };
        for wish in wishes {
            let this = Arc::clone(self);
            env::spawn(async move { this.cut_one(&wish).await });
        }
    }

    async fn cut_one(&self, wish: &Wish) {
        let id = wish.partition;
        tracing::info!(partition = %id, why = %wish.why, "to be cut in two");
        let done = self.divide(id, CutAt::Middle(wish.halve), Instant::now() + WISH_DEADLINE).await;
        let mut observed = self.observed.lock();
        let now_ms = observed.now_ms();
        let result = match done {
            Ok(child) => {
                observed.sizing.done(id, child, now_ms);
                observed.loads.cut(id, child);
                format!("done: the upper half is {child}")
            }
            Err(error) => {
                if error.reason == Reason::InvalidField {
                    observed.sizing.futile(id, wish.halve, now_ms);
                }
                format!("not done: {}", error.message)
            }
        };
        observed.journal.note(self.clock().wall_ms(), id, "it is cut in two".to_owned(), &wish.why, result);
    }

    /// Proposes the cut that the map asks for in the log of a partition led here.
    pub(super) async fn propose_cut(&self, map: &Map, id: PartitionId) {
        let (Some(partition), Some(here)) = (map.partition(id), self.partition(id)) else { return };
        let Some(cut) = &partition.cut else { return };
        let Some(leader) = cut.members.iter().find(|member| member.node == self.id()) else { return };
        let split = kv::Split {
            at: cut.at.clone(),
            child: cut.child,
            members: cut.members.clone(),
            leader: leader.id,
            map_version: map.version(),
        };
        let reshape = kv::Reshape {
            epoch: partition.epoch.bounds,
            term: here.group().leadership().term,
            change: kv::Change::Split(Box::new(split)),
        };
        let deadline = Instant::now() + ENTRY_DEADLINE;
        if let Err(error) = here.group().write(reshape.encode(), deadline).await {
            tracing::info!(partition = %id, ?error, "a cut was not decided yet");
            return;
        }
        tracing::info!(partition = %id, child = %cut.child, "cut in two");
        // The others hear of a commit with the next entry, not before: they are to have the child now.
        let _told_later = here.group().write(nothing(), deadline).await;
    }

    /// Tells the driver of a child that is led here, once a quorum of its members holds it.
    pub(super) async fn report_child(&self, parent: PartitionId, child: PartitionId) {
        let Some(here) = self.partition(child) else { return };
        let deadline = Instant::now() + ENTRY_DEADLINE;
        // Who was elected just now takes no entry before a quorum has answered once, and clients wait for this.
        if let Err(error) = here.group().barrier(Level::ReadIndex, deadline).await {
            tracing::info!(partition = %child, %error, "a child has no quorum yet");
            return;
        }
        if let Err(error) = here.group().write(nothing(), deadline).await {
            tracing::info!(partition = %child, ?error, "a child has no quorum yet");
            return;
        }
        let command = Command::Divided { partition: parent, child };
        if let Err(error) = self.drive(&command, Instant::now() + DRIVE_DEADLINE).await {
            tracing::info!(partition = %child, %error, "a child is not reported yet");
        }
    }

    /// The parent of a child that the map does not name yet.
    pub(super) fn parent_of(map: &Map, child: PartitionId) -> Option<PartitionId> {
        let is_child = |partition: &&placement::Partition| partition.cut.as_ref().is_some_and(|cut| cut.child == child);
        map.partitions().values().find(is_child).map(|parent| parent.id)
    }

    /// Has a partition cut in two at a position, or where that halves its bytes or its work, and waits until the map says
    /// so. Returns the new partition.
    ///
    /// # Errors
    /// When it cannot be cut there, or that was not done in time: it may still be done then.
    pub async fn divide(&self, id: PartitionId, at: CutAt, deadline: Instant) -> Result<PartitionId, Error> {
        let child = loop {
            let seen = self.routing().changes();
            let (bounds, at) = match &at {
                CutAt::Position(at) => (self.bounds_of(id)?, at.clone()),
                CutAt::Middle(halve) => self.middle_of(id, *halve, deadline).await?,
            };
            match self.drive(&Command::Divide { partition: id, bounds, at }, deadline).await {
                Ok(placement::Reply::Dividing { child }) => break child,
                Ok(other) => {
                    return Err(Error::new(Reason::Internal, format!("the placement driver answered {other:?}")));
                }
                // It is changing in another way, or this map is old: what comes next may be cut.
                Err(error) if error.reason == Reason::WrongPartition => {
                    timeout_at(deadline, self.routing().changed_since(seen)).await.map_err(|_elapsed| error)?;
                }
                Err(error) => return Err(error),
            }
        };
        loop {
            let seen = self.routing().changes();
            if self.routing().map().partition(child).is_some() {
                return Ok(child);
            }
            timeout_at(deadline, self.routing().changed_since(seen)).await.map_err(|_elapsed| {
                let message = format!("partition {id} is being cut, and that was not done in time; it goes on");
                Error::new(Reason::DeadlineExceeded, message).outcome(Outcome::Unknown)
            })?;
        }
    }

    fn bounds_of(&self, id: PartitionId) -> Result<u64, Error> {
        let map = self.routing().map();
        let partition = map.partition(id).filter(|partition| partition.id != DRIVER);
        partition.map(|partition| partition.epoch.bounds).ok_or_else(|| {
            let message = format!("there is no partition {id}; `meridian partition list` shows all");
            Error::field("partition", message)
        })
    }

    /// Asks the leader where to cut a partition, and for the epoch of its bounds.
    async fn middle_of(&self, id: PartitionId, halve: Halve, deadline: Instant) -> Result<(u64, Bytes), Error> {
        self.bounds_of(id)?;
        let mut body = BytesMut::new();
        body.put_u64(id.0);
        body.put_u8(if halve == Halve::Bytes { HALVE_BYTES } else { !HALVE_BYTES });
        let body = body.freeze();
        let mut seen = self.routing().changes();
        loop {
            let leader = self.routing().leader(id).map(|leader| leader.node);
            if let Some(leader) = leader {
                let patience = MIDDLE_DEADLINE.min(deadline.saturating_duration_since(Instant::now()));
                let answered = self.endpoint().call(leader, Kind::Cut, body.clone(), patience).await;
                if let Ok(mut answer) = answered
                    && let (Ok(kind), Ok(bounds)) = (answer.try_get_u8(), answer.try_get_u64())
                {
                    if kind == CUT_AT {
                        return Ok((bounds, answer));
                    }
                    let why = String::from_utf8_lossy(&answer);
                    return Err(Error::field("at", format!("partition {id}: {why}; name a key with --at")));
                }
            }
            if timeout_at(deadline, self.routing().changed_since(seen)).await.is_err() {
                let members = self.routing().map().partition(id).map(|p| p.members.clone()).unwrap_or_default();
                return Err(self.liveness().no_leader(id, &members, Some(Outcome::NotApplied)));
            }
            seen = self.routing().changes();
        }
    }
}

/// Whether a child that was just made is still what the map wants here; a map that is older than the cut cannot say.
fn is_expected(map: &Map, split: &kv::Split, me: Replica) -> bool {
    let named = |partition: &placement::Partition| partition.replica_on(me.node) == Some(me);
    map.version() < split.map_version
        || map.partition(split.child).is_some_and(named)
        || Node::parent_of(map, split.child).is_some()
}

/// An entry that changes nothing.
pub(super) fn nothing() -> Bytes {
    kv::Command { stamp: 0, writes: Vec::new() }.encode()
}

async fn campaign(group: Group<PartitionMachine>) {
    let mut leadership = group.watch_leadership();
    for _ in 0..CAMPAIGNS {
        // The term of the seed is that of no election.
        if leadership.borrow_and_update().term > 0 || group.role() == Role::Stopped {
            return;
        }
        group.campaign().await;
        let _either = timeout(CAMPAIGN_EVERY, leadership.changed()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::hosting::tests::{Moody, start},
        *,
    };
    use crate::{
        env::Scope,
        log::{memory::MemoryLog, snapshots::MemorySnapshots},
    };
    use std::sync::atomic::Ordering;

    #[tokio::test]
    async fn who_has_cpu_to_spare_has_nothing_cut_for_its_work() {
        let node = Scope::random().enter(|| {
            start(&Arc::new(MemoryLog::immediate()), Moody(MemorySnapshots::default(), 0.into()), Map::default())
        });
        node.cores_used_milli.store(994, Ordering::Relaxed);
        let why = node.short_of_cpu().unwrap_err();
        assert_eq!(why, "the node that leads it uses 0.99 cores, and is short of CPU from 1.00 on");
        node.cores_used_milli.store(1_000, Ordering::Relaxed);
        assert_eq!(node.short_of_cpu(), Ok(()));
    }
}
