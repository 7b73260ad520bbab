"""Codex CLI over responses: python run.py URL ENVIRONMENT"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

from recording import recording

MODULES = Path(sys.argv[2]).resolve() / "node_modules"
CONFIG = """
model_provider = "linalign"
model_instructions_file = "instructions.md"
include_environment_context = false
web_search = "disabled"
check_for_update_on_startup = false
analytics.enabled = false
skills.include_instructions = false
features = {multi_agent = false, goals = false, apps = false, plugins = false}

[model_providers.linalign]
name = "linalign"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
request_max_retries = 0
stream_max_retries = 0
"""
HEADERS = 'http_headers = {X-Linalign-Principle = "Answer%20with%20yes%20or%20no.", X-Linalign-Ratio = "3"}'


QUESTION = "Is the sun hot? Answer with yes or no."
SCHEMA = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}


def run(model, provider, *options):
    files = {
        "schema.json": json.dumps({**SCHEMA, "additionalProperties": False}),
        "instructions.md": "Answer with yes or no.",
        "config.toml": f'model = "{model}"\n{CONFIG}\nbase_url = "{record.url}"\n{provider}\n',
    }
    command = [MODULES / ".bin/codex", "exec", "--skip-git-repo-check", "--strict-config", *options, QUESTION]
    return record.run(command, files, CODEX_HOME="{home}")


def reply(model, provider):
    """What Codex prints. Codex can't limit the length of a reply, so a long one is tried again."""
    for _ in range(4):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return run(model, provider)
    raise AssertionError("all replies are too long")


def check(model, provider, is_aligned):
    status, output, errors = reply(model, provider)
    assert status == 0, errors
    assert b'"stream":true' in record.sent
    assert b'"name":"exec_command"' in record.sent
    *_, text = re.findall(rb'"type":"response.output_text.done".*?"text":("(?:[^"\\]|\\.)*")', record.received)
    assert output.strip() == json.loads(text).strip() != "", (output, text)
    assert record.is_aligned is is_aligned


with recording(sys.argv[1], timeout=40) as record:
    check("smollm2", "", is_aligned=False)
    check("smollm2", HEADERS, is_aligned=True)
    assert b"from=headers" in record.received
    check("smollm2:concise", "", is_aligned=True)
    status, _, errors = run("unknown", HEADERS)
    assert status == 1
    assert "The model 'unknown' does not exist" in errors

    # A format beside tools: the reply is of the format, or Codex runs the tool and sends its result back, without end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        status, output, errors = run("smollm2", "", "--output-schema", "schema.json")
        assert status == 0, errors
        assert json.loads(output)["answer"] in ("yes", "no")
    assert b'"codex_output_schema"' in record.sent
    assert b'"type":"function_call_output"' in record.sent or b'"type":"response.completed"' in record.received

print(json.dumps({"version": json.loads((MODULES / "@openai/codex/package.json").read_text())["version"]}))
