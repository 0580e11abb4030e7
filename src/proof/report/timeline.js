// Everything that has time on its horizontal axis: panels that share one zoom, drawn on canvases.
// Invariant: what is drawn costs as much as there are pixels, not as much as there are operations.

const GUTTER = 172, RIGHT = 64;
const OUTCOMES = ["ok", "mismatch", "fail", "info"];
const FONT = "12px system-ui, 'Segoe UI', Roboto, Arial, sans-serif";

// Control characters and those that turn text around are shown, not obeyed.
const show = text => String(text).replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
  c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
const count = n => Number(n).toLocaleString("en-US");
const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
const span = us => us >= 59.995e6 ? `${+(us / 6e7).toFixed(2)} min` : us >= 999.5e3 ? `${+(us / 1e6).toFixed(2)} s`
  : us >= 999.5 ? `${+(us / 1e3).toFixed(us < 1e4 ? 1 : 0)} ms` : `${Math.round(us)} µs`;
const moment = (us, step = 1e3) => `${(us / 1e6).toFixed(step >= 1e6 ? 0 : Math.min(6, Math.ceil(6 - Math.log10(step))))} s`;

function decode(packed) {
  const { length, columns, texts } = packed;
  const raw = (name, i) => Array.isArray(columns[name]) ? columns[name][i] : columns[name];
  const start = new Float64Array(length), end = new Float64Array(length);
  const lane = new Uint16Array(length), outcome = new Uint8Array(length);
  let at = 0;
  // A workload begins where time goes back.
  for (let i = 0; i < length; i++) {
    at += raw("start", i);
    start[i] = at; end[i] = at + raw("took", i);
    lane[i] = raw("lane", i); outcome[i] = raw("outcome", i);
  }
  return {
    length, start, end, lane, outcome,
    number: (name, i) => raw(name, i) === "" ? null : raw(name, i),
    text: (name, i) => { const t = raw(name, i); return t ? texts[t - 1] : null; },
  };
}

function opLine(ops, i) {
  const f = ops.text("f", i), key = ops.text("key", i), arg = ops.text("arg", i), res = ops.text("res", i);
  const answer = ops.outcome[i] === 0 || ops.outcome[i] === 1 ? (res === null ? "" : ` → ${res}`)
    : ops.outcome[i] === 2 ? " → failed" : " → unknown";
  return show(`${f}${key === null ? "" : " " + key}${arg === null ? "" : " " + arg}${answer}`);
}

function ticks(from, to, pixels) {
  const rough = (to - from) / Math.max(2, pixels / 110), decade = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].find(m => m * decade >= rough) * decade);
  const found = [];
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) found.push(t);
  return { step, found };
}

