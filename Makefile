# `make demo` and `make test` set everything up themselves, in .venv.
# Where the package index has only torch's CUDA build, and no GPU is there:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
MACHINES := "MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2" "MKL_CBWR=AVX2 OTHER_MACHINE=1"
CODE := src tests benchmarks setup.py train_sdd.py train_esd.py train_distill.py

# NudeNet, for the tests of the metric `nudity`; NUDENET=no leaves it out, and they are skipped.
NUDENET ?= yes
TESTED := $(VENV)/.installed $(if $(filter yes,$(NUDENET)),$(VENV)/.nudenet)

.PHONY: demo test test-portable test-slow benchmark-erasure quality style setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.nudenet: $(VENV)/.installed
	@echo "installing NudeNet for the tests of the metric nudity; its detector is AGPL-3.0 (NUDENET=no leaves it out)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval]"
	touch $@

demo: setup
	$(BIN)/diffusers-safe demo

# Threads that wait must not spin: two workers with two threads each took forty times as long.
test: export OMP_NUM_THREADS ?= 1
test: export OMP_WAIT_POLICY ?= passive
test: $(TESTED)
	$(BIN)/python -m pytest -n auto --dist worksteal

# The tests twice more, as other machines would run them: other paths through matrix products, two threads, and
# arithmetic that depends on all it may depend on (tests/other_machine.py).
test-portable: setup
	set -e; for machine in $(MACHINES); do echo "$$machine"; env $$machine $(MAKE) --no-print-directory test; done

test-slow: $(TESTED)
	$(BIN)/python -m pytest -m slow

# About an hour on 2 cores; QUICK=1 fewer methods on one object only.
benchmark-erasure: setup
	$(BIN)/python benchmarks/erasure_leaderboard.py \
		$(if $(QUICK),--quick --output_dir runs/leaderboard-quick,--output_dir runs/leaderboard)

quality: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

style: setup
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache
