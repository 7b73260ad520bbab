"""Print what an image installs before the sources: pyproject.toml's own versions. Argument: cuda or cpu."""

import argparse
import tomllib
from pathlib import Path

EXTRAS = {"cuda": ("otel", "cuda"), "cpu": ("otel",)}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("variant", choices=EXTRAS)
variant = parser.parse_args().variant

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = project["dependencies"] + [
    line for extra in EXTRAS[variant] for line in project["optional-dependencies"][extra]
]
for line in requirements:
    # PyPI's torch is the CUDA build: gigabytes that a CPU never loads.
    print(line + "+cpu" if variant == "cpu" and line.startswith("torch==") else line)
