// The shell: which panel is shown, the connection's state, the key and the colours.
import { html, render, useEffect, useRef, useState } from "./vendor/preact.mjs";
import { Accuracy } from "./accuracy.js";
import { Adapter, Adapters } from "./adapters.js";
import { Chat } from "./chat.js";
import { Fairness } from "./fairness.js";
import { Load } from "./load.js";
import { Residency } from "./residency.js";
import { follow, isAdmin, reconnect, section, setKey, useStore } from "./store.js";

const PANELS = [["chat", "Chat", Chat], ["adapters", "Adapters", Adapters], ["residency", "Residency", Residency], ["fairness", "Fairness", Fairness], ["accuracy", "Accuracy", Accuracy], ["load", "Load", Load]];

function useRoute() {
  const read = () => location.hash.replace(/^#\//, "") || "load";
  const [route, setRoute] = useState(read());
  useEffect(() => {
    const listener = () => setRoute(read());
    addEventListener("hashchange", listener);
    return () => removeEventListener("hashchange", listener);
  }, []);
  const [path, query] = route.split("?");
  const at = path.indexOf("/");
  let rest = at < 0 ? "" : path.slice(at + 1);
  try {
    rest = decodeURIComponent(rest);
  } catch {
    // Not written by this page: shown as it is.
  }
  return { panel: at < 0 ? path : path.slice(0, at), rest, query: new URLSearchParams(query || "") };
}

function KeyDialog({ needed, why, close, used }) {
  const [text, setText] = useState("");
  const box = useRef(null);
  useEffect(() => box.current.showModal(), []);
  const send = (event) => {
    event.preventDefault();
    setKey(text.trim());
    used();
  };
  return html`<dialog ref=${box} aria-labelledby="key-title" onClose=${close}>
    <h2 id="key-title">${needed ? "This server asks for a key" : "Key"}</h2>
    <p>An API key shows the console; the admin key also changes things. It is kept until this tab is closed, and sent in a header only.</p>
    ${why && html`<p class="bad" role="alert">${why}</p>`}
    <form onSubmit=${send}>
      <label>Key<input type="password" autocomplete="off" value=${text} onInput=${(e) => setText(e.target.value)} /></label>
      <p class="row"><button class="main">Use it</button><button type="button" onClick=${() => { setKey(""); close(); }}>Forget it</button><button type="button" onClick=${close}>Close</button></p>
    </form>
  </dialog>`;
}

function Theme({ redraw }) {
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const flip = () => {
    const next = dark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("inlaid.theme", next);
    } catch {
      // It lasts until the page is left.
    }
    redraw();
  };
  return html`<button type="button" onClick=${flip}>${dark() ? "Light" : "Dark"} colours</button>`;
}

const SAID = { live: "Connected", lost: "Connection lost, trying again", connecting: "Connecting", key: "A key is needed" };

function App() {
  const store = useStore();
  const route = useRoute();
  const [asking, setAsking] = useState(false);
  const [, redraw] = useState(0);
  const main = useRef(null);
  const server = section("server");
  const [name, label, Panel] = PANELS.find(([each]) => each === route.panel) || PANELS[5];
  const title = route.rest && name === "adapters" ? route.rest : label;
  useEffect(() => {
    document.title = `${title} · ${server.model || "inlaid"} console`;
  }, [title, server.model]);
  const level = isAdmin() ? "admin" : "tenants" in store.state ? "open" : "read-only";
  const known = "server" in store.state;
  return html`
    <a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); main.current.focus(); }}>Skip to the content</a>
    <header>
      <span class="brand">inlaid</span>
      <nav aria-label="Panels">${PANELS.map(([each, text]) => html`<a key=${each} href=${`#/${each}`} aria-current=${each === name ? "page" : undefined}>${text}</a>`)}</nav>
      <div class="right">
        <span class=${`status ${store.status}`} role="status"><span class="dot" aria-hidden="true"></span>${SAID[store.status]}${store.status === "live" && store.lost ? " again" : ""}</span>
        <span class="muted">${server.model || ""}</span>
        <button type="button" onClick=${() => setAsking(true)}>Key: ${store.key ? level : "none"}</button>
        <${Theme} redraw=${() => redraw((n) => n + 1)} />
      </div>
    </header>
    ${store.status === "lost" && html`<div class="banner bad" role="alert">The server does not answer (${store.why}). What is shown is old; what you typed is kept. <button class="small" onClick=${reconnect}>Try now</button></div>`}
    ${known && server.up === false && html`<div class="banner bad" role="alert">The engine is not serving: ${server.why}</div>`}
    ${server.draining && html`<div class="banner" role="alert">The server is shutting down and takes no new requests.</div>`}
    <main id="main" tabindex="-1" ref=${main}>
      ${name === "adapters" && route.rest ? html`<${Adapter} key=${route.rest} name=${route.rest} />` : name === "chat" ? "" : html`<${Panel} key=${name} query=${route.query} />`}
      <div hidden=${name !== "chat"}><${Chat} query=${route.query} shown=${name === "chat"} /></div>
      ${!known && store.status === "connecting" && html`<p>Waiting for the first figures …</p>`}
    </main>
    ${(asking || (store.status === "key" && asking !== null)) && html`<${KeyDialog} needed=${store.status === "key"} why=${store.why} used=${() => setAsking(false)} close=${() => setAsking(store.status === "key" ? null : false)} />`}`;
}

const root = document.getElementById("app");
root.textContent = "";
render(html`<${App} />`, root);
follow();
