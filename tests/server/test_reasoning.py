"""Models that reason: budgets, effort, structures and calls behind the reasoning, on every endpoint that has them.

The model is random, so its reasoning goes on until a budget ends it.
"""

import copy
import json

import httpx
import jsonschema
import pytest

from linalign.server.settings_loading import load_settings
from tests.engines import tiny_pair
from tests.server.test_fields import WEATHER
from tests.serving import serving

pytestmark = pytest.mark.slow

HEAD = """{% if tools %}<|im_start|>system
{{ tools | tojson }} <tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
"""
TEMPLATES = {
    # As in Qwen3: the model begins its reasoning itself, unless enable_thinking is false.
    "itself": HEAD
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # As in Qwen3-Thinking and DeepSeek-R1: the template begins the reasoning.
    "begun": HEAD + "<think>\n{% endif %}",
}
CHAT = [{"role": "user", "content": "How do I get to work?"}]
FIELDS = {"messages": CHAT, "temperature": 0, "max_tokens": 80}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ALIGNED = {"principle": "Encourage cycling.", "alignment_ratio": 2}
TOOL = {"type": "function", **WEATHER["function"]}
SETTINGS = ("--thinking-budgets", "low=3,high=12", "--responses-store", "9")


@pytest.fixture(scope="module")
def serve(tokenizer, tmp_path_factory):
    loaded, _ = tiny_pair(tokenizer, kernels=False, max_position_embeddings=1024)

    def directory(name):
        path = tmp_path_factory.mktemp(name) / "thinker"
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = TEMPLATES[name]
        loaded.model.save_pretrained(path)
        changed.save_pretrained(path)
        return str(path)

    return lambda name: serving(directory(name), *SETTINGS)


@pytest.fixture(scope="module")
def begun(serve):
    with serve("begun") as (url, _):
        yield url


@pytest.fixture(scope="module")
def itself(serve):
    with serve("itself") as (url, _):
        yield url


def post(url, path="/v1/chat/completions", **fields):
    response = httpx.post(url + path, json={**FIELDS, **fields}, timeout=120)
    assert response.status_code == 200, response.text
    return response


def choice(url, **fields):
    (choice,) = post(url, **fields).json()["choices"]
    return choice


def num_thinking_tokens(url, choice):
    """Tokens in front of the mark that ends the reasoning. The choice has log-probabilities."""
    num_mark = httpx.post(url + "/tokenize", json={"prompt": "</think>"}, timeout=60).json()["count"]
    text = ""
    for number, token in enumerate(choice["logprobs"]["content"], 1):
        text += token["token"]
        if "</think>" in text:
            return number - num_mark
    raise AssertionError("the reasoning has no end")


def streamed(url, **fields):
    """The message and the finish reason of a stream."""
    message, calls, reason = {}, {}, None
    for line in post(url, stream=True, **fields).text.split("\n\n"):
        if line.startswith("data: {"):
            (one,) = json.loads(line[6:])["choices"]
            reason = one["finish_reason"] or reason
            for name in ("content", "reasoning_content", "reasoning"):
                if name in one["delta"]:
                    message[name] = message.get(name, "") + one["delta"][name]
            for call in one["delta"].get("tool_calls", ()):
                calls.setdefault(call["index"], []).append(call["function"])
    joined = [(parts[0]["name"], "".join(part["arguments"] for part in parts)) for parts in calls.values()]
    return message, joined, reason


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_a_budget_ends_the_reasoning(begun, extra):
    for budget in (0, 1, 7):
        reply = choice(begun, thinking_token_budget=budget, logprobs=True, **extra)
        assert num_thinking_tokens(begun, reply) == budget
        message = reply["message"]
        thoughts = message.get("reasoning_content") or ""
        assert message["content"]
        assert message.get("reasoning") == message.get("reasoning_content")
    longer = choice(begun, thinking_token_budget=20, **extra)["message"]
    assert longer["reasoning_content"].startswith(thoughts.rstrip())
    free = choice(begun, **extra)["message"]
    assert (free["content"] or "", free["reasoning_content"].startswith(thoughts.rstrip())) == ("", True)


def test_an_effort_has_the_budget_of_the_settings(begun):
    low, high = (choice(begun, reasoning_effort=effort)["message"] for effort in ("low", "high"))
    for message, budget in ((low, 3), (high, 12)):
        assert message == choice(begun, thinking_token_budget=budget)["message"]
    assert choice(begun, reasoning_effort="medium")["message"]["content"] in (None, "")
    assert choice(begun, reasoning_effort="low", thinking_token_budget=12)["message"] == high


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_a_structure_holds_behind_the_reasoning(begun, extra):
    fields = {"response_format": FORMAT, "thinking_token_budget": 5, **extra}
    whole = choice(begun, **fields)
    assert whole["finish_reason"] == "stop"
    assert whole["message"]["reasoning_content"]
    jsonschema.validate(json.loads(whole["message"]["content"]), SCHEMA)
    message, calls, reason = streamed(begun, **fields)
    assert (message["content"], calls, reason) == (whole["message"]["content"], [], "stop")
    assert message["reasoning"] == message["reasoning_content"] == whole["message"]["reasoning_content"]


