//! Proof: histories of what clients saw, the workloads that make them, and the checkers that judge them.
//!
//! The simulation (`tests/sim`) and `meridian drill` share all of it. [`workload`] is what clients do, each request through
//! a [`door::Door`], written down by a [`recorder::Recorder`]. [`history`] is the format `kvhist/1`; [`check`] is pure: it
//! reads a history and knows nothing of how it was made, so that it can judge the histories of other tools, and other
//! tools ours. [`report`] shows what a run found.

pub mod check;
pub mod door;
pub mod history;
mod perform;
pub mod recorder;
pub mod report;
mod wire;
pub mod workload;
