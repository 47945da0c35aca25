# Every target creates .venv and installs what it needs. VENV=/path uses another environment, and
# installs the pinned versions into it.
VENV ?= .venv
# the first that runs and can make environments: a name on PATH may do neither
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
	$(shell $(p) -c 'import ensurepip, venv' 2>/dev/null && echo $(p))) python3)
PINS := constraints.txt constraints-latest.txt
# test-vllm: a real vLLM on the CPU, in an environment of its own
VENV_VLLM ?= .venv-vllm
# test-latest: the newest tested Megatron-Core, which needs Python 3.12, in an environment of its own
VENV_LATEST ?= .venv-latest
PYTHON_LATEST ?= python3.12
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.megatron_occ_installed

.PHONY: install demo test test-latest test-vllm test-unit gpu-check lint format clean

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml $(PINS) tools/install.py
	@test -x $(BIN)/python || $(PYTHON) tools/install.py --create $(VENV)
	$(BIN)/python tools/install.py
	@touch $@

demo: $(INSTALLED)
	$(BIN)/megatron-occ demo $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tools/test_all.py $(ARGS)

test-latest:
	@test -x $(VENV_LATEST)/bin/python || $(PYTHON_LATEST) --version || { \
		echo "test-latest needs Python 3.12: make test-latest PYTHON_LATEST=/path/to/python3.12"; \
		exit 1; }
	$(MAKE) test VENV=$(VENV_LATEST) PYTHON=$(PYTHON_LATEST)

# not part of test: minutes and gigabytes, see docs/rollout-servers.md
test-vllm: $(INSTALLED)
	@if $(BIN)/python tools/vllm_environment.py $(VENV_VLLM); then \
		VLLM_ENVIRONMENT=$(abspath $(VENV_VLLM)) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/vllm $(ARGS); \
	else \
		echo "Skipped: vLLM's build for CPUs can't be installed here, see above."; \
	fi

test-unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit $(ARGS)

# on a machine with a GPU; ARGS=--rehearse: every section at toy size on the CPU
gpu-check: $(INSTALLED)
	$(BIN)/python tools/gpu_check.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what was made here by default: never runs/, nor an environment that VENV= names
clean:
	rm -rf .venv .venv-latest .venv-vllm build *.egg-info .pytest_cache .ruff_cache
	find benchmarks examples megatron_occ tests tools -name __pycache__ -prune -exec rm -rf {} +
