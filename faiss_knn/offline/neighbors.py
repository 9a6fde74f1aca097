"""The search of an evaluation: every query's neighbours under one index, with what that cost."""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans
from faiss_knn.offline.task import EvalTask
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.backend import make_index
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.inputs import is_memmap

QUERY_BLOCK = 2048
BANK_BLOCK_BYTES = 256 << 20  # rows of a bank in pieces that are indexed at once

_SHORT = 0.5  # seconds

# Specs that a search parameter means something to: inverted lists, and codes that need more candidates than neighbours.
_PARAMETERS = {
    "nprobe": re.compile("ivf", re.IGNORECASE),
    "k_factor": re.compile("PQ|SQ|RQ|LSQ|RaBitQ|LSH|ITQ|RFlat|Refine"),
}


@dataclass(frozen=True)
class Variant:
    """An index to evaluate: a spec of `KNNIndex`, with the search parameters of one point of a sweep.

    `nprobe` is that of `KNNIndex`. With `k_factor` the index is asked for k_factor · k candidates, of which the k
    nearest by exact distance are kept, as in FAISS's IndexRefine.
    """

    spec: str
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables and plots."""
        return " ".join([self.spec, *(f"{name}={value}" for name, value in self.settings.items())])


EXACT = Variant("flat")


def has_parameter(spec: str, name: str) -> bool:
    """Whether a search parameter means something to an index of this spec.

    Raises:
        ValueError: If no index has such a parameter.
    """
    if name not in _PARAMETERS:
        raise ValueError(f"`sweep` must name one of {', '.join(_PARAMETERS)}, got {name!r}")
    return bool(_PARAMETERS[name].search(spec))


@dataclass(frozen=True)
class SearchOptions:
    """How to search: options of `KNNIndex`, single queries to time (`latency`), and whether to show progress.

    The exact neighbours, with which others are compared, are those of the rows as `storage_dtype` stores them.
    """

    distance_metric: str
    device: torch.device | str | None = None
    nprobe: int | None = None
    target_recall: float | None = None
    latency: int = 0
    progress: bool | None = False
    storage_dtype: torch.dtype | None = None

    def check(self, variant: Variant, dim: int) -> None:
        """Raise ValueError if FAISS has no such index for rows of this width, before the others are searched."""
        if variant.spec not in ("flat", "ivf", "fast", "auto"):
            make_index(variant.spec, dim, get_distance(self.distance_metric).faiss_metric)

    def index(self, variant: Variant) -> KNNIndex:
        """An index as this variant asks, not yet built."""
        return KNNIndex(
            variant.spec,
            distance_metric=self.distance_metric,
            device=self.device,
            nprobe=variant.settings.get("nprobe", self.nprobe),
            target_recall=self.target_recall if variant.spec != "flat" else None,
            storage_dtype=self.storage_dtype,
        )


@dataclass(frozen=True)
class SearchResult:
    """Neighbours of all queries.

    Attributes:
        distances: (Q, K) float32 ascending, inf where missing.
        indices: (Q, K) int64 places in the problem's bank, -1 where missing; K is padded up to the k asked for.
        cost: `exact`, `backend`, `device`, `bytes`, `build_s`, `search_s`, `qps`, and the parameters actually used;
            with latency measured `latency_p50_ms` and `latency_p95_ms`, of one query at a time.
    """

    distances: Tensor
    indices: Tensor
    cost: dict[str, Any]


def search_bank(
    problem: EvalTask, span: tuple[int, int], k: int, variant: Variant, options: SearchOptions
) -> SearchResult:
    """Search rows [start, stop) of the bank for all queries: float64 distances, min(k, stop - start) neighbours.

    Raises:
        ValueError: If the index refuses the features or its parameters.
    """
    bank = problem.bank.rows
    whole = variant.spec != "flat" or (_is_plain(bank) and not is_memmap(bank))  # pieces are read from disk once
    size = span[1] - span[0] if whole else _block_rows(bank)
    found: SearchResult | None = None
    for start, stop in spans(span[1] - span[0], size):
        piece = _search_piece(problem, (span[0] + start, span[0] + stop), k, variant, options)
        found = piece if found is None else _merged(found, piece, k)
    assert found is not None  # a problem has rows
    return found


def finish(found: SearchResult, problem: EvalTask, k: int) -> SearchResult:
    """Make the lists of a whole bank those that are scored: without the query itself, k long, float32."""
    if problem.leave_one_out:
        found = _without_self(found)
    found = pad_lists(found, k)
    return replace(found, distances=found.distances.float())


def _is_plain(rows: RowSource) -> bool:
    """Whether `KNNIndex` can take the rows as they are."""
    return isinstance(rows, Tensor) or (
        isinstance(rows, np.ndarray) and rows.dtype.kind == "f" and bool(rows.dtype.isnative)
    )


def _piece(bank: RowSource, span: tuple[int, int]) -> Any:
    if _is_plain(bank) and (span == (0, len(bank)) or not is_memmap(bank)):
        return bank[span[0] : span[1]]
    block = read_rows(bank, *span)
    return np.array(block) if is_memmap(block) else block


def _block_rows(bank: RowSource) -> int:
    return max(1, BANK_BLOCK_BYTES // (4 * bank.shape[1]))


def _search_piece(
    problem: EvalTask, span: tuple[int, int], k: int, variant: Variant, options: SearchOptions
) -> SearchResult:
    index = options.index(variant)
    start = time.perf_counter()
    bank = problem.bank.rows
    index.build(
        _piece(bank, span),
        expected_k=k,
        expected_queries=len(problem.queries.rows),
    )
    build_s = time.perf_counter() - start
    if build_s < _SHORT:  # threads and buffers are made once, outside the timing of a short search
        index.search(read_rows(problem.queries.rows, 0, 1), k)
    found = list(_searched(index, problem.queries.rows, k, variant, options))
    search_s = sum(seconds for *_, seconds in found)
    if search_s < _SHORT:  # other work on the machine shows in a short search: the fastest of three counts
        again = [_searched(index, problem.queries.rows, k, variant, options) for _ in range(2)]
        search_s = min(search_s, *(sum(seconds for *_, seconds in run) for run in again))
    stats = index.stats
    indices = torch.cat([indices for _, indices, _ in found])
    cost = {
        "spec_used": stats.spec,
        "exact": stats.exact,
        "nprobe": stats.nprobe,
        "parameters": dict(stats.parameters),
        "backend": stats.backend,
        "device": stats.device,
        "storage_dtype": stats.storage_dtype,
        "bytes": stats.bytes,
        "build_s": build_s,
        "search_s": search_s,
        "qps": len(indices) / search_s,
    } | _latencies(index, problem.queries.rows, k, variant, options.latency)
    return SearchResult(
        torch.cat([distances for distances, *_ in found]), torch.where(indices < 0, indices, indices + span[0]), cost
    )


def _searched(
    index: KNNIndex, queries: RowSource, k: int, variant: Variant, options: SearchOptions
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Distances, indices and seconds, block by block."""
    disabled = None if options.progress is None else not options.progress
    with tqdm(
        total=len(queries), desc=variant.name, unit="query", disable=disabled, file=sys.stderr, leave=False
    ) as bar:
        for a, b in spans(len(queries), QUERY_BLOCK):
            block = read_rows(queries, a, b)
            start = time.perf_counter()
            distances, indices = _nearest(index, block, k, variant)
            _wait(indices)
            yield distances, indices, time.perf_counter() - start
            bar.update(b - a)


