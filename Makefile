PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests.
WORKERS ?= 2

.PHONY: demo test families lint

# The reference model, six methods at five keep-rates; prints where the report lies.
demo: $(VENV)/.installed
	$(BIN)/vtc demo

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# The table of families anew, from the outcomes of its tests.
families: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_families.py tests/test_memory.py tests/test_tower.py --families
	$(BIN)/vtc report eval/results/tiny-llava-scenes.jsonl --readme README.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
