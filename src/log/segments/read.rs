//! Reads a log from its directory, and tells a torn end from damage.
//!
//! Records are taken in log order, and the last word counts. That is right although the oldest segments are gone: an
//! entry, vote or marker that was needed when a segment went had been written again before, by the one thread that
//! writes, at a moment when it was the newest; and whatever ended an entry stands behind it in the log, so is still there
//! if the entry is.
//!
//! Frame `n + 1` is begun only when `n` is on the disk. Where no frame `n` can be read the log ends, if nothing proves
//! that `n` was on the disk: a head of a later frame, found anywhere behind, or a segment that is begun only after it.
//! What is dropped then was never acknowledged, or it is the very last synced frame, all by itself at the end of the log,
//! and rotten: those two cannot be told apart. A log that was closed ends with an empty frame, which proves all before it.

use super::{
    Place, corrupt,
    frame::{Change, FrameHead, HEAD_BYTES, Item, SegmentHead, items},
    index::{Mark, Marks, Spot},
};
use crate::plant::{Bug, planted};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

const EXTENSION: &str = "segment";

/// A replica as it was found: its marks, and its live entries with their places.
#[derive(Default)]
pub(super) struct Replica {
    pub(super) marks: Marks,
    pub(super) entries: BTreeMap<u64, (Spot, Bytes)>,
}

/// A log as it is on the disk.
pub(super) struct Found {
    pub(super) id: u64,
    pub(super) replicas: BTreeMap<Place, Replica>,
    pub(super) meta: BTreeMap<String, Mark>,
    /// Segments, with the number of the first frame of each. The log ends in the last of them.
    pub(super) segments: BTreeMap<u64, u64>,
    /// Segments behind the end, of which nothing counts.
    pub(super) surplus: Vec<u64>,
    /// Where the next frame goes in the last segment.
    pub(super) end: u64,
    /// Number of the next frame.
    pub(super) next: u64,
    /// The oldest segment that is needed.
    pub(super) oldest: u64,
}

/// File of a segment.
pub(super) fn path_of(dir: &Path, segment: u64) -> PathBuf {
    dir.join(format!("{segment:016}.{EXTENSION}"))
}

/// The segments of a directory, in order.
///
/// # Errors
/// When it cannot be read, or one of them is missing.
pub(super) fn segments(dir: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
        found.push(number.ok_or_else(|| corrupt(dir, format!("{} is no segment's name", path.display())))?);
    }
    found.sort_unstable();
    match found.windows(2).find(|pair| pair[0] + 1 != pair[1]) {
        Some(gap) => Err(corrupt(dir, format!("{} is missing", path_of(dir, gap[0] + 1).display()))),
        None => Ok(found),
    }
}

/// Reads all `segments`; changes nothing.
///
/// # Errors
/// When they cannot be read, or what was synced has changed; names the place.
pub(super) fn load(dir: &Path, segments: &[u64]) -> io::Result<Found> {
    let mut found = Found {
        id: 0,
        replicas: BTreeMap::new(),
        meta: BTreeMap::new(),
        segments: BTreeMap::new(),
        surplus: Vec::new(),
        end: 0,
        next: 0,
        oldest: 0,
    };
    for (place, segment) in segments.iter().enumerate() {
        let path = path_of(dir, *segment);
        let bytes = read(&path)?;
        let head = SegmentHead::decode(&bytes).map_err(|why| corrupt(dir, format!("{}: {why}", path.display())))?;
        if place == 0 {
            (found.id, found.next) = (head.id, head.first);
        }
        if head != (SegmentHead { id: found.id, segment: *segment, first: found.next }) {
            let why = format!("{} does not follow: frame {} should be its first", path.display(), found.next);
            return Err(corrupt(dir, why));
        }
        found.segments.insert(*segment, head.first);
        if !found.take_segment(dir, &path, &bytes)? {
            found.stop(dir, (&path, &bytes), &segments[place + 1..])?;
            return found.checked(dir);
        }
    }
    let why = match segments.last() {
        Some(last) => format!("{} is missing: the log goes on there", path_of(dir, last + 1).display()),
        None => "its segments are missing".into(),
    };
    Err(corrupt(dir, why))
}

