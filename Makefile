# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# Tests start processes: each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
QUICK = tests/test_architecture.py tests/config/test_load.py tests/losses tests/eval

# Scripts that are run by hand: calls whose arguments have changed are errors, types are not.
LOOSE = $(addprefix --disable-error-code=,attr-defined arg-type union-attr assignment operator misc call-overload return-value no-untyped-def)

.PHONY: demo demo-chat quick test docs words test-long test-processes test-cuda test-full headers test-serving test-serving-kinds gpu-check check format install clean

demo: $(INSTALLED)
	$(BIN)/drafttrain fit recipes/demo.yaml

# A real chat model on this machine: three streamed answers with the accepted draft tokens marked, then the speed-up.
demo-chat: $(INSTALLED)
	$(BIN)/drafttrain chat builtin:smollm2_eagle3 --max-new-tokens 160 "Why is the sky blue?" \
	  "Write a Python function that counts the vowels of a word." "Give me three tips for learning a language."
	$(BIN)/drafttrain chat builtin:smollm2_eagle3 --measure --within 120

# Under a minute, before a push: the losses, the evaluator's identities, recipes, the architecture.
quick: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n 2 $(QUICK)

# Each process takes a half of the files in order, then of what the other has left: what a file shares is made once.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n 2 --dist worksteal

# Thousands of draws, several trainings in a row, imports of other processes: what CI runs beside `make test`.
test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n 2 --dist worksteal -m long

test-processes: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "processes or multi_host" -rs --durations=15

# Tensors that claim to be on CUDA: the guard must be loaded before torch, so it is a process of its own.
test-cuda: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -p tests.cuda.plugin -m pretended_cuda tests/cuda -rs --durations=10

# The figures in the headers of all recipes for real models, counted again: minutes.
headers: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n 2 -m slow tests/commands/test_plan_header.py

test-full: $(INSTALLED)
	OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -m "not gpu and not multi_gpu and not multi_host and not serving and not pretended_cuda"

# Serving engines live in environments of their own, outside of this folder: some gigabytes, made once by their pins.
SERVING = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -m serving

test-serving: $(INSTALLED)
	$(BIN)/drafttrain engines install vllm llama.cpp openvino speculators
	$(SERVING) tests/serving/engines_installed

# One configuration a kind, in vLLM.
test-serving-kinds: $(INSTALLED)
	$(BIN)/drafttrain engines install vllm
	$(SERVING) tests/serving/engines_installed/test_vllm.py -k "each_kind and not (speculators or norm or taps or vocab)"

# For whoever has a GPU: the tests that need one or several, then the benchmarks; writes benchmarks/gpu.md (docs/gpu.md).
gpu-check: $(INSTALLED)
	@failed=0; \
	TOKENIZERS_PARALLELISM=false $(BIN)/pytest -m "gpu or multi_gpu" tests/gpu -rs --durations=10 || failed=1; \
	$(BIN)/python benchmarks/gpu.py || failed=1; \
	exit $$failed

check: $(INSTALLED) words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=src:benchmarks $(BIN)/mypy --follow-imports silent $(LOOSE) benchmarks/*.py

# Words that are no English of this field (CONTRIBUTING.md says what to write); "law of large numbers" is meant.
words:
	@! grep -rniwE --include='*.py' --include='*.md' --include='*.html' --include='*.yaml' \
	  "laws?|un?told|anew|hands? out|otherwise than|mended|optimiser" src docs recipes README.md CHANGELOG.md | grep -viE 'law of (large numbers|succession)|"(law|told)"'

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache
