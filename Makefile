PYTHON ?= python3
BIN := .venv/bin
DEMO := .demo
RESULTS := .results

help: ## List what make can do
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

.venv/installed: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/installed ## Mine tickets, train on them, judge: the whole story in minutes
	@rm -rf $(DEMO)
	$(BIN)/python examples/study.py demo --out $(DEMO)

results: .venv/installed ## The studies of docs/RESULTS.md and docs/WEIGHTS.md; many hours; goes on where it was interrupted
	$(BIN)/python examples/study.py results --out $(RESULTS)
	$(BIN)/python examples/study.py families --out $(RESULTS)
	$(BIN)/python examples/study.py ranked --out $(RESULTS)
	$(BIN)/python examples/study.py weights --out $(RESULTS)

quick: .venv/installed ## Run the quick tests, under a minute
	$(BIN)/python -m pytest -n 2 -m "not slow"

test: .venv/installed ## Run the test suite but for what is marked long
	$(BIN)/python -m pytest -n 2

torture: .venv/installed ## Hostile sets, odd files, dying processes, full disks; SECONDS=240
	$(BIN)/python tests/torture --seconds $(or $(SECONDS),240)

lint: .venv/installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed ## Time everything against what else one would run; PEERS=PYTHON for litdata and streaming
	$(BIN)/python -m benchmarks $(if $(PEERS),--peers $(PEERS))

.PHONY: help demo results quick test torture lint bench
.DEFAULT_GOAL := help
