//! Generated protobuf code, and the mapping of errors to and from it: the only place where a reason becomes a status.

/// The public API, `meridian.v1`.
#[allow(missing_docs, clippy::all, unreachable_pub, unused_qualifications, reason = "generated; documented in proto/")]
pub mod v1 {
    tonic::include_proto!("meridian.v1");
}

/// Node to node, `meridian.internal.v1`.
#[allow(missing_docs, clippy::all, unreachable_pub, unused_qualifications, reason = "generated; documented in proto/")]
pub mod internal {
    tonic::include_proto!("meridian.internal.v1");
}

pub mod batch;
pub mod rows;

/// Descriptors of the public services, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/meridian_v1.bin"));

/// Frames of HTTP/2 that we let others send to us. A page of a scan has some 300 KB: at the usual 16 KiB it would be cut
/// into 18 frames, each with a call of the system on one side and two copies on the other.
pub const HTTP2_FRAME_BYTES: u32 = 256 << 10;

use crate::{
    error::{Error, Hint, Outcome, Reason},
    key::{NodeId, PartitionId},
};
use std::collections::HashMap;
use tonic_types::{ErrorDetails, StatusExt as _};

/// `ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "meridian";

impl From<&Error> for v1::Error {
    fn from(error: &Error) -> Self {
        Self {
            code: error.reason.code() as i32,
            reason: error.reason.as_str().to_owned(),
            message: error.message.clone().into_owned(),
            metadata: error.metadata.iter().map(|(k, v)| (k.clone().into_owned(), v.clone())).collect(),
            outcome: outcome_to_pb(error.outcome) as i32,
            retry_after_ms: error.retry_after_ms,
            field: error.field.clone().into_owned(),
            hint: error.hint.map(Into::into),
        }
    }
}

impl From<v1::Error> for Error {
    fn from(pb: v1::Error) -> Self {
        let outcome = outcome_of_pb(pb.outcome());
        let reason = Reason::parse(&pb.reason).unwrap_or(Reason::Internal);
        let mut metadata: Vec<_> = pb.metadata.into_iter().map(|(k, v)| (k.into(), v)).collect();
        metadata.sort();
        Self {
            reason,
            message: pb.message.into(),
            metadata,
            outcome,
            retry_after_ms: pb.retry_after_ms,
            field: pb.field.into(),
            hint: pb.hint.map(Into::into),
        }
    }
}

impl From<Hint> for v1::RouteHint {
    fn from(hint: Hint) -> Self {
        Self {
            partition: hint.partition.0,
            leader: hint.leader.map_or(0, |node| node.0),
            term: hint.term,
            map_version: hint.map_version,
        }
    }
}

impl From<v1::RouteHint> for Hint {
    fn from(pb: v1::RouteHint) -> Self {
        Self {
            partition: PartitionId(pb.partition),
            leader: (pb.leader != 0).then_some(NodeId(pb.leader)),
            term: pb.term,
            map_version: pb.map_version,
        }
    }
}

const fn outcome_to_pb(outcome: Option<Outcome>) -> v1::Outcome {
    match outcome {
        None => v1::Outcome::Unspecified,
        Some(Outcome::Applied) => v1::Outcome::Applied,
        Some(Outcome::NotApplied) => v1::Outcome::NotApplied,
        Some(Outcome::Unknown) => v1::Outcome::Unknown,
    }
}

const fn outcome_of_pb(outcome: v1::Outcome) -> Option<Outcome> {
    match outcome {
        v1::Outcome::Unspecified => None,
        v1::Outcome::Applied => Some(Outcome::Applied),
        v1::Outcome::NotApplied => Some(Outcome::NotApplied),
        v1::Outcome::Unknown => Some(Outcome::Unknown),
    }
}

/// Key of `ErrorInfo.metadata` under which a unary error carries the write's outcome.
pub const OUTCOME_KEY: &str = "outcome";

/// The status of a unary call: code and message, with `ErrorInfo`, `RetryInfo` and `BadRequest` as details.
#[must_use]
pub fn status_of(error: &Error) -> tonic::Status {
    let mut metadata: HashMap<String, String> =
        error.metadata.iter().map(|(k, v)| (k.clone().into_owned(), v.clone())).collect();
    if let Some(outcome) = error.outcome {
        metadata.insert(OUTCOME_KEY.to_owned(), outcome.to_string());
    }
    let mut details = ErrorDetails::with_error_info(error.reason.as_str(), ERROR_DOMAIN, metadata);
    if error.retry_after_ms > 0 {
        details.set_retry_info(Some(std::time::Duration::from_millis(error.retry_after_ms.into())));
    }
    if !error.field.is_empty() {
        details.add_bad_request_violation(error.field.clone(), error.message.clone());
    }
    tonic::Status::with_error_details(tonic::Code::from(error.reason.code() as i32), error.message.clone(), details)
}

/// The error behind a status of ours; a status of another origin (the transport, a proxy) becomes `UNREACHABLE` or
/// `DEADLINE_EXCEEDED`.
#[must_use]
pub fn error_of(status: &tonic::Status) -> Error {
    let details = status.get_error_details();
    let ours = details.error_info().filter(|info| info.domain == ERROR_DOMAIN);
    let Some((info, reason)) = ours.and_then(|info| Some((info, Reason::parse(&info.reason)?))) else {
        let reason = match status.code() {
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => Reason::DeadlineExceeded,
            tonic::Code::InvalidArgument => Reason::InvalidField,
            tonic::Code::ResourceExhausted | tonic::Code::OutOfRange => Reason::Overloaded,
            _ => Reason::Unreachable,
        };
        return Error::new(reason, format!("{:?}: {}", status.code(), status.message()));
    };
    let mut error = Error::new(reason, status.message().to_owned());
    let mut metadata: Vec<_> = info.metadata.iter().collect();
    metadata.sort();
    for (key, value) in metadata {
        if key == OUTCOME_KEY {
            error.outcome = [Outcome::Applied, Outcome::NotApplied, Outcome::Unknown]
                .into_iter()
                .find(|outcome| outcome.to_string() == *value);
        } else {
            error.metadata.push((key.clone().into(), value.clone()));
        }
    }
    error.retry_after_ms =
        details.retry_info().and_then(|info| info.retry_delay).map_or(0, |delay| delay.as_millis() as u32);
    if let Some(violation) = details.bad_request().and_then(|bad| bad.field_violations.first()) {
        error.field = violation.field.clone().into();
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_both_wire_forms() {
        for reason in Reason::ALL {
            let error = Error::new(*reason, "what was wrong")
                .with("limit", 4096)
                .in_field("key")
                .outcome(Outcome::Unknown)
                .retry_after(20);
            assert_eq!(Error::from(v1::Error::from(&error)), error);
            assert_eq!(error_of(&status_of(&error)), error);
        }
    }
}
