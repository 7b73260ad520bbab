// The serving view: the server's current load, from GET /metrics.

import { lineChart } from "./sweep.js";
import { html } from "./vendor/lit-html/lit-html.js";
import uPlot from "./vendor/uplot/dist/uPlot.esm.js";

const INTERVAL = 1000; // ms
const MAX_SCRAPES = 120;

export class Serving {
  #app;
  #timer = 0;
  #error = null;
  #scrapes = []; // {at, metrics}, times in ms
  #figure = document.createElement("figure");
  #chart = null;

  constructor(app) {
    this.#app = app;
    this.#figure.setAttribute("role", "img");
    this.#figure.setAttribute("aria-label", "Tokens a second over the last two minutes");
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    addEventListener("resize", () => this.#draw());
  }

  enter() {
    this.#scrapes = [];
    const scrape = async () => {
      if (this.#app.model) await this.#scrape(); // otherwise the server may need a key, and this view does not ask for one
      if (timer === this.#timer) timer = this.#timer = setTimeout(scrape, INTERVAL);
    };
    let timer = (this.#timer = setTimeout(scrape));
  }

  leave() {
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  async #scrape() {
    try {
      const metrics = await this.#app.api.metrics();
      this.#scrapes = [...this.#scrapes, { at: performance.now(), metrics }].slice(-MAX_SCRAPES - 1);
      this.#error = null;
      this.#draw();
    } catch (error) {
      this.#error = error.message;
    }
    this.#app.update();
  }

  /** [seconds before now, tokens per second] of every scrape except the first. */
  get #rates() {
    return this.#scrapes.slice(1).map(({ at, metrics }, index) => {
      const before = this.#scrapes[index];
      const tokens = metrics.generation_tokens_total - before.metrics.generation_tokens_total;
      return [(at - this.#scrapes.at(-1).at) / 1000, (1000 * tokens) / (at - before.at)];
    });
  }

  #draw() {
    const rates = this.#rates;
    const data = [rates.map(([at]) => at), rates.map(([, rate]) => rate)];
    const size = { width: Math.min(640, document.body.clientWidth - 40), height: 220 };
    this.#chart?.destroy(); // create it again, because its size and colours may have changed
    this.#chart = new uPlot(lineChart("Tokens a second", "seconds", size), data, this.#figure);
  }

  template() {
    const now = this.#scrapes.at(-1)?.metrics;
    const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
    const facts = now && [
      ["Sequences running", now.num_requests_running],
      ["Sequences waiting", now.num_requests_waiting],
      ["Tokens a second", this.#rates.at(-1)?.[1].toFixed(1) ?? "–"],
      ["KV cache in use", share(now.kv_cache_usage_perc, 1)],
      ["Prompt tokens spared by prefix reuse", share(now.prefix_cache_hits_total, now.prefix_cache_queries_total)],
      ["Preemptions", now.num_preemptions_total],
      ["Tokens generated", now.generation_tokens_total.toLocaleString("en")],
    ];
    return html`<section aria-label="Serving">
      <h2>Right now</h2>
      ${this.#error ? html`<p class="error" role="alert">${this.#error}</p>` : ""}
      <dl>${facts?.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      ${this.#figure}
    </section>`;
  }
}
