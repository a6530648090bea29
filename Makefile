# Two commands do everything: `make serve` and `make test`.  ARGS passes flags on: make serve ARGS="--port 9000".
# The whole suite runs on all cores, file by file, because a file's tests share what takes long to make.  With ARGS
# there is one process, which starts sooner: make test ARGS=tests/model/test_parity.py.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
ARGS ?=
ALL_CORES := --numprocesses=logical --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
# What a change breaks most often, before each commit: one comparison with Transformers, one real server, the kernels'
# references, scheduler and block pool, HTTP with a scripted engine.
FAST := 'tests/model/test_parity.py::test_greedy_tokens_equal_transformers[random-C kernels-32]' \
	tests/end_to_end/test_openai_client.py tests/kernels/test_reference.py tests/server/engine \
	tests/server/http/endpoints tests/server/http/generation
BIN := $(VENV)/bin
# Installed again when one of these changes; the last are the C kernels, which the installation compiles.
INSTALLED_FROM := pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.[ch])

.PHONY: serve test test-fast compat distributed exhaustive lint types contracts format docs audit clean

serve: $(VENV)/.installed
	$(BIN)/persimmon serve $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(or $(ARGS),$(ALL_CORES))

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ALL_CORES) $(FAST) $(ARGS)

compat: $(VENV)/.installed-compat
	$(BIN)/python -m pytest tests/compat $(ARGS)

# Several engines, ranks and machines, in real processes; the last ones are a Ray cluster on this machine.
distributed: $(VENV)/.installed-ray
	$(BIN)/python -m pytest $(or $(ARGS),tests/distributed)

# More cases of what `make test` checks of the GPU kernels: before a release, and after a change in kernels/.  CI does not
# run it: it takes longer than all the rest.
exhaustive: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ALL_CORES) tests/exhaustive $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the tables and lists in docs/ that are made from the code.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m tools.docs

# Asks PyPI's database of vulnerabilities, which mirrors need not have, so CI does not run it: run it by hand before a
# release.  Its own environment, because it is not part of what is audited.
audit: constraints.txt constraints-compat.txt constraints-ray.txt
	test -x $(VENV)-audit/bin/pip-audit || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --requirement constraints-compat.txt \
	--requirement constraints-ray.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) $(VENV)-audit .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build dist kernels/cpu/*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	"Python 3.11 or 3.12 is required, but %s is %d.%d: give its path, for example make serve PYTHON=/usr/bin/python3.12" \
	% (sys.executable, *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing into $(VENV). The first time this takes a few minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(INSTALLED_FROM) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-compat: $(INSTALLED_FROM) constraints-compat.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	--constraint constraints-compat.txt --editable '.[dev,compat]'
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-ray: $(INSTALLED_FROM) constraints-compat.txt constraints-ray.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	--constraint constraints-compat.txt --constraint constraints-ray.txt --editable '.[dev,ray]'
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed
