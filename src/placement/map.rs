//! The map: every node, keyspace and partition, and where a position lives.
//!
//! The placement driver holds the true one; nodes and clients hold copies and keep them fresh with [`MapDelta`]s.
//! Leaders are not in it: they are soft state and change without it.
//!
//! Invariants:
//! * [`Map::check`] holds for every map that the driver makes: partitions tile their keyspace;
//! * the version only goes up; equal versions of one cluster are equal maps;
//! * a partition that a newer map no longer names is gone for good.

use super::{DecodeError, merging::Merge};
use crate::key::{
    DRIVER, Epoch, KeyKind, KeyspaceId, Layout, NodeId, PartitionId, Replica, ReplicaId, SEED_INDEX, Span,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

/// The keyspace whose only partition is the placement driver's group. Not for users.
pub const DRIVER_KEYSPACE: KeyspaceId = KeyspaceId(0);
/// Name of [`DRIVER_KEYSPACE`].
pub const DRIVER_KEYSPACE_NAME: &str = "_driver";
/// Weight of a node that does not say: a full share.
pub const WEIGHT_MILLI_DEFAULT: u32 = 1_000;

/// What a node is there for. The driver sets it; it says nothing of whether the node is up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Standing {
    /// It takes its share.
    #[default]
    Active,
    /// It will not come back: another process has its address. It gets nothing, and its replicas are replaced.
    Gone,
    /// It keeps its replicas, leads nothing and gets nothing new, as before a restart.
    Draining,
    /// Its replicas move away; once none is left it is [`Standing::Removed`].
    Leaving,
    /// It is no part of the cluster any more, for good: no partition names it, and its identity is never used again.
    Removed,
}

impl Standing {
    /// Whether it may be given replicas.
    #[must_use]
    pub const fn takes_replicas(self) -> bool {
        matches!(self, Self::Active)
    }

    /// Whether what it has stays with it.
    #[must_use]
    pub const fn keeps_replicas(self) -> bool {
        matches!(self, Self::Active | Self::Draining)
    }

    /// Whether there is, or may be, a process that others should be in contact with.
    #[must_use]
    pub const fn is_present(self) -> bool {
        !matches!(self, Self::Gone | Self::Removed)
    }
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Gone => "gone",
            Self::Draining => "draining",
            Self::Leaving => "leaving",
            Self::Removed => "removed",
        })
    }
}

/// One server process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Id, never reused.
    pub id: NodeId,
    /// Persistent UUID, hyphenated lower case.
    pub uuid: String,
    /// `host:port` for clients and nodes.
    pub address: String,
    /// Failure domain; nodes that name none share the domain "".
    pub zone: String,
    /// Share of load in thousandths.
    pub weight_milli: u32,
    /// It keeps nothing over a restart.
    pub ephemeral: bool,
    /// What it is there for.
    pub standing: Standing,
}

impl Node {
    /// Share of load; 1.0 is a full share.
    #[must_use]
    pub fn weight(&self) -> f64 {
        f64::from(self.weight_milli) / f64::from(WEIGHT_MILLI_DEFAULT)
    }
}

/// A named collection of rows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Keyspace {
    /// Id, never reused.
    pub id: KeyspaceId,
    /// Unique name.
    pub name: String,
    /// Kind of its keys.
    pub kind: KeyKind,
    /// How it is cut.
    pub layout: Layout,
    /// Members wanted per partition.
    pub replicas: u32,
}

impl Keyspace {
    /// Whether it is Meridian's own, to be kept out of lists for users.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        self.name.starts_with('_')
    }
}

/// How far a partition has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Phase {
    /// Its group has not reported yet. The initializer's node initializes it with exactly `members`; these do not
    /// change in this phase, so that two initializers in turn cannot disagree.
    Creating,
    /// Its group has reported.
    Active,
    /// It goes on without a quorum: its only member is made of what this other replica on the same node holds, and its log
    /// begins in this term, at the partition's epoch of members.
    Recovering(ReplicaId, u64),
}

