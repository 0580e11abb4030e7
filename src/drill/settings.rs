//! What a drill is asked to do.

use crate::{
    drill::Error,
    proof::{history::ReadMode, workload::Workload},
};
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
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 13] = [
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
        }
    }

    /// Whether leaders must change under it, sooner or later.
    #[must_use]
    pub const fn moves_leaders(self) -> bool {
        matches!(self, Self::Kill | Self::Pause | Self::Partition | Self::IsolateLeader | Self::RestartAll)
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
    /// A running cluster to drill instead of one of its own.
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
        if self.netns {
            command.push_str(" --netns");
        }
        command
    }

    /// Checks the settings against each other.
    ///
    /// # Errors
    /// What does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |why: String| Err(Error::Impossible(why));
        if !self.endpoints.is_empty() {
            return match self.netns {
                true => refuse("--netns is for a cluster of the drill's own, not for --endpoints".to_owned()),
                false => Ok(()),
            };
        }
        if self.replicas as usize > self.nodes {
            return refuse(format!("--replicas {} needs as many --nodes, not {}", self.replicas, self.nodes));
        }
        if self.spare() == 0 && self.faults.iter().any(|fault| !matches!(fault, Fault::Clock | Fault::RestartAll)) {
            return refuse("faults need --replicas 3 or more: with fewer, any of them is an outage".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_by_name_in_any_order_and_once() {
        assert_eq!(Fault::parse_list("pause,kill,pause"), Ok(vec![Fault::Kill, Fault::Pause]));
        assert_eq!(Fault::parse_list("all").unwrap().len(), Fault::ALL.len());
        assert_eq!(Fault::parse_list("none"), Ok(vec![]));
        let error = Fault::parse_list("kill,meteor").unwrap_err();
        assert!(error.contains("meteor") && error.contains("isolate-driver"), "{error}");
    }
}
