use super::{
    super::endpoint::{CallError, Endpoint, Reply, Service},
    *,
};
use bytes::Bytes;
use internal::internode_server::{Internode, InternodeServer};
use std::{collections::BTreeMap, net::SocketAddr};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const SOON: Duration = Duration::from_secs(10);

struct Mounted(Arc<FrameServer>);

#[tonic::async_trait]
impl Internode for Mounted {
    async fn join(&self, _: Request<internal::JoinRequest>) -> Result<Response<internal::JoinReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn digests(
        &self,
        _request: Request<internal::DigestsRequest>,
    ) -> Result<Response<internal::DigestsReply>, Status> {
        Err(Status::unimplemented("only frames are tested"))
    }

    async fn frames(
        &self,
        request: Request<Streaming<internal::FrameBatch>>,
    ) -> Result<Response<internal::FramesEnd>, Status> {
        self.0.serve(request.into_inner()).await.map(Response::new)
    }
}

/// Keeps what arrives, and answers it.
#[derive(Default)]
struct Keep(Mutex<Vec<Bytes>>);
impl Service for Keep {
    fn handle(&self, _from: NodeId, body: Bytes, reply: Reply) {
        self.0.lock().push(body.clone());
        reply.send(body);
    }
}

/// A node in a runtime of its own, so that dropping it is a crash: its sockets close.
struct Node {
    endpoint: Arc<Endpoint>,
    transport: Arc<GrpcTransport>,
    keep: Arc<Keep>,
    server: Arc<FrameServer>,
    address: SocketAddr,
    runtime: Option<Runtime>,
}

