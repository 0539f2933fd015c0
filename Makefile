# `make serve` and `make test` are the two commands; both make the virtual environment they need.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?=
BIN    := $(VENV)/bin

.PHONY: serve dev docs test test-slow soak gpu chaos fuzz sbom start-soak image-check coverage check check-lock format lock prometheus chromium clean
.DEFAULT_GOAL := help

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The versions that the tests have passed with: a release of a dependency changes nothing before `make lock`.
INSTALL = $(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt

$(VENV)/serve.installed: pyproject.toml requirements/constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[serve]'
	@touch $@

$(VENV)/dev.installed: pyproject.toml requirements/constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/serve.installed $(VENV)/docs.installed

$(VENV)/docs.installed: pyproject.toml requirements/constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[docs]'
	@touch $@

serve: $(VENV)/serve.installed ## serve the demo model, or MODEL=folder-or-hub-id, on HOST and PORT
	@exec $(BIN)/reward-serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model '$(MODEL)')

dev: $(VENV)/dev.installed ## everything for working on the code, and the pre-commit hooks
	$(BIN)/pre-commit install

PAGES = build/site-pages
docs: $(VENV)/docs.installed ## the documentation as a site in site/, with a search; it needs no network to be read
	$(BIN)/python -m docs.site.pages $(PAGES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict --clean
	@echo "Open site/index.html"

check: $(VENV)/dev.installed ## format, lint, types, import contracts, unsafe code, spelling, pyproject files, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive service scoring export training loadtest monitoring \
		client/reward_client demo
	git ls-files -z ':!*.lock' ':!requirements/*.txt' ':!*.json' ':!*.safetensors' ':!*.png' ':!*.html' | xargs -0 $(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml client/pyproject.toml
	$(BIN)/hadolint Dockerfile

format: $(VENV)/dev.installed ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

WORKERS ?= 2
test: $(VENV)/dev.installed ## the fast tests, in WORKERS processes
	$(BIN)/python -m pytest -m 'not slow and not gpu' --numprocesses $(WORKERS) --dist worksteal

test-slow: $(VENV)/dev.installed ## real servers, the demo model and long checks
	$(BIN)/python -m pytest -m 'slow and not soak and not gpu'

soak: $(VENV)/dev.installed ## what takes minutes each: clusters of nodes, clients of frameworks on the demo model, examples
	$(BIN)/python -m pytest -m 'soak and not gpu'

MINUTES ?= 25
gpu: $(VENV)/dev.installed ## tests and measurements of a GPU in MINUTES: one report in gpu-day/ (docs/performance.md)
	$(INSTALL) --no-deps --requirement requirements/gpu-day.txt
	$(BIN)/python -m loadtest.gpu_day --minutes $(MINUTES) --out gpu-day --overwrite

ITEMS ?= 1000000
EXPERIMENTS ?=
chaos: $(VENV)/dev.installed ## reliability goals on servers that are broken on purpose: ITEMS, EXPERIMENTS (docs/reliability.md)
	$(BIN)/python -m loadtest.reliability.command $(EXPERIMENTS) --items $(ITEMS) --duration 30 --out chaos

INPUTS ?= 100000
fuzz: $(VENV)/dev.installed ## INPUTS mutated requests to a server: no fault, no hang, no growth of memory
	$(BIN)/python tests/fuzz_soak.py --inputs $(INPUTS)

sbom: $(VENV)/dev.installed ## write sbom.json, the bill of materials of the serve environment (CycloneDX)
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements requirements/serve.txt \
		--pyproject pyproject.toml --output-file sbom.json

STARTS ?= 20
start-soak: $(VENV)/dev.installed ## STARTS starts beside two busy loops: ready, or ended with a sentence
	$(BIN)/python tests/start_soak.py --starts $(STARTS) --busy 2

image-check: $(VENV)/dev.installed ## build and start the image with buildah and debootstrap, without Docker; needs root
	$(BIN)/python tests/image_check.py

coverage: $(VENV)/dev.installed ## the fast tests under coverage, with a floor
	$(BIN)/python -m pytest -m 'not slow and not gpu' --cov --cov-report=term:skip-covered

COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate \
	--override requirements/without-torch.txt --quiet
CONSTRAINTS = $(COMPILE) --extra dev --extra report
LOCK = $(COMPILE) --extra serve --generate-hashes --constraint requirements/constraints.txt

lock: $(VENV)/dev.installed ## pin every environment, and the serve environment with hashes
	$(CONSTRAINTS) --upgrade --output-file requirements/constraints.txt
	$(LOCK) --upgrade --output-file requirements/serve.txt

check-lock: $(VENV)/dev.installed ## whether the files of requirements/ are what pyproject.toml asks for
	cp requirements/constraints.txt requirements/serve.txt $(VENV)
	$(CONSTRAINTS) --output-file $(VENV)/constraints.txt
	diff requirements/constraints.txt $(VENV)/constraints.txt
	$(LOCK) --output-file $(VENV)/serve.txt
	diff requirements/serve.txt $(VENV)/serve.txt

prometheus: $(VENV)/dev.installed ## Prometheus's own tools for the tests of monitoring/, from Debian's packages, without root
	mkdir -p $(VENV)/prometheus
	cd $(VENV)/prometheus && apt-get download prometheus prometheus-alertmanager
	for package in $(VENV)/prometheus/*.deb; do dpkg --extract $$package $(VENV)/prometheus || exit 1; done
	for tool in prometheus promtool amtool; do ln -sf ../prometheus/usr/bin/$$tool $(BIN)/$$tool; done

chromium: ## Debian's Chromium for the tests of the page; needs root
	apt-get install --yes --quiet --no-install-recommends chromium

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
