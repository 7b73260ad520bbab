// The page: views, the API key, and the render function.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Serving } from "./serving.js";
import { Sweep } from "./sweep.js";
import { Why } from "./why.js";
import { html, render } from "./vendor/lit-html/lit-html.js";

const app = {
  api: new Api(askForKey),
  model: null,
  presets: [],
  status: "", // read out by screen readers
  settings: {
    prompt: "How do I get to work?",
    principles: [{ text: "Encourage cycling.", weight: 1 }],
    ratio: 2,
    method: "linear",
    mass: null, // of the plausible set; null for the method's default
    temperature: 0, // so that only the ratio changes replies
    topP: 1,
    maxTokens: 120,
    seed: 1,
  },
  update,
};

const VIEWS = {
  compare: ["Compare", new Compare(app)],
  why: ["Why this word", new Why(app)],
  sweep: ["Sweep", new Sweep(app)],
  chat: ["Chat", new Chat(app)],
  serving: ["Serving", new Serving(app)],
};

let current = null; // the name of a view
let rendering = null; // the promise of the next render
let asking = null; // the promise of a key

/** Renders the page; resolves after the changes are visible. */
function update() {
  rendering ??= new Promise((resolve) => {
    requestAnimationFrame(() => {
      rendering = null;
      render(page(), document.body);
      resolve();
    });
  });
  return rendering;
}

async function connect() {
  try {
    Object.assign(app, await app.api.models(), { status: "" });
  } catch (error) {
    app.status = error.message;
  }
  update();
}

function page() {
  const link = ([name, [title]]) =>
    html`<a href="#${name}" aria-current=${name === current ? "page" : "false"}>${title}</a>`;
  const view = VIEWS[current][1];
  return html`
    <header>
      <h1>linalign</h1>
      <nav aria-label="Views">${Object.entries(VIEWS).map(link)}</nav>
      ${app.model
        ? html`<span class="model">${app.model}</span>`
        : html`<button type="button" @click=${connect}>Connect</button>`}
      <span class="status" role="status">${app.status}</span>
    </header>
    <main class=${current}>${view.template()}</main>
    ${keyDialog()}
  `;
}

function keyDialog() {
  return html`<dialog id="key-dialog" aria-labelledby="key-title">
    <form method="dialog">
      <h2 id="key-title">This server needs an API key</h2>
      <p class="error" id="key-refused" hidden>That key was refused.</p>
      <label>API key <input id="key" type="password" autocomplete="off" required
        pattern="[!-~]+" title="printable ASCII, no spaces"></label>
      <p>It stays in this page's memory and is gone when you close it.</p>
      <p class="buttons"><button class="primary" value="use">Use it</button></p>
    </form>
  </dialog>`;
}

/** Asks the user for an API key, once for all waiting requests. */
function askForKey(isAgain) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    document.getElementById("key-refused").hidden = !isAgain;
    dialog.addEventListener(
      "close",
      () => {
        const key = dialog.returnValue === "use" ? input.value : "";
        [input.value, dialog.returnValue, asking] = ["", "", null];
        key ? resolve(key) : reject(new Error("The server needs an API key."));
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

function show() {
  const name = location.hash.slice(1);
  const next = Object.hasOwn(VIEWS, name) ? name : "compare";
  if (next === current) return;
  VIEWS[current]?.[1].leave?.();
  current = next;
  VIEWS[current][1].enter?.();
  document.title = `${VIEWS[current][0]} · linalign`;
  update();
}

addEventListener("hashchange", show);
document.body.replaceChildren();
show();
render(page(), document.body);
connect();
