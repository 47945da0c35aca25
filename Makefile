# Every target creates .venv and installs what it needs. VENV=/path uses another environment.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.megatron_occ_installed

.PHONY: install demo test test-unit lint format clean

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt tools/install.py
	@test -x $(BIN)/python || $(PYTHON) tools/install.py --create $(VENV)
	$(BIN)/python tools/install.py
	@touch $@

demo: $(INSTALLED)
	$(BIN)/megatron-occ demo $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
