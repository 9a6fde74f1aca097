#!/usr/bin/env bash
# Builds the documentation into site/; a warning is an error. Fetches nothing.
# Usage: bash scripts/docs.sh        To see it while you write: .venv/bin/python -m mkdocs serve
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet --site-dir site
