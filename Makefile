# Two commands are all the set-up: `make demo` and `make test`. Everything they make stays below this folder.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export FSAR_CACHE ?= $(CURDIR)/.cache/fsar

.DEFAULT_GOAL := help
.PHONY: help demo test check-exports lint test-notebooks test-python browser notebooks templates readme docs install clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

install: $(STAMP)  ## create .venv and install fsar with all that its tests need

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fsar needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large: some minutes, some gigabytes)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(STAMP)  ## render motions-mini, train MoLo, test it, write reports/quickstart
	@$(BIN)/fsar train --out reports/quickstart --options redraw=4

test: check-exports lint test-notebooks test-python  ## every test: exports in step, ruff and mypy, notebooks, pytest

check-exports: $(STAMP)
	@$(BIN)/python tests/check_exports.py

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check fsar tests && $(BIN)/mypy

test-notebooks: $(STAMP)
	@echo "running the notebooks, one torch thread each" && $(BIN)/python tests/notebooks.py

test-python: $(STAMP) browser
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

# The tests of the page need Chromium. On a throw-away machine (CI=true, root, apt) it is installed; elsewhere one line says how, and those tests are skipped.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || \
	if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium) >/dev/null 2>&1 || echo "no Chromium: the tests of the page in a browser are skipped"; \
	else echo "no Chromium found: the tests of the page in a browser are skipped (Debian, Ubuntu: sudo apt-get install chromium)"; fi

notebooks: $(STAMP)  ## run the library's notebooks in place, so that their pictures are fresh
	@$(BIN)/python -m nbconvert --to notebook --execute --inplace nbs/[0-9]*/*.ipynb nbs/tutorials/*.ipynb && $(BIN)/nbdev-clean

templates: $(STAMP)  ## write the parameter cells of the templates from Config
	@$(BIN)/python tests/templates.py --write

readme: $(STAMP)  ## fill in the table of nbs/index.ipynb from the reports and make README.md of it
	@$(BIN)/python -m nbconvert --to notebook --execute --inplace nbs/index.ipynb && $(BIN)/nbdev-clean --fname nbs/index.ipynb
	@$(BIN)/python tests/readme.py

docs: $(STAMP)  ## build the site from notebooks, package and reports: _docs/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file nbs/_site/mkdocs.yml && echo "the site: _docs/index.html"

clean:  ## remove what can be made again: rendered data, checkpoints, build leftovers (the environment stays)
	rm -rf .cache build dist _docs _proc *.egg-info .pytest_cache reports/*/checkpoints
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
