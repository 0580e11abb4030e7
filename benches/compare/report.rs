//! What was measured: as a table for people, as JSON, and in the README.

use crate::{
    Options, bars,
    load::Window,
    plot,
    system::{System, Way},
    workload::{Clients, Workload},
};
use anyhow::Context as _;
use serde_json::{Value as Json, json};
use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, process::Command};

/// Between these lines of the README is what `--save` puts there.
const BEGIN: &str = "<!-- compare: begin -->";
const END: &str = "<!-- compare: end -->";

/// What is to be known of a measurement.
pub(crate) struct Facts {
    cpu: String,
    cores: usize,
    commit: String,
    versions: BTreeMap<System, String>,
    settings: Json,
}

impl Facts {
    pub(crate) fn new(options: &Options, versions: BTreeMap<System, String>) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            cpu: model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, model)| model.to_owned()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            commit: commit(),
            versions,
            settings: json!({
                "clients": options.clients,
                "seconds": options.seconds,
                "rounds": options.rounds,
                "rows": options.rows,
                "value_bytes": options.value_bytes,
                "rate": options.rate,
                "partitions": options.partitions,
                "long_rows": options.long_rows,
                "debug_build": cfg!(debug_assertions),
            }),
        }
    }

    fn sentence(&self) -> String {
        let versions: Vec<&str> = self.versions.values().map(String::as_str).collect();
        let settings = &self.settings;
        format!(
            "{} × {}; commit {}{}. {}. {} clients, {} rows, values of {} bytes, {} rounds of {} s; fixed rate: {} per \
             second. Three replicas, syncs on; everything on one machine.",
            self.cores,
            self.cpu,
            self.commit,
            if cfg!(debug_assertions) { ", A DEBUG BUILD" } else { "" },
            versions.join(", "),
            settings["clients"],
            settings["rows"],
            settings["value_bytes"],
            settings["rounds"],
            settings["seconds"],
            settings["rate"],
        )
    }
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| !changes.is_empty());
    let commit = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_default();
    format!("{commit}{}", if changed { " and changes" } else { "" })
}

/// One round of a workload.
pub(crate) struct Sample {
    pub(crate) rate: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) servers_us: f64,
    pub(crate) client_us: f64,
    errors: u64,
    first_error: Option<String>,
}

impl Sample {
    pub(crate) fn of(window: &Window) -> Self {
        let tally = &window.tally;
        let ms = |percentile| tally.latency_us.value_at_percentile(percentile) as f64 / 1e3;
        let each = |us: u64| us as f64 / tally.units.max(1) as f64;
        Self {
            rate: tally.units as f64 / window.length.as_secs_f64(),
            p50_ms: ms(50.0),
            p99_ms: ms(99.0),
            servers_us: each(window.servers_cpu_us),
            client_us: each(window.client_cpu_us),
            errors: tally.errors,
            first_error: tally.first_error.clone(),
        }
    }

    pub(crate) fn line(&self, way: Way) -> String {
        let errors = self.first_error.as_ref();
        let errors = errors.map_or_else(String::new, |first| format!("; {} ERRORS, the first: {first}", self.errors));
        format!(
            "{}: {}/s, p50 {:.2} ms, p99 {:.2} ms, CPU {:.1} + {:.1} µs{errors}",
            way.name(),
            thousands(self.rate),
            self.p50_ms,
            self.p99_ms,
            self.servers_us,
            self.client_us,
        )
    }

    fn json(&self) -> Json {
        json!({
            "per_second": self.rate.round(),
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "servers_cpu_us": self.servers_us,
            "client_cpu_us": self.client_us,
            "errors": self.errors,
            "first_error": self.first_error,
        })
    }
}

/// All rounds of a workload, of one way.
pub(crate) struct Row {
    pub(crate) workload: Workload,
    pub(crate) way: Way,
    pub(crate) samples: Vec<Sample>,
}

