# make run · test · lab · reference: each sets up .venv with the exact versions of requirements.txt if need be. `make interop` has an
# environment of its own, for SAELens.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SWEEP ?= sweeps/laptop.toml
ENGINE ?= local
# processes of `make test`, each with one thread; conftest.py says what runs in one
WORKERS ?= 2
# threads that wait without spinning: otherwise a second busy process makes everything several times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test lab reference bench lint interop

# Ray, where it is asked for, is one of the optional packages
NEEDS := $(VENV)/$(if $(filter ray,$(ENGINE)),optional,ready)

run: $(NEEDS)
	$(BIN)/python -m sae_utils.sweep $(SWEEP) --engine $(ENGINE)

test: export OMP_NUM_THREADS ?= 1
test: lint $(VENV)/optional
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

lab: $(VENV)/ready
	$(BIN)/jupyter lab notebooks

# interrupted and started again it repeats no finished run; what finished is collected whether or not all did
reference: $(NEEDS)
	$(BIN)/python -m sae_utils.sweep sweeps/reference.toml --engine $(ENGINE); \
	status=$$?; $(BIN)/python -m sae_utils.lab.claims collect && exit $$status

# the public libraries are measured beside ours where `make interop` has installed them
bench: $(VENV)/ready
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/e2e.py
	PYTHONPATH=. $(firstword $(wildcard .venv-interop/bin/python) $(BIN)/python) benchmarks/step.py

interop: .venv-interop/ready
	PYTHONPATH=. .venv-interop/bin/python -m pytest tests/interop

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/nbstripout --verify --keep-id --extra-keys metadata.papermill notebooks/*.ipynb notebooks/studies/*.ipynb

# torch first: pip then takes the build that is there for every other package's "torch>=..."
$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# what only some of the tests need
$(VENV)/optional: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[triton,ray]"
	touch $@

.venv-interop/ready: tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' $<)
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check -c $< -r $<
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0
	touch $@
