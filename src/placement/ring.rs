//! The consistent-hash ring: which nodes should hold a partition.
//!
//! A node has tokens SHA-256(UUID, i), as many as its weight asks for; a partition has a place SHA-256(keyspace,
//! partition). Its replicas go to the next distinct nodes clockwise, evenly over zones first, passing over nodes that
//! are above their share by more than [`LOAD_SLACK`]. So every node can compute the same answer, load is even, and a
//! node that joins or leaves moves little more than its own share.
//!
//! Invariants:
//! * replicas of a partition are on distinct nodes, and on as many zones as there are;
//! * load yields to that: where no node has room, the one least above its share is taken;
//! * the same nodes and partitions in the same order give the same answer. Shares are computed in `f64` with
//!   `+ - * /` and `ceil` only, which IEEE 754 fixes to the bit.

use super::map::{Node, WEIGHT_MILLI_DEFAULT};
use crate::key::{KeyspaceId, NodeId, PartitionId, first_u64};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// Tokens of a node of weight 1.0.
pub const TOKENS_PER_NODE: u32 = 128;
/// How far a node's load may lie above its share: the ε of consistent hashing with bounded loads.
pub const LOAD_SLACK: f64 = 0.2;

/// Where a partition lies on the ring.
#[must_use]
pub fn place_of(keyspace: KeyspaceId, partition: PartitionId) -> u64 {
    let mut hash = Sha256::new();
    hash.update(keyspace.0.to_be_bytes());
    hash.update(partition.0.to_be_bytes());
    first_u64(&hash.finalize())
}

fn token_of(uuid: &str, i: u32) -> u64 {
    let mut hash = Sha256::new();
    hash.update(uuid.as_bytes());
    hash.update(i.to_be_bytes());
    first_u64(&hash.finalize())
}

pub(super) struct Slot {
    pub(super) node: NodeId,
    pub(super) zone: usize,
    weight: f64,
    /// Whether it may get replicas.
    pub(super) open: bool,
    /// Its tokens, ascending; none unless it may get replicas.
    tokens: Vec<u64>,
}

/// The tokens of the nodes that may get replicas.
pub struct Ring {
    /// Every node, by id; others refer to it by position.
    slots: Vec<Slot>,
    /// Number of zones.
    zones: usize,
    /// Token and slot, ascending.
    tokens: Vec<(u64, usize)>,
}

