//! One node: the replicas it hosts and how it runs.

pub mod config;
