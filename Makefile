PYTHON ?= python3
BIN := .venv/bin
DEMO := .demo
RESULTS := .results

help: ## List what make can do
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

# Each stamp is an extra that is installed; the demo waits for no more than it needs.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# pip would compile all of torch, for a minute. Python does it for what it imports, and keeps it unless it is told not to.
unexport PYTHONDONTWRITEBYTECODE

.venv/demo: pyproject.toml setup.cfg
	@echo "First a Python of its own in .venv, with PyTorch (6 GB): a minute or two, and as long as the download takes"
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[demo]'
	@touch $@

.venv/dev: .venv/demo
	$(INSTALL) -e '.[dev]'
	@touch $@

.venv/docs: .venv/demo
	$(INSTALL) -e '.[docs]'
	@touch $@

demo: .venv/demo ## Mine tickets, train on them, judge: the whole story in minutes
	@rm -rf $(DEMO)
	$(BIN)/python examples/study.py demo --out $(DEMO)

results: .venv/demo ## The studies of docs/RESULTS.md and docs/WEIGHTS.md; many hours; goes on where it was interrupted
	$(BIN)/python examples/study.py results --out $(RESULTS)
	$(BIN)/python examples/study.py families --out $(RESULTS)
	$(BIN)/python examples/study.py ranked --out $(RESULTS)
	$(BIN)/python examples/study.py weights --out $(RESULTS)

quick: .venv/dev ## Run the quick tests, under a minute
	$(BIN)/python -m pytest -n 2 -m "not slow"

test: .venv/dev ## Run the test suite but for what is marked long
	$(BIN)/python -m pytest -n 2

torture: .venv/dev ## Hostile sets, odd files, dying processes, full disks; SECONDS=240
	$(BIN)/python tests/torture --seconds $(or $(SECONDS),240)

lint: .venv/dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev ## Time everything against what else one would run; PEERS=PYTHON for litdata and streaming
	$(BIN)/python -m benchmarks $(if $(PEERS),--peers $(PEERS))

docs: .venv/docs ## Build the documentation as a site in .site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open .site/index.html"

.PHONY: help demo results quick test torture lint bench docs
.DEFAULT_GOAL := help
