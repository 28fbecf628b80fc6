import { html, useEffect, useMemo, useRef, useState } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { link, rows } from "./adapters.js";
import { Facts, Report, Table, useReport } from "./parts.js";
import { call, isOperator, section, store } from "./store.js";
import { Outcome } from "./whatif.js";

const CELL = 14; // pixels of a row of the picture
const MOST = 40; // adapters in the picture

const COLUMNS = [
  { key: "name", label: "Adapter", text: true, show: (row) => html`<a href=${link(row.name)}>${row.name}</a>` },
  { key: "minutes", label: "Minutes on the device" },
  { key: "loads", label: "Loaded anew", title: "In these minutes, after it had been evicted" },
  { key: "again", label: "Thrashing", text: true, sort: (row) => row.again || 0, show: (row) => (row.again ? html`<span class="tag bad">${row.again} loads in 5 min</span>` : "") },
];

function Picture({ minutes, shown }) {
  const canvas = useRef(null);
  const times = Object.keys(minutes).map(Number).sort((a, b) => a - b);
  useEffect(() => {
    const box = canvas.current;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const width = box.clientWidth;
    const height = CELL * shown.length + 20;
    const ratio = devicePixelRatio || 1;
    box.width = width * ratio;
    box.height = height * ratio;
    const draw = box.getContext("2d");
    draw.scale(ratio, ratio);
    draw.font = "11px system-ui, sans-serif";
    draw.textBaseline = "middle";
    const left = Math.min(190, width * 0.35);
    const last = times[times.length - 1] || 0;
    const step = (width - left) / 60;
    shown.forEach((row, at) => {
      draw.fillStyle = colour("--ink");
      draw.fillText(row.name.length > 28 ? `${row.name.slice(0, 27)}…` : row.name, 0, at * CELL + CELL / 2, left - 8);
      for (const time of times) {
        const loads = minutes[time][row.name];
        draw.fillStyle = loads === undefined ? colour("--row") : loads > 1 ? colour("--c1") : colour("--c0");
        draw.fillRect(left + (59 - (last - time)) * step, at * CELL + 1, Math.max(1, step - 1), CELL - 2);
      }
    });
    draw.fillStyle = colour("--soft");
    for (const back of [59, 45, 30, 15, 0]) {
      const label = format.clock((last - back) * 60);
      draw.fillText(label, Math.min(width - 34, left + (59 - back) * step), height - 8);
    }
  });
  return html`<canvas class="strip" ref=${canvas} role="img" aria-label=${`Adapters on the device in each of the last 60 minutes; the table below has the same figures`} style=${{ height: `${CELL * shown.length + 20}px` }}></canvas>`;
}

function MoreMemory() {
  const [report, run] = useReport();
  const [outcome, setOutcome] = useState(null);
  const server = section("server");
  const slots = server.max_loras || 1;
  const kv = ((server.kv_blocks || 1) - 1) * (server.block_size || 1);
  const ask = () =>
    run("Replaying the last 15 minutes", async () =>
      setOutcome(await call("POST", "console/what-if", { minutes: 15, slots: [Math.max(1, Math.floor(slots / 2)), Math.ceil(1.5 * slots), 2 * slots, 4 * slots], kv_tokens: [2 * kv] })), "Replayed.");
  return html`<div class="card"><h2>What more memory would bring</h2>
    <p class="muted">The requests of the last 15 minutes are replayed in the simulator with fewer and more places for adapters, and with twice the KV cache.</p>
    <button class="main" disabled=${!isOperator() || report.busy} onClick=${ask}>What if?</button>
    <${Report} report=${report} /><${Outcome} outcome=${outcome} /></div>`;
}

export function Residency() {
  const minutes = section("residency");
  const thrashing = section("thrashing");
  const server = section("server");
  const listed = useMemo(() => {
    const found = new Map();
    for (const present of Object.values(minutes))
      for (const [name, loads] of Object.entries(present)) {
        const row = found.get(name) || { id: name, name, minutes: 0, loads: 0 };
        row.minutes += 1;
        row.loads += loads;
        found.set(name, row);
      }
    for (const row of found.values()) row.again = thrashing[row.name] || 0;
    return [...found.values()].sort((a, b) => b.minutes - a.minutes || b.loads - a.loads || a.name.localeCompare(b.name));
  }, [store.state.residency, store.state.thrashing]);
  const device = rows().filter((row) => row.tier === "device").length;
  const bad = listed.filter((row) => row.again);
  return html`<h1>Residency</h1>
    <${Facts} items=${[["on the device now", `${format.count(device)} of ${format.count(server.max_loras)} places`], ["were there in the last hour", format.count(listed.length)], ["thrashing", format.count(bad.length)]]} />
    ${bad.length > 0 && html`<p class="card bad" role="alert">${bad.length === 1 ? "One adapter is" : `${bad.length} adapters are`} loaded and evicted again and again: more are in use than fit. Raise --max-loras or --adapter-memory-gib, or pin what must be fast.</p>`}
    <div class="card"><h2>Minute by minute</h2>
      <div class="legend"><span><span class="swatch k0"></span>on the device</span><span><span class="swatch k1"></span>loaded more than once in the minute</span>${listed.length > MOST && html`<span>the first ${MOST} of ${listed.length}</span>`}</div>
      ${listed.length ? html`<${Picture} minutes=${minutes} shown=${listed.slice(0, MOST)} />` : html`<p class="muted">No adapter was on the device yet.</p>`}
    </div>
    <${Table} label="Residency of adapters" columns=${COLUMNS} rows=${listed} first="minutes" empty="No adapter was on the device yet." />
    <p></p><${MoreMemory} />`;
}
