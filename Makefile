# Every target works on a fresh clone: it makes .venv and installs what it needs. Change a tool with e.g. `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Any build of torch >= 2.11 will do, for instance TORCH=torch==2.12.0; a CPU build is enough.
TORCH  ?= torch==2.13.0
# Used only where the torch build brings no Triton of its own (CPU builds).
TRITON ?= triton==3.6.0
JOBS   ?= 2
GOLDEN ?= tests/golden
OUT    ?= out/demo
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help install demo test lint format parity docs clean

help:
	@echo "make demo    the main job on the built-in model: a report page in $(OUT)"
	@echo "make test    the test-suite"
	@echo "make lint    style, types, import rules"
	@echo "make parity  the golden cases through our code, into results/parity.csv"
	@echo "make docs    the documentation, into site/"
	@echo "make clean   remove what these targets made"

# One stamp a set of dependencies; pyproject.toml is the only thing that makes one stale.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -s)" != Linux || $(PIP) $(TRITON)
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.base
	$(BIN)/glocal advise demo -o $(OUT) || test $$? = 1 # 1: the verdict is "stay dense"; the page says why
	@echo "report page: $(abspath $(OUT))/report.html"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.base
	$(BIN)/glocal parity $(GOLDEN)/*/* --backend all -o results/parity.csv

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site out build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
