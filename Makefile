PYTHON ?= python3
BIN := .venv/bin
DEMO := .demo
# The mining half of the story; 36 patches of 16 pixels, 20 of them kept.
MINE := $(BIN)/datalth-mine --img-size 96 --tokens 20

help: ## List what make can do
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

.venv/installed: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/installed ## Mine a small image set twice, check and draw the tickets
	@rm -rf $(DEMO)
	$(BIN)/python examples/make_digits.py --out $(DEMO)/digits
	$(MINE) --data $(DEMO)/digits --out $(DEMO)/center --method center --views 4
	$(MINE) --data $(DEMO)/center --out $(DEMO)/random --method random --images link
	$(BIN)/datalth-shards info $(DEMO)/random
	$(BIN)/datalth-shards verify $(DEMO)/center --deep
	$(BIN)/datalth-shards verify $(DEMO)/random --deep
	$(BIN)/datalth-shards diff $(DEMO)/center $(DEMO)/random
	$(BIN)/datalth-shards score $(DEMO)/random --masks $(DEMO)/digits/masks
	$(BIN)/datalth-shards sheet $(DEMO)/center -o $(DEMO)/center.png
	$(BIN)/datalth-shards sheet $(DEMO)/random -o $(DEMO)/random.png
	@echo "look at $(DEMO)/center.png and $(DEMO)/random.png: each image with its ticket beside it"

test: .venv/installed ## Run the test suite
	$(BIN)/python -m pytest

lint: .venv/installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed ## Time mining against the bare selector and its legs
	$(BIN)/python benchmarks/mining.py

.PHONY: help demo test lint bench
.DEFAULT_GOAL := help
