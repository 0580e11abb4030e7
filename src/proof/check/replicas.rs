//! Replicas at the same point of their log are equal.
//!
//! Judges what the nemesis or the operator noted: events `digest` with
//! `{"part", "epoch", "applied": n | {node: n}, "digests": {node: hex}}`.
//!
//! Invariant: replicas are compared only at equal positions; of a position known of one replica only nothing follows.

use super::{Findings, Verdict, ops::History};
use crate::proof::history::{Event, Process};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// Name of the events.
pub const F: &str = "digest";

/// Compares every digest.
#[must_use]
pub fn check(history: &History<'_>) -> Verdict {
    let mut findings = Findings::default();
    let mut known: BTreeMap<(u64, u64), (&str, &str, &Event)> = BTreeMap::new();
    for event in history.events.iter().filter(|event| event.process == Process::Nemesis && event.f == F) {
        let Some((part, digests)) = event.value["part"].as_u64().zip(event.value["digests"].as_object()) else {
            findings.unknown("not-a-digest", None, format!("event {} names no partition or no digests", event.index));
            continue;
        };
        for (node, digest) in digests {
            let Some((applied, digest)) = applied(&event.value["applied"], node).zip(digest.as_str()) else { continue };
            let (other, first, by) = *known.entry((part, applied)).or_insert((node, digest, event));
            if std::ptr::eq(by, event) && other == node {
                continue;
            }
            findings.count("comparisons", 1);
            if first != digest {
                let what = format!("p{part} at {applied}: {other} has {first}, {node} has {digest}");
                findings.wrong("replicas-differ", None, what, &[by, event]);
            }
        }
    }
    findings.verdict("replicas", &["comparisons"])
}

fn applied(value: &Json, node: &str) -> Option<u64> {
    value.as_u64().or_else(|| value.get(node)?.as_u64())
}
