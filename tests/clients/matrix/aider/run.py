"""aider over chat completions: python run.py URL ENVIRONMENT"""

import json
import re
import sys
from pathlib import Path

from recording import recording

AIDER = Path(sys.argv[2]).resolve() / "bin/aider"
PLAIN = {"max_tokens": 24, "temperature": 0}
ALIGNED = {
    "extra_body": {"principle": "Answer in favour of solar power."},
    "extra_headers": {"X-Linalign-Ratio": "3"},
}
OPTIONS = ["--no-check-update", "--analytics-disable", "--no-show-release-notes", "--no-show-model-warnings"]
OPTIONS += ["--no-git", "--no-pretty", "--yes-always", "--message", "Where should our town get its power from?"]


def run(model, parameters):
    model = f"openai/{model}"
    settings = [{"name": model, "edit_format": "ask", "use_repo_map": False, "extra_params": parameters}]
    files = {
        "settings.yml": json.dumps(settings),
        ".aider/caches/model_prices_and_context_window.json": '{"none": {}}',  # else aider downloads this list
    }
    command = [AIDER, "--model", model, "--weak-model", model, "--model-settings-file", "settings.yml", *OPTIONS]
    return record.run(command, files, OPENAI_API_BASE=record.url, LITELLM_LOCAL_MODEL_COST_MAP="True")


def check(model, parameters, is_aligned):
    status, output, errors = run(model, parameters)
    assert status == 0, output + errors
    assert b'"stream":true' in record.sent
    assert record.streamed_text
    assert record.streamed_text in output, output
    assert record.is_aligned is is_aligned


with recording(sys.argv[1]) as record:
    check("smollm2", PLAIN, is_aligned=False)
    check("smollm2", {**PLAIN, **ALIGNED}, is_aligned=True)
    assert b"principle=body, ratio=(3.0);from=headers" in record.received
    check("smollm2:teacher", PLAIN, is_aligned=True)
    _, output, errors = run("unknown", PLAIN)
    assert "The model 'unknown' does not exist" in output + errors

print(json.dumps({"version": re.search(r"Aider v(\S+)", output)[1]}))
