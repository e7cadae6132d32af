# make demo     a correct answer about a bundled image; sets everything up first
# make test     the tests, at most eight minutes on two cores; sets everything up first
# make test-all every test, with full counts and real sizes
# make lint     ruff and strict mypy; `make format` repairs what ruff can
# make smoke    a sample of the slow tests
# make kernels  every kernel compiled for both architectures and compared with its table; no GPU needed
# make bench    the benchmarks of this machine and the tables made from them
# make browser  Chromium for the test of the server's page, on Debian and as root
# make install  the environment alone, with everything that development needs
# make clean    removes build outputs and caches; `rm -rf .venv` removes the environment
#
# PYTHON=python3.12      the interpreter (3.11 or 3.12) to make the environment from
# TORCH_INDEX=https://…  the package index to take PyTorch from, e.g. one that has CPU builds only

VENV := .venv
BIN := $(VENV)/bin
PYTHON = $(shell for candidate in python3 python3.12 python3.11; do \
	$$candidate -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$candidate && break; done)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Our kernels/ stands in the root: python must never put the current folder on its path.
export PYTHONSAFEPATH := 1

# The Triton whose table of compiled kernels is checked, where no GPU asks for the one that its PyTorch was made with.
TRITON := 3.9.0
VENV_3_6 := .venv-triton-3.6

.PHONY: install demo test test-all smoke kernels kernels-3.6 lint format bench browser clean

demo: $(VENV)/.base
	$(BIN)/vitrail generate "What is the total?" --image examples/receipt.png

install: $(VENV)/.dev

test: $(VENV)/.dev
	$(PYTEST)

test-all: $(VENV)/.dev
	$(PYTEST) -m ""

smoke: $(VENV)/.dev
	$(PYTEST) -m "slow and not gpu" --smoke

kernels: $(VENV)/.dev
	$(BIN)/python bench/kernel_resources.py
	$(BIN)/python bench/cuda_resources.py

kernels-3.6: $(VENV_3_6)/.done
	$(VENV_3_6)/bin/python bench/kernel_resources.py

lint: $(VENV)/.dev .mypy/vitrail
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --no-namespace-packages tools/nano

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python bench/quality.py --model nano
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/report.py

browser:
	@command -v chromedriver >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }

clean:
	rm -rf build dist *.egg-info .mypy .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Each stamp is written last, so an install that was cut short is repeated; `.begun` marks an environment that was never
# finished, which starts again from nothing. An environment made by hand is used as it is.
$(VENV)/.base: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	@if [ -e $(VENV)/.begun ]; then rm -rf $(VENV); fi
	@if [ ! -e $(BIN)/python ]; then \
		test -n "$(PYTHON)" || { echo "vitrail needs Python 3.11 or 3.12 with venv: name one, PYTHON=..." >&2; exit 1; }; \
		mkdir -p $(VENV) && touch $(VENV)/.begun && $(PYTHON) -m venv $(VENV); fi
	@if ! nvidia-smi -L >/dev/null 2>&1; then \
		echo "No NVIDIA GPU seen: installing PyTorch for the CPU ..."; \
		$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)); fi
	@echo "Installing vitrail ..."
	@$(PIP) -e .
	@rm -f $(VENV)/.begun && touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing what the tests need ..."
	@$(PIP) -e ".[dev,export,otel,pdf,ray,server,structured,tensorrt,video]"
	@if [ "$$(uname)" = Linux ]; then $(PIP) -e ".[cuda]"; \
		nvidia-smi -L >/dev/null 2>&1 || $(PIP) --no-deps triton==$(TRITON); fi
	@touch $@

# Another Triton, and the NumPy that its interpreter wants, before everything else of the environment.
$(VENV_3_6)/.done: $(VENV)/.dev
	@echo "Installing Triton 3.6 ..."
	@$(BIN)/python -m venv $(VENV_3_6)
	@$(VENV_3_6)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps triton==3.6.0 "numpy<2.4"
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(VENV_3_6)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/everything_else.pth
	@touch $@

# A link under the package's own name, by which mypy reads this folder as `vitrail` whatever it is called.
.mypy/vitrail:
	@mkdir -p .mypy && ln -s .. $@
