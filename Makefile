VENV ?= .venv
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint docs install

quickstart: $(STAMP)
	$(VENV)/bin/bara quickstart

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2

lint: $(STAMP) docs
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(VENV)/bin/mkdocs build --quiet --strict

install: $(STAMP)

$(STAMP): pyproject.toml scripts/install.sh scripts/no-deps.txt
	scripts/install.sh $(VENV)
	touch $@
