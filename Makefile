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
.PHONY: help setup demo test test-colab test-lower test-browser notebooks lab export docs-readme readme-film panel-pictures site-preview clean

help: ## this list
	@echo 'tokenflow_nb: edit a video with a text prompt, and see why the method works'
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
FRESH := scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	export HF_HUB_OFFLINE=1 HF_HOME="$$scratch/hf" TOKENFLOW_HOME="$$scratch/cache" IPYTHONDIR="$$scratch/ipython" JUPYTER_RUNTIME_DIR="$$scratch/runtime"

# Two notebooks at a time with one thread each, then two files of tests at a time. All notebooks are committed executed: a test fails when one
# is older than its code (`make notebooks` runs those). Tutorials are not run here, except the first one with Colab's versions.
test: setup ## what CI runs: export is clean, notebooks, pytest, Colab's versions
	@$(BIN)/python .ci/check_export.py
	@$(FRESH) && \
	echo 'Notebooks' && OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --skip_folder_re '^([_.]|tutorials$$)' && \
	echo 'pytest' && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	@$(MAKE) --no-print-directory test-colab

# Environments with other versions than .venv; what that is, .ci/environment.py says. Plugins of pytest that the packages of .venv
# announce would be looked for in older packages.
.venv-%/.installed: .venv/.installed .ci/environment.py .ci/colab.txt
	@echo "Setting up .venv-$* (a minute or two, once)"
	@$(BIN)/python .ci/environment.py $*
	@touch $@

test-colab: ## the panels and the first tutorial with Colab's versions, which installing must not change
test-lower: ## the same with the lower bounds of pyproject.toml
test-colab test-lower: test-%: setup .venv-%/.installed
	@echo 'Panels, imports and the first tutorial in .venv-$*' && $(FRESH) && \
	.venv-$*/bin/python .ci/import_time.py && \
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -p pytest_timeout -p xdist.plugin -n 2 --dist loadfile tests/test_panel_*.py && \
	.venv-$*/bin/python .ci/run_notebooks.py --check tutorials/01

test-browser: setup ## the panels' stories in JupyterLab and chromium; takes minutes
	@TOKENFLOW_TEST_BROWSER=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/browser

lab: setup ## JupyterLab, with the notebook to start with
	@$(BIN)/jupyter lab nbs/start_here.ipynb

export: setup ## modules from notebooks, then notebooks without clutter
	@$(BIN)/python .ci/split_imports.py
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

notebooks: setup ## run the notebooks and tutorials whose outputs are stale, and save them
	@$(FRESH) && $(BIN)/python .ci/run_notebooks.py

docs-readme: setup ## README.md from nbs/index.ipynb (no Quarto needed)
	@$(BIN)/python .ci/readme.py

readme-film: setup ## the moving picture of README.md, made anew (minutes)
	@$(BIN)/python .ci/film.py

panel-pictures: setup ## the pictures of the panels, made anew in chromium (minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python .ci/pictures.py

site-preview: setup ## every page as plain HTML in _docs/ (no Quarto needed)
	@$(FRESH) && $(BIN)/python .ci/website.py preview

clean: ## remove what the other targets made, except the environments
	@rm -rf demo _proc _docs build dist .pytest_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
