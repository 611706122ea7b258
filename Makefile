# `make demo` and `make test` need only Python ≥ 3.10 with venv, and a network or a wheel cache for pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Bytecode is kept, whatever the environment says: else each process of a test or benchmark compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-ray test-cpus test-lowest check bench fuzz golden clean

demo: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/clapsep demo -o examples/out

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

# Real Ray on this machine, with workers, nodes and drivers that are killed. Two to three minutes.
test-ray: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -q -m ray tests/test_ray.py

# What chooses by the processor, as processors without AVX-512, and without AVX2, have it. Half a minute.
test-cpus: $(VENV)/dev
	for isa in "avx2 AVX2" "default SSE41"; do set -- $$isa; \
		ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 $(BIN)/python -m pytest -q tests/test_precision.py \
		tests/test_train_clapsep.py tests/test_tuss.py -k "attention or adapter_is or half_precision or says_so" \
		|| exit; done

# The core with the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-e . pytest hypothesis
	$(VENV)-lowest/bin/python -m pytest -q tests/test_mini.py tests/test_library.py tests/test_download.py

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Takes minutes; parts: start, processes, growth, cores, window, audiosep, tuss.
# LONG=1 adds 3 h of audio and 2,000 files. BEFORE=/path/to/a/checkout: `cores` takes turns with that version.
bench: $(VENV)/dev
	LONG=$(LONG) BEFORE=$(BEFORE) $(BIN)/python tests/bench.py $(PART)

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
	rm -rf $(VENV) $(VENV)-lowest dist build
