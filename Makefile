# make help lists the targets. Everything is installed into $(VENV); nothing outside this folder is touched.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help quickstart test lint format audit clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.run ## install, then pack, train, evaluate and report on real digits: no account, no network
	$(BIN)/vaejob quickstart $(ARGS)

test: $(VENV)/.test ## every test, in two processes; ARGS="-k storage" for some of them
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(ARGS)

lint: $(VENV)/.test ## rules, layout, types, and which module may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test ## mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

audit: $(VENV)/audit/bin/pip-audit ## known vulnerabilities of the pinned packages, as pypi.org has them; ARGS="-s osv" for osv.dev
	$< --strict --no-deps --disable-pip --requirement constraints.txt $(ARGS)

clean: ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes minutes"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes minutes"
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
