# Everything from two commands on a machine with Python 3.11 or newer: `make lab` to read and work, `make test` to check it all.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/ready
LABS := $(wildcard notebooks/*.ipynb)
# A virtual environment holds absolute paths: one that was moved with its folder is built again, by the recipe of `setup`.
ifneq ($(shell cat .venv/home 2>/dev/null),$(CURDIR))
$(READY): moved
endif
# Jupyter refuses to start as root unless told; in a container root is all there is.
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help setup moved lab test quick deep test-notebooks test-browser test-clients cog labs teaching clean

help:
	@echo "make lab           set up once, then open the curriculum in JupyterLab"
	@echo "make test          set up once, then run every test"
	@echo "make quick         the tests that take a minute"
	@echo "make deep          drawn tests with seven times as many examples (an hour); was the GPU's record made with these kernels?"
	@echo "make test-browser  in Chromium: open the start page and follow its links, talk to a model on the server's page"
	@echo "make test-clients  what OpenAI's clients do with the server, older ones and JavaScript's among them"
	@echo "make cog labs      regenerate what chapters quote; execute all labs in place"
	@echo "make teaching      regenerate agendas and notes for instructors, common errors included (two minutes)"
	@echo "make clean         remove the environment and what tests left (fetched models stay: they live in your cache)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt $(wildcard jupyter/*)
	@test -n "$(PYTHON)" || { echo "minillm needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@test -f .venv/home || test ! -e .venv || { echo "the folder .venv here was not made by make; rename it (mv .venv venv-mine), then run make again"; exit 1; }
	@test ! -e .venv || test "$$(cat .venv/home)" = "$(CURDIR)" || { echo "== .venv was moved here with its folder: building it anew"; rm -rf .venv; }
	@mkdir -p .venv && printf '%s' "$(CURDIR)" > .venv/home
	@echo "== 1/4 environment in .venv ($$($(PYTHON) --version))"
	$(PYTHON) -m venv .venv
	@echo "== 2/4 packages, as pinned in constraints.txt (a few minutes)"
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev]'
	sh postBuild $(BIN)
	@touch $(READY)

lab: $(READY)
	$(BIN)/jupyter lab $(ROOT_FLAG) --ip=127.0.0.1 --LabApp.default_url=/lab/tree/README.md $(LAB_FLAGS)

# Two processes, as the smallest machines have two cores; who is done takes tests from the other. One alone where there
# is a GPU, for an engine takes most of its memory.
PROCESSES := $(if $(wildcard /proc/driver/nvidia),0,2)
PARALLEL := -n $(PROCESSES) --dist worksteal

test: $(READY)
	$(BIN)/pytest $(PARALLEL) tests
	$(MAKE) --no-print-directory test-notebooks

# A chapter whose first line says draft: its lab is not run yet.
DRAFT_LABS := $(patsubst chapters/%.md,--ignore=notebooks/%.ipynb,$(shell grep -l '^<!-- draft' chapters/[0-9]*.md))

# The one place that calls nbval: labs are compared where cells ask for it, a lab in one process. (Exercise notebooks run
# in tests/test_exercises.py.)
test-notebooks: $(READY)
	$(if $(filter 2,$(PROCESSES)),OMP_NUM_THREADS=1) $(BIN)/pytest -n $(PROCESSES) --dist loadfile --nbval-lax -p no:cacheprovider --nbval-cell-timeout=300 $(DRAFT_LABS) notebooks

quick: $(READY)
	HYPOTHESIS_PROFILE=quick $(BIN)/pytest $(PARALLEL) tests -m "not slow"

# Drawn tests are where more examples find more; what does not draw, `make test` has run.
deep: $(READY)
	HYPOTHESIS_PROFILE=deep $(BIN)/pytest $(PARALLEL) tests --ignore=tests/exercises --ignore=tests/learn --ignore=tests/browser

test-browser: $(READY)
	$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[browser]'
	$(BIN)/pytest tests/browser tests/server/test_page.py -m browser -rs

# The client of today is in .venv. Of the older major releases many programs hold on to 1; JavaScript's needs Node.
CLIENTS := build/clients

test-clients: $(READY)
	test -d $(CLIENTS)/openai-1 || $(BIN)/pip install --disable-pip-version-check -q --target $(CLIENTS)/openai-1 'openai<2'
	PYTHONPATH=$(CLIENTS)/openai-1 $(BIN)/pytest tests/server/test_clients.py
	command -v npm >/dev/null || { echo "no npm on this machine: the client for JavaScript is left out"; exit 0; }; \
	test -d $(CLIENTS)/npm/node_modules/openai || npm install --silent --no-save --prefix $(CLIENTS)/npm openai
	OPENAI_NPM=$(CLIENTS)/npm $(BIN)/pytest tests/server/test_clients.py -rs

cog: $(READY)
	$(BIN)/python benchmarks/capacity.py
	$(BIN)/cog -P -r README.md benchmarks/NOTES.md chapters/*.md

teaching: $(READY)
	$(BIN)/python -m minillm.learn.mistakes
	$(BIN)/cog -P -r teaching/agendas.md teaching/notes/*.md

labs: $(READY)
	$(BIN)/python -m minillm.learn.labs

clean:
	test ! -f .venv/home || rm -rf .venv
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
