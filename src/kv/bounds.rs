//! What a partition owns, and which part of a request lies in it.

use crate::error::{Error, Reason};
use crate::key::{Layout, Span, Tokens, printable, token};
use bytes::Bytes;

/// The epoch of a partition that was created as it is, neither split off nor merged.
const EPOCH_FIRST: u64 = 1;

/// The partition does not own what was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NotOwned {
    /// The key or bound that lies elsewhere; `None` for the open upper end, or for an interval of tokens.
    pub key: Option<Bytes>,
    /// Positions that the partition owns.
    pub owned: Span,
}

impl From<NotOwned> for Error {
    fn from(refusal: NotOwned) -> Self {
        let asked = refusal.key.map_or_else(|| "the asked end of the range".to_owned(), |key| printable(&key));
        let start = printable(&refusal.owned.start);
        let end = refusal.owned.end.map_or_else(|| "the end".to_owned(), |end| printable(&end));
        Self::new(Reason::WrongPartition, format!("{asked} lies outside of this partition, positions {start} to {end}"))
    }
}

/// The positions of a partition.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    layout: Layout,
    span: Span,
    /// Hashed layout: `span` as tokens, or `None` when it is empty.
    tokens: Option<Tokens>,
    /// Goes up with every change of the span.
    epoch: u64,
    /// Set while nothing is owned although the span says so: the version of the map that asked for it.
    sealed: Option<u64>,
}

/// The part of an interval that lies in a partition.
#[derive(Debug)]
pub(super) struct Part {
    /// Keys.
    pub(super) span: Span,
    /// Hashed layout: tokens.
    pub(super) tokens: Option<Tokens>,
    /// Set when only rows with these tokens belong to the part: not every row of the partition does.
    pub(super) filter: Option<Tokens>,
}

impl Part {
    pub(super) fn wants(&self, key: &[u8]) -> bool {
        self.filter.is_none_or(|tokens| tokens.contains(token(key)))
    }
}

impl Bounds {
    /// The bounds that a partition is created with.
    pub(super) fn new(layout: Layout, span: Span) -> Self {
        Self::at(layout, span, EPOCH_FIRST, None)
    }

    pub(super) fn at(layout: Layout, span: Span, epoch: u64, sealed: Option<u64>) -> Self {
        let tokens = match layout {
            Layout::Ordered => None,
            Layout::Hashed => Tokens::of_span(&span),
        };
        Self { layout, span, tokens, epoch, sealed }
    }

    /// From now on `span` is owned.
    pub(super) fn reshape(&mut self, span: Span) {
        *self = Self::at(self.layout, span, self.epoch + 1, None);
    }

    /// Seals or unseals.
    pub(super) fn seal(&mut self, sealed: Option<u64>) {
        self.sealed = sealed;
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn sealed(&self) -> Option<u64> {
        self.sealed
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// Whether rows of this key are kept here, sealed or not.
    pub(super) fn holds(&self, key: &[u8]) -> bool {
        match self.layout {
            Layout::Ordered => self.span.contains(key),
            Layout::Hashed => self.tokens.is_some_and(|tokens| tokens.contains(token(key))),
        }
    }

    fn owns(&self, key: &[u8]) -> bool {
        self.sealed.is_none() && self.holds(key)
    }

    pub(super) fn check(&self, key: &Bytes) -> Result<(), NotOwned> {
        if self.owns(key) { Ok(()) } else { Err(self.not_owned(Some(key))) }
    }

    /// The part of an interval that lies here. Ordered: it begins at the interval's leading edge (its end, if
    /// `reverse`), which must be owned. Hashed: the keys asked, and the tokens asked that are owned, at least one.
    pub(super) fn part(&self, span: &Span, tokens: Option<Tokens>, reverse: bool) -> Result<Part, NotOwned> {
        if self.sealed.is_some() {
            return Err(self.not_owned(Some(&span.start)));
        }
        match self.layout {
            Layout::Ordered if span.is_empty() => Ok(Part { span: span.clone(), tokens: None, filter: None }),
            Layout::Ordered => {
                let leading = if reverse { span.end.as_ref() } else { Some(&span.start) };
                if !self.owns_edge(leading, reverse) {
                    return Err(self.not_owned(leading));
                }
                Ok(Part { span: span.intersect(&self.span), tokens: None, filter: None })
            }
            Layout::Hashed => {
                let owned = self.tokens.ok_or_else(|| self.not_owned(None))?;
                let both = tokens.unwrap_or(Tokens::ALL).intersect(&owned).ok_or_else(|| self.not_owned(None))?;
                Ok(Part { span: span.clone(), tokens: Some(both), filter: (both != owned).then_some(both) })
            }
        }
    }

    /// Whether the keys right after (right before, if `reverse`) an edge are owned.
    fn owns_edge(&self, edge: Option<&Bytes>, reverse: bool) -> bool {
        match edge {
            Some(end) if reverse => *end > self.span.start && self.span.end.as_ref().is_none_or(|last| end <= last),
            Some(start) => self.span.contains(start),
            None => self.span.end.is_none(),
        }
    }

    fn not_owned(&self, key: Option<&Bytes>) -> NotOwned {
        NotOwned { key: key.cloned(), owned: self.span.clone() }
    }
}
