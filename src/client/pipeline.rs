//! A connection to one node over `Kv.Pipeline`: one stream carries every request, whatever waits goes out as one
//! message, and answers come back in any order.
//!
//! A connection is made when the first request asks for one. When it is lost, everything in flight fails at once; for
//! a short while after that requests fail without trying, so that the caller turns to another node.
//!
//! Invariants:
//! * a request is answered once: by the node, by its deadline, or by the loss of the connection;
//! * "not applied" is said only of requests that were never written to the stream;
//! * requests in flight, queued messages and their bytes are bounded;
//! * a request that is sent has half of its time left at least, as far as that depends on others, and the node is told what
//!   is left: it does nothing for callers who have gone.

use crate::{
    env,
    error::{Error, Outcome, Reason},
    proto::{
        self, HTTP2_FRAME_BYTES,
        batch::{self, Replies, Requests},
        v1::{self, kv_client::KvClient},
    },
};
use bytes::Bytes;
use parking_lot::Mutex;
use prost::{DecodeError, Message as _};
use std::{collections::BTreeMap, convert::Infallible, future::Future, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit, mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// Requests to one node that may await their answers.
pub const IN_FLIGHT_MAX: usize = 16_384;
/// Requests in one message.
const MESSAGE_REQUESTS_MAX: usize = 4_096;
/// A message is closed when it has grown to this; one request may exceed it.
const MESSAGE_BYTES: usize = 1 << 20;
/// Messages handed to the stream and not yet taken by it.
const MESSAGES_QUEUED_MAX: usize = 2;
/// Largest message accepted from a node.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Longest wait for a connection or for its stream to open.
pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(1);
/// Requests fail without trying for this long after a connection was lost or refused.
const DOWN_FOR: Duration = Duration::from_millis(100);
/// A connection without traffic is probed after this long.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// A probe not answered within this long ends the connection.
const KEEPALIVE_MAX: Duration = Duration::from_secs(3);
/// HTTP/2 flow control: bytes a node may send ahead.
const WINDOW_BYTES: u32 = 8 << 20;

/// A connection to one node. Dropping it ends the connection.
#[derive(Debug)]
pub struct Pipeline {
    address: String,
    shared: Arc<Shared>,
    queue: mpsc::Sender<Queued>,
}

/// A request that waits to be sent.
#[derive(Debug)]
struct Queued {
    id: u64,
    body: Vec<u8>,
}

#[derive(Debug)]
struct Shared {
    slots: Semaphore,
    state: Mutex<State>,
    /// A deadline is nearer than the one that [`Shared::expire`] sleeps for.
    nearer: Notify,
}

#[derive(Debug, Default)]
struct State {
    last_id: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// No deadline of those that wait is nearer.
    nearest: Option<Instant>,
    /// Why and until when requests fail at once.
    down: Option<(Instant, String)>,
}

#[derive(Debug)]
struct Waiting {
    sent: bool,
    deadline: Instant,
    answer: oneshot::Sender<Answer>,
}

/// The bytes of a reply, or why there is none.
type Answer = Result<Bytes, Error>;

impl Pipeline {
    /// A connection to be made to `address` (`host:port`). Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// When the address is malformed.
    pub fn new(address: &str) -> Result<Self, Error> {
        let endpoint = endpoint(address)?;
        let shared = Arc::new(Shared::new(IN_FLIGHT_MAX));
        let (queue, queued) = mpsc::channel(IN_FLIGHT_MAX);
        env::spawn(Arc::clone(&shared).run(queued, endpoint));
        Ok(Self { address: address.to_owned(), shared, queue })
    }

    /// Where it leads.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sends a request (its [`batch::request_body`]) and waits for the answer, at most until `deadline`.
    ///
    /// # Errors
    /// `UNREACHABLE`, `DEADLINE_EXCEEDED` or `OVERLOADED`; the outcome says `NotApplied` if it was never sent, otherwise
    /// `Unknown`. Errors of the node are inside the reply.
    pub async fn call(&self, body: Vec<u8>, deadline: Instant) -> Result<v1::Reply, Error> {
        let _slot = self.slot(deadline).await?;
        let (id, answer) = self.shared.begin(&self.address, deadline)?;
        let mut waiting = Guard { shared: &self.shared, id: Some(id) };
        if let Err(error) = self.queue.try_send(Queued { id, body }) {
            return Err(match error {
                mpsc::error::TrySendError::Full(_) => self.overloaded(),
                mpsc::error::TrySendError::Closed(_) => {
                    unreachable(&self.address, "the connection's task has ended").outcome(Outcome::NotApplied)
                }
            });
        }
        let Ok(answer) = answer.await else {
            return Err(unreachable(&self.address, "the connection was dropped").outcome(Outcome::Unknown));
        };
        // Whoever answers has taken it out.
        waiting.id = None;
        v1::Reply::decode(answer?).map_err(|error| {
            unreachable(&self.address, &format!("an unreadable answer: {error}")).outcome(Outcome::Unknown)
        })
    }

    /// A place among those in flight.
    async fn slot(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, Error> {
        match self.shared.slots.try_acquire() {
            Ok(slot) => Ok(slot),
            Err(_none) => Box::pin(self.next_slot(deadline)).await,
        }
    }

    async fn next_slot(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, Error> {
        let patience = deadline.saturating_duration_since(Instant::now()) / 2;
        let slot = timeout(patience, self.shared.slots.acquire()).await.map_err(|_elapsed| self.overloaded())?;
        Ok(slot.expect("the semaphore is never closed"))
    }

    fn overloaded(&self) -> Error {
        Error::new(Reason::Overloaded, format!("{IN_FLIGHT_MAX} requests to {} are in flight, the limit", self.address))
            .outcome(Outcome::NotApplied)
    }
}

/// Forgets a request whose caller has left.
struct Guard<'a> {
    shared: &'a Shared,
    /// None: it was answered.
    id: Option<u64>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.shared.state.lock().waiting.remove(&id);
        }
    }
}

