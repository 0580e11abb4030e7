//! Stitching the answers of many partitions into one sequence of rows in key order, and a scan's position.
//!
//! Pure. What is left of a scan is a set of *cells*: an interval of keys times an interval of tokens, with the rows
//! already fetched from it. In an ordered keyspace cells differ in keys, in a hashed one in tokens; merging them by
//! their leading keys serves both. Cells are cut where the map says that a partition ends at the moment of asking, and
//! again where an answer says what it covered, so no knowledge about partitions outlives a request.
//!
//! Invariants:
//! * the cells and the rows taken so far tile the scanned interval: no key is lost, none is asked for twice;
//! * a row leaves only when no cell can still yield one that comes before it.

use crate::{
    error::{Error, Reason},
    key::{Layout, Span, Tokens, successor},
    plant::{Bug, planted},
    proto::v1::Row,
};
use bytes::Bytes;
use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, VecDeque},
};

/// Bytes counted for a row besides its key and value.
pub(crate) const ROW_OVERHEAD_BYTES: usize = 16;

/// The place where a cell's partition is to be looked up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Edge {
    /// The partition that holds this position.
    At(Bytes),
    /// The partition just below this position; `None`: the last one.
    Below(Option<Bytes>),
}

/// A part of the scan to be asked of one partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Ask {
    /// Names the cell in the answer.
    pub(crate) cell: u64,
    /// Keys.
    pub(crate) span: Span,
    /// Tokens; all of them in an ordered keyspace.
    pub(crate) tokens: Tokens,
    /// Where the partition is found that holds the leading edge.
    pub(crate) edge: Edge,
}

/// What one answer speaks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Coverage {
    /// Keys.
    pub(crate) span: Span,
    /// Tokens.
    pub(crate) tokens: Tokens,
}

#[derive(Debug)]
struct Cell {
    id: u64,
    /// Keys not looked at yet.
    span: Span,
    tokens: Tokens,
    /// Fetched, in scan order, all before `span`.
    rows: VecDeque<Row>,
    asked: bool,
}

impl Cell {
    fn is_spent(&self) -> bool {
        self.span.is_empty() && self.rows.is_empty() && !self.asked
    }
}

/// What is left of a scan, a count or a ranged delete.
#[derive(Debug)]
pub(crate) struct Stitch {
    layout: Layout,
    reverse: bool,
    whole: Span,
    /// Rows still wanted.
    limit: Option<u64>,
    /// In an ordered keyspace in scan order; in a hashed one by tokens.
    cells: Vec<Cell>,
    ids: u64,
}

impl Stitch {
    /// Everything in `whole`, or the first `limit` rows of it.
    pub(crate) fn new(layout: Layout, whole: Span, reverse: bool, limit: Option<u64>) -> Self {
        let first = Cell { id: 0, span: whole.clone(), tokens: Tokens::ALL, rows: VecDeque::new(), asked: false };
        let mut stitch = Self { layout, reverse, whole, limit, cells: vec![first], ids: 1 };
        stitch.drop_spent();
        stitch
    }

    /// Nothing is left to fetch or to take.
    pub(crate) fn is_done(&self) -> bool {
        self.cells.is_empty() || self.limit == Some(0)
    }

    /// Rows still wanted.
    pub(crate) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Rows fetched and not taken yet.
    pub(crate) fn fetched(&self) -> usize {
        self.cells.iter().map(|cell| cell.rows.len()).sum()
    }

    /// The next part to ask for, cut to one partition: `bounds` gives the positions of the partition at an edge, or
    /// `None` if the map has none there. `None` when everything is asked for or fetched.
    pub(crate) fn next_ask(&mut self, bounds: impl Fn(&Edge) -> Option<Span>) -> Option<Ask> {
        let index = self.cells.iter().position(|cell| !cell.asked && cell.rows.is_empty() && !cell.span.is_empty())?;
        let edge = self.edge(&self.cells[index]);
        if let Some(partition) = bounds(&edge) {
            self.cut(index, &partition);
        }
        let cell = &mut self.cells[index];
        cell.asked = true;
        Some(Ask { cell: cell.id, span: cell.span.clone(), tokens: cell.tokens, edge })
    }

    /// Takes an answer to an [`Ask`].
    ///
    /// # Errors
    /// `INTERNAL` when the answer does not continue where its cell begins, makes no progress, or is out of order: a
    /// bug of the answering node, never passed over in silence.
    pub(crate) fn answer(&mut self, cell: u64, covered: &Coverage, rows: Vec<Row>) -> Result<(), Error> {
        let Some(index) = self.cells.iter().position(|c| c.id == cell) else {
            return Err(broken("answers a part that was not asked for"));
        };
        self.cells[index].asked = false;
        self.check(&self.cells[index], covered, &rows)?;
        let left = self.carve(index, covered);
        let cell = &mut self.cells[index];
        cell.span = left;
        cell.rows = rows.into();
        self.drop_spent();
        Ok(())
    }

