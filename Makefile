# make demo: everything from an empty machine to a report.   make test: all tests.   make check: style and types.
# make docs: the documentation site, in build/site.
# make slurm-up, make slurm-down: a private SLURM cluster of two nodes on this machine, to try the scripts of slurm/ on (as root).

TORCH := torch==2.13.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
READY := $(VENV)/.ready

.PHONY: demo test check docs benchmark slurm-up slurm-down clean

demo: $(READY)
	$(BIN)/python recipes/demo.py

# The tests of SLURM share one cluster, so one process runs them.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --ignore tests/slurm tests
	$(BIN)/python -m pytest tests/slurm

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

# A warning is an error: a link or an anchor that leads nowhere.
docs: $(READY)
	$(BIN)/pip install --quiet --constraint requirements.txt --requirement tools/site-requirements.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

benchmark: $(READY)
	$(BIN)/python benchmarks/train.py --size demo

slurm-up: $(READY)
	@$(BIN)/python tests/slurm/cluster.py up

slurm-down: $(READY)
	@$(BIN)/python tests/slurm/cluster.py down

# torch goes first and by its exact version: any looser request brings gigabytes of CUDA libraries to a machine without GPU.
$(READY): requirements.txt setup.py
	@echo "making the environment in $(VENV) (about two minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lsmoe_ds needs Python 3.11 or newer: set PYTHON=")'
	@begun=$$(date +%s) \
	&& $(PYTHON) -m venv $(VENV) \
	&& $(BIN)/pip install --quiet $(TORCH) \
	&& echo "$(TORCH)" > $(VENV)/constraints.txt \
	&& DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --requirement requirements.txt \
	&& $(BIN)/pip install --quiet --no-deps --editable . \
	&& echo "$$(( $$(date +%s) - begun ))" > $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
