import { html, useEffect, useMemo, useState } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { Chart, Facts, Report, Table, readable, useReport } from "./parts.js";
import { call, isAdmin, section, store } from "./store.js";

export const link = (name) => `#/adapters/${encodeURIComponent(name)}`;

export function rows() {
  const names = section("server").columns || [];
  return Object.entries(section("adapters"))
    .filter(([name]) => name)
    .map(([name, values]) => ({ id: name, name, ...Object.fromEntries(names.map((column, at) => [column, values[at]])) }));
}

const TIERS = { device: 0, host: 1, disk: 2 };
const tier = (row) => html`<span class=${`tag ${row.tier}`}>${row.tier}</span>${row.pinned ? html` <span class="tag">pinned</span>` : ""}${row.draining ? html` <span class="tag bad">draining</span>` : ""}`;
const plain = (key, label, title, show = format.count) => ({ key, label, title, show: (row) => show(row[key]) });

const COLUMNS = [
  { key: "name", label: "Adapter", text: true, show: (row) => html`<a href=${link(row.name)} title=${row.name}>${row.name}</a>` },
  { key: "tier", label: "Tier", text: true, sort: (row) => TIERS[row.tier], show: tier },
  plain("rank", "Rank", "The largest rank of its modules"),
  plain("bytes", "Size", "Bytes of its weights", format.bytes),
  plain("queue", "Queue", "Requests that have no first token yet"),
  plain("running", "Running", "Requests that are being answered"),
  plain("requests", "Requests", "Since the server started"),
  plain("tokens", "Tokens", "Tokens made since the server started"),
  plain("ttft_p50", "TTFT p50", "Time to first token in the last one to two minutes", format.seconds),
  plain("ttft_p99", "TTFT p99", "Time to first token in the last one to two minutes", format.seconds),
  plain("itl_p50", "Between p50", "Time between tokens in the last one to two minutes", format.seconds),
  plain("itl_p99", "Between p99", "Time between tokens in the last one to two minutes", format.seconds),
  plain("attainment", "SLO met", "Requests that kept their deadline, of those that had one", format.share),
  plain("hits", "Hits", "Requests that found it on the device"),
  plain("loads", "Loads", "To the device"),
  plain("evictions", "Evictions", "From the device, to make room"),
  plain("load_seconds", "Read", "From disk to host memory, the last time", format.seconds),
  plain("copy_seconds", "Copy", "From host memory to the device, the last time", format.seconds),
  plain("last_used", "Last used", "", format.ago),
];

function Loader() {
  const [name, setName] = useState("");
  const [path, setPath] = useState("");
  const [pinned, setPinned] = useState(false);
  const [report, run] = useReport();
  const admin = isAdmin();
  const server = section("server");
  const why = readable(admin, server.has_admin) || (server.runtime_lora ? "" : "Loading is off: start the server with --allow-runtime-lora.");
  const load = (event) => {
    event.preventDefault();
    run(`Loading ${name}`, () => call("POST", "v1/load_lora_adapter", { lora_name: name, lora_path: path, pinned }));
  };
  return html`<details class="card"><summary>Load a folder</summary>
    <form class="row" onSubmit=${load}>
      <label>Name<input value=${name} onInput=${(e) => setName(e.target.value)} required /></label>
      <label class="wide">Folder on the server<input value=${path} onInput=${(e) => setPath(e.target.value)} required /></label>
      <label class="line"><input type="checkbox" checked=${pinned} onChange=${(e) => setPinned(e.target.checked)} />pinned to the device</label>
      <button class="main" disabled=${!!why || report.busy}>Load</button>
    </form>
    ${why && html`<p class="muted">${why}</p>`}<${Report} report=${report} />
  </details>`;
}

