# SPDX-License-Identifier: GPL-2.0-or-later
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml meson.build README.md LICENSE $(wildcard plugin/*) \
	$(shell find qmp_upm policies -name '*.py' -o -name py.typed)

.DEFAULT_GOAL := help
.PHONY: help demo test bench mutants lab lint build packages clean

help: ## Say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'


demo: build ## Run a guest under each policy, on real KVM, and print what it cost
	$(BIN)/python -m tests.lab compare --workload ovmf --out demo-results

test: build ## Run all tests
	$(BIN)/pytest



bench: build ## Measure the table of benchmarks/RESULTS.md; a quarter of an hour on a quiet machine
	$(BIN)/python -m benchmarks

mutants: build ## Change the plugin's code in every way that some test must notice; an hour or two
	$(BIN)/python -m tests.plugin.mutants

lab: build ## Build the lab: kernel, guest and test-only preload
	$(BIN)/python -m tests.lab build

lint: build ## Check style and types
	$(BIN)/pytest tests/unit/test_linters.py

build: packages $(VENV)/installed ## Install what is missing, then the project into .venv

packages:
	@PYTHON="$(PYTHON)" sh tests/lab/packages.sh

# With the build tools in .venv, so that what pip builds once it need not fetch again.
$(VENV)/tools: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'meson-python>=0.17' 'meson>=1.4' ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation ".[test]"
	@touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	@echo 'Building and installing qmp-upm into $(VENV)'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps .
	@touch $@

clean: ## Remove what was built here (the lab's kernel stays in the user's cache)
	rm -rf $(VENV) build
