"""One rank fails: all raise, wherever it was, and stand together again afterwards."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faiss_knn.classify.sharded import ShardedBank
from faiss_knn.distributed import (
    all_gather_object,
    all_or_none,
    broadcast_object,
    gather_rows,
    gather_to,
    rank_and_size,
    send_rows,
)
from faiss_knn.online.unique_samples import UniqueSamples, newest_per_id
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.sharded import ShardedRows
from tests.distributed import runs
from tests.distributed.failures import failed_everywhere, in_step
from tests.distributed.ranks import RankFailed, Ranks


def build_bank() -> ShardedBank:
    rank, _ = rank_and_size()
    rows = torch.randn(20 + rank, 4, generator=torch.Generator().manual_seed(rank))
    return ShardedBank(rows, torch.arange(20 + rank) % 3, num_classes=3, index=KNNIndex())


def search_a_bank() -> Callable[[], Any]:
    bank, queries = build_bank(), torch.randn(3 + rank_and_size()[0], 4)
    return lambda: bank.find(queries, 5)


def find_samples() -> None:
    rank, size = rank_and_size()
    ids = torch.arange(rank, 10 * size, size - 1)
    newest_per_id(ids)
    once = UniqueSamples()
    once.add(ids, lambda _: None)
    once.finish()


def send_everything() -> None:
    rank, size = rank_and_size()
    rows = torch.arange(4 * (rank + 1)).view(-1, 2)
    with all_or_none():
        gather_rows(rows, block_bytes=20)
        gather_to(rows, 1, block_bytes=20)
        send_rows(rows[:1].expand(size, 2), [1] * size)
        broadcast_object(rows, 1)
        all_gather_object(rows.sum().item())


STEPS: dict[str, Callable[[], Callable[[], Any]]] = {
    "build": lambda: build_bank,
    "search": search_a_bank,
    "samples": lambda: find_samples,
    "transfers": lambda: send_everything,
}


def fail(step: str, failing: int, every: int) -> tuple[int, bool, list[int]]:
    """How often it failed, whether this rank heard of it, and who is still there.

    One step more or fewer on some rank would mix up what they tell.
    """
    errors, heard = failed_everywhere(STEPS[step](), failing, every)
    return len(errors), in_step(errors, heard, rank_and_size()[0], failing), all_gather_object(rank_and_size()[0])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("failing", "size", "every"), [(1, 2, 1), (0, 2, 5), (2, 3, 7)])
def test_wherever_one_rank_fails_all_raise_and_stay_in_step(
    ranks: Ranks, step: str, failing: int, size: int, every: int
) -> None:
    for times, told, present in ranks.run(fail, step, failing, every, ranks=size):
        assert times * every > 25
        assert told
        assert present == list(range(size))


def take_more_than_memory_holds() -> str:
    rank, _ = rank_and_size()
    wide = torch.zeros(1, dtype=torch.int64).expand(4, 1 << 44)  # one number, seen as 512 TiB
    rows = ShardedRows(wide if rank else None)
    try:
        rows.take(torch.tensor([[0, 2]]) if rank == 0 else torch.empty(0, 2, dtype=torch.int64))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_an_allocator_that_fails_on_one_rank_stops_all(ranks: Ranks) -> None:
    first, second = ranks.run(take_more_than_memory_holds)
    assert "memory" in first
    assert "memory" in second


def build_with_other_labels() -> str:
    rank, _ = rank_and_size()
    with pytest.raises(ValueError, match="one row per feature row") as error:
        ShardedBank(torch.ones(4, 2), torch.zeros(4 - rank, dtype=torch.long), num_classes=1, index=KNNIndex())
    return str(error.value)


def test_a_sharded_bank_needs_as_many_labels_as_features_on_every_rank(ranks: Ranks) -> None:
    first, second = ranks.run(build_with_other_labels)
    assert second == "`labels` must have one row per feature row, 4, got shape (3,)"
    assert first.endswith(second)


HOOKS = {  # how deep each is gone into, in uses of torch
    ("knn", "setup"): (0, 3),
    ("queue", "setup"): (0,),
    ("knn", "on_train_batch_end"): (0,),
    ("queue", "on_train_batch_end"): (0, 9),
    ("queue", "on_train_epoch_end"): (0,),
    ("queue", "on_validation_start"): (0,),
    ("knn", "on_validation_epoch_start"): (0, 20, 90),
    ("knn", "on_validation_batch_end"): (0, 20, 60),
    ("knn", "on_validation_epoch_end"): (0, 20, 50),
    ("queue", "on_save_checkpoint"): (0, 9),
    ("queue", "on_load_checkpoint"): (0,),
}


@pytest.mark.parametrize(("failing", "size", "gather"), [(1, 2, "replicate"), (1, 2, "shard"), (2, 3, "shard")])
def test_whatever_hook_fails_on_one_rank_stops_all(
    ranks: Ranks, tmp_path: Path, failing: int, size: int, gather: str
) -> None:
    cases = [(*hook, n) for hook, depths in HOOKS.items() for n in depths]
    results = ranks.run(runs.fail_in_hooks, gather, failing, cases, tmp_path, ranks=size, timeout=100)
    for (_, hook, _), *on_ranks in zip(cases, *results, strict=True):
        where = {"on_save_checkpoint": "save", "on_load_checkpoint": "validate"}.get(hook, "fit")
        told = "RuntimeError: rank {} failed, so rank {} stops too: MemoryError: no room"
        expected = [(where, told.format(failing, rank)) for rank in range(size)]
        expected[failing] = (where, "MemoryError: no room")
        assert on_ranks == expected


def construct_on_one_rank() -> None:
    if rank_and_size()[0] == 0:
        runs.knn()


def test_a_constructor_waits_for_no_other_rank(ranks: Ranks) -> None:
    ranks.run(construct_on_one_rank, timeout=20)


@pytest.mark.parametrize("own_gather", [False, True])
def test_a_metric_that_fails_on_one_rank_stops_all(ranks: Ranks, own_gather: bool) -> None:
    first, second = ranks.run(runs.fit_with_a_failing_metric, own_gather)
    assert second == "ArithmeticError: no value"
    assert first == f"RuntimeError: rank 1 failed, so rank 0 stops too: {second}"


@pytest.mark.parametrize("how", ["misaligned", "missing"])
@pytest.mark.parametrize("size", [2, 3])
def test_rows_that_do_not_fit_in_a_later_step_of_one_rank_stop_all(ranks: Ranks, how: str, size: int) -> None:
    for rank, message in enumerate(ranks.run(stopped_by, how, 1, ranks=size)):
        assert {"misaligned": "as many features as labels", "missing": "Key 'embedding' not found"}[how] in message
        assert ("rank 1 failed" in message) == (rank != 1)


def stopped_by(how: str, failing: int) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        runs.fit_with_a_failing_rank(how, failing, {})
    return str(error.value)


@pytest.mark.parametrize(
    ("how", "size", "said"),
    [
        ("error", 2, "rank 1 failed before, with LookupError: a broken image"),
        ("error", 3, "rank 1 failed before, with LookupError: a broken image"),
        ("validation error", 3, "rank 1 failed before, with LookupError: a broken image"),
        ("SIGINT", 2, "rank 1 failed before, with KeyboardInterrupt"),
        ("SIGTERM", 2, "rank 1 failed before, with SIGTERM"),
        ("SIGKILL", 2, "nothing is heard from rank 1"),
        ("validation SIGKILL", 3, "nothing is heard from rank 1"),
        ("hang", 2, "nothing is heard from rank 1"),
    ],
)
def test_what_ends_one_rank_from_elsewhere_ends_the_others_and_they_say_which(how: str, size: int, said: str) -> None:
    pool = Ranks(size)  # of its own: its processes may be lost
    try:
        pool.run(at_home, ranks=size)
        with pytest.raises(RankFailed) as failed:
            pool.run(runs.fit_with_a_failing_rank, how, 1, {"gather": "shard"}, ranks=size, timeout=25, group_timeout=4)
    finally:
        pool.close()
    of_rank_zero = re.split(r"^rank \d: ", str(failed.value), flags=re.MULTILINE)[1]
    assert said in of_rank_zero


def at_home() -> None:
    """The processes are there, and have imported what they need."""
