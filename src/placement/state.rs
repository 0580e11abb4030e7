//! The placement driver's replicated state: the machine of group 0.
//!
//! Invariants:
//! * a refused command changes nothing; one that changes the map raises its version by exactly one;
//! * counters only go up: an id is never handed out twice, not even after what bore it is gone;
//! * members of a partition change only by a report of its group, its target only by a step;
//! * a replica leaves the map only by a report that does not name it, made after the last target that did, and never
//!   becomes a member again;
//! * the snapshot holds all that later answers depend on. The history of changes is no part of it: without it,
//!   [`State::delta_since`] has no answer and whoever asks takes the whole map.

use super::{
    DecodeError,
    command::{Answer, Command, CreateKeyspace, Refusal, RegisterNode, Reply, Step},
    limits,
    map::{DRIVER_KEYSPACE, DRIVER_KEYSPACE_NAME, Fit, Keyspace, Map, MapDelta, Node, Partition, Phase, Standing},
    recovery::Recovery,
    ring::{Placer, Ring},
};
use crate::key::{DRIVER, Epoch, KeyKind, KeyspaceId, Layout, NodeId, PartitionId, Replica, ReplicaId, Span};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The first member of the driver's group: the node that forms the cluster initializes group 0 with exactly this one
/// before it proposes [`Command::Bootstrap`].
pub const DRIVER_FIRST: Replica = Replica { id: ReplicaId(1), node: NodeId(1) };
/// Most voters of the driver's group.
pub const DRIVER_REPLICAS_MAX: u32 = 5;
/// Most ids that the history of changes remembers.
pub const HISTORY_IDS_MAX: usize = 16_384;

/// The next id of each sort.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Counters {
    node: u64,
    keyspace: u64,
    partition: u64,
    replica: u64,
}

/// What one version of the map changed.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    version: u64,
    nodes: BTreeSet<NodeId>,
    keyspaces: BTreeSet<KeyspaceId>,
    partitions: BTreeSet<PartitionId>,
}

impl Change {
    fn len(&self) -> usize {
        self.nodes.len() + self.keyspaces.len() + self.partitions.len()
    }
}

/// How the state is written.
#[derive(Serialize, Deserialize)]
struct StateBytes {
    map: MapDelta,
    replicas_default: u32,
    next: Counters,
}

/// All that the placement driver knows.
#[derive(Clone, Debug)]
pub struct State {
    map: Map,
    replicas_default: u32,
    next: Counters,
    /// The partitions that went on without a quorum, the oldest first.
    pub(super) recoveries: Vec<Recovery>,
    history: VecDeque<Change>,
    history_ids: usize,
}

impl Default for State {
    fn default() -> Self {
        Self {
            map: Map::default(),
            replicas_default: limits::REPLICAS_DEFAULT,
            next: Counters { node: 1, keyspace: 1, partition: 1, replica: 1 },
            recoveries: Vec::new(),
            history: VecDeque::new(),
            history_ids: 0,
        }
    }
}

impl State {
    /// The state before the first command.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The map.
    #[must_use]
    pub const fn map(&self) -> &Map {
        &self.map
    }

    /// Replicas of keyspaces that do not say.
    #[must_use]
    pub const fn replicas_default(&self) -> u32 {
        self.replicas_default
    }

    /// Whether the cluster has been formed.
    #[must_use]
    pub const fn is_initialized(&self) -> bool {
        self.map.version() > 0
    }

