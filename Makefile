# Two commands do everything on a fresh machine with Python 3.11+ and pip: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the oldest transformers we support, layered over the same environment
OLDEST := .compat
# for the test that looks at a report in a browser
BROWSER := .browser
WORKERS ?= 2
# what touches transformers most; the rest of these folders differs in our own code alone
ON_OLDEST := $(addprefix tests/,\
	$(addprefix families/test_,unpack.py ladder.py runtime.py cla.py) \
	$(addprefix kvpatch/test_,config.py generation.py interface.py latent_models.py loading.py \
		masks.py patch.py patching.py) \
	real test_verify.py test_evaluate.py)

.PHONY: browser demo test test-oldest fuzz lint docs kernels benchmark clean

demo: $(VENV)/.installed
	$(BIN)/kvpatch demo

test: lint
	$(BIN)/pytest -n $(WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/pytest -n $(WORKERS) $(ON_OLDEST)

# other cases than those of `make test`; FUZZ_SEED=17 $(BIN)/pytest tests/fuzz repeats one
fuzz: $(VENV)/.installed
	FUZZ=$(or $(FUZZ),5000) $(BIN)/pytest -n $(WORKERS) tests/fuzz/test_fuzz.py

# docs/api.md from the docstrings, tables of losses from benchmarks/results
docs: $(VENV)/.installed
	$(BIN)/python docs/api.py
	$(BIN)/python docs/tables.py

# a browser out of a package, which needs npm; without it that test is skipped
browser: $(BROWSER)/.installed

# compiles all kernels for all architectures without a GPU, which takes minutes, and keeps what came
kernels: $(VENV)/.installed
	$(BIN)/python -m tests.kernels.golden

benchmark: $(VENV)/.installed
	$(BIN)/python -m benchmarks.convert --dir $(or $(DIR),/tmp) --sizes 2 4

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/.installed: $(VENV)/.installed
	rm -rf $(OLDEST)
	$(BIN)/pip install --quiet --disable-pip-version-check --target $(OLDEST) transformers==5.17.0
	touch $@

$(BROWSER)/.installed: $(VENV)/.installed
	rm -rf $(BROWSER) && mkdir $(BROWSER)
	$(BIN)/pip install --quiet --disable-pip-version-check playwright==1.65.2
	npm install --loglevel=error --no-save --ignore-scripts --prefix $(BROWSER) @sparticuz/chromium@153.0.0
	cd $(BROWSER) && TMPDIR=$$PWD node --input-type=module \
		-e "import chromium from '@sparticuz/chromium'; await chromium.executablePath()"
	rm -rf $(BROWSER)/node_modules
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(BROWSER) build dist *.egg-info
