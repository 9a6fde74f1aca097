"""gather_rows, gather_to, agree, broadcast_object on real gloo ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from faiss_knn.distributed import all_or_none, broadcast_object, gather_rows, gather_to, raise_together, rank_and_size
from tests.distributed.ranks import RankFailed, Ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def rows_of(rank: int, count: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if count is None:
        return None
    numbers = torch.randint(0, 100, (count, *shape), generator=torch.Generator().manual_seed(rank))
    return (numbers % 2 if dtype is torch.bool else numbers).to(dtype)


def gathered(counts: list[int | None], shape: tuple[int, ...], dtype: torch.dtype, block_bytes: int) -> Any:
    rows, per_rank = gather_rows(
        rows_of(rank_and_size()[0], counts[rank_and_size()[0]], shape, dtype), block_bytes=block_bytes
    )
    return rows, per_rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives_bit_by_bit(ranks: Ranks, dtype: torch.dtype) -> None:
    expected = torch.cat([rows_of(rank, 4 + rank, (3,), dtype) for rank in range(3)])
    for rows, counts in ranks.run(gathered, [4, 5, 6], (3,), dtype, 1 << 20, ranks=3):
        assert counts == [4, 5, 6]
        assert rows.dtype is dtype
        assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    "counts",
    [[3], [3, 5], [0, 4], [None, 4], [4, None, 0], [9, 0, 0, 2], [None, None, None, 1], [1, 1, 1, 1]],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_uneven_counts_in_small_blocks(ranks: Ranks, counts: list[int | None], shape: tuple[int, ...]) -> None:
    parts = [rows_of(rank, count, shape, torch.float32) for rank, count in enumerate(counts) if count]
    for rows, per_rank in ranks.run(gathered, counts, shape, torch.float32, 20, ranks=len(counts)):
        assert per_rank == [count or 0 for count in counts]
        assert torch.equal(rows, torch.cat(parts))


def test_no_rows_anywhere(ranks: Ranks) -> None:
    assert [tuple(rows.shape) for rows, _ in ranks.run(gathered, [None, None], (4,), torch.int64, 8)] == [(0,), (0,)]
    for rows, counts in ranks.run(gathered, [None, 0], (4,), torch.int64, 8):
        assert (tuple(rows.shape), rows.dtype, counts) == ((0, 4), torch.int64, [0, 0])


def gathered_unlike(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> str:
    rank, _ = rank_and_size()
    with pytest.raises(ValueError, match="same shape and dtype on every rank") as error:
        gather_rows(torch.ones(shapes[rank], dtype=dtypes[rank]))
    return str(error.value)


def test_other_shapes_or_dtypes_raise_the_same_error_on_all_ranks(ranks: Ranks) -> None:
    same = [torch.float32] * 3
    first, *others = ranks.run(gathered_unlike, [(2, 8), (0, 9), (2, 16)], same, ranks=3)
    assert "(8,)" in first
    assert "(16,)" in first
    assert others == [first, first]
    ranks.run(gathered_unlike, [(2, 8)] * 2, [torch.float32, torch.float16])


def growth_while_gathering(n: int) -> tuple[int, int]:
    rows = torch.ones(n, 256)
    gather_rows(torch.ones(8, 256))  # connections are made
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    everything, _ = gather_rows(rows)
    return _status_bytes("VmHWM") - before, everything.nbytes


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_only_one_copy_of_the_bank_is_made(ranks: Ranks) -> None:
    for grown, size in ranks.run(growth_while_gathering, 50_000, ranks=3):
        assert size == 3 * 50_000 * 256 * 4
        assert grown < 1.1 * size


def sent_to(dst: int, block_bytes: int) -> Any:
    rank, _ = rank_and_size()
    mine = [torch.empty(0), torch.ones(3, 2), torch.arange(5), torch.ones(0, 7, dtype=torch.bfloat16)][rank]
    return gather_to(mine, dst, block_bytes=block_bytes)


@pytest.mark.parametrize("dst", [0, 2])
def test_gather_to_gives_one_rank_what_each_rank_had(ranks: Ranks, dst: int) -> None:
    results = ranks.run(sent_to, dst, 12, ranks=4)
    nothing, ones, numbers, empty = results.pop(dst)
    assert results == [None] * 3
    assert nothing.shape == (0,)
    assert torch.equal(ones, torch.ones(3, 2))
    assert torch.equal(numbers, torch.arange(5))
    assert (tuple(empty.shape), empty.dtype) == ((0, 7), torch.bfloat16)


def failed_with(errors: dict[int, Exception]) -> str:
    def fail() -> None:
        if rank_and_size()[0] in errors:
            raise errors[rank_and_size()[0]]

    try:
        with all_or_none():
            fail()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_error_on_one_rank_is_raised_on_all(ranks: Ranks) -> None:
    messages = ranks.run(failed_with, {1: ValueError("bad row")}, ranks=3)
    assert messages[1] == "ValueError: bad row"
    for rank in (0, 2):
        assert messages[rank] == f"ValueError: rank 1 failed, so rank {rank} stops too: ValueError: bad row"
    messages = ranks.run(failed_with, {1: KeyError("x"), 2: ValueError("y")}, ranks=3)
    assert messages[0] == "RuntimeError: rank 1 failed, so rank 0 stops too: KeyError: 'x'"
    assert messages[1:] == ["KeyError: 'x'", "ValueError: y"]
    assert ranks.run(failed_with, {}, ranks=3) == ["nothing"] * 3


def within_a_part_of_the_ranks() -> Any:
    group = dist.new_group([1, 3])
    rank, _ = dist.get_rank(), dist.get_world_size()
    if rank not in (1, 3):
        return None
    rows, counts = gather_rows(torch.full((rank,), rank), group=group)
    sent = gather_to(torch.tensor([rank]), 1, group=group)
    return (
        rank_and_size(group),
        rows.tolist(),
        counts,
        sent and [int(s) for s in sent],
        broadcast_object(rank, 1, group),
    )


def test_groups_count_their_own_ranks(ranks: Ranks) -> None:
    results = ranks.run(within_a_part_of_the_ranks, ranks=4)
    assert results[1] == ((0, 2), [1, 3, 3, 3], [1, 3], None, 3)
    assert results[3] == ((1, 2), [1, 3, 3, 3], [1, 3], [1, 3], 3)


def broadcast_from_last() -> Any:
    rank, size = rank_and_size()
    return broadcast_object({"spec": f"of rank {rank}"}, src=size - 1)


def test_broadcast_object(ranks: Ranks) -> None:
    assert ranks.run(broadcast_from_last, ranks=3) == [{"spec": "of rank 2"}] * 3


def test_without_a_process_group_there_is_one_rank() -> None:
    rows = torch.arange(3)
    assert rank_and_size() == (0, 1)
    assert gather_rows(rows)[0].data_ptr() == rows.data_ptr()
    assert torch.equal(gather_to(rows)[0], rows)
    assert broadcast_object("x") == "x"
    with pytest.raises(KeyError):
        raise_together(KeyError("mine"))


def hang_on_one_rank() -> None:
    if rank_and_size()[0] == 0:
        dist.barrier()


def test_a_hanging_rank_fails_its_test_and_no_other(ranks: Ranks) -> None:
    with pytest.raises(RankFailed):
        ranks.run(hang_on_one_rank, ranks=3, timeout=3)
    assert ranks.run(broadcast_from_last, ranks=2) == [{"spec": "of rank 1"}] * 2
