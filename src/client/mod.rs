//! To be written.
#![allow(dead_code)]
mod attempt;
mod gather;
mod page;
pub mod query;
pub mod router;
pub mod routing;
mod scan;
mod sessions;
pub mod token;
