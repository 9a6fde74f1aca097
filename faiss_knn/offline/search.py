"""The search of an evaluation: every query's neighbours under one index, and what finding them cost.

On several ranks each does a part of the work, and all get all neighbours.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from faiss_knn.distributed import all_gather_object, all_or_none, gather_rows, rank_and_size
from faiss_knn.names import SPECS
from faiss_knn.offline.compression import BinaryRows, ScalarRows, check_compression, narrowed, parse_dims
from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans
from faiss_knn.offline.left_out import nearest_allowed
from faiss_knn.offline.task import EvalTask
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.faiss_library import make_index
from faiss_knn.search.engines.rerank import Neighbors, nearest
from faiss_knn.search.index import IndexStats, KNNIndex
from faiss_knn.search.inputs import is_memmap, named_as_index

QUERY_BLOCK = 2048
BANK_BLOCK_BYTES = 256 << 20  # a bank that is read in pieces is indexed this much at a time

_SHORT = 0.5  # seconds

# Which specs a search parameter means something to: inverted lists, and codes that need more candidates.
_PARAMETERS = {
    "nprobe": re.compile("ivf", re.IGNORECASE),
    "k_factor": re.compile("PQ|SQ|RQ|LSQ|RaBitQ|LSH|ITQ|RFlat|Refine"),
}

Span = tuple[int, int]  # rows [start, stop)


@dataclass(frozen=True)
class Variant:
    """An index to evaluate: a spec of `KNNIndex`, and the search parameters of one point of a sweep.

    `nprobe` is that of `KNNIndex`. With `k_factor` the index is asked for k_factor · k candidates, and the k nearest of
    them by exact distance are kept, as FAISS's IndexRefine does. With `dims` or `storage`, see
    `faiss_knn.offline.compression`, rows are made narrower or coarser first, and these are searched exactly.
    """

    spec: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_compressed(self) -> bool:
        """Whether rows are narrower or coarser than they are."""
        return "dims" in self.settings or "storage" in self.settings

    @property
    def name(self) -> str:
        """The variant's name in tables and plots, such as "ivf nprobe=4"."""
        return " ".join([self.spec, *(f"{name}={value}" for name, value in self.settings.items())])


EXACT = Variant("flat")


def has_parameter(spec: str, name: str) -> bool:
    """Tell whether a search parameter means something to an index of this spec.

    Raises:
        ValueError: If no index has such a parameter.
    """
    if name not in _PARAMETERS:
        raise ValueError(f"`sweep` must name one of {', '.join(_PARAMETERS)}, got {name!r}")
    return bool(_PARAMETERS[name].search(spec))


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        distance_metric: As in `KNNIndex`, and so are the following four.
        device: Where to search; None: where the bank is.
        nprobe: For inverted lists, unless the variant sets its own.
        target_recall: For all variants but "flat".
        storage_dtype: How the index stores the bank's rows. The exact neighbours, with which others are compared, are
            those of the rows as stored.
        latency: How many queries to time one at a time.
        progress: Whether to show a bar; None: if stderr is a terminal.
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
        if variant.is_compressed:
            settings = variant.settings
            check_compression(settings.get("dims"), settings.get("storage"), dim, self.distance_metric)
        if variant.spec not in SPECS:
            with named_as_index():
                make_index(variant.spec, dim, get_distance(self.distance_metric).faiss_metric)

    def index(self, variant: Variant) -> KNNIndex:
        """Make the variant's index, not yet built.

        Raises:
            ValueError: If the options do not go with the spec.
        """
        with named_as_index():
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
    """The neighbours of all queries.

    Attributes:
        distances: (Q, K) ascending, inf where missing; float32 once `search_task` returns them.
        indices: (Q, K) int64 places in the task's bank, -1 where missing.
        cost: `exact`, `backend`, `device`, `bytes`, `build_s`, `search_s`, `qps`, and the parameters actually used;
            with latency measured `latency_p50_ms` and `latency_p95_ms`, of one query at a time.
    """

    distances: Tensor
    indices: Tensor
    cost: dict[str, Any]

    def first(self, k: int) -> "SearchResult":
        """Cut the lists to the k nearest, at most K."""
        return replace(self, distances=self.distances[:, :k], indices=self.indices[:, :k])


