"""docs/fields.md lists which fields work on which endpoint. This test sends each field to the server.

WRITE_DOCS=1 pytest tests/server/test_field_table.py writes the file.
"""

import os
from pathlib import Path

import httpx
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponsesParams

from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.protocol.completions import CompletionRequest
from linalign.server.protocol.messages import MessagesRequest
from linalign.server.protocol.responses import ResponsesRequest
from tests.server.test_fields import WEATHER

pytestmark = pytest.mark.slow
FILE = Path(__file__).parent.parent.parent / "docs" / "fields.md"
CHAT = [{"role": "user", "content": "Say yes."}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", **WEATHER["function"]}
ANTHROPIC_TOOL = {"name": "get_sunshine", "input_schema": WEATHER["function"]["parameters"]}
# A value with an effect for each field, and the other fields that the value needs (NEEDS).
VALUES = {
    "add_generation_prompt": False,
    "access_programs": {"cyber": "standard"},
    "alignment_method": "cfg",
    "alignment_ratio": 1.5,
    "alignment_temperature": 0.7,
    "alignment_top_p": 0.9,
    "alignment_trace": True,
    "audio": {"voice": "alloy", "format": "wav"},
    "cache_control": {"type": "ephemeral"},
    "container": "c_1",
    "background": True,
    "background_options": {"a": 1},
    "best_of": 2,
    "cache_salt": "a",
    "chat_template_kwargs": {"enable_thinking": True},
    "context_management": [{"type": "compaction"}],
    "continue_final_message": True,
    "conversation": "conv_1",
    "echo": True,
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "inference_geo": "eu",
    "ignore_eos": True,
    "image": {"context_compression": "enabled"},
    "include": ["message.output_text.logprobs"],
    "input": "Say yes.",
    "instructions": "Be brief.",
    "logit_bias": {"5": 1},
    "logprobs": {"chat": True, "text": 2},
    "max_completion_tokens": 2,
    "max_output_tokens": 2,
    "max_tokens": 2,
    "max_tool_calls": 1,
    "mcp_servers": [{"type": "url", "url": "http://127.0.0.1", "name": "a"}],
    "messages": CHAT,
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "min_tokens": 1,
    "modalities": ["text", "audio"],
    "model": "smollm2",
    "moderation": {"model": "omni"},
    "n": 2,
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "yes"},
    "presence_penalty": 0.5,
    "previous_response_id": "resp_1",
    "principle": "Be kind.",
    "principle_placement": "user",
    "prompt": {"text": "Say yes.", "responses": {"id": "pmpt_1"}},
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "high"},
    "reasoning_effort": "high",
    "repetition_penalty": 1.2,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    "safety_identifier": "a",
    "seed": 1,
    "service_tier": "priority",
    "speed": "fast",
    "stop": ["x"],
    "stop_sequences": ["x"],
    "stop_token_ids": [5],
    "store": True,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "structured_outputs": {"choice": ["yes", "no"]},
    "suffix": "end",
    "system": "Be brief.",
    "temperature": 0.5,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "thinking_token_budget": 100,
    "tool_choice": {"chat": "required", "responses": "required", "messages": {"type": "any"}},
    "tools": {"chat": [WEATHER], "responses": [TOOL], "messages": [ANTHROPIC_TOOL]},
    "top_k": 5,
    "top_logprobs": 2,
    "top_p": 0.5,
    "truncation": "auto",
    "user": "a",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}
