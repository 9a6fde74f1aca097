"""ShardedIndex on real gloo ranks: the answers of one index over all rows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from faiss_knn.distributed import rank_and_size, send_rows
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.sharded import ShardedIndex, ShardedRows
from tests.distributed.ranks import Ranks


def part(rows: Tensor, counts: list[int]) -> Tensor:
    return rows.split(counts)[rank_and_size()[0]]


def data(n: int, d: int = 8) -> Tensor:
    """Rows of which some are equal, so that ties cross the shards."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    rows[n // 2 :: 3] = rows[0]
    return rows


def searched(counts: list[int], asked: list[int], k: int, options: dict[str, Any], block_bytes: int) -> Any:
    bank, queries = data(sum(counts)), data(sum(asked) + 1)[: sum(asked)]
    shards = ShardedIndex(KNNIndex(**options), block_bytes=block_bytes)
    shards.build(part(bank, counts) if counts[rank_and_size()[0]] else None)
    found = shards.search(part(queries, asked) if asked[rank_and_size()[0]] else None, k)
    return found.distances, found.indices


SPLITS = [
    ([40], [9]),
    ([20, 20], [5, 4]),
    ([39, 1], [0, 9]),
    ([0, 40], [9, 0]),
    ([13, 0, 27], [3, 3, 3]),
    ([3, 2, 35], [1, 0, 8]),
    ([10, 10, 10, 10], [3, 2, 2, 2]),
    ([0, 0, 0, 40], [9, 0, 0, 0]),
]


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine", "manhattan", "dot"])
@pytest.mark.parametrize(("counts", "asked"), SPLITS, ids=str)
def test_as_one_index_whatever_the_split(ranks: Ranks, counts: list[int], asked: list[int], distance: str) -> None:
    options = {"distance_metric": distance}
    one = KNNIndex(**options).build(data(40)).search(data(10)[:9], 7)
    results = ranks.run(searched, counts, asked, 7, options, 100, ranks=len(counts))
    assert torch.equal(torch.cat([indices for _, indices in results if len(indices)]), one.indices)
    assert torch.equal(torch.cat([distances for distances, _ in results if len(distances)]), one.distances)
    assert [len(indices) for _, indices in results] == asked


def test_more_neighbours_than_rows(ranks: Ranks) -> None:
    one = KNNIndex().build(data(40)).search(data(10)[:9], 100)
    results = ranks.run(searched, [3, 0, 37], [4, 4, 1], 100, {}, 1 << 20, ranks=3)
    assert torch.equal(torch.cat([indices for _, indices in results]), one.indices)
    assert one.indices.shape == (9, 40)


def test_an_approximate_index_per_shard_keeps_its_missing_neighbours_last(ranks: Ranks) -> None:
    results = ranks.run(searched, [40, 40], [5, 4], 30, {"spec": "IVF4,Flat", "nprobe": 1}, 1 << 20)
    distances, indices = (torch.cat(parts).numpy() for parts in zip(*results, strict=True))
    assert (np.diff(distances[np.isfinite(distances).all(1)]) >= 0).all()
    assert (indices[np.isinf(distances)] == -1).all()
    bank, queries = data(80).double().numpy(), data(10)[:9].double().numpy()
    found = indices >= 0
    exact = np.linalg.norm(bank[indices] - queries[:, None], axis=2)
    np.testing.assert_allclose(distances[found], exact[found], rtol=1e-5, atol=1e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in indices)


def closest_in_float64() -> list[int]:
    # Both distances round to 1 in float32; only the first row's is larger.
    rows = torch.tensor([[1.0, 1e-5], [1.0, 0.0]])
    shards = ShardedIndex(KNNIndex()).build(rows[rank_and_size()[0]][None])
    return shards.search(torch.zeros(1, 2), 2).indices[0].tolist()


def test_shards_are_merged_by_the_unrounded_distance(ranks: Ranks) -> None:
    one = KNNIndex().build(torch.tensor([[1.0, 1e-5], [1.0, 0.0]])).search(torch.zeros(1, 2), 2)
    assert one.indices[0].tolist() == [1, 0]
    assert ranks.run(closest_in_float64) == [[1, 0], [1, 0]]