/// One figure of all rounds.
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Figure {
    /// `None` of nothing.
    pub(crate) fn of(mut all: Vec<f64>) -> Option<Self> {
        all.sort_by(f64::total_cmp);
        let (least, most) = (*all.first()?, *all.last()?);
        Some(Self { median: f64::midpoint(all[(all.len() - 1) / 2], all[all.len() / 2]), least, most })
    }
}

impl Row {
    pub(crate) fn figure(&self, of: impl Fn(&Sample) -> f64) -> Figure {
        Figure::of(self.samples.iter().map(of).collect()).expect("there is at least one round")
    }

    fn errors(&self) -> Option<String> {
        let errors: u64 = self.samples.iter().map(|sample| sample.errors).sum();
        let first = self.samples.iter().find_map(|sample| sample.first_error.as_ref())?;
        Some(format!("{}, {}: {errors} errors; the first: {first}", self.way.name(), self.workload.name))
    }
}

/// Figures that are no workload's.
pub(crate) struct Table {
    title: String,
    head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(title: &str, head: &[&str]) -> Self {
        Self { title: title.to_owned(), head: head.iter().map(|&cell| cell.to_owned()).collect(), rows: Vec::new() }
    }

    pub(crate) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Its columns aligned for those who read it as text.
    fn markdown(&self) -> String {
        let mut widths = vec![0; self.head.len()];
        for row in self.rows.iter().chain([&self.head]) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        let mut text = format!("{}:\n\n", self.title);
        for row in [&self.head, &rule].into_iter().chain(&self.rows) {
            for (cell, width) in row.iter().zip(&widths) {
                let _infallible = write!(text, "| {cell:width$} ");
            }
            text.push_str("|\n");
        }
        text
    }

    fn json(&self) -> Json {
        let object = |row: &Vec<String>| self.head.iter().cloned().zip(row.iter().cloned().map(Json::from)).collect();
        json!({ "title": self.title, "rows": self.rows.iter().map(object).collect::<Vec<Json>>() })
    }
}

/// Everything that was measured.
pub(crate) struct Report {
    pub(crate) facts: Facts,
    pub(crate) rows: Vec<Row>,
    pub(crate) tables: Vec<Table>,
    /// Bytes of memory at most, over all servers of a system.
    pub(crate) peaks: BTreeMap<System, u64>,
    /// Single figures of the tables.
    pub(crate) figures: Figures,
}

