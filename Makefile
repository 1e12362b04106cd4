# Everything happens in .venv; nothing but Python 3.11 (or later, with its venv: Debian's python3-venv) and make is needed.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LOCK = $(BIN)/uv pip compile -q --upgrade --python-version 3.11 --python-platform linux --generate-hashes --no-annotate \
  --custom-compile-command 'make lock'

.PHONY: help demo test crash bench soak lint serve migrate lock audit dist clean
help:  ## show this help
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/embedded  ## run database, service and simulator for 10 s and prove that nothing was lost
	$(BIN)/orbitstream demo

test: .venv/dev  ## run the tests: real processes, a real private PostgreSQL (4 to 6 minutes on 2 cores)
	$(BIN)/python -m pytest -n 3 --dist loadfile tests/unit tests/integration

crash: .venv/dev  ## each fault of the delivery contract at length, 1,000 random kills; writes crash-report.json (20 to 27 minutes)
	ORBITSTREAM_CRASH_LONG=1 ORBITSTREAM_CRASH_REPORT=$(CURDIR)/crash-report.json \
	  $(BIN)/python -m pytest -s --timeout 3600 tests/crash tests/unit/test_ring_model.py

bench: .venv/bench  ## what each stage costs, every target and its result, simpler designs, capacity (about an hour)
	$(BIN)/python -m pytest -q -p no:randomly bench --benchmark-max-time 0.5
	-$(BIN)/python -m bench.targets --again
	$(BIN)/python -m bench.peers
	$(BIN)/orbitstream capacity --output bench/results

soak: .venv/bench  ## SOAK_MINUTES (30) at 70 % of the knee with a kill a minute: nothing lost, memory and latency flat
	$(BIN)/python -m bench.soak --minutes $${SOAK_MINUTES:-30}

lint: .venv/dev  ## check style, types and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/hadolint deploy/Dockerfile

serve: .venv/embedded  ## run the service on port 8080, with an embedded PostgreSQL unless DATABASE_URL is set
	$(BIN)/orbitstream serve

migrate: .venv/embedded  ## bring the database of DATABASE_URL to this version's schema
	$(BIN)/orbitstream migrate

lock: .venv/release  ## lock the image's requirements, with hashes, to the newest versions that fit
	$(LOCK) -o deploy/requirements.txt setup.cfg
	printf 'setuptools>=77\nwheel\n' | $(LOCK) -o deploy/requirements-build.txt -

audit: .venv/release  ## look for known vulnerabilities in what is locked (asks the internet), and write dist/sbom.json
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r deploy/requirements.txt
	mkdir -p dist && $(BIN)/cyclonedx-py requirements deploy/requirements.txt --of JSON -o dist/sbom.json

dist: .venv/release  ## build wheel and sdist into dist/
	rm -rf build dist/orbitstream-* && $(BIN)/python -m build -q && rm -rf build

clean:  ## remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

.venv/%: setup.cfg pyproject.toml
	@echo "setting up .venv with $$($(PYTHON) --version) (about a minute, once)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off --no-compile -e '.[$*]' | grep -E --line-buffered '^(Collecting|Installing|Successfully)'
	@touch $@
