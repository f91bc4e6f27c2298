# `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2
TESTS ?= tests
RUN := $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test tables lint format types build clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := demo

help:  ## say what there is to make
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1  \2/p' Makefile | awk '{ printf "%-5s%-8s", $$1, $$2; $$1 = $$2 = ""; print }'

demo: $(VENV)/.installed  ## sample the packaged model beside its own teacher
	$(RUN) -m diffusers_mcm shapes demo

test: $(VENV)/.installed-test  ## run the tests; TESTS=tests/test_cli.py: some of them
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_FLAGS) $(TESTS)

tables: $(VENV)/.installed  ## write docs/tables.md from what has been measured of the paper's tables
	$(RUN) examples/shapes/tables.py

lint: $(VENV)/.installed-test  ## check the code and how it is set out
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.installed-test  ## set the code out, and mend what ruff can mend
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.installed-test  ## check the package's types
	$(RUN) -m mypy

build: $(VENV)/.created  ## write sdist and wheel into dist/
	$(INSTALL) build
	$(RUN) -m build

clean:  ## remove what was built and cached; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find diffusers_mcm tests examples benchmarks model_cards -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: setup.py pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), this takes a few minutes the first time"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: setup.py pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), this takes a few minutes the first time"
	$(INSTALL) -e '.[test]'
	@touch $@
