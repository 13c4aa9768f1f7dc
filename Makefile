# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo results test zoo lint fix

demo: .venv/installed  ## install, then make a dense model fast, on real images, without a network
	$(BIN)/dynamicvit quickstart

results: demo  ## the quickstart's numbers and picture, as README and docs show them
	cp quickstart/metrics.json benchmarks/results/quickstart.json
	cp quickstart/keep_maps.png docs/keep_maps.png
	$(BIN)/dynamicvit explain 'quickstart/fashion_mnist/val/9 Ankle boot/003.png' \
	    --model quickstart/sparse --output quickstart/explain --formats '[png]'
	cp quickstart/explain/003.png docs/explain.png
	$(BIN)/python tools/run_notebook.py examples/explain.ipynb

# The engines' tests run in a process of their own: one that has run them has crashed some hundred
# tests later, inside Python's own int(), with Python 3.11.
test: lint  ## lint, types, tests
	$(BIN)/python -m pytest tests/deploy
	$(BIN)/python -m pytest --ignore tests/deploy

zoo: .venv/installed  ## every plain transformer of timm's: the table in docs, and its test
	$(BIN)/dynamicvit models --output docs/models.md
	$(BIN)/python -m pytest -m 'zoo or not zoo' tests/evaluation/test_support.py

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
