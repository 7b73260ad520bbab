"""LiteLLM's proxy in front of linalign, with chat completions, responses and messages: python run.py URL"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from openai import BadRequestError, OpenAI

QUESTION = "Where should our town get its power from?"
MESSAGES = [{"role": "user", "content": QUESTION}]
ALIGNED = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2}
HEADERS = {"X-Linalign-Principle": "Answer%20in%20favour%20of%20solar%20power.", "X-Linalign-Ratio": "2"}
PLAIN = {"model": "smollm2", "temperature": 0}
NAMES = ("smollm2", "smollm2:teacher")
KEY = f"sk-{secrets.token_hex(24)}"  # the proxy does not start without a long one
OFFLINE = ("MODEL_COST_MAP", "ANTHROPIC_BETA_HEADERS", "BLOG_POSTS", "POLICY_TEMPLATES", "AUTOROUTER_PRESETS")
HOURS = {"type": "object", "properties": {"hours": {"type": "integer"}}, "required": ["hours"]}
SUNSHINE = {"name": "sunshine", "description": "Tell what so many hours of sunshine are good for."}
RESULT = "10 hours are plenty"
PLANT = {"type": "object", "properties": {"megawatts": {"type": "integer"}}, "required": ["megawatts"]}
SCHEMA = {"name": "plant", "schema": {**PLANT, "additionalProperties": False}, "strict": True}


def start(folder, port):
    server = {"api_base": sys.argv[1], "api_key": "none", "max_retries": 0}
    models = [{"model_name": name, "litellm_params": {"model": f"openai/{name}", **server}} for name in NAMES]
    models.append({"model_name": "solar", "litellm_params": {**models[0]["litellm_params"], "extra_body": ALIGNED}})
    general = {"forward_client_headers_to_llm_api": True}
    config = {"model_list": models, "general_settings": general, "litellm_settings": {"num_retries": 0}}
    (folder / "config.yaml").write_text(json.dumps(config))
    environment = {**os.environ, "LITELLM_MASTER_KEY": KEY, **{f"LITELLM_LOCAL_{name}": "True" for name in OFFLINE}}
    command = [Path(sys.executable).with_name("litellm"), "--config", "config.yaml", "--telemetry", "False"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=folder)


def wait(proxy, url):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and proxy.poll() is None:
        try:
            return httpx.get(f"{url}/health/liveliness", timeout=5).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError("the proxy did not start")


def failure(create, **fields):
    try:
        return f"no error: {create(**fields)}"
    except (BadRequestError, httpx.HTTPStatusError) as error:
        return error.response.text


def alignment(create, text):
    aligned = text(create(extra_headers=HEADERS))
    assert text(create()) != aligned == text(create(model="solar"))
    assert "the ratio must be a number" in failure(create, extra_headers={**HEADERS, "X-Linalign-Ratio": "much"})
    return aligned


def chat(client):
    def create(**more):
        return client.chat.completions.create(**{**PLAIN, "messages": MESSAGES, "max_tokens": 24, **more})

    text = alignment(create, lambda reply: reply.choices[0].message.content)
    assert create(model="smollm2:teacher").choices[0].message.content != text
    stream = create(extra_body=ALIGNED, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text
    tools = {"extra_body": ALIGNED, "tools": [{"type": "function", "function": {**SUNSHINE, "parameters": HOURS}}]}
    called = create(**tools, tool_choice="required", parallel_tool_calls=False, max_tokens=100).choices[0].message
    (call,) = called.tool_calls
    assert type(json.loads(call.function.arguments)["hours"]) is int
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    assert create(**tools, messages=[*MESSAGES, called, result]).choices
    schema = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}, "max_tokens": 200}
    assert json.loads(create(extra_body=ALIGNED, **schema).choices[0].message.content).keys() == {"megawatts"}
    both = create(**tools, **schema, parallel_tool_calls=False).choices[0].message
    assert both.tool_calls or json.loads(both.content).keys() == {"megawatts"}
    assert "did you mean alignment_ratio?" in failure(create, extra_body={"alignment_ration": 2})
    return text


def responses(client):
    def create(**more):
        return client.responses.create(**{**PLAIN, "input": MESSAGES, "max_output_tokens": 24, **more})

    text = alignment(create, lambda reply: reply.output_text)
    aligned = {"extra_headers": HEADERS}  # on this route the proxy drops fields that it does not know
    stream = create(**aligned, stream=True)
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == text
    tools = {**aligned, "tools": [{"type": "function", **SUNSHINE, "parameters": HOURS, "strict": False}]}
    called = create(**tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=100)
    (call,) = called.output
    assert type(json.loads(call.arguments)["hours"]) is int
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    assert create(**tools, input=[*MESSAGES, call, result]).output
    schema = {"text": {"format": {"type": "json_schema", **SCHEMA}}, "max_output_tokens": 200}
    assert json.loads(create(**aligned, **schema).output_text).keys() == {"megawatts"}
    both = create(**tools, **schema, parallel_tool_calls=False)
    assert both.output[0].type == "function_call" or json.loads(both.output_text).keys() == {"megawatts"}
    return text


def messages(url):
    def create(extra_headers=None, **more):
        fields = {**PLAIN, "messages": MESSAGES, "max_tokens": 24, **more}
        headers = {"x-api-key": KEY, **(extra_headers or {})}
        reply = httpx.post(f"{url}/v1/messages", json=fields, headers=headers, timeout=120).raise_for_status()
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        return list(map(json.loads, lines)) if "stream" in more else reply.json()

    text = alignment(create, lambda reply: reply["content"][0]["text"])
    events = create(extra_headers=HEADERS, stream=True)
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == text
    tools = {"extra_headers": HEADERS, "tools": [{**SUNSHINE, "input_schema": HOURS}]}
    called = create(**tools, tool_choice={"type": "tool", "name": "sunshine"}, max_tokens=100)
    (call,) = called["content"]
    assert (called["stop_reason"], type(call["input"]["hours"])) == ("tool_use", int)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": RESULT}]}
    assert create(**tools, messages=[*MESSAGES, {"role": "assistant", "content": [call]}, result])["content"]
    return text


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the proxy ends, too
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
with TemporaryDirectory() as folder:
    proxy = start(Path(folder), port)
    try:
        wait(proxy, url)
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
        text = chat(client)
        assert responses(client) == messages(url) == text
    finally:
        proxy.kill()
        proxy.wait()
print(json.dumps({"version": version("litellm"), "messages": MESSAGES, "text": text}))
