//! The error that users of the library see.

use crate::error::{Outcome, Reason};
use std::{fmt, time::Duration};

/// Why an operation failed.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<crate::error::Error>);

impl Error {
    /// The cause: stable, one per case.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// What was wrong, with which value, what the limit is, what to do next.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// For writes: whether the write happened. `None` for reads.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.0.outcome
    }

    /// Whether the write may have happened.
    #[must_use]
    pub fn maybe_applied(&self) -> bool {
        matches!(self.0.outcome, Some(Outcome::Applied | Outcome::Unknown))
    }

    /// Whether the same operation may succeed later. A write that [may have been applied](Self::maybe_applied) would
    /// then be a second write: read first, or make it conditional.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.is_retryable()
    }

    /// When to try again, if waiting helps.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        (self.0.retry_after_ms > 0).then(|| Duration::from_millis(self.0.retry_after_ms.into()))
    }

    /// The request field at fault, or empty.
    #[must_use]
    pub fn field(&self) -> &str {
        &self.0.field
    }

    /// Facts behind the message.
    pub fn facts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.metadata.iter().map(|(name, value)| (name.as_ref(), value.as_str()))
    }

    /// The error as it travels.
    #[must_use]
    pub fn as_inner(&self) -> &crate::error::Error {
        &self.0
    }
}

impl From<crate::error::Error> for Error {
    fn from(error: crate::error::Error) -> Self {
        Self(Box::new(error))
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        *error.0
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for Error {}
