"""Every file in examples/ runs, and prints what it promises."""

import math
import os
import re
from pathlib import Path

import pytest

from tests import fork_server
from tests.test_readme import reply

FOLDER = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def one_line(text):
    return text.replace("\n", " ")


def both_replies(printed):
    return one_line(reply(0)) in one_line(printed) and one_line(reply(2)) in one_line(printed)


COEFFICIENTS = [f"{3 * math.tanh(ratio / 3):.2f}" for ratio in (0.5, 2, 20)]
PRINTS = {
    "chat.py": both_replies,
    "streaming.py": lambda printed: re.fullmatch(re.escape(reply(2)) + r"\n\(\d+ tokens\)\n", printed),
    "several_principles.py": lambda printed: re.search(r"\n\(3 branches, \d+ tokens computed\)\n$", printed),
    "library.py": lambda printed: len(re.findall(r"^.+\?\n  \S.+\n", printed, re.MULTILINE)) == 3,
    "custom_method.py": lambda printed: re.findall(r"coefficient (\S+): \S", printed) == COEFFICIENTS,
}


def test_every_example_has_a_test_and_a_line_in_the_readme():
    names = {file.name for file in FOLDER.glob("*.py")}
    assert names == PRINTS.keys() == set(re.findall(r"^\| \[(\w+\.py)\]", (FOLDER / "README.md").read_text(), re.M))


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs(name, url):
    environment = {**os.environ, "LINALIGN_URL": url}
    done = fork_server.run((FOLDER / name).read_text(), env=environment, check=True)
    assert PRINTS[name](done.stdout), done.stdout
