//! Snapshots of replicas: one per replica, replaced as a whole, as a file or in memory.
//!
//! A file is a header, the content in chunks of [`CHUNK_BYTES`] each followed by its checksum, and the metadata:
//!
//! ```text
//! magic 8 · format u32 · metadata length u32 · content length u64 · id u64 · CRC-32 of the above
//! ( chunk · CRC-32 of id, number of the chunk and chunk )*
//! metadata · CRC-32 of id and metadata
//! ```
//!
//! Numbers are little-endian. The id is drawn anew for each file, so that a chunk of another snapshot at the same place
//! is found out.
//!
//! Invariants:
//! * a snapshot is there completely or not at all: it is written beside the old one, synced, renamed over it, and the
//!   directory synced, before `finish` returns;
//! * no damaged byte is ever returned: every read checks what it returns, errors name file and offset;
//! * a handle goes on reading its own snapshot when that is replaced or removed.

mod memory;

pub use memory::MemorySnapshots;

use crate::{
    control::Control,
    env,
    key::{PartitionId, ReplicaId},
    plant::{Bug, planted},
};
use bytes::{Bytes, BytesMut};
use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Content bytes per checksum.
pub const CHUNK_BYTES: usize = 256 << 10;

/// Chunks between two syncs of a file that is being written. The sync of a file that has grown by hundreds of megabytes would
/// keep the log's own syncs waiting until all of it is on the disk.
const SYNC_CHUNKS: u64 = 16;

/// Longest metadata.
pub const META_BYTES_MAX: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"MRDNSNAP";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 36;
const CRC_BYTES: usize = 4;
const SUFFIX: &str = ".snapshot";
const UNFINISHED: &str = ".unfinished";

/// Keeps one snapshot per replica.
pub trait SnapshotStore: Send + Sync + 'static {
    /// Begins a snapshot. What is there stays until the new one is finished.
    ///
    /// # Errors
    /// When the file cannot be made.
    fn create(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Box<dyn SnapshotWriter>>;

    /// The snapshot of a replica; `None` if there is none.
    ///
    /// # Errors
    /// When it is damaged or cannot be read.
    fn latest(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Option<SnapshotHandle>>;

    /// Removes the snapshot of a replica, if there is one.
    ///
    /// # Errors
    /// When that could not be made durable.
    fn remove(&self, group: PartitionId, replica: ReplicaId) -> io::Result<()>;

    /// The replicas that have a snapshot, in order.
    ///
    /// # Errors
    /// When the directory cannot be read.
    fn list(&self) -> io::Result<Vec<(PartitionId, ReplicaId)>>;

    /// Whether calls to this store, its writers and its handles wait for a disk: then they do not belong on runtime
    /// threads. `list` and `latest` read little; `write`, `finish`, `remove` and reading content can take long.
    fn blocking(&self) -> bool;
}

/// Writes one snapshot. Dropped unfinished, it leaves nothing.
pub trait SnapshotWriter: Send {
    /// Adds content.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write(&mut self, content: Bytes) -> io::Result<()>;

    /// Makes the snapshot durable and the replica's latest. `meta` is returned with it.
    ///
    /// # Errors
    /// When it cannot be made durable; the one before stays.
    fn finish(self: Box<Self>, meta: Bytes) -> io::Result<SnapshotHandle>;
}

/// One finished snapshot.
#[derive(Clone)]
pub struct SnapshotHandle {
    /// What was given to `finish`.
    pub meta: Bytes,
    /// Bytes of content.
    pub len: u64,
    content: Content,
}

#[derive(Clone)]
enum Content {
    File(Arc<FileContent>),
    Memory(Arc<memory::Content>),
}

impl SnapshotHandle {
    /// Content from `offset` on: not empty unless `offset` is the end, at most `max` bytes, possibly fewer.
    ///
    /// # Errors
    /// When the content is damaged or cannot be read.
    pub fn read(&self, offset: u64, max: usize) -> io::Result<Bytes> {
        if offset >= self.len || max == 0 {
            return Ok(Bytes::new());
        }
        match &self.content {
            Content::File(file) => {
                let chunk = file.chunk(offset / CHUNK_BYTES as u64, self.len)?;
                let start = (offset % CHUNK_BYTES as u64) as usize;
                Ok(chunk.slice(start..chunk.len().min(start.saturating_add(max))))
            }
            Content::Memory(content) => content.read(offset, max),
        }
    }
}

impl std::fmt::Debug for SnapshotHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotHandle({} bytes, {} of metadata)", self.len, self.meta.len())
    }
}

