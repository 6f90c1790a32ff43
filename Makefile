# Two commands matter: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# Renewed whenever what is to be installed changes.
STAMP := $(VENV)/.installed
GPU_PYTHON ?= python3

.PHONY: help setup demo serve test test-full lint format gpu kernels vllm clean

help: ## list the commands
	@printf 'usage: make COMMAND\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh $(VENV) $(STAMP)

setup: $(STAMP) ## make .venv with pinned versions (the other commands do it themselves)

# Somebody else's client, in an environment of its own, so that its pins do not bend ours. Without a network the tests
# that need it are skipped, and say so.
LIVEKIT := .venv-livekit/requirements.txt
$(LIVEKIT): tests/livekit/requirements.txt | $(STAMP)
	@printf 'Making .venv-livekit for the tests with LiveKit (once; half a gigabyte)\n' >&2
	@sh tests/livekit/setup.sh && touch $(LIVEKIT) || printf 'LiveKit could not be installed; its tests are skipped\n' >&2

demo: $(STAMP) ## start the system, hold four conversations at once, write out/, stop
	@$(BIN)/personaplex demo

serve: $(STAMP) ## start the system and leave it running on http://localhost:8998
	@$(BIN)/personaplex serve

test: $(STAMP) $(LIVEKIT) ## pass every test (15 minutes at most on two cores)
	@$(BIN)/python -m pytest -m "not full and not gpu"

test-full: $(STAMP) $(LIVEKIT) ## the same and what takes longer, Triton's kernels included (80 minutes at most)
	@sh tests/triton/setup.sh || printf 'Triton could not be installed; its tests are skipped\n' >&2
	@PYTHONPATH=.venv-triton $(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP) ## ruff, mypy (strict), import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu: ## on a CUDA machine with torch, without Ray or network: GPU tests and benchmarks, out/gpu.json
	@PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu --out out

kernels: $(STAMP) ## with Triton (200 MB): the GPU's kernels in its interpreter, and compiled for an H100 (4 minutes)
	@sh tests/triton/setup.sh
	@PYTHONPATH=.venv-triton $(BIN)/python -m pytest -rs tests/unit/graphs/test_triton_kernels.py
	@PYTHONPATH=.venv-triton:. $(BIN)/python -m benchmarks.kernels

vllm: ## with vLLM's CPU kernels (.venv-vllm, 3.5 GB): the tests that need them, and what they bring
	@sh tests/vllm/setup.sh
	@.venv-vllm/bin/python -m pytest -rs tests/unit/graphs/test_backends.py
	@.venv-vllm/bin/python -m benchmarks.backends

clean: ## remove caches and out/ (not .venv)
	@rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
