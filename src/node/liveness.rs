//! Which nodes this one is in contact with, and what that says about a group's quorum.
//!
//! Every node pings every other, and says whether it can hold no more rows; any frame counts as contact. What follows from silence is only ever a choice of
//! words and of patience (`NO_QUORUM` now, or wait for an election): safety rests on Raft alone.

use crate::{
    error::{Error, Outcome, Reason},
    key::{NodeId, PartitionId, Replica},
    placement::{self, Health},
    transport::{
        Kind,
        endpoint::{Endpoint, Reply, Service},
    },
};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::time::Instant;

/// How often a node pings the others.
pub(super) const PING_EVERY: Duration = Duration::from_millis(250);
/// A node not heard from for this long is out of contact.
pub const CONTACT_LOST_AFTER: Duration = Duration::from_millis(1_000);

/// Body of a ping of a node that can hold no more.
const FULL: &[u8] = &[1];

/// What this node knows of the others.
#[derive(Clone)]
pub struct Liveness {
    endpoint: Arc<Endpoint>,
    started: Instant,
    /// Nodes that said that they can hold no more.
    full: Arc<Mutex<BTreeSet<NodeId>>>,
}

impl Liveness {
    /// Watches through `endpoint`.
    #[must_use]
    pub fn new(endpoint: Arc<Endpoint>) -> Self {
        Self { endpoint, started: Instant::now(), full: Arc::default() }
    }

    /// Time since this node last heard from `node`; zero for itself, `None` if never.
    #[must_use]
    pub fn contact(&self, node: NodeId) -> Option<Duration> {
        if node == self.endpoint.me() { Some(Duration::ZERO) } else { self.endpoint.last_contact(node) }
    }

    /// Time since `node` was last heard from, counting from this process's start if never.
    #[must_use]
    pub fn silence(&self, node: NodeId) -> Duration {
        self.contact(node).unwrap_or_else(|| self.started.elapsed())
    }

    /// Whether `node` was heard from lately.
    #[must_use]
    pub fn is_alive(&self, node: NodeId) -> bool {
        self.contact(node).is_some_and(|silence| silence < CONTACT_LOST_AFTER)
    }

    /// What the planner would make of these nodes' lives, as far as this node knows.
    #[must_use]
    pub fn known(&self, nodes: impl IntoIterator<Item = NodeId>) -> placement::Liveness {
        let health = |id: NodeId| match self.is_alive(id) {
            true => Health::Alive { for_ms: placement::plan::ALIVE_AFTER_MS },
            false => Health::Silent { for_ms: self.silence(id).as_millis() as u64 },
        };
        placement::Liveness(nodes.into_iter().map(|id| (id, health(id))).collect())
    }

    /// Whether too few of `members` have been in contact for a quorum, for as long as it takes to be sure. Of a group whose
    /// members are not known yet nothing can be said.
    #[must_use]
    pub fn quorum_lost(&self, members: &[Replica]) -> bool {
        if members.is_empty() {
            return false;
        }
        let alive = members.iter().filter(|member| self.silence(member.node) < CONTACT_LOST_AFTER).count();
        alive < members.len() / 2 + 1
    }

    /// One of the members, other than this node, that can hold no more; `members` is called only if any node is full.
    pub(super) fn full_among(&self, members: impl FnOnce() -> Vec<Replica>) -> Option<NodeId> {
        let full = self.full.lock();
        if full.is_empty() {
            return None;
        }
        members().iter().map(|member| member.node).find(|node| full.contains(node) && self.is_alive(*node))
    }

    /// Pings `nodes` once; `full`: this one can hold no more.
    pub fn ping(&self, nodes: impl IntoIterator<Item = NodeId>, full: bool) {
        let body = Bytes::from_static(if full { FULL } else { &[] });
        for node in nodes {
            if node != self.endpoint.me() {
                // A dropped ping is what the other side is to notice.
                let _dropped = self.endpoint.cast(node, Kind::Ping, body.clone());
            }
        }
    }

    /// Why a partition cannot serve at the moment: `NO_QUORUM` with its members and their last contact, or
    /// `LEADER_UNKNOWN` while an election can still succeed.
    #[must_use]
    pub fn no_leader(&self, partition: PartitionId, members: &[Replica], outcome: Option<Outcome>) -> Error {
        let contacts: Vec<String> = members
            .iter()
            .map(|member| match self.contact(member.node) {
                Some(silence) if silence.is_zero() => format!("{} (this node)", member.node),
                Some(silence) => format!("{} heard {} ms ago", member.node, silence.as_millis()),
                None => format!("{} never heard", member.node),
            })
            .collect();
        let lost = self.quorum_lost(members);
        let need = members.len() / 2 + 1;
        let mut error = if lost {
            Error::new(
                Reason::NoQuorum,
                format!(
                    "partition {partition} needs {need} of its {} members and has too few in contact: {}; restart the \
                     missing nodes; EVENTUAL reads are still answered",
                    members.len(),
                    contacts.join(", ")
                ),
            )
            .retry_after(500)
        } else {
            Error::new(
                Reason::LeaderUnknown,
                format!("partition {partition} has no leader at the moment; an election is under way"),
            )
            .retry_after(100)
        };
        error = error.with("partition", partition.0).with("members", contacts.join(", "));
        error.outcome = outcome;
        error
    }
}

/// Takes pings.
pub(super) struct PingService(pub(super) Liveness);

impl Service for PingService {
    fn handle(&self, from: NodeId, body: Bytes, _reply: Reply) {
        let mut full = self.0.full.lock();
        if body == FULL {
            full.insert(from);
        } else {
            full.remove(&from);
        }
    }
}

impl std::fmt::Debug for Liveness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Liveness").field("me", &self.endpoint.me()).finish_non_exhaustive()
    }
}