/// Snapshots as files of one directory.
#[derive(Debug)]
pub struct FileSnapshots {
    dir: PathBuf,
    control: Option<Arc<Control>>,
}

impl FileSnapshots {
    /// Opens or makes the directory, and clears away what an earlier life did not finish.
    ///
    /// # Errors
    /// When the directory cannot be made, read or cleared.
    pub fn open(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(UNFINISHED) {
                fs::remove_file(&path)?;
            }
        }
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { dir, control: None })
    }

    /// The same, on a disk that does what a drill makes it do.
    #[must_use]
    pub fn controlled(self, control: Option<Arc<Control>>) -> Self {
        Self { control, ..self }
    }

    fn path(&self, group: PartitionId, replica: ReplicaId) -> PathBuf {
        self.dir.join(format!("{}-{}{SUFFIX}", group.0, replica.0))
    }
}

impl SnapshotStore for FileSnapshots {
    fn create(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Box<dyn SnapshotWriter>> {
        let id = env::random_u64();
        let path = self.path(group, replica);
        let unfinished = self.dir.join(format!("{}-{}-{id:016x}{UNFINISHED}", group.0, replica.0));
        let mut file = File::options().read(true).write(true).create_new(true).open(&unfinished)?;
        file.write_all(&[0; HEADER_BYTES])?;
        let control = self.control.clone();
        let (file, pending) = (Some(file), BytesMut::new());
        Ok(Box::new(FileWriter { file, control, unfinished, path, id, pending, chunks: 0, len: 0 }))
    }

    fn latest(&self, group: PartitionId, replica: ReplicaId) -> io::Result<Option<SnapshotHandle>> {
        let path = self.path(group, replica);
        match File::open(&path) {
            Ok(file) => FileContent::open(file, &path).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path, error)),
        }
    }

    fn remove(&self, group: PartitionId, replica: ReplicaId) -> io::Result<()> {
        match fs::remove_file(self.path(group, replica)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => File::open(&self.dir)?.sync_all(),
        }
    }

    fn list(&self) -> io::Result<Vec<(PartitionId, ReplicaId)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let ids = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).and_then(|name| name.split_once('-'));
            if let Some((Ok(group), Ok(replica))) = ids.map(|(group, replica)| (group.parse(), replica.parse())) {
                found.push((PartitionId(group), ReplicaId(replica)));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn blocking(&self) -> bool {
        true
    }
}

struct FileWriter {
    /// Taken by `finish`.
    file: Option<File>,
    control: Option<Arc<Control>>,
    unfinished: PathBuf,
    path: PathBuf,
    id: u64,
    pending: BytesMut,
    chunks: u64,
    len: u64,
}

impl FileWriter {
    fn write_chunk(&mut self, chunk: &[u8]) -> io::Result<()> {
        let crc = chunk_crc(self.id, self.chunks, chunk);
        let file = self.file.as_mut().ok_or_else(|| io::Error::other("snapshot already finished"))?;
        file.write_all(chunk)?;
        file.write_all(&crc.to_le_bytes())?;
        self.chunks += 1;
        self.len += chunk.len() as u64;
        if self.chunks.is_multiple_of(SYNC_CHUNKS) {
            self.control.as_ref().map_or(Ok(()), |control| control.before_sync())?;
            file.sync_data()?;
        }
        Ok(())
    }
}

impl SnapshotWriter for FileWriter {
    fn write(&mut self, content: Bytes) -> io::Result<()> {
        self.pending.extend_from_slice(&content);
        while self.pending.len() >= CHUNK_BYTES {
            let chunk = self.pending.split_to(CHUNK_BYTES);
            self.write_chunk(&chunk)?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>, meta: Bytes) -> io::Result<SnapshotHandle> {
        if meta.len() > META_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "snapshot metadata is too long"));
        }
        let rest = std::mem::take(&mut self.pending);
        if !rest.is_empty() {
            self.write_chunk(&rest)?;
        }
        let mut file = self.file.take().ok_or_else(|| io::Error::other("snapshot already finished"))?;
        file.write_all(&meta)?;
        file.write_all(&meta_crc(self.id, &meta).to_le_bytes())?;
        file.write_all_at(&header(meta.len() as u32, self.len, self.id), 0)?;
        self.control.as_ref().map_or(Ok(()), |control| control.before_sync())?;
        file.sync_all()?;
        fs::rename(&self.unfinished, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        FileContent::open(file, &self.path)
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        // After a rename there is nothing of this name; otherwise opening the store clears it away as well.
        let _ = fs::remove_file(&self.unfinished);
    }
}

struct FileContent {
    file: File,
    path: PathBuf,
    id: u64,
}

