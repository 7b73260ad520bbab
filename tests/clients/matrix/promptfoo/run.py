"""promptfoo, as a command: python run.py URL ENVIRONMENT, which has promptfoo's node_modules"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

QUESTION = "Where should our town get its power from?"
MESSAGES = [{"role": "user", "content": QUESTION}]
FIELDS = {"principle": "Answer in favour of solar power.", "alignment_ratio": 2, "parallel_tool_calls": False}
ALIGNED = {"passthrough": FIELDS}
HEADERS = {"X-Linalign-Principle": "Answer%20in%20favour%20of%20solar%20power.", "X-Linalign-Ratio": "2"}
OFF = ("DISABLE_TELEMETRY", "DISABLE_UPDATE", "DISABLE_SHARING", "DISABLE_REMOTE_GENERATION")
PLANT = {
    "type": "object",
    "properties": {"kind": {"enum": ["solar", "wind"]}, "megawatts": {"type": "integer"}},
    "required": ["kind", "megawatts"],
    "additionalProperties": False,
}
HOURS = {"type": "object", "properties": {"hours": {"type": "integer"}}, "required": ["hours"]}
SUNSHINE = {"name": "sunshine", "description": "Tell what so many hours of sunshine are good for.", "parameters": HOURS}
CALL = {"id": "call_1", "type": "function", "function": {"name": "sunshine", "arguments": '{"hours": 10}'}}
TURNS = [
    *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "10 hours are plenty"},
]
TOOLS = {"tools": [{"type": "function", "function": SUNSHINE}], "max_tokens": 100}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "plant", "schema": PLANT, "strict": True}}
TYPED = {"response_format": SCHEMA, "max_tokens": 200}
CASES = {
    "plain": {},
    "aligned": ALIGNED,
    "headers": {"headers": HEADERS},
    "teacher": {"model": "smollm2:teacher"},
    "tool": {**ALIGNED, **TOOLS, "tool_choice": {"type": "function", "function": {"name": "sunshine"}}},
    "result": {**ALIGNED, **TOOLS, "prompt": "turns"},
    "typed": {**ALIGNED, **TYPED},
    "both": {**ALIGNED, **TOOLS, **TYPED},
    "wrong": {"passthrough": {"alignment_ration": 2}},
    "responses plain": {"kind": "responses"},
    "responses": {"kind": "responses", **ALIGNED},
    "responses wrong": {"kind": "responses", "passthrough": {"alignment_ration": 2}},
}


def provider(label, kind="chat", model="smollm2", prompt="question", **more):
    config = {"apiBaseUrl": sys.argv[1], "apiKey": "none", "temperature": 0, "max_tokens": 24, "maxRetries": 0, **more}
    if kind == "responses":
        config["max_output_tokens"] = config.pop("max_tokens")
    return {"id": f"openai:{kind}:{model}", "label": label, "prompts": [prompt], "config": config}


def evaluate(folder):
    config = {
        "prompts": [{"label": "question", "raw": QUESTION}, {"label": "turns", "raw": json.dumps(TURNS)}],
        "providers": [provider(label, **case) for label, case in CASES.items()],
        "tests": [{"assert": [{"type": "javascript", "value": "Boolean(output)"}]}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    programs = Path(sys.argv[2]).absolute() / "node_modules/.bin"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PROMPTFOO_CONFIG_DIR": str(folder)}
    environment |= {f"PROMPTFOO_{name}": "1" for name in OFF} | {"REQUEST_TIMEOUT_MS": "120000"}
    environment["HTTPS_PROXY"] = "http://127.0.0.1:9"  # nothing is there: it reports even that telemetry is disabled
    command = [
        programs / "promptfoo",
        "eval",
        "-c",
        "config.json",
        "-o",
        "out.json",
        "--no-cache",
        "--no-share",
        "-j",
        "1",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 100, done.stdout + done.stderr  # because of the wrong requests
    return json.loads((folder / "out.json").read_text())


def check(results):
    wrong = {label: results.pop(label) for label in ("wrong", "responses wrong")}
    assert all("did you mean alignment_ratio?" in result["error"] for result in wrong.values()), wrong
    assert all(result["success"] for result in results.values()), results
    outputs = {label: result["response"]["output"] for label, result in results.items()}
    assert len({outputs[label] for label in ("plain", "aligned", "teacher")}) == 3
    assert outputs["headers"] == outputs["responses"] == outputs["aligned"]
    assert outputs["responses plain"] == outputs["plain"]
    (call,) = outputs["tool"]
    assert type(json.loads(call["function"]["arguments"])["hours"]) is int
    assert outputs["typed"].keys() == {"kind", "megawatts"}
    if isinstance(outputs["both"], dict):
        assert outputs["both"].keys() == {"kind", "megawatts"}
    else:
        assert outputs["both"][0]["function"]["name"] == "sunshine"
    return outputs["aligned"]


with TemporaryDirectory() as folder:
    log = evaluate(Path(folder))
text = check({result["provider"]["label"]: result for result in log["results"]["results"]})
print(json.dumps({"version": log["metadata"]["promptfooVersion"], "messages": MESSAGES, "text": text}))
