//! The `Kv` service: unary calls, streamed scans, and the pipeline that the client library lives on.

use super::{Core, pipeline, responder::DEADLINE_MAX};
use crate::{
    error::{Error, Reason},
    proto::{
        batch::{Replies, Requests},
        status_of, v1,
    },
};
use futures_util::{Stream, StreamExt as _};
use std::{pin::Pin, sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};
use v1::{kv_server::Kv, reply::Result as Answer, request::Op};

/// The service.
#[derive(Clone)]
pub(crate) struct KvService(pub(crate) Arc<Core>);

impl KvService {
    async fn unary(&self, deadline: Instant, op: Op) -> Result<Answer, Status> {
        let request = v1::Request { id: 0, deadline_ms: 0, route: None, op: Some(op) };
        let answer = async { self.0.running()?.responder.answer(request, deadline).await };
        answer.await.map_err(|error| status_of(&error))
    }

    /// When an answer has to be there: the caller's `grpc-timeout`, or the server's default.
    fn deadline<T>(&self, request: &Request<T>) -> Instant {
        let asked = request.metadata().get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
        Instant::now() + asked.unwrap_or(self.0.deadline_default).min(DEADLINE_MAX)
    }
}

/// Reads a `grpc-timeout`: digits and a unit of H, M, S, m, u or n.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3_600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

fn unexpected() -> Status {
    status_of(&Error::new(Reason::Internal, "the answer is not of the kind that was asked for"))
}

macro_rules! unary {
    ($method:ident, $request:ty, $op:ident, $answer:ident, $reply:ty) => {
        fn $method<'a: 'f, 'f>(
            &'a self,
            request: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<$reply>, Status>> + Send + 'f>>
        where
            Self: 'f,
        {
            Box::pin(async move {
                let deadline = self.deadline(&request);
                match self.unary(deadline, Op::$op(request.into_inner())).await? {
                    Answer::$answer(reply) => Ok(Response::new(reply)),
                    _ => Err(unexpected()),
                }
            })
        }
    };
}

impl Kv for KvService {
    unary!(get, v1::GetRequest, Get, Get, v1::GetReply);
    unary!(batch_get, v1::BatchGetRequest, BatchGet, BatchGet, v1::BatchGetReply);
    unary!(put, v1::PutRequest, Put, Write, v1::WriteReply);
    unary!(delete, v1::DeleteRequest, Delete, Write, v1::WriteReply);
    unary!(compare_and_set, v1::CompareAndSetRequest, CompareAndSet, Write, v1::WriteReply);
    unary!(increment, v1::IncrementRequest, Increment, Write, v1::WriteReply);
    unary!(write, v1::BatchRequest, Write, Batch, v1::BatchReply);
    unary!(delete_range, v1::DeleteRangeRequest, DeleteRange, DeleteRange, v1::DeleteRangeReply);
    unary!(scan, v1::ScanRequest, Scan, Scan, v1::ScanReply);
    unary!(count, v1::CountRequest, Count, Count, v1::CountReply);
    unary!(open_session, v1::OpenSessionRequest, OpenSession, OpenSession, v1::OpenSessionReply);

    type ScanStreamStream = Pin<Box<dyn Stream<Item = Result<v1::ScanReply, Status>> + Send>>;

    fn scan_stream<'a: 'f, 'f>(
        &'a self,
        request: Request<v1::ScanRequest>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Self::ScanStreamStream>, Status>> + Send + 'f>>
    where
        Self: 'f,
    {
        Box::pin(async move {
            let deadline = self.deadline(&request);
            let running = self.0.running().map_err(|error| status_of(&error))?;
            let patience = deadline.saturating_duration_since(Instant::now());
            let pages = running.responder.scan_pages(request.into_inner(), patience);
            let pages = pages.map(|page| page.map_err(|error| status_of(&error)));
            Ok(Response::new(Box::pin(pages) as Self::ScanStreamStream))
        })
    }

    type PipelineStream = Pin<Box<dyn Stream<Item = Result<Replies, Status>> + Send>>;

    fn pipeline<'a: 'f, 'f>(
        &'a self,
        request: Request<Streaming<Requests>>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Self::PipelineStream>, Status>> + Send + 'f>>
    where
        Self: 'f,
    {
        Box::pin(async move {
            let replies = pipeline::serve(Arc::clone(&self.0), request.into_inner());
            Ok(Response::new(Box::pin(replies) as Self::PipelineStream))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_with_their_units() {
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout("5S"), Some(Duration::from_secs(5)));
        for bad in ["", "m", "5", "5x", "-5S", "123456789S"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }
}
