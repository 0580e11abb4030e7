//! What a drill is asked to do.

use crate::{
    drill::Error,
    proof::{
        history::{Mode, ReadMode},
        workload::Workload,
    },
};
use sha2::{Digest as _, Sha256};
use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

/// Nodes at most: the processes of one machine.
pub const NODES_MAX: usize = 15;

/// A way to hurt a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fault {
    /// `kill -9` of a minority.
    Kill,
    /// SIGSTOP of a minority, later SIGCONT.
    Pause,
    /// A minority is cut off, in both directions, in silence.
    Partition,
    /// A minority is not heard any more, or hears nothing any more.
    OneWay,
    /// Every node reaches its neighbours only: each sees another majority.
    Ring,
    /// The leader of a partition is cut off from all other nodes, but not from clients.
    IsolateLeader,
    /// The same for the leader of the placement driver.
    IsolateDriver,
    /// What is sent to and from a minority arrives late or in drips, or its disks are slow.
    Slow,
    /// Connections of a minority refuse or hang for moments, or no sync of its disks ends.
    Stall,
    /// Wall clocks jump, back or forth, of any number of nodes.
    Clock,
    /// The disk of one node is full.
    DiskFull,
    /// One node, several or all lose what was not synced.
    PowerLoss,
    /// `kill -9` of all nodes at once.
    RestartAll,
    /// A partition is cut in its middle.
    Divide,
    /// Two neighbours become one partition.
    Merge,
    /// A node drains, and goes on.
    Drain,
    /// One node is lost for good, with its disk, and a new process joins at its address.
    Replace,
}

/// What a fault works on. Faults that work on different things can be on at the same time, and end one by one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hits {
    /// They run, are stopped or are gone.
    Processes,
    /// The network between nodes.
    Links,
    /// Disks and clocks.
    Insides,
}

impl Hits {
    /// All of them.
    pub const ALL: &[Self] = &[Self::Processes, Self::Links, Self::Insides];
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Kill,
        Self::Pause,
        Self::Partition,
        Self::OneWay,
        Self::Ring,
        Self::IsolateLeader,
        Self::IsolateDriver,
        Self::Slow,
        Self::Stall,
        Self::Clock,
        Self::DiskFull,
        Self::PowerLoss,
        Self::RestartAll,
        Self::Divide,
        Self::Merge,
        Self::Drain,
        Self::Replace,
    ];

    /// Name on the command line and in histories.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Partition => "partition",
            Self::OneWay => "one-way",
            Self::Ring => "ring",
            Self::IsolateLeader => "isolate-leader",
            Self::IsolateDriver => "isolate-driver",
            Self::Slow => "slow",
            Self::Stall => "stall",
            Self::Clock => "clock",
            Self::DiskFull => "disk-full",
            Self::PowerLoss => "power-loss",
            Self::RestartAll => "restart-all",
            Self::Divide => "divide",
            Self::Merge => "merge",
            Self::Drain => "drain",
            Self::Replace => "replace",
        }
    }

    /// Whether leaders must change under it, sooner or later.
    #[must_use]
    pub const fn moves_leaders(self) -> bool {
        matches!(self, Self::Kill | Self::Pause | Self::Partition | Self::IsolateLeader | Self::RestartAll)
    }

    /// Whether the cluster is asked for it, and may refuse. What it asks for can be had of any cluster.
    #[must_use]
    pub const fn is_asked_for(self) -> bool {
        matches!(self, Self::Divide | Self::Merge | Self::Drain)
    }

    /// What it works on.
    #[must_use]
    pub const fn hits(self) -> &'static [Hits] {
        match self {
            Self::Kill | Self::Pause | Self::RestartAll | Self::Replace => &[Hits::Processes],
            Self::Partition | Self::OneWay | Self::Ring | Self::IsolateLeader | Self::IsolateDriver => &[Hits::Links],
            Self::Slow | Self::Stall => &[Hits::Links, Hits::Insides],
            Self::Clock => &[Hits::Insides],
            // Who hears nothing has nothing to write, and goes on with a full disk.
            Self::DiskFull => &[Hits::Processes, Hits::Insides, Hits::Links],
            Self::PowerLoss => &[Hits::Processes, Hits::Insides],
            Self::Divide | Self::Merge | Self::Drain => &[],
        }
    }

    /// Whether the groups do without the nodes that it hits, unless it hits all.
    #[must_use]
    pub const fn takes_nodes(self) -> bool {
        !(self.is_asked_for() || matches!(self, Self::Clock | Self::Ring | Self::RestartAll))
    }

    /// Whether nodes that it hits fall so far behind that they need a snapshot.
    #[must_use]
    pub const fn leaves_behind(self) -> bool {
        matches!(self, Self::Kill | Self::Pause | Self::Partition | Self::IsolateLeader | Self::Replace)
    }

    /// Whether it may begin while `first` is on. Both together take no more nodes than either of them.
    #[must_use]
    pub fn may_join(self, first: Self) -> bool {
        let chooses_itself = matches!(self, Self::IsolateLeader | Self::IsolateDriver);
        let (ring, takes) = (self == Self::Ring || first == Self::Ring, self.takes_nodes() || first.takes_nodes());
        let apart = !self.hits().iter().any(|hits| first.hits().contains(hits));
        // Before a node is lost every partition must have all its replicas.
        if self == Self::Replace {
            return false;
        }
        // In a ring every node counts.
        apart && !(ring && takes) && !(chooses_itself && first.takes_nodes())
    }

    /// Understands names separated by commas, `all` and `none`.
    ///
    /// # Errors
    /// A message with the name that is not known, and those that are.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let mut faults = match text {
            "all" => Self::ALL.to_vec(),
            "none" => Vec::new(),
            _ => text.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?,
        };
        faults.sort_unstable();
        faults.dedup();
        Ok(faults)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|fault| fault.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|fault| fault.name()).collect();
            format!("{name:?} is not one of {}, all, none", known.join(", "))
        })
    }
}

