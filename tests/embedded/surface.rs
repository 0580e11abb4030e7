//! What stands around the data: topology, placement, health, reflection, metrics.

use crate::support::{Cluster, alone, eventually, put, shared};
use meridian::proto::v1;
use std::{collections::BTreeSet, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Fetches a path over HTTP: the status code and the body.
async fn http(cluster: &Cluster, index: usize, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(cluster.dev.http_addresses()[index]).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: meridian\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The sum of a metric over its labels. All nodes of the process share their metrics.
pub(crate) async fn metric(cluster: &Cluster, name: &str) -> f64 {
    let (code, text) = http(cluster, cluster.living()[0], "/metrics").await;
    assert_eq!(code, 200);
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    text.lines().filter(of_name).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watching_the_topology_brings_changes_without_asking_again() {
    let _turn = shared().await;
    let mut cluster = Cluster::start(3, 3).await;
    let mut watches = Vec::new();
    for index in 0..3 {
        let mut updates = cluster.topology(index).await.watch(v1::WatchRequest {}).await.unwrap().into_inner();
        let whole = updates.message().await.unwrap().unwrap();
        assert!(whole.full && whole.nodes.len() == 3 && !whole.cluster_id.is_empty());
        assert!(whole.keyspaces.iter().any(|keyspace| keyspace.name == "default"));
        watches.push(updates);
    }
    cluster.create_cut("news", &["m"], 3).await;
    for updates in &mut watches {
        next(updates, "the new keyspace", |update| {
            assert!(!update.full, "a change, not everything again");
            update.keyspaces.iter().any(|keyspace| keyspace.name == "news")
        })
        .await;
    }
    let partition = cluster.partitions("news").await.remove(0);
    let led = eventually("a leader", async || {
        let now = cluster.partitions("news").await.into_iter().find(|p| p.id == partition.id).unwrap();
        (now.leader != 0).then_some(now)
    })
    .await;
    let killed = cluster.index_of(led.leader);
    cluster.dev.kill(killed);
    for (index, updates) in watches.iter_mut().enumerate().filter(|(index, _)| *index != killed) {
        let update = next(updates, "the new leader", |update| {
            let news = update.leaders.iter().find(|hint| hint.partition == led.id);
            news.is_some_and(|hint| hint.leader != led.leader && hint.term > led.term)
        })
        .await;
        assert!(!update.full, "node {index}");
    }
}

/// Waits for an update that a test is after.
async fn next(
    updates: &mut tonic::Streaming<v1::TopologyUpdate>,
    what: &str,
    wanted: impl Fn(&v1::TopologyUpdate) -> bool,
) -> v1::TopologyUpdate {
    let found = async {
        loop {
            let update = updates.message().await.unwrap().expect("the stream goes on");
            if wanted(&update) {
                return update;
            }
        }
    };
    timeout(crate::support::PATIENCE, found).await.unwrap_or_else(|_| panic!("never pushed: {what}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_lists_the_services_and_health_serves() {
    let _turn = shared().await;
    let cluster = Cluster::start(1, 1).await;
    let channel = cluster.channel(0).await;
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let listed: BTreeSet<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["meridian.v1.Kv", "meridian.v1.Topology", "meridian.v1.Admin", "grpc.health.v1.Health"] {
        assert!(listed.contains(name), "{name} is not in {listed:?}");
    }
    let mut health = HealthClient::new(channel);
    for service in ["", "meridian.v1.Kv", "meridian.v1.Topology", "meridian.v1.Admin"] {
        let reply = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(reply.status(), ServingStatus::Serving, "{service:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_and_probes_answer_under_their_documented_names() {
    let _turn = shared().await;
    let mut cluster = Cluster::start(3, 3).await;
    let mut kv = cluster.kv(0).await;
    kv.put(put("default", "k", "v")).await.unwrap();
    kv.get(crate::support::get("default", "k", None)).await.unwrap();
    kv.scan(crate::support::scan("default", None)).await.unwrap();
    let (code, text) = http(&cluster, 0, "/metrics").await;
    assert_eq!(code, 200);
    for name in [
        "meridian_rpc_duration_seconds_bucket{method=\"Put\",code=\"OK\"",
        "meridian_read_served_total{consistency=\"linearizable\",role=\"leader\"}",
        "meridian_raft_propose_to_apply_seconds_count",
        "meridian_raft_leader_changes_total",
        "meridian_raft_groups{state=\"leader\"}",
        "meridian_write_batch_items_count",
        "meridian_scan_rows_returned_total",
        "meridian_build_info{version=",
        "meridian_rows",
        "meridian_mem_bytes",
        "meridian_partitions_without_leader",
        "meridian_partitions_underreplicated",
    ] {
        assert!(text.contains(name), "{name} is missing from\n{text}");
    }
    assert_eq!(http(&cluster, 0, "/livez").await.0, 200);
    eventually("readiness", async || (http(&cluster, 0, "/readyz").await.0 == 200).then_some(())).await;
    cluster.dev.kill(1);
    cluster.dev.kill(2);
    eventually("no readiness without leaders", async || {
        let (code, why) = http(&cluster, 0, "/readyz").await;
        (code == 503 && why.contains("no leader with a quorum")).then_some(())
    })
    .await;
    assert_eq!(http(&cluster, 0, "/livez").await.0, 200, "the process lives all the same");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_the_leader_of_the_placement_driver_disturbs_nobody() {
    let _turn = alone().await;
    let mut cluster = Cluster::start(5, 3).await;
    cluster.create_even("busy", 0, v1::Layout::Hashed, 16).await;
    let status = async |index: usize| {
        cluster.admin(index).await.cluster_status(v1::ClusterStatusRequest {}).await.unwrap().into_inner()
    };
    let led = eventually("a driver on five nodes", async || {
        let now = status(0).await;
        (now.driver_leader != 0 && now.driver_members.len() == 5).then_some(now)
    })
    .await;
    let driver = cluster.index_of(led.driver_leader);
    // The node dies with the driver's leader on it: what it led itself has an election, everything else must not notice.
    let client = cluster.client().await;
    let elsewhere: BTreeSet<u64> = eventually("leaders", async || {
        let all = cluster.partitions("busy").await;
        all.iter()
            .all(|p| p.leader != 0)
            .then(|| all.iter().filter(|p| p.leader != led.driver_leader).map(|p| p.id).collect())
    })
    .await;
    assert!(!elsewhere.is_empty());
    let mut topology = cluster.topology((driver + 1) % 5).await;
    let mut keys = Vec::new();
    for n in 0..200 {
        let (keyspace, key) = ("busy".to_owned(), format!("key {n}"));
        let locate = v1::LocateRequest { keyspace, key: key.clone().into() };
        let partition = topology.locate(locate).await.unwrap().into_inner().partition.unwrap().id;
        if elsewhere.contains(&partition) {
            keys.push(key);
        }
    }
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let load = meridian::env::spawn(async move {
        let busy = client.keyspace("busy");
        let (mut rounds, mut slowest) = (0_u64, Duration::ZERO);
        while !*stopped.borrow() || rounds == 0 {
            for key in &keys {
                let began = Instant::now();
                let value = rounds.to_string();
                busy.put(key, &value).await.unwrap();
                assert_eq!(busy.get(key).await.unwrap().unwrap().value, value);
                slowest = slowest.max(began.elapsed());
            }
            rounds += 1;
        }
        (rounds, slowest)
    });
    cluster.dev.kill(driver);
    let living = cluster.living()[0];
    eventually("another leader of the driver", async || {
        let now = cluster.admin(living).await.cluster_status(v1::ClusterStatusRequest {}).await.unwrap().into_inner();
        (now.driver_leader != 0 && now.driver_leader != led.driver_leader).then_some(())
    })
    .await;
    cluster.create_cut("afterwards", &["m"], 3).await;
    stop.send(true).unwrap();
    let (rounds, slowest) = load.await.unwrap();
    eprintln!("{rounds} rounds of reads and writes beside the death, the slowest pair took {slowest:?}");
    for index in cluster.living() {
        let mut kv = cluster.kv(index).await;
        assert!(kv.put(put("afterwards", "z", "v")).await.unwrap().into_inner().applied);
    }
}
