//! `/metrics`, `/livez` and `/readyz`, over plain HTTP/1.1 on a port of their own.
//!
//! `/livez` says that the process runs; `/readyz` that it belongs to a cluster and that every replica on it knows a
//! leader with a quorum, with the reason when it does not.

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpListener, time::sleep};

/// How often samples of histograms are put into their buckets. Until then each one is kept: with nobody who asks for the
/// metrics they would fill the memory.
const UPKEEP_EVERY: Duration = Duration::from_secs(1);

/// Says whether the node is ready, or why not.
pub(crate) type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Serves until the task is aborted.
pub(crate) async fn serve(listener: TcpListener, ready: Readiness) {
    let app = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(ready);
    if let Err(error) = axum::serve(listener, app).await {
        tracing::error!(%error, "the HTTP endpoint stopped");
    }
}

/// Keeps the metrics small, until the task is aborted.
pub(crate) async fn upkeep() {
    let handle = crate::telemetry::install_metrics();
    loop {
        sleep(UPKEEP_EVERY).await;
        handle.run_upkeep();
    }
}

async fn metrics() -> impl IntoResponse {
    let handle = crate::telemetry::install_metrics();
    ([("content-type", "text/plain; version=0.0.4")], handle.render())
}

async fn readyz(State(ready): State<Readiness>) -> (StatusCode, String) {
    match ready() {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
    }
}
