//! Going on with a partition whose quorum is lost for good, as a node takes part in it.
//!
//! Whoever is asked surveys the nodes that hold a replica and those of the placement driver: what do they hold, and whom
//! do they hear? If the partition may have a quorum for any of them, it is left alone. Otherwise the driver is told which
//! replica to go on with ([`placement::recovery`]), and the map then names a fresh replica on that one's node, which the
//! node makes of the old one ([`Node::succeed`]).
//!
//! Invariants:
//! * the old replica has stopped before its state is taken, and is removed only once the fresh one is durable: a node that
//!   stops in between goes on where it was;
//! * the fresh replica owns exactly what the map says, whatever the old one had heard of splits and merges.

use super::{Node, PartitionMachine};
use crate::{
    env,
    error::{Error, Outcome, Reason},
    key::{NodeId, PartitionId, Replica},
    kv,
    placement::{
        self, Command, Map, Phase, Recover,
        recovery::{Account, Choice, Held, choose},
    },
    raft::{self, LogPosition, Role},
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::{Buf as _, Bytes};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

/// Patience with one node that is surveyed.
const SURVEY_DEADLINE: Duration = Duration::from_millis(1_000);

/// Says what this node knows of a partition that may have lost its quorum.
pub(super) struct SurveyService(pub(super) Weak<Node>);

impl Service for SurveyService {
    fn handle(&self, _from: NodeId, mut body: Bytes, reply: Reply) {
        let (Some(node), Ok(id)) = (self.0.upgrade(), body.try_get_u64()) else { return };
        // Apart from the frames that come behind: a look at the state waits for what is being applied.
        env::spawn(async move { reply.send(node.account(PartitionId(id)).encode()) });
    }
}

/// What was found of a partition that may have lost its quorum.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The partition.
    pub partition: placement::Partition,
    /// What each node knows that answered.
    pub accounts: BTreeMap<NodeId, Account>,
    /// The replica to go on with.
    pub choice: Choice,
}

impl Node {
    fn account(&self, id: PartitionId) -> Account {
        let map = self.routing().map();
        let silence = |node: NodeId| (node, self.liveness().contact(node).map(|silence| silence.as_millis() as u64));
        let replicas = map.partition(id).into_iter().flat_map(placement::Partition::replicas);
        let silence_ms = replicas.map(|replica| silence(replica.node)).collect();
        let running = self.partition(id).filter(|here| !here.group().is_stopping());
        let held = running.map(|here| {
            let (status, last) = (here.group().status(), here.group().last_log());
            let lately = |acked: Duration| acked < super::CONTACT_LOST_AFTER;
            Held {
                replica: here.group().replica().id,
                last_term: last.term,
                last_index: last.index,
                applied: status.applied.index,
                term: status.term,
                bounds: here.group().read(|machine, _| machine.store().epoch()),
                confirmed: status.role == Role::Leader && status.quorum_acked.is_some_and(lately),
            }
        });
        Account { held, silence_ms }
    }

    async fn account_of(&self, node: NodeId, id: PartitionId) -> Option<(NodeId, Account)> {
        if node == self.id() {
            return Some((node, self.account(id)));
        }
        let body = Bytes::copy_from_slice(&id.0.to_be_bytes());
        let answer = self.endpoint().call(node, Kind::Survey, body, SURVEY_DEADLINE).await.ok()?;
        Some((node, Account::decode(&answer).ok()?))
    }

    /// Looks for what is left of a partition, and says with which replica it would go on without its quorum: the one with
    /// the longest log, or the one on `from`.
    ///
    /// # Errors
    /// `INVALID_FIELD` when there is no such partition, it may have a quorum, or nothing of it is left; `NO_QUORUM` when the
    /// placement driver has none, which would have to decide.
    pub async fn survey(&self, id: PartitionId, from: Option<NodeId>) -> Result<Survey, Error> {
        let map = self.routing().map();
        let partition = map.partition(id).cloned().ok_or_else(|| {
            let message = format!("there is no partition {id}; `meridian partition list` shows those of a keyspace");
            Error::field("partition", message)
        })?;
        let driver: BTreeSet<NodeId> = self.driver_members().iter().map(|member| member.node).collect();
        let asked: BTreeSet<NodeId> = partition.replicas().map(|replica| replica.node).chain(driver.clone()).collect();
        let answers: FuturesUnordered<_> = asked.into_iter().map(|node| self.account_of(node, id)).collect();
        let accounts: BTreeMap<NodeId, Account> = answers.filter_map(std::future::ready).collect().await;
        let heard = driver.iter().filter(|node| accounts.contains_key(node)).count();
        if heard <= driver.len() / 2 {
            let message = format!(
                "{heard} of the {} members of the placement driver answer, which is no quorum, and without it nothing can be \
                 recovered; start their nodes again: {}",
                driver.len(),
                driver.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            );
            return Err(Error::new(Reason::NoQuorum, message).outcome(Outcome::NotApplied));
        }
        let choice = choose(&partition, &accounts, from)?;
        Ok(Survey { partition, accounts, choice })
    }

