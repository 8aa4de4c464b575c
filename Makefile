# Every target makes its own environment first, in .venv, when pyproject.toml or constraints.txt changed.
# Without a GPU, let pip see a CPU build of torch (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), else Linux gets CUDA.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# `true`, not 1: MLflow takes no other value.
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# Threads that spin while they wait starve each other when several processes share the cores.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test check static golden bench clean

help:
	@echo "make demo     compress a small network on digits, from calibration to the registry (minutes)"
	@echo "make check    format, lint, types, floors, the tests of the library (while you work)"
	@echo "make test     the same, and every test but the slow ones (what CI runs)"
	@echo "make golden   the slow tests: long numeric references"
	@echo "make bench    measure again the tables of benchmarks/"
	@echo "make clean    remove the environment and the caches, not .regrow: it holds the registry"

install: $(STAMP)

# torch first: its pin picks the build that fits this machine before anything else asks for one.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes, about 2.5 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[pipeline,s3,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/regrow demo

static: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: static
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" tests/heal tests/test_house.py

test: static
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

golden: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

bench: $(STAMP)
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/cost.py
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/search_cost.py
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/repairability_cost.py
	@test -n "$(DATA)" || echo "for the tables on ImageNet give the folder that benchmarks/README.md describes: make bench DATA=..."
	test -z "$(DATA)" || $(BIN)/python benchmarks/deit_tiny.py --data "$(DATA)"
	test -z "$(DATA)" || $(BIN)/python benchmarks/cifar.py --data "$(DATA)"
	test -z "$(DATA)" || $(BIN)/python benchmarks/cifar_page.py
	test -z "$(DATA)" || $(BIN)/python benchmarks/mobile.py --data "$(DATA)"
	test -z "$(DATA)" || $(BIN)/python benchmarks/mobile_page.py
	test -z "$(DATA)" || $(BIN)/python benchmarks/deit_cuts.py --data "$(DATA)"
	test -z "$(DATA)" || $(BIN)/python benchmarks/deit_masks.py --data "$(DATA)"
	test -z "$(DATA)" || $(BIN)/python benchmarks/cnn_cuts.py --data "$(DATA)"
	test -z "$(DATA)" || $(BIN)/python benchmarks/crosses_page.py
	test -z "$(DATA)" || $(BIN)/python benchmarks/deit_options.py --data "$(DATA)"
	test -z "$(DATA)" || env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/speed.py --data "$(DATA)"

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find heal tasks flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
