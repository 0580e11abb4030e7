// The page around the timeline. All text comes in through textContent: nothing of a history is ever markup.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element: `make("td.n", "12")`, `make("p", [child, "text"], { title: "…" })`. */
function make(what, content = [], more = {}) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const part of [content].flat()) if (part !== null) element.append(part instanceof Node ? part : show(part));
  Object.assign(element, more);
  return element;
}
const row = (...cells) => make("tr", cells.map(cell => cell instanceof Node && cell.tagName === "TD" ? cell : make("td", [cell])));
const table = (heads, rows) => make("div.scroll", make("table", [
  make("thead", make("tr", heads.map(head => make(head.startsWith(">") ? "th.n" : "th", head.replace(/^>/, ""))))), make("tbody", rows)]));
const n = text => make("td.n", text);
const section = (title, lead, ...children) => make("section", [make("h2", title), lead ? make("p.lead", lead) : null, ...children]);
const sum = (list, of) => list.reduce((total, item) => total + of(item), 0);

const page = document.getElementById("page");
const order = ["false", "unknown", "true"];
const verdicts = data.workloads.flatMap(w => w.verdicts.map(v => ({ ...v, workload: w.name })))
  .sort((a, b) => order.indexOf(a.valid) - order.indexOf(b.valid));
const violations = verdicts.flatMap(v => v.violations.map(x => ({ ...x, checker: v.checker, workload: v.workload })));
const many = data.workloads.length > 1;
const installed = data.faults.filter(f => !f.skipped), skipped = data.faults.length - installed.length;
const asked = data.asked, clients = sum(data.workloads, w => w.lanes);
const okay = sum(data.counts, c => c.ok), unknown = sum(data.counts, c => c.info), failed = sum(data.counts, c => c.fail);

// ---- verdict ----------------------------------------------------------------------------------------------------
function headline() {
  const shut = data.gates.filter(gate => !gate.ok), unsure = verdicts.filter(v => v.valid === "unknown");
  const broken = verdicts.filter(v => v.valid === "false");
  const ran = `${plural(clients, "client")} ran ${plural(asked, "operation")} against ${plural(data.nodes.length, "node")} for ${span(data.duration_us)}` +
    (installed.length ? ` while ${plural(installed.length, "fault")} took effect.` : " without faults.");
  const says = {
    violation: `${ran} ${broken.map(v => v.checker).join(", ")} found ${plural(violations.length, "broken promise")}.`,
    pass: `${ran} All ${plural(verdicts.length, "checker")} looked at what the clients saw, and every promise held.`,
    vacuous: `${ran} Nothing broken was found, but too little happened to call it a pass: ${shut.map(g => g.name).join(", ") || "nothing was judged"}.`,
    unknown: `${ran} Nothing broken was found, but ${unsure.map(v => v.checker).join(", ")} could not reach a verdict.`,
  }[data.verdict];
  const mark = { violation: "✗", pass: "✓", vacuous: "○", unknown: "?" }[data.verdict];
  const fact = (name, value) => value === "" || value === null || value === undefined ? null : make("div", [make("dt", name), make("dd", value)]);
  const copy = make("button", "Copy", { title: "Copy the command" });
  copy.onclick = () => navigator.clipboard?.writeText(data.reproduce).then(() => { copy.textContent = "Copied"; });
  const theme = make("button", "◐", { title: "Light or dark" });
  theme.onclick = () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark"; timeline.restyle();
  };
  return make(`header.verdict.tone-${data.verdict}`, [
    make("div", [make("h1", `${mark} ${data.verdict.toUpperCase()}`), make("p.says", says)]),
    make("div.brand", [`Meridian ${data.run.tool} `, theme, make("div", data.run.version)]),
    make("dl.facts", [
      fact(many ? "workloads" : "workload", data.workloads.map(w => w.name).join(", ")), fact("seed", String(data.run.seed)),
      fact("nodes", count(data.nodes.length)), fact("clients", count(clients)), fact("duration", span(data.duration_us)),
      fact("operations", count(asked)), fact("happened", count(okay)), fact("failed", count(failed)), fact("unknown outcome", count(unknown)),
      fact("faults", count(installed.length) + (skipped ? ` (+${skipped} skipped)` : "")),
      fact("began", data.run.started_wall_ms ? new Date(data.run.started_wall_ms).toISOString().slice(0, 19).replace("T", " ") + " UTC" : null),
    ]),
    data.reproduce ? make("div.command", [make("span.muted", "again"), make("code", data.reproduce), copy]) : null,
  ]);
}

// ---- violations -------------------------------------------------------------------------------------------------
const dot = name => make(`span.dot.c-${name}`);
const ends = ["happened", "condition did not hold", "failed", "unknown"];

