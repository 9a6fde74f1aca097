#!/usr/bin/env bash
# The main job on real data: train an encoder on the digits of scikit-learn without labels, watch its features with
# OnlineKNN, save them, and evaluate them offline.
# Usage: bash scripts/demo.sh        Environment: those of scripts/setup.sh; OUT (default results/digits).
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

out=${OUT:-results/digits}
case ${OUT:-} in '' | /*) ;; *) out=$called_from/$OUT ;; esac
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a network this small waits for more threads longer than they save
stopped() { echo "demo: $1; what was written by then is in $out" >&2; exit "$2"; }
trap 'stopped "failed at: $BASH_COMMAND" 1' ERR
trap 'stopped interrupted 130' INT TERM

echo "demo: training a convolutional encoder on 8 × 8 digits, contrastively (no labels in the loss)"
.venv/bin/python -u examples/train_digits.py --out "$out" | tee "$out/training.log"
echo "demo: evaluating the saved features"
.venv/bin/python scripts/index_eval.py "$out/train.npz" "$out/test.npz" --k 1 5 20 --weighting inverse softmax \
    --index flat IVF32,Flat --out "$out/report"

.venv/bin/python - "$out" <<'EOF'
import json, pathlib, re, sys
out = pathlib.Path(sys.argv[1])
scores = re.findall(r"eval/knn_acc (\S+)", (out / "training.log").read_text())
best = max((json.loads(line) for line in (out / "report/results.jsonl").open()), key=lambda record: record["top1"])
print("\ndemo: trained on digits for", len(scores), "epochs with OnlineKNN, then evaluated the saved features offline")
print(f"demo: eval/knn_acc {scores[0]} after the first epoch, {scores[-1]} after the last; offline top-1 at best "
      f"{best['top1']:.3f} (k={best['k']}, {best['weighting']}, {best['spec']})")
print(f"demo: features and training.log are in {out}, the report is {out}/report/report.html")
EOF