/// What a drill is asked to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Faults to install.
    pub faults: Vec<Fault>,
    /// Workloads, side by side.
    pub workloads: Vec<Workload>,
    /// How long faults come and go.
    pub lasts: Duration,
    /// Nodes.
    pub nodes: usize,
    /// Replicas of every partition.
    pub replicas: u32,
    /// Levels that reads ask for.
    pub levels: Vec<ReadMode>,
    /// Which faults come when, and what clients do, follows from it.
    pub seed: u64,
    /// Where histories, logs and the report go: empty, or not there yet.
    pub out: PathBuf,
    /// Clients of each workload.
    pub clients: u32,
    /// A running cluster to drill instead of one of its own: nothing can be done to it.
    pub endpoints: Vec<String>,
    /// Nodes live in network namespaces.
    pub netns: bool,
    /// The binary that nodes run.
    pub binary: PathBuf,
}

impl Settings {
    /// Replicas that every group can miss and still answer.
    #[must_use]
    pub fn spare(&self) -> usize {
        (self.replicas as usize).min(self.nodes).saturating_sub(1) / 2
    }

    /// The command that does the same again.
    #[must_use]
    pub fn command(&self) -> String {
        let faults: Vec<&str> = self.faults.iter().map(|fault| fault.name()).collect();
        let workloads: Vec<&str> = self.workloads.iter().map(|workload| workload.name()).collect();
        let faults = if faults.is_empty() { "none".to_owned() } else { faults.join(",") };
        let seconds = self.lasts.as_secs();
        let mut command = format!("meridian drill --seconds {seconds} --seed {} --faults {faults}", self.seed);
        command.push_str(&format!(" --workload {} --clients {}", workloads.join(","), self.clients));
        match self.endpoints.is_empty() {
            true => command.push_str(&format!(" --nodes {} --replicas {}", self.nodes, self.replicas)),
            false => command.push_str(&format!(" --endpoints {}", self.endpoints.join(","))),
        }
        for level in &self.levels {
            command.push_str(&format!(" --consistency {}", level.mode.name()));
            match level.mode {
                Mode::Bounded => command.push_str(&format!("={}ms", level.bound_ms.unwrap_or_default())),
                Mode::Session => command.push('='), // The clients have tokens of their own.
                Mode::Linearizable | Mode::Lease | Mode::Eventual => {}
            }
        }
        if self.netns {
            command.push_str(" --netns");
        }
        command
    }

    /// Tells plans apart: the same settings are the same plan.
    #[must_use]
    pub fn plan_hash(&self) -> String {
        let digest = Sha256::digest(self.command());
        digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Checks the settings against each other.
    ///
    /// # Errors
    /// What does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |why: String| Err(Error::Impossible(why));
        if !self.endpoints.is_empty() {
            let own = self.faults.iter().find(|fault| !fault.is_asked_for());
            if let Some(fault) = own {
                return refuse(format!(
                    "--faults {fault} is for a cluster of the drill's own; with --endpoints there are divide, merge and drain"
                ));
            }
            if self.netns {
                return refuse("--netns is for a cluster of the drill's own, not for --endpoints".to_owned());
            }
            return Ok(());
        }
        if self.replicas as usize > self.nodes {
            return refuse(format!("--replicas {} needs as many --nodes, not {}", self.replicas, self.nodes));
        }
        if self.spare() == 0
            && self
                .faults
                .iter()
                .any(|fault| !matches!(fault, Fault::Clock | Fault::RestartAll | Fault::Divide | Fault::Merge))
        {
            return refuse("faults need --replicas 3 or more: with fewer, any of them is an outage".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_that_are_on_together_work_on_different_things_and_leave_a_majority() {
        assert!(Fault::Kill.may_join(Fault::Partition) && Fault::IsolateLeader.may_join(Fault::Clock));
        assert!(Fault::Ring.may_join(Fault::RestartAll) && !Fault::Ring.may_join(Fault::Kill));
        assert!(!Fault::Kill.may_join(Fault::Pause) && !Fault::IsolateLeader.may_join(Fault::Kill));
        assert!(Fault::Divide.may_join(Fault::Replace) && Fault::Partition.may_join(Fault::Replace));
        let hurts = |fault: &Fault| !fault.is_asked_for();
        let alone = Fault::ALL
            .into_iter()
            .filter(|fault| !Fault::ALL.into_iter().filter(hurts).any(|other| fault.may_join(other)));
        assert_eq!(alone.collect::<Vec<_>>(), [Fault::DiskFull, Fault::Replace]);
    }

    #[test]
    fn faults_are_read_by_name_in_any_order_and_once() {
        assert_eq!(Fault::parse_list("pause,kill,pause"), Ok(vec![Fault::Kill, Fault::Pause]));
        assert_eq!(Fault::parse_list("all").unwrap().len(), Fault::ALL.len());
        assert_eq!(Fault::parse_list("none"), Ok(vec![]));
        let error = Fault::parse_list("kill,meteor").unwrap_err();
        assert!(error.contains("meteor") && error.contains("isolate-driver"), "{error}");
    }
}
