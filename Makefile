# `make` alone says what there is. Needs Python 3.11 or newer and nothing else: PYTHON=python3.12 make demo
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

# A CPU machine must not download gigabytes of CUDA. PyTorch's own index has the CPU build under the same number with a
# local label, 2.13.0+cpu; pip ranks that above the plain 2.13.0 of PyPI. Where the index cannot be reached, pip says so
# and takes what it finds elsewhere; one retry and a short time-out, so that it never hangs. --no-deps asks that index
# for torch alone. With a GPU, PyPI's build is the right one.
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-widgets7 test-browser lab export docs-readme clean

help: ## this list
	@echo 'tokenflow_nb: edit a video by a sentence, and see why it works'
	@awk -F ':[^#]*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## .venv with everything in it (the other targets call this)

# The stamp is touched last: an interrupted set-up runs again, a finished one only after pyproject.toml has changed.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		v >= (3, 11) or sys.exit(f"tokenflow_nb needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: PYTHON=python3.12 make")'
	@echo 'Setting up .venv (a few minutes, once)'
	@$(PYTHON) -m venv .venv
	@if command -v nvidia-smi >/dev/null 2>&1; \
		then $(PIP) --no-deps '$(TORCH)'; \
		else $(PIP) --no-deps '$(TORCH)' $(CPU_INDEX); fi
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: setup ## edit the built-in clip; results in demo/
	@$(BIN)/tokenflow_nb demo --out demo

# All that a run reads and writes beside the tree lies in one fresh folder: no user's cache, profile or model decides a test.
# Two notebooks at a time with one thread each, then pytest with both cores.
test: setup ## what CI runs: export is clean, notebooks, pytest
	@$(BIN)/python .ci/check_export.py
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	export HF_HUB_OFFLINE=1 HF_HOME="$$scratch/hf" TOKENFLOW_HOME="$$scratch/cache" IPYTHONDIR="$$scratch/ipython" && \
	echo 'Notebooks' && OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 && \
	echo 'pytest' && OMP_NUM_THREADS=2 $(BIN)/python -m pytest && \
	$(MAKE) --no-print-directory test-widgets7

# Colab still has ipywidgets 7.7.1. These versions lie in an environment of their own, before everything else of .venv, which a
# path file puts behind them: no second torch.
WIDGETS7 := ipywidgets==7.7.1 ipykernel==6.17.1 ipython==7.34.0 traitlets==5.7.1 anywidget==0.9.21 jupyter_client==7.4.9 tornado==6.5.7

.venv-widgets7/.installed: .venv/.installed
	@echo "Setting up .venv-widgets7 (a minute, once)"
	@rm -rf .venv-widgets7 && $(BIN)/python -m venv .venv-widgets7
	@.venv-widgets7/bin/python -m pip install --quiet --disable-pip-version-check --no-input $(WIDGETS7)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))' && \
		{ $(BIN)/python -c "$$site"; pwd; } > "$$(.venv-widgets7/bin/python -c "$$site")/behind.pth"
	@touch $@

test-widgets7: setup .venv-widgets7/.installed ## the panels' tests with ipywidgets 7.7.1, Colab's
	@echo 'Panels with ipywidgets 7' && \
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	export HF_HUB_OFFLINE=1 HF_HOME="$$scratch/hf" TOKENFLOW_HOME="$$scratch/cache" IPYTHONDIR="$$scratch/ipython" && \
	OMP_NUM_THREADS=2 .venv-widgets7/bin/python -m pytest tests/test_panel_*.py

test-browser: setup ## the panels' stories in JupyterLab and chromium; takes minutes
	@TOKENFLOW_TEST_BROWSER=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/browser

lab: setup ## JupyterLab on nbs/
	@$(BIN)/jupyter lab nbs

export: setup ## modules from notebooks, then notebooks without clutter
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

docs-readme: setup ## README.md from nbs/index.ipynb (no Quarto needed)
	@$(BIN)/python .ci/readme.py

clean: ## remove what the other targets made, except the environments
	@rm -rf demo _proc _docs build dist .pytest_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