    /// As [`Self::answer`] without rows; an answer that was remembered may reach beyond what was asked, and then the
    /// parts it speaks for are not asked again.
    pub(crate) fn answer_folded(&mut self, cell: u64, covered: &Coverage) -> Result<(), Error> {
        self.answer(cell, covered, Vec::new())?;
        let mut index = 0;
        while index < self.cells.len() {
            if !self.cells[index].asked && self.continues(&self.cells[index], covered) {
                self.cells[index].span = self.carve(index, covered);
            }
            index += 1;
        }
        self.drop_spent();
        Ok(())
    }

    /// Gives up a part that was asked for and returns it.
    pub(crate) fn skip(&mut self, cell: u64) -> Option<Span> {
        let cell = self.cells.iter_mut().find(|c| c.id == cell)?;
        cell.asked = false;
        let at = cell.span.start.clone();
        let skipped = std::mem::replace(&mut cell.span, Span::new(at.clone(), Some(at)));
        self.drop_spent();
        Some(skipped)
    }

    /// Forgets what was asked for and not answered; it will be asked for again.
    pub(crate) fn release(&mut self) {
        for cell in &mut self.cells {
            cell.asked = false;
        }
    }

    /// Moves rows that are next in order to `page` until it holds `rows_max` rows or `bytes_max` bytes (at least one
    /// row), the limit is reached, or an answer is missing. Returns whether the page is full.
    pub(crate) fn take(&mut self, page: &mut Page, rows_max: usize, bytes_max: usize) -> bool {
        let mut heads: BinaryHeap<Head> = (0..self.cells.len()).filter_map(|index| self.head(index)).collect();
        let mut full = false;
        while let Some(head) = heads.pop() {
            full = page.rows.len() >= rows_max || page.bytes >= bytes_max;
            if !head.row && !full && planted(Bug::ScanOutOfOrder) {
                continue;
            }
            if full || !head.row || self.limit == Some(0) {
                break;
            }
            // Whatever of this cell certainly comes before all others goes with it.
            let rows = &mut self.cells[head.index].rows;
            page.rows.reserve(rows.len().min(rows_max - page.rows.len()));
            let mut next = rows.pop_front();
            while let Some(row) = next {
                page.bytes += row.key.len() + row.value.len() + ROW_OVERHEAD_BYTES;
                page.rows.push(row);
                if let Some(limit) = &mut self.limit {
                    *limit -= 1;
                }
                let full = page.rows.len() >= rows_max || page.bytes >= bytes_max || self.limit == Some(0);
                let goes_on = |row: &Row| !full && heads.peek().is_none_or(|other| other.follows(&row.key));
                next = if rows.front().is_some_and(goes_on) { rows.pop_front() } else { None };
            }
            heads.extend(self.head(head.index));
        }
        self.drop_spent();
        full || page.rows.len() >= rows_max || page.bytes >= bytes_max
    }

    /// The interval from which a later call can go on; `None` at the end.
    pub(crate) fn rest(&self) -> Option<Span> {
        if self.is_done() {
            return None;
        }
        let first = (0..self.cells.len()).filter_map(|index| self.head(index)).max()?;
        Some(match (self.reverse, first.row) {
            (false, _) => Span::new(first.key, self.whole.end.clone()),
            (true, true) => Span::new(self.whole.start.clone(), Some(successor(&first.key))),
            (true, false) => Span::new(self.whole.start.clone(), (!first.unbounded).then_some(first.key)),
        })
    }

    fn edge(&self, cell: &Cell) -> Edge {
        match (self.layout, self.reverse) {
            (Layout::Hashed, _) => Edge::At(crate::key::position_of_token(cell.tokens.first)),
            (Layout::Ordered, false) => Edge::At(cell.span.start.clone()),
            (Layout::Ordered, true) => Edge::Below(cell.span.end.clone()),
        }
    }

    /// Cuts the cell so that it lies inside the partition; what is left becomes the next cell.
    fn cut(&mut self, index: usize, partition: &Span) {
        let cell = &self.cells[index];
        let (span, tokens) = (cell.span.clone(), cell.tokens);
        match self.layout {
            Layout::Ordered => {
                let inside = span.intersect(partition);
                let outside = self.beyond(&span, &inside);
                if inside.is_empty() {
                    return;
                }
                self.cells[index].span = inside;
                self.insert(index + 1, outside, tokens);
            }
            Layout::Hashed => {
                let Some(inside) = Tokens::of_span(partition).and_then(|own| own.intersect(&tokens)) else { return };
                if inside.first != tokens.first {
                    return;
                }
                self.cells[index].tokens = inside;
                if inside.last < tokens.last {
                    self.insert(index + 1, span, Tokens { first: inside.last + 1, last: tokens.last });
                }
            }
        }
    }

