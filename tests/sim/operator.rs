//! Who runs the cluster: has nodes drain and leave while things fail, and in the end brings all of that to its end and
//! gives up the nodes that are lost.
//!
//! Invariants:
//! * nodes are asked to leave, or lost for good, only while enough stay for the replicas of every partition;
//! * whatever was asked for in vain is asked for again once everything is sound, so that every run ends in a known state.

use crate::world::World;
use meridian::{
    env::spawn,
    key::{DRIVER, NodeId},
    placement::{Command, Map, Reply, Standing},
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Patience with the placement driver.
const DRIVE_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks at what is left to do.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Clones are the same.
#[derive(Clone)]
pub(crate) struct Operator(Arc<Inner>);

struct Inner {
    world: World,
    replicas: usize,
    /// Repair by itself is to be seen within the run.
    repairs: bool,
    /// Questions to the placement driver that are not answered yet.
    open: AtomicUsize,
    /// Nodes that may be draining.
    drained: Mutex<BTreeSet<u64>>,
    /// Nodes that were asked to leave.
    leaving: Mutex<BTreeSet<u64>>,
}

/// A question under way, until it is answered or whoever was asked is gone.
struct Open(Operator);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Operator {
    pub(crate) fn new(world: &World, replicas: u32, repairs: bool) -> Self {
        let (drained, leaving) = (Mutex::default(), Mutex::default());
        let (world, replicas, open) = (world.clone(), replicas as usize, AtomicUsize::new(0));
        Self(Arc::new(Inner { world, replicas, repairs, open, drained, leaving }))
    }

    /// Has a node hand over what it leads and get nothing new, which may be in vain.
    pub(crate) fn drain(&self, n: u64) {
        self.0.drained.lock().unwrap().insert(n);
        self.ask(n, Standing::Draining);
    }

    /// Takes that back.
    pub(crate) fn resume(&self, n: u64) {
        self.ask(n, Standing::Active);
    }

    /// Has a node leave for good; false if it cannot be spared.
    pub(crate) fn decommission(&self, n: u64) -> bool {
        let can = self.can_spare(n);
        if can {
            self.0.leaving.lock().unwrap().insert(n);
            self.ask(n, Standing::Leaving);
        }
        can
    }

    /// Whether enough nodes stay for every replica without this one.
    pub(crate) fn can_spare(&self, n: u64) -> bool {
        let stay = self.staying();
        stay.contains(&n) && stay.len() > self.0.replicas
    }

    /// The same, or nobody is on the way out who would have to wait for it.
    pub(crate) fn can_damage(&self, n: u64) -> bool {
        self.can_spare(n) || self.0.leaving.lock().unwrap().is_empty()
    }

    /// Nodes that are neither lost nor asked to leave.
    fn staying(&self) -> BTreeSet<u64> {
        let (lost, leaving) = (self.0.world.lost(), self.0.leaving.lock().unwrap());
        self.0.world.all().into_iter().filter(|n| !lost.contains(n) && !leaving.contains(n)).collect()
    }

    /// Lost nodes whose place others can take.
    fn given_up(&self) -> Vec<u64> {
        if self.staying().len() >= self.0.replicas { self.0.world.lost() } else { Vec::new() }
    }

    /// Asks through a node that is awake, and does not wait.
    fn ask(&self, n: u64, standing: Standing) {
        let world = self.0.world.clone();
        let Some(life) = world.awake().first().and_then(|via| world.life(*via)) else { return };
        self.0.open.fetch_add(1, Ordering::Relaxed);
        let open = Open(self.clone());
        let (node, command) = (Arc::clone(&life.node), Command::SetStanding { node: NodeId(n), standing });
        life.scope.enter(|| {
            spawn(async move {
                let answer = node.drive(&command, Instant::now() + DRIVE_DEADLINE).await;
                if matches!(answer, Ok(Reply::StandingSet { changed: true, .. })) {
                    world.count(&format!("stands/{standing}"));
                }
                world.note(format_args!("{command:?}: {answer:?}"));
                drop(open);
            })
        });
    }

    /// Once everything is sound: brings to its end what was begun, again and again, until dropped.
    pub(crate) async fn tidy_up(self) {
        let world = &self.0.world;
        loop {
            // Whoever is still asked from before could be late with it.
            if self.0.open.load(Ordering::Relaxed) == 0
                && let Some(via) = world.awake().first()
            {
                for (n, standing) in self.wanting() {
                    let (node, command) = (world.node(*via), Command::SetStanding { node: NodeId(n), standing });
                    let asked = async move { node.drive(&command, Instant::now() + DRIVE_DEADLINE).await };
                    if world.on(*via, asked).await.is_ok() {
                        self.0.drained.lock().unwrap().remove(&n);
                    }
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Nodes that do not stand as they should, and how they should.
    fn wanting(&self) -> Vec<(u64, Standing)> {
        let Some(map) = self.0.world.map() else { return Vec::new() };
        let (drained, leaving) = (self.0.drained.lock().unwrap().clone(), self.0.leaving.lock().unwrap().clone());
        let out: BTreeSet<u64> = if self.check_rebuilt().is_ok() { self.given_up() } else { Vec::new() }
            .into_iter()
            .chain(leaving)
            .collect();
        let wanting = |node: &meridian::placement::Node| {
            let n = node.id.0;
            match node.standing {
                Standing::Active | Standing::Draining if out.contains(&n) => Some((n, Standing::Leaving)),
                Standing::Active if drained.contains(&n) => Some((n, Standing::Active)),
                Standing::Draining => Some((n, Standing::Active)),
                _ => None,
            }
        };
        map.nodes().values().filter_map(wanting).collect()
    }

    /// Whether what was on nodes that are lost has been built anew on others, by itself.
    pub(crate) fn check_rebuilt(&self) -> Result<(), String> {
        let given_up = self.given_up();
        if !self.0.repairs || given_up.is_empty() {
            return Ok(());
        }
        let map = self.0.world.map().ok_or("no node runs")?;
        let on_lost = |id: NodeId| given_up.contains(&id.0);
        let thin = map.partitions().values().filter(|partition| partition.id != DRIVER).find(|partition| {
            !partition.is_at_rest()
                || partition.members.len() != self.0.replicas
                || partition.members.iter().any(|member| on_lost(member.node))
        });
        thin.map_or(Ok(()), |partition| Err(format!("{given_up:?} are lost: {partition:?}")))
    }

    /// Whether nobody drains, and whoever was asked to leave, or is lost, has been removed.
    pub(crate) fn check_left(&self) -> Result<(), String> {
        let map = self.0.world.map().ok_or("no node runs")?;
        let (open, wanting) = (self.0.open.load(Ordering::Relaxed), self.wanting());
        if open > 0 || !wanting.is_empty() {
            return Err(format!("{open} questions are open, these are left: {wanting:?}"));
        }
        let leaving = |map: &Map| map.nodes().values().find(|node| node.standing == Standing::Leaving).cloned();
        leaving(&map).map_or(Ok(()), |node| Err(format!("{} has not left", node.id)))
    }

    /// Ends the processes of nodes that were removed: nobody starts them again.
    pub(crate) async fn retire(&self) {
        let world = &self.0.world;
        let Some(map) = world.map() else { return };
        let lost = world.lost();
        for node in map.nodes().values().filter(|node| node.standing == Standing::Removed) {
            let n = node.id.0;
            if lost.contains(&n) {
                world.count(if self.0.repairs { "lost-and-rebuilt" } else { "lost-and-removed" });
                continue;
            }
            world.count("left");
            world.retire(n).await;
        }
    }
}
