# `make` prints the targets. The first target that needs it creates .venv from requirements.lock;
# .venv belongs to make, which recreates it when requirements.lock changes.

# Candidates for the interpreter of .venv: the first that runs and is of a supported version.
PYTHON ?= python3.13 python3.12 python3.11 python3
# More arguments for the command behind a target: make train ARGS="--config.seed=1"
ARGS ?=
# The interpreter of `make test-gpu`: one whose JAX has a GPU, which the pinned JAX of .venv has not.
GPU_PYTHON ?= .venv/bin/python
# Images for `make verify-published`: a folder with a folder for each class. For
# `make show-preprocess` and `make bench-input`: any folder of images.
IMAGES ?=
# More arguments for pip where it installs PyTorch, such as an index that has it for CPUs alone.
TORCH_PIP_ARGS ?=
# Tests run in a process for each core; JAX needs some GB in each.
PARALLEL := -n logical --maxprocesses=4 --dist worksteal

# Bytecode is compiled on first use, not on installation: few of the installed modules are imported.
PIP_INSTALL := .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-compile
# One file for all supported versions of Python; pins that still fit are kept.
UV_COMPILE := build/uv/bin/uv pip compile -q --universal --python-version 3.11 --no-annotate \
  --no-emit-index-url --generate-hashes --no-python-downloads --custom-compile-command "make lock"

IS_SUPPORTED := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
FOUND_PYTHON = $(or $(shell for p in $(PYTHON); do \
  if "$$p" -c '$(IS_SUPPORTED)' >/dev/null 2>&1; then echo "$$p"; break; fi; done),$(error \
  no Python 3.11, 3.12 or 3.13 with venv found (tried: $(PYTHON)); name one: make PYTHON=/path/to/python3))

.PHONY: help train test test-all test-gpu chaos audit verify-published verify-torch show-preprocess golden bench-commands bench-input bench-step bench-gpu cifar-gpu lint docs lock clean
.DELETE_ON_ERROR:

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

train: .venv/project.stamp  ## train a small ViT on the digits in the package, on any CPU
	.venv/bin/python -m vit_jax.main --config=configs/digits.py --workdir=runs/digits $(ARGS)
	@echo "Next, fine-tune it at twice the resolution:"
	@echo "  .venv/bin/python -m vit_jax.main --config=configs/digits_finetune.py --workdir=runs/digits_finetune"

test: .venv/project.stamp  ## run the tests, without the slow ones
	.venv/bin/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-all: .venv/project.stamp .venv/test-all.stamp build/torch/timm.stamp build/tensorflow/cpu.stamp  ## run all tests that need no GPU; installs PyTorch and TensorFlow in build
	TORCH_PYTHON=build/torch/bin/python TF_PYTHON=build/tensorflow/bin/python .venv/bin/python -m pytest $(PARALLEL) -m "not gpu" $(ARGS)

test-gpu: $(if $(filter .venv/%,$(GPU_PYTHON)),.venv/project.stamp)  ## run the tests that need a GPU, with GPU_PYTHON=python
	JAX_PLATFORMS=cuda,cpu $(GPU_PYTHON) -m pytest -m gpu $(ARGS)

chaos: .venv/project.stamp  ## inject faults into small runs, and see that they recover (15 minutes)
	.venv/bin/python -m tools.chaos $(ARGS)

verify-published: .venv/project.stamp  ## fetch small published checkpoints and evaluate them on IMAGES=folder
	.venv/bin/python -m tools.verify_published $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

verify-torch: .venv/project.stamp build/torch/timm.stamp  ## install PyTorch and timm in build/torch, and compare logits
	TORCH_PYTHON=build/torch/bin/python .venv/bin/python -m pytest -m slow tests/test_torch.py $(ARGS)

show-preprocess: .venv/project.stamp  ## render what preprocessing makes of the images in IMAGES=folder
	.venv/bin/python -m tools.show_preprocess $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