/// One interval of a keyspace and the group that serves it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Partition {
    /// Id, never reused; also the id of its group.
    pub id: PartitionId,
    /// Keyspace that it belongs to.
    pub keyspace: KeyspaceId,
    /// Its positions.
    #[serde(with = "SpanBytes")]
    pub span: Span,
    /// Version of its shape. `epoch.members` is what the group reported with `members`; 0 before the first report.
    pub epoch: Epoch,
    /// Members as the group last reported them (while creating: as they shall begin), the preferred leader first.
    pub members: Vec<Replica>,
    /// Members as they should become, the preferred leader first.
    pub target: Vec<Replica>,
    /// How far it has come.
    pub phase: Phase,
    /// While creating: the replica whose node initializes the group.
    pub initializer: ReplicaId,
    /// Replicas of a target that was withdrawn. The group may have taken them in before it heard of that, so they stay
    /// until its next report, which says what became of them.
    pub leaving: Vec<Replica>,
    /// Positions that it was created with. A replica that replays the whole log begins with these.
    #[serde(with = "SpanBytes")]
    pub birth: Span,
    /// How it is to be cut in two, once its log has decided that.
    pub cut: Option<Cut>,
    /// How it and a neighbour are to become one, once their logs have decided that.
    pub merge: Option<Merge>,
}

impl Partition {
    /// Whether the members are the target, nothing is in doubt and no cut or merge is asked for: no change is under way.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        let set = |replicas: &[Replica]| replicas.iter().copied().collect::<BTreeSet<_>>();
        let whole = self.cut.is_none() && self.merge.is_none();
        whole && self.phase == Phase::Active && self.leaving.is_empty() && set(&self.members) == set(&self.target)
    }

    /// The partition that its cut will make, if it is to be cut.
    #[must_use]
    pub fn child(&self) -> Option<Self> {
        let cut = self.cut.as_ref()?;
        let span = Span { start: cut.at.clone(), end: self.span.end.clone() };
        Some(Self {
            id: cut.child,
            epoch: Epoch { bounds: self.epoch.bounds + 1, members: SEED_INDEX },
            members: cut.members.clone(),
            target: cut.members.clone(),
            phase: Phase::Active,
            initializer: cut.members.first().map_or(self.initializer, |member| member.id),
            birth: span.clone(),
            span,
            cut: None,
            ..self.clone()
        })
    }

    /// The replica on `node`, whether it is a member, will be one or was to be one.
    #[must_use]
    pub fn replica_on(&self, node: NodeId) -> Option<Replica> {
        self.replicas().find(|replica| replica.node == node)
    }

    /// Every replica that is a member, will be one or was to be one, each once.
    pub fn replicas(&self) -> impl Iterator<Item = Replica> + '_ {
        let added = self.target.iter().filter(|replica| !self.members.contains(replica));
        self.members.iter().chain(added).chain(&self.leaving).copied()
    }

    /// Whether a leader that knows this copy of the map may begin to change its group, whose membership is settled (one set
    /// of voters and nobody else) and was written at `members_at` of its log.
    ///
    /// The copy may be old, and its target withdrawn since. Who follows it then could make a voter of a replica that
    /// is about to be destroyed. But a change is withdrawn for good only once a later settled membership has been reported,
    /// and an old copy has not heard of that. What is not settled is only ever gone on with by the leader that began it; any
    /// other brings it to rest first: half a change finished, learners let go.
    #[must_use]
    pub const fn may_change(&self, members_at: u64) -> bool {
        members_at <= self.epoch.members
    }
}

/// A cut of a partition that is under way: what its log is to decide.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cut {
    /// First position of the child.
    pub at: Bytes,
    /// The child.
    pub child: PartitionId,
    /// Its members, on the nodes of the partition's target and in that order.
    pub members: Vec<Replica>,
}

/// How `Span` is written; the type itself knows no encoding.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Span")]
struct SpanBytes {
    start: Bytes,
    end: Option<Bytes>,
}