    /// Applies one command of the log.
    ///
    /// # Errors
    /// A refusal: nothing has changed.
    pub fn apply(&mut self, command: Command) -> Answer {
        let mut change = Change::default();
        let answer = match command {
            Command::Bootstrap { cluster_id, node, replicas_default } => {
                self.bootstrap(cluster_id, &node, replicas_default, &mut change)
            }
            _ if !self.is_initialized() => Err(Refusal::NotInitialized),
            Command::RegisterNode(process) => self.register_node(&process, &mut change),
            Command::CreateKeyspace(request) => self.create_keyspace(request, &mut change),
            Command::DropKeyspace { name } => self.drop_keyspace(&name, &mut change),
            Command::Report { partition, members_epoch, members } => {
                self.report(partition, members_epoch, members, &mut change)
            }
            Command::Step(Step::SetTarget { partition, epoch, nodes }) => {
                self.set_target(partition, epoch, &nodes, &mut change)
            }
            Command::Step(Step::SetInitializer { partition, from, to }) => {
                self.set_initializer(partition, from, to, &mut change)
            }
            Command::SetStanding { node, standing } => self.set_standing(node, standing, &mut change),
            Command::Divide { partition, bounds, at } => self.divide(partition, bounds, at, &mut change),
            Command::Divided { partition, child } => self.divided(partition, child, &mut change),
            Command::Merge { pair, bounds } => self.merge(pair, bounds, &mut change),
            Command::Unmerge { pair } => self.unmerge(pair, &mut change),
            Command::Merged { pair, bounds } => self.end_merge(pair, bounds, true, &mut change),
            Command::Unmerged { pair, bounds } => self.end_merge(pair, bounds, false, &mut change),
            Command::Recover(asked) => self.recover(asked, &mut change),
        };
        assert!(answer.is_ok() || change.len() == 0, "a refused command changes nothing");
        if change.len() > 0 {
            self.map.raise_version();
            self.remember(change);
        }
        answer
    }

    /// What has changed since `version`: empty if nothing has. `None` if that is too long ago, or not of this past:
    /// take [`Map::full`].
    #[must_use]
    pub fn delta_since(&self, version: u64) -> Option<MapDelta> {
        let missing = self.map.version().checked_sub(version)?;
        let missing = usize::try_from(missing).ok().filter(|missing| *missing <= self.history.len())?;
        let mut all = Change::default();
        for change in self.history.range(self.history.len() - missing..) {
            all.nodes.extend(&change.nodes);
            all.keyspaces.extend(&change.keyspaces);
            all.partitions.extend(&change.partitions);
        }
        let (keyspaces, partitions) = (self.map.keyspaces(), self.map.partitions());
        Some(MapDelta {
            cluster_id: self.map.cluster_id().to_owned(),
            from_version: Some(version),
            to_version: self.map.version(),
            nodes: all.nodes.iter().filter_map(|id| self.map.node(*id).cloned()).collect(),
            keyspaces: all.keyspaces.iter().filter_map(|id| keyspaces.get(id).cloned()).collect(),
            partitions: all.partitions.iter().filter_map(|id| partitions.get(id).cloned()).collect(),
            keyspaces_removed: all.keyspaces.into_iter().filter(|id| !keyspaces.contains_key(id)).collect(),
            partitions_removed: all.partitions.into_iter().filter(|id| !partitions.contains_key(id)).collect(),
        })
    }

