//! The balancer: moves replicas and preferred leaders until no node is far from its share.
//!
//! A node's share follows from zones and weights ([`super::ring`]); what it holds is measured three ways: bytes of its
//! replicas, work of its replicas, work of the leaders that are meant to be there. What is moved between two nodes is
//! what the ring would put there first, followers before leaders, large before small. Preferred leaders change by the
//! order of a target alone: nothing is copied.
//!
//! What it remembers is only to keep calm and may be lost: since when nodes have been far off, and which partitions
//! changed lately.
//!
//! Invariants:
//! * only partitions at rest whose members all live are touched, so no step lowers a live quorum (`set_target`);
//! * a step never spreads a partition over fewer zones;
//! * a step leaves the node that gets at least [`GAIN_MIN`] below what the node that gives had: the sum of squares
//!   falls with every step, so that the same loads bring it to rest;
//! * a partition is touched at most once in [`COOLDOWN_MS`] for each of replicas and leader.

use super::{
    command::Step,
    limits,
    load::Loads,
    map::Partition,
    plan::{Decision, Liveness, set_target},
    ring::{Ring, place_of},
    state::State,
};
use crate::key::{DRIVER, NodeId, PartitionId};
use std::collections::{BTreeMap, BTreeSet};

/// Moves of replicas under way at one time, in all partitions together.
pub const MOVES_MAX: usize = 16;
/// Moves under way at one time that one node takes part in.
pub const MOVES_PER_NODE_MAX: usize = 2;
/// Preferred leaders changed by one call.
pub const LEADERS_PER_CALL_MAX: usize = 8;
/// A node has to be far from its share for so long before anything is moved.
pub const HOLD_MS: u64 = 3_000;
/// A partition that was moved is left alone for so long.
pub const COOLDOWN_MS: u64 = 300_000;
/// Least gain of a step, in shares of a node.
pub const GAIN_MIN: f64 = 0.05;
/// The same for what wavers more than bytes.
pub const WORK_GAIN_MIN: f64 = 0.1;
/// Below this much work per second on a share, work moves nothing: about a tenth of a core.
pub const WORK_MIN: f64 = 5_000.0;
/// Nodes that are tried as the other end of a move, of one zone and of all.
const PARTNERS_PER_ZONE_MAX: usize = 8;
const PARTNERS_MAX: usize = 64;

/// What nodes are compared by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Measure {
    /// Bytes of replicas.
    Bytes,
    /// Work of replicas.
    Work,
    /// Work of leaders.
    Leaders,
}

impl Measure {
    const ALL: [Self; 3] = [Self::Bytes, Self::Work, Self::Leaders];

    /// What goes on above the first until it is below the second, in shares of a node. The first lies above what the
    /// ring allows by itself.
    const fn too_much(self) -> (f64, f64) {
        match self {
            Self::Bytes | Self::Leaders => (1.2, 1.1),
            Self::Work => (1.3, 1.15),
        }
    }

    /// What goes on below the first until it is above the second.
    const fn too_little(self) -> (f64, f64) {
        match self {
            Self::Bytes | Self::Leaders => (0.7, 0.95),
            // What a node lacks in work comes with the others' excess.
            Self::Work => (0.0, 0.0),
        }
    }

    /// What a move for the sake of something else may bring a node up to.
    const fn tolerable(self) -> f64 {
        let (start, stop) = self.too_much();
        f64::midpoint(start, stop)
    }

    const fn gain_min(self) -> f64 {
        match self {
            Self::Bytes => GAIN_MIN,
            Self::Work | Self::Leaders => WORK_GAIN_MIN,
        }
    }

    const fn what(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Work => "work",
            Self::Leaders => "leaders' work",
        }
    }
}

/// How much is moved at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Moves of replicas under way, all together.
    pub moves_max: usize,
    /// Moves that one node takes part in.
    pub moves_per_node_max: usize,
    /// Preferred leaders changed by one call.
    pub leaders_max: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { moves_max: MOVES_MAX, moves_per_node_max: MOVES_PER_NODE_MAX, leaders_max: LEADERS_PER_CALL_MAX }
    }
}

/// A node that is far from its share.
#[derive(Clone, Copy, Debug)]
struct Far {
    since_ms: u64,
    /// It has been for long enough: it is moved until it is near.
    acting: bool,
}

