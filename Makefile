VENV := .venv
PY := $(VENV)/bin/python

# Tests start many processes, and each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
# In the order of tests/conftest.py: long files first.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-oldest check dist bench gpu format clean

# The marker is touched when the environment matches pyproject.toml and constraints.txt.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(PY) || python3.12 -m venv $(VENV) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[megatron,hf,train,report,data,test,dev]'
	touch $@

demo: $(VENV)/.ready
	$(VENV)/bin/dsv4 demo

test: $(VENV)/.ready
	$(PY) -m pytest $(SHARED)

# Those of many processes or many steps too.
test-all: $(VENV)/.ready
	$(PY) -m pytest $(SHARED) -m ""

# The oldest versions that pyproject.toml allows, and what of the tests meets other libraries most.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/test_versions.py tests/codec tests/convert/test_roundtrip.py tests/convert/test_transformers.py \
	$(addprefix tests/mcore/test_, forward.py generate.py attend.py names.py weights.py index_triton.py pool_triton.py) \
	tests/parity/test_parity.py tests/lora tests/train/test_after_training.py \
	$(addprefix tests/store/test_, config.py hub.py torch_dist_megatron.py torch_dist_writing.py)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || python3.12 -m venv $(OLDEST) || python3 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt \
		--editable '.[megatron,hf,train,report,data,test]'
	touch $@

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(SHARED) $(OLDEST_TESTS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff format --check src tests benchmarks docs/generate.py
	$(VENV)/bin/ruff check src tests benchmarks docs/generate.py
	$(VENV)/bin/pyright src
	$(VENV)/bin/shellcheck examples/slurm/*.sh

format: $(VENV)/.ready
	$(VENV)/bin/ruff format src tests benchmarks docs/generate.py
	$(VENV)/bin/ruff check --fix src tests benchmarks docs/generate.py

bench: $(VENV)/.ready
	$(PY) -m pip install --quiet --no-deps megatron-bridge==0.6.2
	$(PY) benchmarks/codecs.py
	$(PY) benchmarks/multiply.py
	$(PY) benchmarks/layer.py
	$(PY) benchmarks/model.py
	$(PY) benchmarks/model_memory.py

# Tests and measurements for a machine with a GPU, in build/gpu; they run here where this is one.
gpu: $(VENV)/.ready
	$(PY) benchmarks/pack_gpu.py
	if nvidia-smi -L >/dev/null 2>&1; then OUT=build/gpu/out $(PY) build/gpu/run_gpu.py; fi

# A wheel and a source distribution, and the wheel tried in clean environments (EXTRAS="none megatron,hf").
EXTRAS := none
dist: $(VENV)/.ready
	rm -rf dist
	$(PY) -m build --outdir dist .
	$(PY) .ci/try_wheel.py dist/*.whl $(EXTRAS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist src/*.egg-info

.PHONY: docs
docs: $(VENV)/.ready
	$(PY) docs/generate.py