def _nearest(index: KNNIndex, queries: Any, k: int, variant: Variant) -> tuple[Tensor, Tensor]:
    """Distances in float64, so that pieces of a bank can be joined in their order."""
    distances, indices = index.nearest(queries, k * variant.settings.get("k_factor", 1))
    return distances[:, :k], indices[:, :k]


def _wait(result: Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)


def _latencies(index: KNNIndex, queries: RowSource, k: int, variant: Variant, count: int) -> dict[str, float]:
    if not count:
        return {}
    seconds = []
    for i in range(min(count, len(queries))):
        query = read_rows(queries, i, i + 1)
        start = time.perf_counter()
        _wait(_nearest(index, query, k, variant)[1])
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"latency_p50_ms": 1e3 * float(p50), "latency_p95_ms": 1e3 * float(p95)}


def _merged(first: SearchResult, second: SearchResult, k: int) -> SearchResult:
    """Join the lists of two pieces of the bank, `first` the one of lower places, so that equal distances keep order."""
    distances = torch.cat([first.distances, second.distances], 1)
    distances, indices = merge_nearest(distances, torch.cat([first.indices, second.indices], 1), k)
    cost = dict(second.cost)
    for name in ("build_s", "search_s", "bytes", "latency_p50_ms", "latency_p95_ms"):
        if name in cost:
            cost[name] += first.cost[name]
    cost["qps"] = len(indices) / cost["search_s"]
    cost["storage_dtype"] = widest([one.cost["storage_dtype"] for one in (first, second)])
    return SearchResult(distances, indices, cost)


def widest(dtypes: list[str]) -> str:
    """The widest of the dtypes in which pieces of a bank are stored: each piece decides for itself."""
    return max(dtypes, key=lambda name: int(name.lstrip("bfloat")))


def merge_nearest(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of lists side by side, those of lower places first, so that equal distances keep their order."""
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :k], indices.gather(1, order[:, :k])


def _without_self(found: SearchResult) -> SearchResult:
    """Drop each query's own row by its id, or the last neighbour where the index did not find it."""
    is_self = found.indices == torch.arange(len(found.indices), device=found.indices.device)[:, None]
    is_self[:, -1] |= ~is_self.any(1)
    kept = (~is_self).nonzero()[:, 1].view(len(is_self), -1)
    return replace(found, distances=found.distances.gather(1, kept), indices=found.indices.gather(1, kept))


def pad_lists(found: SearchResult, k: int) -> SearchResult:
    """Lengthen lists to k with missing neighbours, (inf, -1)."""
    missing = k - found.indices.shape[1]
    if missing <= 0:
        return found
    pad = torch.nn.functional.pad
    return replace(
        found,
        distances=pad(found.distances, (0, missing), value=float("inf")),
        indices=pad(found.indices, (0, missing), value=-1),
    )
