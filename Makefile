# Every target makes its own virtual environment in .venv and needs nothing but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# A file of tests at a time in each of two processes, since most share what they prepare.
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check docs format clean

demo: .venv/installed  ## the main job on the bundled model, three to four minutes
	$(BIN)/kronpress demo --overwrite

test: .venv/installed-dev  ## the test suite
	$(TESTS)

check: .venv/installed-dev  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TESTS)

docs: .venv/installed-dev  ## the documentation as a site, in site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv kronpress-demo site

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e '.[dev]'
	touch $@
