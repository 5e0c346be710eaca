# `make demo` and `make test` are all a fresh clone needs; both share one virtual environment.
VENV ?= .venv
PYTHON ?= python3

.PHONY: install demo test check

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	touch $@

demo: install
	$(VENV)/bin/snr demo --out demo

test: install check
	$(VENV)/bin/pytest

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