function violationCard(x) {
  const ops = timeline.ops;
  const goto = make("button", "Show in the timeline");
  goto.onclick = () => showViolation(x);
  const lines = [...x.ops].sort((a, b) => ops.start[a] - ops.start[b]).map(i => {
    const line = row(n(moment(ops.start[i])), n(span(ops.end[i] - ops.start[i])), clientName(i),
      make("td.text", make("code", opLine(ops, i))), make("td", [dot(OUTCOMES[ops.outcome[i]]), ends[ops.outcome[i]]]),
      served(i), n(indexes(i)));
    line.className = "link"; line.onclick = () => { showViolation(x); timeline.select(i); };
    return line;
  });
  for (const o of x.others) lines.push(row(n(o.time_us === null ? "" : moment(o.time_us)), "", "", make("td.text", make("code", o.said ?? "not in the history")), "", "", n(`#${o.index}`)));
  return make("article.violation-card", [
    make("header", [make("span.kind", x.kind), make("span.muted", `${x.checker}${many ? " · " + x.workload : ""}${x.key == null ? "" : " · key " + x.key} · ${moment(x.from_us)} – ${moment(x.to_us)}`), goto]),
    make("p.what", x.what),
    lines.length ? table([">asked", ">took", "client", "operation", "outcome", "served by", ">events"], lines) : null,
    x.left_out ? make("p.muted", `and ${plural(x.left_out, "more event")}`) : null,
  ]);
}
const indexes = i => `#${timeline.ops.number("index", i)}` + (timeline.ops.number("done", i) === null ? "" : ` #${timeline.ops.number("done", i)}`);
function served(i) {
  const o = timeline.ops, node = o.text("node", i), term = o.number("term", i), part = o.number("part", i);
  return node === null ? "" : [node, o.text("role", i), part === null ? null : `partition ${part}`, term === null ? null : `term ${term}`].filter(x => x !== null).join(", ");
}
function clientName(i) {
  let lane = timeline.ops.lane[i];
  for (const w of data.workloads) { if (lane < w.lanes) return `${many ? w.name + " " : ""}${lane}`; lane -= w.lanes; }
  return "";
}
function showViolation(x) {
  const shown = x.ops.map(i => [timeline.ops.start[i], timeline.ops.end[i]]);
  const from = Math.min(x.from_us, ...shown.map(s => s[0])), to = Math.max(x.to_us, ...shown.map(s => s[1]));
  const margin = Math.max(1000, (to - from) * .25);
  if (x.key != null) { keyBox.value = x.key; applyFilter(); }
  timeline.look(from - margin, to + margin); timeline.reveal();
}

// ---- checkers and gates -----------------------------------------------------------------------------------------
const looked = v => Object.entries(v.looked_at).map(([name, many]) => `${count(many)} ${name.replace(/_/g, " ")}`).join(" · ") || "nothing was looked at";
/** A line per workload, a column per checker; whatever is not held also as a card, in full. */
function checkers() {
  const state = { true: "✓", false: "✗ broken", unknown: "? unknown" }, tone = { true: "yes", false: "no", unknown: "unsure" };
  const names = [...new Set(data.workloads.flatMap(w => w.verdicts.map(v => v.checker)))];
  const cell = v => v ? make(`td.${tone[v.valid]}`, state[v.valid], { title: looked(v) }) : make("td", "");
  const rows = data.workloads.map(w => row(make("td", make("b", w.name)), ...names.map(name => cell(w.verdicts.find(v => v.checker === name)))));
  const cards = verdicts.filter(v => v.valid !== "true").map(v => make(`div.card.${v.valid}`, [
    make("span.state", state[v.valid]), make("h3", `${v.checker}${many ? " · " + v.workload : ""}`), make("div.counts", looked(v)),
    v.violations.length ? make("div.counts", v.valid === "false" ? plural(v.violations.length, "violation") : v.violations.map(x => x.what).join("; ")) : null,
  ]));
  return make("div", [cards.length ? make("div.cards", cards) : null, table(["", ...names], rows),
    make("details", [make("summary", "What each looked at"), table(["workload", "checker", "looked at"],
      data.workloads.flatMap(w => w.verdicts.map(v => row(w.name, v.checker, make("td.text", looked(v))))))])]);
}
function gates() {
  const line = g => row(make("td.text", g.name), n(g.want), n(g.got), make(g.ok ? "td.yes" : "td.no", g.ok ? "✓" : "✗ too little"));
  const all = of => table(["what must have happened", ">wanted", ">got", ""], of.map(line)), shut = data.gates.filter(g => !g.ok);
  return make("div", [shut.length ? all(shut) : null,
    make("details", [make("summary", `${count(data.gates.length - shut.length)} of ${count(data.gates.length)} happened`), all(data.gates)])]);
}

