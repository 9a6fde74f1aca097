#!/usr/bin/env bash
# All that a visit to a GPU can tell, in one text file and in under nine minutes: the card, the versions, the tests of
# tests/gpu, and the GPU's tables of benchmarks/benchmark.py.
# Usage: bash scripts/gpu_report.sh [FILE]     FILE: default results/gpu_report.txt
# Environment: PYTHON (default .venv/bin/python, else python3); STAND_IN=1: without a GPU, the tables at toy size on the
# CPU; TEST_SECONDS and TABLE_SECONDS (defaults 210 and 310): when each half is stopped, with what it had written kept.
set -uo pipefail
file=${1:-results/gpu_report.txt}
case $file in
    -*) echo "gpu_report: FILE must be a path, got $file: options are environment variables (see the head of this script)" >&2; exit 2 ;;
    /*) ;;
    *) file=$PWD/$file ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$(dirname "$file")" || exit 1
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

failed=0
part() { # part TITLE SECONDS COMMAND...: run it, and say how it ended; the parts after it come all the same
    local title=$1 limit=$2 status started=$SECONDS
    shift 2
    printf '\n== %s\n' "$title"
    timeout -k 10 "$limit" "$@" 2>&1
    status=$?
    case $status in
        0) echo "-- $title: done in $((SECONDS - started)) s" ;;
        124 | 137) echo "-- $title: stopped after $limit s" ;;
        *) echo "-- $title: FAILED with status $status after $((SECONDS - started)) s" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
}

report() {
    echo "faiss-knn on a GPU, $(date -u +%Y-%m-%dT%H:%MZ), commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
    if [ -z "${STAND_IN:-}" ]; then part "card" 30 nvidia-smi; fi
    part "versions" 60 "$PYTHON" -c '
import importlib.metadata as m, platform
print("python", platform.python_version())
for name in ("torch", "numpy", "lightning", "torchmetrics", "faiss-gpu", "faiss-cpu", "faiss-gpu-cuvs", "triton"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "-")
import torch
print("CUDA", torch.version.cuda, [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])'
    part "tests" "${TEST_SECONDS:-210}" "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests/gpu
    part "tables" "${TABLE_SECONDS:-310}" "$PYTHON" benchmarks/benchmark.py --tables gpu --out "$file.tables" \
        ${STAND_IN:+--stand-in}
    if [ "$failed" -eq 0 ]; then echo "gpu_report: all parts done"; else echo "gpu_report: a part failed or was stopped"; fi
    return "$failed"
}
report | tee "$file"
