# make demo: install and watch FedKNOW beside FedAvg.   make test: install and run every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
ROOMS := protocols client strategies server simulations
SOURCES := pyproject.toml constraints.txt \
  $(foreach room,fedknow $(ROOMS),$(wildcard $(room)/*.* $(room)/*/*.* $(room)/*/*/*.*))
LEARNERS ?= fedavg,fedknow

export FLWR_TELEMETRY_ENABLED ?= 0
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test lint docs sbom clean

demo: $(VENV)/installed
	$(BIN)/fedknow compare digits --learners $(LEARNERS) --seeds 1 --out runs/demo

# Three on two cores, as many tests wait for processes of their own.
test: lint
	$(BIN)/python -m pytest -q -n 3 --dist loadfile

# mypy and import-linter need the package as one folder, so build/links holds links to its parts.
lint: $(VENV)/installed-dev build/links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/style.py
	cd build/links && $(BIN)/mypy --config-file ../../pyproject.toml -p fedknow
	cd build/links && PYTHONPATH=. $(BIN)/lint-imports --config ../../pyproject.toml

# The site, in build/site. A warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/installed-dev build/links
	$(BIN)/mkdocs build --quiet --strict

# What is installed: a bill of materials (CycloneDX), and the licences.
sbom: $(VENV)/installed-dev
	$(BIN)/python tools/sbom.py build/sbom.cdx.json build/licences.md

.PHONY: build/links
build/links:
	rm -rf $@
	mkdir -p $@/fedknow
	ln -s $(abspath $(filter-out %/__pycache__,$(wildcard fedknow/*))) $@/fedknow
	ln -s $(abspath $(ROOMS)) $@/fedknow

# torch comes first and pinned, so that the build pip is configured for is the one that everything else is solved around.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch

# The two ways to install replace each other, so each forgets the other's stamp.
$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(PIP) '.[sim]'
	rm -f $(VENV)/installed-dev
	touch $@

# Editable, without copies or links: a traceback shows the file that is edited. A new file needs no new installation.
$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	rm -f $(VENV)/installed
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