/// Proposes moves, and remembers what it needs to keep calm.
#[derive(Clone, Debug, Default)]
pub struct Balancer {
    pace: Pace,
    /// By measure, and whether it is too much.
    far: BTreeMap<(Measure, bool, NodeId), Far>,
    /// When a partition was last moved; with true, its leader.
    moved_ms: BTreeMap<(PartitionId, bool), u64>,
}

impl Balancer {
    /// A balancer that moves so much at a time.
    #[must_use]
    pub fn with_pace(pace: Pace) -> Self {
        Self { pace, ..Self::default() }
    }

    /// The next moves at `now_ms` of any steady clock; none when every node is near its share, or as near as moves can
    /// bring it.
    pub fn plan(&mut self, state: &State, liveness: &Liveness, loads: &Loads, now_ms: u64) -> Vec<Decision> {
        self.moved_ms.retain(|_, at| now_ms.saturating_sub(*at) < COOLDOWN_MS);
        let mut books = Books::open(state, liveness, loads, &self.moved_ms);
        let mut decisions = Vec::new();
        let bytes = Measure::Bytes;
        Run { books: &mut books, liveness, measure: bytes, pace: self.pace, decisions: &mut decisions }.spread();
        for measure in Measure::ALL {
            let (over, under) =
                (self.acting(&books, measure, true, now_ms), self.acting(&books, measure, false, now_ms));
            let mut run = Run { books: &mut books, liveness, measure, pace: self.pace, decisions: &mut decisions };
            run.relieve(over);
            run.fill(under);
        }
        let leads = |decision: &Decision, state: &State| {
            let Step::SetTarget { partition, nodes, .. } = &decision.step else { return None };
            let known = state.map().partition(*partition)?;
            Some((*partition, nodes.iter().all(|node| known.target.iter().any(|replica| replica.node == *node))))
        };
        self.moved_ms.extend(decisions.iter().filter_map(|decision| leads(decision, state)).map(|key| (key, now_ms)));
        decisions
    }

    /// The nodes that have been far off for long enough, the farthest first.
    fn acting(&mut self, books: &Books<'_>, measure: Measure, above: bool, now_ms: u64) -> Vec<usize> {
        let tally = &books.tallies[measure as usize];
        let (start, stop) = if above { measure.too_much() } else { measure.too_little() };
        let beyond = |rel: f64, limit: f64| if above { rel > limit } else { rel < limit };
        let quiet = tally.is_quiet(measure);
        let mut acting = Vec::new();
        for slot in 0..books.ring.slots().len() {
            let (key, rel) = ((measure, above, books.node(slot)), tally.rel(slot));
            let known = self.far.get(&key).copied();
            let stays = if known.is_some_and(|far| far.acting) { beyond(rel, stop) } else { beyond(rel, start) };
            if quiet || !stays || !books.able[slot] {
                self.far.remove(&key);
                continue;
            }
            let since_ms = known.map_or(now_ms, |far| far.since_ms);
            let far = Far { since_ms, acting: now_ms.saturating_sub(since_ms) >= HOLD_MS };
            self.far.insert(key, far);
            if far.acting {
                acting.push(slot);
            }
        }
        acting.sort_by(|a, b| tally.rel(*a).total_cmp(&tally.rel(*b)));
        if above {
            acting.reverse();
        }
        acting
    }
}

/// What every node holds of something, and its share of it.
struct Tally {
    held: Vec<f64>,
    share: Vec<f64>,
}

impl Tally {
    /// What a node holds in shares.
    fn rel(&self, slot: usize) -> f64 {
        self.rel_with(slot, 0.0)
    }

    fn rel_with(&self, slot: usize, more: f64) -> f64 {
        if self.share[slot] > 0.0 { (self.held[slot] + more) / self.share[slot] } else { 1.0 }
    }

    /// Whether there is too little of it to matter.
    fn is_quiet(&self, measure: Measure) -> bool {
        let nodes = self.share.iter().filter(|share| **share > 0.0).count();
        measure == Measure::Work && self.held.iter().sum::<f64>() < WORK_MIN * nodes as f64
    }
}

/// A partition, as the balancer sees it.
struct Item<'a> {
    partition: &'a Partition,
    /// Replicas that its keyspace asks for.
    wanted: u32,
    /// Slots of its target, the preferred leader first.
    on: Vec<usize>,
    size: f64,
    member_work: f64,
    leader_work: f64,
    /// Whether its replicas, and its preferred leader, may be changed.
    movable: [bool; 2],
}

