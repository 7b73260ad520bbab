"""The examples in the README and in docs/methods.md give the results that are printed there."""

import re
import subprocess
from pathlib import Path

import pytest

from linalign import Engine, SamplingParams
from tests import fork_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| (-?\d+) \| (.+) \|$", README + (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)


QUESTION, PRINCIPLE = "How do I get to work?", "Encourage cycling."


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def reply(ratio):
    return next(text for row, text in ROWS if row == str(ratio))


@pytest.mark.parametrize("ratio", [0, 2, 5, -1, -4])
def test_the_sample_is_the_models_reply(embedded, ratio):
    messages = [{"role": "user", "content": QUESTION}]
    params = SamplingParams(temperature=0, max_tokens=48)
    with Engine(embedded) as engine:
        outputs = list(engine.chat(messages, PRINCIPLE, ratio, params))
    assert "".join(output.text for output in outputs).replace("\n", " ") == reply(ratio)


def test_the_curl(url):
    command = blocks("sh")[1].replace("http://127.0.0.1:8000", url)
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120).stdout
    assert f'"content":"{reply(2)}"' in printed


def test_the_sdk_snippet(url):
    code = blocks("python")[0].replace("http://127.0.0.1:8000", url)
    assert fork_server.run(code, check=True).stdout.strip()


def test_the_library_example():
    code = blocks("python")[1]
    assert fork_server.run(code, check=True, cold=True).stdout == reply(2)  # a new interpreter, as users have