/// Nobody answers any more when this is gone: nobody has to wait.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let unanswered = std::mem::take(&mut self.0.state.lock().waiting);
        // Not under the lock, which whoever gives up takes.
        drop(unanswered);
    }
}

impl Waiting {
    /// Answers it that nobody else will: it may have reached the node if it was sent.
    fn fail(self, error: Error) {
        let outcome = if self.sent { Outcome::Unknown } else { Outcome::NotApplied };
        // A caller that has just left needs no answer.
        let _ = self.answer.send(Err(error.outcome(outcome)));
    }
}

impl Shared {
    fn new(in_flight_max: usize) -> Self {
        Self { slots: Semaphore::new(in_flight_max), state: Mutex::default(), nearer: Notify::new() }
    }

    /// Enters a request.
    fn begin(&self, address: &str, deadline: Instant) -> Result<(u64, oneshot::Receiver<Answer>), Error> {
        let mut state = self.state.lock();
        if let Some((until, why)) = &state.down {
            if Instant::now() < *until {
                return Err(unreachable(address, why).outcome(Outcome::NotApplied));
            }
            state.down = None;
        }
        state.last_id += 1;
        let id = state.last_id;
        let (answer, answered) = oneshot::channel();
        state.waiting.insert(id, Waiting { sent: false, deadline, answer });
        if state.nearest.is_none_or(|nearest| deadline < nearest) {
            state.nearest = Some(deadline);
            self.nearer.notify_one();
        }
        Ok((id, answered))
    }

    async fn run(self: Arc<Self>, queue: mpsc::Receiver<Queued>, endpoint: Endpoint) {
        let _end = End(&self);
        tokio::select! {
            biased;
            () = self.serve(queue, &endpoint) => {}
            never = self.expire(&endpoint) => match never {},
        }
    }

    /// Answers those whose deadlines have passed. One timer for all: most are answered long before, and a timer for each
    /// costs more than all else that is done for it here.
    async fn expire(&self, endpoint: &Endpoint) -> Infallible {
        loop {
            let nearest = self.state.lock().nearest;
            let Some(nearest) = nearest else {
                self.nearer.notified().await;
                continue;
            };
            tokio::select! {
                biased;
                () = sleep_until(nearest) => {}
                () = self.nearer.notified() => continue,
            }
            let late: Vec<Waiting> = {
                let (mut state, now) = (self.state.lock(), Instant::now());
                let late = state.waiting.iter().filter(|(_, waiting)| waiting.deadline <= now).map(|(id, _)| *id);
                let late: Vec<u64> = late.collect();
                let late = late.iter().filter_map(|id| state.waiting.remove(id)).collect();
                state.nearest = state.waiting.values().map(|waiting| waiting.deadline).min();
                late
            };
            for waiting in late {
                let message = format!("{} did not answer in time", address_of(endpoint));
                waiting.fail(Error::new(Reason::DeadlineExceeded, message));
            }
        }
    }

    async fn serve(&self, mut queue: mpsc::Receiver<Queued>, endpoint: &Endpoint) {
        let mut batch = Vec::new();
        while queue.recv_many(&mut batch, MESSAGE_REQUESTS_MAX).await > 0 {
            let why = match self.connected(&mut queue, &mut batch, endpoint).await {
                Ok(()) => "the connection was closed".to_owned(),
                Err(error) => error.to_string(),
            };
            tracing::debug!(address = address_of(endpoint), why, "connection over");
            batch.clear();
            self.fail_all(&endpoint.uri().to_string(), &why);
        }
    }

