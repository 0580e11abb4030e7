//! The embedded cluster over real gRPC: what a user of any language sees.
use meridian::{
    proto::v1,
    server::dev::{DevCluster, DevConfig},
};
use v1::kv_client::KvClient;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_is_read_through_every_node() {
    meridian::telemetry::install_logs("warn", meridian::telemetry::LogFormat::Text);
    let started = tokio::time::Instant::now();
    let cluster = DevCluster::start(DevConfig::default()).await.unwrap();
    eprintln!("ready after {:?}", started.elapsed());
    for (i, address) in cluster.addresses().iter().enumerate() {
        let mut client = KvClient::connect(format!("http://{address}")).await.unwrap();
        let put = v1::PutRequest { key: "k".into(), value: format!("v{i}").into(), ..Default::default() };
        let reply = client.put(put).await.unwrap().into_inner();
        assert!(reply.applied);
        let get = v1::GetRequest { key: "k".into(), ..Default::default() };
        let reply = client.get(get).await.unwrap().into_inner();
        assert_eq!(reply.row.unwrap().value, format!("v{i}"));
        eprintln!("{:?}", reply.read);
    }
    cluster.stop().await;
}