UNFINISHED = [*CHAT, {"role": "assistant", "content": "Yes,"}]
NEEDS = {
    "add_generation_prompt": {"messages": UNFINISHED, "continue_final_message": True},
    "continue_final_message": {"messages": UNFINISHED},
    "stream_options": {"stream": True},
    "principle_placement": {"principle": "Be kind."},
    "alignment_method": {"principle": "Be kind."},
    "alignment_ratio": {"principle": "Be kind."},
    "alignment_top_p": {"principle": "Be kind."},
    "alignment_temperature": {"principle": "Be kind."},
}
NEEDS_OF = {
    "chat": {
        "top_logprobs": {"logprobs": True},
        "tool_choice": {"tools": [WEATHER]},
        "function_call": {"functions": [WEATHER["function"]]},
    },
    "text": {},
    "responses": {"tool_choice": {"tools": [TOOL]}},
    "messages": {"tool_choice": {"tools": [ANTHROPIC_TOOL]}},
}
NOTES = {
    "min_tokens": "a stop string that starts within these tokens and ends after them stops the reply",
    "stop_token_ids": "at most 1,024",
    "add_generation_prompt": "the opposite of `continue_final_message`",
    "chat_template_kwargs": "variables of the model's chat template; the embedded model's has none",
    "reasoning_effort": "works with chat templates that use it, or `enable_thinking`, and with `--thinking-budgets`",
    "reasoning": "`effort` works like `reasoning_effort`; `summary` is ignored",
    "thinking": "works with models that reason; the embedded model does not",
    "thinking_token_budget": "works with models that reason; the embedded model does not",
    "output_config": "`effort` works like `reasoning_effort`",
    "metadata": "`/v1/responses` returns it",
    "store": "nothing is stored, except by `/v1/responses` with `--responses-store`",
    "previous_response_id": "works with `--responses-store`",
    "stream_options": "`include_obfuscation` is ignored",
    "include": "other values than `message.output_text.logprobs` are ignored",
    "tools": "functions; tools of other types are ignored",
    "function_call": "OpenAI's earlier form of `tool_choice`; the reply has this form, too",
    "functions": "OpenAI's earlier form of `tools`",
    "max_tokens": "shortened to what the context leaves; −1: no limit",
    "max_completion_tokens": "like `max_tokens`",
    "max_output_tokens": "like `max_tokens`",
    "model": "by default the model itself; NAME, NAME:PRESET, NAME@RATIO or NAME:PRESET@RATIO",
    "best_of": "only 1",
    "suffix": "only an empty text",
}
ENDPOINTS = {
    "chat": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}, ChatParams, ChatCompletionRequest),
    "text": ("/v1/completions", {"prompt": "Say yes.", "max_tokens": 2}, TextParams, CompletionRequest),
    "responses": ("/v1/responses", {"input": "Say yes.", "max_output_tokens": 2}, ResponsesParams, ResponsesRequest),
    "messages": ("/v1/messages", {"messages": CHAT, "max_tokens": 2}, None, MessagesRequest),
}
# Fields of Anthropic's SDK 2.14.
ANTHROPIC = {
    "cache_control",
    "container",
    "inference_geo",
    "max_tokens",
    "mcp_servers",
    "messages",
    "metadata",
    "model",
}
ANTHROPIC |= {"output_config", "service_tier", "speed", "stop_sequences", "stream", "system", "thinking", "tool_choice"}
ANTHROPIC |= {"tools", "context_management"}


INTRODUCTION = """
All fields of OpenAI's and Anthropic's SDKs and of linalign, and what the server does with a value that asks for
something:

- **works**: the field has its effect.
- **ignored**: the field has no effect, because it is a hint or the client's own bookkeeping. The response header
  `X-Linalign-Ignored` names it, and so does the debug log. With `--strict-fields` it is a 400, except `user` and
  `metadata`.
- **400**: the field would change the reply, and the server does not support it. The error names the field.

Every optional field may be null. A field that is ignored or a 400 may have a value that asks for nothing, such as false
or []. A field that is in none of these columns is ignored in the same way, unless it looks like a misspelling of one of
them: then it is a 400 that names the nearest one. Fields of other servers that would change the reply, such as
`guided_json`, are a 400, too.
`tests/server/test_field_table.py` writes this page.
"""


def outcome(url, endpoint, name):
    path, base, _, _ = ENDPOINTS[endpoint]
    value = VALUES[name]
    if isinstance(value, dict) and endpoint in value:
        value = value[endpoint]
    needs = NEEDS.get(name, {}) | NEEDS_OF[endpoint].get(name, {})
    if name == "max_completion_tokens":
        base = {"messages": CHAT}
    response = httpx.post(url + path, json={"model": "smollm2", **base, **needs, name: value}, timeout=120)
    if response.status_code == 200:
        ignored = response.headers.get("X-Linalign-Ignored", "").split(", ")
        return "ignored" if any(path.split(".")[0] == name for path in ignored) else "works"
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert name in f"{error['param']} {error['message']}", error
    return "400"


def table(url):
    known = {
        endpoint: {*(params.__annotations__ if params else ANTHROPIC), *request.model_fields, *request.unsupported()}
        for endpoint, (_, _, params, request) in ENDPOINTS.items()
    }
    lines = [
        "# Fields",
        "",
        *INTRODUCTION.strip().splitlines(),
        "",
        "| field | `/v1/chat/completions` | `/v1/completions` | `/v1/responses` | `/v1/messages` | |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(set().union(*known.values())):
        cells = [outcome(url, endpoint, name) if name in fields else "" for endpoint, fields in known.items()]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {NOTES.get(name, '')} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_fields_is_correct(url):
    found = table(url)
    if os.environ.get("WRITE_DOCS"):
        FILE.write_text(found)
    assert FILE.read_text() == found