impl Ring {
    /// The ring of `nodes`. Those in `avoid` get nothing new, but count for the zones of what they hold.
    pub fn new<'a>(nodes: impl IntoIterator<Item = &'a Node>, avoid: &BTreeSet<NodeId>) -> Self {
        let mut nodes: Vec<&Node> = nodes.into_iter().collect();
        nodes.sort_by_key(|node| node.id);
        let zones: BTreeSet<&str> = nodes.iter().map(|node| node.zone.as_str()).collect();
        let zones: BTreeMap<&str, usize> = zones.into_iter().zip(0..).collect();
        let mut ring = Self { slots: Vec::with_capacity(nodes.len()), zones: zones.len(), tokens: Vec::new() };
        for (slot, node) in nodes.into_iter().enumerate() {
            let open = !avoid.contains(&node.id) && node.standing.takes_replicas();
            let count = (TOKENS_PER_NODE * node.weight_milli / WEIGHT_MILLI_DEFAULT).max(1);
            let mut tokens: Vec<u64> = (0..count).filter(|_| open).map(|i| token_of(&node.uuid, i)).collect();
            tokens.sort_unstable();
            ring.tokens.extend(tokens.iter().map(|token| (*token, slot)));
            let (zone, weight) = (zones[node.zone.as_str()], node.weight());
            ring.slots.push(Slot { node: node.id, zone, weight, open, tokens });
        }
        ring.tokens.sort_unstable();
        ring
    }

    /// Number of nodes that may get replicas.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.iter().filter(|slot| slot.open).count()
    }

    /// Whether no node may get replicas.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Slots clockwise from `place`, once around, with repetitions.
    fn walk(&self, place: u64) -> impl Iterator<Item = usize> + '_ {
        let (before, after) = self.tokens.split_at(self.tokens.partition_point(|(token, _)| *token < place));
        after.iter().chain(before).map(|(_, slot)| *slot)
    }

    pub(super) fn slot_of(&self, node: NodeId) -> Option<usize> {
        self.slots.binary_search_by_key(&node, |slot| slot.node).ok()
    }

    /// Every node, by id.
    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// How far clockwise from `place` the slot's first token is: a walk meets slots in the order of this.
    pub(super) fn distance(&self, place: u64, slot: usize) -> u64 {
        let tokens = &self.slots[slot].tokens;
        let next = tokens.get(tokens.partition_point(|token| *token < place)).or_else(|| tokens.first());
        next.map_or(u64::MAX, |token| token.wrapping_sub(place))
    }

    /// How many of a partition's `replicas` each slot should hold on average: zones share evenly as far as their nodes
    /// go, nodes of a zone by weight, none above one.
    pub(super) fn shares(&self, replicas: u32) -> Vec<f64> {
        let mut members = vec![Vec::new(); self.zones];
        for (i, slot) in self.slots.iter().enumerate().filter(|(_, slot)| slot.open) {
            members[slot.zone].push(i);
        }
        let mut left = (replicas as usize).min(self.len());
        let mut of_zone = vec![0.0; self.zones];
        for level in 1.. {
            let open: Vec<usize> = (0..self.zones).filter(|zone| members[*zone].len() >= level).collect();
            let weight = |zone: &usize| members[*zone].iter().map(|i| self.slots[*i].weight).sum();
            let parts = pour(left.min(open.len()) as f64, &open.iter().map(weight).collect::<Vec<f64>>());
            for (zone, part) in open.iter().zip(parts) {
                of_zone[*zone] += part;
            }
            left -= left.min(open.len());
            if left == 0 {
                break;
            }
        }
        let mut shares = vec![0.0; self.slots.len()];
        for (zone, members) in members.iter().enumerate() {
            let weights: Vec<f64> = members.iter().map(|i| self.slots[*i].weight).collect();
            for (i, part) in members.iter().zip(pour(of_zone[zone], &weights)) {
                shares[*i] = part;
            }
        }
        shares
    }
}

/// Splits `total` by weight, at most 1 to each; what overflows goes to the others.
fn pour(total: f64, weights: &[f64]) -> Vec<f64> {
    let mut parts = vec![0.0; weights.len()];
    let mut full = vec![false; weights.len()];
    loop {
        let taken = full.iter().filter(|full| **full).count() as f64;
        let weight: f64 = weights.iter().zip(&full).filter(|(_, full)| !**full).map(|(weight, _)| weight).sum();
        let mut overflow = false;
        for i in (0..weights.len()).filter(|i| !full[*i]).collect::<Vec<_>>() {
            parts[i] = (total - taken) * weights[i] / weight;
            if parts[i] >= 1.0 {
                (parts[i], full[i], overflow) = (1.0, true, true);
            }
        }
        if !overflow {
            return parts;
        }
    }
}

/// What a node holds, and how much it may.
#[derive(Clone, Copy, Default)]
struct Load {
    replicas: u64,
    replicas_max: u64,
    leaders: u64,
    leaders_max: u64,
}

impl Load {
    const fn has_room(&self) -> bool {
        self.replicas < self.replicas_max
    }
}

/// How many nodes of some sort the zones have.
struct ZoneCount {
    of_zone: Vec<usize>,
    /// Zones with at least one.
    zones: usize,
}

impl ZoneCount {
    fn add(&mut self, zone: usize) {
        self.zones += usize::from(self.of_zone[zone] == 0);
        self.of_zone[zone] += 1;
    }

    fn remove(&mut self, zone: usize) {
        self.of_zone[zone] -= 1;
        self.zones -= usize::from(self.of_zone[zone] == 0);
    }
}

/// Places partitions one after the other, keeping count of what each node holds.
pub struct Placer {
    ring: Ring,
    loads: Vec<Load>,
    /// Nodes that may get replicas.
    open: ZoneCount,
    /// Those of them below their bound.
    with_room: ZoneCount,
    /// Per slot: the last walk that saw it.
    seen: Vec<u64>,
    walks: u64,
}

