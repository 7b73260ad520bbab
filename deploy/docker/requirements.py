"""Print the packages that an image installs before the sources: requirements of pyproject.toml, with extras.

Arguments: cuda or cpu, and comma-separated names of further extras.
"""

import argparse
import re
import tomllib
from pathlib import Path

EXTRAS = {"cuda": ["otel", "cuda"], "cpu": ["otel"]}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("variant", choices=EXTRAS)
parser.add_argument("extras", nargs="?", default="")
args = parser.parse_args()

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
known = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
lines = project["dependencies"]
for extra in [*EXTRAS[args.variant], *filter(None, map(str.strip, args.extras.split(",")))]:
    if extra not in known:
        parser.error(f"there is no extra {extra} for an image: {', '.join(known)}")
    lines += known[extra]
if args.variant == "cpu":  # PyPI's torch is the CUDA build, which is gigabytes larger
    (version,) = re.findall(r"^torch==(\S+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    lines.append(f"torch=={version}+cpu")
print("\n".join(lines))
