# make demo   set up, then the R1 chain on two CPU ranks of this machine: accuracy from chance to 1, in minutes
# make test   set up, then run the tests; on Debian as root with a real four-node Slurm
# make check  ruff, strict types, import rules        make soak   long kills and repetitions
# make bench  speed beside peers and floors           make clean  remove the environment and the runs

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN ?= $(VENV)/bin/python
READY := $(VENV)/.ready
# DeepSpeed probes for a GPU and for NUMA tools at import; on a machine with neither it should not warn.
export DS_ACCELERATOR ?= $(shell test -e /dev/nvidiactl && echo cuda || echo cpu)

.PHONY: setup demo test test-without-slurm check bench soak clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) -m r1hpc.submit jobs/r1.yaml --executor local --run-root runs --run-name r1 --follow
	$(RUN) -m r1hpc.report runs/r1/grpo --plots
	$(RUN) -m r1hpc.report r1 --run-root runs --format html --out runs/r1.html
	$(RUN) -m r1hpc.status runs/r1

test: setup
	$(RUN) -m pytest

test-without-slurm: setup
	$(RUN) -m pytest -m 'not slurm and not soak'

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest tests/test_imports.py

bench: setup
	$(VENV)/bin/pip install --quiet --editable '.[dev,bench]'
	for bench in benchmarks/[a-z]*.py; do echo "== $$bench"; OMP_NUM_THREADS=1 $(RUN) $$bench || exit 1; done

soak: setup
	$(RUN) -m pytest -m soak --timeout 3600

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
