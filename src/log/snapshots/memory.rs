//! Snapshots in memory: for nodes that keep nothing, and as the snapshot files of the simulation.
//!
//! Invariants:
//! * as with files, a snapshot is there completely or not at all: what was not finished when its writer was dropped, as
//!   in a crash, has never been there;
//! * as with files, no damaged byte is ever returned: the error names the place.

use super::{SnapshotHandle, SnapshotStore, SnapshotWriter};
use crate::{
    key::{PartitionId, ReplicaId},
    plant::{Bug, planted},
};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

type Place = (PartitionId, ReplicaId);

/// Snapshots in memory. Clones are the same store.
#[derive(Clone, Debug, Default)]
pub struct MemorySnapshots(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    places: Mutex<BTreeMap<Place, SnapshotHandle>>,
    full: AtomicBool,
}

/// Nothing is damaged.
const SOUND: u64 = u64::MAX;

/// Content of one snapshot.
pub(super) struct Content {
    place: Place,
    pieces: Vec<Bytes>,
    len: u64,
    /// Offset of a damaged byte; at the end of the content stands what is read first: length and metadata.
    damaged: AtomicU64,
}

impl Content {
    pub(super) fn read(&self, offset: u64, max: usize) -> io::Result<Bytes> {
        let mut start = offset as usize;
        for piece in &self.pieces {
            if start < piece.len() {
                let found = piece.slice(start..piece.len().min(start.saturating_add(max)));
                return match self.check(offset, found.len() as u64) {
                    Err(_) if planted(Bug::ChecksumIgnored) => Ok(self.as_damaged(offset, &found)),
                    checked => checked.map(|()| found),
                };
            }
            start -= piece.len();
        }
        Ok(Bytes::new())
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let damaged = self.damaged.load(Ordering::Relaxed);
        if (offset..offset + len).contains(&damaged) { Err(self.corrupt(damaged)) } else { Ok(()) }
    }

    /// What stands there, with a bit of the damaged byte flipped.
    fn as_damaged(&self, offset: u64, found: &[u8]) -> Bytes {
        let mut bytes = found.to_vec();
        bytes[(self.damaged.load(Ordering::Relaxed) - offset) as usize] ^= 1;
        bytes.into()
    }

    fn check_end(&self) -> io::Result<()> {
        if planted(Bug::ChecksumIgnored) { Ok(()) } else { self.check(self.len, 1) }
    }

    fn corrupt(&self, offset: u64) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, format!("simulated snapshots: damaged: {}", self.at(offset)))
    }

    fn at(&self, offset: u64) -> String {
        format!("offset {offset} of {} in the snapshot of {} {}", self.len, self.place.0, self.place.1)
    }
}

impl MemorySnapshots {
    /// Takes the space away, or gives it back: without it nothing can be written.
    pub fn set_full(&self, full: bool) {
        self.0.full.store(full, Ordering::Relaxed);
    }

    /// Damages a stored snapshot, or cuts its end off, as follows from the seed; says which and where, or that there is
    /// none. Content is found damaged when it is read, also by handles from before; length and metadata by
    /// [`SnapshotStore::latest`].
    pub fn rot(&self, seed: u64) -> Option<String> {
        let places = self.0.places.lock();
        let mut rng = StdRng::seed_from_u64(seed);
        let handle = places.values().nth(rng.random_range(0..places.len().max(1)))?;
        let super::Content::Memory(content) = &handle.content else { return None };
        let in_content = rng.random_bool(0.5) && content.len > 0;
        let offset = if in_content { rng.random_range(0..content.len) } else { content.len };
        content.damaged.store(offset, Ordering::Relaxed);
        Some(content.at(offset))
    }

    fn check_space(&self) -> io::Result<()> {
        if self.0.full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

struct Writer {
    store: MemorySnapshots,
    place: Place,
    pieces: Vec<Bytes>,
}

impl SnapshotStore for MemorySnapshots {
    fn create(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Box<dyn SnapshotWriter>> {
        self.check_space()?;
        Ok(Box::new(Writer { store: self.clone(), place: (group, replica), pieces: Vec::new() }))
    }

    fn latest(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Option<SnapshotHandle>> {
        let handle = self.0.places.lock().get(&(group, replica)).cloned();
        if let Some(super::Content::Memory(content)) = handle.as_ref().map(|handle| &handle.content) {
            content.check_end()?;
        }
        Ok(handle)
    }

    fn remove(&self, group: PartitionId, replica: ReplicaId) -> io::Result<()> {
        self.0.places.lock().remove(&(group, replica));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<Place>> {
        Ok(self.0.places.lock().keys().copied().collect())
    }

    fn blocking(&self) -> bool {
        false
    }
}

impl SnapshotWriter for Writer {
    fn write(&mut self, content: Bytes) -> io::Result<()> {
        self.store.check_space()?;
        if !content.is_empty() {
            self.pieces.push(content);
        }
        Ok(())
    }

    fn finish(self: Box<Self>, meta: Bytes) -> io::Result<SnapshotHandle> {
        self.store.check_space()?;
        let Self { store, place, pieces } = *self;
        let len = pieces.iter().map(|piece| piece.len() as u64).sum();
        let content = Arc::new(Content { place, pieces, len, damaged: AtomicU64::new(SOUND) });
        let handle = SnapshotHandle { meta, len, content: super::Content::Memory(content) };
        store.0.places.lock().insert(place, handle.clone());
        Ok(handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: PartitionId = PartitionId(7);
    const R: ReplicaId = ReplicaId(3);

    fn put(store: &MemorySnapshots, replica: ReplicaId) -> io::Result<()> {
        let mut writer = store.create(G, replica)?;
        for _ in 0..4 {
            writer.write(Bytes::from_static(&[7; 25]))?;
        }
        writer.finish("about".into()).map(drop)
    }

    fn read_all(handle: &SnapshotHandle) -> io::Result<u64> {
        let mut read = 0;
        while read < handle.len {
            read += handle.read(read, 10)?.len() as u64;
        }
        Ok(read)
    }

    #[test]
    fn a_damaged_snapshot_is_found_out_and_gone_once_it_is_replaced() {
        let (mut at_once, mut when_read) = (0, 0);
        for seed in 0..100 {
            let store = MemorySnapshots::default();
            assert_eq!(store.rot(seed), None);
            put(&store, R).unwrap();
            let before = store.latest(G, R).unwrap().unwrap();
            let place = store.rot(seed).unwrap();
            let error = match store.latest(G, R) {
                Err(error) => {
                    at_once += 1;
                    assert_eq!(read_all(&before).unwrap(), 100, "what a handle reads is sound");
                    error
                }
                Ok(handle) => {
                    when_read += 1;
                    assert!(read_all(&before).is_err(), "a handle reads the same bytes");
                    read_all(&handle.unwrap()).unwrap_err()
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains(&place) && place.contains("p7 r3"), "{error}");
            put(&store, R).unwrap();
            assert_eq!(read_all(&store.latest(G, R).unwrap().unwrap()).unwrap(), 100);
        }
        assert!(at_once > 20 && when_read > 20, "{at_once} {when_read}");
    }

    #[test]
    fn without_space_the_snapshot_before_stays() {
        let store = MemorySnapshots::default();
        put(&store, R).unwrap();
        let mut writer = store.create(G, R).unwrap();
        store.set_full(true);
        assert_eq!(put(&store, R).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(writer.write("x".into()).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(writer.finish("new".into()).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(store.latest(G, R).unwrap().unwrap().meta, "about");
        store.set_full(false);
        put(&store, ReplicaId(4)).unwrap();
        assert_eq!(store.list().unwrap().len(), 2);
    }
}
