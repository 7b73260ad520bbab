"""Continue's CLI over chat completions: python run.py URL ENVIRONMENT"""

import json
import sys
from pathlib import Path

from recording import recording

MODULES = Path(sys.argv[2]).resolve() / "node_modules"
ALIGNED = {
    "extraBodyProperties": {"principle": "Answer in favour of solar power."},
    "headers": {"X-Linalign-Ratio": "3"},
}
COMMAND = [MODULES / ".bin/cn", "-p", "--config", "config.yaml", "Where should our town get its power from?"]
VARIABLES = {
    "CONTINUE_GLOBAL_DIR": "{home}/.continue",
    "CONTINUE_TELEMETRY_ENABLED": "0",
    "CONTINUE_CLI_ENABLE_TELEMETRY": "0",
}


def run(name, options):
    model = {"name": "model", "provider": "openai", "model": name, "apiBase": record.url, "apiKey": "none"}
    model["roles"] = ["chat"]
    model["defaultCompletionOptions"] = {"contextLength": 8192, "maxTokens": 24, "temperature": 0}
    model["requestOptions"] = options
    config = {"name": "linalign", "version": "0.0.1", "schema": "v1", "models": [model]}
    return record.run(COMMAND, {"config.yaml": json.dumps(config)}, **VARIABLES)


def check(name, options, is_aligned):
    status, output, errors = run(name, options)
    assert status == 0, errors
    assert b'"stream":true' in record.sent
    assert b'"name":"Read"' in record.sent
    assert output.strip() == record.streamed_text != "", output
    assert record.is_aligned is is_aligned


with recording(sys.argv[1]) as record:
    check("smollm2", {}, is_aligned=False)
    check("smollm2", ALIGNED, is_aligned=True)
    assert b"principle=body, ratio=(3.0);from=headers" in record.received
    check("smollm2:teacher", {}, is_aligned=True)
    status, output, errors = run("unknown", {})
    assert status == 1
    assert "The model 'unknown' does not exist" in output + errors

print(json.dumps({"version": json.loads((MODULES / "@continuedev/cli/package.json").read_text())["version"]}))
