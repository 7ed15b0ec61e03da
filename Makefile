# `make demo` and `make test` set everything up by themselves; nothing but Python 3.11+ and a package index is needed.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs/digits
BIN    := $(VENV)/bin
SHD    := $(BIN)/shd-diffusion
STUDENT = $(SHD) distill configs/digits/distill.yaml --set teacher.path=$(RUNS)/teacher

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on -e '.[test]'
	touch $@

demo: $(VENV)/installed
	@echo '[1/7] a teacher with 12 heads'
	$(SHD) train-teacher configs/digits/teacher.yaml --output $(RUNS)/teacher
	@echo '[2/7] a student with 5 heads: denoising loss alone'
	$(STUDENT) --set losses.output.weight=0 --set losses.shd.weight=0 --output $(RUNS)/none
	@echo '[3/7] the same student: with output KD'
	$(STUDENT) --set losses.shd.weight=0 --output $(RUNS)/kd
	@echo '[4/7] the same student: with output KD and SHD'
	$(STUDENT) --output $(RUNS)/kd-shd
	@echo '[5/7] images from each'
	$(SHD) sample $(addprefix $(RUNS)/,teacher none kd kd-shd)
	@echo '[6/7] figures'
	$(SHD) evaluate $(addprefix $(RUNS)/,teacher none kd kd-shd) >/dev/null
	@echo '[7/7] report'
	$(SHD) report $(addprefix $(RUNS)/,teacher none kd kd-shd) --output $(RUNS)/report.html

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

clean:
	rm -rf $(VENV) runs
