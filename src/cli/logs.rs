//! Log lines of a process that runs nodes: to stderr, for people or as JSON.

use crate::node::config::LogFormat;
use std::io::stderr;
use tracing_subscriber::EnvFilter;

/// Starts writing log lines; asked again it does nothing. `filter` is in the syntax of `RUST_LOG`; one that is not
/// understood counts as `info`.
pub fn install(filter: &str, format: LogFormat) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    let _there_already = match format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
}
