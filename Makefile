# Two commands: `make run` (install, then the main job) and `make test` (install, then everything that must pass).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Extra options for pip, such as an index of CPU-only PyTorch wheels: make run PIP_OPTIONS="--extra-index-url …"
PIP_OPTIONS ?=
PIP    := $(BIN)/python -m pip --disable-pip-version-check $(PIP_OPTIONS)

.PHONY: run test lint install ui serve clean

run: install
	$(BIN)/openrft run examples/icd10

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

install: $(VENV)/.run

ui serve: install
	$(BIN)/openrft $@

# torch first and by its exact version: a range, resolved together with the rest, takes the newest CUDA build.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "OpenRFT needs Python 3.11 or later; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .openrft
