"""OnlineKNN and OnlineQueue on real ranks, through Lightning's ddp strategy."""

from typing import Any

import pytest
import torch
from torch import Tensor

from faiss_knn import KNNIndex
from tests.distributed import runs
from tests.distributed.ranks import Ranks
from tests.distributed.runs import TRAIN, VAL
from tests.online.parts import Echo, loader, trainer

GATHERS = ("replicate", "shard")


def accuracy(bank: dict[str, Tensor], queries: dict[str, Tensor], k: int = 5) -> float:
    """k-NN accuracy with weights 1 / (d + 0.07), row by row in float64."""
    right = 0
    for query, label in zip(queries["x"].double(), queries["label"], strict=True):
        distances, nearest = (bank["x"].double() - query).norm(dim=1).sort(stable=True)
        votes = torch.zeros(runs.CLASSES, dtype=torch.float64)
        for distance, row in zip(distances[:k], nearest[:k], strict=True):
            votes[bank["label"][row]] += 1 / (distance + 0.07)
        right += int(votes.argmax() == label)
    return right / len(queries["x"])


@pytest.fixture(scope="module")
def of_one_process(ranks: Ranks) -> dict[str, float]:
    (values,) = ranks.run(runs.fit, {}, ranks=1)
    assert 0.5 < values["eval/knn_acc"] < 0.95  # neither chance nor saturated: a wrong bank moves it
    return values


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_number_is_that_of_one_process(
    ranks: Ranks, size: int, gather: str, of_one_process: dict[str, float]
) -> None:
    results = ranks.run(runs.fit, {"gather": gather}, ranks=size)
    assert results[0]["eval/knn_acc"] == pytest.approx(accuracy(TRAIN, VAL), abs=1e-6)
    for values in results:
        assert values == pytest.approx(of_one_process, abs=1e-6)


@pytest.mark.parametrize("gather", GATHERS)
def test_a_bank_is_indexed_once_an_epoch(ranks: Ranks, gather: str) -> None:
    assert ranks.run(runs.count_builds, {"gather": gather}) == [1, 1]


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("counts", [[[3, 5], [5, 1]], [[0, 0], [20, 9]], [[9, 9], [0, 0], [2, 40]]], ids=str)
def test_ranks_with_other_fill_hold_each_row_once(ranks: Ranks, counts: list[list[int]], gather: str) -> None:
    rows = sum(map(sum, counts))
    bank = {key: values[:rows] for key, values in TRAIN.items()}
    results = ranks.run(runs.fit_uneven, counts, {"gather": gather}, ranks=len(counts))
    for values, _, gathered in results:
        assert torch.equal(gathered, bank["x"])
        assert values["eval/knn_acc"] == pytest.approx(accuracy(bank, VAL), abs=1e-6)
    assert torch.equal(torch.cat([own for _, own, _ in results if len(own)]), bank["x"])


@pytest.mark.parametrize("gather", GATHERS)
def test_without_any_rows_nothing_is_logged(ranks: Ranks, gather: str) -> None:
    for values, _, _ in ranks.run(runs.fit_uneven, [[0, 0], [0, 0]], {"gather": gather}):
        assert not any(key.startswith("eval/") for key in values)


@pytest.mark.parametrize("gather", GATHERS)
def test_samples_repeated_by_a_sampler_count_once_by_their_id(ranks: Ranks, gather: str) -> None:
    bank = {key: values[:119] for key, values in TRAIN.items()}
    for size in (1, 2, 4):
        for values in ranks.run(runs.fit_with_ids, {"gather": gather}, 2, ranks=size):
            assert values["eval/knn_acc"] == pytest.approx(accuracy(bank, VAL), abs=1e-6)


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("size", [1, 3])
def test_the_bank_comes_from_a_dataloader(ranks: Ranks, size: int, gather: str) -> None:
    expected = accuracy(TRAIN, VAL)
    for values in ranks.run(runs.fit_with_bank_loader, {"gather": gather}, 1, ranks=size):
        assert values["eval/knn_acc"] == pytest.approx(expected, abs=1e-6)
    for values in ranks.run(runs.fit_with_bank_loader, {"gather": gather}, 2, ranks=size):
        assert values["eval/knn_acc/dataloader_idx_1"] == pytest.approx(expected, abs=1e-6)
        assert values["eval/knn_acc/dataloader_idx_2"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"bank_device": "cpu"}, {"bank_dtype": torch.bfloat16}, {"index": "IVF4,Flat", "nprobe": 4}], ids=str
)
@pytest.mark.parametrize("gather", GATHERS)
def test_other_banks_work_on_ranks(ranks: Ranks, options: dict[str, Any], gather: str) -> None:
    bank = TRAIN | {"x": TRAIN["x"].to(options.get("bank_dtype", torch.float32)).float()}
    for values in ranks.run(runs.fit, options | {"gather": gather}):
        assert values["eval/knn_acc"] == pytest.approx(accuracy(bank, VAL), abs=1e-6)