function Timeline(data, host, tip, onSelect) {
  const ops = decode(data.ops);
  const full = [0, Math.max(1, data.duration_us)];
  let view = [...full], filter = null, selected = -1, colours = {}, queued = false;
  const laneOps = [], broken = new Uint8Array(ops.length), windows = [];
  for (let i = 0; i < ops.length; i++) (laneOps[ops.lane[i]] ??= []).push(i);
  for (const w of data.workloads) for (const v of w.verdicts) for (const x of v.violations) {
    windows.push([x.from_us, x.to_us]);
    for (const i of x.ops) broken[i] = 1;
  }
  const bands = data.faults.filter(f => !f.skipped)
    .map(f => ({ ...f, from: f.from_ns / 1e3, to: f.to_ns === null ? full[1] : f.to_ns / 1e3 }));
  const nodeColour = name => colours["n" + (Math.max(0, data.nodes.indexOf(name)) % 7)];
  const panels = [], cross = document.createElement("div");
  cross.className = "cross"; cross.hidden = true; host.append(cross);

  // ---- panels -------------------------------------------------------------------------------------------------
  function panel(title, note, height, draw, extra = {}) {
    const box = document.createElement("div"), canvas = document.createElement("canvas");
    box.className = extra.sticky ? "sticky" : "panel";
    if (title) {
      const name = document.createElement("div"), more = document.createElement("span");
      name.className = "name"; name.textContent = title + " "; more.textContent = note; name.append(more); box.append(name);
    }
    canvas.style.height = height + "px";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title || "time axis");
    box.append(canvas); host.append(box);
    const p = { box, canvas, height, draw, plotWidth: 50, ...extra };
    panels.push(p); listen(p);
    return p;
  }
  const plotWidth = p => p.plotWidth;
  const X = (p, us, v = p.whole ? full : view) => GUTTER + (us - v[0]) / (v[1] - v[0]) * plotWidth(p);
  const T = (p, x, v = p.whole ? full : view) => v[0] + (x - GUTTER) / plotWidth(p) * (v[1] - v[0]);

  function paint(p) {
    const ratio = window.devicePixelRatio || 1, w = p.canvas.clientWidth;
    if (!w) return;
    // Asked once: the layout is too slow to ask for every operation.
    p.plotWidth = Math.max(50, w - GUTTER - RIGHT);
    p.canvas.width = Math.round(w * ratio); p.canvas.height = Math.round(p.height * ratio);
    const g = p.canvas.getContext("2d");
    g.scale(ratio, ratio); g.font = FONT; g.textBaseline = "middle";
    g.clearRect(0, 0, w, p.height);
    if (!p.bare) backdrop(g, p);
    p.draw(g, p);
  }
  function backdrop(g, p) {
    const { found } = ticks(...view, plotWidth(p));
    g.fillStyle = colours.faint;
    for (const t of found) g.fillRect(Math.round(X(p, t)), 0, 1, p.height);
    clipped(g, p, () => {
      for (const b of bands) box(g, p, b.from, b.to, colours.band, 1);
      for (const [from, to] of windows) box(g, p, from, to, colours.window, 3);
    });
  }
  function box(g, p, from, to, colour, least, y = 0, h = p.height) {
    const x = X(p, from), w = Math.max(least, X(p, to) - x);
    g.fillStyle = colour; g.fillRect(x, y, w, h);
  }
  function clipped(g, p, draw) {
    g.save(); g.beginPath(); g.rect(GUTTER, 0, plotWidth(p), p.height); g.clip(); draw(); g.restore();
  }
  function label(g, text, y, colour = colours.fg) {
    g.fillStyle = colour; g.textAlign = "left"; g.fillText(fit(g, text, GUTTER - 24), 12, y);
  }
  function fit(g, text, room) {
    if (g.measureText(text).width <= room) return text;
    let low = 0, high = text.length;
    while (low < high) {
      const mid = (low + high + 1) >> 1;
      if (g.measureText(text.slice(0, mid) + "…").width <= room) low = mid; else high = mid - 1;
    }
    return low ? text.slice(0, low) + "…" : "";
  }

  // ---- overview and axis --------------------------------------------------------------------------------------
  const total = [];
  for (const s of data.series) s.answered.forEach((n, at) => total[at] = (total[at] || 0) + n);
  panel("", "", 44, (g, p) => {
    label(g, "whole run", 14); label(g, "drag to choose a part", 31, colours.muted);
    const most = Math.max(1, ...total);
    for (const b of bands) box(g, p, b.from, b.to, colours.band, 1, 4, 36);
    g.fillStyle = colours.mismatch;
    total.forEach((n, at) => {
      const x = X(p, at * data.bucket_us), w = X(p, Math.min(full[1], (at + 1) * data.bucket_us)) - x;
      g.fillRect(x, 40 - n / most * 34, w + .3, n / most * 34);
    });
    for (const [from] of windows) { g.fillStyle = colours.bad; g.fillRect(X(p, from) - 1.5, 2, 3, 38); }
    if (view[0] > full[0] || view[1] < full[1]) {
      box(g, p, ...view, colours.brush, 2, 2, 40);
      g.strokeStyle = colours.ok; g.strokeRect(X(p, view[0]), 2.5, Math.max(2, X(p, view[1]) - X(p, view[0])), 39);
    }
    g.fillStyle = colours.line; g.fillRect(GUTTER, 40, plotWidth(p), 1);
  }, { sticky: true, whole: true, bare: true });
  panel("", "", 24, (g, p) => {
    const { step, found } = ticks(...view, plotWidth(p));
    label(g, "time since start", 12, colours.muted);
    g.textAlign = "center"; g.fillStyle = colours.muted;
    for (const t of found) { g.fillText(moment(t, step), X(p, t), 13); g.fillRect(Math.round(X(p, t)), 21, 1, 3); }
  }, { sticky: true, bare: true });
  panels[0].box.append(panels[1].canvas); panels[1].box.remove();

  // ---- faults: one lane per node ------------------------------------------------------------------------------
  const hit = f => f.nodes.length ? f.nodes : data.nodes.length ? data.nodes : ["all nodes"];
  // Faults that are on together on a node share its row, the first above.
  const beside = (b, node) => bands.findIndex(o => o !== b && hit(o).includes(node) && o.from < b.to && b.from < o.to);
  const shared = bands.some(b => hit(b).some(node => beside(b, node) >= 0)), FAULT_ROW = shared ? 34 : 20;
  const faultRows = [...new Set([...data.nodes, ...bands.flatMap(hit)])];
  if (bands.length) panel("Faults", "by node; grey through all plots", faultRows.length * FAULT_ROW + 4, (g, p) => {
    faultRows.forEach((node, row) => label(g, show(node), row * FAULT_ROW + FAULT_ROW / 2));
    clipped(g, p, () => bands.forEach(b => hit(b).forEach(node => {
      const x = X(p, b.from), w = Math.max(3, X(p, b.to) - x), other = beside(b, node);
      const high = other < 0 ? FAULT_ROW - 4 : FAULT_ROW / 2 - 3, below = other >= 0 && other < bands.indexOf(b);
      const y = faultRows.indexOf(node) * FAULT_ROW + 2 + (below ? high + 2 : 0);
      g.fillStyle = colours.fault; g.fillRect(x, y, w, high);
      const left = Math.max(x, GUTTER);
      g.fillStyle = colours["fault-text"]; g.textAlign = "left";
      g.fillText(fit(g, show(b.f), x + w - left - 8), left + 4, y + high / 2 + .5);
    })));
  }, {
    says: (x, y, t) => bands.filter(b => b.from <= t && t <= Math.max(b.to, b.from + (view[1] - view[0]) / 300))
      .map(b => `${b.f} ${b.nodes.join(", ")}: ${show(b.what)}\n${moment(b.from)} – ${b.to_ns === null ? "end" : moment(b.to)}, ${span(b.to - b.from)}`).join("\n"),
  });

  // ---- curves -------------------------------------------------------------------------------------------------
  const at = t => Math.floor(t / data.bucket_us);
  const perSecond = 1e6 / data.bucket_us;
  const RATE_ROW = 52, LATENCY_ROW = 74;
  const visible = (values) => [Math.max(0, at(view[0])), Math.min(values.length - 1, at(view[1]))];
  function nice(most) { const d = 10 ** Math.floor(Math.log10(most)); return [1, 2, 5, 10].find(m => m * d >= most) * d; }

  panel("Throughput", `operations per second, by ${span(data.bucket_us)}: answered, and above them failed or unknown`,
    data.series.length * RATE_ROW, (g, p) => data.series.forEach((s, row) => {
      const base = (row + 1) * RATE_ROW - 6, room = RATE_ROW - 16;
      const most = nice(Math.max(1, ...s.answered.map((n, i) => n + s.bad[i])) * perSecond);
      label(g, s.class, base - room / 2);
      g.textAlign = "left"; g.fillStyle = colours.muted;
      g.fillText(`${count(most)}/s`, GUTTER + plotWidth(p) + 6, base - room + 2); g.fillText("0", GUTTER + plotWidth(p) + 6, base - 4);
      g.fillStyle = colours.line; g.fillRect(GUTTER, base, plotWidth(p), 1);
      clipped(g, p, () => {
        const [first, last] = visible(s.answered);
        for (let i = first; i <= last; i++) {
          const x = X(p, i * data.bucket_us), w = X(p, (i + 1) * data.bucket_us) - x + .3;
          const good = s.answered[i] * perSecond / most * room, bad = s.bad[i] * perSecond / most * room;
          g.fillStyle = colours.ok; g.fillRect(x, base - good, w, good);
          if (s.bad[i]) { const h = Math.max(2, bad); g.fillStyle = colours.info; g.fillRect(x, base - good - h, w, h); }
        }
      });
    }), {
      says: (x, y, t) => {
        const s = data.series[Math.floor(y / RATE_ROW)];
        return s ? `${s.class}: ${count(Math.round((s.answered[at(t)] || 0) * perSecond))}/s answered, ${count(s.bad[at(t)] || 0)} failed or unknown in ${span(data.bucket_us)}` : "";
      },
    });

  const measured = data.series.filter(s => s.p50_us.some(v => v !== null));
  const all = measured.flatMap(s => [...s.p50_us, ...s.p99_us]).filter(v => v !== null && v > 0);
  const low = 10 ** Math.floor(Math.log10(Math.min(...all, 1e3))), high = Math.max(low * 10, 10 ** Math.ceil(Math.log10(Math.max(...all, 1e3))));
  if (measured.length) panel("Latency", "of answered operations, logarithmic: median, and up to the 99th percentile",
    measured.length * LATENCY_ROW, (g, p) => measured.forEach((s, row) => {
      const base = (row + 1) * LATENCY_ROW - 7, room = LATENCY_ROW - 16;
      const Y = us => base - Math.log(Math.max(us, low) / low) / Math.log(high / low) * room;
      label(g, s.class, base - room / 2);
      const step = Math.max(1, Math.ceil(Math.log10(high / low) / 3));
      for (let us = low; us <= high * 1.01; us *= 10 ** step) {
        g.fillStyle = us === low ? colours.line : colours.faint; g.fillRect(GUTTER, Math.round(Y(us)), plotWidth(p), 1);
        g.fillStyle = colours.muted; g.textAlign = "left"; g.fillText(span(us), GUTTER + plotWidth(p) + 6, Y(us) - (us === low ? 3 : 0));
      }
      clipped(g, p, () => {
        const [first, last] = visible(s.p50_us);
        for (let i = first; i <= last; i++) {
          if (s.p50_us[i] === null) continue;
          const x = X(p, i * data.bucket_us), w = X(p, (i + 1) * data.bucket_us) - x;
          g.fillStyle = colours.mismatch; g.fillRect(x, Y(s.p99_us[i]), w + .3, Math.max(1, Y(s.p50_us[i]) - Y(s.p99_us[i])));
          g.fillStyle = colours.ok; g.fillRect(x, Y(s.p50_us[i]) - 1, w + .3, 2.5);
        }
      });
    }), {
      says: (x, y, t) => {
        const s = measured[Math.floor(y / LATENCY_ROW)], i = at(t);
        return !s ? "" : s.p50_us[i] == null ? `${s.class}: nobody was answered in these ${span(data.bucket_us)}` : `${s.class}: median ${span(s.p50_us[i])}, p99 ${span(s.p99_us[i])}`;
      },
    });

  // ---- leaders ------------------------------------------------------------------------------------------------
  const STRIP = 18;
  if (data.leaders.length) panel("Leaders", "by partition, from the answers themselves; a gap is a time without an answer of a leader",
    data.leaders.length * STRIP + 4, (g, p) => data.leaders.forEach((s, row) => {
      const y = row * STRIP + 2;
      label(g, `partition ${s.part}`, y + STRIP / 2 - 2);
      clipped(g, p, () => s.reigns.forEach(r => {
        const x = X(p, r.from_ns / 1e3), w = Math.max(2, X(p, r.to_ns / 1e3) - x), left = Math.max(x, GUTTER);
        if (x + w < GUTTER || x > GUTTER + plotWidth(p)) return;
        g.fillStyle = nodeColour(r.node); g.fillRect(x, y, w, STRIP - 4);
        g.fillStyle = colours["node-text"]; g.textAlign = "left";
        const text = show(r.node) + (r.term === null ? "" : ` · term ${r.term}`);
        g.fillText(fit(g, text, x + w - left - 6), left + 4, y + STRIP / 2 - 1.5);
      }));
    }), {
      says: (x, y, t) => {
        const s = data.leaders[Math.floor(y / STRIP)];
        const r = s && s.reigns.find(r => r.from_ns / 1e3 <= t && t <= r.to_ns / 1e3);
        return r ? `partition ${s.part}: led by ${show(r.node)}${r.term === null ? "" : ", term " + r.term}\n${moment(r.from_ns / 1e3)} – ${moment(r.to_ns / 1e3)}` : "";
      },
    });

  // ---- clients ------------------------------------------------------------------------------------------------
  const lanes = [];
  for (const w of data.workloads) for (let i = 0; i < w.lanes; i++) lanes.push(`${data.workloads.length > 1 ? show(w.name) + " · " : ""}client ${i}`);
  const LANE = lanes.length <= 16 ? 22 : lanes.length <= 32 ? 16 : 12;
  const note = data.shown < data.asked
    ? `${count(data.shown)} of ${count(data.asked)} operations are drawn: a fair sample of the answered ones; all of violations, then failed, unknown and slow ones, come first`
    : "every operation; click one to see its question and its answer";
  const clients = panel("Clients", note, lanes.length * LANE + 6, (g, p) => lanes.forEach((name, row) => {
    const y = row * LANE + 3;
    if (LANE > 12 || row % 2 === 0) label(g, name, y + LANE / 2 - 1);
    g.fillStyle = colours.faint; g.fillRect(GUTTER, y + LANE - 1.5, plotWidth(p), 1);
    clipped(g, p, () => drawLane(g, p, laneOps[row] || [], y, LANE - 3));
  }), {
    says: (x, y, t, p) => {
      const i = find(p, x, y);
      return i < 0 ? "" : `${opLine(ops, i)}\n${OUTCOMES[ops.outcome[i]]}, ${ops.text("class", i)}, ${span(ops.end[i] - ops.start[i])} at ${moment(ops.start[i])}`;
    },
    click: (x, y, p) => { const i = find(p, x, y); select(i); },
  });
  // First of a lane's operations that may be seen: a client does one thing at a time.
  function firstSeen(list, t) {
    let a = 0, b = list.length;
    while (a < b) { const m = (a + b) >> 1; if (ops.end[list[m]] < t) a = m + 1; else b = m; }
    return a;
  }
  function drawLane(g, p, list, y, h) {
    const dim = i => filter && !filter(i);
    const later = [];
    let column = -1, busy = 0, tone = 0;
    const flush = () => {
      if (column < 0) return;
      g.globalAlpha = Math.min(1, .3 + .7 * busy); g.fillStyle = tone ? colours.mismatch : colours.ok;
      g.fillRect(column, y, 1, h); g.globalAlpha = 1; column = -1;
    };
    for (let at = firstSeen(list, view[0]); at < list.length && ops.start[list[at]] <= view[1]; at++) {
      const i = list[at], x = X(p, ops.start[i]), w = X(p, ops.end[i]) - x, o = ops.outcome[i];
      if (o > 1 || broken[i] || i === selected || w >= 3) { if (!dim(i) || w >= 3) later.push(i); continue; }
      if (dim(i)) continue;
      const c = Math.floor(x);
      if (c !== column) { flush(); column = c; busy = 0; tone = o; }
      busy += w; tone &= o;
    }
    flush();
    // Coarse things: those that matter last, merged where they share a pixel.
    later.sort((a, b) => (ops.outcome[a] > 1) - (ops.outcome[b] > 1) || broken[a] - broken[b] || (a === selected) - (b === selected));
    const drawn = new Map();
    for (const i of later) {
      const x = X(p, ops.start[i]), w = Math.max(2, X(p, ops.end[i]) - x), o = ops.outcome[i], spot = Math.floor(x) * 4 + o;
      if (w <= 3 && !broken[i] && i !== selected && drawn.has(spot)) continue;
      drawn.set(spot, 1);
      g.globalAlpha = dim(i) ? .15 : 1;
      g.fillStyle = colours[OUTCOMES[o]]; g.fillRect(x, y, w > 4 ? w - .5 : w, h);
      if (w > 46 && h > 11) {
        const left = Math.max(x, GUTTER), right = Math.min(x + w, GUTTER + plotWidth(p));
        g.fillStyle = o === 1 ? colours.fg : colours.bg; g.textAlign = "left";
        g.fillText(fit(g, opLine(ops, i), right - left - 8), left + 4, y + h / 2 + .5);
      }
      if (broken[i] || i === selected) {
        g.strokeStyle = i === selected ? colours.fg : colours.bad; g.lineWidth = 2.5; g.strokeRect(x - .5, y - .5, Math.max(w, 3), h + 1); g.lineWidth = 1;
      }
      g.globalAlpha = 1;
    }
  }
  function find(p, x, y) {
    const list = laneOps[Math.floor((y - 3) / LANE)] || [];
    const near = 3 / plotWidth(p) * (view[1] - view[0]), t = T(p, x);
    let best = -1, score = -Infinity;
    for (let at = firstSeen(list, t - near); at < list.length && ops.start[list[at]] <= t + near; at++) {
      const i = list[at], away = Math.max(0, ops.start[i] - t, t - ops.end[i]) / near;
      const s = broken[i] * 4 + (ops.outcome[i] > 1 ? 2 : 0) - away;
      if (s > score) { score = s; best = i; }
    }
    return best;
  }

  // ---- moving about -------------------------------------------------------------------------------------------
  const LEAST = 50;
  function look(from, to) {
    const wide = Math.min(full[1] - full[0], Math.max(LEAST, to - from));
    const start = Math.min(Math.max(full[0], from), full[1] - wide);
    view = [start, start + wide]; redraw();
  }
  function zoom(at, factor) { look(at - (at - view[0]) * factor, at + (view[1] - at) * factor); }
  function select(i) { selected = i; redraw(); onSelect(i); }
  function listen(p) {
    const canvas = p.canvas;
    let held = null;
    canvas.addEventListener("wheel", e => {
      // Only the clients take the plain wheel: over the plots it scrolls the page.
      if (p.whole || !(p.click || e.ctrlKey || e.metaKey || e.shiftKey)) return;
      e.preventDefault();
      if (Math.abs(e.deltaX) > Math.abs(e.deltaY) && !e.shiftKey) { const d = e.deltaX / plotWidth(p) * (view[1] - view[0]); look(view[0] + d, view[1] + d); }
      else zoom(T(p, e.offsetX), Math.exp(Math.max(-80, Math.min(80, e.deltaY || e.deltaX)) * .004));
    }, { passive: false });
    canvas.addEventListener("pointerdown", e => {
      if (e.button) return;
      held = { x: e.offsetX, view: [...view], moved: false };
      canvas.setPointerCapture(e.pointerId); canvas.classList.add("held");
    });
    canvas.addEventListener("pointermove", e => {
      if (held) {
        held.moved ||= Math.abs(e.offsetX - held.x) > 3;
        if (!held.moved) return;
        tip.hidden = true;
        if (p.whole) { const a = T(p, held.x), b = T(p, e.offsetX); look(Math.min(a, b), Math.max(a, b)); }
        else { const d = (held.x - e.offsetX) / plotWidth(p) * (held.view[1] - held.view[0]); look(held.view[0] + d, held.view[1] + d); }
        return;
      }
      if (p.whole) return;
      const t = T(p, e.offsetX), inside = t >= view[0] && t <= view[1];
      cross.hidden = !inside; cross.style.left = e.offsetX + "px";
      const says = inside && p.says ? p.says(e.offsetX, e.offsetY, t, p) : "";
      tip.hidden = !inside;
      if (inside) {
        const now = bands.filter(b => b.from <= t && t <= b.to).map(b => b.f + (b.nodes.length ? " " + b.nodes.join(", ") : ""));
        tip.textContent = moment(t, (view[1] - view[0]) / 1e3) + (now.length ? ` · during ${show(now.join("; "))}` : "") + (says ? "\n" + says : "");
        tip.style.left = Math.min(e.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + "px";
        tip.style.top = Math.min(e.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + "px";
      }
    });
    const release = e => {
      canvas.classList.remove("held");
      if (held && !held.moved && e.type === "pointerup") {
        if (p.whole) { const t = T(p, e.offsetX), half = (view[1] - view[0]) / 2; look(t - half, t + half); }
        else if (p.click) p.click(e.offsetX, e.offsetY, p);
      }
      held = null;
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => { if (!held) { cross.hidden = tip.hidden = true; } });
    canvas.addEventListener("dblclick", e => p.whole ? look(...full) : zoom(T(p, e.offsetX), .4));
  }
  document.addEventListener("keydown", e => {
    if (/INPUT|SELECT/.test(e.target.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
    const wide = view[1] - view[0], middle = (view[0] + view[1]) / 2;
    if (e.key === "+" || e.key === "=") zoom(middle, .5);
    else if (e.key === "-") zoom(middle, 2);
    else if (e.key === "0") look(...full);
    else if (e.key === "ArrowLeft") look(view[0] - wide / 5, view[1] - wide / 5);
    else if (e.key === "ArrowRight") look(view[0] + wide / 5, view[1] + wide / 5);
    else if (e.key === "Escape") select(-1);
  });

  function redraw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; panels.forEach(paint); });
  }
  function restyle() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["bg", "fg", "muted", "line", "faint", "ok", "mismatch", "info", "fail", "bad", "band", "fault", "fault-text", "window", "brush",
      "n0", "n1", "n2", "n3", "n4", "n5", "n6", "node-text"]) colours[name] = style.getPropertyValue("--" + name).trim();
    panels.forEach(paint);
  }
  new ResizeObserver(redraw).observe(host);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  restyle();
  return {
    ops, look, select, restyle, redraw, bands,
    whole: () => look(...full),
    zoom: factor => zoom((view[0] + view[1]) / 2, factor),
    filter: f => { filter = f; redraw(); },
    reveal: () => clients.box.scrollIntoView({ block: clients.box.offsetHeight > innerHeight * .8 ? "start" : "center", behavior: "smooth" }),
  };
}
