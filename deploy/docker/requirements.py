"""Print what an image installs before the sources: pyproject.toml's own requirements, with some of its extras.

Arguments: cuda or cpu, and names of further extras, comma-separated.
"""

import argparse
import re
import tomllib
from pathlib import Path

EXTRAS = {"cuda": ["otel", "cuda"], "cpu": ["otel"]}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("variant", choices=EXTRAS)
parser.add_argument("extras", nargs="?", default="")
asked = parser.parse_args()

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
known = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
lines = project["dependencies"]
for extra in [*EXTRAS[asked.variant], *filter(None, map(str.strip, asked.extras.split(",")))]:
    if extra not in known:
        parser.error(f"there is no extra {extra} for an image: {', '.join(known)}")
    lines += known[extra]
if asked.variant == "cpu":  # PyPI's torch is the CUDA build: gigabytes that a CPU never loads
    (version,) = re.findall(r"^torch==(\S+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    lines.append(f"torch=={version}+cpu")
print("\n".join(lines))
