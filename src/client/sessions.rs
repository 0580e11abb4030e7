//! The library's own write sessions: an identity and a sequence for every write, so that a retry is applied once.
//!
//! Invariants:
//! * a sequence is used for one write only and stays outstanding until nobody will retry that write;
//! * `acknowledged_below` never passes an outstanding sequence;
//! * in one session no sequence is [`SEQUENCES_AHEAD_MAX`] or more above an outstanding one: a partition remembers a
//!   bounded number of answers and would refuse a slow write's retry once that many later ones have come.

use crate::{error::Error, key::NodeId, proto::v1};
use bytes::Bytes;
use parking_lot::Mutex;
use std::{collections::BTreeSet, future::Future, sync::Arc};

/// Sequences from the lowest outstanding one of a session to the highest; at most the answers that a partition
/// remembers of a session (4,096). Writes beyond go under another session.
const SEQUENCES_AHEAD_MAX: u64 = 4_096;

/// The session in use, opened when first needed.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    current: Mutex<Option<Arc<Opened>>>,
    /// Held while a session is being opened, so that many writers open one.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Opened {
    by: NodeId,
    client_id: Bytes,
    opened: u64,
    sequences: Mutex<Sequences>,
}

#[derive(Debug, Default)]
struct Sequences {
    last: u64,
    outstanding: BTreeSet<u64>,
}

/// One write's place in a session; dropping it says that the write will not be retried.
#[derive(Debug)]
pub(crate) struct Ticket {
    session: Arc<Opened>,
    sequence: u64,
}

impl Sessions {
    /// The next sequence, in a session opened by `open` (which says by which node) if there is none with room.
    pub(crate) async fn begin<F>(&self, open: impl Fn() -> F) -> Result<Ticket, Error>
    where
        F: Future<Output = Result<(NodeId, v1::OpenSessionReply), Error>>,
    {
        if let Some(ticket) = self.current().and_then(Ticket::next) {
            return Ok(ticket);
        }
        let _opening = self.opening.lock().await;
        if let Some(ticket) = self.current().and_then(Ticket::next) {
            return Ok(ticket);
        }
        let (by, reply) = open().await?;
        let session = Arc::new(Opened {
            by,
            client_id: reply.client_id,
            opened: reply.opened,
            sequences: Mutex::new(Sequences::default()),
        });
        let first = Ticket::next(Arc::clone(&session)).expect("a new session has room");
        *self.current.lock() = Some(session);
        Ok(first)
    }

    /// Leaves the session of this ticket, which a partition has forgotten or will not have; later writes use a new one.
    pub(crate) fn leave(&self, ticket: &Ticket) {
        let mut current = self.current.lock();
        if current.as_ref().is_some_and(|session| Arc::ptr_eq(session, &ticket.session)) {
            *current = None;
        }
    }

    fn current(&self) -> Option<Arc<Opened>> {
        self.current.lock().clone()
    }
}

impl Ticket {
    /// The next sequence, unless a write of this session has been outstanding for too many already.
    fn next(session: Arc<Opened>) -> Option<Self> {
        let sequence = {
            let mut sequences = session.sequences.lock();
            let sequence = sequences.last + 1;
            let lowest = sequences.outstanding.first().copied().unwrap_or(sequence);
            if sequence - lowest >= SEQUENCES_AHEAD_MAX {
                return None;
            }
            sequences.last = sequence;
            sequences.outstanding.insert(sequence);
            sequence
        };
        Some(Self { session, sequence })
    }

    /// The node that opened the session.
    pub(crate) fn opened_by(&self) -> NodeId {
        self.session.by
    }

    /// What a request carries.
    pub(crate) fn to_pb(&self) -> v1::WriteSession {
        let first = self.session.sequences.lock().outstanding.first().copied();
        v1::WriteSession {
            client_id: self.session.client_id.clone(),
            opened: self.session.opened,
            sequence: self.sequence,
            acknowledged_below: first.expect("this ticket's own sequence is outstanding"),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.session.sequences.lock().outstanding.remove(&self.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[tokio::test]
    async fn many_writers_open_one_session_and_the_floor_waits_for_the_slowest() {
        let sessions = Sessions::default();
        let opened = AtomicU64::new(0);
        let open = || async {
            tokio::task::yield_now().await;
            let opened = opened.fetch_add(1, Ordering::Relaxed) + 1;
            Ok((NodeId(1), v1::OpenSessionReply { client_id: Bytes::from_static(&[7; 16]), opened }))
        };
        let (a, b) = tokio::join!(sessions.begin(open), sessions.begin(open));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!((a.to_pb().sequence, b.to_pb().sequence, b.to_pb().opened), (1, 2, 1));
        assert_eq!(b.to_pb().acknowledged_below, 1);
        drop(a);
        assert_eq!(b.to_pb().acknowledged_below, 2);
        sessions.leave(&b);
        let c = sessions.begin(open).await.unwrap().to_pb();
        assert_eq!((c.sequence, c.opened), (1, 2));
    }

    #[tokio::test]
    async fn writes_far_ahead_of_a_slow_one_go_under_another_session() {
        let sessions = Sessions::default();
        let opened = AtomicU64::new(0);
        let open = || async {
            let opened = opened.fetch_add(1, Ordering::Relaxed) + 1;
            Ok((NodeId(1), v1::OpenSessionReply { client_id: Bytes::from_static(&[7; 16]), opened }))
        };
        let slow = sessions.begin(open).await.unwrap();
        for _ in 1..SEQUENCES_AHEAD_MAX {
            assert_eq!(sessions.begin(open).await.unwrap().to_pb().opened, 1);
        }
        let next = sessions.begin(open).await.unwrap().to_pb();
        assert_eq!((next.opened, next.sequence, next.acknowledged_below), (2, 1, 1));
        assert_eq!((slow.to_pb().opened, slow.to_pb().acknowledged_below), (1, 1));
    }
}