impl Found {
    /// Takes the frames of a segment. Returns whether the log goes on in the next one.
    fn take_segment(&mut self, dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<bool> {
        let mut offset = HEAD_BYTES;
        loop {
            self.end = offset as u64;
            let rest = &bytes[offset..];
            let head = FrameHead::decode(self.id, rest).filter(|head| head.number == self.next);
            let Some((head, payload)) = head.and_then(|head| Some((head, head.payload(rest)?))) else {
                return Ok(false);
            };
            let spot = Spot { frame: self.next, offset: self.end };
            let damaged = |why: String| corrupt(dir, format!("{} at offset {}: {why}", path.display(), spot.offset));
            let items = items(payload).ok_or_else(|| damaged("an unknown record".into()))?;
            (self.next, self.oldest) = (self.next + 1, head.oldest);
            offset += HEAD_BYTES + payload.len();
            for item in items {
                match item {
                    Item::Of(place, change) => {
                        let replica = self.replicas.entry(place).or_default();
                        if replica.marks.tombstone.is_some() && change != Change::Tombstone {
                            return Err(damaged(format!("{} {} was destroyed, yet it goes on", place.0, place.1)));
                        }
                        replica.apply(change, spot);
                    }
                    Item::Meta { name, value } => {
                        let value = Bytes::copy_from_slice(value);
                        self.meta.insert(name.to_owned(), Mark { frame: spot.frame, value });
                    }
                    Item::End => return Ok(true),
                }
            }
        }
    }

    /// No frame can be read behind `self.end`: that must be the end of the log.
    fn stop(&mut self, dir: &Path, (path, bytes): (&Path, &[u8]), after: &[u64]) -> io::Result<()> {
        let end = usize::try_from(self.end).map_err(io::Error::other)?;
        let mut later = self.later_frame(&bytes[end..]).map(|frame| (frame, path.to_owned()));
        for segment in after {
            let path = path_of(dir, *segment);
            // A second one is begun only when the first one has been written to.
            later = later.or(self.later_frame(&read(&path)?).map(|frame| (frame, path.clone())));
            if *segment != after[0] {
                later.get_or_insert((self.next + 1, path));
            }
        }
        self.surplus = after.to_vec();
        match later {
            Some((frame, holds)) if !planted(Bug::DamageTakenForTornTail) => Err(corrupt(
                dir,
                format!(
                    "{} at offset {end}: frame {} cannot be read, yet there is frame {frame} in {}: bytes have changed on \
                     the disk. This node cannot be trusted to remember what it acknowledged: remove its data directory \
                     and let it join anew",
                    path.display(),
                    self.next,
                    holds.display(),
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Number of a frame that was begun only after the one which cannot be read was on the disk.
    fn later_frame(&self, bytes: &[u8]) -> Option<u64> {
        let mut rest = bytes;
        while let Some(skip) = rest.iter().position(|byte| *byte == self.id.to_le_bytes()[0]) {
            rest = &rest[skip..];
            if let Some(head) = FrameHead::decode(self.id, rest).filter(|head| head.number > self.next) {
                return Some(head.number);
            }
            rest = &rest[1..];
        }
        None
    }

    /// The same, if it is whole.
    fn checked(self, dir: &Path) -> io::Result<Self> {
        if let Some((first, _)) = self.segments.first_key_value().filter(|(first, _)| **first > self.oldest.max(1)) {
            return Err(corrupt(dir, format!("{} is missing", path_of(dir, first - 1).display())));
        }
        for ((group, replica), found) in &self.replicas {
            let mut before = found.marks.purged.as_ref().map(|(upto, _)| *upto);
            for index in found.entries.keys() {
                if let Some(before) = before.filter(|before| before.checked_add(1) != Some(*index)) {
                    return Err(corrupt(dir, format!("{group} {replica}: entry {index} follows {before}")));
                }
                before = Some(*index);
            }
        }
        Ok(self)
    }
}

impl Replica {
    fn apply(&mut self, change: Change<'_>, spot: Spot) {
        let mark = |value: &[u8]| Mark { frame: spot.frame, value: Bytes::copy_from_slice(value) };
        match change {
            Change::Append { first, entries } => {
                let entries = entries.into_iter().map(|entry| (spot, Bytes::copy_from_slice(entry)));
                self.entries.extend((first..).zip(entries));
            }
            Change::Vote(vote) => self.marks.vote = Some(mark(vote)),
            Change::Truncate { from } => drop(self.entries.split_off(&from)),
            Change::Purge { upto, marker } => {
                self.entries = self.entries.split_off(&upto.saturating_add(1));
                self.marks.purged = Some((upto, mark(marker)));
            }
            Change::Committed(hint) => self.marks.committed = Some(mark(hint)),
            Change::Tombstone => {
                self.entries.clear();
                self.marks = Marks { tombstone: Some(spot.frame), ..Marks::default() };
            }
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    fs::read(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
