# make demo   install into .venv and run the main job on the embedded model
# make test   install into .venv and run linters, types and tests
# make notebooks   execute the notebooks and save their outputs
# make docs   build the documentation into build/site; make docs-serve shows it while you write

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine without an NVIDIA card gets the CPU build: gigabytes less to download.
CPU_TORCH := --extra-index-url https://download.pytorch.org/whl/cpu --retries 2
TORCH ?= torch==2.13.0 $(if $(shell command -v nvidia-smi),,$(CPU_TORCH))
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check  # what is imported compiles then
EDITABLE := --config-settings editable_mode=compat
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test lint format notebooks docs docs-serve install install-dev clean

demo: install
	$(BIN)/regard demo

test: install-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10  # two workers, two cores

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: install-dev
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: install-dev
	$(MKDOCS) build --strict

docs-serve: install-dev
	$(MKDOCS) serve

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(TORCH)  # its own needs come with the rest, from the usual index
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) -e . $(EDITABLE)
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]' $(EDITABLE)
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info runs
