# Two commands do all their own set-up in .venv: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# of bench-gpu: any Python with torch will do; IMAGES is an .npz with `images`, FEATURES are Inception's weights
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

.PHONY: demo test test-all check bench bench-gpu schema clean

demo: $(READY)
	@echo "make demo: photographs in, a registered model and samples out (3 to 6 minutes on two cores)"
	@$(BIN)/patchloom demo --out demo

test: $(READY)
	@echo "make test: all tests but the expensive ones"
	@$(BIN)/python -m pytest -q -m "not slow"

test-all: $(READY)
	@echo "make test-all: every test, the expensive ones too"
	@$(BIN)/python -m pytest -q

check: $(READY)
	@echo "make check: format, lint and types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(READY)
	@echo "make bench: every benchmark, beside its limit (most of an hour on two cores; patchloom benchmark --list)"
	@$(BIN)/patchloom benchmark --out benchmarks/results

bench-gpu:
	@echo "make bench-gpu: training on one GPU, within ten minutes; torch, numpy and safetensors are enough"
	@$(GPU_PYTHON) -m patchloom.benchmarks.gpu $(if $(IMAGES),--images $(IMAGES)) $(if $(FEATURES),--features $(FEATURES))

schema: $(READY)
	@$(BIN)/python -m patchloom.platform.recipe > tune_configs/recipe.schema.json

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "setting up .venv (once; a few minutes, most of them for torch)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)
