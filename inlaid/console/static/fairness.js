import { html, useEffect, useMemo, useState } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { Chart, Facts, Report, Table, readable, useReport } from "./parts.js";
import { call, isAdmin, isOperator, section, store } from "./store.js";
import { Outcome } from "./whatif.js";

const COLUMNS = [
  { key: "name", label: "Tenant", text: true, show: (row) => row.name || "(none)" },
  { key: "service", label: "Service, 1 min", title: "Tokens at the prices of the cost function", show: (row) => format.number(row.service) },
  { key: "got", label: "Part of all", show: (row) => format.share(row.got) },
  { key: "fair", label: "Share by weight", title: "Of the tenants that were served, run or wait in this minute", show: (row) => format.share(row.fair) },
  { key: "weight", label: "Weight" },
  { key: "waiting", label: "Waiting" },
  { key: "running", label: "Running" },
  { key: "predicted_wait", label: "Wait predicted", show: (row) => format.seconds(row.predicted_wait) },
  { key: "requests", label: "Requests", show: (row) => format.count(row.requests) },
  { key: "prompt_tokens", label: "Prompt tokens", show: (row) => format.count(row.prompt_tokens) },
  { key: "output_tokens", label: "Output tokens", show: (row) => format.count(row.output_tokens) },
  { key: "service_total", label: "Service, all", show: (row) => format.number(row.service_total) },
];

const times = (value) => (value == null ? "–" : `${format.number(value)} ×`);

const QUEUE = [
  { key: "id", label: "Place", fixed: true },
  { key: "tenant", label: "Tenant", text: true, fixed: true, show: (row) => row.tenant || "(none)" },
  { key: "adapter", label: "Adapter", text: true, fixed: true, show: (row) => row.adapter || "the base" },
  { key: "waited", label: "Waited", fixed: true, show: (row) => format.seconds(row.waited) },
  { key: "behind", label: "Behind", text: true, fixed: true, show: (row) => (row.behind == null ? "–" : row.behind || "(none)") },
  { key: "reason", label: "Because the one before …", text: true, wrap: true, fixed: true },
];

function history(names) {
  const rows = section("service");
  const pace = rows.pace || 5;
  const found = names.map((name) => ({ label: name || "(none)", values: rows[`/${name}`] || [] }));
  const length = Math.max(0, ...found.map((each) => each.values.length));
  const now = (store.state.load || {}).t || 0;
  const x = Array.from({ length }, (_, at) => Math.round(now - (length - at) * pace));
  return { x, series: found.map((each) => ({ ...each, values: each.values.length ? each.values.map((value) => value / pace) : Array(length).fill(0) })) };
}

const WINDOW = 12; // pieces of the history that a share is taken over

// Return each tenant's part of the service over the last minute, divided by its share by weight among those served then.
function againstShare(shown) {
  const rows = section("service");
  const known = section("tenants");
  const all = Object.entries(rows).filter(([name]) => name.startsWith("/"));
  const length = Math.max(0, ...all.map(([, values]) => values.length));
  const sums = new Map(all.map(([name, values]) => [name.slice(1), values.map((_, at) => values.slice(Math.max(0, at - WINDOW + 1), at + 1).reduce((x, y) => x + y, 0))]));
  const weight = (name) => (known[name] ? known[name].weight : 1);
  const totals = Array.from({ length }, (_, at) => {
    const served = [...sums].filter(([, values]) => values[at] > 0);
    return [served.reduce((x, [, values]) => x + values[at], 0), served.reduce((x, [name]) => x + weight(name), 0)];
  });
  return shown.map((name) => ({ label: name || "(none)", values: totals.map(([service, weights], at) => {
    const mine = (sums.get(name) || [])[at];
    return mine > 0 ? mine / service / (weight(name) / weights) : service ? 0 : null;
  }) }));
}

// Weights are written as lines TENANT=NUMBER, limits as JSON.
function readWeights(text) {
  const found = {};
  for (const line of text.split("\n").filter((each) => each.trim())) {
    const at = line.lastIndexOf("=");
    const value = Number(line.slice(at + 1));
    if (at < 0 || !Number.isFinite(value)) throw new Error(`weights: ${line} is not written TENANT=NUMBER`);
    found[line.slice(0, at)] = value;
  }
  return found;
}

const writeWeights = (weights) => Object.entries(weights || {}).map(([name, value]) => `${name}=${value}`).join("\n");
const optionsOf = (options) => Object.entries(options || {}).map(([name, value]) => `${name}=${value}`).join(",");

