# make run    sets everything up and runs the main job: pre-train, transfer, register, predict
# make test   sets everything up and runs all tests
# make coverage  the same, with the share of the lines that ran
# make lint   format, lint, types and import arrows, as in CI
# make lock   writes what VENV has into clusters/container/requirements.lock, with hashes; make audit asks about it
# make wheel  puts a wheel into dist/ that needs no compiler where it is installed: libjpeg-turbo is inside
#
# PYTHON is the interpreter the environment is made from, VENV where it goes; its path may have no space, as Ray would
# split it there when it starts a worker, and wait for ever.

PYTHON ?= python3
VENV ?= .venv
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Modules are compiled when they are first imported, as pip leaves that out; set, each process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE
export PIP_ROOT_USER_ACTION = ignore

# What the environment is installed from: the C extension is built with it.
SOURCES = pyproject.toml setup.py bit_ray/data/images/_jpeg.c bit_ray/data/images/_markers.h bit_ray/data/images/_resize.h

.PHONY: run test coverage lint wheel lock lock-resolves audit
.DEFAULT_GOAL := run

run: $(VENV)/.installed
	$(VENV)/bin/python jobs/quickstart.py

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --cov --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist/built .
	PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --wheel-dir dist dist/built/*.whl
	rm -rf dist/built

LOCK = clusters/container/requirements.lock

# For every Python from 3.11 on and every platform, by markers; torch is PyPI's, with CUDA.
lock: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pip freeze --exclude-editable >$(VENV)/freeze.txt
	$(VENV)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --constraint $(VENV)/freeze.txt \
	  --generate-hashes --no-header --no-annotate --quiet --output-file $(LOCK)

# That the index has these versions with these hashes, and that they fit together. Nothing is installed.
lock-resolves: $(VENV)/.installed-dev
	$(VENV)/bin/uv pip install --dry-run --quiet --require-hashes --requirement $(LOCK) --target $(VENV)/none \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_31

# Known vulnerabilities; it needs the network and is no part of CI. Strict, or packages that cannot be asked about pass.
audit: $(VENV)/.installed-dev
	$(VENV)/bin/uvx pip-audit --strict --disable-pip --require-hashes --requirement $(LOCK)

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/pip
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $(VENV)/.installed $@

# Debian's python3 without python3-venv makes no pip; then the pip outside puts one in.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: PYTHON: given $(PYTHON) ($$($(PYTHON) --version 2>&1)); accepted: Python 3.11 or newer;" \
	         "run make PYTHON=python3.11" >&2; exit 1; }
	@case "$(VENV)" in /*) path="$(VENV)" ;; *) path="$(CURDIR)/$(VENV)" ;; esac; case "$$path" in *" "*) \
	  echo "error: VENV: given $$path; accepted: a path without spaces, as Ray starts no worker there;" \
	       "move the folder, or run make VENV=/some/other/place" >&2; exit 1 ;; esac
	@echo "Setting up $(VENV): about 6 GB and two minutes, once."
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; } || \
	  { rm -rf $(VENV); echo "error: no virtual environment can be made; install python3-venv or pip" >&2; exit 1; }
