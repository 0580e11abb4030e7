//! Bar charts as SVG, written by hand: one group of bars per workload, each group on a scale of its own.

use crate::{
    report::{Row, Sample, thousands},
    system::Way,
    workload::Clients,
};
use std::fmt::Write as _;

const WIDTH: usize = 900;
const LABEL_WIDTH: usize = 190;
const BAR_WIDTH_MAX: f64 = 480.0;
const BAR_HEIGHT: usize = 18;
const GROUP_GAP: usize = 34;
const TOP: usize = 50;

/// One bar: its label, how long it is, from where to where its value went, and what is written beside it.
struct Bar {
    way: Way,
    value: f64,
    least: f64,
    most: f64,
    note: String,
}

/// Every chart, with its file's name.
pub(crate) fn all(rows: &[Row]) -> Vec<(&'static str, String)> {
    let rate = chart("Operations or rows per second (longer is better)", rows, Clients::Many, |sample| sample.rate);
    let cpu = chart("CPU µs of all servers per operation or row (shorter is better)", rows, Clients::Many, |sample| {
        sample.servers_us
    });
    let one = chart("One client: p50 in ms (shorter is better)", rows, Clients::One, |sample| sample.p50_ms);
    let paced = chart("At a fixed rate: p99 in ms (shorter is better)", rows, Clients::Paced, |sample| sample.p99_ms);
    let charts = [("rate.svg", rate), ("cpu.svg", cpu), ("one-client.svg", one), ("fixed-rate.svg", paced)];
    charts.into_iter().filter_map(|(name, chart)| Some((name, chart?))).collect()
}

/// One figure of the workloads with so many clients.
fn chart(title: &str, rows: &[Row], clients: Clients, of: fn(&Sample) -> f64) -> Option<String> {
    let belongs = |row: &&Row| match row.workload.clients {
        Clients::Few => clients == Clients::Many,
        own => own == clients,
    };
    let mut groups: Vec<(&str, Vec<Bar>)> = Vec::new();
    for row in rows.iter().filter(belongs) {
        let figure = row.figure(of);
        let value = figure.median;
        let note = if value >= 1_000.0 { thousands(value) } else { format!("{value:.2}") };
        let bar = Bar { way: row.way, value, least: figure.least, most: figure.most, note };
        match groups.last_mut() {
            Some((what, bars)) if *what == row.workload.what => bars.push(bar),
            _ => groups.push((row.workload.what, vec![bar])),
        }
    }
    (!groups.is_empty()).then(|| draw(title, &groups))
}

fn draw(title: &str, groups: &[(&str, Vec<Bar>)]) -> String {
    let height: usize = TOP + groups.iter().map(|(_, bars)| GROUP_GAP + bars.len() * BAR_HEIGHT).sum::<usize>() + 10;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"26\" font-size=\"16\" font-weight=\"bold\">{title}</text>\n"
    );
    let mut y = TOP;
    for (what, bars) in groups {
        let longest = bars.iter().map(|bar| bar.most).fold(f64::MIN_POSITIVE, f64::max);
        let _infallible = writeln!(svg, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{what}</text>", y + 12);
        y += GROUP_GAP - BAR_HEIGHT + 4;
        for bar in bars {
            draw_bar(&mut svg, y, bar, longest);
            y += BAR_HEIGHT;
        }
        y += BAR_HEIGHT - 4;
    }
    svg + "</svg>\n"
}

fn draw_bar(svg: &mut String, y: usize, bar: &Bar, longest: f64) {
    let x = |value: f64| LABEL_WIDTH as f64 + value / longest * BAR_WIDTH_MAX;
    let color = match bar.way {
        Way::Meridian => "#1b6ca8",
        Way::MeridianUnary => "#6fb1de",
        Way::Etcd => "#e08a2b",
        Way::Redis => "#9a9a9a",
    };
    let (end, middle) = (x(bar.value), y + BAR_HEIGHT / 2);
    let _infallible = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{LABEL_WIDTH}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{color}\"/>\
         <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"#222222\"/>\
         <text x=\"{:.1}\" y=\"{}\">{}</text>",
        LABEL_WIDTH - 8,
        y + 13,
        bar.way.name(),
        y + 2,
        end - LABEL_WIDTH as f64,
        BAR_HEIGHT - 4,
        x(bar.least),
        x(bar.most),
        x(bar.most) + 8.0,
        y + 13,
        bar.note,
    );
}