/// Listens on a port. One that a node had before may be that of somebody's outgoing connection for the moment: those get
/// theirs from the same numbers.
async fn listen(port: u16) -> tokio::net::TcpListener {
    let free = async {
        loop {
            match tokio::net::TcpListener::bind(("127.0.0.1", port)).await {
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                bound => return bound.unwrap(),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), free).await.expect("the port is free again")
}

impl Node {
    fn start(cluster: &str, me: NodeId, port: u16) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let transport = runtime.block_on(async { GrpcTransport::new(cluster, me, BTreeMap::new()) });
        let endpoint = Endpoint::new(me, transport.clone());
        let keep = Arc::new(Keep::default());
        for kind in [Kind::Kv, Kind::RaftSnapshot] {
            endpoint.register(kind, keep.clone());
        }
        let server = Arc::new(FrameServer::new(cluster, me, endpoint.clone()));
        let listener = runtime.block_on(listen(port));
        let address = listener.local_addr().unwrap();
        let service = InternodeServer::new(Mounted(server.clone())).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let serving = tonic::transport::Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        runtime.block_on(async {
            env::spawn(serving);
        });
        Self { endpoint, transport, keep, server, address, runtime: Some(runtime) }
    }

    fn knows(&self, node: NodeId, at: SocketAddr) {
        self.transport.set_addresses(&[(node, at.to_string())]);
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().unwrap()
    }

    fn call(&self, to: NodeId, body: Bytes) -> Result<Bytes, CallError> {
        self.runtime().block_on(async { self.endpoint.call(to, Kind::Kv, body, SOON).await })
    }

    /// Calls until there is an answer.
    fn call_until_answered(&self, to: NodeId, body: &'static str) {
        let answered = async {
            while self.endpoint.call(to, Kind::Kv, body.into(), Duration::from_millis(500)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        self.runtime().block_on(async { tokio::time::timeout(SOON, answered).await }).expect("an answer");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.endpoint.close();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn pair() -> (Node, Node) {
    let (a, b) = (Node::start("c", A, 0), Node::start("c", B, 0));
    a.knows(B, b.address);
    b.knows(A, a.address);
    (a, b)
}

#[test]
fn frames_arrive_in_order_and_are_answered() {
    let (a, b) = pair();
    let bodies: Vec<Bytes> =
        (0..5_000_u64).map(|n| [&n.to_be_bytes(), vec![7; n as usize % 999].as_slice()].concat().into()).collect();
    a.runtime().block_on(async {
        // Two windows, so that the queue is never full.
        for window in bodies.chunks(2_500) {
            let calls: Vec<_> = window.iter().map(|body| a.endpoint.call(B, Kind::Kv, body.clone(), SOON)).collect();
            for (call, body) in calls.into_iter().zip(window) {
                assert_eq!(call.await.as_ref(), Ok(body));
            }
        }
    });
    assert!(*b.keep.0.lock() == bodies);
    assert!(a.endpoint.last_contact(B).is_some() && b.endpoint.last_contact(A).is_some());
}

#[test]
fn a_call_ends_with_its_connection_and_not_at_its_deadline() {
    struct Silent(mpsc::UnboundedSender<()>);
    impl Service for Silent {
        fn handle(&self, _from: NodeId, _body: Bytes, _reply: Reply) {
            self.0.send(()).unwrap();
        }
    }
    let (a, b) = pair();
    a.call_until_answered(B, "hello");
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    b.endpoint.register(Kind::Driver, Arc::new(Silent(arrived)));
    let call = a.endpoint.call(B, Kind::Driver, "no answer".into(), SOON);
    a.runtime().block_on(async {
        let call = env::spawn(call);
        arrivals.recv().await.unwrap();
        drop(b);
        assert_eq!(call.await.unwrap(), Err(CallError::Lost));
        // Those that never leave, because nobody is there, say so; some of them make the connection be tried again.
        for _ in 0..20 {
            let late = a.endpoint.call(B, Kind::Driver, "nobody there".into(), SOON).await;
            assert_eq!(late, Err(CallError::NotConnected));
            tokio::time::sleep(BACKOFF.0 / 4).await;
        }
    });
    assert_eq!(a.endpoint.calls_waiting(), 0);
}

#[test]
fn a_long_frame_passes_and_one_that_cannot_fit_is_refused() {
    let (a, _b) = pair();
    let long = Bytes::from(vec![1; 10 << 20]);
    assert!(a.call(B, long.clone()).unwrap() == long);
    let more_than_half = Bytes::from(vec![1; QUEUE_BYTES / 2]);
    assert_eq!(a.call(B, more_than_half.clone()), Err(CallError::QueueFull), "clients leave half of it to Raft");
    let raft = |body: Bytes| a.endpoint.cast(B, Kind::RaftAppend, body).map_err(CallError::from);
    assert_eq!(raft(more_than_half), Ok(()));
    assert_eq!(raft(vec![1; QUEUE_BYTES].into()), Err(CallError::QueueFull));
}

#[test]
fn snapshots_have_a_lane_of_their_own() {
    let (a, b) = pair();
    assert_eq!(a.call(B, "usual".into()), Ok("usual".into()));
    assert_eq!(b.server.lanes(), [(A, 0)]);
    let chunk = a.endpoint.call(B, Kind::RaftSnapshot, "bulk".into(), SOON);
    assert_eq!(a.runtime().block_on(chunk), Ok("bulk".into()));
    assert_eq!(b.server.lanes(), [(A, 0), (A, 1)]);
}

#[test]
fn a_node_that_restarts_is_found_again() {
    let (a, b) = pair();
    assert_eq!(a.call(B, "one".into()), Ok("one".into()));
    let address = b.address;
    drop(b);
    let refused = async {
        while a.endpoint.call(B, Kind::Kv, "lost".into(), Duration::from_millis(100)).await
            != Err(CallError::NotConnected)
        {}
    };
    a.runtime().block_on(async { tokio::time::timeout(SOON, refused).await }).expect("refused at once when down");
    assert_eq!(a.transport.last_error(B).unwrap().reason, Reason::Unreachable);
    let b = Node::start("c", B, address.port());
    b.knows(A, a.address);
    a.call_until_answered(B, "two");
    assert_eq!(a.transport.last_error(B), None);
    assert!(b.keep.0.lock().iter().all(|body| body == "two"), "nothing old is sent on a new connection");
}

#[test]
fn a_node_that_moves_is_found_again() {
    let (a, b) = pair();
    a.call_until_answered(B, "one");
    let moved = Node::start("c", B, 0);
    moved.knows(A, a.address);
    a.knows(B, moved.address);
    a.call_until_answered(B, "two");
    assert_eq!((b.keep.0.lock().len(), moved.keep.0.lock().len()), (1, 1));
}

#[test]
fn strangers_are_refused_by_name() {
    let (a, b) = pair();
    let stranger = Node::start("other", NodeId(3), 0);
    stranger.knows(B, b.address);
    a.knows(NodeId(9), b.address);
    for (node, to, reason, words) in [
        (&stranger, B, Reason::ClusterMismatch, ["\"other\"", "\"c\""]),
        (&a, NodeId(9), Reason::IdentityMismatch, ["n9", "n2"]),
    ] {
        let refused = async {
            loop {
                let _ = node.endpoint.cast(to, Kind::Kv, "x".into());
                match node.transport.last_error(to) {
                    Some(error) => break error,
                    None => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let error = node.runtime().block_on(async { tokio::time::timeout(SOON, refused).await }).expect("refused");
        assert_eq!(error.reason, reason);
        assert!(words.iter().all(|word| error.message.contains(word)), "{error}");
    }
    assert!(b.keep.0.lock().is_empty());
}

#[test]
fn a_stopped_server_ends_its_streams() {
    let (a, b) = pair();
    a.call_until_answered(B, "one");
    b.server.stop();
    let ended = async {
        while a.endpoint.cast(B, Kind::Kv, "x".into()) != Err(SendError::NotConnected) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    a.runtime().block_on(async { tokio::time::timeout(SOON, ended).await }).expect("the stream ended");
}

/// What an old connection still holds must not arrive after what came on a new one, nor may a hello that was delayed
/// take the lane back.
#[tokio::test]
async fn a_later_stream_ends_those_before_it() {
    let endpoint = Endpoint::new(B, super::super::memory::MemoryNetwork::new(1).port(B));
    let keep = Arc::new(Keep::default());
    endpoint.register(Kind::Kv, keep.clone());
    let server = Arc::new(FrameServer::new("c", B, endpoint));
    let open = |life, stream| {
        let (sender, receiver) = mpsc::channel(8);
        let hello = internal::Hello {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: "c".into(),
            from: A.0,
            to: B.0,
            life,
            stream,
            lane: 0,
        };
        sender.try_send(Ok(internal::FrameBatch { hello: Some(hello), frames: Vec::new() })).unwrap();
        let server = server.clone();
        let served =
            env::spawn(async move { server.serve(tokio_stream::wrappers::ReceiverStream::new(receiver)).await });
        (sender, served)
    };
    let batch = |body: &'static str| {
        let frame = Frame { kind: Kind::Kv, call: 0, reply: false, body: body.into() };
        Ok(internal::FrameBatch { hello: None, frames: vec![frame_to_pb(frame)] })
    };
    let arrived = async |count| {
        while keep.0.lock().len() < count {
            tokio::task::yield_now().await;
        }
    };
    let (old, old_served) = open(7, 1);
    old.send(batch("1 old")).await.unwrap();
    arrived(1).await;
    let (new, _new_served) = open(7, 2);
    new.send(batch("2 new")).await.unwrap();
    arrived(2).await;
    old.send(batch("old")).await.unwrap();
    tokio::time::timeout(SOON, old_served).await.expect("in time").unwrap().expect("ends");
    let (_late, late_served) = open(7, 1);
    tokio::time::timeout(SOON, late_served).await.expect("in time").unwrap().expect_err("refused");
    new.send(batch("3 new")).await.unwrap();
    arrived(3).await;
    let (restarted, _served) = open(8, 1);
    restarted.send(batch("4 restarted")).await.unwrap();
    arrived(4).await;
    assert_eq!(*keep.0.lock(), ["1 old", "2 new", "3 new", "4 restarted"]);
}

#[test]
fn pauses_grow_to_a_bound() {
    for failures in 1..100 {
        let pause = backoff(failures);
        assert!(pause >= BACKOFF.0 / 2 && pause <= BACKOFF.1, "{failures}: {pause:?}");
    }
    assert!(backoff(10) >= BACKOFF.1 / 2);
}