    /// Has a partition go on with the replica that was chosen, and waits until it does. What the others held beyond that is
    /// lost.
    ///
    /// # Errors
    /// When the placement driver refuses or does not answer, or it was not done in time: it goes on then.
    pub async fn recover(&self, survey: &Survey, deadline: Instant) -> Result<(), Error> {
        let Survey { partition, choice: Choice { survivor, held, term }, .. } = survey;
        let asked = Recover {
            partition: partition.id,
            epoch: partition.epoch,
            survivor: survivor.id,
            last_term: held.last_term,
            last_index: held.last_index,
            term: *term,
            wall_ms: self.clock().wall_ms(),
        };
        tracing::warn!(partition = %partition.id, %survivor.node, ?held, "it goes on without a quorum; data may be lost");
        let fresh = match self.drive(&Command::Recover(asked), deadline).await? {
            placement::Reply::Recovering { replica } => Replica { id: replica, node: survivor.node },
            other => return Err(Error::new(Reason::Internal, format!("the placement driver answered {other:?}"))),
        };
        loop {
            let seen = self.routing().changes();
            let map = self.routing().map();
            let done = |now: &placement::Partition| now.phase == Phase::Active && now.members.contains(&fresh);
            let led = self.routing().leader(partition.id).is_some_and(|leader| leader.node == fresh.node);
            if led && map.partition(partition.id).is_some_and(done) {
                return Ok(());
            }
            timeout_at(deadline, self.routing().changed_since(seen)).await.map_err(|_elapsed| {
                let message = format!(
                    "{} goes on from what {} holds, and does not lead yet; `meridian partition why {}` tells when it does",
                    partition.id, fresh.node, partition.id
                );
                Error::new(Reason::DeadlineExceeded, message).outcome(Outcome::Unknown)
            })?;
        }
    }

    /// Makes `replica`, with which a partition goes on alone, of all that the replica `from` holds here, and removes that
    /// one. `config` is that of a replica that replays the whole log.
    pub(super) async fn succeed(
        &self,
        map: &Map,
        partition: &placement::Partition,
        replica: Replica,
        config: kv::StoreConfig,
    ) -> Result<(), Error> {
        let (id, Phase::Recovering(from, term)) = (partition.id, partition.phase) else { return Ok(()) };
        let io = |error: std::io::Error| Error::new(Reason::Corrupt, format!("{from} of {id}: {error}"));
        let running = self.partitions.write().remove(&id);
        if let Some(running) = running {
            running.group().shutdown().await;
            let found = self.raft.recover(id, from).map_err(io)?;
            self.recovered.lock().insert((id, from), found);
        }
        let is_durable = self.recovered.lock().get(&(id, replica.id)).is_some_and(|found| found.vote.is_some());
        if !is_durable {
            let found = self.recovered.lock().get(&(id, from)).cloned().unwrap_or_default();
            let machine = PartitionMachine::new(kv::Store::new(config), Arc::clone(&self.births));
            let (mut machine, last) = raft::salvage(&self.raft, id, from, &found, machine).await.map_err(io)?;
            let at = LogPosition { index: partition.epoch.members, term };
            machine.confine(at.index, partition.span.clone(), partition.epoch.bounds);
            let rows = machine.store().rows();
            let seeded = raft::seed(&self.raft, id, replica.id, &[replica], replica.id, at, &mut machine).await;
            self.recovered.lock().insert((id, replica.id), seeded.map_err(io)?);
            tracing::warn!(partition = %id, %from, ?last, rows, map = map.version(), "it goes on from what is left here");
        }
        raft::bury(&self.raft, id, from).await.map_err(io)?;
        self.recovered.lock().remove(&(id, from));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::hosting::tests::{Moody, founder, start},
        *,
    };
    use crate::{
        env::Scope,
        log::{LogEngine as _, Recovered, memory::MemoryLog, snapshots::MemorySnapshots},
    };

    const PATIENCE: Duration = Duration::from_secs(30);

    /// What outlives a node.
    #[derive(Clone)]
    struct Disk(Arc<MemoryLog>, MemorySnapshots);

    impl Disk {
        /// Runs a node that finds this map until `work` is done with it; then it is killed.
        async fn life<T: Send + 'static>(
            &self,
            seed: u64,
            map: Map,
            unreadable: u32,
            work: impl AsyncFnOnce(Arc<Node>) -> T,
        ) -> T {
            let scope = Scope::seeded(seed);
            let Self(log, snapshots) = self;
            let done =
                scope.run(async { work(start(log, Moody(snapshots.clone(), unreadable.into()), map)).await }).await;
            scope.abort_all();
            while scope.live_tasks() > 0 {
                tokio::task::yield_now().await;
            }
            done
        }

