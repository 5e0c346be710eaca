# `make demo` and `make test` are all a fresh clone needs; both share one virtual environment.
VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test check

demo: $(VENV)/installed
	$(VENV)/bin/snr demo --out demo

test: check
	$(VENV)/bin/pytest

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e .
	touch $@

# The tools of `test` on top, so that the demo does not wait for them.
$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	touch $@
