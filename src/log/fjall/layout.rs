//! Keys and values of the log on disk, and how they are read back.
//!
//! ```text
//! 'f'                                    format version, u32
//! 'm' name                               node metadata
//! 'r' group replica kind [index]         a replica's vote, purge point, commit hint, tombstone or entry
//! 's'                                    seal of the last synced write
//! ```
//!
//! Numbers are 8 bytes big-endian, so that a replica's records are neighbours and its entries in order.

use super::{super::extent::Extent, Record, Recovered, corrupt, error_at};
use crate::key::{PartitionId, ReplicaId};
use bytes::Bytes;
use fjall::{Keyspace, OwnedWriteBatch};
use std::{collections::BTreeMap, io, ops::Range, path::Path};

pub(super) type Place = (PartitionId, ReplicaId);

/// Version of this layout.
const FORMAT: u32 = 1;
const FORMAT_KEY: &[u8] = b"f";
const META: u8 = b'm';
const REPLICA: u8 = b'r';
/// Key of the seal.
pub(super) const SEAL_KEY: &[u8] = b"s";

const TOMBSTONE: u8 = 0;
const VOTE: u8 = 1;
const PURGED: u8 = 2;
const COMMITTED: u8 = 3;
const ENTRY: u8 = 4;

pub(super) fn meta_key(name: &str) -> Vec<u8> {
    [&[META], name.as_bytes()].concat()
}

fn key(place: Place, kind: u8) -> Vec<u8> {
    let mut key = Vec::with_capacity(26);
    key.push(REPLICA);
    key.extend_from_slice(&place.0.0.to_be_bytes());
    key.extend_from_slice(&place.1.0.to_be_bytes());
    key.push(kind);
    key
}

fn entry_key(place: Place, index: u64) -> Vec<u8> {
    let mut key = key(place, ENTRY);
    key.extend_from_slice(&index.to_be_bytes());
    key
}

/// Adds to `batch` what `record` changes; `removed` are the entries that it ends.
pub(super) fn stage(batch: &mut OwnedWriteBatch, to: &Keyspace, place: Place, record: &Record, removed: Range<u64>) {
    for index in removed {
        batch.remove(to, entry_key(place, index));
    }
    match record {
        Record::Append { first, entries } => {
            for (index, entry) in (*first..).zip(entries) {
                batch.insert(to, entry_key(place, index), entry.as_ref());
            }
        }
        Record::Vote(vote) => batch.insert(to, key(place, VOTE), vote.as_ref()),
        Record::Truncate { .. } => {}
        Record::Purge { upto, marker } => {
            batch.insert(to, key(place, PURGED), [&upto.to_be_bytes(), marker.as_ref()].concat());
        }
        Record::Committed(hint) => batch.insert(to, key(place, COMMITTED), hint.as_ref()),
        Record::Tombstone => {
            for kind in [VOTE, PURGED, COMMITTED] {
                batch.remove(to, key(place, kind));
            }
            batch.insert(to, key(place, TOMBSTONE), []);
        }
    }
}

/// Writes the format of a new database, refuses an unknown one.
pub(super) fn check_format(records: &Keyspace, dir: &Path) -> io::Result<()> {
    match records.get(FORMAT_KEY).map_err(|error| error_at(dir, error))? {
        Some(found) if *found == FORMAT.to_be_bytes() => Ok(()),
        Some(found) => Err(corrupt(dir, format!("format {found:?} is not known, {FORMAT} is"))),
        None if records.is_empty().map_err(|error| error_at(dir, error))? => {
            // Durable with the first synced write; a database that loses it is still empty.
            records.insert(FORMAT_KEY, FORMAT.to_be_bytes()).map_err(|error| error_at(dir, error))
        }
        None => Err(corrupt(dir, "there are records but no format version")),
    }
}

/// Reads every replica's log and checks that none has a hole.
pub(super) fn load(records: &Keyspace, dir: &Path) -> io::Result<BTreeMap<Place, Recovered>> {
    let mut found: BTreeMap<Place, Recovered> = BTreeMap::new();
    let mut last = None;
    for item in records.prefix([REPLICA]) {
        let (key, value) = item.into_inner().map_err(|error| damaged_after(dir, last, error))?;
        let Some((place, kind, index)) = parse(&key) else {
            return Err(corrupt(dir, format!("unknown key {}", crate::key::printable(&key))));
        };
        last = Some((place, index));
        let value = Bytes::copy_from_slice(&value);
        let replica = found.entry(place).or_default();
        match (kind, index) {
            (TOMBSTONE, None) => replica.tombstone = true,
            (VOTE, None) => replica.vote = Some(value),
            (PURGED, None) if value.len() >= 8 => {
                replica.purged = Some((crate::key::first_u64(&value), value.slice(8..)));
            }
            (COMMITTED, None) => replica.committed = Some(value),
            (ENTRY, Some(index)) => {
                let before = replica.entries.last_key_value().map(|(index, _)| *index);
                let before = before.or_else(|| replica.purged.as_ref().map(|(upto, _)| *upto));
                if before.is_some_and(|before| before.checked_add(1) != Some(index)) {
                    let before = before.unwrap_or_default();
                    return Err(corrupt(dir, format!("{} {}: entry {index} follows {before}", place.0, place.1)));
                }
                replica.entries.insert(index, value);
            }
            _ => return Err(corrupt(dir, format!("{} {}: unknown record of kind {kind}", place.0, place.1))),
        }
        if replica.tombstone && *replica != (Recovered { tombstone: true, ..Recovered::default() }) {
            return Err(corrupt(dir, format!("{} {}: destroyed, yet it has records", place.0, place.1)));
        }
    }
    Ok(found)
}

fn damaged_after(dir: &Path, last: Option<(Place, Option<u64>)>, error: fjall::Error) -> io::Error {
    let error = error_at(dir, error);
    let place = match last {
        None => "at the first record".into(),
        Some(((group, replica), None)) => format!("after the head of {group} {replica}"),
        Some(((group, replica), Some(index))) => format!("after entry {index} of {group} {replica}"),
    };
    io::Error::new(error.kind(), format!("{error}, {place}"))
}

fn parse(key: &[u8]) -> Option<(Place, u8, Option<u64>)> {
    let number = |from: usize| key.get(from..from + 8).map(crate::key::first_u64);
    let place = (PartitionId(number(1)?), ReplicaId(number(9)?));
    let kind = *key.get(17)?;
    match key.len() {
        18 => Some((place, kind, None)),
        26 => Some((place, kind, number(18))),
        _ => None,
    }
}

/// The shape of what was found.
pub(super) fn extent_of(found: &Recovered) -> Extent {
    let purged = found.purged.as_ref().map(|(upto, _)| *upto);
    let live = match (found.entries.first_key_value(), found.entries.last_key_value()) {
        (Some((first, _)), Some((last, _))) => *first..*last + 1,
        _ => purged.map_or(0..0, |purged| purged + 1..purged + 1),
    };
    Extent { live, purged, tombstone: found.tombstone }
}
