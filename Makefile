# vidgen: `make help` says what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# One thread is many times faster than two for models as small as the shipped ones.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# PYTHON=/path/to/python3.12 chooses an interpreter; without it the first that is new enough
PYTHON ?=

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r name what; do printf '  make %-9s %s\n' "$$name" "$$what"; done

$(READY): pyproject.toml
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; done; \
	[ -n "$${found:-}" ] || { echo "vidgen needs Python 3.11 or newer, and $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1 || true). Install one, then: make PYTHON=/path/to/python3.12 …"; exit 1; }; \
	[ -x $(BIN)/python ] || { echo "making $(VENV) with $$("$$found" --version)"; "$$found" -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$$found can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }; }
	@echo "installing vidgen and its laboratory into $(VENV): PyTorch is large, allow some minutes (log: $(VENV)/install.log)"
	@SECONDS=0; $(BIN)/python -m pip install --progress-bar off -e '.[lab,dev]' > $(VENV)/install.log 2>&1 \
	  || { tail -n 15 $(VENV)/install.log; echo "the install failed; the whole log is $(VENV)/install.log. Disk full? PyTorch with CUDA takes about 6 GB."; exit 1; }; \
	  echo "installed in $$SECONDS s"
	@touch $@

.PHONY: demo evaluate serve test services test-services soak lab export lint clean
demo: $(READY) ## make .venv, install, and turn a prompt into a measured clip
	@HF_HUB_OFFLINE=1 $(BIN)/vidgen sweep experiments/001_first_clip --preset cpu --force

evaluate: $(READY) ## clips of the shipped model, all metrics, and a report
	@HF_HUB_OFFLINE=1 $(BIN)/vidgen sweep experiments/010_evaluate --preset cpu --force

serve: $(READY) ## the service on 127.0.0.1:8000: a page to try it, its API at /docs
	@HF_HUB_OFFLINE=1 $(BIN)/vidgen serve

test: $(READY) ## everything CI checks (make test STEPS="lint pytest" runs some of it)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/suite.py $(STEPS)

$(VENV)/.track: $(READY)
	@echo "installing the trackers and Ray into $(VENV)"
	@$(BIN)/python -m pip install --progress-bar off -e '.[track,ray]' > $(VENV)/track.log 2>&1 || { tail -n 15 $(VENV)/track.log; exit 1; }
	@touch $@

$(VENV)/.services: $(READY)
	@echo "installing what drives the browser and fuzzes the API into $(VENV)"
	@$(BIN)/python -m pip install --progress-bar off -e '.[services]' > $(VENV)/services.log 2>&1 || { tail -n 15 $(VENV)/services.log; exit 1; }
	@touch $@

# program:package of Debian, for all that test-services needs; what is not there of it
SERVERS := initdb:postgresql redis-server:redis-server promtool:prometheus chromium:chromium cc:build-essential
ABSENT = $$(for pair in $(SERVERS); do program=$${pair%%:*}; command -v "$$program" >/dev/null || ls /usr/lib/postgresql/*/bin/"$$program" >/dev/null 2>&1 || echo "$$pair"; done)

services: ## install what test-services needs from Debian: PostgreSQL, Redis, Prometheus (promtool), Chromium, a C compiler
	@absent="$(ABSENT)"; [ -n "$$absent" ] || { echo "all there: $(SERVERS)"; exit 0; }; \
	command -v apt-get >/dev/null || { echo "missing (program:package of Debian):" $$absent; echo "without apt-get: install them by hand, then \`make test-services\`"; exit 1; }; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; echo "installing" $$absent; \
	$$sudo apt-get update -q || true; for pair in $$absent; do $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$${pair#*:}" || true; done; \
	absent="$(ABSENT)"; [ -z "$$absent" ] || { echo "could not be installed (program:package of Debian):" $$absent; exit 1; }

test-services: $(VENV)/.services ## tests against private servers on loopback: PostgreSQL, Redis, a browser
	@absent="$(ABSENT)"; [ -z "$$absent" ] || { echo "missing (program:package of Debian):" $$absent; echo "\`make services\` installs them; nothing was tested"; exit 1; }
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "services and not slow" -n auto --maxprocesses 4 --dist loadfile --durations=8 tests

soak: $(VENV)/.track $(VENV)/.services ## the slow tests: the classic flow engine, real trackers, workers and trials of Ray, kill loops, 120,000 random events
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow tests

lab: $(READY) ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs/index.ipynb

export: $(READY) ## notebooks -> cleaned notebooks, vidgen/*.py and README.md
	@$(BIN)/python tests/suite.py --write

clean: ## remove .venv, caches and builds; runs/ and artifacts/ stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
	@echo "removed; your runs/ and artifacts/ are untouched"
