//! What a run found, for people (`report.html`) and for programs (`results.json`).
//!
//! Pure, like the checkers: histories and verdicts in, text out.
//!
//! Invariants:
//! * both outputs come from the same figures, computed here and not in the browser;
//! * the page is one file that loads nothing, and whatever a key, a value or a message holds stays text in it;
//! * nothing but a run that looked at something, and found every promise kept, is called a pass.

mod data;
pub mod faults;
pub mod leaders;
pub mod ops;
pub mod stats;
#[cfg(test)]
mod tests;

use crate::proof::{
    check::{Valid, Verdict},
    history::{Event, RunInfo},
};
use faults::{Fault, Outage};
use ops::Op;
use serde::Serialize;
use serde_json::{Value as Json, json};
use stats::{Count, Latency, Series};

/// Everything that a report shows.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The run as a whole.
    pub run: RunInfo,
    /// Command that repeats it.
    pub reproduce: String,
    /// Its workloads. Their clocks began together.
    pub workloads: Vec<Judged>,
    /// What must have happened for the run to mean something.
    pub gates: Vec<Gate>,
}

/// One workload: its history, and what the checkers say of it.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// The workload's `run.json`.
    pub run: RunInfo,
    /// Its history, with the faults.
    pub events: Vec<Event>,
    /// What the checkers say.
    pub verdicts: Vec<Verdict>,
}

/// One thing that must have happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Gate {
    /// What.
    pub name: String,
    /// How much of it was wanted, in words.
    pub want: String,
    /// How much there was.
    pub got: String,
    /// Whether that is enough.
    pub ok: bool,
}

/// What to call the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Looked at enough, and every promise was kept.
    Pass,
    /// A promise was broken.
    Violation,
    /// Nothing broken was found, but too little happened to say more.
    Vacuous,
    /// A checker could not finish.
    Unknown,
}

impl Report {
    /// What to call the run: what is broken first, then what keeps the rest from meaning anything.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let says = |valid| self.verdicts().any(|verdict| verdict.valid == valid);
        if says(Valid::False) {
            Outcome::Violation
        } else if self.gates.iter().any(|gate| !gate.ok) || self.verdicts().next().is_none() {
            Outcome::Vacuous
        } else if says(Valid::Unknown) {
            Outcome::Unknown
        } else {
            Outcome::Pass
        }
    }

    fn verdicts(&self) -> impl Iterator<Item = &Verdict> {
        self.workloads.iter().flat_map(|workload| &workload.verdicts)
    }
}

/// The figures behind both outputs.
struct Figures<'a> {
    /// Operations of each workload.
    ops: Vec<Vec<Op<'a>>>,
    duration_ns: u64,
    counts: Vec<Count>,
    latencies: Vec<Latency>,
    series: Vec<Series>,
    faults: Vec<Fault>,
    outages: Vec<Outage>,
    /// The same operations in one list.
    all: Vec<Op<'a>>,
}

impl<'a> Figures<'a> {
    fn of(report: &'a Report) -> Self {
        let ops: Vec<Vec<Op<'a>>> = report.workloads.iter().map(|workload| ops::ops(&workload.events)).collect();
        let all = ops.concat();
        let last = report.workloads.iter().filter_map(|workload| workload.events.last());
        let last_ns = last.map(|event| event.time).max().unwrap_or(0);
        let duration_ns = report.run.duration_ns.max(last_ns);
        let counted = report.workloads.iter().zip(&ops);
        let counts = counted.flat_map(|(workload, ops)| stats::counts(&workload.run.workload, ops)).collect();
        let faults = faults::faults(report.workloads.iter().flat_map(|workload| &workload.events));
        Self {
            counts,
            latencies: stats::latencies(&all),
            series: stats::series(&all, duration_ns),
            outages: faults::outages(&faults, &all),
            faults,
            duration_ns,
            all,
            ops,
        }
    }
}

/// Content of `results.json`.
#[must_use]
pub fn results(report: &Report) -> Json {
    let figures = Figures::of(report);
    let workloads = report.workloads.iter();
    json!({
        "verdict": report.outcome(),
        "run": report.run,
        "reproduce": report.reproduce,
        "workloads": workloads.map(|workload| json!({
            "workload": workload.run.workload,
            "verdicts": workload.verdicts,
        })).collect::<Vec<_>>(),
        "gates": report.gates,
        "operations": figures.counts,
        "latency": figures.latencies,
        "faults": figures.faults,
        "unavailability": figures.outages,
    })
}

/// Content of `report.html`.
#[must_use]
pub fn html(report: &Report) -> String {
    let data = script_safe(&data::data(report, &Figures::of(report)).to_string());
    let name = match report.outcome() {
        Outcome::Pass => "PASS",
        Outcome::Violation => "VIOLATION",
        Outcome::Vacuous => "VACUOUS",
        Outcome::Unknown => "UNKNOWN",
    };
    let title = format!("{name} · {} {} · seed {}", report.run.tool, report.run.workload, report.run.seed);
    let parts = [
        ("@@TITLE@@", markup_safe(&title)),
        ("@@STYLE@@", include_str!("report.css").to_owned()),
        ("@@DATA@@", data),
        ("@@TIMELINE@@", include_str!("timeline.js").to_owned()),
        ("@@PAGE@@", include_str!("page.js").to_owned()),
    ];
    // Each mark is looked for after the one before it, never in what was put in.
    let mut rest = include_str!("report.html");
    let mut page = String::with_capacity(rest.len() + parts.iter().map(|(_, text)| text.len()).sum::<usize>());
    for (mark, text) in parts {
        let (before, after) = rest.split_once(mark).expect("the template has every mark, in this order");
        page.push_str(before);
        page.push_str(&text);
        rest = after;
    }
    page.push_str(rest);
    page
}

/// JSON that cannot end the script element which holds it.
fn script_safe(json: &str) -> String {
    // In JSON these stand in strings only, where the escape means the same.
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

fn markup_safe(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect::<String>();
    printable.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