impl FileContent {
    /// Checks header, length and metadata; content is checked when it is read.
    fn open(file: File, path: &Path) -> io::Result<SnapshotHandle> {
        let mut head = [0; HEADER_BYTES];
        file.read_exact_at(&mut head, 0).map_err(|error| at(path, error))?;
        let number = |from: usize| u32::from_le_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]]);
        let long = |from: usize| u64::from(number(from)) | u64::from(number(from + 4)) << 32;
        let (meta_len, len, id) = (number(12), long(16), long(24));
        if head[..8] != MAGIC {
            return Err(corrupt(path, 0, "this is not a snapshot"));
        }
        if head != header(meta_len, len, id)[..] {
            let format = number(8);
            let why = if format == FORMAT { "header checksum".into() } else { format!("unknown format {format}") };
            return Err(corrupt(path, 8, &why));
        }
        let chunks = len.div_ceil(CHUNK_BYTES as u64);
        let meta_at = HEADER_BYTES as u64 + len + chunks * CRC_BYTES as u64;
        let total = meta_at + u64::from(meta_len) + CRC_BYTES as u64;
        let actual = file.metadata()?.len();
        if actual != total {
            return Err(corrupt(path, actual.min(total), &format!("{actual} bytes instead of {total}")));
        }
        let content = Self { file, path: path.to_owned(), id };
        let (meta, crc) = content.checked(meta_at, meta_len as usize)?;
        if crc != meta_crc(id, &meta) {
            return Err(corrupt(path, meta_at, "metadata checksum"));
        }
        Ok(SnapshotHandle { meta, len, content: Content::File(Arc::new(content)) })
    }

    fn chunk(&self, number: u64, len: u64) -> io::Result<Bytes> {
        let start = number * CHUNK_BYTES as u64;
        let place = HEADER_BYTES as u64 + start + number * CRC_BYTES as u64;
        let (chunk, crc) = self.checked(place, (len - start).min(CHUNK_BYTES as u64) as usize)?;
        if crc != chunk_crc(self.id, number, &chunk) && !planted(Bug::ChecksumIgnored) {
            return Err(corrupt(&self.path, place, "content checksum"));
        }
        Ok(chunk)
    }

    /// The bytes at `place` and the checksum that follows them.
    fn checked(&self, place: u64, len: usize) -> io::Result<(Bytes, u32)> {
        let mut bytes = vec![0; len + CRC_BYTES];
        self.file.read_exact_at(&mut bytes, place).map_err(|error| at(&self.path, error))?;
        let mut crc = [0; CRC_BYTES];
        crc.copy_from_slice(&bytes[len..]);
        bytes.truncate(len);
        Ok((bytes.into(), u32::from_le_bytes(crc)))
    }
}

fn header(meta_len: u32, len: u64, id: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&FORMAT.to_le_bytes());
    header.extend_from_slice(&meta_len.to_le_bytes());
    header.extend_from_slice(&len.to_le_bytes());
    header.extend_from_slice(&id.to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    header
}

fn chunk_crc(id: u64, number: u64, chunk: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&id.to_le_bytes());
    crc.update(&number.to_le_bytes());
    crc.update(chunk);
    crc.finalize()
}

