#!/usr/bin/env bash
# Builds the source distribution and from it the wheel into dist/, installs the wheel alone into a fresh environment, and asks it
# for its first number from outside the tree. The source distribution must hold every file that git does.
# Usage: bash scripts/wheel.sh        Environment: PYTHON (default python3); FAISS_KNN_EXTRA (default cpu);
#   SITE: folder of an environment that has torch and the other requirements, which are then not installed anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} extra=${FAISS_KNN_EXTRA:-cpu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
"$work/build/bin/pip" install -q --disable-pip-version-check build
rm -rf dist
"$work/build/bin/python" -m build --outdir dist . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
tar tzf dist/*.tar.gz | sed 's|^[^/]*/||' | sort >"$work/packed"
missing=$(git ls-files -- . ':!.ci' 2>/dev/null | sort | comm -23 - "$work/packed")
[ -z "$missing" ] || { echo "wheel: the source distribution lacks, though git has it:" $missing >&2; exit 1; }

"$python" -m venv "$work/fresh"
if [ -n "${SITE:-}" ]; then echo "$SITE" >"$("$work/fresh/bin/python" -c 'import site; print(site.getsitepackages()[0])')/site.pth"; fi
"$work/fresh/bin/pip" install -q --disable-pip-version-check "$(ls "$PWD"/dist/*.whl)[$extra,demo]"
cd "$work"
"$work/fresh/bin/faiss-knn" --version
"$work/fresh/bin/python" -W error::ImportWarning -c 'import faiss_knn; assert "fresh" in faiss_knn.__file__, faiss_knn.__file__'
"$work/fresh/bin/faiss-knn" eval --k 5 --out results
test -s results/report.html
echo "wheel: $(cd "$OLDPWD" && ls dist | tr '\n' ' ')"
