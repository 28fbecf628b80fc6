// Chat with the base or adapters, up to three side by side on the same prompt. The history stays in this browser.
import { html, useEffect, useRef, useState } from "./vendor/preact.mjs";
import * as format from "./format.js";
import { Report, useReport } from "./parts.js";
import { headers, readEvents, section, store } from "./store.js";

const STORED = "inlaid.chats";
const MOST = 20; // conversations that are kept
const START = { system: "", temperature: "0.7", top_p: "1", max_tokens: "128", seed: "", stop: "", schema: "", logprobs: false };

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORED) || "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

function keep(conversations) {
  try {
    localStorage.setItem(STORED, JSON.stringify(conversations.slice(0, MOST)));
  } catch {
    // Storage is full or forbidden: the history then lasts until the page is left.
  }
}

// Numbers of the settings: their labels, and what each must be.
const NUMBERS = {
  temperature: ["Temperature", "a number of at least 0", (value) => value >= 0],
  top_p: ["Top p", "a number above 0 and at most 1", (value) => value > 0 && value <= 1],
  max_tokens: ["Most tokens", "a whole number of at least 1", (value) => Number.isInteger(value) && value >= 1],
  seed: ["Seed", "a whole number", Number.isInteger],
};

function schemaOf(text) {
  const schema = JSON.parse(text);
  if (typeof schema !== "object" || schema === null || Array.isArray(schema)) throw new Error("it is not an object");
  return schema;
}

// Return what is wrong with the settings, by name.
export function faultsOf(settings) {
  const faults = {};
  for (const [name, [label, rule, holds]] of Object.entries(NUMBERS))
    if (settings[name].trim() && !holds(Number(settings[name]))) faults[name] = `${label} must be ${rule}.`;
  try {
    if (settings.schema.trim()) schemaOf(settings.schema);
  } catch (error) {
    faults.schema = `The JSON schema cannot be used: ${error.message}.`;
  }
  return faults;
}

// Return the body of a request, or throw what is wrong with a setting.
export function bodyOf(model, messages, settings, chat) {
  for (const fault of Object.values(faultsOf(settings))) throw new Error(fault);
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of Object.keys(NUMBERS)) if (settings[name].trim()) body[name] = Number(settings[name]);
  const stop = settings.stop.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  if (settings.schema.trim()) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: schemaOf(settings.schema) } };
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  if (chat) {
    body.messages = [...system, ...messages.map(({ role, content }) => ({ role, content }))];
    if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  } else {
    body.prompt = [...system, ...messages].map((message) => message.content).join("\n");
    if (settings.logprobs) body.logprobs = 5;
  }
  return body;
}

function tokensOf(choice) {
  const found = choice.logprobs;
  if (!found) return [];
  if (found.content) return found.content.map((each) => ({ text: each.token, logprob: each.logprob, top: (each.top_logprobs || []).map((top) => [top.token, top.logprob]) }));
  return (found.tokens || []).map((text, at) => ({ text, logprob: found.token_logprobs[at], top: Object.entries((found.top_logprobs || [])[at] || {}) }));
}

async function answer(body, chat, signal, update) {
  const began = performance.now();
  const response = await fetch(chat ? "v1/chat/completions" : "v1/completions", { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal });
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Error((said.error && said.error.message) || `the server answered ${response.status}`);
  }
  const made = { role: "assistant", content: "", tokens: [], live: true, model: body.model };
  let first = 0;
  await readEvents(response, (name, data) => {
    if (!data || data === "[DONE]") return;
    const value = JSON.parse(data);
    if (value.error) throw new Error(value.error.message);
    for (const choice of value.choices || []) {
      const text = chat ? (choice.delta && (choice.delta.content || choice.delta.reasoning_content)) || "" : choice.text || "";
      if (!first && (text || choice.finish_reason)) first = performance.now();
      made.content += text;
      made.tokens = made.tokens.concat(tokensOf(choice));
      if (choice.finish_reason) made.finish = choice.finish_reason;
    }
    if (value.usage) made.count = value.usage.completion_tokens;
    made.ttft = first ? (first - began) / 1000 : undefined;
    made.seconds = first ? (performance.now() - first) / 1000 : undefined;
    update({ ...made });
  });
  return { ...made, live: false };
}

const heat = (logprob) => (logprob > -0.1 ? "p0" : logprob > -0.7 ? "p1" : logprob > -1.6 ? "p2" : logprob > -3 ? "p3" : "p4");
const percent = (logprob) => format.share(Math.exp(logprob));

