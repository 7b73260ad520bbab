"""The benchmarks run to their end on toy shapes; the times are meaningless."""

import os
import shutil
from pathlib import Path

import platformdirs
import pytest

from tests import fork_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(embedded, tmp_path_factory):  # noqa: ARG001 - loads the model first, so that the kernels are compiled
    """A cache with the user's kernels, shared by all benchmarks, so that the model is converted once."""
    home = tmp_path_factory.mktemp("home")
    for kernels in platformdirs.user_cache_path("linalign").glob("kernels-*"):
        shutil.copytree(kernels, home / "linalign" / kernels.name)
    return home


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("cpu.py --rounds 1 --tokens 2", r'"ours, 1 aligned \u00f7 reference loop, 1 aligned": '),
        ("serving.py --streams 2", '"engine alone over HTTP, time"'),
        ("divergence.py --tokens 1", '{"dtype": "float32", "quantization": "auto", "tokens": 16, "principled": 0.0'),
        ("fairness.py --streams 1 --prompts 1 --prompt-tokens 100", '"p99_over_median"'),
    ],
)
def test_others(package, home, tmp_path, script, expected):
    """With a model of one layer."""
    environment = os.environ | {"PYTHONPATH": f"{package}:{ROOT}", "XDG_CACHE_HOME": str(home)}
    name, *args = script.split()
    output = [] if name == "divergence.py" else ["--output", str(tmp_path / "told")]
    code = f"import runpy; runpy.run_path('benchmarks/{name}', run_name='__main__')"
    done = fork_server.run(code, *args, *output, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert expected in ((tmp_path / "told").read_text() if output else done.stdout)