impl Item<'_> {
    /// What a replica counts on its node.
    fn weight(&self, measure: Measure, leads: bool) -> f64 {
        let leader_work = if leads { self.leader_work } else { 0.0 };
        match measure {
            Measure::Bytes => self.size,
            Measure::Work => self.member_work + leader_work,
            Measure::Leaders => leader_work,
        }
    }
}

/// Who holds what.
struct Books<'a> {
    ring: Ring,
    /// Nodes that may give and get.
    able: Vec<bool>,
    items: Vec<Item<'a>>,
    /// Items by slot; those moved meanwhile are no longer movable.
    of_slot: Vec<Vec<usize>>,
    tallies: [Tally; 3],
    /// Moves under way by slot, and all together.
    moving: Vec<usize>,
    moving_all: usize,
    /// Preferred leaders changed by this call.
    leaders_changed: usize,
}

impl<'a> Books<'a> {
    fn open(
        state: &'a State,
        liveness: &Liveness,
        loads: &Loads,
        moved_ms: &BTreeMap<(PartitionId, bool), u64>,
    ) -> Self {
        let map = state.map();
        // What is down gets no share: what it had is built anew elsewhere.
        let down = map.nodes().keys().copied().filter(|id| liveness.is_down(*id)).collect();
        let ring = Ring::new(map.nodes().values(), &down);
        let slots = ring.slots();
        let able: Vec<bool> = slots.iter().map(|slot| slot.open && liveness.is_alive(slot.node)).collect();
        let mut of_slot = vec![Vec::new(); slots.len()];
        let (mut moving, mut moving_all) = (vec![0; slots.len()], 0);
        let mut items: Vec<Item<'a>> = Vec::with_capacity(map.partitions().len());
        for partition in map.partitions().values().filter(|partition| partition.id != DRIVER) {
            let at_rest = partition.is_at_rest();
            let on: Vec<usize> = partition.target.iter().filter_map(|replica| ring.slot_of(replica.node)).collect();
            if !at_rest {
                moving_all += 1;
                partition
                    .replicas()
                    .filter_map(|replica| ring.slot_of(replica.node))
                    .for_each(|slot| moving[slot] += 1);
            }
            let wanted = map.keyspaces()[&partition.keyspace].replicas;
            let sound = at_rest && on.len() >= (wanted as usize).min(ring.len()) && on.iter().all(|slot| able[*slot]);
            let movable = [false, true].map(|leader| sound && !moved_ms.contains_key(&(partition.id, leader)));
            on.iter().for_each(|slot| of_slot[*slot].push(items.len()));
            let load = loads.of(partition.id);
            items.push(Item {
                partition,
                wanted,
                on,
                size: load.size() as f64,
                member_work: load.member_work() as f64,
                leader_work: load.leader_work() as f64,
                movable,
            });
        }
        let tallies = Measure::ALL.map(|measure| tally(&ring, &items, measure));
        Self { ring, able, items, of_slot, tallies, moving, moving_all, leaders_changed: 0 }
    }

    fn node(&self, slot: usize) -> NodeId {
        self.ring.slots()[slot].node
    }

    /// How many of the item's replicas are in the zone of `slot`.
    fn in_zone_of(&self, item: usize, slot: usize) -> usize {
        let zone = |slot: usize| self.ring.slots()[slot].zone;
        self.items[item].on.iter().filter(|on| zone(**on) == zone(slot)).count()
    }

    /// Whether the item may go from one node to the other: there is no replica yet, no zone gets more of them than one
    /// has now, nobody ends up where the giver was, and it will not be taken away again for the sake of something else.
    fn fits(&self, item: usize, from: usize, to: usize, measure: Measure) -> bool {
        let this = &self.items[item];
        let leads = this.on.first() == Some(&from);
        let gains = |measure: Measure| {
            let (tally, weight) = (&self.tallies[measure as usize], this.weight(measure, leads));
            weight > 0.0 && tally.rel_with(to, weight) + measure.gain_min() <= tally.rel(from)
        };
        if measure == Measure::Leaders {
            return this.movable[1] && leads && this.on.contains(&to) && gains(measure);
        }
        let other = if measure == Measure::Bytes { Measure::Work } else { Measure::Bytes };
        let tolerable = || {
            let tally = &self.tallies[other as usize];
            tally.is_quiet(other) || tally.rel_with(to, this.weight(other, leads)) <= other.tolerable()
        };
        let zones = self.ring.slots();
        this.movable[0]
            && !this.on.contains(&to)
            && (zones[from].zone == zones[to].zone || self.in_zone_of(item, to) < self.in_zone_of(item, from))
            && gains(measure)
            && tolerable()
    }

