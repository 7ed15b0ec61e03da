# `make demo` and `make test` set everything up by themselves; nothing but Python 3.11+ and a package index is needed.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs/digits
BIN    := $(VENV)/bin
SHD    := $(BIN)/shd-diffusion

EMOJI  ?= runs/emoji
DISTIL_EMOJI = $(SHD) distill configs/emoji/distill.yaml --set teacher.path=$(EMOJI)/teacher --set prepare.output=$(EMOJI)/cache \
	--set student.pretrained=$(EMOJI)/squeezed
FONT   := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

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

$(FONT):
	@echo 'The pictures are those of the font $(FONT): apt-get install fonts-noto-color-emoji' >&2; exit 1

$(EMOJI)/base/model_index.json: | $(FONT) $(VENV)/installed-text
	@echo '[1/9] a text encoder, and an autoencoder of emoji'
	$(SHD) make-pipeline configs/emoji/pipeline.yaml --output $(EMOJI)/base

demo-text: $(FONT) $(VENV)/installed-text $(EMOJI)/base/model_index.json
	@echo '[2/9] pictures and names to latents and embeddings'
	$(SHD) prepare configs/emoji/teacher.yaml --set pipeline=$(EMOJI)/base --output $(EMOJI)/cache
	@echo '[3/9] a teacher with 8 heads'
	$(SHD) train-teacher configs/emoji/teacher.yaml --set pipeline=$(EMOJI)/base --set prepare.output=$(EMOJI)/cache \
		--output $(EMOJI)/teacher
	@echo '[4/9] 3 heads and half of the neurons by least squares, without training'
	test -e $(EMOJI)/squeezed/model_index.json || \
		$(SHD) compress $(EMOJI)/teacher --heads 3 --neurons 0.5 --images 512 --output $(EMOJI)/squeezed
	@echo '[5/9] that student healed by output KD'
	$(DISTIL_EMOJI) --set losses.shd.weight=0 --output $(EMOJI)/kd
	@echo '[6/9] by output KD and SHD'
	$(DISTIL_EMOJI) --output $(EMOJI)/kd-shd
	@echo '[7/9] images of prompts, some of them never seen, and students against their teacher'
	$(SHD) sample $(addprefix $(EMOJI)/,teacher kd kd-shd)
	$(SHD) evaluate $(addprefix $(EMOJI)/,kd kd-shd) >/dev/null
	@echo '[8/9] what they cost'
	$(SHD) benchmark $(addprefix $(EMOJI)/,teacher kd kd-shd) --batch-size 4 --rounds 3 >/dev/null
	@echo '[9/9] report'
	$(SHD) report $(addprefix $(EMOJI)/,teacher kd kd-shd) --output $(EMOJI)/report.html

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
