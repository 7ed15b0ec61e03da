# `make demo` and `make test` set everything up by themselves; nothing but Python 3.11+ and a package index is needed.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs/demo
BIN    := $(VENV)/bin
SHD    := $(BIN)/shd-diffusion

EMOJI  ?= runs/emoji

.PHONY: demo demo-text test lint docs clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(SHD) demo --output $(RUNS)

$(VENV)/installed-text: $(VENV)/installed
	$(BIN)/pip install --progress-bar on -e '.[text-demo]'
	touch $@

demo-text: $(VENV)/installed-text
	$(SHD) demo --text --output $(EMOJI)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -rs

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'docs: build/site/index.html'

clean:
	rm -rf $(VENV) runs
