# `make demo` and `make test` set everything up themselves; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all lint docs help bench chaos fuzz coverage clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gpd needs Python 3.11 or later; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python demo/run.py

# Two tests at a time: most of their time is memory traffic, which more cores do not speed up. They
# are handed out in their order, of which the slow ones are the end.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist load

test: setup
	$(PYTEST)

# make test-all SLOW=900 skips the slow tests that have not begun after 900 seconds.
test-all: setup
	$(PYTEST) -m 'slow or not slow' $(if $(SLOW),--slow-seconds $(SLOW))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Runs that are killed and disks that fail, compared bit for bit; broken files and options.
# make chaos CHAOS="--kills 4"; make fuzz FUZZ="--count 50 --kinds image".
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.chaos $(CHAOS)

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.fuzz $(FUZZ)

# Pages from docs/, into site/; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What `gpd COMMAND --help` shows at once, from the parsers; a test says when it is out of date.
help: setup
	$(BIN)/python -m gpd_cli.cli.stored_help

# make bench DEVICE=cuda REFERENCE=folder, with a checkout of the authors' code in that folder.
bench: setup
	$(BIN)/python -m bench.speed --device $(or $(DEVICE),cpu) $(if $(REFERENCE),--reference $(REFERENCE))

# make coverage NAMES="convnext torchvision/resnet18" JOBS=4; without names it resumes.
coverage: setup
	$(BIN)/python -m bench.coverage --jobs $(or $(JOBS),1) $(NAMES)

clean:
	rm -rf $(VENV) site
