# make demo    install everything, then train and evaluate an aligned model on the embedded world
# make seeds   run the recipes world and world-needs with three seeds each, every baseline included, and compare (an hour)
# make real    fetch SmolLM2-135M and run the recipe smollm2 on the published files in ALIGNX_DATA, every baseline included (hours on 2 cores)
# make bench   run every benchmark at a small shape, in less than 5 minutes without a GPU
# make gpu     run the tests and benchmarks that need a GPU of 80 GB; existing results are kept; writes docs/gpu.md
# make study   draw the figures of Axis Collapse: a world run that keeps its checkpoints, then four plots in runs/study/study
# make test    install everything, then run lint, types and tests, these in two processes (WORKERS=4 make test: in four)
# make compat  run the tests of decoding and exports on the lowest and the newest supported transformers; needs the package index
# make docs    build the site of the pages, with an API reference, in build/site/index.html; needs the package index
# make faults  cause every fault that a run must survive (half an hour on 2 cores); writes the table of docs/reliability.md
# make launchers  run the main job under every launcher: deepspeed on one and two hosts, mpirun, torchrun, Slurm's script
# make check   the same as make test
# make wheel   build dist/*.whl, which runs the shipped recipes without this checkout
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RECIPE ?= launch/recipes/world.yaml
WORKERS ?= 2

# Tests start hundreds of processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo seeds real bench gpu study docs test compat faults launchers check wheel lint format clean

install: $(READY)

# torch comes first: once it is installed, no other package replaces it with another build.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(READY)
	$(BIN)/alignx-ds run $(RECIPE)

seeds: $(READY)
	for name in world world-needs; do \
	  for seed in 0 1 2; do $(BIN)/alignx-ds run $$name seed=$$seed output=runs/$$name-seed-$$seed || exit 1; done; \
	  $(BIN)/alignx-ds compare runs/$$name-seed-0 runs/$$name-seed-1 runs/$$name-seed-2 --out runs/$$name-seeds.json || exit 1; \
	done

models/smollm2: | $(READY)
	$(BIN)/python launch/fetch_smollm2.py $@

real: $(READY) models/smollm2
	$(BIN)/alignx-ds run smollm2 model.path=models/smollm2 $(SETTINGS)

bench: $(READY)
	$(BIN)/python benchmarks/latency.py --shape tiny --repeats 5 --out runs/bench
	$(BIN)/python benchmarks/memory.py --shape tiny --measure-layers 4 --out runs/bench
	$(BIN)/python benchmarks/calibrator.py --shape tiny --repeats 5 --out runs/bench
	$(BIN)/python benchmarks/throughput.py --shape tiny --quick --out runs/bench
	$(BIN)/python benchmarks/scaling.py --shape tiny --quick --out runs/bench
	$(BIN)/python benchmarks/cluster.py --gpus 1 8 1024 --out runs/bench

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

STUDY := checkpoints.every=20 checkpoints.keep=100 checkpoints.finished=true baselines.make=[] output=runs/study

study: $(READY)
	$(BIN)/alignx-ds run launch/recipes/world.yaml $(STUDY)
	for what in drift forgetting contributions calibration; do $(BIN)/alignx-ds study $$what runs/study || exit 1; done

$(VENV)/.ready-docs: docs/site/requirements.lock $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -r docs/site/requirements.lock -c requirements.lock
	@touch $@

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f docs/site/mkdocs.yml

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

compat: $(READY)
	$(BIN)/python tests/transformers_versions.py

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

# What an earlier build has left in build/ would be packed too.
wheel: $(READY)
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

format: $(READY)
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --quiet --fix .

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache
