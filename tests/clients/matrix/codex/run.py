"""Codex CLI over responses: python run.py URL ENVIRONMENT"""

import json
import re
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


def run(model, provider):
    files = {
        "instructions.md": "Answer with yes or no.",
        "config.toml": f'model = "{model}"\n{CONFIG}\nbase_url = "{record.url}"\n{provider}\n',
    }
    command = [MODULES / ".bin/codex", "exec", "--skip-git-repo-check", "--strict-config"]
    command.append("Is the sun hot? Answer with yes or no.")  # a short reply, because Codex cannot limit its length
    return record.run(command, files, CODEX_HOME="{home}")


def check(model, provider, is_aligned):
    status, output, errors = run(model, provider)
    assert status == 0, errors
    assert b'"stream":true' in record.sent
    assert b'"name":"exec_command"' in record.sent
    *_, text = re.findall(rb'"type":"response.output_text.done".*?"text":("(?:[^"\\]|\\.)*")', record.received)
    assert output.strip() == json.loads(text).strip() != "", (output, text)
    assert record.is_aligned is is_aligned


with recording(sys.argv[1]) as record:
    check("smollm2", "", is_aligned=False)
    check("smollm2", HEADERS, is_aligned=True)
    assert b"from=headers" in record.received
    check("smollm2:concise", "", is_aligned=True)
    status, _, errors = run("unknown", HEADERS)
    assert status == 1
    assert "The model 'unknown' does not exist" in errors

print(json.dumps({"version": json.loads((MODULES / "@openai/codex/package.json").read_text())["version"]}))