impl Placer {
    /// A placer for `demand`: number of replicas → number of partitions that want as many, those placed already too.
    #[must_use]
    pub fn new(ring: Ring, demand: &BTreeMap<u32, u64>) -> Self {
        let mut replicas = vec![0.0; ring.slots.len()];
        let mut leaders = vec![0.0; ring.slots.len()];
        for (wanted, partitions) in demand {
            let members = (*wanted as usize).min(ring.len()).max(1) as f64;
            for (slot, share) in ring.shares(*wanted).into_iter().enumerate() {
                replicas[slot] += *partitions as f64 * share;
                leaders[slot] += *partitions as f64 * share / members;
            }
        }
        let most = |share: f64| (share * (1.0 + LOAD_SLACK)).ceil() as u64;
        let load = |(replicas, leaders): (&f64, &f64)| Load {
            replicas_max: most(*replicas),
            leaders_max: most(*leaders),
            ..Load::default()
        };
        let loads: Vec<Load> = replicas.iter().zip(&leaders).map(load).collect();
        let mut open = ZoneCount { of_zone: vec![0; ring.zones], zones: 0 };
        let mut with_room = ZoneCount { of_zone: vec![0; ring.zones], zones: 0 };
        for (slot, load) in ring.slots.iter().zip(&loads).filter(|(slot, _)| slot.open) {
            open.add(slot.zone);
            if load.has_room() {
                with_room.add(slot.zone);
            }
        }
        let seen = vec![0; ring.slots.len()];
        Self { ring, loads, open, with_room, seen, walks: 0 }
    }

    /// Counts a partition that is on `nodes`, the preferred leader first. Nodes off the ring are passed over.
    pub fn occupy(&mut self, nodes: impl IntoIterator<Item = NodeId>) {
        for (i, node) in nodes.into_iter().enumerate() {
            if let Some(slot) = self.ring.slot_of(node) {
                self.add(slot, i == 0);
            }
        }
    }

    /// Counts a partition no longer that was counted on exactly these nodes, in this order.
    pub fn vacate(&mut self, nodes: impl IntoIterator<Item = NodeId>) {
        for (i, node) in nodes.into_iter().enumerate() {
            if let Some(slot) = self.ring.slot_of(node) {
                self.remove(slot, i == 0);
            }
        }
    }

    /// Nodes for a new partition, the preferred leader first: `replicas`, or fewer if there are fewer nodes.
    pub fn place(&mut self, keyspace: KeyspaceId, partition: PartitionId, replicas: u32) -> Vec<NodeId> {
        self.extend(keyspace, partition, &[], replicas)
    }

    /// Nodes for a partition that is on `kept`, as counted by [`Placer::occupy`], and shall have `replicas`: those kept
    /// and further ones. Another node comes first if the preferred leader has more than its share of leaders.
    pub fn extend(
        &mut self,
        keyspace: KeyspaceId,
        partition: PartitionId,
        kept: &[NodeId],
        replicas: u32,
    ) -> Vec<NodeId> {
        let mut chosen: Vec<usize> = kept.iter().filter_map(|node| self.ring.slot_of(*node)).collect();
        for (i, slot) in chosen.iter().enumerate() {
            self.remove(*slot, i == 0);
        }
        self.choose(place_of(keyspace, partition), &mut chosen, replicas as usize);
        self.lead(&mut chosen);
        for (i, slot) in chosen.iter().enumerate() {
            self.add(*slot, i == 0);
        }
        chosen.into_iter().map(|slot| self.ring.slots[slot].node).collect()
    }

