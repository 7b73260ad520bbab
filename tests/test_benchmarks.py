"""The benchmarks run to their end, on toy shapes; their times mean nothing then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("cpu.py --rounds 1 --tokens 2", r'"ours, 1 aligned \u00f7 reference loop, 1 aligned": '),
        ("serving.py --streams 2", '"engine alone over HTTP, time"'),
        ("divergence.py --tokens 1", '{"dtype": "float32", "quantization": "auto", "tokens": 16, "principled": 0.0'),
        ("fairness.py --streams 1 --prompts 1 --prompt-tokens 100", '"p99_over_median"'),
    ],
)
def test_others(package, tmp_path, script, told):
    """On a model of one layer."""
    environment = os.environ | {"PYTHONPATH": f"{package}:{ROOT}", "XDG_CACHE_HOME": str(tmp_path)}
    name, *args = script.split()
    output = [] if name == "divergence.py" else ["--output", str(tmp_path / "told")]
    command = [sys.executable, f"benchmarks/{name}", *args, *output]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert told in ((tmp_path / "told").read_text() if output else done.stdout)
