# Two commands on a fresh machine with Python 3.11 to 3.13 and make: `make demo` and `make test`.
# Another Python: `make demo PYTHON=python3.12`.

PYTHON := python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
# Every folder of the root with an __init__.py is a package of bract.
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard */__init__.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test soak lint ruff types floors clean

help:
	@echo "make demo    train heart disease over four hospitals and say where the report lies"
	@echo "make test    all checks: ruff, mypy, import-linter, pytest"
	@echo "make soak    the long chaos and scale tests"
	@echo "make lint    the checks without the tests"
	@echo "make clean   remove caches and build outputs (not .venv, not runs)"

demo: $(VENV)/.installed
	@$(BIN)/python -m bract simulate
	@echo
	@echo "The report: $(CURDIR)/$$(ls -t runs/*/report.html | head -n 1)"

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

soak: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m soak

lint: ruff types floors

ruff: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# mypy does not follow an editable install, and would name the package after the clone's folder: it gets a link named
# bract, outside of the tree.
types: $(VENV)/.installed-test
	@echo "mypy --strict"
	@link=$$(mktemp -d) && trap 'rm -rf "$$link"' EXIT && ln -s "$(CURDIR)" "$$link/bract" && cd "$$link" && \
	"$(CURDIR)/$(BIN)/python" -m mypy --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" \
	-m bract -m bract.__main__ -m bract.experiment $(PACKAGES:%=-p bract.%)

floors: $(VENV)/.installed-test
	$(BIN)/lint-imports --no-logo

# The set-up is done again only when what it installs has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing bract and what it stands on into $(VENV); the first time takes some minutes."
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing bract, what it stands on and the tools of its checks into $(VENV); the first time takes some minutes."
	@$(PIP) --editable '.[test]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	{ echo "error: there is no $(PYTHON) here; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	{ echo "error: bract needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is" \
	"$$($(PYTHON) -V 2>/dev/null || echo none that runs); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