    /// Adds the next slots clockwise until there are `replicas`. A zone is used for the n-th time only when every zone
    /// with room has been used n-1 times.
    fn choose(&mut self, place: u64, chosen: &mut Vec<usize>, replicas: usize) {
        self.walks += 1;
        let walk_id = self.walks;
        for slot in chosen.iter() {
            self.seen[*slot] = walk_id;
        }
        let mut seen = std::mem::take(&mut self.seen);
        let mut walk = self.ring.walk(place).filter(|slot| std::mem::replace(&mut seen[*slot], walk_id) != walk_id);
        let mut passed: Vec<usize> = Vec::new();
        let mut level = 1;
        while chosen.len() < replicas && level <= replicas {
            let allowed = |slot: usize| self.used(chosen, self.ring.slots[slot].zone) < level;
            if !self.has_zone(chosen, level, true) {
                if self.has_zone(chosen, level, false) {
                    chosen.push(self.least_loaded(chosen));
                } else {
                    level += 1;
                }
            } else if let Some(i) = passed.iter().position(|slot| allowed(*slot)) {
                chosen.push(passed.remove(i));
            } else {
                let slot = walk.by_ref().filter(|slot| self.loads[*slot].has_room());
                let slot = slot.inspect(|slot| passed.push(*slot)).find(|slot| allowed(*slot));
                assert!(slot.is_some(), "a zone with room has a node on the ring");
            }
        }
        drop(walk);
        self.seen = seen;
    }

    /// How many of `chosen` are in `zone`.
    fn used(&self, chosen: &[usize], zone: usize) -> usize {
        chosen.iter().filter(|slot| self.ring.slots[**slot].zone == zone).count()
    }

    /// Whether some zone used fewer than `level` times has a node that is not chosen yet; with `room`, one with room.
    fn has_zone(&self, chosen: &[usize], level: usize, room: bool) -> bool {
        let count = if room { &self.with_room } else { &self.open };
        let touched: BTreeSet<usize> = chosen.iter().map(|slot| self.ring.slots[*slot].zone).collect();
        let mut left = count.zones;
        for zone in touched.into_iter().filter(|zone| count.of_zone[*zone] > 0) {
            let here = chosen.iter().filter(|slot| self.ring.slots[**slot].zone == zone);
            let counts = |slot: &usize| self.ring.slots[*slot].open && (!room || self.loads[*slot].has_room());
            let taken = here.filter(|slot| counts(slot)).count();
            if self.used(chosen, zone) >= level || count.of_zone[zone] == taken {
                left -= 1;
            }
        }
        left > 0
    }

    /// The slot to take when no zone at this level has room: of the zone used least, the one least above its share.
    fn least_loaded(&self, chosen: &[usize]) -> usize {
        let slots = &self.ring.slots;
        let open = (0..slots.len()).filter(|slot| slots[*slot].open && !chosen.contains(slot));
        let above = |slot: usize| self.loads[slot].replicas * 1_000 / self.loads[slot].replicas_max.max(1);
        open.min_by_key(|slot| (self.used(chosen, slots[*slot].zone), above(*slot), *slot))
            .expect("some zone has an open node that is not chosen")
    }

    /// Brings the first with room for another leader to the front, or the one with the fewest for its share.
    fn lead(&self, chosen: &mut [usize]) {
        let open = |i: &usize| self.ring.slots[chosen[*i]].open;
        let load = |i: &usize| self.loads[chosen[*i]];
        let first = (0..chosen.len()).filter(open).find(|i| load(i).leaders < load(i).leaders_max);
        let least =
            || (0..chosen.len()).filter(open).min_by_key(|i| load(i).leaders * 1_000 / load(i).leaders_max.max(1));
        if let Some(i) = first.or_else(least) {
            chosen[..=i].rotate_right(1);
        }
    }

    fn add(&mut self, slot: usize, leads: bool) {
        let had_room = self.loads[slot].has_room();
        self.loads[slot].replicas += 1;
        self.loads[slot].leaders += u64::from(leads);
        self.count_room(slot, had_room);
    }

    fn remove(&mut self, slot: usize, leads: bool) {
        let had_room = self.loads[slot].has_room();
        self.loads[slot].replicas -= 1;
        self.loads[slot].leaders -= u64::from(leads);
        self.count_room(slot, had_room);
    }

    fn count_room(&mut self, slot: usize, had_room: bool) {
        let zone = self.ring.slots[slot].zone;
        match (had_room, self.loads[slot].has_room()) {
            (true, false) => self.with_room.remove(zone),
            (false, true) => self.with_room.add(zone),
            (true, true) | (false, false) => {}
        }
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
