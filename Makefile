# Two commands do everything: `make run` and `make test`.
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
DATA ?= ./var
BIN := .venv/bin

.PHONY: run test check format bench chaos images clean

run: .venv/run.stamp
	@SAFELIGHT_HOST=$(HOST) SAFELIGHT_PORT=$(PORT) SAFELIGHT_DATA=$(DATA) exec $(BIN)/safelight up

test: check
	$(BIN)/pytest -q

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Set-up: pip into .venv with the constraints file. Without a GPU the CPU index is used where it answers.
.venv/pip.stamp:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run.stamp: .venv/pip.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(BIN)/python deploy/torch_index.py) --editable ".[api,worker]"
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[api,worker,train,dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
