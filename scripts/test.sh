#!/usr/bin/env bash
# Everything that CI runs: lint, types, unit tests, doctests, multi-process tests. Needs no GPU.
# Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
step() { echo "test: $1"; shift; "$@"; }
step "ruff (lint)" .venv/bin/ruff check --no-cache .
step "ruff (format)" .venv/bin/ruff format --no-cache --check .
step "mypy (types)" .venv/bin/mypy
step "pytest (unit, doctest, multi-process)" .venv/bin/python -m pytest -q "$@"