    /// One connection from its beginning to its end. `batch` holds the first requests.
    async fn connected(
        &self,
        queue: &mut mpsc::Receiver<Queued>,
        batch: &mut Vec<Queued>,
        endpoint: &Endpoint,
    ) -> Result<(), Error> {
        let channel = within(async { endpoint.connect().await.map_err(|e| refused(&e)) }).await?;
        let mut client =
            KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX).max_encoding_message_size(usize::MAX);
        let (out, outgoing) = mpsc::channel(MESSAGES_QUEUED_MAX);
        let opened = client.pipeline(ReceiverStream::new(outgoing));
        let mut answers = within(async { opened.await.map_err(|status| proto::error_of(&status)) }).await?.into_inner();
        let read = async {
            while let Some(reply) = answers.message().await.map_err(|status| proto::error_of(&status))? {
                self.answer(reply).map_err(|error| Error::new(Reason::Unreachable, error.to_string()))?;
            }
            Ok(())
        };
        let write = async {
            loop {
                while let Some((_, message)) = self.next_message(batch) {
                    if out.send(message).await.is_err() {
                        // The reading side learns why.
                        return std::future::pending().await;
                    }
                }
                if queue.recv_many(batch, MESSAGE_REQUESTS_MAX).await == 0 {
                    return;
                }
                // After a message of answers many callers ask again. Those that are ready do so first.
                tokio::task::yield_now().await;
                while batch.len() < MESSAGE_REQUESTS_MAX
                    && let Ok(request) = queue.try_recv()
                {
                    batch.push(request);
                }
            }
        };
        tokio::select! {
            biased;
            ended = read => ended,
            () = write => Ok(()),
        }
    }

    /// Takes requests that are still waited for out of `batch`, up to one message, and marks them as sent. Gives how many
    /// they are, too.
    fn next_message(&self, batch: &mut Vec<Queued>) -> Option<(usize, Requests)> {
        let mut bytes = 0;
        let take = batch.iter().take_while(|request| {
            let fits = bytes < MESSAGE_BYTES;
            bytes += request.body.len() + batch::REQUEST_HEAD_BYTES_MAX;
            fits
        });
        let take = take.count();
        let (mut message, mut count) = (Vec::with_capacity(bytes), 0);
        let (mut state, now) = (self.state.lock(), Instant::now());
        for Queued { id, body } in batch.drain(..take) {
            let Some(waiting) = state.waiting.get_mut(&id) else { continue };
            waiting.sent = true;
            let left_ms = waiting.deadline.saturating_duration_since(now).as_millis();
            batch::put_request(&mut message, id, u32::try_from(left_ms).unwrap_or(u32::MAX).max(1), &body);
            count += 1;
        }
        drop(state);
        match message.is_empty() {
            true if batch.is_empty() => None,
            true => self.next_message(batch),
            false => Some((count, Requests::of_pieces(vec![message.into()]))),
        }
    }

    /// Gives each answer to who waits for it, to be read there.
    fn answer(&self, message: Replies) -> Result<(), DecodeError> {
        let mut answered = Vec::new();
        let mut state = self.state.lock();
        for reply in message.parts() {
            let reply = reply?;
            answered.extend(state.waiting.remove(&batch::reply_id(&reply)?).map(|waiting| (waiting, reply)));
        }
        drop(state);
        for (waiting, reply) in answered {
            // A caller that has just left needs no answer.
            let _ = waiting.answer.send(Ok(reply));
        }
        Ok(())
    }

    fn fail_all(&self, address: &str, why: &str) {
        let waiting = {
            let mut state = self.state.lock();
            state.down = Some((Instant::now() + DOWN_FOR, why.to_owned()));
            std::mem::take(&mut state.waiting)
        };
        waiting.into_values().for_each(|waiting| waiting.fail(unreachable(address, why)));
    }
}

fn address_of(endpoint: &Endpoint) -> &str {
    endpoint.uri().authority().map_or("", |authority| authority.as_str())
}

fn unreachable(address: &str, why: &str) -> Error {
    Error::new(Reason::Unreachable, format!("{address}: {why}"))
}

fn refused(error: &tonic::transport::Error) -> Error {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        why = format!("{why}: {cause}");
        source = cause.source();
    }
    Error::new(Reason::Unreachable, why)
}

async fn within<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match timeout(CONNECT_MAX, work).await {
        Ok(done) => done,
        Err(_) => Err(Error::new(Reason::Unreachable, format!("no connection within {} ms", CONNECT_MAX.as_millis()))),
    }
}

/// How to reach a node.
///
/// # Errors
/// When the address is malformed.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, Error> {
    let malformed = || Error::field("address", format!("\"{address}\" is not an address; give host:port"));
    let has_port = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !has_port {
        return Err(malformed());
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| malformed())?;
    Ok(endpoint
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_EVERY)
        .keep_alive_timeout(KEEPALIVE_MAX)
        .keep_alive_while_idle(true)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES))
}

/// A connection for calls other than the pipeline's.
pub(crate) async fn connect(address: &str) -> Result<Channel, Error> {
    let endpoint = endpoint(address)?;
    within(async { endpoint.connect().await.map_err(|e| refused(&e)) })
        .await
        .map_err(|error| unreachable(address, &error.message))
}

#[cfg(test)]
mod tests;
