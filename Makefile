# Two commands do everything: `make run` and `make test`.
PYTHON ?= python3
PORT ?= $(or $(SAFELIGHT_PORT),8000)
# Not ?=, for shells and conda export a HOST of their own; `make run HOST=...` still wins.
HOST := $(or $(SAFELIGHT_HOST),127.0.0.1)
DATA ?= $(or $(SAFELIGHT_DATA),./var)
BIN := .venv/bin

.PHONY: run test bench chaos check format servers clean

run: .venv/run.stamp
	@SAFELIGHT_HOST=$(HOST) SAFELIGHT_PORT=$(PORT) SAFELIGHT_DATA=$(DATA) exec $(BIN)/safelight up

test: check servers tests/node/node_modules tests/litellm/.venv/ready
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not alone and not images and not gpu"
	$(BIN)/pytest -q -m alone

# The benchmarks, twenty-five minutes, into benchmarks/results/ and docs/benchmarks.md: make bench BENCH="mixed alone"
# for some of them, BENCH=--help for their names.
BENCH ?=
bench: .venv/dev.stamp
	$(BIN)/python -W ignore -m benchmarks $(BENCH)

# The full run of faults, five minutes and more: make chaos CHAOS="--seed 7 --jobs 1000", --help for all of them.
CHAOS ?=
chaos: .venv/dev.stamp servers
	$(BIN)/python -m tests.chaos $(CHAOS)

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Servers that tests run against and PyPI does not have; on Debian and Ubuntu, as root, they are installed here.
APT := redis-server:redis-server promtool:prometheus faketime:faketime
servers:
	@missing=""; for pair in $(APT); do \
	  command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair##*:}"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	  else echo "make test needs these Debian packages (or their like):$$missing" >&2; exit 1; fi; fi

# What the tests take from npm; node itself comes as a wheel.
tests/node/node_modules: tests/node/package.json tests/node/package-lock.json | .venv/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --prefix tests/node --no-audit --no-fund --silent
	@touch $@

# litellm pins older libraries than ours: a venv of its own, as its users have it.
tests/litellm/.venv/ready: tests/litellm/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

# Set-up: pip into .venv with the constraints file. Without a GPU the CPU index is used where it answers.
.venv/pip.stamp:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run.stamp: pyproject.toml constraints.txt | .venv/pip.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(BIN)/python deploy/torch_index.py) --editable ".[api,worker]"
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[api,worker,train,bench,dev]"
	@touch $@

-include deploy/images.mk

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
