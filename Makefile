# make demo    install the core into .venv, caption an image in three ways, and write out/
# make test    install the test requirements into the same .venv and run the tests
# CONTRIBUTING.md describes the other targets.

PYTHON = python3
BIN = .venv/bin
SCA = $(BIN)/sca
SCENE = examples/scene.png
SHAPES = --box 370,434,448,512 --box 186,357,323,500 --box 15,270,99,354 --box 213,190,341,307 --box 52,356,190,494
ALL = png,jsonl,coco,html
TESTS = tests
FLAGS =
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
LOWEST_TESTS = tests/bench tests/checkpoints tests/inference tests/model tests/parity tests/training

.PHONY: demo test quick test-all test-lowest check vocabulary scene docs screenshots results-table model-table plugin-index
.PHONY: core dev all lowest clean
.NOTPARALLEL:

# The settings of the shell have no effect.
unexport PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSTARTUP VIRTUAL_ENV
unexport PYTEST_ADDOPTS PYTEST_PLUGINS MYPYPATH FORCE_COLOR COLUMNS

demo: core
	$(SCA) caption $(SCENE) $(SHAPES) --out out/boxes --format $(ALL)
	$(SCA) caption $(SCENE) --point 409,473 --point 261,428 --point 121,425 --out out/points --format $(ALL)
	$(SCA) caption $(SCENE) --everything --out out/everything --format $(ALL)
	@echo "Captioned by boxes, by points and everything at once: open out/boxes/captions.html, and so on."

# Two processes with one thread each: most computations are small, and many tests wait for other programs.
# The order of the folders is kept: sorted by their number of tests, files with one long test would run last.
test: dev
	$(PYTEST) --no-loadscope-reorder $(FLAGS) $(TESTS)

# Without the tests marked slow, which take seconds or start processes, servers or browsers.
quick: dev
	$(PYTEST) --no-loadscope-reorder -m "not all and not slow" $(FLAGS) $(TESTS)

test-all: all
	$(PYTEST) --no-loadscope-reorder -m "" $(FLAGS) $(TESTS)

# With every requirement at its lower bound in pyproject.toml, in .venv-lowest.
test-lowest: BIN = .venv-lowest/bin
test-lowest: lowest
	$(PYTEST) $(FLAGS) $(LOWEST_TESTS)

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python tools/vocabulary.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint --quiet sca registry benchmarks/sca_bench
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# The terms of tools/vocabulary.toml.
vocabulary: dev
	$(BIN)/python tools/vocabulary.py

# The images in the README: a drawn scene that no model was trained on, and its captions by the bundled model.
scene: core
	rm -rf out/drawn
	$(SCA) data export scenes out/drawn --split test --max-images 1 image_size=512 seed=29
	cp out/drawn/test/*.png $(SCENE)
	$(SCA) caption $(SCENE) $(SHAPES) --out out/drawn/captions --format png
	cp out/drawn/captions/scene.captions.png examples/

# The site, in site/.
docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The screenshots of the demo in docs/.
screenshots: dev
	$(BIN)/python tools/screenshots.py

# The results in docs/evaluation.md, as measured by `sca evaluate`.
results-table: core
	$(BIN)/python tools/results_table.py

# The combinations of components in docs/models.md, as computed by `sca plan`.
model-table: dev
	$(BIN)/python tools/model_table.py

# The packages in docs/plugin-index.md, from docs/plugin-index.toml.
plugin-index: core
	$(BIN)/python tools/plugin_index.py

core: GROUP =
dev: GROUP = dev
all: GROUP = dev plugins ray references
lowest: GROUP = --lowest test
lowest: PYTHON = python3.11
core dev all lowest:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; install Python 3.11 or newer." >&2; exit 1; }
	@$(PYTHON) -I tools/environment.py $(GROUP)

# Trained models in runs/ are kept.
clean:
	rm -rf .venv .venv-lowest out dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