// ---- figures ----------------------------------------------------------------------------------------------------
const countTable = () => table([...(many ? ["workload"] : []), "operation", "level", ">happened", ">condition did not hold", ">failed", ">unknown"],
  data.counts.map(c => row(...(many ? [c.workload] : []), c.f, c.mode ?? "", n(count(c.ok)), n(count(c.mismatch)), n(count(c.fail - c.mismatch)), n(count(c.info)))));
const latencyTable = () => table(["class", ">answered", ">p50", ">p90", ">p99", ">p99.9", ">longest"],
  data.latency.map(l => row(l.class, n(count(l.answered)), ...[l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.max_us].map(us => n(span(us))))));

function outageTable() {
  const classes = data.series.map(s => s.class), most = Math.max(1, ...data.outages.map(o => o.longest_gap_us));
  const cell = o => {
    if (!o || !o.asked) return make("td.gap", make("small", "nobody asked"));
    const bar = make("span.bar");
    bar.style.width = Math.max(1, o.longest_gap_us / most * 100) + "%";
    const first = o.fault === null ? `${count(o.answered)} answered` : o.first_ok_us === null ? "never answered again" : `first ok after ${span(o.first_ok_us)}`;
    return make("td.gap", [span(o.longest_gap_us) + (o.never_ended ? ", to the end" : ""), make("small", first), bar]);
  };
  const line = (fault, cells) => row(...cells, ...classes.map(c => cell(data.outages.find(o => o.fault === fault && o.class === c))));
  const rows = [line(null, [make("td", "—"), make("td", make("b", "no fault")), make("td", "to compare with"), make("td", "")])];
  data.faults.forEach((f, at) => {
    const from = f.from_ns / 1e3, to = f.to_ns === null ? data.duration_us : f.to_ns / 1e3;
    const cells = [n(moment(from, 1e5)), make("td", make("b", f.f)), make("td.text", [f.nodes.join(", "), f.what ? make("div.muted", f.what) : null])];
    const r = f.skipped ? row(...cells, make("td.muted", "skipped")) : line(at, [...cells, n(to > from ? span(to - from) + (f.to_ns === null ? ", not healed" : "") : "at once")]);
    r.className = "link"; r.title = "Show in the timeline";
    r.onclick = () => { const m = Math.max(5e5, (to - from) * .3); timeline.look(from - m, to + m); plots.scrollIntoView({ behavior: "smooth" }); };
    rows.push(r);
  });
  return table([">at", "fault", "nodes", ">lasted", ...classes], rows);
}

// ---- one operation ----------------------------------------------------------------------------------------------
const detail = document.getElementById("detail");
function showOp(i) {
  detail.hidden = i < 0;
  if (i < 0) return;
  const o = timeline.ops, close = make("button.close", "✕", { title: "Close (Esc)" });
  close.onclick = () => timeline.select(-1);
  const both = (...parts) => parts.filter(part => part !== null && part !== "").join(" · ") || null;
  const named = (name, value) => value === null ? null : `${name} ${value}`;
  const lines = [
    ["asked", both(o.text("f", i), o.text("read", i))], ["key", o.text("key", i)], ["argument", o.text("arg", i)],
    ["answer", o.outcome[i] < 2 ? o.text("res", i) ?? "as asked" : null], ["error", o.text("error", i)],
    ["from, to", `${moment(o.start[i], 1)} – ${moment(o.end[i], 1)}`], ["took", span(o.end[i] - o.start[i])],
    ["client", both(clientName(i), named("process", o.number("process", i)))], ["session", o.text("session", i)],
    ["request", both(o.text("req", i), named("attempts", o.number("attempts", i)))], ["asked node", o.text("asked_node", i)],
    ["served by", both(o.text("node", i), o.text("role", i), o.number("degraded", i) === null ? null : "another level than asked")],
    ["partition", both(o.number("part", i), named("epoch", o.number("epoch", i)))],
    ["log", both(named("index", o.number("log", i)), named("term", o.number("term", i)))],
    ["version", o.text("version", i)], ["staleness", named("at most", o.number("lag_ms", i)) && `at most ${o.number("lag_ms", i)} ms`], ["events", indexes(i)],
  ].filter(line => line[1] !== null);
  const key = o.text("key", i), steps = make("div.steps");
  for (const [name, way] of [["← before on this key", -1], ["next on this key →", 1]]) {
    const to = key === null ? -1 : neighbour(i, key, way), button = make("button", name, { disabled: to < 0 });
    button.onclick = () => { timeline.look(o.start[to] - wideOf(), o.end[to] + wideOf()); timeline.select(to); };
    steps.append(button);
  }
  const wideOf = () => Math.max(5000, (o.end[i] - o.start[i]) * 4);
  detail.replaceChildren(
    make("header", [dot(OUTCOMES[o.outcome[i]]), make("b", `${o.text("f", i)} ${ends[o.outcome[i]]}`), close]),
    make("table", lines.map(([name, value]) => make("tr", [make("th", name), make("td.text", make("code", value))]))), steps);
}
/** The operation on the same key, in the same workload, that was asked next or before. */
function neighbour(i, key, way) {
  const o = timeline.ops, workload = lane => { let at = 0; for (const w of data.workloads) { if (lane < w.lanes) return at; lane -= w.lanes; at++; } return at; };
  for (let at = i + way; at >= 0 && at < o.length; at += way)
    if (o.text("key", at) === key && workload(o.lane[at]) === workload(o.lane[i])) return at;
  return -1;
}

