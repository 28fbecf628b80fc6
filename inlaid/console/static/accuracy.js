import { html } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { link } from "./adapters.js";
import { Facts, Report, Table, readable, useReport } from "./parts.js";
import { call, isAdmin, section } from "./store.js";

const name = (adapter) => (adapter ? html`<a href=${link(adapter)}>${adapter}</a>` : "–");

const TASKS = [
  { key: "name", label: "Task", text: true },
  { key: "adapter", label: "Adapter", text: true, show: (row) => name(row.adapter) },
  { key: "full", label: "Loss unquantized", show: (row) => format.number(row.full, 5) },
  { key: "quantized", label: "Loss on this base", show: (row) => format.number(row.quantized, 5) },
  { key: "more", label: "Gained, nats a token", show: (row) => format.number(row.more, 3) },
  { key: "part", label: "Gained, part", show: (row) => format.share(row.part) },
  { key: "checked", label: "Checked", show: (row) => (row.checked ? String(row.checked).slice(0, 16).replace("T", " ") + " UTC" : "–") },
];

const RECORDS = [
  { key: "adapter", label: "Adapter", text: true, show: (row) => name(row.adapter) },
  { key: "task", label: "Task", text: true },
  { key: "metric", label: "Metric", text: true },
  { key: "score", label: "Score", show: (row) => format.number(row.score, 4) },
  { key: "reference", label: "Unquantized", show: (row) => format.number(row.reference, 4) },
  { key: "drop", label: "Drop, points", show: (row) => format.number(row.drop, 3) },
  { key: "date", label: "Date", show: (row) => format.date(row.date) },
  { key: "why", label: "Gate", text: true, wrap: true, sort: (row) => row.why || "", show: (row) => (row.why ? html`<span class="bad">refused: ${row.why}</span>` : html`<span class="good">passes</span>`) },
];

const losses = (values) => Object.entries(values || {}).map(([task, loss]) => `${task} ${format.number(loss, 4)}`).join(", ") || "–";

function Jobs() {
  const [report, run] = useReport();
  const base = section("base");
  const jobs = Object.values(section("tasks")).map((job) => ({ id: job.name, ...job }));
  const act = (doing, method, path) => run(doing, () => call(method, path));
  const columns = [
    { key: "name", label: "Task", text: true },
    { key: "verb", label: "Job", text: true },
    { key: "state", label: "State", text: true, show: (row) => html`<span class=${`tag ${row.state === "serving" ? "device" : row.state === "failed" || row.state === "refused" ? "bad" : ""}`}>${row.state}</span>` },
    { key: "act", label: "Change", text: true, fixed: true, show: (row) => html`<button class="small" disabled=${row.state !== "ready" || report.busy} onClick=${() => act(`Switching to ${row.name}`, "POST", `v1/tasks/${encodeURIComponent(row.name)}/switch`)}>Switch</button> <button class="small" disabled=${row.state === "switching" || report.busy} onClick=${() => act(`Cancelling ${row.name}`, "DELETE", `v1/tasks/${encodeURIComponent(row.name)}`)}>${["queued", "running"].includes(row.state) ? "Cancel" : "Forget"}</button>` },
    { key: "done", label: "Progress", text: true, show: (row) => (row.total ? html`<progress value=${row.done} max=${row.total} aria-label=${`Progress of ${row.name}`}></progress> ${row.done} of ${row.total} ${row.stage}` : row.stage || "–") },
    { key: "before", label: "Losses before", text: true, wrap: true, fixed: true, show: (row) => losses(row.before) },
    { key: "after", label: "Losses after", text: true, wrap: true, fixed: true, show: (row) => losses(row.after) },
    { key: "why", label: "Why", text: true, wrap: true, fixed: true, show: (row) => row.why || "" },
  ];
  const versions = base.versions || [];
  const back = () => confirm("Serve the version of the base before this one?") && act("Rolling back", "POST", "v1/base/rollback");
  return html`<h2><br />Tasks added while serving</h2>
    <p class="muted">Losses in nats a token.</p>
    <${Table} label="Jobs" columns=${columns} rows=${jobs} empty="No job. Add a task with: inlaid task add" />
    <p>Version ${base.current} of the base is served; ${versions.length} are kept. <button disabled=${versions.length < 2 || report.busy} onClick=${back}>Roll back</button></p>
    <${Report} report=${report} />`;
}

export function Accuracy() {
  const accuracy = section("accuracy");
  const server = section("server");
  const tasks = Object.entries(accuracy.tasks || {}).map(([task, value]) => ({
    id: task, name: task, ...value, more: value.quantized == null || value.full == null ? null : value.quantized - value.full, part: value.full ? value.quantized / value.full - 1 : null,
  }));
  const records = (accuracy.records || []).map((record, at) => ({ id: at, ...record }));
  const settings = Object.entries(accuracy.settings || {});
  return html`<h1>Accuracy</h1>
    <${Facts} items=${[["base", server.model], ["version", (server.base_version || "").slice(0, 12)], ["quantized", accuracy.date ? format.date(accuracy.date) : "not by inlaid quantize"]]} />
    ${accuracy.fault && html`<p class="bad" role="alert">${accuracy.fault}</p>`}
    ${settings.length > 0 && html`<div class="card"><h2>Quantizer's settings</h2><${Facts} items=${settings.map(([key, value]) => [key.replaceAll("_", " "), String(value)])} /></div>`}
    <h2>Tasks of the base</h2>
    <p class="muted">Losses in nats a token, on examples that were held out.</p>
    <${Table} label="Tasks" columns=${TASKS} rows=${tasks} first="more" empty="This base has no record of tasks: only folders made by inlaid quantize have." />
    <h2><br />The accuracy gate</h2>
    <${Table} label="Gate" columns=${RECORDS} rows=${records} first="drop" empty="No record: start the server with --require-eval, the report of python -m eval.run." />
    ${isAdmin() && server.online_tasks && html`<${Jobs} />`}
    ${!server.online_tasks ? html`<p class="muted">Tasks are not added while serving: start the server with --online-tasks.</p>` : !isAdmin() && html`<p class="muted">Jobs that add tasks: ${readable(false, server.has_admin)}</p>`}`;
}
