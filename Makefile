PYTHON = .venv/bin/python
# two at a time, a file's tests one after the other: a whole run takes 7 to 10 GiB, and mostly waits for one core
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile
# not .venv's: a GPU machine may have torch and transformers, and no verl
GPU_PYTHON ?= python3

.PHONY: setup test test-fast test-long lint quickstart smoke bench bench-claims bench-launch bench-rollout gpu-check

setup:            ## make .venv (no accelerator needed)
	bash recipes/setup_cpu.sh

test: setup       ## what CI runs: everything but the longest end-to-end runs
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy
	$(PYTEST) --durations=10 -m "not slow" tests
	$(PYTEST) --durations=40 -m "slow and not long" tests

test-fast: setup  ## without the end-to-end runs
	$(PYTEST) -m "not slow" tests

test-long: setup  ## the longest end-to-end runs
	$(PYTEST) --durations=40 -m long tests

quickstart:       ## train the tiny task
	bash recipes/quickstart.sh

smoke: setup      ## every recipe for two real steps on CPU: more than an hour on two cores
	bash recipes/smoke.sh

bench: setup      ## loss and estimator benchmarks, printed as a table
	$(PYTHON) tests/benchmarks/algorithms.py

bench-claims: setup  ## the papers' claims in small worlds with a known optimum: 2 minutes on two idle cores
	OMP_NUM_THREADS=1 PYTHONPATH=tests/benchmarks $(PYTHON) -m claims

bench-launch: setup  ## what a launch costs: its processes, what they had loaded, CPU and wall seconds, as a table
	$(PYTHON) tests/benchmarks/launch.py

bench-rollout: setup  ## two-role rollout against lock-step and the least prefill, on real vLLM: minutes on one core
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(PYTHON) tests/benchmarks/rollout.py

gpu-check:        ## on one GPU, without verl: losses and estimators against float64, their cost, a model's update
	PYTHONPATH=. $(GPU_PYTHON) tests/benchmarks/gpu_check.py $(ARGS)

lint: setup
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format . && $(PYTHON) -m mypy
