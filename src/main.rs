//! The `meridian` binary: server, command line and embedded cluster.

fn main() {}
