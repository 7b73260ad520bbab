// The sweep view: the same prompt at several ratios, and statistics of the replies.

import { outcome, reply } from "./compare.js";
import { form } from "./form.js";
import { chatBody, traced } from "./requests.js";
import { Run } from "./run.js";
import { distinct, longestRepetition, mean, wordsOf } from "./statistics.js";
import { html, nothing } from "./vendor/lit-html/lit-html.js";
import uPlot from "./vendor/uplot/dist/uPlot.esm.js";

const RATIOS = [0, 0.5, 1, 2, 4, 8];
const CLOSE_TO_ZERO = 1e-9; // too small to change a token; gives ratio 0 a trace
const MEASURES = [
  ["KL from base, nats a token", "kl", 2],
  ["Length, words", "words", 0],
  ["Distinct 1-grams", "distinct_1", 2],
  ["Distinct 2-grams", "distinct_2", 2],
  ["Distinct 3-grams", "distinct_3", 2],
  ["Longest repetition, words", "longest_repetition", 0],
];
const SIZE = { width: 296, height: 200 };

export class Sweep {
  #app;
  #runs = [];
  #charts = []; // uPlot's charts, after all replies are complete
  #figures = document.createElement("div");

  constructor(app) {
    this.#app = app;
    this.#figures.className = "figures";
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  get running() {
    return this.#runs.some((run) => run.running);
  }

  /** [ratio, run] of the complete replies; empty while replies are running. */
  get #done() {
    if (this.running) return [];
    return this.#runs.map((run, index) => [RATIOS[index], run]).filter(([, run]) => run.state === "done");
  }

  async run() {
    this.stop();
    const { api, model, settings, update } = this.#app;
    const messages = [{ role: "user", content: settings.prompt }];
    const bodyAt = (ratio) =>
      ratio
        ? chatBody(model, settings, messages, ratio)
        : chatBody(model, { ...settings, method: "linear", mass: 1 }, messages, CLOSE_TO_ZERO);
    const runs = (this.#runs = RATIOS.map((ratio) => new Run(traced(bodyAt(ratio)))));
    this.#app.status = "Six replies are being generated.";
    await Promise.all(runs.map((run) => run.start(api, update)));
    if (runs !== this.#runs) return;
    this.#draw();
    this.#app.status = outcome(runs);
    update();
  }

  stop() {
    for (const run of this.#runs) run.stop();
  }

  template() {
    return html`
      ${form(this.#app, this, { hasRatio: false })}
      ${this.#done.length ? this.#results() : nothing}
      <div class="texts">${this.#runs.map((run, index) => this.#text(run, RATIOS[index]))}</div>
    `;
  }

  #results() {
    const rows = this.#done.map(([ratio, run]) => [ratio, numbersOf(run)]);
    return html`<section aria-label="Measures">
      ${this.#figures}
      <table>
        <caption>Against the ratio</caption>
        <thead><tr><th scope="col">Ratio</th>${MEASURES.map(([title]) => html`<th scope="col">${title}</th>`)}</tr></thead>
        <tbody>
          ${rows.map(([ratio, numbers]) => html`<tr>
            <th scope="row">${ratio}</th>
            ${MEASURES.map(([, name, digits]) => html`<td>${numbers[name].toFixed(digits)}</td>`)}
          </tr>`)}
        </tbody>
      </table>
      <p class="buttons">
        <button type="button" @click=${() => this.#exportPicture()}>Export PNG</button>
        <button type="button" @click=${() => this.#exportNumbers()}>Export JSON</button>
      </p>
    </section>`;
  }

  #text(run, ratio) {
    return html`<section aria-label="Ratio ${ratio}">
      <h2>Ratio ${ratio}</h2>
      <div class="reply" aria-busy=${run.running}>${reply(run)}</div>
    </section>`;
  }

  #draw() {
    for (const chart of this.#charts) chart.destroy();
    this.#charts = [];
    this.#figures.replaceChildren();
    const done = this.#done;
    if (!done.length) return;
    const numbers = done.map(([, run]) => numbersOf(run));
    for (const [title, name] of MEASURES) {
      const figure = document.createElement("figure");
      figure.setAttribute("role", "img");
      figure.setAttribute("aria-label", `${title}, against the ratio; the table below has the numbers`);
      this.#figures.append(figure);
      const data = [done.map(([ratio]) => ratio), numbers.map((at) => at[name])];
      this.#charts.push(new uPlot(lineChart(title, "alignment ratio", SIZE), data, figure));
    }
  }

  #exportPicture() {
    const { height, width } = this.#charts[0].ctx.canvas;
    const room = height / 8; // for the title
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [3 * width, 2 * (height + room)];
    const context = canvas.getContext("2d");
    const { background, text } = colours();
    context.fillStyle = background;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = text;
    context.font = `${room / 2}px sans-serif`;
    this.#charts.forEach((chart, index) => {
      const [x, y] = [(index % 3) * width, Math.floor(index / 3) * (height + room)];
      context.fillText(MEASURES[index][0], x + room, y + room * 0.75);
      context.drawImage(chart.ctx.canvas, x, y + room);
    });
    canvas.toBlob((blob) => download(blob, "linalign-sweep.png"));
  }

  #exportNumbers() {
    const runs = this.#done.map(([ratio, run]) => ({
      ratio,
      request: run.body,
      text: run.text,
      finish_reason: run.finishReason,
      tokens: run.numTokens,
      ...numbersOf(run),
    }));
    download(new Blob([JSON.stringify({ runs }, null, 2)], { type: "application/json" }), "linalign-sweep.json");
  }
}

function numbersOf(run) {
  return {
    kl: mean(run.trace.map((token) => token.kl ?? 0)),
    words: wordsOf(run.text).length,
    distinct_1: distinct(run.text, 1),
    distinct_2: distinct(run.text, 2),
    distinct_3: distinct(run.text, 3),
    longest_repetition: longestRepetition(run.text),
  };
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The page's current colours, for charts on a canvas. */
function colours() {
  const style = getComputedStyle(document.body);
  return { background: style.backgroundColor, text: style.color, line: style.accentColor };
}

/** uPlot's options for one line without a legend. */
export function lineChart(title, label, size) {
  const { text, line } = colours();
  const axis = { stroke: text, grid: { stroke: "rgba(128, 128, 128, 0.25)" }, ticks: { show: false } };
  return {
    ...size,
    title,
    cursor: { show: false },
    legend: { show: false },
    scales: { x: { time: false }, y: { range: (_, low, high) => [Math.min(low, 0), high > 0 ? high * 1.1 : 1] } },
    axes: [{ ...axis, label, size: 28, labelSize: 20 }, axis],
    series: [{}, { stroke: line, width: 2, points: { size: 6, fill: line } }],
  };
}