    /// Versioned bytes of the whole state.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let state = StateBytes { map: self.map.full(), replicas_default: self.replicas_default, next: self.next };
        // Behind the state, and only if there are any: states that were kept before there could be are read as ever.
        if self.recoveries.is_empty() { super::encode(&state) } else { super::encode(&(state, &self.recoveries)) }
    }

    /// The state behind these bytes, checked, without its history.
    ///
    /// # Errors
    /// When they are none of ours, of another format, or contradict themselves.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (StateBytes { map: full, replicas_default, next }, recoveries) = super::decode("driver state", bytes)
            .or_else(|_| super::decode("driver state", bytes).map(|state| (state, Vec::new())))?;
        let wrong = |why: String| DecodeError { what: "driver state", why };
        let mut map = Map::default();
        if full.from_version.is_some() || (full.to_version > 0 && map.apply(full) != Fit::Applied) {
            return Err(wrong("its map is not a whole one".to_owned()));
        }
        map.check().map_err(wrong)?;
        let unborn = || map.partitions().values().filter_map(|partition| partition.cut.as_ref());
        let replicas = map.partitions().values().flat_map(Partition::replicas);
        let replicas = replicas.chain(unborn().flat_map(|cut| cut.members.iter().copied())).map(|replica| replica.id.0);
        let used = [
            (next.node, map.nodes().keys().next_back().map(|id| id.0)),
            (next.keyspace, map.keyspaces().keys().next_back().map(|id| id.0)),
            (
                next.partition,
                map.partitions().keys().copied().chain(unborn().map(|cut| cut.child)).map(|id| id.0).max(),
            ),
            (next.replica, replicas.max()),
        ];
        if used.iter().any(|(next, used)| used.is_some_and(|used| used >= *next)) {
            return Err(wrong(format!("ids are in use that were not handed out yet: {next:?}")));
        }
        Ok(Self { map, replicas_default, next, recoveries, ..Self::default() })
    }

    fn remember(&mut self, change: Change) {
        self.history_ids += change.len();
        self.history.push_back(Change { version: self.map.version(), ..change });
        while self.history_ids > HISTORY_IDS_MAX {
            let oldest = self.history.pop_front().expect("ids are remembered, so some change remembers them");
            self.history_ids -= oldest.len();
        }
        let newest = self.history.back().map_or(0, |change| change.version);
        assert!(newest == 0 || newest == self.map.version(), "the history ends at the map's version");
    }

    pub(super) fn fresh_partition(&mut self) -> PartitionId {
        let id = PartitionId(self.next.partition);
        self.next.partition += 1;
        id
    }

    pub(super) fn fresh_replica(&mut self, node: NodeId) -> Replica {
        let id = ReplicaId(self.next.replica);
        self.next.replica += 1;
        Replica { id, node }
    }

    pub(super) fn put_partition(&mut self, partition: Partition, change: &mut Change) {
        self.put_partitions(vec![partition], change);
    }

    /// Puts partitions that change together.
    pub(super) fn put_partitions(&mut self, partitions: Vec<Partition>, change: &mut Change) {
        change.partitions.extend(partitions.iter().map(|partition| partition.id));
        self.map.put_partitions(partitions);
    }

    pub(super) fn remove_partition(&mut self, id: PartitionId, change: &mut Change) {
        change.partitions.insert(id);
        self.map.remove_partition(id);
    }

    fn put_keyspace(&mut self, keyspace: Keyspace, change: &mut Change) {
        change.keyspaces.insert(keyspace.id);
        self.map.put_keyspace(keyspace);
    }

    pub(super) fn put_node(&mut self, node: Node, change: &mut Change) {
        change.nodes.insert(node.id);
        self.map.put_node(node);
    }

    fn bootstrap(
        &mut self,
        cluster_id: String,
        node: &RegisterNode,
        replicas_default: u32,
        change: &mut Change,
    ) -> Answer {
        if self.is_initialized() {
            let cluster_id = self.map.cluster_id().to_owned();
            return Ok(Reply::Bootstrapped { cluster_id, created: false });
        }
        limits::check_cluster_id(&cluster_id)?;
        let replicas_default = limits::replicas(replicas_default, limits::REPLICAS_DEFAULT)?;
        let node = limits::node(DRIVER_FIRST.node, node)?;
        self.replicas_default = replicas_default;
        self.next.node = DRIVER_FIRST.node.0 + 1;
        self.next.replica = DRIVER_FIRST.id.0 + 1;
        self.map.set_cluster_id(cluster_id.clone());
        self.put_node(node, change);
        let driver = Keyspace {
            id: DRIVER_KEYSPACE,
            name: DRIVER_KEYSPACE_NAME.to_owned(),
            kind: KeyKind::Bytes,
            layout: Layout::Ordered,
            replicas: DRIVER_REPLICAS_MAX,
        };
        self.put_keyspace(driver, change);
        let partition = Partition {
            id: DRIVER,
            keyspace: DRIVER_KEYSPACE,
            span: Span::all(),
            epoch: Epoch { bounds: 1, members: 0 },
            members: vec![DRIVER_FIRST],
            target: vec![DRIVER_FIRST],
            phase: Phase::Active,
            initializer: DRIVER_FIRST.id,
            leaving: Vec::new(),
            birth: Span::all(),
            cut: None,
            merge: None,
        };
        self.put_partition(partition, change);
        let name = limits::DEFAULT_KEYSPACE.to_owned();
        self.add_keyspace(
            name,
            KeyKind::Bytes,
            Layout::Ordered,
            replicas_default,
            &[Span::all()],
            &BTreeSet::new(),
            change,
        );
        Ok(Reply::Bootstrapped { cluster_id, created: true })
    }

    fn register_node(&mut self, process: &RegisterNode, change: &mut Change) -> Answer {
        if !process.cluster_id.is_empty() && process.cluster_id != self.map.cluster_id() {
            let (ours, theirs) = (self.map.cluster_id().to_owned(), process.cluster_id.clone());
            return Err(Refusal::ClusterMismatch { ours, theirs });
        }
        let fresh = limits::node(NodeId(self.next.node), process)?;
        let known = self.map.nodes().values().find(|node| node.uuid == fresh.uuid);
        if let Some(claimed) = process.previous.filter(|claimed| known.map(|node| node.id) != Some(*claimed)) {
            let known = known.map_or_else(|| "no node".to_owned(), |node| node.id.to_string());
            return Err(Refusal::IdentityMismatch { uuid: fresh.uuid, claimed, known });
        }
        if let Some(removed) = known.filter(|node| node.standing == Standing::Removed) {
            return Err(Refusal::NodeRemoved(removed.id));
        }
        let known = known.cloned();
        let other = |node: &&Node| node.standing.is_present() && node.uuid != fresh.uuid;
        let holds = |node: &&Node| other(node) && node.address == fresh.address;
        let holder = self.map.nodes().values().find(holds).cloned();
        if let Some(holder) = holder {
            if !holder.ephemeral {
                return Err(Refusal::AddressTaken { address: fresh.address, node: holder.id });
            }
            self.put_node(Node { standing: Standing::Gone, ..holder }, change);
        }
        if let Some(known) = &known {
            // One that was taken for gone is back.
            let standing = if known.standing == Standing::Gone { Standing::Active } else { known.standing };
            let node = Node { id: known.id, standing, ..fresh };
            let id = node.id;
            if node != *known {
                self.put_node(node, change);
            }
            return Ok(Reply::Registered { node: id, created: false });
        }
        let room = self.map.nodes().len() < limits::NODES_MAX;
        check_room("nodes", room, limits::NODES_MAX)?;
        self.next.node += 1;
        let node = fresh.id;
        self.put_node(fresh, change);
        Ok(Reply::Registered { node, created: true })
    }

    fn create_keyspace(&mut self, request: CreateKeyspace, change: &mut Change) -> Answer {
        let CreateKeyspace { name, kind, layout, replicas, cuts, avoid } = request;
        limits::check_name(&name)?;
        let replicas = limits::replicas(replicas, self.replicas_default)?;
        let spans = limits::spans(kind, layout, &cuts)?;
        if let Some(existing) = self.map.keyspace_by_name(&name) {
            return self.existing_keyspace(existing, (kind, layout, replicas), spans.len());
        }
        if !self.map.nodes().values().any(|node| node.standing.takes_replicas()) {
            return Err(Refusal::NoNodeForReplicas);
        }
        let (keyspaces, partitions) = (self.map.keyspaces().len(), self.map.partitions().len());
        check_room("keyspaces", keyspaces < limits::KEYSPACES_MAX, limits::KEYSPACES_MAX)?;
        check_room("partitions", partitions + spans.len() <= limits::PARTITIONS_MAX, limits::PARTITIONS_MAX)?;
        let keyspace = self.add_keyspace(name, kind, layout, replicas, &spans, &avoid, change);
        let got = self.map.partitions_of(keyspace.id).map(|p| p.members.len()).min().unwrap_or(0);
        let mut warnings = Vec::new();
        if got < replicas as usize {
            warnings.push(format!(
                "{replicas} replicas are wanted and {got} nodes are there for them: the missing ones are added as nodes join"
            ));
        }
        Ok(Reply::KeyspaceCreated { keyspace, partitions: spans.len() as u64, created: true, warnings })
    }

    fn existing_keyspace(&self, existing: &Keyspace, asked: (KeyKind, Layout, u32), partitions: usize) -> Answer {
        let (kind, layout, replicas) = asked;
        let mut differs = Vec::new();
        if existing.kind != kind {
            differs.push(format!("keys are {:?}, not {kind:?}", existing.kind));
        }
        if existing.layout != layout {
            differs.push(format!("layout is {:?}, not {layout:?}", existing.layout));
        }
        if existing.replicas != replicas {
            differs.push(format!("replicas are {}, not {replicas}", existing.replicas));
        }
        if !differs.is_empty() {
            return Err(Refusal::KeyspaceExists { name: existing.name.clone(), differs: differs.join("; ") });
        }
        // Cuts are no setting: partitions split and merge over time.
        let now = self.map.partitions_of(existing.id).count();
        let mut warnings = Vec::new();
        if now != partitions {
            warnings.push(format!("it exists with {now} partitions; it was not cut into {partitions}"));
        }
        Ok(Reply::KeyspaceCreated { keyspace: existing.clone(), partitions: now as u64, created: false, warnings })
    }

    /// Makes a keyspace and places its partitions on the ring. Everything is checked before.
    #[expect(clippy::too_many_arguments, reason = "the fields of a keyspace, resolved")]
    fn add_keyspace(
        &mut self,
        name: String,
        kind: KeyKind,
        layout: Layout,
        replicas: u32,
        spans: &[Span],
        avoid: &BTreeSet<NodeId>,
        change: &mut Change,
    ) -> Keyspace {
        let id = KeyspaceId(self.next.keyspace);
        self.next.keyspace += 1;
        let mut placer = self.placer(avoid, Some((replicas, spans.len() as u64)));
        let mut partitions = Vec::with_capacity(spans.len());
        for span in spans {
            let partition = self.fresh_partition();
            let nodes = placer.place(id, partition, replicas);
            let members: Vec<Replica> = nodes.into_iter().map(|node| self.fresh_replica(node)).collect();
            change.partitions.insert(partition);
            partitions.push(Partition {
                id: partition,
                keyspace: id,
                span: span.clone(),
                epoch: Epoch { bounds: 1, members: 0 },
                initializer: members[0].id,
                target: members.clone(),
                members,
                phase: Phase::Creating,
                leaving: Vec::new(),
                birth: span.clone(),
                cut: None,
                merge: None,
            });
        }
        self.map.put_partitions(partitions);
        let keyspace = Keyspace { id, name, kind, layout, replicas };
        self.put_keyspace(keyspace.clone(), change);
        keyspace
    }

    /// A placer that knows what every node holds, with room for `more` partitions (replicas wanted,
    /// number of partitions). Nodes in
    /// `avoid` get nothing, unless there are no others.
    pub(super) fn placer(&self, avoid: &BTreeSet<NodeId>, more: Option<(u32, u64)>) -> Placer {
        let mut takers = self.map.nodes().values().filter(|node| node.standing.takes_replicas());
        let all_avoided = takers.all(|node| avoid.contains(&node.id));
        let none = BTreeSet::new();
        let ring = Ring::new(self.map.nodes().values(), if all_avoided { &none } else { avoid });
        let mut demand: BTreeMap<u32, u64> = more.into_iter().collect();
        let placed = || self.map.partitions().values().filter(|partition| partition.id != DRIVER);
        for partition in placed() {
            *demand.entry(self.map.keyspaces()[&partition.keyspace].replicas).or_default() += 1;
        }
        let mut placer = Placer::new(ring, &demand);
        for partition in placed() {
            placer.occupy(partition.target.iter().map(|replica| replica.node));
        }
        placer
    }

    fn drop_keyspace(&mut self, name: &str, change: &mut Change) -> Answer {
        limits::check_name(name)?;
        if name == limits::DEFAULT_KEYSPACE {
            return Err(Refusal::NameInvalid(format!("keyspace \"{name}\" cannot be dropped")));
        }
        let Some(keyspace) = self.map.keyspace_by_name(name).map(|keyspace| keyspace.id) else {
            return Ok(Reply::KeyspaceDropped { dropped: false });
        };
        change.keyspaces.insert(keyspace);
        change.partitions.extend(self.map.partitions_of(keyspace).map(|partition| partition.id));
        for partition in &change.partitions {
            self.map.remove_partition(*partition);
        }
        self.map.remove_keyspace(keyspace);
        Ok(Reply::KeyspaceDropped { dropped: true })
    }

    fn report(&mut self, id: PartitionId, epoch: u64, members: Vec<Replica>, change: &mut Change) -> Answer {
        let known = self.map.partition(id).ok_or(Refusal::PartitionUnknown(id))?;
        // A group that goes on without a quorum reports the epoch that it was given; that of before is below.
        if epoch < known.epoch.members || (known.phase == Phase::Active && epoch == known.epoch.members) {
            return Ok(Reply::Reported { changed: false });
        }
        let nodes: BTreeSet<NodeId> = members.iter().map(|replica| replica.node).collect();
        let invalid = |why: String| Err(Refusal::ReportInvalid { partition: id, why });
        if members.is_empty() || nodes.len() != members.len() {
            return invalid(format!("they are not on distinct nodes: {members:?}"));
        }
        // Nothing finer is asked: a group's own log is the truth about its members, wanted or not.
        if let Some(replica) =
            members.iter().find(|r| r.id.0 >= self.next.replica || !self.map.nodes().contains_key(&r.node))
        {
            return invalid(format!("{} on {} was never handed out", replica.id, replica.node));
        }
        let mut partition = known.clone();
        partition.epoch.members = epoch;
        partition.phase = Phase::Active;
        // Newer than any withdrawal: what it does not name, the group does not have and will not take in any more.
        partition.leaving.clear();
        let has_left = |replica: &Replica| known.members.contains(replica) && !members.contains(replica);
        if known.target.iter().any(has_left) {
            // A withdrawal that came too late: nobody comes back under the id with which he left, since an old copy of the
            // map knows it. What the group has become is the target; who was to be added besides is withdrawn.
            let is_free = |replica: &&Replica| members.iter().all(|member| member.node != replica.node);
            let added = known.target.iter().filter(|replica| !known.members.contains(replica));
            partition.leaving = added.filter(is_free).copied().collect();
            partition.target = in_order_of(&known.target, members.clone());
        }
        partition.members = in_order_of(&partition.target, members);
        self.put_partition(partition, change);
        Ok(Reply::Reported { changed: true })
    }

    fn set_target(&mut self, id: PartitionId, epoch: Epoch, nodes: &[NodeId], change: &mut Change) -> Answer {
        let known = self.map.partition(id).ok_or(Refusal::PartitionUnknown(id))?;
        let outdated = |why: String| Err(Refusal::StepOutdated { partition: id, why });
        if known.epoch != epoch {
            return outdated(format!("decided at {epoch:?}, now it is {:?}", known.epoch));
        }
        let distinct: BTreeSet<&NodeId> = nodes.iter().collect();
        if distinct.len() != nodes.len() || !limits::REPLICAS.contains(&(nodes.len() as u32)) {
            return outdated(format!("no possible set of nodes: {nodes:?}"));
        }
        if let Some(node) = nodes.iter().find(|node| !self.map.nodes().contains_key(node)) {
            return outdated(format!("{node} does not exist"));
        }
        if known.cut.is_some() || known.merge.is_some() {
            return outdated("it is being cut or merged".to_owned());
        }
        let mut partition = known.clone();
        if known.is_at_rest() {
            let on = |node: &NodeId| partition.replica_on(*node).unwrap_or_else(|| self.fresh_replica(*node));
            partition.target = nodes.iter().map(on).collect();
        } else if known.phase == Phase::Active
            && distinct == known.members.iter().map(|replica| &replica.node).collect()
        {
            // Nothing new until the group has confirmed that it is back where it was: who still follows the withdrawn
            // target must find replicas that it does not know, or a membership that it has not heard of.
            let has_member = |node| partition.members.iter().any(|member| member.node == node);
            partition.leaving = partition.replicas().filter(|replica| !has_member(replica.node)).collect();
            partition.target = nodes.iter().filter_map(|node| partition.replica_on(*node)).collect();
        } else {
            return outdated("an earlier change of its members is under way, which can only be withdrawn".to_owned());
        }
        partition.members = in_order_of(&partition.target, partition.members);
        if Some(&partition) != self.map.partition(id) {
            self.put_partition(partition, change);
        }
        Ok(Reply::Stepped)
    }

    fn set_initializer(&mut self, id: PartitionId, from: ReplicaId, to: ReplicaId, change: &mut Change) -> Answer {
        let known = self.map.partition(id).ok_or(Refusal::PartitionUnknown(id))?;
        let outdated = |why: String| Err(Refusal::StepOutdated { partition: id, why });
        if known.phase != Phase::Creating || known.initializer != from {
            return outdated(format!("it is {:?} and its initializer {}", known.phase, known.initializer));
        }
        if !known.members.iter().any(|replica| replica.id == to) {
            return outdated(format!("{to} is no member"));
        }
        if from != to {
            self.put_partition(Partition { initializer: to, ..known.clone() }, change);
        }
        Ok(Reply::Stepped)
    }
}

/// `members` in the order of `target`; what is not in it comes last, by id.
fn in_order_of(target: &[Replica], mut members: Vec<Replica>) -> Vec<Replica> {
    let rank = |replica: &Replica| target.iter().position(|wanted| wanted == replica).unwrap_or(target.len());
    members.sort_by_key(|replica| (rank(replica), replica.id));
    members
}

fn check_room(what: &str, room: bool, limit: usize) -> Result<(), Refusal> {
    if room { Ok(()) } else { Err(Refusal::LimitReached { what: what.to_owned(), limit: limit as u64 }) }
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(super) mod tests;

#[cfg(test)]
#[path = "withdraw_tests.rs"]
mod withdraw_tests;
