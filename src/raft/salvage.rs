//! What a replica that does not run has left behind: taking its state, and removing it.
//!
//! For a group that has lost its quorum for good: what the replica that is left holds is the best that there is, so the
//! entries that it does not know to be committed count as well. Whoever wrote them was not told that they did not happen.
//!
//! Invariants:
//! * taking the state changes nothing that is stored: it can be done again;
//! * a replica that was removed is never opened again.

use super::{
    codec,
    hub::RaftHub,
    machine::{AnyCell as _, Cell, Item, LogPosition, Machine},
    snapshots::{Vault, position},
    types::{Entry, Payload},
};
use crate::{
    key::{PartitionId, ReplicaId},
    log::{Record, Recovered},
};
use std::{io, sync::Arc};

/// Entries applied before others get their turn.
const APPLY_ENTRIES: usize = 64;

/// The state of a replica of which the log held what was `found`: its snapshot, and every entry behind that. `machine` is
/// the empty machine. Also returns where its log ends.
///
/// # Errors
/// When snapshot and log cannot be read or do not fit, or the replica was destroyed.
pub async fn salvage<M: Machine>(
    hub: &Arc<RaftHub>,
    group: PartitionId,
    replica: ReplicaId,
    found: &Recovered,
    machine: M,
) -> io::Result<(M, LogPosition)> {
    let damaged = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    if found.tombstone {
        return damaged("the replica was destroyed".to_owned());
    }
    let cell = Cell::new(machine);
    let vault = Vault::new(group, replica, Arc::clone(&hub.snapshots));
    let mut last = None;
    if let Some(snapshot) = vault.latest().await? {
        last = snapshot.meta.last_log_id;
        vault.install(&cell, &snapshot.meta, snapshot.snapshot).await?;
    }
    if let Some((purged, _)) = found.purged.as_ref().filter(|(purged, _)| last.is_none_or(|last| last.index < *purged))
    {
        return damaged(format!("its log begins behind {purged}, and its snapshot ends before"));
    }
    let mut items = Vec::new();
    for (index, bytes) in found.entries.range(last.map_or(0, |last| last.index + 1)..) {
        let Entry { log_id, payload } = codec::recover_entry(bytes)?;
        // A log that has nothing yet begins wherever its first leader said.
        let next = last.map_or(*index, |last| last.index + 1);
        if log_id.index != *index || *index != next {
            return damaged(format!("entry {index} holds {log_id} where {next} is to come"));
        }
        last = Some(log_id);
        let command = if let Payload::Normal(command) = payload { Some(command.0) } else { None };
        items.push(Item { at: position(last.as_ref()), command, responder: None });
        if items.len() >= APPLY_ENTRIES {
            cell.apply(std::mem::take(&mut items));
            tokio::task::yield_now().await;
        }
    }
    cell.apply(items);
    Ok((cell.into_machine(), position(last.as_ref())))
}

/// Removes everything stored of a replica that does not run, and makes sure that its id is never opened again.
///
/// # Errors
/// When that could not be made durable.
pub async fn bury(hub: &RaftHub, group: PartitionId, replica: ReplicaId) -> io::Result<()> {
    hub.keep(group, replica, Record::Tombstone).await?;
    Vault::new(group, replica, Arc::clone(&hub.snapshots)).remove().await
}
