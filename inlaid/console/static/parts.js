// What several panels are made of: tables that draw only the rows in sight, charts, facts, and forms that report.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact.mjs";
import { draw } from "./chart.js";
import * as format from "./format.js";

const ROW = 32; // pixels, as in style.css
const SPARE = 20; // rows beyond those in sight
const STRIDE = 16; // rows by which the drawn ones change: not in every frame

// A row that is drawn anew only when its figures change, and not when the table is scrolled.
function Row({ row, columns, index }) {
  return useMemo(
    () => html`<tr aria-rowindex=${index}>${columns.map(
      (each) => html`<td key=${each.key} class=${(each.text ? "text " : "") + (each.wrap ? "wrap" : "")}>${each.show ? each.show(row) : row[each.key]}</td>`,
    )}</tr>`,
    [row, columns, index],
  );
}

// columns: {key, label, title, text, show(row), sort(row)}; rows have a field `id`.
export function Table({ label, columns, rows, first, descending = true, empty = "Nothing yet." }) {
  const [order, setOrder] = useState({ key: first, down: descending });
  const [range, setRange] = useState([0, 60]);
  const box = useRef(null);
  const sorted = useMemo(() => {
    const column = columns.find((each) => each.key === order.key);
    if (!column) return rows;
    const value = column.sort || ((row) => row[column.key]);
    const side = order.down ? -1 : 1;
    return rows
      .map((row) => [value(row), row])
      .sort(([a], [b]) => {
        if (a == null || b == null) return (a == null) - (b == null);
        return side * (typeof a === "string" ? a.localeCompare(b) : a - b);
      })
      .map(([, row]) => row);
  }, [rows, order, columns]);
  const look = () => {
    const top = Math.max(0, Math.floor(box.current.scrollTop / ROW / STRIDE) * STRIDE - SPARE);
    const end = Math.ceil((box.current.scrollTop + box.current.clientHeight) / ROW / STRIDE) * STRIDE + SPARE;
    if (top !== range[0] || end !== range[1]) setRange([top, end]);
  };
  useLayoutEffect(look, [sorted.length]);
  const begin = Math.min(range[0], Math.max(0, sorted.length - 1));
  const seen = sorted.slice(begin, range[1]);
  const below = Math.max(0, sorted.length - begin - seen.length);
  return html`<div class="table" role="region" aria-label=${label} tabindex="0" ref=${box} onScroll=${look}>
    <table aria-rowcount=${sorted.length + 1}>
      <caption class="sr">${label}, ${sorted.length} rows</caption>
      <thead><tr aria-rowindex="1">${columns.map(
        (each) => html`<th key=${each.key} scope="col" class=${each.text ? "text" : ""} title=${each.title}
          aria-sort=${order.key === each.key ? (order.down ? "descending" : "ascending") : undefined}>
          ${each.fixed
            ? each.label
            : html`<button type="button" onClick=${() =>
                setOrder({ key: each.key, down: order.key === each.key ? !order.down : !each.text })}>
                ${each.label}<span aria-hidden="true">${order.key === each.key ? (order.down ? " ▾" : " ▴") : ""}</span>
              </button>`}</th>`,
      )}</tr></thead>
      <tbody>
        ${begin > 0 && html`<tr class="pad" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${begin * ROW}px` }}></td></tr>`}
        ${seen.map((row, at) => html`<${Row} key=${row.id} row=${row} columns=${columns} index=${begin + at + 2} />`)}
        ${below > 0 && html`<tr class="pad" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${below * ROW}px` }}></td></tr>`}
        ${!sorted.length && html`<tr><td class="text muted" colspan=${columns.length}>${empty}</td></tr>`}
      </tbody>
    </table>
  </div>`;
}

// series: {label, values, show}; all share the times x and one unit.
export function Chart({ title, x, series, show = format.number, max, least = 1, note }) {
  const box = useRef(null);
  const plot = useRef(null);
  const [at, setAt] = useState(null);
  const names = series.map((each) => each.label).join("|");
  const theme = document.documentElement.dataset.theme || "";
  const empty = !x.length;
  useEffect(() => {
    if (empty) return undefined;
    const made = draw(box.current, { x, series, show, max, least, whole: show === format.count, tick: format.clock, onCursor: setAt });
    plot.current = made;
    return () => {
      plot.current = null;
      made.end();
    };
  }, [names, theme, empty]);
  useEffect(() => {
    if (plot.current) plot.current.setData([x, ...series.map((each) => each.values)]);
  });
  const place = at == null || at >= x.length ? x.length - 1 : at;
  const values = series.map((each) => show(each.values[place]));
  return html`<figure class="card">
    <figcaption>
      <h2>${title}</h2>
      <div class="legend">
        ${series.map((each, index) => html`<span key=${each.label}><span class=${`swatch k${index % 6}`}></span>${each.label} <b>${values[index]}</b></span>`)}
        ${note && html`<span>${note}</span>`}
      </div>
    </figcaption>
    ${empty && html`<p class="muted">Nothing yet.</p>`}
    <div class="plot" hidden=${empty} ref=${box} role="img" aria-label=${`${title}: ${series.map((each, index) => `${each.label} ${values[index]}`).join(", ")}`}></div>
  </figure>`;
}

export const Facts = ({ items }) => items.length > 0 && html`<dl class="facts">${items.map(
  ([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`,
)}</dl>`;

// Run something and keep what it said, for a line that is read aloud.
export function useReport() {
  const [report, setReport] = useState({ text: "", bad: false, busy: false });
  const run = async (doing, work, done) => {
    setReport({ text: `${doing} …`, bad: false, busy: true });
    try {
      const value = await work();
      setReport({ text: typeof done === "function" ? done(value) : done || `${doing}: done.`, bad: false, busy: false });
      return value;
    } catch (error) {
      setReport({ text: error.message, bad: true, busy: false });
      return undefined;
    }
  };
  return [report, run];
}

export const Report = ({ report }) => html`<p role="status" class=${report.bad ? "bad" : "muted"}>${report.text}</p>`;

export function readable(admin, hasAdmin) {
  if (admin) return "";
  return hasAdmin ? "Read-only: changes need the admin key (Key, above)." : "Read-only: the server was started without --admin-key.";
}
