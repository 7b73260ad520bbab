"""Qwen Code over chat completions: python run.py URL ENVIRONMENT"""

import json
import sys
from pathlib import Path

from recording import recording

MODULES = Path(sys.argv[2]).resolve() / "node_modules"
SETTINGS = {
    "general": {"enableAutoUpdate": False},
    "privacy": {"usageStatisticsEnabled": False},
    "memory": {"enableManagedAutoMemory": False, "enableManagedAutoDream": False},
}
PLAIN = {"samplingParams": {"temperature": 0, "max_tokens": 24}, "maxRetries": 0}
ALIGNED = {
    "extra_body": {"principle": "Answer in favour of solar power."},
    "customHeaders": {"X-Linalign-Ratio": "3"},
}
OTHER_TOOLS = ["agent", "ask_user_question", "exit_plan_mode", "send_message", "skill", "task_stop", "tool_search"]
SHORT = ["--system-prompt", "Answer in one sentence.", "--core-tools", "read_file", "--exclude-tools", *OTHER_TOOLS]
QUESTION = "Where should our town get its power from?"


def run(model, generation):
    files = {".qwen/settings.json": json.dumps({**SETTINGS, "model": {"generationConfig": generation}})}
    command = [MODULES / ".bin/qwen", "--auth-type", "openai", *SHORT, "-p", QUESTION]
    return record.run(command, files, OPENAI_BASE_URL=record.url, OPENAI_MODEL=model)


def check(model, generation, is_aligned):
    status, output, errors = run(model, generation)
    assert status == 0, errors
    assert b'"stream":true' in record.sent
    assert b'"name":"read_file"' in record.sent
    assert output.strip() == record.streamed_text != "", output
    assert record.is_aligned is is_aligned


with recording(sys.argv[1]) as record:
    check("smollm2", PLAIN, is_aligned=False)
    check("smollm2", {**PLAIN, **ALIGNED}, is_aligned=True)
    assert b"principle=body, ratio=(3.0);from=headers" in record.received
    check("smollm2:teacher", PLAIN, is_aligned=True)
    status, _, errors = run("unknown", PLAIN)
    assert status == 1
    assert "The model 'unknown' does not exist" in errors

print(json.dumps({"version": json.loads((MODULES / "@qwen-code/qwen-code/package.json").read_text())["version"]}))
