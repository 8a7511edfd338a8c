# Each target works alone on a clean clone, given python3 (3.11 or later, with its venv module), git and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed.stamp
# The judge is a part of the generator's benchmark; the two of real photographs ask where these are.
BENCHMARKS := $(filter-out benchmarks/scene_judge.py benchmarks/probes.py benchmarks/real_probe.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench clean constraints
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with the pinned set; nothing when it is there already

# Plain pip may choose a torch build that another machine needs; uv installs exactly the pins. Workers are
# processes of their own, which start four times as fast where torch is compiled to bytecode beforehand.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: Python 3.11 or later is needed, $(PYTHON) is `$(PYTHON) --version`; set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet -c constraints.txt uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## captions to report on the shipped small generator; at most 10 minutes on two cores
	$(BIN)/stablerep demo

test: $(STAMP) ## every test that needs neither an accelerator nor the network
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP) ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rules.py

bench: $(STAMP) ## every benchmark, one after another; tables on the screen and in benchmarks/results/
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove builds, caches and demo/; .venv and runs/ stay
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache lightning_logs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The pins that are there stay, unless setup.cfg no longer allows them.
constraints: $(STAMP) ## bring constraints.txt in line with setup.cfg
	head -n 2 constraints.txt > constraints.new
	$(BIN)/uv pip compile setup.cfg --quiet --all-extras --no-annotate --no-header --no-emit-index-url \
		--python-version 3.11 -c constraints.txt >> constraints.new
	mv constraints.new constraints.txt
