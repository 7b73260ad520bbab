// One streamed reply: its text, its trace and its speed.

export class Run {
  text = "";
  reasoning = ""; // of reasoning models
  trace = []; // one entry per token, if the request has alignment_trace
  numTokens = 0;
  state = "waiting"; // running, done, stopped, failed
  finishReason = null;
  error = null;
  #started = 0;
  #first = 0;
  #last = 0;
  #numFirst = 0; // tokens of the first chunk
  #abort = new AbortController();

  constructor(body) {
    this.body = body;
  }

  get running() {
    return this.state === "running";
  }

  /** Milliseconds to the first token; null before it. */
  get timeToFirst() {
    return this.#first ? this.#first - this.#started : null;
  }

  /** Tokens per second after the first chunk; null before the second. */
  get tokensPerSecond() {
    const seconds = (this.#last - this.#first) / 1000;
    return seconds > 0 ? (this.numTokens - this.#numFirst) / seconds : null;
  }

  /** changed(): called after every change. */
  async start(api, changed) {
    this.state = "running";
    this.#started = performance.now();
    const options = { include_usage: true, continuous_usage_stats: true };
    const body = { ...this.body, stream: true, stream_options: options };
    try {
      for await (const chunk of api.chat(body, this.#abort.signal)) {
        this.#take(chunk);
        changed();
      }
      this.state = "done";
    } catch (error) {
      this.state = this.#abort.signal.aborted ? "stopped" : "failed";
      this.error = this.state === "failed" ? error.message : null;
    }
    changed();
  }

  stop() {
    this.#abort.abort();
  }

  #take({ choices: [choice], usage }) {
    if (usage && usage.completion_tokens > this.numTokens) {
      this.#last = performance.now();
      this.numTokens = usage.completion_tokens;
      if (!this.#first) [this.#first, this.#numFirst] = [this.#last, this.numTokens];
    }
    if (!choice) return;
    this.text += choice.delta.content ?? "";
    this.reasoning += choice.delta.reasoning_content ?? "";
    this.trace.push(...(choice.alignment ?? []));
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }
}
