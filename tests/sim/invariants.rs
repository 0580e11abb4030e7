//! What must hold at every moment, looked at from the inside while a run goes on.
//!
//! * a replica id is used in one place only;
//! * only what is in a snapshot is cut from the log, only what is in the log is committed;
//! * terms and applied positions do not go back within a life, nor does the map's version;
//! * replicas that have applied the same have the same state, and the same entry at the same index;
//! * maps of the same version are the same, and tile every keyspace.

use crate::{
    trace::fnv,
    verdict::{Failure, Failures},
    world::World,
};
use meridian::{
    key::{DRIVER, NodeId, PartitionId, ReplicaId},
    raft::{Group, Machine, Role, Status},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::sleep;

/// Between two looks.
const EVERY: Duration = Duration::from_millis(25);

/// One replica in one life of its node.
type Life = (PartitionId, ReplicaId, u64);

/// What has been seen so far.
#[derive(Default)]
struct Seen {
    leaders: BTreeSet<(PartitionId, u64, ReplicaId)>,
    /// Where replica ids are used.
    places: BTreeMap<ReplicaId, (PartitionId, NodeId)>,
    lives: BTreeMap<Life, Status>,
    /// Term of the entry and digest of the state at an index.
    states: BTreeMap<(PartitionId, u64), (u64, u64)>,
    maps: BTreeMap<u64, u64>,
    map_at: BTreeMap<(u64, u64), u64>,
}

/// Looks again and again, until dropped.
pub(crate) async fn watch(world: World, failures: Arc<Failures>) {
    let mut seen = Seen::default();
    loop {
        look(&world, &mut seen, &failures);
        sleep(EVERY).await;
    }
}

fn look(world: &World, seen: &mut Seen, failures: &Failures) {
    for n in world.running() {
        let (Some(life), lives) = (world.life(n), world.lives(n)) else { continue };
        let map = life.node.routing().map();
        if map.version() > 0 && seen.map_at.insert((n, lives), map.version()) != Some(map.version()) {
            seen.look_at_map(n, &map, failures);
            world.note_owned(&map);
        }
        if let Some(group) = life.node.driver_group() {
            let (at, digest) = group.read(|m, at| (at, fnv(1, &m.state().encode())));
            seen.look_at_group(world, &group, lives, (at.index, at.term, digest), failures);
        }
        for partition in life.node.partitions() {
            let (at, digest) = partition.group().read(|m, at| (at, m.store().digest()));
            seen.look_at_group(world, partition.group(), lives, (at.index, at.term, digest), failures);
        }
    }
}

impl Seen {
    fn look_at_map(&mut self, n: u64, map: &meridian::placement::Map, failures: &Failures) {
        if let Err(why) = map.check() {
            failures.add(Failure::new("map-broken", format!("node {n}, version {}: {why}", map.version())));
        }
        let hash = fnv(1, &map.encode());
        if *self.maps.entry(map.version()).or_insert(hash) != hash {
            failures.add(Failure::new("maps-differ", format!("node {n} has another map {}", map.version())));
        }
    }

    fn look_at_group<M: Machine>(
        &mut self,
        world: &World,
        group: &Group<M>,
        lives: u64,
        (index, term, digest): (u64, u64, u64),
        failures: &Failures,
    ) {
        let (id, me, status) = (group.id(), group.replica(), group.status());
        if id != DRIVER && *self.places.entry(me.id).or_insert((id, me.node)) != (id, me.node) {
            failures.add(Failure::new("replica-id-reused", format!("{id} {me:?}")));
        }
        // One term can have several leaders, one after the other in the order of their ids; their entries differ.
        if status.role == Role::Leader && self.leaders.insert((id, status.term, me.id)) {
            world.count("leader-changes");
        }
        if status.purged > status.snapshot || status.committed > status.last_log {
            failures.add(Failure::new("out-of-order", format!("{id} {me:?}: {status:?}")));
        }
        let (known_term, known) = *self.states.entry((id, index)).or_insert((term, digest));
        if known_term != term {
            let what = format!("{id} at {index}: entries of terms {known_term} and {term}; {me:?}");
            failures.add(Failure::new("logs-differ", what));
        } else if known != digest {
            failures.add(Failure::new("replicas-differ", format!("{id} at {index}: {me:?} has another state")));
        }
        if let Some(before) = self.lives.insert((id, me.id, lives), status.clone()) {
            if before.term > status.term || before.applied.index > status.applied.index {
                failures.add(Failure::new("went-back", format!("{id} {me:?}: {before:?}, then {status:?}")));
            }
            if status.snapshot > before.last_log && status.purged >= status.snapshot && status.role != Role::Leader {
                world.count("snapshot-installs");
            }
            if status.asleep != before.asleep {
                world.count(if status.asleep { "fell-asleep" } else { "woke" });
            }
        }
    }
}
