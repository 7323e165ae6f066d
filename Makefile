# make serve: the OpenAI API with BiTA on the embedded model.   make test: set up and test.   Both start from nothing.
PYTHON ?= python3
PORT ?= 8000
ARGS ?=

BIN := .venv/bin
ADAPTER := adapters/smollm2-135m-instruct
LADDER := .venv/ladder.json
# As `bita tune` chooses: bfloat16 only where the CPU multiplies it fast.
DTYPE = $$($(BIN)/python -c 'from bita_vllm.training.base_model import choose_dtype; print(choose_dtype("auto", "cpu"))')
# On few cores one process computes, on all of them: vLLM's engine process would wait for its worker's in a busy loop.
CORES := $(shell $(PYTHON) -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep=",")')
ONE_PROCESS := VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=$(CORES) OMP_NUM_THREADS=$(shell nproc)
# vLLM 0.32 cannot load on a CPU what it saves of a compiled model: without it a start takes Inductor's own cache.
# Intel's OpenMP (from the venv) and, where the system has it, tcmalloc: what vLLM advises on a CPU.
FAST := VLLM_USE_AOT_COMPILE=0 $(if $(filter 1 2 3 4,$(shell nproc)),$(ONE_PROCESS)) \
	LD_PRELOAD="$$(ls -d $(CURDIR)/.venv/lib/libiomp5.so $$(PATH="$$PATH:/sbin" ldconfig -p | \
	awk '/libtcmalloc_minimal\.so\.4 /{print $$NF; exit}') 2>/dev/null | paste -sd:)"
# vllm-cpu 0.32.0's own `vllm` command asks for the metadata of a distribution named vllm, which it is not.
VLLM_NAME = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info

.PHONY: venv model serve test matrix quality bench-cpu bench-steps bench-serving bench-kernels soak gpu-suite
.DELETE_ON_ERROR:

venv: .venv/dev.stamp

model: .venv/cpu.stamp
	$(BIN)/python -m bita_vllm.embedded

serve: model $(LADDER)
	$(FAST) $(BIN)/vllm serve "$$($(BIN)/python -m bita_vllm.embedded)" --served-model-name smollm2 \
		--speculative-config '{"method": "bita", "model": "$(ADAPTER)", "ladder": "$(LADDER)"}' \
		--dtype "$(DTYPE)" --max-model-len 2048 --gpu-memory-utilization 0.4 --port $(PORT) $(ARGS)

# Times steps on this machine, once: how many rows pay at which load, plain vLLM where none do.
$(LADDER): $(ADAPTER)/config.json .venv/cpu.stamp | model
	$(FAST) $(BIN)/bita tune $(ADAPTER) --model "$$($(BIN)/python -m bita_vllm.embedded)" \
		--requests 1 4 16 --rows 4 8 16 --out $@

GPU_TESTS := $(addprefix tests/e2e/test_,vllm_0_33.py gpu_runner.py mixed_steps.py launches.py gpu_faults.py gpu_suite.py \
	request_features.py ladder.py token_budget.py template_sets.py gpu_copies.py shipped_sets.py weight_reload.py tune.py structured_output.py \
	tensor_parallel.py lossless_architectures.py thinking_budget.py logits_processors.py async_budget.py matrix.py)
# A file goes to one worker, the longest first (tests/conftest.py). One thread each: two would wait for the other worker's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Kernels and the GPU runner are tested apart: Triton's interpreter holds for a whole process. All groups run, whatever fails.
test: venv
	failed=0; \
	$(PYTEST) --ignore tests/kernels $(ARGS) || failed=1; \
	$(PYTEST) tests/kernels $(ARGS) || failed=1; \
	$(PYTEST) --runner gpu $(GPU_TESTS) $(ARGS) || failed=1; \
	exit $$failed

# Every cell of the support matrix (docs/support.md) that the tests of CI leave out: several minutes a runner.
matrix: venv
	$(PYTEST) --dist load --matrix tests/e2e/test_matrix.py $(ARGS)
	$(PYTEST) --dist load --matrix --runner gpu tests/e2e/test_matrix.py $(ARGS)

quality: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy bita_vllm kernels
	$(BIN)/lint-imports --no-cache

bench-cpu: venv model
	$(FAST) $(BIN)/python benchmarks/cpu_throughput.py $(ARGS)

bench-steps: venv model
	$(FAST) $(BIN)/python benchmarks/steps_cpu.py $(ARGS)

# On a machine with a GPU: make bench-serving BIN=$$(dirname $$(which python3)) ARGS='--model ... --adapter ... --one-at-a-time'
bench-serving: $(if $(filter .venv/bin,$(BIN)),venv model)
	$(FAST) $(BIN)/python benchmarks/serving.py $(ARGS)

# 3000 mixed requests on the server that `make serve` starts, beside plain vLLM: half an hour or more on two cores.
soak: venv model $(LADDER)
	$(FAST) $(BIN)/python benchmarks/soak.py --ladder $(LADDER) $(ARGS)

bench-kernels: venv
	$(BIN)/python benchmarks/kernel_benchmark.py $(ARGS)

# On a machine with a GPU, with vLLM and this package installed, three commands of under nine minutes each:
#   make gpu-suite BIN=$$(dirname $$(which python3)) ARGS='--part tokens --out results'   (then throughput, steps)
# ARGS=--plan says what runs, and for how long; ARGS=--dry runs every part on a CPU, interpreted.
gpu-suite:
	$(BIN)/python benchmarks/gpu_suite.py $(ARGS)

# A stamp is as new as what was installed from: change a requirements file or pyproject.toml, and its step runs again.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/cpu.stamp: requirements/cpu.txt pyproject.toml setup.py | .venv/bin/python
	$(BIN)/pip install --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	mkdir -p $(VLLM_NAME)
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $(VLLM_NAME)/METADATA
	touch $@

.venv/dev.stamp: requirements/dev.txt .venv/cpu.stamp
	$(BIN)/pip install --no-deps -r requirements/dev.txt
	touch $@