/// A change of the map from one version to another, or a whole map.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MapDelta {
    /// Cluster.
    pub cluster_id: String,
    /// Version that it starts from; `None`: it is a whole map, forget everything held before.
    pub from_version: Option<u64>,
    /// Version that it leads to.
    pub to_version: u64,
    /// New or changed nodes.
    pub nodes: Vec<Node>,
    /// New or changed keyspaces.
    pub keyspaces: Vec<Keyspace>,
    /// New or changed partitions.
    pub partitions: Vec<Partition>,
    /// Keyspaces that are no more.
    pub keyspaces_removed: Vec<KeyspaceId>,
    /// Partitions that are no more.
    pub partitions_removed: Vec<PartitionId>,
}

impl MapDelta {
    /// Versioned bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        super::encode(self)
    }

    /// The delta behind these bytes.
    ///
    /// # Errors
    /// When they are none of ours or of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        super::decode("change of the map", bytes)
    }
}

/// What became of a delta.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Fit {
    /// It was applied: the map is newer now.
    Applied,
    /// The map was as new already; nothing changed.
    Old,
    /// It starts from a version above the map's: ask for a newer start. Nothing changed.
    Gap,
    /// It belongs to another cluster. Nothing changed.
    OtherCluster,
}

/// Every node, keyspace and partition at one version.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Map {
    cluster_id: String,
    version: u64,
    nodes: BTreeMap<NodeId, Node>,
    keyspaces: BTreeMap<KeyspaceId, Keyspace>,
    partitions: BTreeMap<PartitionId, Partition>,
    /// Derived: partitions of a keyspace by the start of their span.
    by_start: BTreeMap<KeyspaceId, BTreeMap<Bytes, PartitionId>>,
    /// Derived: keyspaces by name.
    by_name: BTreeMap<String, KeyspaceId>,
}

impl Map {
    /// The cluster; empty before it is formed.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// The version; 0 for the empty map.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// All nodes.
    #[must_use]
    pub const fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// All keyspaces, the driver's too.
    #[must_use]
    pub const fn keyspaces(&self) -> &BTreeMap<KeyspaceId, Keyspace> {
        &self.keyspaces
    }

    /// All partitions, the driver's too.
    #[must_use]
    pub const fn partitions(&self) -> &BTreeMap<PartitionId, Partition> {
        &self.partitions
    }

    /// The node with this id.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// The partition with this id.
    #[must_use]
    pub fn partition(&self, id: PartitionId) -> Option<&Partition> {
        self.partitions.get(&id)
    }

    /// The placement driver's own partition.
    #[must_use]
    pub fn driver(&self) -> Option<&Partition> {
        self.partitions.get(&DRIVER)
    }

    /// The keyspace of this name.
    #[must_use]
    pub fn keyspace_by_name(&self, name: &str) -> Option<&Keyspace> {
        self.keyspaces.get(self.by_name.get(name)?)
    }

    /// The partition that holds `position`.
    #[must_use]
    pub fn locate(&self, keyspace: KeyspaceId, position: &[u8]) -> Option<&Partition> {
        let upto = (Bound::Unbounded, Bound::Included(position));
        let (_, id) = self.by_start.get(&keyspace)?.range::<[u8], _>(upto).next_back()?;
        Some(&self.partitions[id]).filter(|partition| partition.span.contains(position))
    }

