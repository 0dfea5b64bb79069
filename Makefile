# make demo      quantize a small language model, prove it, run it
# make test      the tests (make test-all: the slow ones too; make test-times: what each costs)
# make lint      ruff, which room imports which, and types
# make docs      the documentation as a site, in site/index.html
# make clean     remove everything that these made

PYTHON ?= $(shell python3.11 -c pass 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# `make demo RUNTIME=cpu` does without CUDA's part of ONNX Runtime, which exists for x86-64 and takes 255 MB. The tests
# ask it where nodes would run, with no GPU; they skip that elsewhere, as they do what needs onnxruntime-genai.
RUNTIME ?= $(if $(and $(filter x86_64 AMD64,$(shell uname -m)),$(filter Linux,$(shell uname -s))),cuda,cpu)
EXTRAS = test,datasets,plots,$(RUNTIME)$(if $(filter cuda,$(RUNTIME)),$(comma)genai)
comma := ,

.PHONY: demo test test-all test-times lint docs clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	$(BIN)/python samples/demo.py

# Bytecode is kept: without it every process compiles the package, and every worker rewrites the tests' assertions.
unexport PYTHONDONTWRITEBYTECODE
# On as many cores as there are; a plain `pytest` runs in one process, as --pdb and -x want it.
PARALLEL = -n auto --maxprocesses 4 --dist loadfile

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow or not slow'

test-times: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) --times

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python tools/arrows.py
	$(BIN)/python tools/typecheck.py

docs: $(VENV)/documented
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

$(VENV)/documented: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .cache out site build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
