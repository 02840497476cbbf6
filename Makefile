# Needs Python 3.11 or newer with venv, make and git; everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
NEWEST := .venv-newest
# For `make gpu`: .venv, or without one the torch and triton that PYTHON has.
GPU := $(if $(wildcard $(INSTALLED)),$(VENV),.venv-gpu)
# Tests start many processes, which read what the first one compiled.
export PYTHONDONTWRITEBYTECODE :=
COMPARISONS := model_cards/results/interoperability.jsonl
# The kept GPT-2, and how it is healed when it is converted: as in the quickstart.
GPT2 := model_cards/models/sm-ln-g
HEALING := --heal-steps 325 --distill --learning-rate 2e-3 --evaluation-tokens 200000
# A file's tests run in one process; files are begun in the order of tests/conftest.py, the longest first.
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SOURCES := modeling_entropy_gpt conversion training evaluation entropy_gpt tests docs/site_hooks.py

.PHONY: gpu install docs quickstart results healed runs study test test-all test-releases test-newest interoperability style gateway-page bench clean

install: $(INSTALLED)  ## Installs everything into .venv.

quickstart: $(INSTALLED)  ## Trains, converts, compares, draws, saves and reloads small models, and runs two privately.
	$(BIN)/entropy-gpt quickstart $(ARGS)