fn meta_crc(id: u64, meta: &[u8]) -> u32 {
    chunk_crc(id, u64::MAX, meta)
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn corrupt(path: &Path, offset: u64, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: damaged at offset {offset}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: PartitionId = PartitionId(7);
    const R: ReplicaId = ReplicaId(3);

    fn content(len: usize, salt: u8) -> Bytes {
        (0..len).map(|n| (n as u8).wrapping_mul(31) ^ salt ^ (n >> 8) as u8).collect()
    }

    fn put(store: &dyn SnapshotStore, content: &Bytes, piece: usize, meta: &'static str) -> SnapshotHandle {
        let mut writer = store.create(G, R).unwrap();
        for piece in content.chunks(piece) {
            writer.write(content.slice_ref(piece)).unwrap();
        }
        writer.finish(meta.into()).unwrap()
    }

    fn read_all(handle: &SnapshotHandle, max: usize) -> io::Result<Bytes> {
        let mut all = BytesMut::new();
        while (all.len() as u64) < handle.len {
            let piece = handle.read(all.len() as u64, max)?;
            assert!(!piece.is_empty() && piece.len() <= max);
            all.extend_from_slice(&piece);
        }
        assert!(handle.read(handle.len, max)?.is_empty());
        Ok(all.freeze())
    }

    fn stores() -> (tempfile::TempDir, Vec<Box<dyn SnapshotStore>>) {
        let dir = tempfile::tempdir().unwrap();
        let files = FileSnapshots::open(dir.path().join("snapshots")).unwrap();
        (dir, vec![Box::new(files), Box::new(MemorySnapshots::default())])
    }

    #[test]
    fn what_was_written_is_read_back_whatever_the_pieces() {
        let (_dir, stores) = stores();
        for store in &stores {
            assert!(store.latest(G, R).unwrap().is_none() && store.list().unwrap().is_empty());
            for len in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17] {
                let content = content(len, 1);
                for piece in [1_000, CHUNK_BYTES, 2 * CHUNK_BYTES + 5] {
                    put(store.as_ref(), &content, piece, "about");
                    let handle = store.latest(G, R).unwrap().unwrap();
                    assert_eq!((handle.len, handle.meta.as_ref()), (len as u64, b"about".as_ref()));
                    assert_eq!(read_all(&handle, 100_000).unwrap(), content);
                }
            }
            assert_eq!(store.list().unwrap(), [(G, R)]);
        }
    }

    #[test]
    fn a_handle_outlives_its_replacement_and_removal() {
        let (_dir, stores) = stores();
        for store in &stores {
            let (one, two) = (content(5_000, 1), content(6_000, 2));
            let first = put(store.as_ref(), &one, 512, "one");
            put(store.as_ref(), &two, 512, "two");
            assert_eq!(read_all(&first, 999).unwrap(), one);
            let second = store.latest(G, R).unwrap().unwrap();
            store.remove(G, R).unwrap();
            store.remove(G, R).unwrap();
            assert!(store.latest(G, R).unwrap().is_none());
            assert_eq!(read_all(&second, 999).unwrap(), two);
        }
    }

    #[test]
    fn an_interrupted_write_leaves_the_old_snapshot_and_no_litter() {
        let (dir, stores) = stores();
        let files = || fs::read_dir(dir.path().join("snapshots")).unwrap().count();
        for store in &stores {
            let old = content(1_000, 1);
            put(store.as_ref(), &old, 100, "old");
            let mut writer = store.create(G, R).unwrap();
            writer.write(content(CHUNK_BYTES * 2, 9)).unwrap();
            drop(writer);
            assert_eq!(read_all(&store.latest(G, R).unwrap().unwrap(), 999).unwrap(), old);
        }
        assert_eq!(files(), 1);
        // As after a loss of power: nobody dropped the writer.
        let mut writer = stores[0].create(G, R).unwrap();
        writer.write(content(CHUNK_BYTES * 2, 9)).unwrap();
        std::mem::forget(writer);
        assert_eq!(files(), 2);
        let again = FileSnapshots::open(dir.path().join("snapshots")).unwrap();
        assert_eq!(files(), 1);
        assert_eq!(again.latest(G, R).unwrap().unwrap().meta, "old");
    }

    #[test]
    fn damage_to_any_byte_and_any_cut_is_found() {
        let (_dir, stores) = stores();
        let store = &stores[0];
        put(store.as_ref(), &content(700, 5), 100, "metadata");
        let path = _dir.path().join("snapshots/7-3.snapshot");
        let whole = fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            store.latest(G, R).and_then(|handle| read_all(&handle.unwrap(), 300).map(drop))
        };
        open(&whole).unwrap();
        for place in 0..whole.len() {
            for bit in [0, 7] {
                let mut damaged = whole.clone();
                damaged[place] ^= 1 << bit;
                let error = open(&damaged).expect_err("damage").to_string();
                assert!(error.contains("7-3.snapshot") && error.contains("offset"), "{place}: {error}");
            }
        }
        for len in 0..whole.len() {
            open(&whole[..len]).expect_err("a cut");
        }
        open(&[whole.as_slice(), b"x"].concat()).expect_err("more than there should be");
    }

    #[test]
    fn chunks_that_changed_places_are_found() {
        let (dir, stores) = stores();
        put(stores[0].as_ref(), &content(2 * CHUNK_BYTES, 5), CHUNK_BYTES, "m");
        let path = dir.path().join("snapshots/7-3.snapshot");
        let mut bytes = fs::read(&path).unwrap();
        let (one, two) = bytes[HEADER_BYTES..].split_at_mut(CHUNK_BYTES + CRC_BYTES);
        one.swap_with_slice(&mut two[..CHUNK_BYTES + CRC_BYTES]);
        fs::write(&path, bytes).unwrap();
        let handle = stores[0].latest(G, R).unwrap().unwrap();
        assert_eq!(read_all(&handle, CHUNK_BYTES).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
