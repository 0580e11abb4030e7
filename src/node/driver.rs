//! The placement driver as a node sees it: how any node reaches it, and what the node that leads it does.
//!
//! The leader of group 0 plans (a pure function of the state and of who is alive), performs the plan's steps as
//! commands of its own log, and pushes every change of the map to every node. Any other member can take over at any
//! moment: nothing of this is remembered outside the log.

use super::{Node, machines::DriverMachine, merging, observed::Observed};
use crate::{
    env,
    error::{Error, Outcome},
    key::{DRIVER, NodeId},
    placement::{
        self, Answer, Balancer, Command, Decision, Fit, Health, MapDelta, Standing,
        command::{decode_answer, encode_answer},
    },
    raft::{Group, Role, WriteError},
    transport::{
        Kind,
        endpoint::{Reply, Service},
    },
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use std::{collections::BTreeMap, sync::Weak, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// How long the leader waits for something to happen before it plans again.
const PLAN_EVERY: Duration = Duration::from_millis(200);
/// How often the leader compares what nodes hold.
const BALANCE_EVERY: Duration = Duration::from_secs(1);
/// Patience with one node when pushing the map to it.
const PUSH_DEADLINE: Duration = Duration::from_millis(1_000);
/// Nodes pushed to at the same time.
const PUSHES_AT_ONCE: usize = 32;
/// Patience with one member when calling the driver.
const ATTEMPT_DEADLINE: Duration = Duration::from_millis(1_500);
/// Pause before the members are tried again.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(50);

const ANSWERED: u8 = 0;
const NOT_LEADER: u8 = 1;

/// Answers other nodes' calls to the driver.
pub(super) struct DriverService(pub(super) Weak<Node>);

impl Service for DriverService {
    fn handle(&self, _from: NodeId, body: Bytes, reply: Reply) {
        let Some(node) = self.0.upgrade() else { return };
        env::spawn(async move {
            let deadline = Instant::now() + ATTEMPT_DEADLINE;
            let mut out = BytesMut::new();
            match node.drive_here(body, deadline).await {
                Ok(answer) => {
                    out.put_u8(ANSWERED);
                    out.put(encode_answer(&answer));
                }
                Err(Local::NotLeader(leader)) => {
                    out.put_u8(NOT_LEADER);
                    out.put_u64(leader.map_or(0, |node| node.0));
                }
                // No answer: the caller cannot know, and its deadline says so.
                Err(Local::Unknown) => return,
            }
            reply.send(out.freeze());
        });
    }
}

/// Why this node's own member of the driver gave no answer.
enum Local {
    NotLeader(Option<NodeId>),
    Unknown,
}

impl Node {
    /// Asks the placement driver, wherever it is led, and waits for its answer. Commands are idempotent, so an
    /// attempt without an answer is repeated.
    ///
    /// # Errors
    /// The driver's refusal; `NO_QUORUM` or `LEADER_UNKNOWN` (outcome unknown) when it cannot be reached in time.
    pub async fn drive(&self, command: &Command, deadline: Instant) -> Result<placement::Reply, Error> {
        let body = command.encode();
        let mut hint = self.routing().leader(DRIVER).map(|leader| leader.node);
        loop {
            for to in self.driver_candidates(hint) {
                if Instant::now() >= deadline {
                    break;
                }
                match self.drive_at(to, body.clone(), deadline).await {
                    Ok(answer) => return answer.map_err(Into::into),
                    Err(Local::NotLeader(leader)) if leader.is_some() && leader != hint => {
                        hint = leader;
                        break;
                    }
                    Err(_) => {}
                }
            }
            if Instant::now() + ATTEMPT_PAUSE >= deadline {
                let members = self.driver_members();
                return Err(self.liveness().no_leader(DRIVER, &members, Some(Outcome::Unknown)));
            }
            sleep(ATTEMPT_PAUSE).await;
        }
    }

    fn driver_candidates(&self, hint: Option<NodeId>) -> Vec<NodeId> {
        let members = self.driver_members();
        let mut candidates: Vec<NodeId> = hint.into_iter().collect();
        candidates.extend(members.iter().map(|member| member.node).filter(|node| Some(*node) != hint));
        if candidates.is_empty() {
            candidates.push(self.id());
        }
        candidates
    }

    async fn drive_at(&self, to: NodeId, body: Bytes, deadline: Instant) -> Result<Answer, Local> {
        let patience = ATTEMPT_DEADLINE.min(deadline.saturating_duration_since(Instant::now()));
        if to == self.id() {
            return self.drive_here(body, Instant::now() + patience).await;
        }
        let mut answer = self.endpoint().call(to, Kind::Driver, body, patience).await.map_err(|_| Local::Unknown)?;
        match answer.try_get_u8() {
            Ok(ANSWERED) => decode_answer(&answer).map_err(|_| Local::Unknown),
            Ok(NOT_LEADER) => {
                let leader = answer.try_get_u64().unwrap_or(0);
                Err(Local::NotLeader((leader != 0).then_some(NodeId(leader))))
            }
            _ => Err(Local::Unknown),
        }
    }

    async fn drive_here(&self, command: Bytes, deadline: Instant) -> Result<Answer, Local> {
        let Some(group) = self.driver_group() else { return Err(Local::NotLeader(None)) };
        match group.write(command, deadline).await {
            Ok((_at, answer)) => Ok(answer),
            Err(WriteError::NotLeader { leader }) => Err(Local::NotLeader(leader.map(|replica| replica.node))),
            Err(error) if error.effect() == Outcome::NotApplied => Err(Local::NotLeader(None)),
            Err(_) => Err(Local::Unknown),
        }
    }
}

/// Runs on every member of the driver; does something only while it leads.
pub(super) async fn run(node: Weak<Node>, group: Group<DriverMachine>) {
    let changed = group.read(|machine, _| machine.changed());
    let mut leading = Leading::default();
    loop {
        // Both a change and the pause end the wait: a node may have died without any change of state.
        let _elapsed = timeout(PLAN_EVERY, changed.notified()).await;
        let Some(node) = node.upgrade() else { return };
        if group.role() == Role::Stopped {
            return;
        }
        if !group.is_leader() {
            leading = Leading::default();
            *node.observed.lock() = Observed::new(node.split_bytes, node.merge_after);
            continue;
        }
        let health = leading.health(&node, &group);
        let mut decisions = leading.plan(&group, &health);
        if leading.balanced.is_none_or(|at| at.elapsed() >= BALANCE_EVERY) {
            leading.balanced = Some(Instant::now());
            decisions.extend(leading.balance(&node, &group, &health));
            node.cut_large(&node.routing().map(), &health);
            node.merge_idle(&node.routing().map());
        }
        perform(&node, &group, decisions).await;
        leading.merging.withdraw_late(&group).await;
        remove_departed(&group).await;
        push_map(&node, &group, &mut leading.known).await;
    }
}

async fn perform(node: &Node, group: &Group<DriverMachine>, decisions: Vec<Decision>) {
    for decision in decisions {
        tracing::info!(step = ?decision.step, why = %decision.why, "placement");
        let command = Command::Step(decision.step.clone()).encode();
        let written = group.write(command, Instant::now() + ATTEMPT_DEADLINE).await;
        let result = match &written {
            Ok((_at, Ok(_))) => "done".to_owned(),
            // Outdated: the next plan looks again.
            Ok((_at, Err(refusal))) => format!("refused: {refusal}"),
            Err(error) => format!("not performed: {error}"),
        };
        node.observed.lock().journal.note_step(node.clock().wall_ms(), &decision, result);
        if written.is_err() {
            return;
        }
    }
}

/// Nodes that were asked to leave and have nothing left are removed.
async fn remove_departed(group: &Group<DriverMachine>) {
    for node in group.read(|machine, _| machine.state().departed()) {
        tracing::info!(%node, "has nothing left and is removed from the cluster");
        let command = Command::SetStanding { node, standing: Standing::Removed }.encode();
        if let Err(error) = group.write(command, Instant::now() + ATTEMPT_DEADLINE).await {
            tracing::debug!(?error, "a node was not removed yet");
            return;
        }
    }
}

/// What a leader remembers of the others for as long as it leads.
#[derive(Default)]
struct Leading {
    /// Versions of the map that nodes have confirmed.
    known: BTreeMap<NodeId, u64>,
    /// Since when nodes have been in contact without a pause.
    alive_since: BTreeMap<NodeId, Instant>,
    /// When it first looked: what was silent before counts from then, as this node may have been the one out of contact.
    began: Option<Instant>,
    /// Compares what nodes hold.
    balancer: Balancer,
    /// When it last did.
    balanced: Option<Instant>,
    /// The version of the map, and what was known of nodes, when there was nothing to do: until one of them changes, there
    /// is nothing to do. With many partitions to plan is work.
    settled: Option<(u64, BTreeMap<NodeId, [bool; 3]>)>,
    /// Merges that are under way.
    merging: merging::UnderWay,
}

impl Leading {
    /// What is next.
    fn plan(&mut self, group: &Group<DriverMachine>, health: &placement::Liveness) -> Vec<Decision> {
        let judged = health.judged();
        group.read(|machine, _| {
            let version = machine.state().map().version();
            if self.settled.as_ref().is_some_and(|(at, known)| *at == version && *known == judged) {
                return Vec::new();
            }
            let decisions = placement::plan(machine.state(), health);
            self.settled = decisions.is_empty().then_some((version, judged));
            decisions
        })
    }

    /// What brings nodes nearer to their shares.
    fn balance(&mut self, node: &Node, group: &Group<DriverMachine>, health: &placement::Liveness) -> Vec<Decision> {
        let now_ms = self.began.map_or(0, |began| began.elapsed().as_millis() as u64);
        let observed = node.observed.lock();
        group.read(|machine, _| self.balancer.plan(machine.state(), health, &observed.loads, now_ms))
    }

    /// Who is alive, for the planner.
    fn health(&mut self, node: &Node, group: &Group<DriverMachine>) -> placement::Liveness {
        let nodes: Vec<NodeId> = group.read(|machine, _| machine.state().map().nodes().keys().copied().collect());
        let now = Instant::now();
        let watched = now.duration_since(*self.began.get_or_insert(now));
        self.alive_since.retain(|id, _| node.liveness().is_alive(*id));
        let health = |id: NodeId| {
            if !node.liveness().is_alive(id) {
                let silence = node.liveness().silence(id);
                if silence.min(watched) >= node.down_after {
                    return Health::Down;
                }
                return Health::Silent { for_ms: silence.as_millis() as u64 };
            }
            let since = *self.alive_since.entry(id).or_insert(now);
            Health::Alive { for_ms: now.duration_since(since).as_millis() as u64 }
        };
        let mut health = health;
        placement::Liveness(nodes.into_iter().map(|id| (id, health(id))).collect())
    }
}

async fn push_map(node: &Node, group: &Group<DriverMachine>, known: &mut BTreeMap<NodeId, u64>) {
    let (version, nodes) = group.read(|machine, _| {
        let map = machine.state().map();
        // One that is out for good hears what became of it if it is there to hear it.
        let hears = |to: &&placement::Node| to.standing.is_present() || node.liveness().is_alive(to.id);
        (map.version(), map.nodes().values().filter(hears).map(|to| to.id).collect::<Vec<_>>())
    });
    let behind: Vec<NodeId> = nodes.into_iter().filter(|to| known.get(to).is_none_or(|at| *at < version)).collect();
    let pushes = behind.into_iter().map(|to| {
        let from = known.get(&to).copied();
        async move { (to, push_to(node, group, to, from).await) }
    });
    let results: Vec<_> = stream::iter(pushes).buffer_unordered(PUSHES_AT_ONCE).collect().await;
    for (to, at) in results {
        match at {
            Some(at) => known.insert(to, at),
            None => known.remove(&to),
        };
    }
}

/// Brings one node up to date; answers with the version that it has kept by now.
async fn push_to(node: &Node, group: &Group<DriverMachine>, to: NodeId, from: Option<u64>) -> Option<u64> {
    let mut from = match from {
        Some(from) => from,
        None => offer(node, to, probe(group)).await?,
    };
    let version = group.read(|machine, _| machine.state().map().version());
    if from < version {
        let delta = group.read(|machine, _| {
            let state = machine.state();
            state.delta_since(from).unwrap_or_else(|| state.map().full())
        });
        from = offer(node, to, delta).await?;
    }
    Some(from)
}

/// A delta that changes nothing: it asks for the version.
fn probe(group: &Group<DriverMachine>) -> MapDelta {
    group.read(|machine, _| MapDelta {
        cluster_id: machine.state().map().cluster_id().to_owned(),
        from_version: Some(0),
        to_version: 0,
        ..MapDelta::default()
    })
}

async fn offer(node: &Node, to: NodeId, delta: MapDelta) -> Option<u64> {
    let mut answer = node.endpoint().call(to, Kind::MapPush, delta.encode(), PUSH_DEADLINE).await.ok()?;
    answer.try_get_u64().ok()
}

/// Takes changes of the map.
pub(super) struct MapService(pub(super) Weak<Node>);

impl Service for MapService {
    fn handle(&self, from: NodeId, body: Bytes, reply: Reply) {
        let Some(node) = self.0.upgrade() else { return };
        match MapDelta::decode(&body) {
            Ok(delta) => {
                if node.take_map(delta) == Fit::OtherCluster {
                    tracing::error!(%from, "a map of another cluster was offered and refused");
                }
                // What is on disk, not what is in memory: the driver sends nothing again that was confirmed, and after a
                // crash there is only what is on disk. It offers the rest again until that is kept too.
                let kept = *node.kept.borrow();
                reply.send(Bytes::copy_from_slice(&kept.to_be_bytes()));
            }
            Err(error) => tracing::error!(%from, %error, "an unreadable change of the map"),
        }
    }
}
