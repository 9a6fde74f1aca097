"""What checkpoints keep of every rank's queue, and what a killed run loses."""

from pathlib import Path

import pytest
import torch

from tests.distributed import runs
from tests.distributed.ranks import RankFailed, Ranks
from tests.distributed.runs import TRAIN

COUNTS = [[6, 6], [6, 6]]


@pytest.mark.parametrize("length", [400, 12, 5])
def test_each_rank_gets_its_own_newest_rows_back(ranks: Ranks, tmp_path: Path, length: int) -> None:
    own = ranks.run(runs.save, tmp_path / "run.ckpt", {}, COUNTS)
    results = ranks.run(runs.resume, tmp_path / "run.ckpt", {"queue_length": length})
    for before, (rows, _, _) in zip(own, results, strict=True):
        assert torch.equal(rows, before[-length:])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_other_ranks_share_all_rows_evenly(ranks: Ranks, tmp_path: Path, size: int) -> None:
    ranks.run(runs.save, tmp_path / "run.ckpt", {}, COUNTS)
    (of_two,) = {tuple(sorted(values.items())) for _, _, values in ranks.run(runs.resume, tmp_path / "run.ckpt", {})}
    results = ranks.run(runs.resume, tmp_path / "run.ckpt", {}, ranks=size)
    labelled = {(tuple(x), y) for x, y in zip(TRAIN["x"][:24].tolist(), TRAIN["label"][:24].tolist(), strict=True)}
    found = [(tuple(x), y) for rows, labels, _ in results for x, y in zip(rows.tolist(), labels.tolist(), strict=True)]
    assert len(found) == 24
    assert set(found) == labelled
    assert {len(rows) for rows, _, _ in results} == {24 // size}
    for _, _, values in results:
        assert values == pytest.approx(dict(of_two), abs=1e-6)


def test_fewer_ranks_keep_the_newest_rows(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(runs.save, tmp_path / "run.ckpt", {}, COUNTS)
    ((rows, _, _),) = ranks.run(runs.resume, tmp_path / "run.ckpt", {"queue_length": 12}, ranks=1)
    newest = [*range(6, 12), *range(18, 24)]
    assert sorted(rows.tolist()) == sorted(TRAIN["x"][newest].tolist())


def test_the_file_holds_each_row_once_and_loads_with_weights_only(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(runs.save, tmp_path / "run.ckpt", {}, [[60], [60]])
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    rows = saved["callbacks"]["OnlineQueue[key=embedding]"]["rows"]
    assert [len(part) for part in rows] == [60, 60]
    assert torch.equal(torch.cat(rows), TRAIN["x"])
    ranks.run(runs.save, tmp_path / "empty.ckpt", {}, [[0], [0]])
    grown = (tmp_path / "run.ckpt").stat().st_size - (tmp_path / "empty.ckpt").stat().st_size
    assert grown == pytest.approx(120 * (8 * 4 + 8), rel=0.2)


def test_a_rank_that_saves_alone_saves_its_own_rows(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed):  # rank 0 is left behind in DDP's own collective
        ranks.run(runs.save_while_failing, tmp_path / "alone.ckpt", timeout=10, group_timeout=60)
    saved = torch.load(tmp_path / "alone.ckpt", weights_only=True)
    (rows,) = saved["callbacks"]["OnlineQueue[key=embedding]"]["rows"]
    assert torch.equal(rows, TRAIN["x"][16:24])


def test_a_killed_run_resumes_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    ranks = Ranks(2)
    try:
        uninterrupted = ranks.run(runs.train, tmp_path / "whole", 3)
        with pytest.raises(RankFailed, match="the process died"):
            ranks.run(_train_and_die, tmp_path / "killed")
        resumed = [
            ranks.run(_resume, tmp_path / folder, tmp_path / name / "epoch=0.ckpt")
            for folder, name in (("a", "whole"), ("b", "killed"))
        ]
    finally:
        ranks.close()
    assert not (tmp_path / "killed" / "epoch=1.ckpt").exists()
    assert resumed[0] == resumed[1] == uninterrupted


def _train_and_die(folder: Path) -> None:
    runs.train(folder, 3, kill_at=12)  # 8 steps an epoch: in the middle of the second


def _resume(folder: Path, ckpt: Path) -> dict[str, float]:
    return runs.train(folder, 3, ckpt=ckpt)