    /// The best item to go from one node to the other: a follower before a leader, a large before a small one (the
    /// same number of bytes in fewer moves), and what the ring wants there first.
    fn best(&self, from: usize, to: usize, measure: Measure) -> Option<usize> {
        let rank = |item: &usize| {
            let this = &self.items[*item];
            let leads = this.on.first() == Some(&from);
            let class = this.weight(measure, leads).log2() as u64;
            let place = place_of(this.partition.keyspace, this.partition.id);
            (leads, std::cmp::Reverse(class), self.ring.distance(place, to))
        };
        self.of_slot[from].iter().copied().filter(|item| self.fits(*item, from, to, measure)).min_by_key(rank)
    }

    /// Counts the item on `to` instead of `from`; for leaders, in the first place.
    fn go(&mut self, item: usize, from: usize, to: usize, measure: Measure) {
        let this = &mut self.items[item];
        let leads = this.on.first() == Some(&from);
        for (tally, counted) in self.tallies.iter_mut().zip(Measure::ALL) {
            let weight = match measure {
                Measure::Leaders => this.weight(counted, true) - this.weight(counted, false),
                _ => this.weight(counted, leads),
            };
            tally.held[from] -= weight;
            tally.held[to] += weight;
        }
        this.movable = [false, false];
        if measure == Measure::Leaders {
            this.on.retain(|slot| *slot != to);
            this.on.insert(0, to);
            self.leaders_changed += 1;
            return;
        }
        for slot in &mut this.on {
            if *slot == from {
                *slot = to;
            }
        }
        for slot in [from, to] {
            self.moving[slot] += 1;
        }
        self.moving_all += 1;
    }
}

