#!/usr/bin/env bash
# Everything that CI runs: lint, types, documentation, unit tests, doctests, multi-process tests. Needs no GPU.
# Usage: bash scripts/test.sh [quick] [pytest arguments]
#   quick: lint, types, and the tests that are not marked slow, for while you work
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
quick=
if [ "${1:-}" = quick ]; then quick=1; shift; fi
workers=(-n 2) # one thread each
step() { echo "test: $1"; shift; "$@"; }
step "ruff (lint)" .venv/bin/ruff check --no-cache .
step "ruff (format)" .venv/bin/ruff format --no-cache --check .
step "mypy (types)" .venv/bin/mypy
if [ -n "$quick" ]; then
    step "pytest (quick)" .venv/bin/python -m pytest -q "${workers[@]}" -m "not slow" "$@"
    exit
fi
step "mkdocs (documentation)" bash scripts/docs.sh
if [ $# -gt 0 ]; then
    step "pytest" .venv/bin/python -m pytest -q "$@"
    exit
fi
# The tests of many ranks have processes of their own: beside long searches they would wait for a core.
step "pytest (multi-process)" .venv/bin/python -m pytest -q "${workers[@]}" tests/distributed --durations=10
step "pytest (unit, doctest)" .venv/bin/python -m pytest -q "${workers[@]}" --ignore tests/distributed --durations=15
