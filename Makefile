# make demo   installs the core into .venv, captions a picture three ways, and writes out/
# make test   installs what the tests need into the same .venv, and runs them with reduced counts
# CONTRIBUTING.md says what the others are for.

PYTHON = python3
BIN = .venv/bin
SCA = $(BIN)/sca
SCENE = examples/scene.png
SHAPES = --box 370,434,448,512 --box 186,357,323,500 --box 15,270,99,354 --box 213,190,341,307 --box 52,356,190,494
ALL = png,jsonl,coco,html
TESTS = tests
LOWEST_TESTS = tests/bench tests/checkpoints tests/inference tests/model tests/parity tests/training

.PHONY: demo test test-all test-lowest check picture docs screenshots results choice core dev all lowest clean
.NOTPARALLEL:

# Nothing of the shell's has a say in what is run.
unexport PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSTARTUP VIRTUAL_ENV
unexport PYTEST_ADDOPTS PYTEST_PLUGINS MYPYPATH FORCE_COLOR COLUMNS

demo: core
	$(SCA) caption $(SCENE) $(SHAPES) --out out/boxes --format $(ALL)
	$(SCA) caption $(SCENE) --point 409,473 --point 261,428 --point 121,425 --out out/points --format $(ALL)
	$(SCA) caption $(SCENE) --everything --out out/everything --format $(ALL)
	@echo "Captioned by boxes, by points and everything at once: open out/boxes/captions.html, and so on."

# Two at a time, with one thread each: most of what is computed is small, and much of the time programs are waited for.
# In the order of the folders: sorted by the number of tests, files with a single long test would come last.
test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-all: all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "" $(TESTS)

# The lower bounds in pyproject.toml: the tests with every requirement at its lower bound, in .venv-lowest.
test-lowest: lowest
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile $(LOWEST_TESTS)

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The picture in the README: a drawn scene that no model was trained on, and what the shipped model says of it.
picture: core
	rm -rf out/drawn
	$(SCA) data export scenes out/drawn --split test --limit 1 image_size=512 seed=29
	cp out/drawn/test/*.png $(SCENE)
	$(SCA) caption $(SCENE) $(SHAPES) --out out/drawn/captions --format png
	cp out/drawn/captions/scene.captions.png examples/

# The site, in site/.
docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The pictures of the demo in docs/.
screenshots: dev
	$(BIN)/python tools/screenshots.py

# The table in the README, from what `sca evaluate` found.
results: core
	$(BIN)/python tools/results_table.py

# The table of combinations to choose from, as planned.
choice: dev
	$(BIN)/python tools/model_table.py

core: GROUP =
dev: GROUP = dev
all: GROUP = dev plugins ray references
lowest: GROUP = --lowest test
lowest: PYTHON = python3.11
core dev all lowest:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; install Python 3.11 or newer." >&2; exit 1; }
	@$(PYTHON) -I tools/environment.py $(GROUP)

# What these commands made. Trained models in runs/ stay.
clean:
	rm -rf .venv .venv-lowest out dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
