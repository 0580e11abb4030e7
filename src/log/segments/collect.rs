//! Lets old segments go, and copies forward what pins them.
//!
//! The oldest segment goes when nothing in it is needed. Entries of groups that are written to go away by themselves: they
//! are purged. When the log is longer than [`segments_max`] the live entries of the oldest segment are written again, as
//! ordinary records of the frames under way, some with each; votes, markers and the like are small, and are written
//! again as soon as nothing else pins the oldest segment. The copies are in memory nowhere: they come from the disk.
//!
//! Invariants:
//! * what is copied is live at the moment when its frame is made, so it is the newest of its kind when it is read back;
//! * a frame that says that a segment is not needed is, or stands behind, the frame that made that true.

use super::{
    Place, corrupt,
    frame::{self, Change, FrameHead, HEAD_BYTES, Item},
    index::{Known, Mark},
    read::path_of,
    writer::Writer,
};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

/// Segments of a log that are left alone besides twice what is live.
pub const SEGMENTS_KEPT: u64 = 2;

/// Bytes copied with one frame, or as many as the frame's own records take if that is more: copying keeps up with writing.
const COPY_BYTES: usize = 1 << 20;

/// Segments that a log may have while `live_bytes` are live; more, and the oldest is copied forward.
pub(super) const fn segments_max(live_bytes: u64, segment_bytes: u64) -> u64 {
    SEGMENTS_KEPT + (2 * live_bytes).div_ceil(segment_bytes)
}

/// The work on the oldest segment.
#[derive(Default)]
pub(super) struct Collector {
    /// There may be something to do.
    look: bool,
    copying: Option<Copying>,
}

/// A segment whose live entries are being copied.
struct Copying {
    file: File,
    path: PathBuf,
    /// Frames with live entries: number and place in the file, and whose.
    frames: BTreeMap<u64, (u64, BTreeSet<Place>)>,
}

impl Collector {
    /// The log has become longer.
    pub(super) const fn look(&mut self) {
        self.look = true;
    }
}

impl Writer {
    /// Adds to the frame what is to be copied with it, and settles which segments are needed once it is on the disk.
    pub(super) fn collect(&mut self) -> io::Result<()> {
        if self.collector.look && self.collector.copying.is_none() {
            self.collector.look = false;
            self.plan()?;
        }
        let Some(mut copying) = self.collector.copying.take() else { return Ok(()) };
        let most = self.frame.len() + COPY_BYTES.max(self.frame.len());
        while self.frame.len() < most {
            let Some((number, (offset, places))) = copying.frames.pop_first() else { break };
            self.copy_frame(&copying, number, offset, &places)?;
        }
        match copying.frames.is_empty() {
            true => self.collector.look = true,
            false => self.collector.copying = Some(copying),
        }
        Ok(())
    }

    /// Lets go of segments of which nothing is needed, and begins to copy the oldest one if it is time.
    fn plan(&mut self) -> io::Result<()> {
        let needed = self.oldest_frame_needed();
        let last = self.files.last();
        while self.files.oldest < last && self.first_frame_after(self.files.oldest) <= needed {
            self.files.oldest += 1;
        }
        let oldest = self.files.oldest;
        if oldest == last {
            return Ok(());
        }
        let (limit, mut live_bytes) = (self.first_frame_after(oldest), 0);
        let mut frames: BTreeMap<u64, (u64, BTreeSet<Place>)> = BTreeMap::new();
        for (place, known) in &self.replicas {
            live_bytes += known.live_bytes();
            for (_, spot) in known.runs().filter(|(_, spot)| spot.frame < limit) {
                frames.entry(spot.frame).or_insert((spot.offset, BTreeSet::new())).1.insert(*place);
            }
        }
        let over = last - oldest + 1 > segments_max(live_bytes, self.segment_bytes);
        if over || frames.is_empty() {
            self.copy_marks(limit);
            let path = path_of(&self.files.dir, oldest);
            self.collector.copying = Some(Copying { file: File::open(&path)?, path, frames });
        }
        Ok(())
    }

    fn first_frame_after(&self, segment: u64) -> u64 {
        self.files.segments.get(&(segment + 1)).copied().unwrap_or(self.number)
    }

    fn oldest_frame_needed(&self) -> u64 {
        let of_replicas = self
            .replicas
            .values()
            .flat_map(|known| known.runs().map(|(_, spot)| spot.frame).chain(known.marks.oldest_frame()));
        let of_meta = self.meta.lock().values().map(|mark| mark.frame).min();
        of_replicas.chain(of_meta).min().unwrap_or(self.number)
    }

