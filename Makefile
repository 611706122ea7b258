# `make demo` and `make test` need only Python ≥ 3.10 with venv, and a network or a wheel cache for pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench fuzz golden clean

demo: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/clapsep demo -o examples/out

test: $(VENV)/dev
	$(BIN)/python -m pytest -q

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Takes minutes; parts: start, processes, growth, window, tuss. LONG=1 adds 3 h of audio and 2,000 files.
bench: $(VENV)/dev
	LONG=$(LONG) $(BIN)/python tests/bench.py $(PART)

# Looks for what the tests' fixed examples do not show: thousands of new ones, and mangled recordings.
fuzz: $(VENV)/dev
	for seed in $$(seq 20); do HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -q --hypothesis-seed=$$seed \
		tests/test_masking.py tests/test_windows.py tests/test_stems.py tests/test_jobs.py tests/test_pipeline.py || exit; done
	$(BIN)/python tests/fuzz_audio.py

# Copies the reference's small golden numbers into tests/golden, where the folder shared/ lies beside the checkout.
golden: $(VENV)/dev
	$(BIN)/python tests/make_golden.py ../shared/golden

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build
