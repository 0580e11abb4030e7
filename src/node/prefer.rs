//! Leaders return to where the map prefers them: to the first member of a partition's target.
//!
//! Invariants:
//! * leadership is handed only to a voter that was in contact for [`STEADY_AFTER`] without a pause, lacks at most
//!   [`LAG_MAX`] entries and takes replicas; of a partition at rest;
//! * a node keeps what it came to lead for [`STEADY_AFTER`]: it may have been handed over by one that is about to stop;
//! * a partition is handed over by this node at most once in [`TRY_EVERY`], and at most [`AT_ONCE`] by one round.

use super::{Node, Partition};
use crate::{
    key::{NodeId, PartitionId, Replica},
    placement::Map,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Weak,
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often a node looks at what it leads.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A node has to have been in contact for so long before it is given leaders.
const STEADY_AFTER: Duration = Duration::from_secs(10);
/// Pause before the same partition is handed over again.
const TRY_EVERY: Duration = Duration::from_secs(30);
/// Entries that the next leader may lack: it catches up with them before it takes over.
const LAG_MAX: u64 = 256;
/// Partitions handed over by one round.
const AT_ONCE: usize = 4;

/// Hands over what others should lead, for as long as the node runs.
pub(super) async fn run(node: Weak<Node>) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut steady_since: BTreeMap<NodeId, Instant> = BTreeMap::new();
    let mut tried: BTreeMap<PartitionId, Instant> = BTreeMap::new();
    // By partition and term.
    let mut led_since: BTreeMap<(PartitionId, u64), Instant> = BTreeMap::new();
    loop {
        let now = ticks.tick().await;
        let Some(this) = node.upgrade() else { return };
        let map = this.routing.map();
        steady_since.retain(|id, _| this.liveness.is_alive(*id));
        for id in map.nodes().keys().filter(|id| this.liveness.is_alive(**id)) {
            steady_since.entry(*id).or_insert(now);
        }
        tried.retain(|_, at| now.duration_since(*at) < TRY_EVERY);
        let led: BTreeSet<(PartitionId, u64)> = this.led().into_iter().collect();
        led_since.retain(|key, _| led.contains(key));
        let long_ago = |since: Option<&Instant>| since.is_some_and(|since| now.duration_since(*since) >= STEADY_AFTER);
        for key in led {
            led_since.entry(key).or_insert(now);
        }
        let mut handed = 0;
        for partition in this.partitions() {
            let id = partition.id;
            let led = long_ago(led_since.get(&(id, partition.group().leadership().term)));
            let to = preferred(&this, &map, &partition).filter(|to| led && long_ago(steady_since.get(&to.node)));
            let Some(to) = to.filter(|_| !tried.contains_key(&id) && handed < AT_ONCE) else { continue };
            handed += 1;
            tried.insert(id, now);
            tracing::info!(partition = %id, to = %to.node, "leadership returns to the preferred node");
            if let Err(error) = partition.group().transfer(to.id).await {
                tracing::info!(partition = %id, to = %to.node, %error, "leadership is not handed over yet");
            }
        }
    }
}

/// Who should lead a partition that this node leads, if it is another and can.
fn preferred(node: &Node, map: &Map, partition: &Partition) -> Option<Replica> {
    let wanted = map.partition(partition.id).filter(|wanted| wanted.is_at_rest())?;
    let to = *wanted.target.first().filter(|to| to.node != node.id() && partition.group().is_leader())?;
    let takes = map.node(to.node).is_some_and(|node| node.standing.takes_replicas());
    let status = partition.group().status();
    let ready =
        !status.joint && status.voters.contains(&to) && status.lag.get(&to.id).is_some_and(|lag| *lag <= LAG_MAX);
    (takes && ready).then_some(to)
}