/// Single figures by their names and ways.
pub(crate) type Figures = BTreeMap<(&'static str, Way), f64>;

impl Report {
    /// A way's figure over that of etcd, in the same workload.
    pub(crate) fn ratio(&self, row: &Row, of: impl Fn(&Sample) -> f64) -> Option<f64> {
        let etcd = self.rows.iter().find(|other| other.way == Way::Etcd && other.workload == row.workload)?;
        Some(row.figure(&of).median / etcd.figure(&of).median)
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("{}\n", self.facts.sentence());
        let workloads = (!self.rows.is_empty()).then(|| self.workloads());
        let bars = Some(bars::table(self)).filter(|bars| !bars.rows.is_empty());
        for table in workloads.iter().chain(&self.tables).chain(&bars) {
            let _infallible = write!(text, "\n{}", table.markdown());
        }
        if !self.rows.is_empty() {
            let peak = |(system, bytes): (&System, &u64)| format!("{} {} MiB", system.name(), bytes >> 20);
            let peaks: Vec<String> = self.peaks.iter().map(peak).collect();
            let what = "Most memory while the workloads ran, all three servers together";
            let _infallible = writeln!(text, "\n{what}: {}.", peaks.join(", "));
        }
        for errors in self.rows.iter().filter_map(Row::errors) {
            let _infallible = writeln!(text, "\n{errors}");
        }
        text
    }

    fn workloads(&self) -> Table {
        let head = [
            "Workload",
            "Way",
            "per second (least to most)",
            "× etcd",
            "p50 ms",
            "p50 × etcd",
            "p99 ms",
            "p99 × etcd",
            "servers µs",
            "client µs",
        ];
        let mut table = Table::new("Medians over the rounds; µs of CPU per operation or row", &head);
        let mut last = "";
        for row in &self.rows {
            let rate = row.figure(|sample| sample.rate);
            let ratio = |of: fn(&Sample) -> f64| {
                self.ratio(row, of).map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
            };
            let unit = if row.workload.unit() == "rows" { " (rows)" } else { "" };
            let paced = row.workload.clients == Clients::Paced;
            table.push(vec![
                if last == row.workload.name { String::new() } else { format!("{}{unit}", row.workload.what) },
                row.way.name().to_owned(),
                format!("{} ({} to {})", thousands(rate.median), thousands(rate.least), thousands(rate.most)),
                if paced { "–".to_owned() } else { ratio(|sample| sample.rate) },
                format!("{:.2}", row.figure(|sample| sample.p50_ms).median),
                ratio(|sample| sample.p50_ms),
                format!("{:.2}", row.figure(|sample| sample.p99_ms).median),
                ratio(|sample| sample.p99_ms),
                format!("{:.1}", row.figure(|sample| sample.servers_us).median),
                format!("{:.1}", row.figure(|sample| sample.client_us).median),
            ]);
            last = row.workload.name;
        }
        table
    }

    fn json(&self) -> Json {
        let rows: Vec<Json> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "workload": row.workload.name,
                    "way": row.way.name(),
                    "unit": row.workload.unit(),
                    "per_second": row.figure(|sample| sample.rate).median.round(),
                    "ratio_to_etcd": self.ratio(row, |sample| sample.rate),
                    "rounds": row.samples.iter().map(Sample::json).collect::<Vec<_>>(),
                })
            })
            .collect();
        let named = |system: &System| system.name().to_owned();
        let peaks: BTreeMap<_, _> = self.peaks.iter().map(|(system, bytes)| (named(system), bytes)).collect();
        let versions: BTreeMap<_, _> = self.facts.versions.iter().map(|(system, v)| (named(system), v)).collect();
        json!({
            "machine": { "cpu": self.facts.cpu, "cores": self.facts.cores },
            "commit": self.facts.commit,
            "versions": versions,
            "settings": self.facts.settings,
            "results": rows,
            "tables": self.tables.iter().map(Table::json).collect::<Vec<_>>(),
            "peak_resident_bytes": peaks,
        })
    }

    /// Writes the results where they stay until the next comparison.
    pub(crate) fn keep(&self, dir: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(&self.json())?;
        write(&dir.join("results.json"), &text)?;
        write(&dir.join("results.md"), &self.markdown())?;
        self.plots(dir)
    }

    /// Writes the results where they are committed.
    pub(crate) fn save(&self, root: &Path) -> anyhow::Result<()> {
        let readme = root.join("benches/README.md");
        let text = fs::read_to_string(&readme)?;
        let before = text.split_once(BEGIN).with_context(|| format!("{} has no line {BEGIN}", readme.display()))?.0;
        let after = text.split_once(END).with_context(|| format!("{} has no line {END}", readme.display()))?.1;
        let plots = root.join("benches/plots");
        fs::create_dir_all(&plots)?;
        self.plots(&plots)?;
        let pictures: String = plot::all(&self.rows).iter().map(|(name, _)| format!("\n![](plots/{name})\n")).collect();
        write(&readme, &format!("{before}{BEGIN}\n{}{pictures}{END}{after}", self.markdown()))
    }

    fn plots(&self, dir: &Path) -> anyhow::Result<()> {
        for (name, svg) in plot::all(&self.rows) {
            write(&dir.join(name), &svg)?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    eprintln!("writing {}", path.display());
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// A number with its thousands apart.
pub(crate) fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