golden: .venv/project.stamp  ## rewrite what the tests expect of configs/, and of shardings
	.venv/bin/python -m tools.config_dumps $(ARGS)
	.venv/bin/python -m tests.testdata.make_sharding_golden

bench-commands: .venv/project.stamp  ## time the start of the commands, beside an import of JAX
	.venv/bin/python -m benchmarks.commands $(ARGS)

bench-input: .venv/project.stamp build/torch/timm.stamp build/tensorflow/cpu.stamp build/shards/readers.stamp  ## compare the input pipeline with those of TensorFlow, timm, webdataset, datasets and spdl, on JPEGs made of IMAGES=folder
	.venv/bin/python -m benchmarks.input --tf_python=build/tensorflow/bin/python \
	  --torch_python=build/torch/bin/python --shards_python=build/shards/bin/python $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

bench-step: .venv/project.stamp build/torch/timm.stamp  ## compare the training step with those of a plain Flax ViT and of timm
	.venv/bin/python -m benchmarks.step --torch_python=build/torch/bin/python $(ARGS)

bench-gpu: $(if $(filter .venv/%,$(GPU_PYTHON)),.venv/project.stamp)  ## within 10 minutes on a GPU: predicted and measured steps; ARGS=--torch_python=python for timm
	JAX_PLATFORMS=cuda $(GPU_PYTHON) -m benchmarks.step --within=10 --rounds=3 --seconds=3 \
	  --variants B/16:128 L/16:64 S/16:256 --peers vit_jax timm_compile \
	  --levers vit_jax_xla_attention flax_plain vit_jax_bfloat16_moments vit_jax_no_triton \
	  vit_jax_float8 vit_jax_scan vit_jax_remat vit_jax_no_command_buffer \
	  --json=benchmarks/results/step_gpu.json $(ARGS)

cifar-gpu: $(if $(filter .venv/%,$(GPU_PYTHON)),.venv/project.stamp)  ## train cifar10.py:small for 200 epochs on a GPU, on SOURCE=folder:/data/cifar10
	JAX_PLATFORMS=cuda $(GPU_PYTHON) -m benchmarks.cifar10 --source=$(or $(SOURCE),cifar10) \
	  --size=small --workdir=runs/cifar10_small --least=90 \
	  --json=benchmarks/results/cifar10_small.json $(ARGS)

lint: .venv/project.stamp .venv/lint.stamp  ## check style and types: ruff, pyright, shellcheck, hadolint
	PATH="$$PWD/.venv/bin:$$PATH" PYRIGHT_PYTHON_IGNORE_WARNINGS=1 \
	  .venv/bin/python -m pre_commit run --all-files $(ARGS)

docs: .venv/project.stamp .venv/docs.stamp  ## make the site in build/docs; a link that leads nowhere fails
	JAX_PLATFORMS=cpu .venv/bin/python -m sphinx -q -W --keep-going -b html -c docs \
	  -d build/doctrees . build/docs $(ARGS)
	@echo "The site is in build/docs: open build/docs/index.html."

.PHONY: notebooks
notebooks: .venv/project.stamp .venv/test-all.stamp  ## run the notebooks, and keep what they show in them
	JAX_PLATFORMS=cpu .venv/bin/python -m tools.notebooks $(ARGS)

audit: build/audit/pip_audit.stamp  ## look up the pinned dependencies among known vulnerabilities; needs a network
	@test ! -e build/audit/bin/pip-audit || build/audit/bin/python -m tools.audit \
	  build/audit/bin/pip-audit requirements*.lock $(ARGS)