def search_task(task: EvalTask, k: int, variant: Variant, options: SearchOptions) -> SearchResult:
    """Find each query's k nearest bank rows; all ranks call it together and get the same.

    The exact search splits the bank: each rank searches its rows for all queries, and the lists are merged. Any other
    index is what it is by the whole bank, so there the queries are split.

    Args:
        task: Bank and queries, the same on every rank.
        k: How many, of those that the query may find; lists are padded where there are fewer.
        variant: Which index.
        options: How to search.

    Raises:
        ValueError: On every rank, if the index refuses the features or its parameters.
    """
    if rank_and_size()[1] == 1:
        result = _search_rows(task, (0, len(task.bank.rows)), k, variant, options)
    elif variant == EXACT:
        result = _split_bank(task, k, options)
    else:
        result = _split_queries(task, k, variant, options)
    result = _padded(result, k)
    neighbors = Neighbors(result.distances, result.indices)
    if options.distance_metric == "squared_euclidean":  # till here their roots: float64 does not hold every square
        neighbors = neighbors.squared()
    return replace(result, distances=neighbors.single().distances)


def _split_bank(task: EvalTask, k: int, options: SearchOptions) -> SearchResult:
    """Search this rank's part of the bank exactly, and merge the lists of all ranks."""
    span = own_part(len(task.bank.rows))
    own: SearchResult | None = None
    with all_or_none():
        if span[0] < span[1]:
            own = _search_rows(task, span, k, EXACT, options)
    n_queries = len(task.queries.rows)
    cost = _joint_cost(own, n_queries, sum_bytes=True)
    if own is None:
        nothing = torch.empty(n_queries, 0, dtype=torch.float64, device="cpu")
        own = SearchResult(nothing, nothing.long(), {})
    return SearchResult(*merge_ranks(own, min(k, len(task.bank.rows))), cost)


def _split_queries(task: EvalTask, k: int, variant: Variant, options: SearchOptions) -> SearchResult:
    """Search the whole bank for this rank's part of the queries, and put the lists of all ranks together."""
    start, stop = own_part(len(task.queries.rows))
    own: SearchResult | None = None
    with all_or_none():
        if start < stop:
            part = replace(task, queries=task.queries.pick(np.arange(start, stop)))
            own = _search_rows(part, (0, len(task.bank.rows)), k, variant, options)
    cost = _joint_cost(own, len(task.queries.rows), sum_bytes=False)
    distances, indices = (gather_rows(lists)[0] for lists in ((own.distances, own.indices) if own else (None, None)))
    return SearchResult(distances, indices, cost)


def own_part(length: int) -> Span:
    """Return this rank's part of so many rows."""
    rank, size = rank_and_size()
    return length * rank // size, length * (rank + 1) // size


def _joint_cost(own: SearchResult | None, n_queries: int, *, sum_bytes: bool) -> dict[str, Any]:
    """Add up what all ranks spent: the slowest one's times, and the bytes of a bank's parts, or of the largest.

    A collective; `own` is None on a rank that had no part.
    """
    costs = [cost for cost in all_gather_object(None if own is None else own.cost) if cost is not None]
    joint = dict(costs[0])
    for name, first in joint.items():
        if isinstance(first, float) or name == "bytes":
            values = [cost[name] for cost in costs]
            joint[name] = sum(values) if sum_bytes and name == "bytes" else max(values)
    stored = _widest([cost["storage_dtype"] for cost in costs])
    return joint | {"storage_dtype": stored, "qps": n_queries / joint["search_s"]}


def merge_ranks(own: SearchResult, k: int) -> tuple[Tensor, Tensor]:
    """Merge the lists of all ranks' parts of the bank, some queries at a time: (Q, k) distances and indices."""
    own = _padded(own, k)
    _, size = rank_and_size()
    merged = []
    for a, b in spans(len(own.indices), QUERY_BLOCK):
        gathered = [gather_rows(lists[a:b])[0] for lists in (own.distances, own.indices)]  # (ranks · (b - a), k)
        distances, indices = (lists.view(size, b - a, k).transpose(0, 1).flatten(1) for lists in gathered)
        merged.append(nearest(distances, indices, k))
    all_distances, all_indices = zip(*merged, strict=True)
    return torch.cat(all_distances), torch.cat(all_indices)


