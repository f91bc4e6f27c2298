# `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2
TESTS ?= tests
RUN := $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) -m diffusers_mcm shapes demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_FLAGS) $(TESTS)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), this takes a few minutes the first time"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(VENV)/.created
	@echo "Installing into $(VENV), this takes a few minutes the first time"
	$(INSTALL) -e '.[test]'
	@touch $@
