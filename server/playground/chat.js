// A chat of many turns with a principle of its own; conversations are kept in this browser only.

import { reply, speed } from "./compare.js";
import { presetSelect, ratioSlider } from "./form.js";
import { chatBody } from "./requests.js";
import { Run } from "./run.js";
import { live } from "./vendor/lit-html/directives/live.js";
import { html, nothing } from "./vendor/lit-html/lit-html.js";

const STORE = "linalign.conversations";

export class Chat {
  #app;
  #conversations = load();
  #index = 0;
  #run = null; // the reply that is on its way, or the last one
  #draft = "";
  #edited = null; // {place, text} of a message

  constructor(app) {
    this.#app = app;
  }

  get running() {
    return this.#run?.running ?? false;
  }

  get #conversation() {
    return this.#conversations[this.#index];
  }

  template() {
    const { principle, ratio, messages } = this.#conversation;
    const change = (name, value) => this.#change(() => (this.#conversation[name] = value));
    const choose = (preset) => {
      const text = typeof preset.principle === "string" ? preset.principle : (preset.principle?.[0].text ?? "");
      this.#change(() => Object.assign(this.#conversation, { principle: text, ratio: preset.alignment_ratio ?? ratio }));
    };
    return html`
      <div class="settings">
        <p class="buttons">
          <label>Conversation
            <select ?disabled=${this.running} @change=${(event) => this.#open(Number(event.target.value))}>
              ${this.#conversations.map((one, index) => html`<option value=${index} .selected=${index === this.#index}>${titleOf(one)}</option>`)}
            </select>
          </label>
          <button type="button" ?disabled=${this.running} @click=${() => this.#create()}>New</button>
          <button type="button" ?disabled=${this.running} @click=${() => this.#delete()}>Delete</button>
        </p>
        <label>Principle
          <input placeholder="a preference, in plain words" .value=${live(principle)} @input=${(event) => change("principle", event.target.value)}>
        </label>
        ${ratioSlider(ratio, (value) => change("ratio", value))}
        <p class="buttons">${presetSelect(this.#app.presets, choose)}</p>
      </div>
      <ol class="messages" aria-label="Conversation">
        ${messages.map((message, place) => this.#message(message, place))}
        ${this.running || this.#run?.state === "failed" ? this.#coming() : nothing}
      </ol>
      ${this.#composer()}
    `;
  }

  #message(message, place) {
    const isLast = place === this.#conversation.messages.length - 1;
    const edit = () => {
      this.#edited = { place, text: message.content };
      this.#app.update();
    };
    const action =
      message.role === "user"
        ? html`<button type="button" ?disabled=${this.running} @click=${edit}>Edit</button>`
        : isLast
          ? html`<button type="button" ?disabled=${this.running} @click=${() => this.#regenerate()}>Regenerate</button>`
          : nothing;
    return html`<li class=${message.role}>
      <h2>${message.role === "user" ? "You" : "Reply"}</h2>
      ${this.#edited?.place === place
        ? this.#editor()
        : html`<div class="reply">${message.role === "user" ? html`<p class="typed">${message.content}</p>` : reply({ text: message.content })}</div>
            <p class="buttons">${action}</p>`}
    </li>`;
  }

  #editor() {
    const send = (event) => {
      event.preventDefault();
      const { place, text } = this.#edited;
      this.#send(this.#conversation.messages.slice(0, place), text);
    };
    const cancel = () => {
      this.#edited = null;
      this.#app.update();
    };
    return html`<form @submit=${send}>
      <textarea rows="3" required aria-label="Message" .value=${live(this.#edited.text)}
        @input=${(event) => (this.#edited.text = event.target.value)}></textarea>
      <p class="buttons"><button class="primary">Send again</button><button type="button" @click=${cancel}>Cancel</button></p>
    </form>`;
  }

  #coming() {
    return html`<li class="assistant">
      <h2>Reply</h2>
      ${speed(this.#run)}
      <div class="reply" aria-busy=${this.running}>${reply(this.#run)}</div>
      ${this.running ? nothing : html`<p class="buttons"><button type="button" @click=${() => this.#answer()}>Try again</button></p>`}
    </li>`;
  }

  #composer() {
    const send = (event) => {
      event.preventDefault();
      if (!this.#draft.trim() || this.running || !this.#app.model) return;
      const text = this.#draft;
      this.#draft = "";
      this.#send(this.#conversation.messages, text);
    };
    const onKey = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    };
    return html`<form class="composer" @submit=${send}>
      <label>Message
        <textarea rows="2" required .value=${live(this.#draft)} @keydown=${onKey} @input=${(event) => (this.#draft = event.target.value)}></textarea>
      </label>
      <p class="buttons">
        <button class="primary" ?disabled=${this.running || !this.#app.model}>Send</button>
        <button type="button" ?disabled=${!this.running} @click=${() => this.#run.stop()}>Stop</button>
      </p>
    </form>`;
  }

  #send(before, text) {
    this.#edited = null;
    this.#conversation.messages = [...before, { role: "user", content: text }];
    return this.#answer();
  }

  #regenerate() {
    this.#conversation.messages.pop();
    return this.#answer();
  }

  /** Asks for a reply to the messages as they are; what there is of it when it is stopped stays. */
  async #answer() {
    const { api, model, update } = this.#app;
    const conversation = this.#conversation;
    const { principle, ratio, messages } = conversation;
    const settings = { principles: [{ text: principle }], method: "linear", mass: null, seed: null }; // else the server's
    const run = (this.#run = new Run(chatBody(model, settings, messages, ratio)));
    this.#app.status = "A reply is on its way.";
    this.#change(() => {}); // what was sent is kept, whatever becomes of the reply
    await run.start(api, update);
    if (run.text && !run.error) conversation.messages.push({ role: "assistant", content: run.text });
    if (run.state === "done") this.#app.status = "The reply is complete.";
    this.#change(() => {});
  }

  #open(index) {
    [this.#index, this.#edited, this.#run] = [index, null, null];
    this.#app.update();
  }

  #create() {
    this.#conversations.unshift(empty());
    this.#change(() => this.#open(0));
  }

  #delete() {
    this.#conversations.splice(this.#index, 1);
    if (!this.#conversations.length) this.#conversations.push(empty());
    this.#change(() => this.#open(0));
  }

  #change(make) {
    make();
    localStorage.setItem(STORE, JSON.stringify(this.#conversations));
    this.#app.update();
  }
}

function empty() {
  return { principle: "", ratio: 2, messages: [] };
}

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    if (Array.isArray(found) && found.length) return found;
  } catch {
    // what is there is none of ours
  }
  return [empty()];
}

function titleOf({ messages }) {
  return messages[0]?.content.slice(0, 40) ?? "New conversation";
}
