# Two commands on a fresh machine: `make demo` runs the main job, `make test` the tests.
# Each makes its own virtual environment in the checkout; nothing is installed globally.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO_OUT ?= runs/demo
# torch of `make compat`: 2.13.0 has a build with no GPU; 2.8.0, which NVIDIA pins, brings 6 GB of CUDA with it.
COMPAT_TORCH ?= 2.13.0
COMPAT := .venv-compat-$(COMPAT_TORCH)
# transformers 4.57.1, and what it needs that the first environment has newer or not at all.
LAID := $(VENV)/oldest-transformers
LAID_OVER := transformers|huggingface-hub|tokenizers|requests|urllib3|charset-normalizer|certifi
# What builds the documentation; it reads the package's source and installs none of what that needs.
DOCS := .venv-docs
# Environments with the wheel in them, by its extras.
WHEEL := .venv-wheel
# Another trainer of drafts, beside this package and in an environment of its own.
SPECULATORS := .venv-speculators

.PHONY: demo fast test speed page-bench screenshots golden faults kills fuzz compat compat-quick speculators docs wheel lint types check clean

demo: $(STAMP)
	$(BIN)/alpamayo-dflash demo --out $(DEMO_OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The unit tests alone, the slowest named.
fast: $(STAMP)
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile --durations=15

# What is fast over its plain form, on the tiny target on a CPU, beside the kept ratios; fails where one is worse.
# SPEED=--write keeps the new ones.
speed: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.speed.ratios $(SPEED)

# The page of a thousand clips in Chromium (Debian's package), made of the demo's run.
page-bench: $(STAMP)
	$(BIN)/python -m tests.browser.page_bench $(DEMO_OUT) --out docs/results/page_tiny.json

# Pictures of the demo's page for the documentation.
screenshots: $(STAMP)
	$(BIN)/python -m tests.browser.screenshots $(DEMO_OUT) --out docs/images

# The parity tests alone; ALPAMAYO_GOLDEN names the fixtures' folder (default: ../shared/golden).
golden: $(STAMP)
	ALPAMAYO_GOLDEN="$${ALPAMAYO_GOLDEN:-../shared/golden}" $(BIN)/python -m pytest tests/integration/test_golden.py

# All that breaks things on purpose, on two cores.
faults: $(STAMP)
	$(MAKE) --jobs 2 kills fuzz

# Stages killed 200 times and before each change of a file, and on full and read-only disks (as root).
kills: $(STAMP)
	$(BIN)/python -m tests.faults.kills --kills 200 --disks

# Every reader with 60,000 damaged and hostile inputs; ALPAMAYO_FUZZ_SEED takes others.
fuzz: $(STAMP)
	ALPAMAYO_FUZZ=large $(BIN)/python -m pytest tests/faults/test_fuzz_json.py tests/faults/test_fuzz_tensors.py \
		tests/faults/test_fuzz_clips.py

# Every test again, golden ones too, in a second environment with the oldest versions that are promised.
compat: $(COMPAT)/installed
	ALPAMAYO_GOLDEN="$${ALPAMAYO_GOLDEN:-../shared/golden}" $(COMPAT)/bin/python -m pytest -n 2 --dist loadfile

# A load, a text and lossless texts, with the oldest transformers laid over the first environment.
compat-quick: $(LAID)/installed
	PYTHONPATH=$(LAID) ALPAMAYO_TRANSFORMERS="$$(cat $(LAID)/installed)" \
		$(BIN)/python -m pytest tests/integration/test_oldest_transformers.py

# The environment of speculators, and the tests beside it; tests/peers/speculators_training.py runs there.
speculators: $(SPECULATORS)/installed
	$(SPECULATORS)/bin/python -m pytest tests/peers/test_speculators_draft.py

# The documentation as a site, in site/. It is strict: a link that leads nowhere, or a public name without a page,
# fails it (not with --quiet, which hides warnings from the strict build too).
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

# The wheel, in two empty environments as users install it: alone it decodes a window of arrays, with [all] clips.
wheel: $(WHEEL)-bare/installed $(WHEEL)-all/installed
	cd $(WHEEL)-bare && bin/python -I ../tests/helpers/decode_arrays.py
	$(WHEEL)-all/bin/python -I $(WHEEL)-all/bin/alpamayo-dflash world --out $(WHEEL)-all/world --num-chunks 1 --clips-per-chunk 2
	cd $(WHEEL)-all && bin/python -I ../tests/helpers/decode_clips.py world

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src

types: $(STAMP)
	$(BIN)/mypy

check: test lint types

# torch is named in the same call as the package, so that pip takes the pinned build with no GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	touch $(STAMP)

$(COMPAT)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(COMPAT)
	sed 's/^torch==.*/torch==$(COMPAT_TORCH)/' constraints-oldest.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check -c $(COMPAT)/constraints.txt \
		torch pytest pytest-xdist hypothesis 'setuptools>=77' -e '.[all]'
	touch $@

# torchvision and torchaudio, which it brings, do not load beside a torch with no GPU, and break Qwen3's import.
$(SPECULATORS)/installed: pyproject.toml
	$(PYTHON) -m venv $(SPECULATORS)
	$(SPECULATORS)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 speculators==0.9.0 pytest -e '.[clips,train]'
	$(SPECULATORS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

dist/built: pyproject.toml README.md LICENSE $(shell find src -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*')
	rm -rf dist build
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	rm -rf build
	touch $@

$(WHEEL)-bare/installed: EXTRAS :=
$(WHEEL)-all/installed: EXTRAS := [all]
$(WHEEL)-bare/installed $(WHEEL)-all/installed: dist/built constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -I -m pip install --quiet --disable-pip-version-check -c constraints.txt torch \
		"$$(echo dist/*.whl)$(EXTRAS)"
	touch $@

$(DOCS)/installed: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-docs.txt
	touch $@

$(LAID)/installed: $(STAMP) constraints-oldest.txt
	rm -rf $(LAID)
	mkdir $(LAID)
	grep -E '^($(LAID_OVER))==' constraints-oldest.txt > $(LAID)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
		--target $(LAID) -r $(LAID)/requirements.txt
	sed -n 's/^transformers==//p' $(LAID)/requirements.txt > $@

clean:
	rm -rf $(VENV) .venv-compat-* $(SPECULATORS) $(DOCS) $(WHEEL)-* runs site dist
