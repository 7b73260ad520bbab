// The compare view: one prompt and three replies side by side, without the principle, prompted and aligned.

import { form } from "./form.js";
import { markdown } from "./markdown.js";
import { asCurl, asPython, chatBody } from "./requests.js";
import { Run } from "./run.js";
import { guard } from "./vendor/lit-html/directives/guard.js";
import { html, nothing } from "./vendor/lit-html/lit-html.js";

const SETTLED = 250; // ms without a change of the slider before a new request

const COLUMNS = [
  { title: "Without the principle", ratioOf: () => null },
  { title: "Principle prompted, ratio 0", ratioOf: () => 0 },
  { title: "Aligned", ratioOf: (settings) => settings.ratio },
];

export class Compare {
  #app;
  #runs = [];
  #asked = null; // the settings of the last run
  #timer = 0;
  #shown = null; // code that is shown because it could not be copied

  constructor(app) {
    this.#app = app;
  }

  get running() {
    return this.#runs.some((run) => run.running);
  }

  async run() {
    this.stop();
    this.#asked = structuredClone(this.#app.settings);
    const runs = (this.#runs = COLUMNS.map((column) => new Run(this.#body(column, this.#asked))));
    this.#app.status = "Three replies are being generated.";
    await Promise.all(runs.map((run) => run.start(this.#app.api, this.#app.update)));
    this.#tell();
  }

  stop() {
    clearTimeout(this.#timer);
    for (const run of this.#runs) run.stop();
  }

  #tell() {
    if (!this.running) this.#app.status = outcome(this.#runs);
    this.#app.update();
  }

  /** Requests the aligned reply again when the slider has moved. */
  ratioChanged() {
    clearTimeout(this.#timer);
    if (this.#runs.length) this.#timer = setTimeout(() => this.#align(), SETTLED);
  }

  /** Uses the settings of the other columns' requests, with the new ratio. */
  async #align() {
    this.#runs[2].stop();
    const settings = { ...this.#asked, ratio: this.#app.settings.ratio };
    const run = (this.#runs[2] = new Run(this.#body(COLUMNS[2], settings)));
    this.#app.status = "The aligned reply is being generated.";
    await run.start(this.#app.api, this.#app.update);
    this.#tell();
  }

  #body(column, settings = this.#app.settings) {
    const { model } = this.#app;
    return chatBody(model, settings, [{ role: "user", content: settings.prompt }], column.ratioOf(settings));
  }

  template() {
    return html`
      ${form(this.#app, this)}
      <div class="columns">${COLUMNS.map((column, index) => this.#column(column, this.#runs[index]))}</div>
      ${this.#shown ? this.#codeDialog() : nothing}
    `;
  }

  #column(column, run) {
    const ratio = run?.body.alignment_ratio;
    const title = column === COLUMNS[2] ? `${column.title}, ratio ${ratio ?? this.#app.settings.ratio}` : column.title;
    return html`<section aria-label=${column.title}>
      <h2>${title}</h2>
      ${speed(run)}
      <div class="reply" aria-busy=${run?.running ?? false}>${reply(run)}</div>
      <p class="buttons">
        <button type="button" ?disabled=${!this.#app.model} @click=${() => this.#copy("curl", column)}>Copy as curl</button>
        <button type="button" ?disabled=${!this.#app.model} @click=${() => this.#copy("Python", column)}>Copy as Python</button>
      </p>
    </section>`;
  }

  async #copy(language, column) {
    const url = location.origin + location.pathname.replace(/\/$/, "");
    const code = (language === "curl" ? asCurl : asPython)(this.#body(column), url, this.#app.api.needsKey);
    try {
      await navigator.clipboard.writeText(code);
      this.#app.status = `Copied as ${language}.`;
    } catch {
      this.#shown = code; // the clipboard needs https or localhost
    }
    this.#app.update();
  }

  #codeDialog() {
    const close = () => {
      this.#shown = null;
      this.#app.update();
    };
    return html`<section class="code" aria-label="Code">
      <p>The browser does not let this page use the clipboard: copy it from here.</p>
      <textarea readonly rows="12" aria-label="Code" .value=${this.#shown} @focus=${(event) => event.target.select()}></textarea>
      <p class="buttons"><button type="button" @click=${close}>Close</button></p>
    </section>`;
  }
}

/** Time to first token, tokens per second, and the finish reason. */
export function speed(run) {
  if (!run) return html`<p class="speed">–</p>`;
  const parts = [];
  if (run.timeToFirst !== null) parts.push(`first token ${Math.round(run.timeToFirst)} ms`);
  if (run.tokensPerSecond !== null) parts.push(`${run.tokensPerSecond.toFixed(1)} tokens/s`);
  parts.push(`${run.numTokens} tokens`);
  if (run.state === "stopped") parts.push("stopped");
  if (run.finishReason === "length") parts.push("cut off at the limit");
  return html`<p class="speed">${parts.join(" · ")}</p>`;
}

/** The reply's text so far, and the error if there is one. */
export function reply(run) {
  if (!run) return nothing;
  return html`
    ${run.reasoning ? html`<details class="reasoning"><summary>Reasoning</summary><p class="typed">${run.reasoning}</p></details>` : nothing}
    ${guard([run.text], () => markdown(run.text))}
    ${run.error ? html`<p class="error" role="alert">${run.error}</p>` : nothing}
  `;
}

/** The results of replies, for screen readers. */
export function outcome(runs) {
  if (runs.some((run) => run.state === "failed")) return "A reply failed.";
  if (runs.some((run) => run.state === "stopped")) return "Stopped.";
  return runs.length > 1 ? "All replies are complete." : "The reply is complete.";
}
