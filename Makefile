# Needs Python 3.11 or newer and a C++ compiler; everything else is installed into .venv on first use.
#   make ask     an answer about the picture in docs/pictures       make test    the tests
#   make demo    a chat about pictures in the browser        OPTIONS="--port 8000" and others: visualrwkv demo --help
#   make lint    ruff                                               make clean   removes .venv and build leftovers
#   make model   trains the embedded model again, in out/tiny (hours on two cores; a stopped run goes on)
# Another interpreter: make test PYTHON=python3.12      Another place for the environment: make test VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
PICTURE ?= docs/pictures/scene.png
QUESTION ?= What number is on the sign?

BIN := $(VENV)/bin

.PHONY: ask demo test lint model clean
.DEFAULT_GOAL := ask
# an environment that could not be finished is made again
.DELETE_ON_ERROR:

ask: $(VENV)/.installed
	@$(BIN)/visualrwkv ask "$(PICTURE)" "$(QUESTION)"

demo: $(VENV)/.installed
	@$(BIN)/visualrwkv demo $(OPTIONS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

STAGES := 1_contrastive 2_language 3_projector 4_instruction 5_practice 6_together 7_lessons 8_everything

model: $(VENV)/.installed-dev
	set -e; for stage in $(STAGES); do \
		test -f out/tiny/$$stage/versions.json || $(BIN)/visualrwkv train configs/tiny/$$stage.yaml; done
	$(BIN)/python -m visualrwkv.scenes.card out/tiny/8_everything visualrwkv/assets/tiny \
		--recipes $(addprefix out/tiny/,$(STAGES))

# The stamps make a second call instant; a changed pyproject.toml installs again. Of lmms-eval the tests need its base class
# and its registry, not its own dependencies.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev,train]"
	$(BIN)/python -m pip install --quiet --no-deps "lmms_eval>=0.7.2"
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11 or missing: name another one, for instance make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
