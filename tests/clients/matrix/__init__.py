"""Programs that use foreign clients, each with an environment of its own in .venv/matrix: `make client-matrix`.

Each directory has `requirements.txt` or `package.json`, with exact versions, and `run.py` or `run.mjs`. The program
gets the server's URL and the environment's directory. It checks what the client can do, and prints a JSON object as its
last line: the client's `version` and, if the client adds no text of its own, the `messages` and the `text` of an
aligned chat. The programs of command-line agents share `shared/recording.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CLIENTS = sorted(file.parent.name for file in HERE.glob("*/run.*"))
TIMEOUT = 900  # seconds


def run(client, url):
    """Run a client's program against the server at a URL. Returns the object that it prints."""
    environment, program = ROOT / ".venv" / "matrix" / client, HERE / client / "run.py"
    python = environment / "bin" / "python"
    command = [python if python.exists() else sys.executable, program]
    if not program.exists():  # Node looks for modules beside the script
        command = ["node", shutil.copy(HERE / client / "run.mjs", environment)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*map(str, command), url + "/v1", str(environment)],
            env={**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": str(HERE / "shared")},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    if done.returncode:
        raise RuntimeError(f"{client} has failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
