//! The pipeline and the library against a small server on the loopback.

use super::*;
use crate::client::{Client, Consistency};
use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{Request, Response, Status, Streaming};
use v1::{
    kv_server::{Kv, KvServer},
    reply, request,
    topology_server::{Topology, TopologyServer},
};

/// Answers gets with their key as the value; keys that begin with "silent" are never answered.
#[derive(Default)]
struct Server {
    messages: AtomicUsize,
    requests: AtomicUsize,
    /// End the stream instead of answering.
    closes: AtomicBool,
    /// Answers in a message, in reverse order.
    reverse: AtomicBool,
    port: AtomicU64,
}

#[derive(Clone, Default)]
struct Handle(Arc<Server>);

fn answer(request: v1::Request) -> Option<v1::Reply> {
    let result = match request.op? {
        request::Op::Get(get) if get.key.starts_with(b"silent") => return None,
        request::Op::Get(get) => {
            let row = v1::Row { key: get.key.clone(), value: get.key, version: 1 };
            reply::Result::Get(v1::GetReply { found: true, row: Some(row), read: None })
        }
        request::Op::OpenSession(_) => {
            reply::Result::OpenSession(v1::OpenSessionReply { client_id: vec![1; 16].into(), opened: 1 })
        }
        request::Op::Put(put) => {
            assert_eq!(put.session.expect("a write carries a session").client_id, vec![1; 16]);
            reply::Result::Write(v1::WriteReply { applied: true, version: 9, ..Default::default() })
        }
        request::Op::Scan(scan) => {
            let rows = vec![v1::Row { key: "a".into(), ..Default::default() }];
            let covered = Some(v1::Covered { range: scan.range, tokens: None });
            reply::Result::Scan(v1::ScanReply { rows, covered, ..Default::default() })
        }
        other => panic!("not used in tests: {other:?}"),
    };
    Some(v1::Reply { id: request.id, result: Some(result) })
}

type Answers<T> = Result<Response<BoxStream<'static, Result<T, Status>>>, Status>;

#[tonic::async_trait]
impl Kv for Handle {
    type PipelineStream = BoxStream<'static, Result<Replies, Status>>;
    type ScanStreamStream = BoxStream<'static, Result<v1::ScanReply, Status>>;

