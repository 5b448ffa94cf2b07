# Each target works on a fresh machine with Python 3.11+: it makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check wheel clean

demo: .venv/demo
	$(BIN)/python jobs/compute.py

test: .venv/test check
	$(BIN)/python -m pytest -m 'not slow'

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/demo  # dist/uap_dist-VERSION-py3-none-any.whl
	rm -rf build
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

.venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
