# Two commands on a fresh machine: `make demo` runs the main job, `make test` the tests.
# Each makes its own virtual environment in the checkout; nothing is installed globally.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO_OUT ?= runs/demo

.PHONY: demo test golden lint types check clean

demo: $(STAMP)
	$(BIN)/alpamayo-dflash demo --out $(DEMO_OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The parity tests alone; ALPAMAYO_GOLDEN names the fixtures' folder (default: ../shared/golden).
golden: $(STAMP)
	ALPAMAYO_GOLDEN="$${ALPAMAYO_GOLDEN:-../shared/golden}" $(BIN)/python -m pytest tests/integration/test_golden.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: test lint types

# torch is named in the same call as the package, so that pip takes the pinned build with no GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs
