"""evaluate() and the command line on several ranks: the records of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faiss_knn import evaluate
from faiss_knn.offline.resumable_neighbors import search_resumably
from tests.distributed.ranks import Ranks

ROOT = Path(__file__).parents[2]
TIMED = ("build_s", "search_s", "qps", "bytes", "created")


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 470)
    rows = (np.eye(5, 8)[labels] + 0.4 * rng.standard_normal((470, 8))).astype(np.float32)
    rows[100:140] = rows[:40]  # equal rows, in other ranks' parts
    return rows[:401], labels[:401], rows[401:], labels[401:]


def evaluated(options: dict[str, Any]) -> list[dict[str, Any]]:
    bank, bank_labels, queries, query_labels = data()
    if options.get("leave_one_out"):
        queries = query_labels = None  # type: ignore[assignment]
    found = evaluate(bank, bank_labels, queries, query_labels, **options)
    return [{key: value for key, value in record.items() if key not in TIMED} for record in found.records]


@pytest.mark.parametrize(
    "options",
    [
        {"index": ("flat", "IVF8,Flat"), "k": (1, 5), "nprobe": 2, "weighting": ("inverse", "softmax")},
        {"leave_one_out": True, "metrics": ("MulticlassAUROC",)},
        {"per_class": 1, "tries": 2, "k": 7},  # a rank has fewer rows than k
        {"protocol": "lightly-raw", "k": (1, 9), "center": True},
    ],
    ids=["indexes", "leave-one-out", "few-shot", "protocol"],
)
def test_records_are_those_of_one_process(ranks: Ranks, options: dict[str, Any]) -> None:
    (alone,) = ranks.run(evaluated, options, ranks=1)
    for size in (2, 3):
        for records in ranks.run(evaluated, options, ranks=size):
            assert records == alone


def program(*arguments: str, processes: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "faiss_knn", "eval", *arguments],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_torchrun_writes_the_files_of_one_process_once(tmp_path: Path) -> None:
    written = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = program("--k", "1", "5", "--index", "flat", "ivf", "--out", str(folder), processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1
        lines = (folder / "results.jsonl").read_text().splitlines()
        written.append([{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines])
    assert written[0] == written[1]


def test_torchrun_says_once_what_is_wrong(tmp_path: Path) -> None:
    done = program(str(tmp_path / "none.npy"), "--leave-one-out", processes=2)
    assert done.returncode == 1
    assert done.stderr.count("faiss-knn: error:") == 1


def found_by_ranks(folder: str, queries: bool) -> list[list[Any]]:
    bank, _, others, _ = data()
    found, tied = search_resumably(
        bank,
        others if queries else None,
        4,
        distance_metric="cosine",
        exclude_self=not queries,
        folder=Path(folder),
        progress=False,
    )
    return [part.tolist() for part in (*found, tied)]


@pytest.mark.parametrize("queries", [True, False])
def test_exact_lists_are_those_of_one_process(ranks: Ranks, tmp_path: Path, queries: bool) -> None:
    alone = found_by_ranks(str(tmp_path / "alone"), queries)
    for size in (2, 3):
        for lists in ranks.run(found_by_ranks, str(tmp_path / str(size)), queries, ranks=size):
            assert lists == alone
        assert len(list((tmp_path / str(size)).glob(f"rank-*-of-{size}"))) == size
