# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
# Two processes, each with whole modules: their fixtures are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope

.PHONY: demo results numbers test test-all zoo lint fix

demo: .venv/installed  ## install, then make a dense model sparse, on real images, without a network
	$(BIN)/dynamicvit quickstart

results: demo  ## the quickstart's numbers and pictures, as README and docs show them
	cp quickstart/metrics.json benchmarks/results/quickstart.json
	cp quickstart/keep_maps.png docs/keep_maps.png
	$(BIN)/dynamicvit explain 'quickstart/fashion_mnist/val/9 Ankle boot/003.png' \
	    --model quickstart/sparse --output quickstart/explain --formats '[png]'
	cp quickstart/explain/003.png docs/explain.png
	$(BIN)/python tools/run_notebook.py examples/explain.ipynb
	$(MAKE) numbers

numbers: .venv/installed  ## write measured numbers into README and docs
	$(BIN)/python -m tools.write_numbers

test: lint  ## lint, types, ordinary tests
	$(PYTEST)

test-all: test  ## the ordinary tests, then the slow ones
	$(PYTEST) -m slow

zoo: .venv/installed  ## the table of timm's plain transformers in docs
	$(BIN)/dynamicvit models --output docs/models.md

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: .venv/installed  ## format, and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@