results: $(INSTALLED)  ## Runs the quickstart anew, and shows what it finds in docs/quickstart.md; keeps two of its models. Commit, then `make healed`.
	rm -rf quickstart_output
	$(BIN)/entropy-gpt quickstart
	cp quickstart_output/results.json model_cards/results/quickstart.json
	cp quickstart_output/pictures/entropy_comparison.png model_cards/results/quickstart_entropy.png
	for model in sm-ln-g converted; do \
		cp quickstart_output/models/$$model/*.json quickstart_output/models/$$model/*.safetensors \
			model_cards/models/$$model/ || exit 1; done
	$(BIN)/python -m entropy_gpt.programs.quickstart.page

healed: $(INSTALLED)  ## Converts the kept GPT-2 to softmax alone and to power4, for docs/ladder.md; on a clean commit.
	rm -rf runs/healed-softmax runs/healed-power4
	$(BIN)/entropy-gpt convert $(GPT2) --to "SM(t_h)+ScFuFFN" --output runs/healed-softmax $(HEALING)
	$(BIN)/entropy-gpt convert $(GPT2) --to "Pow4(t_h)+ScFuFFN" --output runs/healed-power4 $(HEALING) \
		--set log_sum_coefficient=0.001
	for model in healed-softmax healed-power4; do \
		cp runs/$$model/results.json model_cards/results/$$model.json || exit 1; done
	$(BIN)/python -m entropy_gpt.programs.quickstart.page

runs: $(INSTALLED)  ## Trains the recipe python-stdlib-small in three architectures, for docs/training.md.
	rm -rf runs/sm-ln-g runs/sm-scfuffn runs/ereg-smt-scfuffn
	$(BIN)/entropy-gpt train python-stdlib-small notation="SM+LN+G" output_dir=runs/sm-ln-g
	$(BIN)/entropy-gpt train python-stdlib-small notation="SM+ScFuFFN" output_dir=runs/sm-scfuffn
	$(BIN)/entropy-gpt train python-stdlib-small output_dir=runs/ereg-smt-scfuffn
	for run in sm-ln-g sm-scfuffn ereg-smt-scfuffn; do \
		mkdir -p model_cards/results/runs/$$run && cp runs/$$run/training_log.jsonl model_cards/results/runs/$$run/ || exit 1; done
	$(BIN)/entropy-gpt plot model_cards/results/runs/sm-ln-g model_cards/results/runs/sm-scfuffn \
		model_cards/results/runs/ereg-smt-scfuffn --output docs/training

study: $(INSTALLED)  ## Does what the study's records lack (many hours), and writes its page, its pictures and the README's table.
	mkdir -p runs/study runs/scaling runs/ladder
	cp model_cards/results/study.json runs/study/study.json
	cp model_cards/results/study_models.json runs/study/models.json
	cp model_cards/results/scaling.json runs/scaling/study.json
	cp model_cards/results/ladder.json runs/ladder/study.json
	$(BIN)/entropy-gpt study $(ARGS)
	$(BIN)/entropy-gpt study --protocol scaling $(ARGS)
	$(BIN)/entropy-gpt study --protocol ladder $(ARGS)
	cp runs/study/study.json model_cards/results/study.json
	cp runs/study/models.json model_cards/results/study_models.json
	cp runs/scaling/study.json model_cards/results/scaling.json
	cp runs/ladder/study.json model_cards/results/ladder.json
	$(BIN)/python -m entropy_gpt.programs.study.page

test: $(INSTALLED)  ## Runs the default tests, offline, in minutes.
	$(BIN)/$(PYTEST) $(ARGS)

test-all: $(INSTALLED)  ## Runs every test that needs neither a GPU nor another environment, also slow ones; offline.
	$(BIN)/$(PYTEST) -m "not gpu and not releases" --hypothesis-profile=whole $(ARGS)

test-releases: $(INSTALLED)  ## Runs the tests with other releases and other tools, which pip installs for them.
	$(BIN)/$(PYTEST) -m releases $(ARGS)

test-newest:  ## Runs the default tests with the newest releases that pip finds, torch apart.
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev,private]"
	$(NEWEST)/bin/$(PYTEST) $(ARGS)

gpu: $(GPU)/installed  ## Runs all tests that need a GPU, and the benchmark of docs/performance.md, in minutes, offline.
	$(GPU)/bin/entropy-gpt doctor --gpu
	$(GPU)/bin/python -m pytest -m gpu $$(grep -rl --include='test_*.py' mark.gpu tests) $(ARGS)
	$(GPU)/bin/python -m entropy_gpt.evaluation.benchmarks.gpu

interoperability: $(INSTALLED)  ## Compares the model with other tools and releases, and writes the table of what came of it.
	rm -f $(COMPARISONS).new
	$(BIN)/$(PYTEST) -m "not gpu" $$(grep -rl --include='test_*.py' compared tests) \
		--record-comparisons $(COMPARISONS).new
	mv $(COMPARISONS).new $(COMPARISONS)
	$(BIN)/python -m entropy_gpt.evaluation.showing.interoperability

docs: $(INSTALLED)  ## Builds the documentation, with a reference from the docstrings, into build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

style: $(INSTALLED)  ## Checks code and prose; `make style FIX=1` mends what ruff can.
	$(BIN)/ruff check $(if $(FIX),--fix) $(SOURCES)
	$(BIN)/ruff format $(if $(FIX),,--check) $(SOURCES)
	$(BIN)/python -m tests.check_prose

gateway-page: $(INSTALLED)  ## Asks a private model by the gateway's page in a browser, and draws it: docs/gateway.png.
	$(BIN)/python -m tests.entropy_gpt.gateway.draw_page

bench: $(INSTALLED)  ## Runs every benchmark but that of `make gpu`, side by side with what it is held against.
	for benchmark in $(filter-out %/gpu.py,$(wildcard evaluation/benchmarks/[a-z]*.py)); do \
		$(BIN)/python -m entropy_gpt.evaluation.benchmarks.$$(basename $$benchmark .py) || exit 1; done

clean:
	rm -rf $(VENV) $(NEWEST) .venv-gpu build *.egg-info

# torch first and alone: on a machine that holds a CPU build of it, any other order may replace it by a larger one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,private]"
	touch $(INSTALLED)

.venv-gpu/installed:
	$(PYTHON) -m venv --system-site-packages --without-pip .venv-gpu
	$(PYTHON) -m pip --python .venv-gpu/bin/python install --quiet --disable-pip-version-check \
		--no-index --no-deps --no-build-isolation -e .
	touch $@
