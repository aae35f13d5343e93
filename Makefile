# Everything runs in .venv, which the first target that needs it makes from requirements.lock.
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell python$(version) -c '' 2>/dev/null && echo python$(version))) python3.11)
BIN := .venv/bin
UV_VERSION := 0.13.9
# Start-up is half of the demo's time where bytecode is not written.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow chaos check bench gallery pages lock down clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed ## make .venv with the locked versions

.venv/installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here; set PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --link-mode=copy requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	@touch $@

demo: .venv/installed ## run the whole pipeline on the digits, and show where to look
	@$(BIN)/eqm up
	@$(BIN)/eqm pipeline demo

test: .venv/installed ## run all tests but those marked slow or gpu
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

slow: .venv/installed ## run the tests marked slow
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m slow

chaos: .venv/installed ## kill ranks, torchrun, the flow and S3 in a training, compare bits (hours)
	PYTHONPATH=tests:. $(BIN)/python tests/chaos.py

check: .venv/installed ## ruff, format, import rules, types, known holes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/python -m infra.audit

bench: .venv/installed ## measure speed and memory, as ratios within one run
	$(BIN)/python -m bench

gallery: .venv/installed ## draw docs/gallery.md and its pictures from real runs
	$(BIN)/python -m bench.gallery

pages: .venv/installed ## take pictures of report, MLflow and Prefect (after make demo)
	$(BIN)/python -m bench.pages

lock: ## resolve requirements.lock again from pyproject.toml
	@[ -x $(BIN)/uv ] || $(MAKE) --no-print-directory setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --extra dev --extra server pyproject.toml -o requirements.lock

down: ## stop the embedded services; data is kept
	@$(BIN)/eqm down

clean: ## stop the services and delete .eqm and .venv
	@if [ -x $(BIN)/eqm ]; then $(BIN)/eqm down; fi
	rm -rf .eqm .venv
