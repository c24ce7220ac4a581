# make demo    set everything up, then go from a base model to an aligned one on the embedded world
# make bench   a small-shape pass of every benchmark, under 5 minutes without a GPU
# make gpu     everything that only a GPU can show, on one card of 80 GB; results that are there are kept
# make study   the figures of Axis Collapse: a world run that keeps its checkpoints, then four plots in runs/study/study
# make test    set everything up, then run the tests
# make faults  every fault that the run has to survive, about half an hour on 2 cores; writes docs/reliability.md's table
# make launchers  run the main job under every launcher: deepspeed on one and two hosts, mpirun, torchrun, Slurm's script
# make check   format, lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RECIPE ?= launch/recipes/world.yaml

.PHONY: install demo seeds bench gpu study test faults launchers check lint format clean

install: $(READY)

# torch first: with it in place, no other package pulls in another build of it.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(READY)
	$(BIN)/alignx-ds run $(RECIPE)

seeds: $(READY)
	for seed in 0 1 2; do $(BIN)/alignx-ds run $(RECIPE) seed=$$seed output=runs/world-seed-$$seed || exit 1; done
	$(BIN)/alignx-ds compare runs/world-seed-0 runs/world-seed-1 runs/world-seed-2

bench: $(READY)
	$(BIN)/python benchmarks/latency.py --shape tiny --repeats 5 --out runs/bench
	$(BIN)/python benchmarks/memory.py --shape tiny --measure-layers 4 --out runs/bench
	$(BIN)/python benchmarks/calibrator.py --shape tiny --repeats 5 --out runs/bench
	$(BIN)/python benchmarks/throughput.py --shape tiny --quick --out runs/bench
	$(BIN)/python benchmarks/scaling.py --shape tiny --quick --out runs/bench

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

STUDY := checkpoints.every=20 checkpoints.keep=100 checkpoints.finished=true baselines.make=[] output=runs/study

study: $(READY)
	$(BIN)/alignx-ds run launch/recipes/world.yaml $(STUDY)
	for what in drift forgetting contributions calibration; do $(BIN)/alignx-ds study $$what runs/study || exit 1; done

test: lint
	$(BIN)/python -m pytest

faults: $(READY)
	rm -f runs/faults.jsonl && mkdir -p runs
	FAULTS_RECORD=$(CURDIR)/runs/faults.jsonl $(BIN)/python -m pytest tests/faults -m "" --timeout 3600
	$(BIN)/python tests/faults/table.py runs/faults.jsonl docs/reliability.md

launchers: $(READY)
	$(BIN)/python -m pytest tests/launchers -m "" -rs

lint: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

check: test

format: $(READY)
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --quiet --fix .

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
