// A client of the server's public API.

import { createParser } from "./vendor/eventsource-parser/dist/index.js";

export class Api {
  #key = ""; // in memory only
  #askForKey;

  /** askForKey(wasRefused): returns a promise of an API key; wasRefused: whether the previous key was invalid. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  get needsKey() {
    return this.#key !== "";
  }

  /** The model's name, and its presets: [{name, principle, alignment_ratio, description}]. */
  async models() {
    const { data } = await (await this.#fetch("v1/models")).json();
    const own = data.find((model) => !model.parent);
    const presets = data
      .filter((model) => model.parent)
      .map((model) => ({ name: model.id.slice(own.id.length + 1), ...model.preset }));
    return { model: own.id, presets };
  }

  /** The values of GET /metrics, summed over labels: by name without the prefix. */
  async metrics() {
    const text = await (await this.#fetch("metrics")).text();
    const found = {};
    for (const [, name, value] of text.matchAll(/^linalign:(\w+)(?:\{.*\})? (\S+)/gm)) {
      found[name] = (found[name] ?? 0) + Number(value);
    }
    return found;
  }

  /** The chunks of a streamed chat completion. Throws Error with the server's message, AbortError. */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    const events = [];
    const parser = createParser({ onEvent: (event) => events.push(event.data) });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let isWhole = false;
    for (;;) {
      const { done, value } = await reader.read();
      if (done && isWhole) return;
      if (done) throw new Error("The connection was cut off.");
      parser.feed(value);
      for (const data of events.splice(0)) {
        isWhole = data === "[DONE]";
        if (isWhole) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        yield chunk;
      }
    }
  }

  async #fetch(path, options = {}) {
    for (;;) {
      const key = this.#key;
      const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
      const response = await fetch(path, { ...options, headers });
      if (response.ok) return response;
      if (response.status !== 401) throw await errorOf(response);
      if (key === this.#key) this.#key = await this.#askForKey(key !== ""); // otherwise another request has got a new key
    }
  }
}

async function errorOf(response) {
  const said = await response.json().catch(() => null);
  return new Error(said?.error?.message ?? `The server answered ${response.status}.`);
}