@pytest.mark.parametrize("gather", GATHERS)
def test_the_recall_that_is_logged_is_that_of_the_queries_over_all_ranks(ranks: Ranks, gather: str) -> None:
    """A rank's index may hold all rows, or its own; either way it misses some of the five exact neighbours."""
    options = {"index": "IVF4,Flat", "nprobe": 1, "gather": gather, "recall_queries": 400}
    first, second = (values for values, _, _ in ranks.run(runs.fit_uneven, [[50], [70]], options))
    offset, distances, ids = 0, [], []
    for rows in TRAIN["x"].split([50, 70]) if gather == "shard" else [TRAIN["x"]]:
        found = KNNIndex("IVF4,Flat", nprobe=1).build(rows).search(VAL["x"], 5)
        distances.append(found.distances)
        ids.append(found.indices + offset)
        offset += len(rows)
    nearest = torch.cat(ids, 1).gather(1, torch.cat(distances, 1).argsort(dim=1)[:, :5])
    exact = torch.cdist(VAL["x"].double(), TRAIN["x"].double()).argsort(dim=1)[:, :5]
    expected = (nearest[:, :, None] == exact[:, None]).any(1).double().mean().item()
    assert 0.2 < expected < 0.98  # neither chance nor everything: a wrong bank or another rank's queries move it
    assert first["eval/knn_index_recall"] == pytest.approx(expected, abs=1e-6)
    assert second["eval/knn_index_recall"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("where", ["label", "shape", "validation"])
def test_an_error_on_one_rank_stops_all(ranks: Ranks, where: str, gather: str) -> None:
    first, second = ranks.run(runs.fit_with_one_bad_rank, where, {"gather": gather, "num_classes": 4})
    said = {"label": "observed label 17", "shape": "same shape and dtype", "validation": "Key 'embedding' not found"}
    assert said[where] in first
    assert said[where] in second
    assert first.startswith("ValueError")


def test_ranks_with_other_numbers_of_validation_batches(ranks: Ranks) -> None:
    parts = [{key: values[i : i + 10] for key, values in VAL.items()} for i in range(0, 97, 10)]
    loaders = [[parts[:1], parts[:5]], [parts[1:], parts[5:]]]
    expected = accuracy(TRAIN, VAL)
    for values in ranks.run(runs.fit_with_own_validation, loaders, False, {"gather": "shard"}):
        assert values["eval/knn_acc/dataloader_idx_0"] == pytest.approx(expected, abs=1e-6)
        assert values["eval/knn_acc/dataloader_idx_1"] == pytest.approx(expected, abs=1e-6)
    for message in ranks.run(runs.fit_with_own_validation, loaders, True, {"gather": "shard"}):
        assert "gather='shard' needs validation dataloaders with a length" in message


@pytest.mark.parametrize("gather", GATHERS)
def test_a_rank_without_queries_of_a_loader_takes_part_in_its_metrics(ranks: Ranks, gather: str) -> None:
    parts = [{key: values[i : i + 10] for key, values in VAL.items()} for i in range(0, 97, 10)]
    unlabelled = parts[0] | {"label": torch.full((10,), -1)}
    loaders = [[parts[:5], parts], [parts[5:], [unlabelled]]]
    first, second = ranks.run(runs.fit_with_own_validation, loaders, False, {"gather": gather})
    assert first == pytest.approx(second, abs=1e-6)
    assert first["eval/knn_skipped"] == 10
    for metric in ("acc", "auroc"):  # sums, and lists of scores
        one, other = (first[f"eval/knn_{metric}/dataloader_idx_{i}"] for i in (0, 1))
        assert one == pytest.approx(other, abs=1e-6)


def test_ddp_overwrites_buffers_but_no_queue(ranks: Ranks) -> None:
    """The first rows show that this run would catch a queue among the module's buffers."""
    results = ranks.run(runs.rows_in_a_buffer_and_in_the_queue, [[4, 4, 4], [4, 4, 4]])
    assert torch.equal(results[1][0], TRAIN["x"][4:8])  # rank 0's second batch, on rank 1
    for rank, (_, rows) in enumerate(results):
        assert torch.equal(rows, TRAIN["x"][12 * rank : 12 * rank + 12])


@pytest.mark.parametrize(("index", "loaders"), [(1, 2), (0, 1)])
def test_the_bank_loader_must_come_before_a_scored_one(index: int, loaders: int) -> None:
    run = trainer(runs.knn(bank_dataloader_idx=index))
    with pytest.raises(ValueError, match="must come first and others after it"):
        run.validate(Echo(), [loader(16, **VAL)] * loaders, verbose=False)


def test_what_an_index_chooses_by_itself_is_chosen_by_rank_zero(ranks: Ranks) -> None:
    first, second = ranks.run(runs.fit_with_other_tuning)
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
