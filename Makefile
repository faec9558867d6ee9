# Two commands from a fresh machine with Python 3.11:
#
#   make train   make the environment and the data set, train and prune, evaluate the checkpoint
#   make test    make the environment, run the tests
#   make quick   torch alone: prune a small network, train it on and export it, in three minutes
#
# Others: test-fast (the core's tests, in under a minute), lint, docs (the pages as a site, in build/site),
# install (the environment alone), browser (Chromium for the tests of pages, which are skipped without it),
# clean (what the commands made), distclean (the environments too).

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check

# The first that runs and is 3.11; where none is, python3, for the error to name its version.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,\
	$(shell $(p) -c 'import sys; sys.version_info[:2] == (3, 11) and print("$(p)")' 2>/dev/null)) python3)

CONFIG := configs/faster_rcnn_prune.py
WORK_DIR := work_dirs/faster_rcnn_prune
DATA := data/shapes

# ninja is found by its name, so the environment's programs come first.
export PATH := $(BIN):$(PATH)
# One compiler a core: mmcv's setup.py starts four at least, with up to 2 GB each.
export MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

# By their file, since mmcv itself can't be imported until the rest of the stack is there.
define LOAD_MMCV_OPS
import sys, sysconfig, torch
sys.path.append(sysconfig.get_path("platlib") + "/mmcv")
import _ext
endef
export LOAD_MMCV_OPS

.PHONY: help quick install data train test test-fast lint docs browser clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# --- the environment: one stamp a stage, left only by a stage that went through ---------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "Python 3.11 is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
			"Name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: requirements.txt $(VENV)/.made
	@echo "== torch, and what mmcv is compiled with"
	$(PIP) install -c requirements.txt torch setuptools wheel ninja numpy
	@touch $@

$(VENV)/.mmcv: $(VENV)/.torch
	@echo "== mmcv: compiled once, which takes about 15 minutes on 2 cores; pip keeps the result"
	MMCV_WITH_OPS=1 $(PY) tools/show_build.py $(VENV)/mmcv-build.log \
		$(PIP) install -v -c requirements.txt --no-deps --no-build-isolation mmcv
	@$(PY) -c "$$LOAD_MMCV_OPS" || { \
		echo "The ops of mmcv don't load: pip may have kept a build for another torch. Remove it with" >&2; \
		echo "  $(VENV)/bin/pip cache remove mmcv; $(VENV)/bin/pip uninstall -y mmcv" >&2; exit 1; }
	@touch $@

$(VENV)/.stack: requirements.txt $(VENV)/.mmcv
	@echo "== the rest of the stack"
	$(PIP) install -q --no-deps -r requirements.txt
	@touch $@

$(VENV)/.project: pyproject.toml $(VENV)/.stack
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

install: $(VENV)/.project

# --- a first look, without OpenMMLab ------------------------------------------------------------------

QUICK := .venv-quick

$(QUICK)/.project: pyproject.toml
	$(PYTHON) -m venv $(QUICK)
	$(QUICK)/bin/pip --disable-pip-version-check install -q -c requirements.txt torch numpy scipy rich
	$(QUICK)/bin/pip --disable-pip-version-check install -q --no-deps -e .
	@touch $@

quick: $(QUICK)/.project
	@mkdir -p work_dirs
	$(QUICK)/bin/python examples/quick.py --out work_dirs/quick.pt2

# --- the jobs ---------------------------------------------------------------------------------------

# Makes nothing where the set is there already.
data: install
	$(PY) -m mmprune.mm.demo.shapes $(DATA)

train: data
	$(PY) tools/train.py $(CONFIG) --work-dir $(WORK_DIR)
	$(PY) tools/test.py $(CONFIG) "$$(cat $(WORK_DIR)/last_checkpoint)" --work-dir $(WORK_DIR)

# Two processes with a thread each are faster on two cores than one with two.
test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# What one runs twenty times a day: units of the torch-only core, without those that are slow.
test-fast: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -q -m "not slow" tests/unit \
		--ignore=tests/unit/mm --ignore=tests/unit/graph/adapters

# Debian's, as root or through sudo; elsewhere set MMPRUNE_CHROMIUM to the program.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
browser:
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y --no-install-recommends chromium chromium-driver
	@chromium --version

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(BIN)/basedpyright --pythonpath $(PY)

# Warnings are errors: a link that leads nowhere, a name that is not there, a page that no menu has.
docs: install
	$(PY) -m sphinx -q -W --keep-going -b html docs build/site
	@echo "build/site/index.html"

clean:
	rm -rf $(DATA) work_dirs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(QUICK)
