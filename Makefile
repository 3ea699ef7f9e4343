# make demo   install, then the main job on the embedded model: prints where the report is
# make test   install, then all tests
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test slow lint types check format bench clean

demo: $(INSTALLED)
	$(BIN)/fastsample bench

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: test lint types

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks -o addopts="" -m "not gpu" --benchmark-only

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fastsample needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