    /// The keys of `span` that come after those of `covered` in scan order.
    fn beyond(&self, span: &Span, covered: &Span) -> Span {
        if self.reverse {
            let end = match &span.end {
                Some(end) if *end < covered.start => end.clone(),
                _ => covered.start.clone(),
            };
            return Span::new(span.start.clone(), Some(end));
        }
        match &covered.end {
            Some(end) => Span::new(end.max(&span.start).clone(), span.end.clone()),
            None => Span::new(span.start.clone(), Some(span.start.clone())),
        }
    }

    /// Takes what is covered out of a cell; tokens that are not covered become cells of their own. Returns the keys
    /// left for the covered tokens.
    fn carve(&mut self, index: usize, covered: &Coverage) -> Span {
        let cell = &self.cells[index];
        let (span, tokens) = (cell.span.clone(), cell.tokens);
        let both = tokens.intersect(&covered.tokens).expect("checked: the tokens overlap");
        self.cells[index].tokens = both;
        if both.last < tokens.last {
            self.insert(index + 1, span.clone(), Tokens { first: both.last + 1, last: tokens.last });
        }
        if tokens.first < both.first {
            self.insert(index + 1, span.clone(), Tokens { first: tokens.first, last: both.first - 1 });
        }
        self.beyond(&span, &covered.span)
    }

    fn insert(&mut self, at: usize, span: Span, tokens: Tokens) {
        if !span.is_empty() {
            self.cells.insert(at, Cell { id: self.ids, span, tokens, rows: VecDeque::new(), asked: false });
            self.ids += 1;
        }
    }

    /// Whether an answer covers the leading edge of a cell, and something behind it.
    fn continues(&self, cell: &Cell, covered: &Coverage) -> bool {
        let leads = if self.reverse {
            match (&covered.span.end, &cell.span.end) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(covered), Some(cell)) => covered >= cell,
            }
        } else {
            covered.span.start <= cell.span.start
        };
        leads && covered.span.overlaps(&cell.span) && cell.tokens.intersect(&covered.tokens).is_some()
    }

    fn check(&self, cell: &Cell, covered: &Coverage, rows: &[Row]) -> Result<(), Error> {
        if !self.continues(cell, covered) {
            return Err(broken("does not continue where its part begins")
                .with("asked", format!("{:?}", cell.span))
                .with("covered", format!("{:?}", covered.span)));
        }
        // As they are sorted, the first and the last speak for all.
        let mut ends = rows.first().into_iter().chain(rows.last());
        let inside = ends.all(|row| cell.span.contains(&row.key) && covered.span.contains(&row.key));
        let sorted = rows.windows(2).all(|two| match self.reverse {
            false => two[0].key < two[1].key,
            true => two[0].key > two[1].key,
        });
        if !inside || !sorted {
            return Err(broken("holds rows outside of what it covers, or out of order"));
        }
        Ok(())
    }

    fn head(&self, index: usize) -> Option<Head> {
        let (cell, reverse) = (&self.cells[index], self.reverse);
        if let Some(row) = cell.rows.front() {
            return Some(Head { reverse, unbounded: false, key: row.key.clone(), row: true, index });
        }
        if cell.span.is_empty() {
            return None;
        }
        let (unbounded, key) = match (reverse, &cell.span.end) {
            (false, _) => (false, cell.span.start.clone()),
            (true, Some(end)) => (false, end.clone()),
            (true, None) => (true, Bytes::new()),
        };
        Some(Head { reverse, unbounded, key, row: false, index })
    }

    fn drop_spent(&mut self) {
        self.cells.retain(|cell| !cell.is_spent());
    }
}

fn broken(what: &str) -> Error {
    Error::new(Reason::Internal, format!("the answer of a partition to a part of a range {what}"))
}

/// Rows on their way to one page.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// In scan order.
    pub(crate) rows: Vec<Row>,
    /// Their keys and values, with [`ROW_OVERHEAD_BYTES`] each.
    pub(crate) bytes: usize,
}

/// The first thing that a cell can yield; the greatest head is next in scan order.
#[derive(PartialEq, Eq)]
struct Head {
    reverse: bool,
    /// Reverse, nothing fetched, no upper bound.
    unbounded: bool,
    /// Key of the first row; else the leading bound of what is not fetched.
    key: Bytes,
    row: bool,
    index: usize,
}

impl Head {
    /// Whether it certainly comes after a row of another cell.
    fn follows(&self, key: &Bytes) -> bool {
        if self.reverse { !self.unbounded && self.key < *key } else { *key < self.key }
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        let ascending = |head: &Self| (head.unbounded, head.key.clone(), head.row, Reverse(head.index));
        if self.reverse {
            // An exclusive bound equal to a row's key yields only smaller keys: the row goes first.
            return ascending(self).cmp(&ascending(other));
        }
        // An inclusive bound equal to a row's key could yield it: what is not fetched goes first.
        (&other.key, other.row, other.index).cmp(&(&self.key, self.row, self.index))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
