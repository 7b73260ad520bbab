// The why view: tokens coloured by the distance between the aligned and the base policy, with each policy's candidates.

import { outcome, reply, speed } from "./compare.js";
import { form } from "./form.js";
import { chatBody, traced } from "./requests.js";
import { Run } from "./run.js";
import { html, nothing } from "./vendor/lit-html/lit-html.js";

const STEPS = [0.02, 0.1, 0.3, 0.7, 1.5, 3]; // nats; lower bounds of the colours
const POLICIES = ["base", "principled", "aligned"];

export class Why {
  #app;
  #run = null;
  #active = 0;

  constructor(app) {
    this.#app = app;
  }

  get running() {
    return this.#run?.running ?? false;
  }

  async run() {
    this.stop();
    const { api, model, settings, update } = this.#app;
    const messages = [{ role: "user", content: settings.prompt }];
    const run = (this.#run = new Run(traced(chatBody(model, settings, messages, settings.ratio))));
    this.#active = 0;
    this.#app.status = "A reply is being generated.";
    await run.start(api, update);
    if (run === this.#run) this.#app.status = outcome([run]);
    update();
  }

  stop() {
    this.#run?.stop();
  }

  template() {
    return html`
      ${form(this.#app, this)}
      <div class="tokens-and-token">
        <section aria-label="Reply">
          <h2>Aligned reply</h2>
          ${speed(this.#run)}
          ${this.#run?.error ? reply(this.#run) : this.#tokens(this.#run?.trace ?? [])}
          ${legend()}
        </section>
        <section class="token-details" aria-label="Token">${this.#details(this.#run?.trace[this.#active])}</section>
      </div>
    `;
  }

  #tokens(trace) {
    const texts = textsOf(trace);
    const option = (token, index) => html`<span role="option" id="token-${index}" data-index=${index}
      class="token tint-${tint(token.kl)}" aria-selected=${index === this.#active}
      aria-label="${texts[index]}, ${nats(token.kl)}">${texts[index].replaceAll("\n", "↵\n")}</span>`;
    const onPoint = (event) => {
      const index = event.target.closest("[data-index]")?.dataset.index;
      if (index !== undefined) this.#choose(Number(index));
    };
    return html`<div class="tokens" role="listbox" tabindex="0" aria-label="Tokens of the reply"
      aria-activedescendant=${trace.length ? `token-${this.#active}` : nothing}
      @keydown=${(event) => this.#onKey(event, trace.length)} @mouseover=${onPoint} @click=${onPoint}
      >${trace.map(option)}</div>`;
  }

  #onKey(event, length) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -length, End: length };
    if (!(event.key in steps) || !length) return;
    event.preventDefault();
    this.#choose(Math.min(Math.max(this.#active + steps[event.key], 0), length - 1));
    document.getElementById(`token-${this.#active}`).scrollIntoView({ block: "nearest" });
  }

  #choose(index) {
    this.#active = index;
    this.#app.update();
  }

  #details(token) {
    if (!token) return html`<p>Run, then point at a token or walk through them with the arrow keys.</p>`;
    if (token.kl === null) return html`<h2>“${token.token}”</h2><p>Drawn without alignment: there is one policy only.</p>`;
    const plausible = token.plausible_tokens === 1 ? "1 token was" : `${token.plausible_tokens.toLocaleString("en")} tokens were`;
    return html`<h2>“${token.token}”</h2>
      <p>${nats(token.kl)} from the base policy; ${plausible} plausible.</p>
      <table>
        <caption>Most probable tokens of each policy</caption>
        <thead><tr>${POLICIES.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
        <tbody>
          ${[0, 1, 2, 3, 4].map((rank) => html`<tr>${POLICIES.map((name) => candidate(token.top[name][rank], token))}</tr>`)}
        </tbody>
        <tfoot><tr>${POLICIES.map((name) => html`<td>this one: ${percent(logprobOf(token, name))}</td>`)}</tr></tfoot>
      </table>`;
  }
}

function candidate(entry, token) {
  if (!entry) return html`<td></td>`;
  const isDrawn = entry.bytes.join() === token.bytes.join();
  return html`<td class=${isDrawn ? "drawn" : ""}><code>${visible(entry.token)}</code> <span class="share">${percent(entry.logprob)}</span></td>`;
}

function logprobOf(token, policy) {
  return policy === "aligned" ? token.logprob : token[`${policy}_logprob`];
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share > 0 && share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}

function nats(kl) {
  return kl === null ? "not aligned" : `${kl.toFixed(2)} nats`;
}

function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll(" ", "␣");
}

function tint(kl) {
  return STEPS.filter((step) => (kl ?? 0) >= step).length;
}

/** The text of every token. A character that consists of several tokens is at the last one. */
function textsOf(trace) {
  const decoder = new TextDecoder();
  return trace.map(({ bytes }) => decoder.decode(new Uint8Array(bytes), { stream: true }) || (bytes.length ? "…" : "∅"));
}

function legend() {
  const entry = (from, index) => html`<li class="tint-${index}">${from}</li>`;
  return html`<p class="legend" id="legend">Nats that the aligned policy went from the base one, from:</p>
    <ul class="legend" aria-labelledby="legend">${[0, ...STEPS].map(entry)}</ul>`;
}