function Answer({ message }) {
  const [token, setToken] = useState(null);
  const tokens = (message.tokens || []).slice();
  if (message.finish === "stop" && tokens.length && !message.content.endsWith(tokens[tokens.length - 1].text)) tokens.pop(); // the end token
  const shown = tokens.length;
  const speed = message.count > 1 && message.seconds ? (message.count - 1) / message.seconds : null;
  return html`<div class=${`message ${message.role} ${message.live ? "live" : ""}`}><span class="who">${message.role === "user" ? "you" : message.model}</span>${shown
      ? tokens.map((each, at) => html`<span key=${at} class=${`token ${heat(each.logprob)}`} title=${`${percent(each.logprob)}; ${each.top.map(([text, value]) => `${JSON.stringify(text)} ${percent(value)}`).join(", ")}`}
          onMouseEnter=${() => setToken(each)}>${each.text}</span>`)
      : message.content}</div>
    ${shown ? html`<p class="detail">${token ? html`<span class="mono">${JSON.stringify(token.text)}</span> ${percent(token.logprob)} (log ${format.number(token.logprob)}); ${token.top.map(([text, value]) => `${JSON.stringify(text)} ${percent(value)}`).join(" · ")}` : "Point at a token for its alternatives; the redder, the less likely."}</p>` : ""}
    ${message.role === "assistant" && !message.error && html`<p class="detail">first token ${format.seconds(message.ttft)} · ${format.count(message.count)} tokens · ${format.number(speed)} tokens per s${message.finish ? ` · ended by ${message.finish}` : ""}</p>`}
    ${message.error && html`<p class="bad" role="alert">${message.error}</p>`}`;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function asCurl(body, chat) {
  const { stream_options: _, ...plain } = body;
  const key = store.key ? ` \\\n  -H "Authorization: Bearer $INLAID_API_KEY"` : "";
  return `curl -N ${location.origin}/v1/${chat ? "chat/completions" : "completions"} -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(plain))}\n`;
}

function pythonOf(value) {
  if (Array.isArray(value)) return `[${value.map(pythonOf).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${pythonOf(each)}`).join(", ")}}`;
  return value === true ? "True" : value === false ? "False" : value == null ? "None" : JSON.stringify(value);
}

function asPython(body, chat) {
  const { stream, stream_options: _, ...plain } = body;
  const key = store.key ? `os.environ["INLAID_API_KEY"]` : `"none"`;
  const lines = Object.entries(plain).map(([name, value]) => `    ${name}=${pythonOf(value)},\n`).join("");
  const text = chat ? "answer.choices[0].message.content" : "answer.choices[0].text";
  return `${store.key ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${key})\nanswer = client.${chat ? "chat.completions" : "completions"}.create(\n${lines})\nprint(${text})\n`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

function Column({ column, at, names, remove, setModel, bodyFor, chat }) {
  const box = useRef(null);
  const [report, run] = useReport();
  useEffect(() => {
    box.current.scrollTop = box.current.scrollHeight;
  }, [column.messages]);
  const take = (label, make) => run(`Copying ${label}`, () => copy(make(bodyFor(column), chat)), `Copied as ${label}.`);
  const unknown = names.length && !names.includes(column.model);
  return html`<section class="card" aria-label=${`Column ${at + 1}`}>
    <div class="row">
      <label class="wide">Model<input list="models" value=${column.model} aria-invalid=${unknown ? "true" : "false"} onInput=${(e) => setModel(e.target.value)} /></label>
      ${remove && html`<button type="button" onClick=${remove} aria-label=${`Remove column ${at + 1}`}>✕</button>`}
    </div>
    ${unknown ? html`<p class="warn">No model of this name is served.</p>` : ""}
    <div class="answers" ref=${box} role="log" aria-label=${`Answers of column ${at + 1}`} tabindex="0">
      ${column.messages.map((message, place) => html`<${Answer} key=${place} message=${message} />`)}
      ${!column.messages.length && html`<p class="muted">No messages yet.</p>`}
    </div>
    <div class="row"><button class="small" onClick=${() => take("curl", asCurl)}>Copy as curl</button><button class="small" onClick=${() => take("Python", asPython)}>Copy as Python</button></div>
    <${Report} report=${report} />
  </section>`;
}

export function Chat({ query, shown }) {
  const server = section("server");
  const chat = server.chat !== false;
  const names = server.model ? [server.model, ...Object.keys(section("adapters")).filter(Boolean)] : [];
  const [columns, setColumns] = useState([{ model: "", messages: [] }]);
  const [settings, setSettings] = useState(START);
  const [text, setText] = useState("");
  const [busy, setBusy] = useState(null);
  const [history, setHistory] = useState(stored);
  const [id, setId] = useState(() => Date.now());
  const [wrong, setWrong] = useState("");
  const form = useRef(null);
  const asked = shown ? query.get("model") : null;
  useEffect(() => {
    if (asked) setColumns(([, ...rest]) => [{ model: asked, messages: [] }, ...rest]);
  }, [asked]);
  useEffect(() => {
    if (server.model) setColumns((all) => all.map((each) => (each.model ? each : { ...each, model: server.model })));
  }, [server.model, columns.length]);
  const set = (name) => (event) => setSettings({ ...settings, [name]: event.target.type === "checkbox" ? event.target.checked : event.target.value });
  const put = (at, change) => setColumns((all) => all.map((each, place) => (place === at ? { ...each, ...change(each) } : each)));

  async function send(event) {
    event && event.preventDefault();
    if (!text.trim() || busy) return;
    const message = { role: "user", content: text };
    let bodies;
    try {
      bodies = columns.map((column) => bodyOf(column.model, [...column.messages.filter((m) => !m.error), message], settings, chat));
    } catch (error) {
      form.current.open = true;
      setWrong(error.message);
      return;
    }
    setWrong("");
    const stop = new AbortController();
    setBusy(stop);
    setText("");
    const refused = new Set();
    const final = await Promise.all(
      columns.map(async (column, at) => {
        const before = [...column.messages, message];
        put(at, () => ({ messages: [...before, { role: "assistant", content: "", live: true, model: column.model }] }));
        let last = { role: "assistant", content: "", model: column.model };
        const update = (made) => {
          last = made;
          put(at, () => ({ messages: [...before, made] }));
        };
        try {
          last = await answer(bodies[at], chat, stop.signal, update);
        } catch (error) {
          last = { ...last, live: false, ...(stop.signal.aborted ? { finish: "you" } : { error: error.message }) };
          if (last.error) refused.add(last.error);
        }
        put(at, () => ({ messages: [...before, last] }));
        return { model: column.model, messages: [...before, last].map(({ tokens, ...rest }) => rest) };
      }),
    );
    setBusy(null);
    if (refused.size && settings.schema.trim()) setWrong(`With this JSON schema: ${[...refused].join("; ")}`);
    const listed = [{ id, title: final[0].messages[0].content.slice(0, 60), columns: final, settings }, ...history.filter((each) => each.id !== id)].slice(0, MOST);
    setHistory(listed);
    keep(listed);
  }

  const begin = () => {
    setColumns(columns.map((each) => ({ ...each, messages: [] })));
    setId(Date.now());
  };
  const open = (event) => {
    const found = history.find((each) => String(each.id) === event.target.value);
    if (!found) return;
    setColumns(found.columns);
    setSettings({ ...START, ...found.settings });
    setId(found.id);
  };
  const bodyFor = (column) => bodyOf(column.model, text.trim() ? [...column.messages, { role: "user", content: text }] : column.messages, settings, chat);
  const faults = faultsOf(settings);
  const about = (name) => (faults[name] ? { "aria-invalid": "true", "aria-describedby": `fault-${name}` } : {});
  const field = (name) => html`<label>${NUMBERS[name][0]}<input value=${settings[name]} onInput=${set(name)} inputmode="decimal" size="7" ...${about(name)} /></label>`;
  return html`<h1>Chat</h1>
    <datalist id="models">${names.map((name) => html`<option key=${name} value=${name}></option>`)}</datalist>
    <div class="row">
      <button onClick=${begin} disabled=${!!busy}>New conversation</button>
      <button onClick=${() => setColumns([...columns, { model: server.model || "", messages: [] }])} disabled=${columns.length > 2 || !!busy}>Add a column</button>
      <label>Earlier conversations<select value=${history.some((each) => each.id === id) ? String(id) : ""} onChange=${open} disabled=${!!busy}><option value="">choose …</option>${history.map((each) => html`<option key=${each.id} value=${String(each.id)}>${each.title}</option>`)}</select></label>
      <button onClick=${() => { setHistory([]); keep([]); }} disabled=${!history.length}>Forget them</button>
    </div>
    <details class="card" ref=${form}><summary>Settings</summary>
      <label>System prompt<textarea rows="2" value=${settings.system} onInput=${set("system")}></textarea></label>
      <div class="row">${Object.keys(NUMBERS).map(field)}
        <label class="line"><input type="checkbox" checked=${settings.logprobs} onChange=${set("logprobs")} />Show log probabilities</label></div>
      <div class="columns"><label>Stop strings, one a line<textarea rows="2" value=${settings.stop} onInput=${set("stop")}></textarea></label>
      <label>JSON schema of the answer<textarea rows="2" class="mono" value=${settings.schema} onInput=${set("schema")} placeholder='{"type": "object"}' ...${about("schema")}></textarea></label></div>
      <div role="status">${Object.entries(faults).map(([name, fault]) => html`<p key=${name} id=${`fault-${name}`} class="bad">${fault}</p>`)}</div>
    </details>
    <div class="columns">${columns.map((column, at) => html`<${Column} key=${at} column=${column} at=${at} names=${names} chat=${chat} bodyFor=${bodyFor} setModel=${(model) => put(at, () => ({ model }))}
      remove=${columns.length > 1 && !busy ? () => setColumns(columns.filter((_, place) => place !== at)) : null} />`)}</div>
    <form onSubmit=${send}>
      <label>${chat ? "Message" : "Prompt (this model has no chat template)"}<textarea rows="3" value=${text} onInput=${(e) => setText(e.target.value)}
        onKeyDown=${(e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) send(e); }}></textarea></label>
      <div class="row"><button class="main" disabled=${!!busy || !text.trim()}>Send to ${columns.length === 1 ? "it" : `all ${columns.length}`}</button>
        <button type="button" disabled=${!busy} onClick=${() => busy.abort()}>Stop</button><span class="muted">Ctrl+Enter sends</span></div>
      ${wrong && html`<p class="bad" role="alert">${wrong}</p>`}
    </form>`;
}
