PYTHON = .venv/bin/python

.PHONY: setup test test-fast lint quickstart smoke bench

setup:            ## make .venv (no accelerator needed)
	bash recipes/setup_cpu.sh

test: setup       ## the whole suite, end-to-end runs included
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q --durations=10 -n 2 --dist loadfile -m "not slow" tests
	$(PYTHON) -m pytest -q --durations=20 -m slow tests

test-fast: setup  ## without the end-to-end runs
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile -m "not slow" tests

quickstart:       ## train the tiny task
	bash recipes/quickstart.sh

smoke: setup      ## every recipe for two real steps on CPU: about an hour on two cores
	bash recipes/smoke.sh

bench: setup      ## loss and estimator benchmarks, printed as a table
	$(PYTHON) tests/benchmarks/algorithms.py

lint: setup
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format . && $(PYTHON) -m mypy
