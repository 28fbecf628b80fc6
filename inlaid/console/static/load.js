import { html } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { Chart, Facts } from "./parts.js";
import { section, store } from "./store.js";

function Step({ step, busy }) {
  const measured = step.how === "measured";
  if (!step.mean) return html`<div class="card"><h2>A step's time</h2><p class="muted">${measured ? "No step yet." : `${step.steps ?? 0} of ${step.least ?? 50} steps so far; the split needs more.`}</p></div>`;
  const parts = [["base", step.base], ["adapters", step.adapters], ["attention", step.attention]];
  if (measured) parts.push(["host", step.host]);
  const floor = step.floor || {};
  const sum = parts.reduce((total, [, value]) => total + value, 0) || 1;
  return html`<div class="card"><h2>A step's time</h2>
    <div class="bar" role="img" aria-label=${parts.map(([name, value]) => `${name} ${format.seconds(value)}`).join(", ")}>
      ${parts.map(([name, value], at) => html`<span key=${name} class=${`k${at}`} style=${{ width: `${(100 * value) / sum}%` }}></span>`)}
    </div>
    <div class="legend">${parts.map(([name, value], at) => html`<span key=${name}><span class=${`swatch k${at}`}></span>${name} <b>${format.seconds(value)}</b></span>`)}</div>
    <${Facts} items=${[
      ["mean step", format.seconds(step.mean)], ["floor", format.seconds(floor.seconds)],
      ["mean / floor", floor.seconds ? `${format.number(step.mean / floor.seconds, 3)} ×` : "–"], ["idle", format.share(1 - (busy ?? 0))],
    ]} />
    <p class="muted">${measured
      ? `Measured by clocks around the kernels of ${format.count(step.steps)} steps of the last 30 s, one of every four. Base: linears, norms, head and sampling. Host: scheduling and messages between the steps.`
      : `Estimated, not measured: a fit to ${format.count(step.steps)} whole steps, which explains ${format.share(Math.max(0, step.r_squared))} of their differences. Base has the host's part in it.`}</p>
    <p class="muted">${floor.seconds
      ? `Floor: the base's ${format.bytes(floor.bytes)} of weights read once at the ${format.bytes(floor.rate)} per s of a large copy. Idle: the time between steps in which no request was there.`
      : "Floor: unknown, as no bandwidth was measured for this device. Idle: the time between steps in which no request was there."}</p>
  </div>`;
}

export function Load() {
  const { history } = store;
  const load = section("load");
  const x = history.t || [];
  const column = (name) => history[name] || [];
  const series = (...pairs) => pairs.map(([label, name]) => ({ label, values: column(name) }));
  return html`<h1>Load</h1>
    <${Facts} items=${[
      ["requests", `${format.number(load.requests)} per s`], ["tokens", `${format.number(load.tokens)} per s`],
      ["running", format.count(load.running)], ["waiting", format.count(load.waiting)],
      ["KV in use", format.share(load.kv_used)], ["engine busy", format.share(load.busy)],
    ]} />
    <${Facts} items=${Object.entries(section("server").replicas || {})} />
    <div class="grid">
      <${Chart} title="Requests per second" x=${x} series=${series(["arriving", "requests"])} />
      <${Chart} title="Tokens per second" x=${x} series=${series(["made", "tokens"])} />
      <${Chart} title="Requests" x=${x} series=${series(["running", "running"], ["waiting", "waiting"])} show=${format.count} />
      <${Chart} title="Time to first token" x=${x} series=${series(["p50", "ttft_p50"], ["p99", "ttft_p99"])} show=${format.seconds} least=${0.001} note="over 10 s" />
      <${Chart} title="Time between tokens" x=${x} series=${series(["p50", "itl_p50"], ["p99", "itl_p99"])} show=${format.seconds} least=${0.001} note="over 10 s" />
      <${Chart} title="KV cache" x=${x} series=${series(["in use", "kv_used"], ["kept for reuse", "kv_cached"])} show=${format.share} max=${1} />
      <${Chart} title="Preemptions per second" x=${x} series=${series(["preempted", "preemptions"])} />
      <${Chart} title="Step time" x=${x} series=${series(["mean", "step"])} show=${format.seconds} least=${0.001} />
      <${Chart} title="Engine busy" x=${x} series=${series(["busy", "busy"])} show=${format.share} max=${1} />
      <${Step} step=${section("step")} busy=${load.busy} />
    </div>`;
}
