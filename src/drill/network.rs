//! The network between the nodes of a drill: proxies by default, namespaces for root.

use super::{
    Error,
    namespaces::Namespaces,
    proxy::{Mode, Proxy},
};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, TcpListener},
};

/// Where ports are looked for: below those that systems hand out by themselves, so that none is taken while its node is
/// down.
const PORTS: std::ops::Range<u16> = 10_240..20_480;

/// The network between nodes. Clients are outside of it.
#[derive(Debug)]
pub enum Network {
    /// Everything on loopback; each node reaches each other one by way of a proxy.
    Proxies {
        /// `host:port` of every node.
        addresses: Vec<String>,
        /// By who connects and to whom.
        links: BTreeMap<(usize, usize), Proxy>,
    },
    /// A namespace for every node.
    Namespaces(Namespaces),
}

impl Network {
    /// Proxies between nodes on free ports.
    ///
    /// # Errors
    /// When there are no ports.
    pub async fn proxies(nodes: usize, draw: u64) -> Result<Self, Error> {
        let addresses: Vec<String> = free_ports(nodes, draw)?.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let mut links = BTreeMap::new();
        for from in 0..nodes {
            for to in (0..nodes).filter(|to| *to != from) {
                let proxy = Proxy::start(addresses[to].clone()).await.map_err(Error::io("starting a proxy"))?;
                links.insert((from, to), proxy);
            }
        }
        Ok(Self::Proxies { addresses, links })
    }

    /// `host:port` of a node.
    #[must_use]
    pub fn address(&self, index: usize) -> String {
        match self {
            Self::Proxies { addresses, .. } => addresses[index].clone(),
            Self::Namespaces(spaces) => spaces.address(index),
        }
    }

    /// What a command begins with to run where this node is.
    #[must_use]
    pub fn prefix_of(&self, index: usize) -> Vec<String> {
        match self {
            Self::Proxies { .. } => Vec::new(),
            Self::Namespaces(spaces) => spaces.prefix_of(index),
        }
    }

    /// Arguments by which a node reaches the others the right way.
    #[must_use]
    pub fn dial_of(&self, index: usize) -> Vec<String> {
        let Self::Proxies { addresses, links } = self else { return Vec::new() };
        let of_this = links.iter().filter(|((from, _), _)| *from == index);
        of_this
            .flat_map(|((_, to), proxy)| ["--dial".to_owned(), format!("{}={}", addresses[*to], proxy.address())])
            .collect()
    }

    /// `to` does not hear `from` any more, in silence.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(&mut self, from: usize, to: usize) -> Result<(), Error> {
        match self {
            Self::Proxies { links, .. } => links[&(from, to)].set(Mode::Cut),
            Self::Namespaces(spaces) => spaces.cut(from, to)?,
        }
        Ok(())
    }

    /// Whether [`Network::shape`] can do anything.
    #[must_use]
    pub const fn can_shape(&self) -> bool {
        matches!(self, Self::Proxies { .. })
    }

    /// What `from` sends to `to` is treated so.
    pub fn shape(&self, from: usize, to: usize, mode: Mode) {
        if let Self::Proxies { links, .. } = self {
            links[&(from, to)].set(mode);
        }
    }

    /// Everything passes.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn heal(&mut self) -> Result<(), Error> {
        match self {
            Self::Proxies { links, .. } => links.values().for_each(|proxy| proxy.set(Mode::Open)),
            Self::Namespaces(spaces) => spaces.heal()?,
        }
        Ok(())
    }
}

/// Ports on which nobody listens.
fn free_ports(count: usize, draw: u64) -> Result<Vec<u16>, Error> {
    let begin = (draw % u64::from(PORTS.end - PORTS.start)) as u16;
    let mut held = Vec::new();
    for offset in 0..PORTS.end - PORTS.start {
        let port = PORTS.start + (begin + offset) % (PORTS.end - PORTS.start);
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok().map(|listener| (port, listener)));
        if held.len() == count {
            return Ok(held.into_iter().map(|(port, _)| port).collect());
        }
    }
    Err(Error::Impossible(format!("there are no {count} free ports between {} and {}", PORTS.start, PORTS.end)))
}
