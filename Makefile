# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test benchmark docs lint format install clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train a small network, trace it and ask what its route is worth (two to four minutes)
	@$(BIN)/attackroute demo

test: $(STAMP) ## run the tests that are quick
	@$(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal

# Tests that need a package which `make test` does without, by what they import.
EXTRAS := demo,timm,autoattack,browser,peers
EXTRA_TESTS = $(shell grep -lE 'playwright|timm|foolbox|torchattacks|\.needs|PEERS' tests/test_*.py)
.PHONY: test-all test-extras extras dist

test-all: extras ## run every test, those of optional packages, of pages in Chromium and the slow ones too (an hour)
	@$(BIN)/python -m pytest -q -n auto --dist worksteal

test-extras: extras ## run the quick tests of the files that need optional packages or Chromium
	@$(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal $(EXTRA_TESTS)

extras: $(STAMP) ## install the optional packages, and Chromium where this may be done
	$(BIN)/python -m pip install -e ".[dev,$(EXTRAS)]"
	@$(BIN)/python -c 'import foolbox, playwright, timm, torchattacks'
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq --yes chromium; } \
		|| echo "note: no Chromium here (Debian: apt-get install chromium): the tests of pages in a browser are skipped"

benchmark: $(STAMP) ## measure what a trace costs here (about ten minutes)
	@$(BIN)/python -m benchmarks

docs: $(BIN)/mkdocs ## build the site into build/site, strictly (opens as files, no network needed to read it)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: $(STAMP) ## check style (ruff) and types (mypy)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

dist: $(STAMP) ## build the packages for an index into dist/ and check them
	@rm -rf dist
	$(BIN)/python -m pip install -q build twine
	@$(BIN)/python -m build
	@$(BIN)/python -m twine check --strict dist/*

install: $(STAMP) ## make .venv with the package and its development tools

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache .coverage
	find src studies benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/mkdocs: $(STAMP)
	$(BIN)/python -m pip install -e ".[docs]"
	@touch $@

# The stamp is touched last: an installation that broke off is started again.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 \
		|| { echo "error: $(PYTHON) was not found: install Python 3.10 or newer, or name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "error: Python 3.10 or newer is needed, but $(PYTHON) says \"$$($(PYTHON) --version 2>&1 | head -n 1)\": name another with make PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "error: $(PYTHON) -m venv failed: install its venv module (Debian and Ubuntu: python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install -e ".[dev,demo]"
	@touch $@
