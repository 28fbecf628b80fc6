// The state that the server sends, the key, and calls of the API. Sections have no prototype: a key may be any name.
import { useEffect, useState } from "./vendor/preact.mjs";

const KEPT = 900; // points of the load's history
const SILENCE = 20_000; // milliseconds without a message after which the connection is taken for lost

export const store = { state: {}, history: {}, status: "connecting", why: "", lost: 0, key: readKey() };
const listeners = new Set();
let wake = () => {};
let pending = false;

function readKey() {
  try {
    return sessionStorage.getItem("inlaid.key") || "";
  } catch {
    return "";
  }
}

export function setKey(key) {
  store.key = key;
  try {
    if (key) sessionStorage.setItem("inlaid.key", key);
    else sessionStorage.removeItem("inlaid.key");
  } catch {
    // The key then lasts until the page is closed or loaded again.
  }
  reconnect();
}

export function useStore() {
  const [, redraw] = useState(0);
  useEffect(() => {
    const listener = () => redraw((n) => n + 1);
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, []);
  return store;
}

function changed() {
  if (pending) return;
  pending = true;
  const tell = () => {
    pending = false;
    for (const listener of listeners) listener();
  };
  if (document.hidden) setTimeout(tell, 0);
  else requestAnimationFrame(tell);
}

export const isAdmin = () => "paths" in store.state;
export const isOperator = () => "tenants" in store.state;
export const section = (name) => store.state[name] || {};
export const headers = (more) => ({ ...(store.key ? { Authorization: `Bearer ${store.key}` } : {}), ...more });

export async function call(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: headers(body === undefined ? {} : { "Content-Type": "application/json" }),
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await response.text();
  let value = text;
  try {
    value = JSON.parse(text);
  } catch {
    // Some answers are plain text.
  }
  if (!response.ok) throw new Error((value.error && value.error.message) || `the server answered ${response.status}`);
  return value;
}

// Read server-sent events of a response; `each` is given the event's name and its data.
export async function readEvents(response, each) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      let name = "message";
      let data = "";
      for (const line of text.slice(0, end).split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        if (line.startsWith("data: ")) data += line.slice(6);
      }
      text = text.slice(end + 2);
      each(name, data);
    }
  }
}

function takeWhole(whole) {
  const { history, ...sections } = whole;
  store.state = {};
  for (const [name, rows] of Object.entries(sections)) store.state[name] = Object.assign(Object.create(null), rows);
  store.history = history;
}

function takeDelta(delta) {
  for (const [name, part] of Object.entries(delta)) {
    const rows = (store.state[name] = Object.assign(Object.create(null), store.state[name]));
    for (const [key, value] of Object.entries(part.set || {})) rows[key] = value;
    for (const key of part.drop || []) delete rows[key];
  }
  const load = store.state.load;
  const times = store.history.t;
  if (!load || !times || !(load.t > (times[times.length - 1] || 0)) || !("running" in load)) return;
  const more = {};
  for (const [name, values] of Object.entries(store.history)) {
    const longer = values.concat([load[name] ?? null]);
    more[name] = longer.length > KEPT ? longer.slice(-KEPT) : longer;
  }
  store.history = more;
}

let ending = null; // ends the present connection
export function reconnect() {
  if (ending) ending.abort();
  wake();
}

export async function follow() {
  let failures = 0;
  for (;;) {
    let timer = 0;
    ending = new AbortController();
    const mine = ending;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => mine.abort(), SILENCE);
    };
    let pause = 0;
    try {
      alive();
      const response = await fetch("console/events", { headers: headers(), signal: mine.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        Object.assign(store, { status: "key", state: {}, why: store.key ? "This key is not valid here." : "" });
        pause = Infinity;
      } else if (!response.ok) {
        const said = await response.json().catch(() => ({}));
        throw new Error((said.error && said.error.message) || `the server answered ${response.status}`);
      } else {
        await readEvents(response, (name, data) => {
          alive();
          if (!data) return;
          const value = JSON.parse(data);
          if (name === "state") takeWhole(value);
          else takeDelta(value);
          failures = 0;
          Object.assign(store, { status: "live", why: "" });
          changed();
        });
        throw new Error("the server closed the connection");
      }
    } catch (error) {
      if (mine.signal.aborted && store.status !== "live") pause = 0.2;
      failures += 1;
      Object.assign(store, { status: "lost", why: error.message });
      if (failures === 1) store.lost += 1;
      pause = pause || Math.min(5, 0.3 * 2 ** failures);
    }
    clearTimeout(timer);
    changed();
    await new Promise((resolve) => {
      wake = resolve;
      if (pause !== Infinity) setTimeout(resolve, 1000 * pause);
    });
  }
}
