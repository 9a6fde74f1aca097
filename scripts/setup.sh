#!/usr/bin/env bash
# Makes .venv with faiss-knn in editable mode, every extra that the tests and scripts need, and the tested versions.
# Usage: bash scripts/setup.sh        Environment: PYTHON (default python3), FAISS_KNN_EXTRA (cpu or gpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }
trap 'echo "setup: stopped at line $LINENO: $BASH_COMMAND" >&2' ERR

python=${PYTHON:-python3}
# From 3.11.5, for the pinned tools that build the documentation.
command -v "$python" >/dev/null || fail "no '$python' on the PATH: install Python 3.11 to 3.14, or name one in PYTHON"
"$python" -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 15))' ||
    fail "Python 3.11.5 to 3.14 is needed, '$python' is $("$python" -V 2>&1): name another in PYTHON"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "'$python' cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)"

extra=${FAISS_KNN_EXTRA:-}
if [ -z "$extra" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then extra=gpu; else extra=cpu; fi
fi
case $extra in cpu | gpu) ;; *) fail "FAISS_KNN_EXTRA must be cpu or gpu, got '$extra'" ;; esac

stamp=".venv/.faiss-knn-$extra"
wanted=$("$python" -V; cat pyproject.toml scripts/constraints.txt scripts/setup.sh)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c 'import faiss_knn' 2>/dev/null; then
    exit 0
fi
echo "setup: installing faiss-knn-eval[$extra,test,docs] into .venv (the first time takes minutes: torch is large)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
rm -f .venv/.faiss-knn-*
.venv/bin/python -m pip install -q --disable-pip-version-check torch -c scripts/constraints.txt
PYTHONWARNINGS=ignore .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$extra,test,docs]" -c scripts/constraints.txt
printf '%s\n' "$wanted" >"$stamp"
echo "setup: done"
