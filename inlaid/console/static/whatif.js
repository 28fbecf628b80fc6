import { html } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { Table } from "./parts.js";

const COLUMNS = [
  { key: "label", label: "Settings", text: true, fixed: true },
  { key: "mean_ttft", label: "TTFT mean", fixed: true, show: (row) => format.seconds(row.mean_ttft) },
  { key: "p50_ttft", label: "TTFT p50", fixed: true, show: (row) => format.seconds(row.p50_ttft) },
  { key: "p99_ttft", label: "TTFT p99", fixed: true, show: (row) => format.seconds(row.p99_ttft) },
  { key: "throughput", label: "Tokens per s", fixed: true, show: (row) => format.number(row.throughput) },
  { key: "largest_gap", label: "Largest gap of service", fixed: true, show: (row) => format.number(row.largest_gap) },
  { key: "adapter_loads", label: "Adapter loads", fixed: true, show: (row) => format.count(row.adapter_loads) },
  { key: "preemptions", label: "Preemptions", fixed: true, show: (row) => format.count(row.preemptions) },
  { key: "slo_attainment", label: "SLO met", fixed: true, show: (row) => format.share(row.slo_attainment) },
];

// The answer of POST console/what-if; the first row is the settings in force.
export function Outcome({ outcome }) {
  if (!outcome) return "";
  const rows = outcome.rows.map((row, at) => ({ id: at, ...row }));
  const tenants = [...new Set(rows.flatMap((row) => Object.keys(row.tenants)))].slice(0, 30);
  const perTenant = tenants.map((name) => ({ id: name, name, values: rows.map((row) => row.tenants[name] || {}) }));
  const columns = [{ key: "name", label: "Tenant", text: true, fixed: true, show: (tenant) => tenant.name || "(none)" }, ...rows.map((row, at) => ({ key: `t${at}`, label: `TTFT mean, ${row.label}`, fixed: true, show: (tenant) => format.seconds(tenant.values[at].mean_ttft) }))];
  return html`<p>Replayed ${format.count(outcome.requests)} requests of ${format.seconds(outcome.seconds)} in the simulator. Its step times are fitted to steps measured here, and explain ${format.share(Math.max(0, outcome.r_squared))} of their differences: compare the rows with each other.</p>
    <${Table} label="What if" columns=${COLUMNS} rows=${rows} />
    ${tenants.length > 1 && html`<p></p><${Table} label="What if, by tenant" columns=${columns} rows=${perTenant} />`}`;
}