export function Adapters() {
  const [text, setText] = useState("");
  const [place, setPlace] = useState("");
  const all = useMemo(rows, [store.state.adapters]);
  const wanted = text.toLowerCase();
  const shown = useMemo(
    () => all.filter((row) => row.name.toLowerCase().includes(wanted) && (!place || row.tier === place)),
    [all, wanted, place],
  );
  const device = all.filter((row) => row.tier === "device").length;
  return html`<h1>Adapters</h1>
    <${Facts} items=${[
      ["adapters", format.count(all.length)], ["on the device", `${format.count(device)} of ${format.count(section("server").max_loras)} places`],
      ["size of all", format.bytes(all.reduce((sum, row) => sum + row.bytes, 0))], ["base", section("server").model],
    ]} />
    <div class="row">
      <label class="wide">Filter by name<input type="search" value=${text} onInput=${(e) => setText(e.target.value)} /></label>
      <label>Tier<select value=${place} onChange=${(e) => setPlace(e.target.value)}><option value="">all</option><option>device</option><option>host</option><option>disk</option></select></label>
      <span class="muted" role="status">${format.count(shown.length)} shown</span>
    </div>
    <${Table} label="Adapters" columns=${COLUMNS} rows=${shown} first="requests" empty="No adapter matches." />
    <p></p><${Loader} />`;
}

const ORIGINS = {
  disk: "Its files were read while the request waited.",
  registered: "Its files were read when it was registered, before the request.",
  host: "It lay in host memory, so nothing was read.",
};

function Waterfall({ cold }) {
  if (!cold) return html`<p class="muted">It has not been loaded for a request yet, or not since the console looks.</p>`;
  const before_it = cold.origin === "registered" ? ", before" : "";
  const waited = cold.copy + (cold.origin === "disk" ? cold.read + cold.check : 0);
  const parts = [
    [`read its files${before_it}`, cold.read], [`check and lay out${before_it}`, cold.check], ["copy to the device", cold.copy],
    ["queue, prompt and first token", Math.max(0, cold.ttft - waited)],
  ];
  const sum = parts.reduce((total, [, seconds]) => total + seconds, 0) || 1;
  let before = 0;
  return html`<table><caption class="sr">Cold start</caption><tbody>${parts.map(([name, seconds], at) => {
    const left = (100 * before) / sum;
    before += seconds;
    return html`<tr key=${name}><th scope="row" class="text">${name}</th><td>${format.seconds(seconds)}</td>
      <td style=${{ width: "55%" }}><div class="bar" aria-hidden="true"><span style=${{ width: `${left}%` }}></span><span class=${`k${at}`} style=${{ width: `${Math.max(0.5, (100 * seconds) / sum)}%` }}></span></div></td></tr>`;
  })}</tbody></table>
  <p class="muted">${ORIGINS[cold.origin]} Time to first token of the slowest request of that start: ${format.seconds(cold.ttft)}.</p>`;
}

const MODULE = (name, part) => {
  const ranks = [...new Set(part.ranks)].sort((a, b) => a - b);
  const scales = [...new Set(part.scales.map((value) => format.number(value)))];
  return { id: name, name, layers: part.layers.length, ranks: ranks.join(", ") || "–", scales: scales.slice(0, 3).join(", ") || "–" };
};