@pytest.mark.parametrize(
    "fields", [{"tool_choice": "required"}, {"response_format": FORMAT}], ids=["required", "format"]
)
def test_calls_come_behind_the_reasoning(begun, fields):
    fields = {"tools": [WEATHER], "parallel_tool_calls": False, "thinking_token_budget": 5, **fields}
    whole = choice(begun, **fields)
    message, calls, reason = streamed(begun, **fields)
    assert whole["message"]["reasoning_content"] == message["reasoning_content"] != ""
    assert reason == whole["finish_reason"]
    if reason == "tool_calls":
        ((name, arguments),) = calls
        assert name == WEATHER["function"]["name"]
        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
        assert whole["message"]["tool_calls"][0]["function"] == {"name": name, "arguments": arguments}
    else:
        assert "tool_choice" not in fields
        jsonschema.validate(json.loads(whole["message"]["content"]), SCHEMA)
        assert message["content"] == whole["message"]["content"]


def test_other_endpoints_have_the_same_budget(begun):
    expected = choice(begun, thinking_token_budget=5)["message"]
    fields = {"input": CHAT, "max_output_tokens": 80, "messages": None, "max_tokens": None}
    found = post(begun, "/v1/responses", thinking_token_budget=5, **fields).json()
    thoughts, text = found["output"]
    assert thoughts["content"][0]["text"] == expected["reasoning_content"]
    assert text["content"][0]["text"] == expected["content"]
    low = post(begun, "/v1/responses", reasoning={"effort": "low"}, **fields).json()
    assert low["output"][-1]["content"][0]["text"] == choice(begun, reasoning_effort="low")["message"]["content"]
    message = post(begun, "/v1/messages", thinking={"type": "enabled", "budget_tokens": 5}).json()
    thoughts, text = message["content"]
    assert thoughts == {"type": "thinking", "thinking": expected["reasoning_content"], "signature": ""}
    assert text == {"type": "text", "text": expected["content"]}
    events = post(begun, "/v1/messages", thinking={"type": "enabled", "budget_tokens": 5}, stream=True).text
    deltas = [json.loads(line[6:])["delta"] for line in events.split("\n") if '"content_block_delta"' in line[6:]]
    assert "".join(delta.get("thinking", "") for delta in deltas) == expected["reasoning_content"]
    assert "".join(delta.get("text", "") for delta in deltas) == expected["content"]
    again = [*CHAT, {"role": "assistant", "content": message["content"]}, *CHAT]
    assert post(begun, "/v1/messages", messages=again, max_tokens=3).status_code == 200


def test_references_to_reasoning(begun):
    """A reference to reasoning alone is no message, as the item itself is none."""
    fields = {"thinking_token_budget": 5, "max_output_tokens": 20, "messages": None, "max_tokens": None}
    output = post(begun, "/v1/responses", input=CHAT, **fields).json()["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in output]
    post(begun, "/v1/responses", input=[*CHAT, *references, *CHAT], **fields)
    body = {**FIELDS, **fields, "input": references[:1]}
    refused = httpx.post(begun + "/v1/responses", json=body, timeout=60)
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "input has no message")


def test_a_model_may_begin_its_reasoning_itself(itself, tokenizer):
    """A bias makes the random model begin its reasoning."""
    (angle,) = tokenizer.encode("<", add_special_tokens=False)
    for budget in (0, 1, 6):
        fields = {
            "thinking_token_budget": budget,
            "logit_bias": {str(angle): 100},
            "structured_outputs": {"regex": "ok"},
        }
        reply = choice(itself, **fields, logprobs=True)
        assert (reply["message"]["content"], reply["finish_reason"]) == ("ok", "stop")
        text, num_begin = "", 0
        while not text.startswith("<think>"):
            text, num_begin = text + reply["logprobs"]["content"][num_begin]["token"], num_begin + 1
        assert num_thinking_tokens(itself, reply) == num_begin + budget
        message, _, _ = streamed(itself, **fields)
        assert message.get("reasoning_content", "") == reply["message"].get("reasoning_content", "")
    jsonschema.validate(json.loads(choice(itself, response_format=FORMAT)["message"]["content"]), SCHEMA)
    call = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200, "thinking_token_budget": 3}
    assert choice(itself, **call)["message"]["tool_calls"]


def test_reasoning_can_be_switched_off(itself):
    for fields in (
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        response = post(itself, response_format=FORMAT, thinking_token_budget=0, **fields)
        assert "X-Linalign-Ignored" not in response.headers
        message = response.json()["choices"][0]["message"]
        jsonschema.validate(json.loads(message["content"]), SCHEMA)
        assert "reasoning_content" not in message
    counts = {
        json.dumps(fields): post(itself, max_tokens=1, **fields).json()["usage"]["prompt_tokens"]
        for fields in ({}, {"reasoning_effort": "low"}, {"reasoning_effort": "none"})
    }
    on, low, off = counts.values()
    assert on == low < off  # the template has closed the reasoning
    by_anthropics = post(itself, "/v1/messages", thinking={"type": "disabled"}, max_tokens=1).json()["usage"]
    assert by_anthropics["input_tokens"] + by_anthropics["cache_read_input_tokens"] == off


def test_a_model_without_reasoning_ignores_a_budget(url):
    response = post(url, thinking_token_budget=5, max_tokens=3)
    assert response.headers["X-Linalign-Ignored"] == "thinking_token_budget"
    response = post(url, "/v1/messages", thinking={"type": "enabled", "budget_tokens": 5}, max_tokens=3)
    assert response.headers["X-Linalign-Ignored"] == "thinking, thinking.budget_tokens"
    assert "X-Linalign-Ignored" not in post(url, thinking_token_budget=0, max_tokens=3).headers


def test_budgets_of_the_settings():
    assert load_settings(["--thinking-budgets", "low=512, high=2048"]).thinking_budgets == {"low": 512, "high": 2048}
    for wrong in ("low", "low=-1", "low=x"):
        with pytest.raises(ValueError, match="thinking_budgets"):
            load_settings(["--thinking-budgets", wrong])
