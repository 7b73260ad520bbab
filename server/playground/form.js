// The form of the Compare, Why and Sweep views: prompt, principles, ratio, sampling.

import { live } from "./vendor/lit-html/directives/live.js";
import { html, nothing } from "./vendor/lit-html/lit-html.js";

const METHODS = ["linear", "context_steering", "cfg", "opad", "amulet", "adaptive"];

/** view: an object with run(), stop(), running and, if hasRatio, ratioChanged(). */
export function form(app, view, { hasRatio = true } = {}) {
  const { settings } = app;
  const change = (name, value) => {
    settings[name] = value;
    app.update();
  };
  const submit = (event) => {
    event.preventDefault();
    view.run();
  };
  const onKey = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !view.running && app.model) {
      event.currentTarget.requestSubmit();
    }
  };
  return html`<form class="settings" @submit=${submit} @keydown=${onKey}>
    <label class="prompt">Prompt
      <textarea rows="2" required .value=${live(settings.prompt)}
        @input=${(event) => change("prompt", event.target.value)}></textarea>
    </label>
    ${principles(app, view)}
    ${hasRatio ? ratioSlider(settings.ratio, (ratio) => (change("ratio", ratio), view.ratioChanged?.())) : nothing}
    ${sampling(settings, change)}
    <p class="buttons">
      <button class="primary" ?disabled=${view.running || !app.model}>Run</button>
      <button type="button" ?disabled=${!view.running} @click=${() => view.stop()}>Stop</button>
    </p>
  </form>`;
}

export function ratioSlider(ratio, changed) {
  return html`<div class="ratio">
    <label for="ratio">Alignment ratio</label> <span>${ratio}</span>
    <input id="ratio" type="range" min="0" max="10" step="0.1" .value=${live(String(ratio))}
      @input=${(event) => changed(event.target.valueAsNumber)}>
  </div>`;
}

/** A selection of presets, which sets principle and ratio. */
export function presetSelect(presets, choose) {
  if (!presets.length) return nothing;
  const chosen = (event) => {
    const preset = presets.find(({ name }) => name === event.target.value);
    event.target.value = "";
    if (preset) choose(preset);
  };
  return html`<label>Preset
    <select @change=${chosen}>
      <option value="">choose…</option>
      ${presets.map(({ name, description }) => html`<option value=${name}>${name}: ${description}</option>`)}
    </select>
  </label>`;
}

/** [{text, weight}], with a ratio if the preset has one for the principle. */
export function principlesOf({ principle }) {
  const items = typeof principle === "string" ? [{ text: principle }] : (principle ?? [{ text: "" }]);
  return items.map((item) => ({ weight: 1, ...item }));
}

function principles(app, view) {
  const { settings } = app;
  const several = settings.principles.length > 1;
  const choose = (preset) => {
    settings.principles = principlesOf(preset);
    settings.ratio = preset.alignment_ratio ?? settings.ratio;
    settings.mass = preset.alignment_top_p ?? null;
    app.update();
    view.ratioChanged?.();
  };
  const add = () => {
    settings.principles.push({ text: "", weight: 1 });
    app.update();
  };
  const row = (principle, index) => html`<div class="principle">
    <input aria-label="Principle ${index + 1}" placeholder="a preference, in plain words" .value=${live(principle.text)}
      @input=${(event) => (principle.text = event.target.value)}>
    ${several
      ? html`<input type="number" min="0" max="100" step="any" aria-label="Weight of principle ${index + 1}"
            required .value=${String(principle.weight)}
            @input=${({ target }) => target.validity.valid && ((principle.weight = target.valueAsNumber), app.update())}>
          <button type="button" aria-label="Remove principle ${index + 1}"
            @click=${() => (settings.principles.splice(index, 1), app.update())}>×</button>`
      : nothing}
  </div>`;
  return html`<fieldset>
    <legend>${several ? "Principles and their weights" : "Principle"}</legend>
    ${settings.principles.map(row)}
    <p class="buttons"><button type="button" @click=${add}>Add a principle</button>${presetSelect(app.presets, choose)}</p>
  </fieldset>`;
}

function sampling(settings, change) {
  // Not live, so that an incomplete number stays unchanged while replies arrive.
  const number = (title, name, { min, max, step = "any", optional = false, hint = "" }) =>
    html`<label>${title}
      <input type="number" min=${min} max=${max} step=${step} ?required=${!optional} placeholder=${hint}
        .value=${String(settings[name] ?? "")}
        @input=${({ target }) => target.validity.valid && change(name, target.value === "" ? null : target.valueAsNumber)}>
    </label>`;
  const methods = METHODS.map(
    (name) => html`<option value=${name} ?selected=${name === settings.method}>${name.replace("_", " ")}</option>`,
  );
  const open = (event) => (event.currentTarget.open = true); // so that the browser can show invalid fields
  return html`<details @invalid=${{ handleEvent: open, capture: true }}>
    <summary>Sampling</summary>
    <div class="grid">
      <label>Method
        <select @change=${(event) => change("method", event.target.value)}>${methods}</select>
      </label>
      ${number("Plausible set", "mass", { min: 0.01, max: 1, optional: true, hint: "the method's" })}
      ${number("Temperature", "temperature", { min: 0, max: 2 })}
      ${number("Top p", "topP", { min: 0.01, max: 1 })}
      ${number("Tokens at most", "maxTokens", { min: 1, max: 100000, step: 1 })}
      ${number("Seed", "seed", { min: 0, max: 2 ** 53, step: 1, optional: true, hint: "random" })}
    </div>
  </details>`;
}