function Steer() {
  const scheduler = section("scheduler");
  const [draft, setDraft] = useState(null);
  const [minutes, setMinutes] = useState("5");
  const [outcome, setOutcome] = useState(null);
  const [report, run] = useReport();
  const force = { policy: scheduler.policy || "", options: optionsOf(scheduler.options), weights: writeWeights(scheduler.weights), limits: JSON.stringify(scheduler.limits || {}), most: String(scheduler.max_num_waiting ?? "") };
  const now = draft || force;
  const set = (name) => (event) => {
    const next = { ...now, [name]: event.target.value };
    if (name === "policy") next.options = event.target.value === force.policy ? force.options : "";
    setDraft(next);
  };
  const policy = now.options ? `${now.policy}:${now.options}` : now.policy;
  const ask = (event) => {
    event.preventDefault();
    run("Replaying the last minutes", async () => setOutcome(await call("POST", "console/what-if", { minutes: Number(minutes), policy, weights: readWeights(now.weights) })), "Replayed.");
  };
  const apply = () =>
    run("Changing the scheduler", async () => {
      let limits;
      try {
        limits = JSON.parse(now.limits || "{}");
      } catch (error) {
        throw new Error(`limits cannot be read: ${error.message}`);
      }
      await call("PUT", "v1/scheduler", { policy, weights: readWeights(now.weights), limits, max_num_waiting: Number(now.most) });
      setDraft(null);
    }, "The scheduler is changed; no request was dropped.");
  const admin = isAdmin();
  return html`<div class="card"><h2>Policy, weights and limits</h2>
    <form onSubmit=${ask}>
      <div class="row">
        <label>Policy<select value=${now.policy} onChange=${set("policy")}>${(scheduler.policies || []).map((name) => html`<option key=${name} value=${name}>${name}</option>`)}</select></label>
        <label class="wide">Options, as key=value,…<input value=${now.options} onInput=${set("options")} placeholder="the policy's defaults" /></label>
        <label>Most waiting<input value=${now.most} onInput=${set("most")} inputmode="numeric" size="7" /></label>
      </div>
      <div class="columns">
        <label>Weights, a line TENANT=NUMBER each (others: 1)<textarea rows="3" class="mono" value=${now.weights} onInput=${set("weights")}></textarea></label>
        <label>Limits by tenant, as JSON<textarea rows="3" class="mono" value=${now.limits} onInput=${set("limits")}></textarea></label>
      </div>
      <div class="row">
        <label>Minutes to replay<input value=${minutes} onInput=${(e) => setMinutes(e.target.value)} inputmode="numeric" size="4" /></label>
        <button class="main" disabled=${report.busy}>What if?</button>
        <button type="button" disabled=${!admin || !draft || report.busy} onClick=${apply}>Apply</button>
        <button type="button" disabled=${!draft} onClick=${() => setDraft(null)}>Back to what is in force</button>
      </div>
      ${!admin && html`<p class="muted">${readable(admin, section("server").has_admin)}</p>`}
    </form>
    <${Report} report=${report} /><${Outcome} outcome=${outcome} /></div>`;
}

export function Fairness() {
  if (!isOperator()) return html`<h1>Fairness</h1><p>Figures of tenants need ${section("server").has_admin ? "the admin key (Key, above)" : "a key"}.</p>`;
  const fairness = section("fairness");
  const tenants = useMemo(() => {
    const listed = Object.entries(section("tenants")).map(([name, values]) => ({ id: name, name, ...values }));
    const sum = listed.reduce((total, row) => total + row.service, 0);
    const weights = listed.reduce((total, row) => total + row.weight, 0);
    for (const row of listed) Object.assign(row, { got: sum ? row.service / sum : 0, fair: weights ? row.weight / weights : 0 });
    return listed;
  }, [store.state.tenants]);
  const ranked = [...Object.entries(section("service"))].filter(([name]) => name.startsWith("/")).sort(([, a], [, b]) => b.reduce((x, y) => x + y, 0) - a.reduce((x, y) => x + y, 0));
  const first = ranked.slice(0, 6).map(([name]) => name.slice(1));
  const { x, series } = history(first);
  const note = ranked.length > 6 ? `the first 6 of ${ranked.length}` : "";
  const queue = (fairness.queue || []).map((each, at) => ({ id: at + 1, ...each }));
  return html`<h1>Fairness</h1>
    <${Facts} items=${[
      ["policy", fairness.policy], ["tenants are told apart by", section("server").tenant], ["waiting", format.count(fairness.waiting)], ["running", format.count(fairness.running)],
      ["service in the last minute", format.number(fairness.service)], ["largest gap between waiting tenants", format.number(fairness.largest_gap)],
    ]} />
    <div class="grid">
      <${Chart} title="Service per second, by tenant" x=${x} series=${series} note=${`tokens at their prices. ${note}`} />
      <${Chart} title="Service against share, over a minute" x=${x} series=${againstShare(first)} show=${times} least=${2} note=${`1 ×: just its share by weight. ${note}`} />
    </div>
    <${Table} label="Tenants" columns=${COLUMNS} rows=${tenants} first="service" empty="No tenant was served in the last minute." />
    <h2><br />Who waits for whom</h2>
    <${Table} label="Queue" columns=${QUEUE} rows=${queue} empty="Nobody waits." />
    <p></p><${Steer} />`;
}