    /// The partitions that hold positions of `span`, in order; from both ends.
    pub fn overlapping<'a>(
        &'a self,
        keyspace: KeyspaceId,
        span: &Span,
    ) -> impl DoubleEndedIterator<Item = &'a Partition> + use<'a> {
        let span = span.clone();
        let starts = self.by_start.get(&keyspace).filter(|_| !span.is_empty());
        starts
            .map(|starts| {
                let upto = (Bound::Unbounded, Bound::Included(span.start.as_ref()));
                let first = starts.range::<[u8], _>(upto).next_back().map_or(&span.start, |(start, _)| start);
                let last = span.end.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
                starts.range::<[u8], _>((Bound::Included(first.as_ref()), last))
            })
            .into_iter()
            .flatten()
            .map(|(_, id)| &self.partitions[id])
            .filter(move |partition| partition.span.overlaps(&span))
    }

    /// The partitions of a keyspace in order.
    pub fn partitions_of(&self, keyspace: KeyspaceId) -> impl DoubleEndedIterator<Item = &Partition> {
        self.by_start.get(&keyspace).into_iter().flat_map(BTreeMap::values).map(|id| &self.partitions[id])
    }

    /// The whole map as one delta.
    #[must_use]
    pub fn full(&self) -> MapDelta {
        MapDelta {
            cluster_id: self.cluster_id.clone(),
            from_version: None,
            to_version: self.version,
            nodes: self.nodes.values().cloned().collect(),
            keyspaces: self.keyspaces.values().cloned().collect(),
            partitions: self.partitions.values().cloned().collect(),
            keyspaces_removed: Vec::new(),
            partitions_removed: Vec::new(),
        }
    }

    /// Brings the map up to date. A delta that starts below the map's version and ends above it fits as well: it
    /// names everything that changed in between.
    pub fn apply(&mut self, delta: MapDelta) -> Fit {
        if self.version > 0 && self.cluster_id != delta.cluster_id {
            return Fit::OtherCluster;
        }
        if delta.to_version <= self.version {
            return Fit::Old;
        }
        match delta.from_version {
            None => *self = Self::default(),
            Some(from) if from > self.version => return Fit::Gap,
            Some(_) => {}
        }
        for id in &delta.partitions_removed {
            self.remove_partition(*id);
        }
        for id in &delta.keyspaces_removed {
            self.remove_keyspace(*id);
        }
        for node in delta.nodes {
            self.put_node(node);
        }
        for keyspace in delta.keyspaces {
            self.put_keyspace(keyspace);
        }
        self.put_partitions(delta.partitions);
        self.cluster_id = delta.cluster_id;
        self.version = delta.to_version;
        Fit::Applied
    }

    /// Versioned bytes of the whole map: those of [`Map::full`].
    #[must_use]
    pub fn encode(&self) -> Bytes {
        self.full().encode()
    }

    /// The map behind these bytes, checked.
    ///
    /// # Errors
    /// When they are none of ours, of another format, not a whole map, or a map that does not tile its keyspaces.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let delta = MapDelta::decode(bytes)?;
        let wrong = |why: String| DecodeError { what: "map", why };
        if delta.from_version.is_some() {
            return Err(wrong("a change, not the whole map".to_owned()));
        }
        let mut map = Self::default();
        if delta.to_version > 0 && map.apply(delta) != Fit::Applied {
            return Err(wrong("does not fit the empty map".to_owned()));
        }
        map.check().map_err(wrong)?;
        Ok(map)
    }

    /// Whether the map is sound: partitions tile their keyspaces, each on distinct nodes that exist, names and replica
    /// ids unique.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn check(&self) -> Result<(), String> {
        if self.by_name.len() != self.keyspaces.len() {
            return Err("two keyspaces share a name".to_owned());
        }
        let placed: usize = self.by_start.values().map(BTreeMap::len).sum();
        if placed != self.partitions.len() {
            return Err("two partitions share a start".to_owned());
        }
        for keyspace in self.by_start.keys() {
            if !self.keyspaces.contains_key(keyspace) {
                return Err(format!("partitions of the keyspace {keyspace}, which does not exist"));
            }
        }
        for keyspace in self.keyspaces.keys() {
            self.check_tiling(*keyspace)?;
        }
        let mut used = BTreeMap::new();
        for partition in self.partitions.values() {
            self.check_replicas(partition)?;
            self.check_merge(partition)?;
            let unborn = partition.cut.iter().flat_map(|cut| cut.members.iter().copied());
            for replica in partition.replicas().chain(unborn) {
                if used.insert(replica.id, partition.id).is_some() {
                    return Err(format!("{}: {} is used twice", partition.id, replica.id));
                }
            }
        }
        Ok(())
    }

    fn check_tiling(&self, keyspace: KeyspaceId) -> Result<(), String> {
        let mut next = Some(Bytes::new());
        for partition in self.partitions_of(keyspace) {
            if next.as_ref() != Some(&partition.span.start) {
                return Err(format!("{keyspace}: gap or overlap before {}", partition.id));
            }
            if partition.span.is_empty() {
                return Err(format!("{keyspace}: {} is empty", partition.id));
            }
            next.clone_from(&partition.span.end);
        }
        if next.is_some() {
            return Err(format!("{keyspace}: its last part is missing"));
        }
        Ok(())
    }

    fn check_replicas(&self, partition: &Partition) -> Result<(), String> {
        let (members, target, leaving) = (&partition.members, &partition.target, &partition.leaving);
        for (what, replicas, needed) in
            [("member", members, true), ("target", target, true), ("leaving", leaving, false)]
        {
            let nodes: BTreeSet<NodeId> = replicas.iter().map(|replica| replica.node).collect();
            if nodes.len() != replicas.len() || (needed && replicas.is_empty()) {
                return Err(format!("{}: its {what} replicas are not on distinct nodes: {replicas:?}", partition.id));
            }
            if let Some(node) = nodes.iter().find(|node| !self.nodes.contains_key(node)) {
                return Err(format!("{}: {what} on {node}, which does not exist", partition.id));
            }
        }
        let elsewhere = |node| partition.members.iter().chain(&partition.target).all(|replica| replica.node != node);
        if let Some(replica) = partition.leaving.iter().find(|replica| !elsewhere(replica.node)) {
            return Err(format!("{}: {} is leaving {}, which has another", partition.id, replica.id, replica.node));
        }
        if partition.phase == Phase::Creating && !partition.members.iter().any(|r| r.id == partition.initializer) {
            return Err(format!("{}: its initializer {} is no member", partition.id, partition.initializer));
        }
        Ok(())
    }
}

