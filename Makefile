# `make run` starts the service and makes a first video, `make test` runs the tests. Both set up what they need in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
OUT ?= outputs
PORT ?= 8000
KILLS ?= 200
LOSSES ?= 20
DATABASE ?=
SEED ?= 0
PARTS ?= tests network pipeline engine service scaling
PROMPT ?= A red circle moving right on a white background.

# Threads that wait must sleep: on two cores of which another program needs one, a video takes four times as long if not.
export OMP_WAIT_POLICY ?= passive

.PHONY: run cluster test test-fast test-slow chaos chaos-cluster figures lint validate clean

# Serves on this machine, in the foreground, and makes a first video through the HTTP API. ONCE=1 stops after it.
run: $(VENV)/.installed
	$(BIN)/t2v serve --port $(PORT) --first-prompt "$(PROMPT)" --first-output $(OUT)/first.mp4 $(if $(ONCE),--once)

# Two Ray nodes on this machine with the service on them, until Ctrl-C. DATABASE=postgresql://... is where jobs stay.
cluster: $(VENV)/.installed-test
	PYTHONPATH=tests/serve $(BIN)/python -m cluster.local --port $(PORT) $(if $(DATABASE),--database $(DATABASE)) $(if $(ONCE),--once)

# The tests of the running service need the cores to themselves, and the full-size ones the memory.
test: test-fast
	$(BIN)/pytest tests/serve tests/cluster -m service
	$(BIN)/pytest tests/cluster -m "cluster and not slow"
	$(BIN)/pytest tests/parity -m full_size

test-fast: $(VENV)/.installed-test
	$(BIN)/pytest -n auto -m "not full_size and not service and not cluster"

# Ray's own autoscaler, and files that do not start: four minutes that `make test` spares.
test-slow: $(VENV)/.installed-test
	$(BIN)/pytest -m slow

# Kills parts of a running service at random, for about 11 minutes. KILLS=50 SEED=3 choose others.
chaos: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/serve/chaos.py --kills $(KILLS) --seed $(SEED)

# Takes nodes away from a cluster of four on this machine at random, for about 6 minutes. LOSSES=50 SEED=3 choose others.
chaos-cluster: $(VENV)/.installed-test
	PYTHONPATH=.:tests/serve:tests/cluster $(BIN)/python tests/cluster/chaos_nodes.py --losses $(LOSSES) --seed $(SEED)

# On a machine with GPUs: the kernels' tests, and the figures of docs/performance.md, into build/figures.
figures: $(VENV)/.installed-test
	$(BIN)/python load_tests/gpu_host.py build/figures --parts $(PARTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Checks what cluster/ would deploy on Kubernetes. Needs KubeRay's CRDs: cluster/README.md says where they are looked for.
validate: $(VENV)/.installed-test
	$(BIN)/python -m cluster.render --check
	$(BIN)/python -m cluster.validate

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info

# A half environment would pass for a whole one at the next call: bin/python is there before pip is. The pip that comes with
# Python 3.11 takes three minutes to choose versions, for which a newer one takes a quarter of one.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON): must be Python 3.11 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install -qq --upgrade --constraint $(CONSTRAINTS) pip || \
	    echo "pip could not be renewed: what follows takes longer" >&2

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -qq --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install -qq --constraint $(CONSTRAINTS) --editable ".[test]"
	@touch $@ $(VENV)/.installed
