//! One client's pipeline: many requests on one stream, answered in any order.
//!
//! Requests of one message that are alike are executed together, as a bundle: one task at most, one read barrier or one
//! place in a partition's queue, one message back. What a request then costs is its own row and little else. A bundle that
//! need not wait for anything is answered on the spot, without a task.
//!
//! Invariants:
//! * each request is answered once, under its own id and with its own error;
//! * at most [`IN_FLIGHT_MAX`] requests are under way; more wait unread, which the client's flow control feels.

use super::{Core, exec::alike, inside::reply_of};
use crate::{
    error::Error,
    proto::{
        self,
        batch::{Items, Replies, Requests},
        v1,
    },
};
use bytes::Bytes;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use prost::DecodeError;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tonic::{Status, Streaming};

/// Requests of one pipeline that may be under way.
pub(crate) const IN_FLIGHT_MAX: usize = 4_096;
/// Requests executed together: reads of rows look at them under one lock, for which writes wait.
const BUNDLE_MAX: usize = 256;
/// Bundles that a request is compared with before it begins one of its own.
const BUNDLES_LOOKED_AT_MAX: usize = 16;
/// Answers sent together at most.
const REPLIES_MAX: usize = 512;
/// Bytes of answers sent together, about.
const REPLY_BYTES_MAX: usize = 1 << 20;

/// Answers as pieces of a message, with the places of their requests among those under way.
struct Answered {
    replies: Vec<Bytes>,
    places: OwnedSemaphorePermit,
}

/// Serves the requests of a stream: the answers.
pub(crate) fn serve(
    core: Arc<Core>,
    requests: Streaming<Requests>,
) -> impl Stream<Item = Result<Replies, Status>> + Send {
    // Every message in it holds a place at least.
    let (answers, ready) = mpsc::channel(IN_FLIGHT_MAX);
    let scope = Arc::clone(&core.scope);
    let (unreadable, damage) = oneshot::channel();
    scope.enter(|| {
        crate::env::spawn(async move {
            if let Err(error) = read(core, requests, answers).await {
                let error = Error::field("requests", format!("a message of the pipeline cannot be read: {error}"));
                // The client may have left.
                let _ = unreadable.send(proto::status_of(&error));
            }
        })
    });
    let answered = futures_util::stream::unfold(ready, |mut ready| async move {
        let pieces = drain(&mut ready).await?;
        Some((Ok(Replies::of_pieces(pieces)), ready))
    });
    // After the last answer.
    answered.chain(damage.into_stream().filter_map(async |damage| damage.ok().map(Err)))
}

/// Waits for answers, and takes with them those that are ready too. `None` when no more will come.
async fn drain(ready: &mut mpsc::Receiver<Answered>) -> Option<Vec<Bytes>> {
    let bytes_in = |pieces: &[Bytes]| pieces.iter().map(Bytes::len).sum::<usize>();
    let Answered { replies: mut pieces, places } = ready.recv().await?;
    let (mut replies, mut bytes) = (places.num_permits(), bytes_in(&pieces));
    while replies < REPLIES_MAX && bytes < REPLY_BYTES_MAX {
        let Ok(more) = ready.try_recv() else { break };
        replies += more.places.num_permits();
        bytes += bytes_in(&more.replies);
        pieces.extend(more.replies);
    }
    Some(pieces)
}

/// Reads requests and has them answered, a bounded number at a time.
///
/// # Errors
/// When a message cannot be read; nothing of it is executed.
async fn read(
    core: Arc<Core>,
    mut messages: Streaming<Requests>,
    answers: mpsc::Sender<Answered>,
) -> Result<(), DecodeError> {
    let under_way = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    while let Ok(Some(message)) = messages.message().await {
        for bundle in bundles(message.items()?) {
            let taken = Arc::clone(&under_way).acquire_many_owned(bundle.len() as u32).await;
            let places = taken.expect("the semaphore is never closed");
            let mut work = Box::pin(answer(Arc::clone(&core), bundle));
            match work.as_mut().now_or_never() {
                Some(replies) => {
                    if answers.send(Answered { replies, places }).await.is_err() {
                        return Ok(());
                    }
                }
                None => {
                    let answers = answers.clone();
                    crate::env::spawn(async move {
                        let replies = work.await;
                        // The client may have left.
                        let _ = answers.send(Answered { replies, places }).await;
                    });
                }
            }
        }
    }
    Ok(())
}

/// Puts together what can be executed together, in the order of the first of each.
fn bundles(requests: Vec<v1::Request>) -> Vec<Vec<v1::Request>> {
    let mut bundles: Vec<Vec<v1::Request>> = Vec::new();
    let room = requests.len().min(BUNDLE_MAX);
    for request in requests {
        let mut open = bundles.iter_mut().rev().take(BUNDLES_LOOKED_AT_MAX);
        match open.find(|bundle| bundle.len() < BUNDLE_MAX && alike(&bundle[0], &request)) {
            Some(bundle) => bundle.push(request),
            None => {
                let mut bundle = Vec::with_capacity(if alike(&request, &request) { room } else { 1 });
                bundle.push(request);
                bundles.push(bundle);
            }
        }
    }
    bundles
}

/// Answers the requests of a bundle.
async fn answer(core: Arc<Core>, requests: Vec<v1::Request>) -> Vec<Bytes> {
    let mut items = Items::default();
    match core.running() {
        Ok(running) => running.responder.reply_alike(requests, |reply| items.push(reply)).await,
        Err(error) => requests.iter().for_each(|request| items.push(reply_of(request.id, Err(error.clone())))),
    }
    items.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::{Consistency, request::Op};

    fn request(id: u64, partition: u64, op: Op) -> v1::Request {
        v1::Request { id, deadline_ms: 0, route: Some(v1::Route { partition, tokens: None }), op: Some(op) }
    }

    fn get(consistency: Consistency) -> Op {
        let options = v1::ReadOptions { consistency: consistency as i32, ..Default::default() };
        Op::Get(v1::GetRequest { options: Some(options), ..Default::default() })
    }

    #[test]
    fn only_what_asks_the_same_of_the_same_partition_goes_together() {
        let put = || Op::Put(v1::PutRequest::default());
        let elsewhere = Op::Put(v1::PutRequest { keyspace: "other".into(), ..Default::default() });
        let requests = vec![
            request(1, 1, get(Consistency::Linearizable)),
            request(2, 2, get(Consistency::Linearizable)),
            request(3, 1, put()),
            request(4, 1, get(Consistency::Eventual)),
            request(5, 1, get(Consistency::Linearizable)),
            request(6, 1, Op::Delete(v1::DeleteRequest::default())),
            request(7, 1, elsewhere),
            request(8, 1, Op::Scan(v1::ScanRequest::default())),
            request(9, 1, Op::Scan(v1::ScanRequest::default())),
            v1::Request { route: None, ..request(10, 1, put()) },
            v1::Request { route: None, ..request(11, 1, put()) },
        ];
        let ids: Vec<Vec<u64>> =
            bundles(requests).iter().map(|bundle| bundle.iter().map(|request| request.id).collect()).collect();
        let want: [&[u64]; 9] = [&[1, 5], &[2], &[3, 6], &[4], &[7], &[8], &[9], &[10], &[11]];
        assert_eq!(ids, want);
    }

    #[test]
    fn bundles_are_bounded() {
        let requests = (0..BUNDLE_MAX as u64 + 1).map(|id| request(id, 1, get(Consistency::Lease))).collect();
        let sizes: Vec<usize> = bundles(requests).iter().map(Vec::len).collect();
        assert_eq!(sizes, [BUNDLE_MAX, 1]);
    }
}
