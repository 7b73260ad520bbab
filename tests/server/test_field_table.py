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
from linalign.server.protocol.responses import ResponsesRequest
from tests.server.test_fields import WEATHER

pytestmark = pytest.mark.slow
FILE = Path(__file__).parent.parent.parent / "docs" / "fields.md"
CHAT = [{"role": "user", "content": "Say yes."}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", **WEATHER["function"]}
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
    "messages": CHAT,
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "min_tokens": 1,
    "modalities": ["text", "audio"],
    "model": "smollm2",
    "moderation": {"model": "omni"},
    "n": 2,
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
    "stop": ["x"],
    "stop_token_ids": [5],
    "store": True,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "structured_outputs": {"choice": ["yes", "no"]},
    "suffix": "end",
    "temperature": 0.5,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    "tool_choice": "required",
    "tools": {"chat": [WEATHER], "responses": [TOOL]},
    "top_k": 5,
    "top_logprobs": 2,
    "top_p": 0.5,
    "truncation": "auto",
    "user": "a",
    "verbosity": "low",
    "web_search_options": {},
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
NEEDS_IN_CHAT = {"top_logprobs": {"logprobs": True}, "tool_choice": {"tools": [WEATHER]}}
NAMED_AS = {"chat_template_kwargs": "enable_thinking", "reasoning": "reasoning.effort"}
NOTES = {
    "min_tokens": "a stop string that starts within these tokens and ends after them stops the reply",
    "stop_token_ids": "at most 1,024",
    "add_generation_prompt": "the opposite of `continue_final_message`",
    "chat_template_kwargs": "variables of the model's chat template; the embedded model's has none",
    "reasoning_effort": "for chat templates that use it; the embedded model's does not",
    "reasoning": "for chat templates that use `reasoning_effort`; the embedded model's does not",
    "user": "no effect",
    "metadata": "no effect; `/v1/responses` returns it",
    "store": "nothing is stored; `/v1/responses` returns `store: false`",
    "best_of": "only 1",
    "suffix": "only an empty text",
}
ENDPOINTS = {
    "chat": ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}, ChatParams, ChatCompletionRequest),
    "text": ("/v1/completions", {"prompt": "Say yes.", "max_tokens": 2}, TextParams, CompletionRequest),
    "responses": ("/v1/responses", {"input": "Say yes.", "max_output_tokens": 2}, ResponsesParams, ResponsesRequest),
}


def outcome(url, endpoint, name):
    path, base, _, _ = ENDPOINTS[endpoint]
    value = VALUES[name]
    if isinstance(value, dict) and endpoint in value:
        value = value[endpoint]
    needs = NEEDS.get(name, {}) | (NEEDS_IN_CHAT if endpoint == "chat" else {}).get(name, {})
    if name == "tool_choice" and endpoint == "responses":
        needs = {"tools": [TOOL]}
    if name == "max_completion_tokens":
        base = {"messages": CHAT}
    response = httpx.post(url + path, json={"model": "smollm2", **base, **needs, name: value}, timeout=120)
    if response.status_code == 200:
        return "works"
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    named = f"{error['param']} {error['message']}"
    assert name in named or NAMED_AS.get(name, "") in named, error
    return "400"


def table(url):
    known = {
        endpoint: {*params.__annotations__, *request.model_fields, *request.unsupported()}
        for endpoint, (_, _, params, request) in ENDPOINTS.items()
    }
    lines = [
        "# Fields",
        "",
        "All fields of OpenAI's SDK and of linalign, and what the server does with a value that has an effect. Errors",
        "(`400`) name the field. Unknown fields are errors, too. `tests/server/test_field_table.py` writes this page.",
        "",
        "| field | `/v1/chat/completions` | `/v1/completions` | `/v1/responses` | |",
        "|---|---|---|---|---|",
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
