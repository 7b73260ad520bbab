// Creates request bodies from the form's settings, and code examples from bodies.

const OPENAI_FIELDS = ["model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream"];

/** The body of a chat completion. settings.principles: [{text, weight}]; ratio: null for no principle. */
export function chatBody(model, settings, messages, ratio) {
  const { temperature, topP, maxTokens, seed, method, mass } = settings;
  const body = { model, messages, temperature, top_p: topP, max_tokens: maxTokens };
  if (seed !== null) body.seed = seed;
  const principles = settings.principles.filter((principle) => principle.text.trim());
  if (ratio === null || !principles.length) return body;
  const isPlain = principles.length === 1 && principles[0].ratio === undefined;
  body.principle = isPlain ? principles[0].text : principles;
  body.alignment_ratio = ratio;
  if (ratio !== 0 && method !== "linear") body.alignment_method = method;
  if (ratio !== 0 && mass !== null) body.alignment_top_p = mass;
  return body;
}

/** The same body, with a trace of the policies. */
export function traced(body) {
  return { ...body, alignment_trace: true, logprobs: true, top_logprobs: 5 };
}

export function asCurl(body, url, needsKey) {
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $LINALIGN_API_KEY"` : "";
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${url}/v1/chat/completions -H "Content-Type: application/json"${key} -d '${data}'\n`;
}

export function asPython(body, url, needsKey) {
  const entries = Object.entries(body);
  const known = entries.filter(([name]) => OPENAI_FIELDS.includes(name));
  const ours = Object.fromEntries(entries.filter(([name]) => !OPENAI_FIELDS.includes(name)));
  const args = known.map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  const extra = Object.keys(ours).length ? `    extra_body=${literal(ours)},\n` : "";
  const key = needsKey ? 'os.environ["LINALIGN_API_KEY"]' : '"none"';
  return `${needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(url + "/v1")}, api_key=${key})
reply = client.chat.completions.create(
${args}${extra})
print(reply.choices[0].message.content)
`;
}

function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value).map(([name, inner]) => `${literal(name)}: ${literal(inner)}`);
  return `{${entries.join(", ")}}`;
}
