//! The network between nodes as network namespaces: one per node, on a bridge. For root on Linux, with `ip` of iproute2.
//!
//! A cut is a blackhole route in the sender's namespace. TCP needs both ways, so that a one-way cut ends connections in
//! both directions; proxies keep them apart.
//!
//! Invariant: namespaces, links and bridge are removed when this is dropped.

use super::Error;
use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

/// Port of every node in its namespace.
const PORT: u16 = 7170;

/// One namespace per node.
#[derive(Debug)]
pub struct Namespaces {
    /// Begins the names of everything made here.
    prefix: String,
    /// First three numbers of all addresses.
    subnet: String,
    made: usize,
    cuts: BTreeSet<(usize, usize)>,
}

impl Namespaces {
    /// Makes bridge and namespaces.
    ///
    /// # Errors
    /// When not root, without `ip`, or when the system refuses.
    pub fn make(nodes: usize, draw: u64) -> Result<Self, Error> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::Impossible("--netns needs root".to_owned()));
        }
        if Command::new("ip").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            return Err(Error::Impossible("--netns needs `ip`; install iproute2".to_owned()));
        }
        // Interface names have 15 bytes at most.
        let prefix = format!("md{:06x}", std::process::id() & 0x00ff_ffff);
        let subnet = format!("10.{}.{}", 64 + draw % 128, (draw >> 8) % 256);
        let mut made = Self { prefix, subnet, made: 0, cuts: BTreeSet::new() };
        let bridge = made.bridge();
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}.1/24", made.subnet), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for index in 0..nodes {
            let (space, link) = (made.space(index), format!("{}v{index}", made.prefix));
            ip(&["netns", "add", &space])?;
            made.made = index + 1;
            ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
            ip(&["link", "set", &link, "master", &bridge, "up"])?;
            ip(&["-n", &space, "addr", "add", &format!("{}/24", made.host(index)), "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
        }
        Ok(made)
    }

    fn bridge(&self) -> String {
        format!("{}br", self.prefix)
    }

    fn space(&self, index: usize) -> String {
        format!("{}n{}", self.prefix, index + 1)
    }

    fn host(&self, index: usize) -> String {
        format!("{}.{}", self.subnet, index + 2)
    }

    /// `host:port` of a node.
    #[must_use]
    pub fn address(&self, index: usize) -> String {
        format!("{}:{PORT}", self.host(index))
    }

    /// What makes a command run in the namespace of a node.
    #[must_use]
    pub fn prefix_of(&self, index: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(index)].map(str::to_owned).to_vec()
    }

    /// What `from` sends to `to` gets lost.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(&mut self, from: usize, to: usize) -> Result<(), Error> {
        ip(&["-n", &self.space(from), "route", "replace", "blackhole", &format!("{}/32", self.host(to))])?;
        self.cuts.insert((from, to));
        Ok(())
    }

    /// Nothing gets lost any more.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn heal(&mut self) -> Result<(), Error> {
        while let Some((from, to)) = self.cuts.pop_first() {
            ip(&["-n", &self.space(from), "route", "del", "blackhole", &format!("{}/32", self.host(to))])?;
        }
        Ok(())
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for index in 0..self.made {
            if let Err(error) = ip(&["netns", "del", &self.space(index)]) {
                tracing::error!(%error, "a namespace is left over");
            }
        }
        if let Err(error) = ip(&["link", "del", &self.bridge()]) {
            tracing::error!(%error, "a bridge is left over");
        }
    }
}

fn ip(words: &[&str]) -> Result<(), Error> {
    let what = || format!("ip {}", words.join(" "));
    let output = Command::new("ip").args(words).stdin(Stdio::null()).output().map_err(Error::io(what()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let why = std::io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned());
            Err(Error::io(what())(why))
        }
    }
}