// ---- the page ---------------------------------------------------------------------------------------------------
const keyBox = make("input", [], { placeholder: "only this key", size: 18 }), classBox = make("select");
classBox.append(make("option", "all operations", { value: "" }), ...data.series.map(s => make("option", s.class, { value: s.class })),
  make("option", "failed or unknown", { value: "!" }));
function applyFilter() {
  const key = keyBox.value, kind = classBox.value, ops = timeline.ops;
  timeline.filter(!key && !kind ? null : i => (!key || show(ops.text("key", i) ?? "") === show(key))
    && (!kind || (kind === "!" ? ops.outcome[i] > 1 : ops.text("class", i) === kind)));
}
keyBox.oninput = classBox.onchange = applyFilter;
const tool = (text, does, title) => { const b = make("button", text, { title }); b.onclick = does; return b; };
const plots = make("div.plots");
const has = outcome => data.ops.length && [data.ops.columns.outcome].flat().includes(outcome);
const legend = make("div.legend", [["ok", "happened", true], ["mismatch", "condition did not hold", has(1)], ["fail", "failed", has(2)], ["info", "unknown outcome", has(3)],
  ["fault", "a fault is in effect", installed.length], ["bad", "broken promise", violations.length]]
  .filter(([, , there]) => there).map(([name, text]) => make("span", [dot(name), text])));
const broken = make("section");
page.append(headline(), broken,
  make("div.two", [
    section("Checkers", "Each reads the history of what clients asked and were told, and looks for a promise that was broken.", checkers()),
    data.gates.length ? section("Coverage", "A run in which nothing happened proves nothing: this much must have happened.", gates()) : make("span"),
  ]),
  section("What happened", "Everything shares one time axis. Drag to move; the wheel zooms over the clients (with Ctrl or Shift everywhere), so do the keys + − 0 ← →; a click on an operation shows its question and its answer.",
    make("div.tools", [tool("Whole run", () => timeline.whole(), "0"), tool("+", () => timeline.zoom(.5), "Closer"), tool("−", () => timeline.zoom(2), "Wider"), keyBox, classBox, legend]), plots));
const timeline = Timeline(data, plots, document.getElementById("tip"), showOp);
if (violations.length) broken.replaceWith(section(violations.length === 1 ? "The broken promise" : `${violations.length} broken promises`, null, ...violations.map(violationCard)));
if (data.faults.length) page.append(section("What each fault cost", "Longest time without an answer, from the begin of the fault or the last answer before, to the next answer; and how soon a question asked after the fault began was answered. A row shows its fault in the timeline.", outageTable()));
page.append(make("div.two", [section("Operations", null, countTable()), section("Latency of answered operations", null, latencyTable())]));
const promises = data.workloads.flatMap(w => Object.entries(w.promises).map(([f, what]) => `${many ? w.name + ", " : ""}${f}: ${what}`));
page.append(make("details", [make("summary", "How to read this"), make("ul", [
  "Happened: the client was told so. Failed: it was told that the operation certainly did not take place. Unknown: nobody told it; the operation may take place later, and every checker allows for both.",
  "Checkers look only at what clients saw: begin and end of each operation by one clock, and its answer. Unknown as a verdict means that a checker could not finish; it is not a pass.",
  "Reads have levels. Linearizable and lease reads see every write acknowledged before they began; bounded reads may be stale up to a stated bound; session reads see at least what their session has seen; eventual reads see some past state.",
  "Latency is that of answered operations. Each client waits for its answer before it asks again: during an outage few operations are asked, so look at the gaps above, not only at percentiles.",
  ...promises,
].map(text => make("li", text)))]), make("details", [make("summary", "Settings of the run"), make("pre", [], { textContent: JSON.stringify(data.run, null, 2) })]));
// Paper is light, and only what is drawn again at its width fits on it.
let before = null;
addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme ?? ""; document.documentElement.dataset.theme = "light"; timeline.restyle(); });
addEventListener("afterprint", () => { if (before) document.documentElement.dataset.theme = before; else delete document.documentElement.dataset.theme; timeline.restyle(); });