    /// Writes again what is no entry and stands before frame `limit`.
    fn copy_marks(&mut self, limit: u64) {
        let (frame, number) = (&mut self.frame, self.number);
        let old = |mark: &Mark| mark.frame < limit;
        for (place, known) in &mut self.replicas {
            if let Some(vote) = known.marks.vote.as_mut().filter(|vote| old(vote)) {
                frame::put_vote(frame, *place, &vote.value);
                vote.frame = number;
            }
            if let Some(hint) = known.marks.committed.as_mut().filter(|hint| old(hint)) {
                frame::put_committed(frame, *place, &hint.value);
                hint.frame = number;
            }
            if let Some((upto, marker)) = known.marks.purged.as_mut().filter(|(_, marker)| old(marker)) {
                frame::put_purge(frame, *place, *upto, &marker.value);
                marker.frame = number;
            }
            if let Some(tombstone) = known.marks.tombstone.as_mut().filter(|tombstone| **tombstone < limit) {
                frame::put_tombstone(frame, *place);
                *tombstone = number;
            }
        }
        for (name, mark) in self.meta.lock().iter_mut().filter(|(_, mark)| old(mark)) {
            frame::put_meta(frame, name, &mark.value);
            mark.frame = number;
        }
    }

    /// Writes again those entries of a frame that are still live.
    fn copy_frame(&mut self, from: &Copying, number: u64, offset: u64, places: &BTreeSet<Place>) -> io::Result<()> {
        let live = |known: &Known| known.runs().any(|(_, spot)| spot.frame == number);
        if !places.iter().any(|place| self.replicas.get(place).is_some_and(live)) {
            return Ok(());
        }
        let damaged = |why| corrupt(&self.files.dir, format!("{} at offset {offset}: {why}", from.path.display()));
        let bytes = read_frame(&from.file, self.files.id, (number, offset))?;
        let entries = bytes.as_deref().and_then(|payload| entries_of(payload, places));
        let entries = entries.ok_or_else(|| damaged("a frame can no longer be read"))?;
        let to = self.files.spot(self.number);
        for place in places {
            let Some(known) = self.replicas.get_mut(place) else { continue };
            for (indexes, _) in known.runs().filter(|(_, spot)| spot.frame == number) {
                let found: Vec<&[u8]> =
                    indexes.clone().filter_map(|index| entries.get(&(*place, index)).copied()).collect();
                if found.len() as u64 != indexes.end - indexes.start {
                    return Err(damaged("entries are missing"));
                }
                frame::put_append(&mut self.frame, *place, indexes.start, found.into_iter());
            }
            known.moved(number, to);
        }
        Ok(())
    }
}

impl Writer {
    /// See [`LogEngine::read`](super::super::LogEngine::read).
    pub(super) fn read_entries(&self, place: Place, indexes: Range<u64>, bytes_max: usize) -> io::Result<Vec<Bytes>> {
        let (mut read, mut bytes) = (Vec::new(), 0);
        let Some(known) = self.replicas.get(&place) else { return Ok(read) };
        for (run, spot) in known.runs() {
            let next = indexes.start + read.len() as u64;
            let wanted = next..run.end.min(indexes.end);
            if wanted.is_empty() || !run.contains(&next) {
                continue;
            }
            let (segment, _) = self.files.segments.iter().rev().find(|(_, first)| **first <= spot.frame).unzip();
            let path = path_of(&self.files.dir, segment.copied().unwrap_or_default());
            let damaged =
                |why| corrupt(&self.files.dir, format!("{} at offset {}: {why}", path.display(), spot.offset));
            let payload = read_frame(&File::open(&path)?, self.files.id, (spot.frame, spot.offset))?;
            let entries = payload.as_deref().and_then(|payload| entries_of(payload, &BTreeSet::from([place])));
            let entries = entries.ok_or_else(|| damaged("a frame can no longer be read"))?;
            for index in wanted {
                let entry = entries.get(&(place, index)).ok_or_else(|| damaged("entries are missing"))?;
                bytes += entry.len();
                if !read.is_empty() && bytes > bytes_max {
                    return Ok(read);
                }
                read.push(Bytes::copy_from_slice(entry));
            }
        }
        Ok(read)
    }
}

/// The payload of a frame; `None` if it is not there any more.
fn read_frame(file: &File, id: u64, (number, offset): (u64, u64)) -> io::Result<Option<Vec<u8>>> {
    let mut frame = vec![0; HEAD_BYTES];
    file.read_exact_at(&mut frame, offset)?;
    let rest = file.metadata()?.len() - offset;
    let Some(head) = FrameHead::decode(id, &frame).filter(|head| head.number == number && head.len < rest) else {
        return Ok(None);
    };
    frame.resize(HEAD_BYTES + usize::try_from(head.len).map_err(io::Error::other)?, 0);
    file.read_exact_at(&mut frame[HEAD_BYTES..], offset + HEAD_BYTES as u64)?;
    Ok(head.payload(&frame).map(<[u8]>::to_vec))
}

/// The entries of a payload that some replicas have when all of it is done.
fn entries_of<'a>(payload: &'a [u8], places: &BTreeSet<Place>) -> Option<BTreeMap<(Place, u64), &'a [u8]>> {
    let mut found = BTreeMap::new();
    for item in frame::items(payload)? {
        // What was cut is not live, unless it was written once more: then that comes later.
        if let Item::Of(place, Change::Append { first, entries }) = item
            && places.contains(&place)
        {
            found.extend((first..).zip(entries).map(|(index, entry)| ((place, index), entry)));
        }
    }
    Some(found)
}
