"""Strategies other than ddp under torchrun: those that start processes themselves, and FSDP."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import runs
from tests.distributed.ranks import Ranks
from tests.distributed.runs import TRAIN, VAL
from tests.distributed.test_online import accuracy

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_notebook"])
def test_strategies_that_start_their_own_processes(strategy: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.distributed.runs", strategy]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    sys.stderr.write(done.stderr)  # pytest shows it where the test fails
    assert done.returncode == 0
    values = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert values["eval/knn_acc"] == pytest.approx(accuracy(TRAIN, VAL), abs=1e-6)


def test_fsdp_neither_shards_nor_broadcasts_the_queue_and_resumes(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(runs.fit_fsdp_and_resume, tmp_path / "run.ckpt", timeout=100)
    for is_sharded, rows, restored, values, resumed in results:
        assert is_sharded
        assert rows.shape == (60, 8)
        assert torch.equal(restored, rows)
        assert resumed == values
    assert not torch.equal(results[0][1], results[1][1])