def beyond_float64() -> list[list[int]]:
    rows = torch.tensor([[3e200], [2e200], [1e200]], dtype=torch.float64)
    shards = ShardedIndex(KNNIndex(distance_metric="squared_euclidean")).build(part(rows, [1, 2]))
    return shards.search(torch.zeros(1, 1, dtype=torch.float64), 3).indices.tolist()


def test_shards_are_merged_in_order_where_float64_does_not_hold_the_squares(ranks: Ranks) -> None:
    assert ranks.run(beyond_float64, ranks=2) == [[[2, 1, 0]]] * 2


def dealt(counts: list[list[int]]) -> Any:
    rank, _ = rank_and_size()
    mine = torch.arange(sum(counts[rank])) + 100 * rank
    came, received = send_rows(mine, counts[rank])
    back, _ = send_rows(came * 2, received)
    return came.tolist(), received, torch.equal(back, mine * 2)


def test_rows_are_dealt_out_and_come_back_in_order(ranks: Ranks) -> None:
    results = ranks.run(dealt, [[1, 2, 0], [0, 0, 0], [3, 0, 1]], ranks=3)
    assert results == [
        ([0, 200, 201, 202], [1, 0, 3], True),
        ([1, 2], [2, 0, 0], True),
        ([203], [0, 0, 1], True),
    ]


def taken(counts: list[int], indices: list[Tensor], multi_hot: bool) -> Tensor:
    values = torch.arange(sum(counts)) * 10
    values = torch.stack([values, -values], 1).half() if multi_hot else values
    own = part(values, counts) if counts[rank_and_size()[0]] else None
    return ShardedRows(own).take(indices[rank_and_size()[0]])


@pytest.mark.parametrize("multi_hot", [False, True])
def test_rows_are_fetched_from_the_rank_that_has_them(ranks: Ranks, multi_hot: bool) -> None:
    asked = [torch.tensor([[5, 0, 4], [2, -1, -1]]), torch.empty(0, 3, dtype=torch.long), torch.tensor([[3, 3, 1]])]
    for rows, indices in zip(ranks.run(taken, [2, 0, 4], asked, multi_hot, ranks=3), asked, strict=True):
        expected = indices.clamp(min=0) * 10
        if multi_hot:
            expected = torch.stack([expected, -expected], 2).half()
        assert torch.equal(rows, expected)


def errors(case: str) -> str:
    rank, _ = rank_and_size()
    bank, queries = data(20), data(4)
    if case == "bank dim":
        bank = bank[:, : 4 + rank]
    if case == "no bank":
        bank = bank[:0]
    if case == "bad bank" and rank == 1:
        bank[3, 3] = torch.nan
    if case == "query dim":
        queries = queries[:, :5]
    if case == "bad query" and rank == 1:
        queries[2, 0] = torch.inf
    try:
        shards = ShardedIndex(KNNIndex())
        if case != "not built":
            shards.build(bank)
        shards.search(queries, {"k": 3 + rank, "zero k": 0}.get(case, 3))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("bank dim", "same shape and dtype on every rank"),
        ("no bank", "rows on at least one rank"),
        ("bad bank", "rank 1"),
        ("query dim", "dimension 8"),
        ("bad query", "finite"),
        ("not built", "call `build`"),
        ("k", "same on every rank, got [3, 4]"),
        ("zero k", "`k` must be positive"),
    ],
)
def test_errors_reach_every_rank(ranks: Ranks, case: str, said: str) -> None:
    first, second = ranks.run(errors, case)
    assert said in first
    assert second != "no error"


def test_one_rank_without_a_process_group() -> None:
    shards = ShardedIndex(KNNIndex()).build(data(40))
    one = KNNIndex().build(data(40)).search(data(9), 5)
    found = shards.search(data(9), 5)
    assert len(shards) == 40
    assert torch.equal(found.indices, one.indices)
    assert torch.equal(found.distances, one.distances)
    assert shards.search(None, 5).indices.shape == (0, 5)
