// OpenAI's own package on Node: node sdk.mjs URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asked = {
  model: "smollm2",
  messages: [{ role: "user", content: "Where should our town get its power from?" }],
  temperature: 0,
  max_tokens: 24,
  principle: "Answer in favour of solar power.",
  alignment_ratio: 2,
};

const whole = await client.chat.completions.create(asked);
assert.equal(whole.usage.alignment_details.branches, 2);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
}
assert.equal(streamed, whole.choices[0].message.content);

const response = await client.responses.create({
  model: "smollm2:teacher",
  input: "What is a volcano?",
  max_output_tokens: 12,
});
assert.equal(response.usage.alignment_details.branches, 2);
assert.ok(response.output_text);

await assert.rejects(client.chat.completions.create({ ...asked, alignment_ration: 2 }), /alignment_ratio/);
const models = await client.models.list();
assert.ok(models.data.some((model) => model.id === "smollm2:teacher"));
console.log(JSON.stringify({ text: streamed }));
