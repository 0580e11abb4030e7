//! The files of a log: the segment that is written, those before it, and a spare one to be written over.
//!
//! A file that is written over costs less than one that grows: its size and its blocks stay, so a sync writes data only.
//! Hence the spare file, and zeros ahead of the end of a file that has to grow. The number in every frame tells its bytes
//! from those of the file's earlier life.
//!
//! Invariants:
//! * a segment has its name only when its head is on the disk;
//! * of two neighbouring segments, the second is made before the first gets its end frame, and written after;
//! * a segment goes, the oldest first, only when a frame on the disk says that it is not needed.

use super::{
    corrupt,
    frame::{self, HEAD_BYTES, SegmentHead},
    index::Spot,
    read::{self, Found, path_of},
};
use crate::env;
use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

/// Bytes that a file grows by: few syncs have to note its size, and none of them has much to write.
const AHEAD_BYTES: usize = if cfg!(test) { 50 } else { 256 << 10 };
static AHEAD: [u8; AHEAD_BYTES] = [0; AHEAD_BYTES];

/// Held for as long as the log is open; has content once the log has a segment.
const LOCK_FILE: &str = "LOCK";
const LOCK_CONTENT: &[u8] = b"a log was begun here\n";
/// A file to be written over, or being made into a segment.
const SPARE_FILE: &str = "spare";
/// Where builds before this engine kept their log.
const OLDER_DIR: &str = "db";

pub(super) struct Files {
    pub(super) dir: PathBuf,
    dir_handle: File,
    _lock: File,
    pub(super) id: u64,
    pub(super) current: File,
    /// Where the next frame goes.
    offset: u64,
    /// Bytes of the file.
    size: u64,
    /// All segments, with the number of the first frame of each.
    pub(super) segments: BTreeMap<u64, u64>,
    /// The oldest segment that is needed, as the next frame will say.
    pub(super) oldest: u64,
    #[cfg(test)]
    pub(super) trace: super::tests::crash::Trace,
}

impl Files {
    /// Opens or makes the log in `dir`; cuts off a torn end.
    pub(super) fn open(dir: &Path) -> io::Result<(Self, Found)> {
        if dir.join(OLDER_DIR).exists() {
            let why = format!(
                "{}: holds the log of an older build ({OLDER_DIR}/, written by fjall), which this one cannot read: \
                 dump the rows with the older binary, or start this node with an empty data directory",
                dir.display()
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        fs::create_dir_all(dir)?;
        let lock = lock(dir)?;
        let dir_handle = File::open(dir)?;
        match fs::remove_file(dir.join(SPARE_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut segments = read::segments(dir)?;
        let begun = lock.metadata()?.len() > 0;
        if segments.is_empty() && !begun {
            make(dir, &dir_handle, SegmentHead { id: env::random_u64(), segment: 1, first: 1 })?;
            if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
            segments.push(1);
        }
        let found = read::load(dir, &segments)?;
        if !begun {
            lock.write_all_at(LOCK_CONTENT, 0)?;
            lock.sync_all()?;
        }
        for segment in found.surplus.iter().rev() {
            fs::remove_file(path_of(dir, *segment))?;
            dir_handle.sync_all()?;
        }
        let last = *found.segments.last_key_value().ok_or_else(|| corrupt(dir, "it has no segment"))?.0;
        let current = File::options().write(true).open(path_of(dir, last))?;
        if current.metadata()?.len() > found.end {
            tracing::info!(dir = %dir.display(), segment = last, offset = found.end, "what follows the log's end is cut");
            current.set_len(found.end)?;
            current.sync_all()?;
        }
        let files = Self {
            dir: dir.to_owned(),
            dir_handle,
            _lock: lock,
            id: found.id,
            current,
            offset: found.end,
            size: found.end,
            segments: found.segments.clone(),
            oldest: found.oldest.max(1),
            #[cfg(test)]
            trace: super::tests::crash::Trace { ops: None },
        };
        Ok((files, found))
    }

    /// The segment that is written.
    pub(super) fn last(&self) -> u64 {
        self.segments.last_key_value().map_or(0, |(segment, _)| *segment)
    }

    /// Bytes of the segment that is written.
    pub(super) const fn len(&self) -> u64 {
        self.offset
    }

    /// Where frame `number` will be, if it is the next.
    pub(super) const fn spot(&self, number: u64) -> Spot {
        Spot { frame: number, offset: self.offset }
    }

    /// Writes a frame, and waits until it is on the disk.
    pub(super) fn append(&mut self, frame: &mut [u8], number: u64) -> io::Result<()> {
        frame::finish(frame, self.id, number, self.oldest);
        #[cfg(test)]
        self.trace.write(&path_of(&self.dir, self.last()), self.offset, frame);
        self.current.write_all_at(frame, self.offset)?;
        let end = self.offset + frame.len() as u64;
        if end > self.size {
            #[cfg(test)]
            self.trace.write(&path_of(&self.dir, self.last()), end, &AHEAD);
            self.current.write_all_at(&AHEAD, end)?;
            self.size = end + AHEAD_BYTES as u64;
        }
        self.current.sync_data()?;
        self.offset = end;
        Ok(())
    }

    /// Goes on in a new segment; `number` is that of the end frame of the present one.
    pub(super) fn roll(&mut self, number: u64) -> io::Result<()> {
        let head = SegmentHead { id: self.id, segment: self.last() + 1, first: number + 1 };
        #[cfg(test)]
        self.trace.write(&self.dir.join(SPARE_FILE), 0, &head.encode());
        let next = make(&self.dir, &self.dir_handle, head)?;
        #[cfg(test)]
        self.trace.rename(&self.dir.join(SPARE_FILE), &path_of(&self.dir, head.segment));
        let mut end = Vec::new();
        frame::begin(&mut end);
        frame::put_end(&mut end);
        self.append(&mut end, number)?;
        (self.size, self.current, self.offset) = (next.metadata()?.len(), next, HEAD_BYTES as u64);
        self.segments.insert(head.segment, head.first);
        Ok(())
    }

    /// Lets go of the segments that are not needed. The last frame on the disk must say so.
    pub(super) fn recycle(&mut self) -> io::Result<()> {
        let spare = self.dir.join(SPARE_FILE);
        while let Some(oldest) = self.segments.first_entry().filter(|oldest| *oldest.key() < self.oldest) {
            let path = path_of(&self.dir, *oldest.key());
            #[cfg(test)]
            self.trace.rename(&path, &spare);
            // In the place of the spare file that there may be.
            fs::rename(path, &spare)?;
            self.dir_handle.sync_all()?;
            oldest.remove();
        }
        Ok(())
    }
}

fn lock(dir: &Path) -> io::Result<File> {
    let file = File::options().create(true).read(true).write(true).truncate(false).open(dir.join(LOCK_FILE))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::Error(error)) => Err(error),
        Err(TryLockError::WouldBlock) => {
            let why = format!("log in {}: in use by another process", dir.display());
            Err(io::Error::new(io::ErrorKind::ResourceBusy, why))
        }
    }
}

/// Makes an empty segment, of the spare file if there is one.
fn make(dir: &Path, dir_handle: &File, head: SegmentHead) -> io::Result<File> {
    let spare = dir.join(SPARE_FILE);
    let file = File::options().create(true).write(true).truncate(false).open(&spare)?;
    file.write_all_at(&head.encode(), 0)?;
    file.sync_all()?;
    fs::rename(spare, path_of(dir, head.segment))?;
    dir_handle.sync_all()?;
    Ok(file)
}
