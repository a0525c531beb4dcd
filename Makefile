# make demo    answer a recording, from nothing to a WAV file
# make test    run the tests
# make lint    check style, layering and types
# make check   both
# make sanitize    the C parts and their tests under sanitizers, on Linux
#
# The first one called makes a virtual environment in .venv. On Linux with an NVIDIA
# GPU: make demo EXTRA=cuda

PYTHON ?= python3
VENV ?= .venv
ifeq ($(shell uname -s),Linux)
EXTRA ?= cpu
endif

# Tests run side by side; more than a few would want much memory.
WORKERS := -n auto --maxprocesses 4
comma := ,
BIN := $(VENV)/bin
PACKAGE := .$(if $(EXTRA),[$(EXTRA)])
PACKAGE_DEV := .[dev$(if $(EXTRA),$(comma)$(EXTRA))]
BUILD_FILES := pyproject.toml $(wildcard setup.py pplex/engine/c/*.[ch])

# An environment for another EXTRA is another environment: its stamp has another name.
STAMP := $(VENV)/.installed-$(or $(EXTRA),plain)
STAMP_DEV := $(STAMP)-dev
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

DEMO_MODEL := $(if $(wildcard pplex/mini/config.json),mini,tests/data/tiny)
SAMPLE ?= $(firstword $(sort $(wildcard samples/teacher*.wav)) \
	$(sort $(wildcard samples/*.wav)) tests/data/respond/user_a.wav)

# What a C part computes, and what it is handed.
SANITIZED := build/sanitized
SANITIZED_TESTS ?= tests/test_c_engine.py tests/test_c_memory.py tests/test_codec.py \
	tests/conformance -k 'test_c_ or [c- or [c] or test_codec.py and not on_gpus'
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	-fno-omit-frame-pointer -g1
PRELOADED = $(foreach lib,asan stdc++,$(shell $(CC) -print-file-name=lib$(lib).so))

.PHONY: demo test lint check sanitize clean

demo: $(STAMP)
	@mkdir -p demo
	$(BIN)/pplex respond $(SAMPLE) -o demo/reply.wav --model $(DEMO_MODEL) \
		--transcript demo/reply.json --stats demo/stats.json --greedy --overwrite
	@$(BIN)/python -c 'import json; print("The agent said:", json.load(open(\
		"demo/reply.json", encoding="utf-8"))["text"] or "(nothing)")'
ifneq ($(DEMO_MODEL),mini)
	@echo "This model is a tiny one with random weights, made for tests: its words and"
	@echo "its sound are noise. It shows that the program runs, nothing more."
endif
	@echo "Listen to demo/reply.wav: left the recording $(SAMPLE), right the agent."
	@echo "Its words with their times are in demo/reply.json, timings in demo/stats.json."
	@echo "Next, your own recording: source $(BIN)/activate; pplex respond YOURS.wav -m mini"

test: $(STAMP_DEV)
	$(BIN)/python -m pytest -q $(WORKERS)

lint: $(STAMP_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

check: lint test

# A build apart: nothing of it is ever loaded without the sanitizers' library. That is
# loaded before Python, and C++'s with it, whose exceptions it must know.
sanitize: $(STAMP_DEV)
	rm -rf $(SANITIZED)
	CFLAGS='$(SANITIZERS)' LDFLAGS='$(SANITIZERS)' $(BIN)/python setup.py -q build \
		--build-base $(SANITIZED)/base --build-lib $(SANITIZED)/lib
	ls $(SANITIZED)/lib/pplex/engine/c/_native.*.so
	PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD='$(PRELOADED)' \
		$(BIN)/pytest -q $(WORKERS) -p no:cacheprovider $(SANITIZED_TESTS)

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache

$(STAMP): $(BUILD_FILES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
		"pplex needs Python 3.10 or newer, and $(PYTHON) is not; install one and say" \
		"which: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import platform, sys; \
		sys.exit(sys.platform == "darwin" and platform.machine() != "arm64")' || { echo \
		"pplex needs a Mac with Apple silicon, and $(PYTHON) is a Python for Intel; on" \
		"Apple silicon take one for arm64: make demo PYTHON=/opt/homebrew/bin/python3" >&2; \
		exit 1; }
	@echo "Setting up $(VENV); the first time takes a few minutes."
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) '$(PACKAGE)'
	@touch $@

$(STAMP_DEV): $(STAMP)
	$(INSTALL) '$(PACKAGE_DEV)'
	@touch $@
