// LangChain for JavaScript over chat completions and over responses: node run.mjs URL
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";

process.env.LANGSMITH_TRACING = "false";
const baseURL = process.argv[2];
const question = "Where should our town get its power from?";
const aligned = { principle: "Answer in favour of solar power.", alignment_ratio: 2 };
const Plant = z.object({ kind: z.enum(["solar", "wind"]), megawatts: z.number().int() });
const sunshine = tool(({ hours }) => `${hours} hours are plenty`, {
  name: "sunshine",
  description: "Tell what so many hours of sunshine are good for.",
  schema: z.object({ hours: z.number().int() }),
});

function chat({ maxTokens = 24, modelKwargs = aligned, headers, ...more } = {}) {
  const configuration = { baseURL, defaultHeaders: headers };
  const settings = { model: "smollm2", apiKey: "none", temperature: 0, maxRetries: 0, timeout: 120_000 };
  return new ChatOpenAI({ ...settings, maxTokens, modelKwargs, configuration, ...more });
}

async function check(useResponsesApi) {
  const { text } = await chat({ useResponsesApi }).invoke(question);
  let streamed = "";
  for await (const chunk of await chat({ useResponsesApi }).stream(question)) streamed += chunk.text;
  assert.equal(streamed, text);
  const plain = await chat({ useResponsesApi, modelKwargs: {} }).invoke(question);
  assert.notEqual(plain.text, text);
  const headers = {
    "X-Linalign-Principle": encodeURIComponent(aligned.principle),
    "X-Linalign-Ratio": String(aligned.alignment_ratio),
  };
  assert.equal((await chat({ useResponsesApi, modelKwargs: {}, headers }).invoke(question)).text, text);
  const preset = await chat({ useResponsesApi, modelKwargs: {}, model: "smollm2:teacher" }).invoke(question);
  assert.notEqual(preset.text, text);
  assert.notEqual(preset.text, plain.text);

  const model = chat({ useResponsesApi, maxTokens: 200 });
  for (const options of [{}, { strict: true }]) {
    // With responses, this client drops the choice "required".
    const choice = { ...options, tool_choice: useResponsesApi ? "sunshine" : "required", parallel_tool_calls: false };
    const called = await model.bindTools([sunshine], choice).invoke(question);
    const [call] = called.tool_calls;
    assert.equal(typeof call.args.hours, "number");
    const result = await sunshine.invoke(call);
    assert(result instanceof ToolMessage);
    const short = chat({ useResponsesApi }).bindTools([sunshine], options);
    const last = await short.invoke([new HumanMessage(question), called, result]);
    assert(last.text || last.tool_calls.length);
  }
  let pieces;
  const calls = model.bindTools([sunshine], { tool_choice: "sunshine", parallel_tool_calls: false });
  for await (const chunk of await calls.stream(question)) pieces = pieces ? pieces.concat(chunk) : chunk;
  assert.equal(typeof pieces.tool_calls[0].args.hours, "number");

  for (const method of ["jsonSchema", "functionCalling"]) {
    Plant.parse(await model.withStructuredOutput(Plant, { method, strict: true }).invoke(question));
  }
  // Every request has both a schema and the tools.
  const both = model.withStructuredOutput(Plant, { method: "jsonSchema", tools: [sunshine], includeRaw: true });
  const { parsed, raw } = await both.invoke(question);
  if (raw.tool_calls.length) assert.equal(raw.tool_calls[0].name, "sunshine");
  else Plant.parse(parsed);

  const wrong = chat({ useResponsesApi, modelKwargs: { alignment_ration: 2 } });
  await assert.rejects(wrong.invoke(question), /alignment_ratio\b/);
  return text;
}

const text = await check(false);
await check(true);
const { version } = JSON.parse(readFileSync(new URL("node_modules/@langchain/openai/package.json", import.meta.url)));
console.log(JSON.stringify({ version, messages: [{ role: "user", content: question }], text }));
