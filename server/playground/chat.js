// The chat view. Each conversation has its own principle and is stored in this browser only.

import { outcome, reply, speed } from "./compare.js";
import { Conversations } from "./conversations.js";
import { presetSelect, principlesOf, ratioSlider } from "./form.js";
import { chatBody } from "./requests.js";
import { Run } from "./run.js";
import { live } from "./vendor/lit-html/directives/live.js";
import { html, nothing } from "./vendor/lit-html/lit-html.js";

export class Chat {
  #app;
  #conversations = new Conversations(() => this.#app.update());
  #run = null; // the running reply, or an unfinished one
  #before = []; // the messages before that reply
  #draft = "";
  #edited = null; // {place, text} of the message that is being edited

  constructor(app) {
    this.#app = app;
  }

  get running() {
    return this.#run?.running ?? false;
  }

  get #conversation() {
    return this.#conversations.current;
  }

  template() {
    const messages = this.#run ? this.#before : this.#conversation.messages;
    return html`
      ${this.#settings()}
      <ol class="messages" aria-label="Messages">
        ${messages.map((message, place) => this.#message(message, place, messages.length))}
        ${this.#run ? this.#coming() : nothing}
        ${!this.#run && messages.at(-1)?.role === "user" ? html`<li>${this.#again("Try again")}</li>` : nothing}
      </ol>
      ${this.#composer()}
    `;
  }

  #settings() {
    const { principles, ratio } = this.#conversation;
    const change = (changes) => {
      Object.assign(this.#conversation, changes);
      this.#save();
    };
    const choose = (preset) => change({ principles: principlesOf(preset), ratio: preset.alignment_ratio ?? ratio });
    const text = principles.map((principle) => principle.text).join(" + ");
    const option = (one, index) =>
      html`<option value=${index} .selected=${one === this.#conversation}>${titleOf(one)}</option>`;
    return html`<div class="settings">
      <p class="buttons">
        <label>Conversation
          <select ?disabled=${this.running} @change=${({ target }) => this.#leave(() => this.#conversations.open(Number(target.value)))}>
            ${this.#conversations.all.map(option)}
          </select>
        </label>
        <button type="button" ?disabled=${this.running} @click=${() => this.#leave(() => this.#conversations.create())}>New</button>
        <button type="button" ?disabled=${this.running} @click=${() => this.#leave(() => this.#conversations.delete())}>Delete</button>
      </p>
      <label>Principle
        <input placeholder="a preference, in plain words" .value=${live(text)}
          @input=${({ target }) => change({ principles: [{ text: target.value, weight: 1 }] })}>
      </label>
      ${ratioSlider(ratio, (value) => change({ ratio: value }))}
      <p class="buttons">${presetSelect(this.#app.presets, choose)}</p>
    </div>`;
  }

  #message(message, place, length) {
    const isUsers = message.role === "user";
    const edit = () => {
      this.#edited = { place, text: message.content };
      this.#focus(".messages textarea");
    };
    const editButton = html`<button type="button" ?disabled=${this.running} @click=${edit}>Edit</button>`;
    const shown = html`<div class="reply">${isUsers ? html`<p class="typed">${message.content}</p>` : reply({ text: message.content })}</div>
      <p class="buttons">${isUsers ? editButton : place === length - 1 ? this.#again("Regenerate") : nothing}</p>`;
    return html`<li class=${message.role}>
      <h2>${isUsers ? "You" : "Reply"}</h2>
      ${this.#edited?.place === place ? this.#editor() : shown}
    </li>`;
  }

  /** Requests the last reply again. */
  #again(title) {
    const ask = () => {
      const { messages } = this.#conversation;
      return this.#answer(messages.at(-1).role === "user" ? messages : messages.slice(0, -1));
    };
    return html`<button type="button" ?disabled=${this.running || !this.#app.model} @click=${ask}>${title}</button>`;
  }

  #editor() {
    const send = (event) => {
      event.preventDefault();
      if (this.running) return;
      const { place, text } = this.#edited;
      this.#send(this.#conversation.messages.slice(0, place), text);
      this.#focus(".composer textarea");
    };
    const cancel = () => {
      this.#edited = null;
      this.#focus(".composer textarea");
    };
    return html`<form @submit=${send}>
      <textarea rows="3" required aria-label="Edited message" .value=${live(this.#edited.text)}
        @input=${({ target }) => (this.#edited.text = target.value)}></textarea>
      <p class="buttons">
        <button class="primary" ?disabled=${this.running || !this.#app.model}>Send again</button>
        <button type="button" @click=${cancel}>Cancel</button>
      </p>
    </form>`;
  }

  #coming() {
    return html`<li class="assistant">
      <h2>Reply</h2>
      ${speed(this.#run)}
      <div class="reply" aria-busy=${this.running}>${reply(this.#run)}</div>
      ${this.running ? nothing : html`<p class="buttons">${this.#again("Try again")}</p>`}
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
        <textarea rows="2" required .value=${live(this.#draft)} @keydown=${onKey} @input=${({ target }) => (this.#draft = target.value)}></textarea>
      </label>
      <p class="buttons">
        <button class="primary" ?disabled=${this.running || !this.#app.model}>Send</button>
        <button type="button" ?disabled=${!this.running} @click=${() => this.#run.stop()}>Stop</button>
      </p>
    </form>`;
  }

  #send(before, text) {
    this.#conversation.messages = [...before, { role: "user", content: text }];
    return this.#answer(this.#conversation.messages);
  }

  /** Requests a reply to these messages. Later messages stay until the reply's first token. */
  async #answer(messages) {
    const { api, model, update } = this.#app;
    const conversation = this.#conversation;
    const { principles, ratio } = conversation;
    const settings = { principles, method: "linear", mass: null, seed: null }; // other fields have the server's defaults
    const run = (this.#run = new Run(chatBody(model, settings, messages, ratio)));
    [this.#before, this.#edited] = [messages, null];
    this.#app.status = "A reply is being generated.";
    this.#save();
    await run.start(api, update);
    if (run.text) conversation.messages = [...messages, { role: "assistant", content: run.text }];
    if (!run.error) this.#run = null;
    this.#app.status = outcome([run]);
    this.#save();
  }

  /** Switches to another conversation, and stops showing the current reply. */
  #leave(change) {
    [this.#run, this.#edited] = [null, null];
    change();
    this.#app.update();
  }

  #save() {
    if (!this.#conversations.save()) this.#app.status = "This browser does not keep the conversation: no room, or not allowed.";
    this.#app.update();
  }

  async #focus(selector) {
    await this.#app.update();
    document.querySelector(selector)?.focus();
  }
}

function titleOf({ messages }) {
  return messages[0]?.content.slice(0, 40) ?? "New conversation";
}
