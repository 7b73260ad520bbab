// Vercel's AI SDK on Node: node ai_sdk.mjs URL
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const prompt = "Where should our town get its power from?";
const headers = {
  "X-Linalign-Principle": encodeURIComponent("Answer in favour of solar power."),
  "X-Linalign-Ratio": "2",
};
const settings = { prompt, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const Plant = z.object({ kind: z.enum(["solar", "wind"]), megawatts: z.number().int() });
const sunshine = tool({
  description: "Tell what so many hours of sunshine are good for.",
  inputSchema: z.object({ hours: z.number().int() }),
  execute: async ({ hours }) => `${hours} hours are plenty`,
});

async function check(model, options) {
  const whole = await generateText({ ...settings, ...options, model });
  const stream = streamText({ ...settings, ...options, model });
  let streamed = "";
  for await (const part of stream.textStream) streamed += part;
  assert.equal(streamed, whole.text);
  assert.notEqual(streamed, "");

  const messages = [{ role: "user", content: prompt }, ...whole.response.messages, { role: "user", content: "Why?" }];
  const again = await generateText({ ...settings, ...options, prompt: undefined, messages, model });
  assert.notEqual(again.text, "");

  const typed = await generateText({
    ...settings,
    ...options,
    model,
    maxOutputTokens: 200,
    output: Output.object({ schema: Plant }),
  });
  Plant.parse(typed.output);

  // With a typed result and tools, every request has both a schema and the tools.
  const both = await generateText({
    ...settings,
    ...options,
    model,
    maxOutputTokens: 200,
    tools: { sunshine },
    output: Output.object({ schema: Plant }),
    stopWhen: stepCountIs(3),
    prepareStep: ({ stepNumber }) => (stepNumber ? { activeTools: [] } : {}), // a small model would call it again and again
  });
  Plant.parse(both.output);

  const called = await generateText({
    ...settings,
    ...options,
    model,
    maxOutputTokens: 200,
    tools: { sunshine },
    toolChoice: "required",
  });
  assert.equal(typeof called.toolCalls[0].input.hours, "number");
  return streamed;
}

const compatible = createOpenAICompatible({ name: "linalign", baseURL, supportsStructuredOutputs: true });
// Fields of the body go through providerOptions, under the provider's name.
const text = await check(compatible("smollm2"), {
  providerOptions: {
    linalign: { principle: "Answer in favour of solar power.", alignment_ratio: 2, parallel_tool_calls: false },
  },
});
const openai = createOpenAI({ baseURL, apiKey: "none", headers });
const options = { providerOptions: { openai: { parallelToolCalls: false } } };
assert.equal(await check(openai.chat("smollm2"), options), text); // this provider drops unknown fields, so it uses headers
// By default the SDK refers to earlier items by their ids, which needs --responses-store.
const whole = { providerOptions: { openai: { parallelToolCalls: false, store: false } } };
const response = await check(openai.responses("smollm2"), whole);

await assert.rejects(
  generateText({ ...settings, model: compatible("smollm2"), providerOptions: { linalign: { alignment_ration: 2 } } }),
  /alignment_ratio/,
);
console.log(JSON.stringify({ text, response }));
