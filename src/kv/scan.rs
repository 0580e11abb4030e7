//! Scans: one page of the part of a range that lies in this partition.

use super::bounds::{NotOwned, Part};
use super::packed::{RowRef, ahead};
use super::store::Store;
use crate::key::{Span, Tokens, successor};
use crate::plant::{Bug, planted};
use bytes::Bytes;

/// Most rows that one page looks at, whatever it is asked for: readers hold writers up for no longer.
pub const SCAN_LOOKED_MAX: u64 = 65_536;

/// Which rows to read.
#[derive(Clone, Debug)]
pub struct ScanSpec {
    /// Keys.
    pub span: Span,
    /// Hashed layout: only rows whose token lies here. `None`: all. Ordered layout: ignored.
    pub tokens: Option<Tokens>,
    /// Largest key first.
    pub reverse: bool,
    /// Most rows returned or counted; 0 counts as 1, so that a page always gets on. Counting every row of the
    /// partition looks at none, and has no limit.
    pub rows_max: u64,
    /// Most bytes of keys and values returned; the first row is returned whatever its size.
    pub bytes_max: u64,
    /// Leave the values out.
    pub keys_only: bool,
    /// Return no rows, only their count.
    pub count_only: bool,
}

/// What a page speaks for; its rows were given out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// Rows given out or counted.
    pub count: u64,
    /// Bytes of their keys, and of their values if those were given out.
    pub bytes: u64,
    /// Rows looked at for that.
    pub looked: u64,
    /// Interval of keys that was completely looked at; begins at the leading edge of the asked span.
    pub covered: Span,
    /// Hashed layout: interval of tokens that was completely looked at.
    pub covered_tokens: Option<Tokens>,
    /// Whether this partition has rows of the asked interval beyond `covered`.
    pub more: bool,
}

impl Store {
    /// Reads a page: gives the rows of the part of `spec.span` that lies in this partition to `take`, up to the limits
    /// and in the order asked for; with an empty value if only keys were asked for.
    ///
    /// Ordered layout: the leading edge (the start; the end, if `reverse`) must be owned; the page ends at the
    /// partition's other end at the latest. Hashed layout: rows of the owned tokens only. `covered` says which
    /// interval the page speaks for, so that the caller goes on exactly there.
    ///
    /// # Errors
    /// When the leading edge, or every token asked for, lies in another partition.
    pub fn scan(&self, spec: &ScanSpec, mut take: impl FnMut(&[u8], RowRef<'_>)) -> Result<Page, NotOwned> {
        let part = self.bounds().part(&spec.span, spec.tokens, spec.reverse)?;
        let covered = if planted(Bug::PageBeyondBounds) { spec.span.clone() } else { part.span.clone() };
        let mut page = Page { count: 0, bytes: 0, looked: 0, covered, covered_tokens: part.tokens, more: false };
        if part.span.is_empty() {
            return Ok(page);
        }
        let everything = || part.filter.is_none() && part.span.contains_span(&self.keys_owned());
        if spec.count_only && everything() {
            page.count = self.rows();
            return Ok(page);
        }
        let rows = self.table().range(&part.span);
        let values = !spec.keys_only && !spec.count_only;
        let cut = if spec.reverse {
            let rows = rows.rev().skip(usize::from(planted(Bug::ReverseSkipsFirst)));
            page.fill(spec, &part, ahead(rows, values), &mut take)
        } else {
            page.fill(spec, &part, ahead(rows, values), &mut take)
        };
        if let Some(last) = cut {
            page.more = true;
            if spec.reverse {
                page.covered.start = Bytes::copy_from_slice(last);
            } else {
                page.covered.end = Some(successor(last));
            }
        }
        Ok(page)
    }
}

impl Page {
    /// Takes rows until a limit is met; then returns the last key looked at.
    fn fill<'a>(
        &mut self,
        spec: &ScanSpec,
        part: &Part,
        rows: impl Iterator<Item = (&'a [u8], RowRef<'a>)>,
        take: &mut impl FnMut(&[u8], RowRef<'_>),
    ) -> Option<&'a [u8]> {
        let rows_max = spec.rows_max.max(1);
        let mut last = None;
        for (key, row) in rows {
            if self.looked == SCAN_LOOKED_MAX {
                return last;
            }
            if part.wants(key) {
                let value = if spec.keys_only { &[] } else { row.value };
                let bytes = self.bytes + (key.len() + value.len()) as u64;
                let full = self.count == rows_max || (bytes > spec.bytes_max && self.count > 0 && !spec.count_only);
                if full {
                    return if planted(Bug::PageSkipsRow) { Some(key) } else { last };
                }
                (self.count, self.bytes) = (self.count + 1, bytes);
                if !spec.count_only {
                    take(key, RowRef { value, ..row });
                }
            }
            self.looked += 1;
            last = Some(key);
        }
        None
    }
}
