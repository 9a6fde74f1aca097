"""The search of an evaluation on several ranks: each has a part of the work, and all get all neighbours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.distributed import all_gather_object, all_or_none, gather_rows, rank_and_size
from faiss_knn.offline.lazy_rows import spans
from faiss_knn.offline.neighbors import (
    EXACT,
    QUERY_BLOCK,
    SearchOptions,
    SearchResult,
    Variant,
    finish,
    merge_nearest,
    pad_lists,
    search_bank,
    widest,
)
from faiss_knn.offline.task import EvalTask


def find_neighbors(problem: EvalTask, k: int, variant: Variant, options: SearchOptions) -> SearchResult:
    """Search once, for the largest k that anything is scored at; all ranks call it and get the same neighbours.

    The exact search splits the bank: each rank searches its rows for all queries, and the lists are merged. An
    approximate index is what it is by the whole bank, so there the queries are split.

    Args:
        problem: Bank and queries, the same on every rank.
        k: Neighbours wanted, itself not counted with leave-one-out; lists are padded where the bank is smaller.
        variant: Which index.
        options: How.

    Raises:
        ValueError: On every rank, if the index refuses the features or its parameters.
    """
    wanted, bank, queries = k + problem.leave_one_out, len(problem.bank.rows), len(problem.queries.rows)
    if rank_and_size()[1] == 1:
        return finish(search_bank(problem, (0, bank), wanted, variant, options), problem, k)
    found: SearchResult | None = None
    by_bank = variant == EXACT
    start, stop = _part(bank if by_bank else queries)
    with all_or_none():
        if start < stop and by_bank:
            found = search_bank(problem, (start, stop), wanted, variant, options)
        elif start < stop:
            part = replace(problem, queries=problem.queries.pick(np.arange(start, stop)))
            found = search_bank(part, (0, bank), wanted, variant, options)
    costs = [cost for cost in all_gather_object(None if found is None else found.cost) if cost is not None]
    cost = _total(costs, queries, by_bank)
    if by_bank:
        lists = _merge_parts(found, queries, min(wanted, bank))
    else:
        lists = _gather(found, "distances"), _gather(found, "indices")
    return finish(SearchResult(*lists, cost), problem, k)


def _part(length: int) -> tuple[int, int]:
    """[start, stop) of this rank."""
    rank, size = rank_and_size()
    return length * rank // size, length * (rank + 1) // size


def _gather(found: SearchResult | None, name: str) -> Tensor:
    return gather_rows(None if found is None else getattr(found, name))[0]


def _merge_parts(found: SearchResult | None, queries: int, k: int) -> tuple[Tensor, Tensor]:
    """Join the lists of all ranks' parts of the bank, some queries at a time."""
    if found is None:
        nothing = torch.empty(queries, 0, dtype=torch.float32, device="cpu")
        found = SearchResult(nothing.double(), nothing.long(), {})
    found = pad_lists(found, k)
    _, size = rank_and_size()
    merged = []
    for a, b in spans(queries, QUERY_BLOCK):
        parts = [gather_rows(values[a:b])[0] for values in (found.distances, found.indices)]
        beside = [values.view(size, b - a, k).transpose(0, 1).flatten(1) for values in parts]
        merged.append(merge_nearest(beside[0], beside[1], k))
    distances, indices = zip(*merged, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _total(costs: Sequence[dict[str, Any]], queries: int, by_bank: bool) -> dict[str, Any]:
    total = dict(costs[0])
    for name, first in total.items():
        if isinstance(first, float) or name == "bytes":
            values = [cost[name] for cost in costs]  # the slowest rank's times, and the bytes of all parts of a bank
            total[name] = sum(values) if by_bank and name == "bytes" else max(values)
    stored = widest([cost["storage_dtype"] for cost in costs])
    return total | {"storage_dtype": stored, "qps": queries / total["search_s"]}
