# Each target works on a fresh machine with Python 3.11+: it makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

NUMERIC := $(addprefix tests/test_, accelerate.py analysis.py augment.py classifiers.py compute.py concurrent.py datasets.py deepfool.py \
	fooling.py gpu_images.py measurements.py norms.py pool.py rules.py schedule.py several.py spectrum.py update.py worker.py)

.PHONY: demo test test-cpus test-slow check docs results wheel clean

demo: .venv/demo
	$(BIN)/python jobs/compute.py

test: .venv/test check
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

# What computes, as processors of other ages and makers do: those of the oldest instruction set that torch supports, and between.
test-cpus: .venv/test
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(BIN)/python -m pytest $(NUMERIC)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX MKL_ENABLE_INSTRUCTIONS=AVX $(BIN)/python -m pytest $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/python -m pytest $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512 $(BIN)/python -m pytest $(NUMERIC)

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_results.py

docs: .venv/docs  # the site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

results: .venv/bench  # every page of figures whose code has changed, confirmed or measured again
	$(BIN)/python benchmarks/results.py --check --run changed

wheel: .venv/demo  # dist/uap_dist-VERSION-py3-none-any.whl
	rm -rf build
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

.venv/demo: pyproject.toml
	@echo 'Installing into .venv; this takes some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

.venv/test: pyproject.toml
	@echo 'Installing into .venv; this takes some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

.venv/docs: pyproject.toml
	@echo 'Installing into .venv; this takes some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,docs]'
	touch $@

.venv/bench: pyproject.toml
	@echo 'Installing into .venv; this takes some minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
