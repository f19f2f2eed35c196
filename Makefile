# The commands of the project. Each makes .venv when it needs one; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
TRITON ?=
BENCH_ARGS ?=
DEMO_ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# --no-build-isolation: an isolated build would fetch packages that the constraints do not reach.
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Two workers of one thread each: torch's own thread pools would fight over the cores with the workers. A test that
# hangs ends its worker, and so fails by name; the slowest takes half a minute.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --timeout 400 --timeout-method thread

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-interpreter test-ordinary lanes lanes-interpreter lanes-ordinary check lint types imports bench report wheel gpu clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@echo "== making $(VENV) with $$($(PYTHON) --version) (about two minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[torchao,demo,test,check]'
	@touch $@

demo: $(STAMP) ## QAT on real handwritten digits, torch.ao's modules against ours; then learned step sizes
	$(PY) examples/digits_qat.py $(DEMO_ARGS)
	$(PY) examples/digits_lsq.py $(DEMO_ARGS)

test: test-interpreter test-ordinary ## the whole test run (PYTEST_ARGS="-k minmax -x" narrows it)

test-interpreter: $(STAMP) ## tests with the Triton kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" $(PYTEST_ARGS)

test-ordinary: $(STAMP) ## tests without the interpreter: CPU path, compile, ahead-of-time compilation
	$(PYTEST) -m "not interpreter_only and not slow" $(PYTEST_ARGS)

# With TRITON=x.y.z the lanes run with that Triton, installed beside the environment and first on the path.
ifdef TRITON
OTHER_TRITON := build/triton-$(TRITON)
LANES := PYTHONPATH=$(CURDIR)/$(OTHER_TRITON)
LANES_NEED := $(OTHER_TRITON)/.installed
endif

lanes: lanes-interpreter lanes-ordinary ## the kernels' lanes alone; TRITON=3.8.0 with another Triton than the environment's

lanes-interpreter: $(STAMP) $(LANES_NEED)
	$(LANES) TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow" tests/lanes tests/ops $(PYTEST_ARGS)

lanes-ordinary: $(STAMP) $(LANES_NEED)
	$(LANES) $(PYTEST) -m "not interpreter_only and not slow" tests/lanes $(PYTEST_ARGS)

build/triton-%/.installed: | $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

check: lint types imports ## ruff, the type checker on the installed wheel, the direction of imports

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	PYTHON=$(PY) .ci/types

imports: $(STAMP)
	$(PY) -m pytest -q tests/test_import_direction.py

bench: $(STAMP) ## time every operator and module against torch's own (BENCH_ARGS=--quick for a glance, '--suite full' for everything)
	$(PY) -m benchmarks $(BENCH_ARGS)

report: $(STAMP) ## README, docs/benchmarks.md and plots from the JSON in benchmarks/results
	$(PY) -m benchmarks.plots
	$(PY) -m benchmarks.readme

wheel: $(STAMP) ## build dist/*.whl, by way of an sdist so that no stale build/lib is packed
	$(PY) -m build --no-isolation --outdir dist .

gpu: ## checks, tests, benchmarks and tuning on this machine's GPU, in ten minutes: make gpu OUT=dir
	@OUT='$(OUT)' .ci/gpu

clean: ## remove what these commands made, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
