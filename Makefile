# moefold's commands. `make` alone lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
REPORTS := find runs -name report.html -newer .venv/.quickstart 2>/dev/null

.DEFAULT_GOAL := help

.PHONY: help venv quickstart test typing bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make .venv with everything that training and the tests need; again after pyproject.toml has changed

# torch first: the other packages then build and resolve against the version that was tried. DeepSpeed compiles on first use only.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet triton==3.7.1
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

quickstart: ## train a small model on four processes of this machine and write a report
	@set -e; start=$$(date +%s); \
	$(MAKE) --no-print-directory venv; \
	ready=$$(date +%s); touch .venv/.quickstart; \
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 \
		-m moefold.launch.pretrain launch/configs/quickstart.toml; \
	end=$$(date +%s); \
	echo; echo "installation: $$((ready - start)) s"; echo "run:          $$((end - ready)) s"; \
	report=$$($(REPORTS)); \
	if [ -z "$$report" ]; then echo "the run has left no report in runs/" >&2; exit 1; fi; \
	echo "report:       $$report"

test: venv typing ## lint, types and all tests that this machine can run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/interpreter $(ARGS)
	$(BIN)/pytest -n 2 --dist worksteal -m 'not alone' --ignore=tests/interpreter $(ARGS)
	$(BIN)/pytest -m alone --ignore=tests/interpreter $(ARGS)

# mypy cannot follow an editable install whose package is the repository root: show it the package as a folder of links.
typing:
	@rm -rf .typing && mkdir -p .typing/moefold
	@for part in __init__.py py.typed moe kernels parallel launch; do ln -s ../../$$part .typing/moefold/$$part; done

bench: venv ## one benchmark: make bench NAME=... [ARGS=...]; without a name, list them
	$(BIN)/python -m bench $(NAME) $(ARGS)

clean: ## remove caches and build outputs; keeps .venv and runs
	rm -rf .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