/// What nodes hold by `measure`, and their shares: each keyspace's by zones and weights.
fn tally(ring: &Ring, items: &[Item<'_>], measure: Measure) -> Tally {
    let mut tally = Tally { held: vec![0.0; ring.slots().len()], share: vec![0.0; ring.slots().len()] };
    // By replicas wanted.
    let mut demand = [0.0; *limits::REPLICAS.end() as usize + 1];
    for item in items {
        for (i, slot) in item.on.iter().enumerate() {
            let weight = item.weight(measure, i == 0);
            tally.held[*slot] += weight;
            demand[item.wanted as usize] += weight;
        }
    }
    for (replicas, sum) in demand.into_iter().enumerate().filter(|(_, sum)| *sum > 0.0) {
        // Shares add up to the number of members.
        let members = replicas.min(ring.len()).max(1) as f64;
        for (slot, share) in ring.shares(replicas as u32).into_iter().enumerate() {
            tally.share[slot] += sum * share / members;
        }
    }
    tally
}

/// One measure of one call.
struct Run<'r, 'a> {
    books: &'r mut Books<'a>,
    liveness: &'r Liveness,
    measure: Measure,
    pace: Pace,
    decisions: &'r mut Vec<Decision>,
}

impl Run<'_, '_> {
    /// Takes replicas from a zone that has two more of a partition than another that has room.
    fn spread(&mut self) {
        for item in 0..self.books.items.len() {
            if self.books.moving_all >= self.pace.moves_max {
                return;
            }
            let this = &self.books.items[item];
            let crowd = |slot: &usize| self.books.in_zone_of(item, *slot);
            // The last of them: the preferred leader stays if it can.
            let Some(from) = this.on.iter().copied().max_by_key(crowd).filter(|from| crowd(from) > 1) else { continue };
            if !this.movable[0] || !self.has_room(from) {
                continue;
            }
            let (tally, crowd_from) = (&self.books.tallies[Measure::Bytes as usize], crowd(&from));
            let to = (0..self.books.ring.slots().len())
                .filter(|to| self.has_room(*to) && crowd(to) + 1 < crowd_from)
                .min_by(|a, b| tally.rel(*a).total_cmp(&tally.rel(*b)));
            if let Some(to) = to {
                let (id, giver, taker) = (this.partition.id, self.books.node(from), self.books.node(to));
                let why = format!("{id} has {crowd_from} replicas in the zone of {giver}: one moves to {taker}");
                self.decide(item, from, to, why);
            }
        }
    }

    /// Takes from nodes that have too much.
    fn relieve(&mut self, over: Vec<usize>) {
        let stop = self.measure.too_much().1;
        for from in over {
            while self.has_room(from) && self.books.tallies[self.measure as usize].rel(from) > stop {
                let partners = self.partners(from, false);
                let found = partners.into_iter().find_map(|to| Some((self.books.best(from, to, self.measure)?, to)));
                let Some((item, to)) = found else { break };
                self.decide(item, from, to, self.why(item, from, to));
            }
        }
    }

    /// Gives to nodes that have too little.
    fn fill(&mut self, under: Vec<usize>) {
        let stop = self.measure.too_little().1;
        for to in under {
            while self.has_room(to) && self.books.tallies[self.measure as usize].rel(to) < stop {
                let partners = self.partners(to, true);
                let found =
                    partners.into_iter().find_map(|from| Some((self.books.best(from, to, self.measure)?, from)));
                let Some((item, from)) = found else { break };
                self.decide(item, from, to, self.why(item, from, to));
            }
        }
    }

    /// Whether the node may take part in another move.
    fn has_room(&self, slot: usize) -> bool {
        if self.measure == Measure::Leaders {
            return self.books.able[slot] && self.books.leaders_changed < self.pace.leaders_max;
        }
        self.books.able[slot]
            && self.books.moving_all < self.pace.moves_max
            && self.books.moving[slot] < self.pace.moves_per_node_max
    }

    /// Nodes to try as the other end: those that hold most first, or least; a few of each zone. Only a member can
    /// become a leader.
    fn partners(&self, of: usize, most_first: bool) -> Vec<usize> {
        let (slots, tally) = (self.books.ring.slots(), &self.books.tallies[self.measure as usize]);
        let mut partners: Vec<usize> = if self.measure == Measure::Leaders {
            let beside = self.books.of_slot[of].iter().flat_map(|item| self.books.items[*item].on.iter().copied());
            beside.collect::<BTreeSet<_>>().into_iter().collect()
        } else {
            (0..slots.len()).collect()
        };
        partners.retain(|slot| *slot != of && self.has_room(*slot));
        let order = |a: &usize, b: &usize| tally.rel(*a).total_cmp(&tally.rel(*b));
        partners.sort_by(|a, b| if most_first { order(b, a) } else { order(a, b) });
        if self.measure == Measure::Leaders {
            return partners;
        }
        let mut of_zone: BTreeMap<usize, usize> = BTreeMap::new();
        partners.retain(|slot| {
            let tried = of_zone.entry(slots[*slot].zone).or_default();
            *tried += 1;
            *tried <= PARTNERS_PER_ZONE_MAX
        });
        partners.truncate(PARTNERS_MAX);
        partners
    }

    fn why(&self, item: usize, from: usize, to: usize) -> String {
        let tally = &self.books.tallies[self.measure as usize];
        let (giver, taker, id) = (self.books.node(from), self.books.node(to), self.books.items[item].partition.id);
        let (held, lacking, what) = (tally.rel(from), tally.rel(to), self.measure.what());
        let how = if self.measure == Measure::Leaders { "is to be led by" } else { "moves to" };
        format!("{giver} has {held:.2} of its share of {what} and {taker} {lacking:.2}: {id} {how} {taker}")
    }

    fn decide(&mut self, item: usize, from: usize, to: usize, why: String) {
        self.books.go(item, from, to, self.measure);
        let partition = self.books.items[item].partition;
        let nodes = self.books.items[item].on.iter().map(|slot| self.books.node(*slot)).collect();
        if self.measure == Measure::Leaders {
            // The same members in another order.
            let step = Step::SetTarget { partition: partition.id, epoch: partition.epoch, nodes };
            self.decisions.push(Decision { step, why });
        } else {
            self.decisions.extend(set_target(partition, nodes, self.liveness, why));
        }
    }
}

#[cfg(test)]
#[path = "balance_tests.rs"]
mod tests;