/// Changes, for the driver's state; each keeps the derived parts right.
impl Map {
    pub(super) fn set_cluster_id(&mut self, cluster_id: String) {
        self.cluster_id = cluster_id;
    }

    pub(super) fn raise_version(&mut self) {
        self.version += 1;
    }

    pub(super) fn put_node(&mut self, node: Node) {
        self.nodes.insert(node.id, node);
    }

    pub(super) fn put_keyspace(&mut self, keyspace: Keyspace) {
        self.remove_keyspace(keyspace.id);
        self.by_name.insert(keyspace.name.clone(), keyspace.id);
        self.keyspaces.insert(keyspace.id, keyspace);
    }

    pub(super) fn remove_keyspace(&mut self, id: KeyspaceId) {
        if let Some(old) = self.keyspaces.remove(&id) {
            self.by_name.remove(&old.name);
        }
    }

    /// Puts new or changed partitions, all at once: on the way from one tiling to the next, starts may change hands.
    pub(super) fn put_partitions(&mut self, partitions: Vec<Partition>) {
        for partition in &partitions {
            self.remove_partition(partition.id);
        }
        for partition in partitions {
            let starts = self.by_start.entry(partition.keyspace).or_default();
            starts.insert(partition.span.start.clone(), partition.id);
            self.partitions.insert(partition.id, partition);
        }
    }

    pub(super) fn remove_partition(&mut self, id: PartitionId) {
        let Some(old) = self.partitions.remove(&id) else { return };
        let Some(starts) = self.by_start.get_mut(&old.keyspace) else { return };
        // In a map from elsewhere, another partition may claim the same start; `check` tells.
        if starts.get(&old.span.start) == Some(&id) {
            starts.remove(&old.span.start);
        }
        if starts.is_empty() {
            self.by_start.remove(&old.keyspace);
        }
    }
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