        fn found(&self, id: PartitionId, replica: Replica) -> Recovered {
            self.0.recover().unwrap().remove(&(id, replica.id)).unwrap_or_default()
        }
    }

    async fn put(node: &Node, key: &'static str) {
        let action = kv::Action::Put { value: "1".into() };
        let item = kv::Item { key: key.into(), condition: kv::Condition::Any, action, return_previous: false };
        let write = kv::Write { session: None, op: kv::Op::Single(item) };
        let here = node.partitions().remove(0);
        here.write_all(vec![write], here.ticket(Instant::now() + PATIENCE)).await.remove(0).unwrap();
    }

    /// A node that has written a row to its only partition is killed before it hears that this is to be recovered: the map
    /// that says so, the partition as it was, and what the driver is to be told.
    async fn given_up(disk: &Disk) -> (Map, placement::Partition, Recover) {
        disk.life(1, Map::default(), 0, async |node| {
            let deadline = Instant::now() + PATIENCE;
            node.found("c".into(), founder(), 1, deadline).await.unwrap();
            node.map_at_least(1).await;
            put(&node, "a").await;
            let group = node.driver_group().unwrap();
            let settled = async {
                loop {
                    let map = node.routing().map();
                    if let Some(partition) = map.partitions().values().find(|partition| partition.id.0 > 0)
                        && partition.is_at_rest()
                    {
                        return partition.clone();
                    }
                    node.routing().newer_than(map.version()).await;
                }
            };
            let before = settled.await;
            let asked = Recover {
                partition: before.id,
                epoch: before.epoch,
                survivor: before.members[0].id,
                last_term: 1,
                last_index: 2,
                term: 1,
                wall_ms: 7,
            };
            let mut state = group.read(|machine, _| machine.state().clone());
            state.apply(Command::Recover(asked.clone())).unwrap();
            (state.map().clone(), before, asked)
        })
        .await
    }

    /// What a node makes of a disk and a map that gives its replica up, whatever it had done before it was killed.
    async fn goes_on(disk: &Disk, unreadable: u32, map: Map, old: Replica, asked: Recover) {
        let id = asked.partition;
        let now = map.partition(id).unwrap().clone();
        disk.life(3, map, unreadable, async |node| {
            let deadline = Instant::now() + PATIENCE;
            // With the same command the driver comes to the same map.
            node.drive(&Command::Recover(asked), deadline).await.unwrap();
            loop {
                let seen = node.routing().changes();
                let map = node.routing().map();
                let active = map.partition(id).is_some_and(|now| now.phase == Phase::Active);
                if active && node.partition(id).is_some_and(|here| here.group().is_leader()) {
                    break;
                }
                timeout_at(deadline, node.routing().changed_since(seen)).await.expect("it goes on");
            }
            put(&node, "b").await;
            let here = node.partition(id).unwrap();
            assert_eq!(here.group().replica(), now.members[0]);
            assert!(here.group().applied().index > now.epoch.members && here.group().leadership().term > 1 << 20);
            assert_eq!(here.group().read(|machine, _| machine.store().rows()), 2);
        })
        .await;
        assert!(disk.found(id, old).tombstone, "the old one is never opened again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_killed_between_any_two_steps_goes_on_where_it_was() {
        for (killed_after, unreadable) in [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0)] {
            let disk = Disk(Arc::new(MemoryLog::immediate()), MemorySnapshots::default());
            let (map, before, asked) = given_up(&disk).await;
            let (id, old) = (before.id, before.members[0]);
            let now = map.partition(id).unwrap().clone();
            let fresh = now.members[0];
            // Done by hand on the node's disk, as far as it came: by a node without a map, which does nothing itself.
            let (found, now) = (disk.found(id, old), now.clone());
            disk.life(2, Map::default(), 0, async |node| {
                let Phase::Recovering(from, term) = now.phase else { panic!("{now:?}") };
                let config = kv::StoreConfig {
                    layout: crate::key::Layout::Ordered,
                    span: now.birth.clone(),
                    limits: kv::SessionLimits::default(),
                };
                let machine = PartitionMachine::new(kv::Store::new(config), Arc::clone(&node.births));
                let (mut machine, _) = raft::salvage(&node.raft, id, from, &found, machine).await.unwrap();
                machine.confine(now.epoch.members, now.span.clone(), now.epoch.bounds);
                let at = LogPosition { index: now.epoch.members, term };
                if killed_after >= 1 {
                    raft::seed(&node.raft, id, fresh.id, &[fresh], fresh.id, at, &mut machine).await.unwrap();
                }
                if killed_after >= 2 {
                    raft::bury(&node.raft, id, from).await.unwrap();
                }
            })
            .await;
            // With the second number its snapshots cannot be read so often at first.
            goes_on(&disk, unreadable, map, old, asked).await;
        }
    }
}