def _search_rows(task: EvalTask, span: Span, k: int, variant: Variant, options: SearchOptions) -> SearchResult:
    """Search some of the bank's rows for all queries: float64 distances, min(k, stop - start) neighbours."""
    if variant.is_compressed:
        return _search_compressed(task, k, variant, options)
    bank = task.bank.rows
    start, stop = span
    whole = variant.spec != "flat" or (is_plain(bank) and not is_memmap(bank))  # pieces are read from disk once
    size = stop - start if whole else max(1, BANK_BLOCK_BYTES // (4 * bank.shape[1]))
    pieces = (_search_piece(task, (start + a, start + b), k, variant, options) for a, b in spans(stop - start, size))
    result = next(pieces)
    for piece in pieces:
        result = _merged(result, piece, k)
    return result


def _search_compressed(task: EvalTask, k: int, variant: Variant, options: SearchOptions) -> SearchResult:
    """Search rows that are narrower, coarser or both; bytes are what they take, seconds those of their own search."""
    dims, storage = variant.settings.get("dims"), variant.settings.get("storage", "")
    start = time.perf_counter()
    metric, offset = options.distance_metric, 0.0
    if dims is not None:
        task = narrowed(task, dims)
        if metric == "cosine" and parse_dims(dims).lengths == "whole":  # what is left of unit rows is not divided again
            metric, offset = "dot", 1.0
    options = replace(options, distance_metric=metric, target_recall=None, nprobe=None)
    plain = Variant(variant.spec)
    everything = (0, len(task.bank.rows))
    if storage.startswith("binary"):
        signs = BinaryRows(task.bank.rows, metric, int(storage.partition(":")[2] or 0))
        result = _search_signs(task, signs, k, variant, options, time.perf_counter() - start)
    elif storage == "int8":
        coded = ScalarRows(task.bank.rows, unit=metric == "cosine")
        build_s = time.perf_counter() - start
        result = _search_rows(replace(task, bank=replace(task.bank, rows=coded)), everything, k, plain, options)
        search_s = result.cost["search_s"] + result.cost["build_s"]  # codes are read as numbers for each search
        coded_as = {"bytes": coded.nbytes, "row_bytes": coded.nbytes / len(coded), "storage_dtype": "int8"}
        times = {"build_s": build_s, "search_s": search_s, "qps": len(task.queries.rows) / search_s}
        result = replace(result, cost=result.cost | times | coded_as)
    else:
        options = replace(options, storage_dtype=getattr(torch, storage) if storage else options.storage_dtype)
        result = _search_rows(task, everything, k, plain, options)
    distances = torch.where(result.indices < 0, result.distances, result.distances + offset)
    return replace(result, distances=distances, cost=result.cost | {"exact": False})


def _search_signs(
    task: EvalTask, signs: BinaryRows, k: int, variant: Variant, options: SearchOptions, build_s: float
) -> SearchResult:
    """Search rows of which only signs are stored."""
    search = _Search(signs.nearest, task, (0, len(task.bank.rows)), k, variant.name)
    distances, indices, search_s = search.timed(options.progress)
    cost: dict[str, Any] = {
        "spec_used": "BFlat", "exact": False, "nprobe": None, "parameters": {}, "backend": "faiss", "device": "cpu",
        "storage_dtype": "binary", "bytes": signs.nbytes, "row_bytes": signs.nbytes / len(signs.codes),
        "build_s": build_s, "search_s": search_s,
        "qps": len(indices) / search_s, **search.latencies(options.latency),
    }  # fmt: skip
    return SearchResult(distances, indices, cost)


def _merged(first: SearchResult, second: SearchResult, k: int) -> SearchResult:
    """Merge what was found in two pieces of the bank, and add up what it cost."""
    distances = torch.cat([first.distances, second.distances], 1)
    distances, indices = nearest(distances, torch.cat([first.indices, second.indices], 1), k)
    cost = dict(second.cost)
    for name in ("build_s", "search_s", "bytes", "latency_p50_ms", "latency_p95_ms"):
        if name in cost:
            cost[name] += first.cost[name]
    cost["qps"] = len(indices) / cost["search_s"]
    cost["storage_dtype"] = _widest([first.cost["storage_dtype"], second.cost["storage_dtype"]])
    return SearchResult(distances, indices, cost)


def _search_piece(task: EvalTask, span: Span, k: int, variant: Variant, options: SearchOptions) -> SearchResult:
    """Build the variant's index over some of the bank's rows and search it for all queries, timed."""
    queries = task.queries.rows
    index = options.index(variant)
    depth = k if task.left_out is None else k + min(k, int(task.left_out.counts.max()))
    start = time.perf_counter()
    with named_as_index():
        index.build(_bank_rows(task.bank.rows, span), expected_k=depth, expected_queries=len(queries))
    build_s = time.perf_counter() - start
    factor = variant.settings.get("k_factor", 1)

    def find(rows: Any, k: int) -> tuple[Tensor, Tensor]:
        distances, indices = index._nearest(rows, k * factor)
        return distances[:, :k], indices[:, :k]

    search = _Search(find, task, span, k, variant.name)
    if build_s < _SHORT:  # threads and buffers are made once, outside the timing of a short search
        search.block(0, 1)
    distances, indices, search_s = search.timed(options.progress)
    cost = _cost(index, build_s, search_s, len(indices)) | search.latencies(options.latency)
    return SearchResult(distances, torch.where(indices < 0, indices, indices + span[0]), cost)


@dataclass(frozen=True)
class _Search:
    """Some of the bank's rows, asked for the neighbours that the task's queries may find.

    Attributes:
        find: The m nearest of some rows: distances as they are ordered by, and places among the rows that are searched.
        task: Bank and queries.
        span: Which rows of the bank are searched.
        k: How many neighbours.
        name: For the bar.
    """

    find: Callable[[Any, int], tuple[Tensor, Tensor]]
    task: EvalTask
    span: Span
    k: int
    name: str

    def timed(self, progress: bool | None) -> tuple[Tensor, Tensor, float]:
        """Search all queries: distances, indices, and the seconds that finding them takes."""
        blocks = list(self._blocks(progress))
        seconds = sum(seconds for *_, seconds in blocks)
        if seconds < _SHORT:  # other work on the machine shows in a short search: the fastest of three counts
            again = [self._blocks(progress) for _ in range(2)]
            seconds = min(seconds, *(sum(seconds for *_, seconds in run) for run in again))
        distances, indices = (torch.cat(parts) for parts in list(zip(*blocks, strict=True))[:2])
        return distances, indices, seconds

    def _blocks(self, progress: bool | None) -> Iterator[tuple[Tensor, Tensor, float]]:
        count = len(self.task.queries.rows)
        disabled = None if progress is None else not progress
        with tqdm(total=count, desc=self.name, unit="query", disable=disabled, file=sys.stderr, leave=False) as bar:
            for a, b in spans(count, QUERY_BLOCK):
                yield self.block(a, b)
                bar.update(b - a)

    def block(self, a: int, b: int) -> tuple[Tensor, Tensor, float]:
        """Search the queries [a, b): distances, indices, and seconds."""
        queries = read_rows(self.task.queries.rows, a, b)
        start = time.perf_counter()
        if self.task.left_out is None:
            distances, indices = self.find(queries, self.k)
        else:
            numbers = torch.arange(a, b, device="cpu")
            distances, indices = nearest_allowed(self.find, queries, numbers, self.k, self.task.left_out, self.span)
        if indices.is_cuda:
            torch.cuda.synchronize(indices.device)
        return distances, indices, time.perf_counter() - start

    def latencies(self, count: int) -> dict[str, float]:
        """Time single queries: the median and 95th percentile in milliseconds; nothing if none is timed."""
        if not count:
            return {}
        seconds = [self.block(i, i + 1)[2] for i in range(min(count, len(self.task.queries.rows)))]
        p50, p95 = np.percentile(seconds, [50, 95])
        return {"latency_p50_ms": 1e3 * float(p50), "latency_p95_ms": 1e3 * float(p95)}


def _cost(index: KNNIndex, build_s: float, search_s: float, n_queries: int) -> dict[str, Any]:
    stats = index.stats
    return {
        "spec_used": stats.spec,
        "exact": stats.exact,
        "nprobe": stats.nprobe,
        "parameters": dict(stats.parameters),
        "backend": stats.backend,
        "device": stats.device,
        "storage_dtype": stats.storage_dtype,
        "bytes": stats.bytes,
        "row_bytes": _row_bytes(stats, index),
        "build_s": build_s,
        "search_s": search_s,
        "qps": n_queries / search_s,
    }


def _row_bytes(stats: IndexStats, index: KNNIndex) -> float:
    """Tell what a row takes as it is stored; of FAISS's indexes all that they hold, by row."""
    if stats.backend == "torch":
        return float(index.dim * getattr(torch, stats.storage_dtype).itemsize)
    return stats.bytes / len(index)


def is_plain(rows: RowSource) -> bool:
    """Tell whether `KNNIndex` can take the rows as they are."""
    return isinstance(rows, Tensor) or (
        isinstance(rows, np.ndarray) and rows.dtype.kind == "f" and bool(rows.dtype.isnative)
    )


def _bank_rows(bank: RowSource, span: Span) -> Any:
    """Read some of the bank's rows, as `KNNIndex.build` takes them."""
    if is_plain(bank) and (span == (0, len(bank)) or not is_memmap(bank)):
        return bank[span[0] : span[1]]
    block = read_rows(bank, *span)
    return np.array(block) if is_memmap(block) else block


def _widest(dtypes: Sequence[str]) -> str:
    """Choose the widest of the dtypes in which pieces of a bank are stored: each piece decides for itself."""
    if len(set(dtypes)) == 1:  # also what is no float
        return dtypes[0]
    return max(dtypes, key=lambda name: int(name.lstrip("bfloat")))


def _padded(result: SearchResult, k: int) -> SearchResult:
    """Lengthen lists to k with missing neighbours, (inf, -1)."""
    missing = k - result.indices.shape[1]
    if missing <= 0:
        return result
    pad = torch.nn.functional.pad
    return replace(
        result,
        distances=pad(result.distances, (0, missing), value=float("inf")),
        indices=pad(result.indices, (0, missing), value=-1),
    )
