# run    sets up what serving needs and starts the service: make run PORT=8001
# test   sets up everything and runs every test that this computer can run
# lint   ruff and mypy
# bench  measures speed against the floor of the same run; bench-many: with many tasks; bench-peers: beside other servers
# torture  injects every fault at full length (hours), or some: make torture NAMES="redis-down soak"
# lock   pins what the images install, by hash; sbom, licences and advisories look into it
# train  trains the two artifacts that ship, from data in $FEWSHOT_DATA (see README)
# offline  fetches what runs exported tasks in a browser (needs npm)

PYTHON ?= python3
VENV ?= .venv
PORT ?= $(or $(FEWSHOT_PORT),8000)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test lint bench bench-many bench-peers torture lock sbom licences advisories train offline redis-server chromium faults clean

$(VENV)/serve: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing what serving needs into $(VENV)..."
	@$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/dev: pyproject.toml deploy/constraints.txt $(VENV)/serve
	@echo "Installing what training and tests need into $(VENV)..."
	@$(PIP) -c deploy/constraints.txt -e '.[serve,train,dev]'
	@touch $@

run: $(VENV)/serve
	@FEWSHOT_PORT=$(PORT) exec $(BIN)/python -m service

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Redis is part of what is tested; Debian and its kin can install it.
redis-server:
	@command -v redis-server >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends redis-server; } \
	  || { echo "redis-server is missing and cannot be installed here: install it and run make test again."; exit 1; }

# The page is tested in a real browser; Debian's is taken, any Chromium on the path will do.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends chromium; } \
	  || { echo "chromium is missing and cannot be installed here: install it and run make test again."; exit 1; }

# What faults are injected with: a proxy, a look at system calls, another clock.
faults:
	@for tool in nginx strace faketime; do command -v $$tool >/dev/null && continue; \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -q \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends nginx-light strace faketime && break; \
	  echo "$$tool is missing and cannot be installed here: faults that need it are skipped."; done

# The short forms of the faults wait more than they work, so they run beside all other tests.
test: $(VENV)/dev redis-server chromium faults lint
	@export FEWSHOT_TEST_REQUIRE=$${FEWSHOT_TEST_REQUIRE:-torch,redis,browser}; \
	log=$$(mktemp); $(BIN)/python -m pytest -m torture -n 0 -q --durations=10 >$$log 2>&1 & faults=$$!; \
	trap 'kill $$faults' INT TERM; \
	$(BIN)/python -m pytest -m 'not torture' -q --durations=30; others=$$?; \
	wait $$faults; faults=$$?; cat $$log; rm -f $$log; \
	test $$others = 0 -a $$faults = 0

bench: $(VENV)/dev
	$(BIN)/python deploy/bench.py

bench-many: $(VENV)/dev redis-server
	$(BIN)/python deploy/many.py

bench-peers: $(VENV)/dev
	$(BIN)/python deploy/peers.py

torture: $(VENV)/dev redis-server faults
	$(BIN)/python -m tests.torture $(NAMES)

lock: $(VENV)/dev
	PYTHON=$(abspath $(BIN))/python bash deploy/lock.sh

sbom licences advisories: $(VENV)/dev
	@$(BIN)/python deploy/$@.py

train: $(VENV)/dev
	PATH="$(abspath $(BIN)):$$PATH" bash deploy/train.sh

offline:
	@bash deploy/offline.sh

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
