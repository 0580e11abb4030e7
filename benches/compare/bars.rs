//! What Meridian is meant to reach, beside what a run gave.

use crate::{
    report::{Report, Sample, Table},
    system::Way,
};

/// Figures that are no workload's, by name.
pub(crate) const PUT_BESIDE_SCAN: &str = "put p99 beside a long scan, to its own without";
pub(crate) const KILLED_MS: &str = "no put answered when the leader is killed, ms";
pub(crate) const KILLED_EQUAL_MS: &str = "the same with equal election timeouts, ms";
pub(crate) const OVERHEAD_BYTES: &str = "memory over key and value, bytes per row and replica";
pub(crate) const REWRITE_PEAK: &str = "memory at most while all rows are written again, to that at rest";

enum Aim {
    AtLeast(f64),
    AtMost(f64),
}
use Aim::{AtLeast, AtMost};

type Part = fn(&Sample) -> f64;
const RATE: Part = |sample| sample.rate;
const P50: Part = |sample| sample.p50_ms;
const P99: Part = |sample| sample.p99_ms;
const SERVERS: Part = |sample| sample.servers_us;

/// Ratios to etcd.
const RATIOS: &[(&str, &str, Way, Part, Aim)] = &[
    ("put, library: rate × etcd", "put", Way::Meridian, RATE, AtLeast(10.0)),
    ("get, linearizable, library: rate × etcd", "get", Way::Meridian, RATE, AtLeast(20.0)),
    ("get, eventual, library: rate × etcd", "get-eventual", Way::Meridian, RATE, AtLeast(25.0)),
    ("scan of 1,000 rows, library: rows × etcd", "scan-1000", Way::Meridian, RATE, AtLeast(10.0)),
    ("YCSB A, library: rate × etcd", "ycsb-a", Way::Meridian, RATE, AtLeast(12.0)),
    ("put, unary: rate × etcd", "put", Way::MeridianUnary, RATE, AtLeast(4.0)),
    ("get, linearizable, unary: rate × etcd", "get", Way::MeridianUnary, RATE, AtLeast(3.0)),
    ("get, eventual, unary: rate × etcd", "get-eventual", Way::MeridianUnary, RATE, AtLeast(3.0)),
    ("put, one client: p50 × etcd", "one-put", Way::Meridian, P50, AtMost(0.6)),
    ("get, linearizable, one client: p50 × etcd", "one-get", Way::Meridian, P50, AtMost(0.5)),
    ("get, eventual, one client: p50 × etcd", "one-eventual", Way::Meridian, P50, AtMost(0.5)),
    ("put at a fixed rate: p99 × etcd", "paced-put", Way::Meridian, P99, AtMost(1.0)),
    ("get, linearizable, at a fixed rate: p99 × etcd", "paced-get", Way::Meridian, P99, AtMost(1.0)),
];

/// CPU of the servers, µs per operation.
const CPU: &[(&str, &str, f64)] =
    &[("get, linearizable: CPU of all servers, µs", "get", 10.0), ("put: CPU of all servers, µs", "put", 40.0)];

/// What was reached of what was meant; what this run did not measure is left out.
pub(crate) fn table(report: &Report) -> Table {
    let mut table = Table::new("What is meant to be reached", &["Bar", "aim", "this run", "met"]);
    let mut push = |what: &str, found: Option<f64>, aim: &Aim| {
        let Some(found) = found else { return };
        let (word, limit, met) = match aim {
            AtLeast(limit) => ("at least", limit, found >= *limit),
            AtMost(limit) => ("at most", limit, found <= *limit),
        };
        let digits = if found < 10.0 { 2 } else { 1 };
        let row = [what.to_owned(), format!("{word} {limit}"), format!("{found:.digits$}")];
        table.push(row.into_iter().chain([if met { "yes" } else { "**no**" }.to_owned()]).collect());
    };
    for (what, workload, way, part, aim) in RATIOS {
        let row = report.rows.iter().find(|row| row.way == *way && row.workload.name == *workload);
        push(what, row.and_then(|row| report.ratio(row, part)), aim);
    }
    for (what, workload, limit) in CPU {
        let row = report.rows.iter().find(|row| row.way == Way::Meridian && row.workload.name == *workload);
        push(what, row.map(|row| row.figure(SERVERS).median), &AtMost(*limit));
    }
    let of = |name, way| report.figures.get(&(name, way)).copied();
    push(PUT_BESIDE_SCAN, of(PUT_BESIDE_SCAN, Way::Meridian), &AtMost(3.0));
    push(KILLED_MS, of(KILLED_MS, Way::Meridian), &AtMost(2_000.0));
    let equal = of(KILLED_EQUAL_MS, Way::Meridian).zip(of(KILLED_EQUAL_MS, Way::Etcd));
    push(
        "no put answered when the leader is killed, equal timeouts: × etcd",
        equal.map(|(us, etcd)| us / etcd),
        &AtMost(1.0),
    );
    push(OVERHEAD_BYTES, of(OVERHEAD_BYTES, Way::Meridian), &AtMost(64.0));
    push(REWRITE_PEAK, of(REWRITE_PEAK, Way::Meridian), &AtMost(1.3));
    table
}
