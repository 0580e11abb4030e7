//! Who led which partition when, as far as answers say.
//!
//! Invariant: the term of a strip only goes up; a late answer of a deposed leader does not bring it back.

use super::ops::{Class, Op};
use serde::Serialize;
use std::collections::BTreeMap;

/// One leadership, as seen by those who were answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Reign {
    /// First answer.
    pub from_ns: u64,
    /// Last answer.
    pub to_ns: u64,
    /// Node.
    pub node: String,
    /// Term, where answers say it.
    pub term: Option<u64>,
}

/// Leaderships of every partition.
#[must_use]
pub fn leaders(ops: &[Op<'_>]) -> BTreeMap<u64, Vec<Reign>> {
    let mut answered: Vec<&Op<'_>> = ops.iter().filter(|op| op.done.is_some()).collect();
    answered.sort_by_key(|op| op.end_ns);
    let mut strips: BTreeMap<u64, Vec<Reign>> = BTreeMap::new();
    for op in answered {
        let Some(srv) = op.done.and_then(|done| done.srv.as_ref()) else { continue };
        let (Some(part), Some(node)) = (srv.part, srv.node.as_ref()) else { continue };
        let led = srv.role.as_ref().map_or(op.class == Class::Writes, |role| role == "leader");
        if !led || !op.outcome.answered() {
            continue;
        }
        let strip = strips.entry(part).or_default();
        match strip.last_mut() {
            Some(last) if last.node == *node && last.term == srv.term => last.to_ns = op.end_ns,
            Some(last) if last.term > srv.term => {}
            _ => strip.push(Reign { from_ns: op.end_ns, to_ns: op.end_ns, node: node.clone(), term: srv.term }),
        }
    }
    strips
}