export function Adapter({ name }) {
  const row = useMemo(rows, [store.state.adapters]).find((each) => each.name === name);
  const [detail, setDetail] = useState(null);
  const [report, run] = useReport();
  useEffect(() => {
    let current = true;
    const ask = () => call("GET", `console/adapters/${encodeURIComponent(name)}`).then((value) => current && setDetail(value), () => {});
    ask();
    const timer = setInterval(ask, 15_000);
    return () => {
      current = false;
      clearInterval(timer);
    };
  }, [name, row && row.identity]);
  if (!row) return html`<h1>${name}</h1><p>No adapter of this name is loaded. <a href="#/adapters">All adapters</a></p>`;
  const admin = isAdmin();
  const server = section("server");
  const change = (doing, fields) => run(doing, () => call("POST", "v1/change_lora_adapter", { lora_name: name, ...fields }));
  const unload = () => {
    if (confirm(`Unload ${name}? New requests for it are refused; running ones finish.`))
      run("Unloading", () => call("POST", "v1/unload_lora_adapter", { lora_name: name }));
  };
  const history = (detail && detail.history) || [];
  const x = history.map((point) => point[0]);
  const parts = detail ? Object.entries(detail.parts).map(([key, part]) => MODULE(key, part)) : [];
  const matched = parts.filter((part) => part.layers);
  const records = (section("accuracy").records || []).filter((record) => record.adapter === name);
  const tasks = Object.entries(section("accuracy").tasks || {}).filter(([task, value]) => value.adapter === name || task === name);
  return html`<h1>${name}</h1>
    <p><a href="#/adapters">All adapters</a></p>
    <${Facts} items=${[
      ["tier", tier(row)], ["rank", row.rank], ["size", format.bytes(row.bytes)], ["queue", format.count(row.queue)], ["running", format.count(row.running)],
      ["requests", format.count(row.requests)], ["tokens", format.count(row.tokens)], ["TTFT p50 / p99", `${format.seconds(row.ttft_p50)} / ${format.seconds(row.ttft_p99)}`],
      ["between tokens p50 / p99", `${format.seconds(row.itl_p50)} / ${format.seconds(row.itl_p99)}`], ["SLO met", format.share(row.attainment)],
      ["hits", format.count(row.hits)], ["loads", format.count(row.loads)], ["evictions", format.count(row.evictions)], ["last used", format.ago(row.last_used)],
    ]} />
    <div class="row">
      <button disabled=${!admin || report.busy} onClick=${() => change(row.pinned ? "Unpinning" : "Pinning", { pinned: !row.pinned })}>${row.pinned ? "Unpin" : "Pin to the device"}</button>
      <button disabled=${!admin || report.busy} onClick=${() => change(row.draining ? "Resuming" : "Draining", { draining: !row.draining })}>${row.draining ? "Take requests again" : "Drain"}</button>
      <button disabled=${!admin || !server.runtime_lora || report.busy} onClick=${unload}>Unload</button>
      <a href=${`#/chat?model=${encodeURIComponent(name)}`}>Chat with it</a>
    </div>
    ${!admin && html`<p class="muted">${readable(admin, server.has_admin)}</p>`}<${Report} report=${report} />
    <div class="grid">
      <div class="card"><h2>Identity</h2><p class="mono">${detail ? detail.identity : row.identity}</p>
        ${admin && html`<p>Folder <code>${section("paths")[name]}</code></p>`}
        <p>Base <span class="mono">${server.model}</span>, version <span class="mono">${(server.base_version || "").slice(0, 12)}</span></p>
        <h2>Accuracy</h2>
        ${tasks.map(([task, value]) => html`<p key=${task}>Task ${task}: loss ${format.number(value.quantized, 4)} on this base, ${format.number(value.full, 4)} unquantized (nats a token)</p>`)}
        ${records.map((record) => html`<p key=${record.task}>${record.task}: ${record.metric} ${format.number(record.score)}, drop ${format.number(record.drop)} points ${record.why ? html`<span class="bad">refused: ${record.why}</span>` : html`<span class="good">passes</span>`}</p>`)}
        ${!tasks.length && !records.length && html`<p class="muted">No accuracy record of this base names it.</p>`}
      </div>
      <div class="card"><h2>Cold start</h2><${Waterfall} cold=${detail && detail.cold_start} /></div>
      <div class="card"><h2>Modules</h2><p class="muted">${matched.length} of ${parts.length} kinds of linear are changed; every tensor of its file was matched, else it would have been refused. Not changed: ${parts.filter((part) => !part.layers).map((part) => part.name).join(", ") || "none"}.</p>
        <${Table} label="Modules" first="name" descending=${false} rows=${matched} columns=${[
          { key: "name", label: "Module", text: true }, { key: "layers", label: "Layers" }, { key: "ranks", label: "Ranks", text: true }, { key: "scales", label: "Scales", text: true },
        ]} /></div>
      <${Chart} title="Time to first token, by minute" x=${x} show=${format.seconds} least=${0.001} series=${[{ label: "p50", values: history.map((p) => p[1]) }, { label: "p99", values: history.map((p) => p[2]) }]} />
      <${Chart} title="Time between tokens, by minute" x=${x} show=${format.seconds} least=${0.001} series=${[{ label: "p50", values: history.map((p) => p[3]) }, { label: "p99", values: history.map((p) => p[4]) }]} />
    </div>`;
}
