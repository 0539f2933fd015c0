# `make serve` and `make test` are the two commands; both make the virtual environment they need.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?=
BIN    := $(VENV)/bin

.PHONY: serve test test-slow check format prometheus clean
.DEFAULT_GOAL := help

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	@touch $@

$(VENV)/dev.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/serve.installed

serve: $(VENV)/serve.installed ## serve the demo model, or MODEL=folder-or-hub-id, on HOST and PORT
	@exec $(BIN)/reward-serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model '$(MODEL)')

check: $(VENV)/dev.installed ## format, lint, types, import contract, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(VENV)/dev.installed ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/dev.installed ## the fast tests
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: $(VENV)/dev.installed ## real servers, the demo model and long checks
	$(BIN)/python -m pytest -m 'slow and not gpu'

prometheus: $(VENV)/dev.installed ## Prometheus's own tools for the tests of monitoring/, from Debian's packages, without root
	mkdir -p $(VENV)/prometheus
	cd $(VENV)/prometheus && apt-get download prometheus prometheus-alertmanager
	for package in $(VENV)/prometheus/*.deb; do dpkg --extract $$package $(VENV)/prometheus || exit 1; done
	for tool in prometheus promtool amtool; do ln -sf ../prometheus/usr/bin/$$tool $(BIN)/$$tool; done

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
