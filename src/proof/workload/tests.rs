//! The workloads against a model of a store behind the door: what it answers truthfully, and what it lies about.