lock: build/uv/bin/uv  ## pin what setup.py asks for; with ARGS=--upgrade, the newest of it
	echo setuptools | $(UV_COMPILE) setup.py - --extra test -o requirements.lock $(ARGS)
	for extra in lint docs test-all; do \
	  test ! -f requirements-$$extra.lock || cp requirements-$$extra.lock build/$$extra.lock; \
	  $(UV_COMPILE) setup.py --extra $$extra -c requirements.lock -o build/$$extra.lock $(ARGS) && \
	  { echo "# Made by \`make lock\`: what the extra $$extra needs besides requirements.lock."; \
	    grep -vxFf requirements.lock build/$$extra.lock; } > requirements-$$extra.lock || exit 1; \
	done

clean:  ## remove .venv, build output and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache vit_jax/data/_jpeg.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/deps.stamp: requirements.lock
	@python="$(FOUND_PYTHON)" && echo "Creating .venv with $$python." && "$$python" -m venv --clear .venv
	@echo "Installing pinned dependencies (about a minute)."
	@$(PIP_INSTALL) --no-deps -r requirements.lock
	@touch $@

.venv/project.stamp: .venv/deps.stamp setup.py pyproject.toml vit_jax/data/_jpeg.c
	@echo "Installing vit_jax in editable mode."
	@$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

.venv/lint.stamp .venv/docs.stamp .venv/test-all.stamp: .venv/%.stamp: .venv/deps.stamp requirements-%.lock
	@echo "Installing what the extra $* needs, pinned."
	@$(PIP_INSTALL) --no-deps -r requirements-$*.lock
	@touch $@

build/uv/bin/uv:
	@python="$(FOUND_PYTHON)" && echo "Installing uv in build/uv." && "$$python" -m venv --clear build/uv
	@build/uv/bin/python -m pip install -qq --disable-pip-version-check uv

build/audit/pip_audit.stamp:
	@python="$(FOUND_PYTHON)" && "$$python" -m venv --clear build/audit
	@build/audit/bin/python -m pip install -qq --no-input --disable-pip-version-check pip-audit \
	  || { echo "Nothing was audited: pip-audit could not be installed, which needs a network." >&2; exit 0; }
	@test ! -e build/audit/bin/pip-audit || touch $@

build/torch/timm.stamp:
	@python="$(FOUND_PYTHON)" && echo "Installing PyTorch and timm in build/torch (minutes)." && "$$python" -m venv --clear build/torch
	@build/torch/bin/python -m pip install -qq --no-input --disable-pip-version-check \
	  $(TORCH_PIP_ARGS) torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 \
	  || { echo "PyTorch and timm could not be installed: that needs a network, or settings of pip" \
	  "(TORCH_PIP_ARGS) with which it finds them." >&2; exit 1; }
	@build/torch/bin/python -c "import timm, torchvision.ops, transformers" || { echo "build/torch can't import timm:" \
	  "torch and torchvision must come from one index, both for CUDA or both for CPUs." >&2; exit 1; }
	@touch $@

build/shards/readers.stamp:
	@python="$(FOUND_PYTHON)" && echo "Installing webdataset, datasets and spdl in build/shards (minutes)." && "$$python" -m venv --clear build/shards
	@build/shards/bin/python -m pip install -qq --no-input --disable-pip-version-check \
	  webdataset datasets spdl Pillow \
	  || { echo "webdataset, datasets and spdl could not be installed: that needs a network." >&2; exit 1; }
	@build/shards/bin/python -c "import spdl.io; spdl.io.ImageFrames" || { echo "build/shards can't import spdl.io:" \
	  "it needs the shared libraries of FFmpeg (Debian: ffmpeg)." >&2; exit 1; }
	@touch $@

build/tensorflow/cpu.stamp:
	@python="$(FOUND_PYTHON)" && echo "Installing TensorFlow in build/tensorflow (minutes)." && "$$python" -m venv --clear build/tensorflow
	@build/tensorflow/bin/python -m pip install -qq --no-input --disable-pip-version-check \
	  tensorflow-cpu || { echo "TensorFlow could not be installed: that needs a network." >&2; exit 1; }
	@touch $@
