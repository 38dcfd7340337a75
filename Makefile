# `make` lists the targets. Everything runs from .venv, which the first target that needs it makes.

VENV   ?= .venv
# Installed only where no torch in the supported range is found; any requirement that pip understands.
TORCH  ?= torch==2.13.0
# The interpreter to build .venv from; empty: the first fit one, one that has torch first.
PYTHON ?=
# Passed on to the command of the target.
ARGS   ?=
# Not `?=`: many shells export HOST, and it is the machine's name.
HOST    = $(or $(PRIME_HOST),127.0.0.1)
PORT    = $(or $(PRIME_PORT),8000)

CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
PACKAGES   = $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,kernels prime_core training server benchmarks)))
STAMP      = $(VENV)/.installed
BIN        = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv serve test check mypy format structure demo-text clean

help:
	@echo "make serve      install, then serve the demo models on http://$(HOST):$(PORT) (HOST=, PORT=)"
	@echo "make test       install, then run all tests (ARGS='-k plan -x')"
	@echo "make check      formatting, lint and types"
	@echo "make format     format and fix what can be fixed"
	@echo "make structure  write docs/structure.md, the list of all modules"
	@echo "make demo-text  train the text demo: corpus, tokenizer, prime-train (ARGS go to it)"
	@echo "make venv       only install, into $(VENV) (PYTHON=python3.12, TORCH=torch==2.13.0)"
	@echo "make clean      remove caches and builds, but neither $(VENV) nor data"

venv: $(STAMP)

$(STAMP): pyproject.toml .ci/install.py
	@chosen=; \
	for want in torch python; do for candidate in $(CANDIDATES); do \
	    if [ -z "$$chosen" ] && "$$candidate" .ci/install.py --probe $$want >/dev/null 2>&1; \
	    then chosen="$$candidate"; fi; \
	done; done; \
	if [ -z "$$chosen" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 that runs among: $(CANDIDATES)." >&2; \
	    echo "Install one, or name it: make venv PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "python: $$chosen ($$("$$chosen" --version))"; \
	"$$chosen" .ci/install.py --venv "$(VENV)" --torch "$(TORCH)"
	@touch $@

# `exec`: a signal to make, which hands it on to its child, reaches the server and not a shell.
serve: $(STAMP)
	PRIME_HOST="$(HOST)" PRIME_PORT="$(PORT)" exec $(BIN)/prime-serve $(ARGS)

# Most tests share the cores. Those marked `alone` measure time or memory, and come when the others are done; ARGS may
# select none of either kind (pytest's status 5).
NONE_SELECTED = $(if $(ARGS),|| [ $$? -eq 5 ])

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not alone" $(ARGS) $(NONE_SELECTED)
	$(BIN)/python -m pytest -m alone $(ARGS) $(NONE_SELECTED)

check: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(MAKE) --no-print-directory mypy

mypy: $(STAMP)
	$(BIN)/python -m mypy .ci/install.py .ci/structure.py $(PACKAGES)

format: $(STAMP)
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

structure: $(STAMP)
	$(BIN)/python .ci/structure.py

DEMO_TEXT = data/demo-text

$(DEMO_TEXT)/train.txt: | $(STAMP)
	$(BIN)/python -m training.data.demo_corpus --output $(DEMO_TEXT)

$(DEMO_TEXT)/tokenizer.tiktoken: $(DEMO_TEXT)/train.txt
	$(BIN)/python -m training.data.bpe --input $< --vocab-size 4096 --output $@

demo-text: $(STAMP) $(DEMO_TEXT)/tokenizer.tiktoken
	$(BIN)/prime-train --config training/configs/demo-text.toml $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
