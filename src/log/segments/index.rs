//! Where in the log the live records of a replica are.
//!
//! Pure. Invariants:
//! * every live entry belongs to exactly one run, and the runs are in the order of their indexes;
//! * what is here is what recovery would find, if all frames written so far were read in order.

use super::super::{Record, Recovered, extent::Extent};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
};

/// A frame: its number, and where in its segment it begins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Spot {
    pub(super) frame: u64,
    pub(super) offset: u64,
}

/// A small value of which only the newest counts, and the number of the frame that holds it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mark {
    pub(super) frame: u64,
    pub(super) value: Bytes,
}

/// What a replica has besides entries.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Marks {
    pub(super) vote: Option<Mark>,
    pub(super) committed: Option<Mark>,
    /// Last purged index, and its marker.
    pub(super) purged: Option<(u64, Mark)>,
    /// Frame of the tombstone.
    pub(super) tombstone: Option<u64>,
}

impl Marks {
    /// The oldest frame that is needed for them.
    pub(super) fn oldest_frame(&self) -> Option<u64> {
        let marks = [self.vote.as_ref(), self.committed.as_ref(), self.purged.as_ref().map(|(_, marker)| marker)];
        marks.into_iter().flatten().map(|mark| mark.frame).chain(self.tombstone).min()
    }
}

/// Neighbouring live entries that one frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// Index of the first.
    pub(super) first: u64,
    pub(super) spot: Spot,
    /// Mean bytes of an entry.
    mean_bytes: u64,
}

/// What the writer knows of a replica.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Known {
    pub(super) extent: Extent,
    pub(super) marks: Marks,
    runs: VecDeque<Run>,
}

impl Known {
    /// What recovery has found, as if it had been written just now.
    pub(super) fn of(marks: Marks, entries: &BTreeMap<u64, (Spot, Bytes)>) -> Self {
        let purged = marks.purged.as_ref().map(|(upto, _)| *upto);
        let live = match (entries.first_key_value(), entries.last_key_value()) {
            (Some((first, _)), Some((last, _))) => *first..*last + 1,
            _ => purged.map_or(0..0, |purged| purged + 1..purged + 1),
        };
        let mut runs: VecDeque<Run> = VecDeque::new();
        for (index, (spot, entry)) in entries {
            match runs.back_mut().filter(|run| run.spot == *spot) {
                // The mean of a long run leans to its last entries: it is good enough to count segments.
                Some(run) => run.mean_bytes = (run.mean_bytes + entry.len() as u64).div_ceil(2),
                None => runs.push_back(Run { first: *index, spot: *spot, mean_bytes: entry.len() as u64 }),
            }
        }
        Self { extent: Extent { live, purged, tombstone: marks.tombstone.is_some() }, marks, runs }
    }

    /// Takes in a record that the extent has admitted, and that `spot` holds. A commit hint is not in any frame yet.
    pub(super) fn apply(&mut self, record: &Record, spot: Spot) {
        let mark = |value: &Bytes| Mark { frame: spot.frame, value: value.clone() };
        match record {
            Record::Append { first, entries } if !entries.is_empty() => {
                let bytes: usize = entries.iter().map(Bytes::len).sum();
                self.runs.push_back(Run { first: *first, spot, mean_bytes: (bytes / entries.len()) as u64 });
            }
            Record::Vote(vote) => self.marks.vote = Some(mark(vote)),
            Record::Purge { upto, marker } => self.marks.purged = Some((*upto, mark(marker))),
            Record::Tombstone => self.marks = Marks { tombstone: Some(spot.frame), ..Marks::default() },
            Record::Append { .. } | Record::Truncate { .. } | Record::Committed(_) => {}
        }
        self.trim();
    }

    /// Takes the ends of what is no longer live off the runs.
    fn trim(&mut self) {
        let Range { start, end } = self.extent.live;
        while self.runs.back().is_some_and(|run| run.first >= end) {
            self.runs.pop_back();
        }
        while self.runs.get(1).is_some_and(|run| run.first <= start) {
            self.runs.pop_front();
        }
        if let Some(run) = self.runs.front_mut() {
            run.first = run.first.max(start);
        }
    }

    /// The runs, with the indexes of each.
    pub(super) fn runs(&self) -> impl Iterator<Item = (Range<u64>, Spot)> {
        let ends = self.runs.iter().skip(1).map(|run| run.first).chain([self.extent.live.end]);
        self.runs.iter().zip(ends).map(|(run, end)| (run.first..end, run.spot))
    }

    /// Bytes of the live entries, about.
    pub(super) fn live_bytes(&self) -> u64 {
        let indexes = self.runs().map(|(indexes, _)| indexes.end - indexes.start);
        self.runs.iter().zip(indexes).map(|(run, count)| run.mean_bytes * count).sum()
    }

    /// The live entries that frame `from` held are now held by `to` as well.
    pub(super) fn moved(&mut self, from: u64, to: Spot) {
        for run in self.runs.iter_mut().filter(|run| run.spot.frame == from) {
            run.spot = to;
        }
    }
}

/// What a replica is found to be, for those who asked.
pub(super) fn recovered(marks: &Marks, entries: &BTreeMap<u64, (Spot, Bytes)>) -> Recovered {
    let value = |mark: &Option<Mark>| mark.as_ref().map(|mark| mark.value.clone());
    Recovered {
        vote: value(&marks.vote),
        committed: value(&marks.committed),
        purged: marks.purged.as_ref().map(|(upto, marker)| (*upto, marker.value.clone())),
        entries: entries.iter().map(|(index, (_, entry))| (*index, entry.clone())).collect(),
        tombstone: marks.tombstone.is_some(),
    }
}