    async fn pipeline(&self, messages: Request<Streaming<Requests>>) -> Answers<Replies> {
        let server = Arc::clone(&self.0);
        let replies = messages.into_inner().map(move |message| {
            let requests = message?.items().map_err(|error| Status::internal(error.to_string()))?;
            server.messages.fetch_add(1, Ordering::Relaxed);
            server.requests.fetch_add(requests.len(), Ordering::Relaxed);
            if server.closes.load(Ordering::Relaxed) {
                return Err(Status::unavailable("closing"));
            }
            let mut replies: Vec<v1::Reply> = requests.into_iter().filter_map(answer).collect();
            if server.reverse.load(Ordering::Relaxed) {
                replies.reverse();
            }
            Ok(Replies::of(&replies))
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn batch_get(&self, _: Request<v1::BatchGetRequest>) -> Result<Response<v1::BatchGetReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn put(&self, _: Request<v1::PutRequest>) -> Result<Response<v1::WriteReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn delete(&self, _: Request<v1::DeleteRequest>) -> Result<Response<v1::WriteReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn compare_and_set(&self, _: Request<v1::CompareAndSetRequest>) -> Result<Response<v1::WriteReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn increment(&self, _: Request<v1::IncrementRequest>) -> Result<Response<v1::WriteReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn write(&self, _: Request<v1::BatchRequest>) -> Result<Response<v1::BatchReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn delete_range(&self, _: Request<v1::DeleteRangeRequest>) -> Result<Response<v1::DeleteRangeReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn scan(&self, _: Request<v1::ScanRequest>) -> Result<Response<v1::ScanReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn scan_stream(&self, _: Request<v1::ScanRequest>) -> Answers<v1::ScanReply> {
        Err(Status::unimplemented(""))
    }
    async fn count(&self, _: Request<v1::CountRequest>) -> Result<Response<v1::CountReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn open_session(&self, _: Request<v1::OpenSessionRequest>) -> Result<Response<v1::OpenSessionReply>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Topology for Handle {
    type WatchStream = BoxStream<'static, Result<v1::TopologyUpdate, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answers<v1::TopologyUpdate> {
        let address = format!("127.0.0.1:{}", self.0.port.load(Ordering::Relaxed));
        let update = v1::TopologyUpdate {
            map_version: 1,
            full: true,
            cluster_id: "c".into(),
            nodes: vec![v1::Node { id: 1, address, ..Default::default() }],
            keyspaces: vec![v1::Keyspace { id: 1, name: "default".into(), ..Default::default() }],
            partitions: vec![v1::Partition {
                id: 1,
                keyspace: 1,
                replicas: vec![v1::Replica { replica: 1, node: 1 }],
                leader: 1,
                term: 1,
                ..Default::default()
            }],
            ..Default::default()
        };
        let updates = futures_util::stream::iter([Ok(update)]).chain(futures_util::stream::pending());
        Ok(Response::new(updates.boxed()))
    }

    async fn list_partitions(
        &self,
        _: Request<v1::ListPartitionsRequest>,
    ) -> Result<Response<v1::ListPartitionsReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn locate(&self, _: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn serve(at: &str) -> (Arc<Server>, SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(at).await.unwrap();
    let address = listener.local_addr().unwrap();
    let handle = Handle::default();
    handle.0.port.store(address.port().into(), Ordering::Relaxed);
    let server = Arc::clone(&handle.0);
    let serving = env::spawn(async move {
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let mut router = tonic::transport::Server::builder();
        let router = router.add_service(KvServer::new(handle.clone())).add_service(TopologyServer::new(handle));
        router.serve_with_incoming(incoming).await.unwrap();
    });
    (server, address, serving)
}

fn get(key: impl Into<Bytes>) -> Vec<u8> {
    let get = v1::GetRequest { key: key.into(), ..Default::default() };
    batch::request_body(None, Some(&request::Op::Get(get)))
}

fn value_of(reply: v1::Reply) -> Bytes {
    match reply.result {
        Some(reply::Result::Get(get)) => get.row.unwrap().value,
        other => panic!("{other:?}"),
    }
}

fn within_ms(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

#[tokio::test]
async fn what_waits_goes_out_together_and_answers_find_their_requests() {
    let (server, address, _serving) = serve("127.0.0.1:0").await;
    server.reverse.store(true, Ordering::Relaxed);
    let pipeline = Pipeline::new(&address.to_string()).unwrap();
    let calls = (0..500).map(|n| {
        let pipeline = &pipeline;
        async move {
            let key = format!("key {n}");
            let reply = pipeline.call(get(key.clone()), within_ms(5_000)).await.unwrap();
            assert_eq!(value_of(reply), key);
        }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(server.requests.load(Ordering::Relaxed), 500);
    assert!(server.messages.load(Ordering::Relaxed) < 50, "{:?}", server.messages);
    assert!(pipeline.shared.state.lock().waiting.is_empty());
}

#[tokio::test]
async fn a_deadline_frees_the_request_and_says_whether_it_was_sent() {
    let (_server, address, _serving) = serve("127.0.0.1:0").await;
    let pipeline = Pipeline::new(&address.to_string()).unwrap();
    let error = pipeline.call(get("silent"), within_ms(300)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::DeadlineExceeded, Some(Outcome::Unknown)));
    assert!(pipeline.shared.state.lock().waiting.is_empty());
    // Nobody listens behind this one: the connection is accepted by the kernel and never answered.
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pipeline = Pipeline::new(&dead.local_addr().unwrap().to_string()).unwrap();
    let error = pipeline.call(get("a"), within_ms(100)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::DeadlineExceeded, Some(Outcome::NotApplied)));
}

#[tokio::test]
async fn a_lost_connection_fails_what_was_sent_as_unknown_and_is_made_again() {
    let (server, address, _serving) = serve("127.0.0.1:0").await;
    let pipeline = Pipeline::new(&address.to_string()).unwrap();
    server.closes.store(true, Ordering::Relaxed);
    let error = pipeline.call(get("a"), within_ms(5_000)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::Unreachable, Some(Outcome::Unknown)));
    server.closes.store(false, Ordering::Relaxed);
    let error = pipeline.call(get("a"), within_ms(5_000)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::Unreachable, Some(Outcome::NotApplied)), "not tried at once");
    tokio::time::sleep(DOWN_FOR).await;
    assert_eq!(value_of(pipeline.call(get("a"), within_ms(5_000)).await.unwrap()), "a");
}

#[tokio::test]
async fn a_refused_connection_is_not_applied() {
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let pipeline = Pipeline::new(&unused.to_string()).unwrap();
    let error = pipeline.call(get("a"), within_ms(5_000)).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::Unreachable, Some(Outcome::NotApplied)));
    assert!(Pipeline::new("nonsense").is_err() && Pipeline::new("host:99999").is_err());
}

#[tokio::test]
async fn requests_nobody_waits_for_are_not_sent() {
    let shared = Shared::new(1);
    let (left, _answer) = shared.begin("n", Instant::now() + CONNECT_MAX).unwrap();
    let (stayed, _answer) = shared.begin("n", Instant::now() + CONNECT_MAX).unwrap();
    drop(Guard { shared: &shared, id: Some(left) });
    let mut batch = vec![Queued { id: left, body: get("a") }, Queued { id: stayed, body: get("b") }];
    let (count, message) = shared.next_message(&mut batch).unwrap();
    let requests = message.items().unwrap();
    assert_eq!((count, requests.len(), requests[0].id), (1, 1, stayed));
    let left_ms = u128::from(requests[0].deadline_ms);
    assert!((1..=CONNECT_MAX.as_millis()).contains(&left_ms), "the node is told what is left: {left_ms} ms");
    assert!(shared.next_message(&mut batch).is_none());
}

#[tokio::test]
async fn messages_are_cut_by_bytes() {
    let shared = Shared::new(1);
    let mut answers = Vec::new();
    let mut batch: Vec<Queued> = (0..5)
        .map(|_| {
            let (id, answer) = shared.begin("n", Instant::now() + CONNECT_MAX).unwrap();
            answers.push(answer);
            Queued { id, body: get(vec![0; MESSAGE_BYTES / 2]) }
        })
        .collect();
    let mut sizes = Vec::new();
    while let Some((count, _)) = shared.next_message(&mut batch) {
        sizes.push(count);
    }
    assert_eq!(sizes, [2, 2, 1]);
}

#[tokio::test]
async fn the_library_works_over_the_wire() {
    let (_server, address, _serving) = serve("127.0.0.1:0").await;
    let client = Client::connect([address.to_string()]).await.unwrap();
    let default = client.keyspace("");
    let row = default.get("hello").consistency(Consistency::Lease).await.unwrap().unwrap();
    assert_eq!((row.key.as_ref(), row.value.as_ref()), (b"hello".as_ref(), b"hello".as_ref()));
    let written = default.put("a", "b").if_absent().return_previous().await.unwrap();
    assert!(written.applied && written.version == 9 && written.previous.is_none());
    let rows: Vec<_> = default.scan("a".."b").limit(10).rows().try_collect().await.unwrap();
    assert_eq!(rows.len(), 1);
    let error = default.scan("b".."a").await.unwrap_err();
    assert_eq!((error.reason(), error.outcome()), (Reason::RangeInverted, None));
    let session = client.session();
    assert!(default.get("x").session(&session).await.unwrap().is_some());
}

#[tokio::test]
async fn nobody_at_the_address_is_said_so() {
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let client = Client::builder([unused.to_string()]).connect_deadline(Duration::from_millis(200)).connect().await;
    let error = client.unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
    assert!(error.message().contains(&unused.to_string()), "{error}");
    let none: [String; 0] = [];
    assert_eq!(Client::connect(none).await.unwrap_err().reason(), Reason::InvalidField);
}
