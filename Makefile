# `make demo` and `make test` set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FAKE_CUDA := .venv-fake-cuda
LOWEST := .venv-lowest
# A test compares its Inception with ours. It needs torchvision, which must fit torch, so it is installed without it, and where
# no import finds it: torchmetrics would import it, and fail.
TORCH_FIDELITY := torch-fidelity==0.4.0
# For test-gpu and bench-gpu: GPU_PYTHON is any Python with torch, IMAGES an .npz with `images`, FEATURES the weights of Inception.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

.PHONY: demo test test-cluster test-pages test-gpu test-fake-cuda test-lowest test-all check docs bench bench-gpu schema dist lock audit clean

demo: $(READY)
	@echo "make demo: from photographs to a registered model and samples (3 to 6 minutes on two cores)"
	@$(BIN)/patchloom demo --out demo

test: $(READY)
	@echo "make test: all tests except the slow ones"
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow and not cluster and not gpu and not fake_cuda"

test-cluster: $(READY)
	@echo "make test-cluster: commands and faults on a cluster of separate machines (Linux, root, iproute2 and PostgreSQL)"
	@$(BIN)/python -m pytest -q -rs tests/cluster

test-pages: $(READY)
	@echo "make test-pages: every kind of page in a headless Chromium, at 1280 and 400 pixels; says so where there is no Chromium"
	@$(BIN)/python -m pytest -q -rs -m pages tests

# without the fixtures of the other tests, which need Ray and MLflow
test-gpu:
	@echo "make test-gpu: a GPU compared with the CPU, within ten minutes; needs torch, numpy, safetensors and pytest"
	@$(GPU_PYTHON) -m pytest -q -m gpu --confcutdir=tests/gpu tests/gpu

test-fake-cuda: $(FAKE_CUDA)/.ready
	@echo "make test-fake-cuda: steps and sampling on GPUs that are not there, in all precisions (2 to 4 minutes)"
	@$(FAKE_CUDA)/bin/python -m pytest -q tests/fake_cuda

# the lower bounds in pyproject.toml, with the newest versions of what these need
test-lowest: $(LOWEST)/.ready
	@echo "make test-lowest: networks, datasets and training with the oldest versions that pyproject.toml allows"
	@CUDA_VISIBLE_DEVICES= $(LOWEST)/bin/python -m pytest -q -m "not slow and not ray and not gpu" tests/models tests/platform/dataset tests/pipelines/train/test_train.py

test-all: $(READY)
	@echo "make test-all: all tests, including the slow ones"
	@$(BIN)/python -m pytest -q

check: $(READY)
	@echo "make check: format, lint and types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: $(READY)
	@echo "make docs: the documentation as a site in site/, with warnings as errors; no network needed"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(READY)
	@echo "make bench: all benchmarks (about an hour on two cores; patchloom benchmark --list shows them)"
	@$(BIN)/patchloom benchmark --out benchmarks/results

bench-gpu:
	@echo "make bench-gpu: training and sampling on one GPU, within ten minutes; needs torch, numpy and safetensors"
	@$(GPU_PYTHON) -m patchloom.benchmarks.gpu $(if $(IMAGES),--images $(IMAGES)) $(if $(FEATURES),--features $(FEATURES))

schema: $(READY)
	@$(BIN)/python -m patchloom.platform.recipe > tune_configs/recipe.schema.json
	@$(BIN)/python -m patchloom.pipelines.recipes --costs > tune_configs/.costs && mv tune_configs/.costs tune_configs/recipe_costs.json

# what the nodes of a cluster install (ray_cluster.yaml, deploy/)
dist: $(READY)
	@rm -rf dist build
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@cp constraints.txt dist/

# all packages with their checksums, and a look at the database of known vulnerabilities; both need a network
lock: $(READY)
	@$(BIN)/python deploy/lock.py lock

audit: $(READY)
	@$(BIN)/python deploy/lock.py audit

clean:
	rm -rf site .venv $(FAKE_CUDA) $(LOWEST) .mypy_cache .pytest_cache .ruff_cache *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "$(PYTHON) is Python " + sys.version.split()[0] + ", and Patchloom needs 3.11 or newer: run make PYTHON=python3.11 ...")'
	@echo "setting up .venv (once; a few minutes, mostly for torch)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/torch-fidelity $(TORCH_FIDELITY)
	@touch $(READY)

$(FAKE_CUDA)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(FAKE_CUDA) (once; a download of about 3 GB: torch with CUDA, which needs no GPU)"
	@$(PYTHON) -m venv $(FAKE_CUDA)
	@$(FAKE_CUDA)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest pytest-xdist
	@$(FAKE_CUDA)/bin/python -c 'import sys, torch; sys.exit(None if torch.version.cuda else "torch " + torch.__version__ + " was built without CUDA: run this on Linux, with the torch of PyPI")'
	@touch $(FAKE_CUDA)/.ready

$(LOWEST)/.ready: pyproject.toml
	@echo "setting up $(LOWEST) (once; a download of about 3 GB on Linux: torch of PyPI comes with CUDA)"
	@$(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e . "pytest>=8" "pytest-xdist>=3.6" "torchmetrics>=1.8" "moto[server]>=5" "lmdb>=1.6"
	@touch $(LOWEST)/.ready
