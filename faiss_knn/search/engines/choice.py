"""From a spec to an engine: who searches a bank, by what was asked, what the bank is and what was learned before."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance
from faiss_knn.search.engines import faiss_gpu
from faiss_knn.search.engines.base import Engine, TooFewRowsError
from faiss_knn.search.engines.costs import search_cost, seconds_per_kept
from faiss_knn.search.engines.exact import ExactEngine, pays_in_int8
from faiss_knn.search.engines.faiss_engine import FaissEngine
from faiss_knn.search.engines.fast import FastEngine, Tuned, foretell, sample_of
from faiss_knn.search.engines.matrix_product import multiply_add_seconds, scan_dtype
from faiss_knn.search.engines.projection import SAMPLE_ROWS
from faiss_knn.search.engines.recall_sample import HELD_OUT, RECHECK
from faiss_knn.search.stored_rows import StoredRows

DEFAULT_K = 20
_TARGET_RECALL = 0.99
_UNMET = 0.005  # below the target, where "auto" searches exactly instead
_FAST_ROWS = 4096  # below, the exact search takes about as long as any other
_LEAST_ROWS_PER_LIST = 39  # by FAISS's own advice
_BUILD_VALUE = 8e-9  # seconds per value that a build writes: centred, cast
_TAIL = 4  # times as many candidates as they need on average are kept of all queries
_TUNING_SCANS = 3  # scans of the held-out queries that a first tuning takes
_DIRECTION_PASSES = 24  # products of the sample with half as many directions as dimensions, and what goes with them
_LEAST_SHARE = 8  # of the dimensions "fast" scans at least one in so many
# Of the cost of "flat", as foretold, which is rough: what a query of "fast" may cost for exactness to be given up, and
# what build and queries together may.
_FASTER, _SURE = 0.8, 0.9
# Seconds of a thread that a forecast takes beside finding directions, and how much of the searches it may cost.
_FORETELLING, _FORECAST = 0.2, 0.15


@dataclass(frozen=True)
class EngineRequest:
    """What is asked of an engine.

    Attributes:
        spec: "flat", "ivf", "fast", "auto" or a FAISS factory string.
        nprobe: Inverted lists to visit; None: tuned, or FAISS's default.
        target_recall: Share of the exact neighbours to find; None: 0.99 where there is something to tune for it.
        expected_k: The k to find it at.
        expected_queries: How many queries the bank will be searched for; None: as many as it has rows.

    Example:
        >>> EngineRequest("fast").target, EngineRequest("fast", target_recall=0.9).target
        (0.99, 0.9)
    """

    spec: str
    nprobe: int | None = None
    target_recall: float | None = None
    expected_k: int = DEFAULT_K
    expected_queries: int | None = None

    @property
    def target(self) -> float:
        """The recall to meet."""
        return _TARGET_RECALL if self.target_recall is None else self.target_recall


def make_engine(
    request: EngineRequest,
    rows: StoredRows,
    distance: Distance,
    previous: Engine | None = None,
    known_queries: Tensor | None = None,
) -> Engine:
    """Choose an engine and make it over a bank.

    Args:
        request: What is asked of it.
        rows: The bank, checked.
        distance: Which distance.
        previous: The engine of an earlier bank, released: what it learned is taken over where it still holds.
        known_queries: (n, d) queries asked of an earlier bank, to measure the recall on; None: rows of the bank.

    Raises:
        TooFewRowsError: If the bank is too small for the spec.
        ValueError: If FAISS has no such index, or nprobe does not fit it.
    """
    spec = _resolved(request, rows, distance, previous)
    if spec == "fast":
        return _fast(request, rows, distance, previous, known_queries)
    if spec != "flat" and faiss_gpu.lacks_faiss(rows.device):
        faiss_gpu.warn_without_faiss_gpu(spec)
        spec = "flat"
    if spec == "flat":
        return ExactEngine(rows, distance, previous=previous if isinstance(previous, ExactEngine) else None)
    return _faiss(request, rows, distance, previous, known_queries)


def _resolved(request: EngineRequest, rows: StoredRows, distance: Distance, previous: Engine | None) -> str:
    """Resolve "auto", and "fast" where nothing is faster than the exact search."""
    if request.spec not in ("fast", "auto"):
        return request.spec
    if distance.norm != 2 or rows.streamed or len(rows) < _FAST_ROWS:
        return "flat"
    if request.spec == "fast":
        return "fast"
    queries = len(rows) if request.expected_queries is None else request.expected_queries
    tuned = previous.tuned if isinstance(previous, FastEngine) else None
    pays = rows.device.type == "cpu" and prefers_fast(
        len(rows),
        rows.dim,
        queries,
        request.expected_k,
        scan_dtype(rows.device),
        warm=tuned is not None,
        forecast=_forecast(request, rows, distance, tuned),
    )
    return "fast" if pays else "flat"


class Scan(NamedTuple):
    """What an engine does for each query.

    Attributes:
        dims: Width that it scans.
        dtype: What it scans in.
        candidates: Rows that it measures.
    """

    dims: int
    dtype: torch.dtype
    candidates: int


class Forecast(NamedTuple):
    """What a bank's spectrum allows, each found out when it is asked for.

    Attributes:
        flat: What "flat" would do.
        fast: What "fast" would do.
    """

    flat: Callable[[], Scan]
    fast: Callable[[], Scan]


def prefers_fast(
    rows: int,
    dim: int,
    queries: int,
    k: int,
    dtype: torch.dtype,
    *,
    warm: bool,
    forecast: Forecast | None = None,
) -> bool:
    """Decide for "auto" whether a build and `queries` searches are cheaper with "fast" than with "flat".

    flat:  build N·d + Q · (scan + candidates)
    fast:  build N·d, tuning (some scans of the held-out queries, fewer when warm) + Q · (narrower scan + candidates)

    "ivf" is never chosen: at a recall worth reporting it visits a quarter of its lists, one query at a time, and takes
    longer than an exact scan by products; what it saves at fewer lists it costs in accuracy.

    Args:
        rows: N.
        dim: d.
        queries: How many will be searched until the next build.
        k: Neighbours of each.
        dtype: That a scan computes in.
        warm: Whether an earlier tuning is at hand, which need only be checked.
        forecast: Says what the bank allows; asked only if the narrowest scan would pay and the answer takes little
            beside the searches. None: that it does.
    """
    narrowest = Scan(max(1, dim // _LEAST_SHARE), dtype, k)

    def pays(flat: Scan, fast: Scan) -> bool:
        exact = search_cost(rows, dim, flat.dims, flat.candidates, flat.dtype)
        quick = search_cost(rows, dim, fast.dims, fast.candidates, fast.dtype, is_quick=True)
        tuning = _tuning_cost(rows, dim, k, dtype, warm=warm, is_projected=fast.dims < dim)
        return quick < _FASTER * exact and tuning + queries * quick < _SURE * queries * exact

    if not pays(_usual_scan(dim, k, dtype), narrowest):
        return False
    if forecast is None:
        return True
    searches = queries * search_cost(rows, dim, dim, k, dtype)
    if not warm and _FORETELLING + _directions_cost(dim, dtype) > _FORECAST * searches:
        return False
    flat = forecast.flat()
    return pays(flat, narrowest) and pays(flat, forecast.fast())


def _usual_scan(dims: int, k: int, dtype: torch.dtype) -> Scan:
    """Return what "flat" does where it does not scan in int8."""
    return Scan(dims, dtype, k + k // 4 + 4)


def _tuning_cost(rows: int, dim: int, k: int, dtype: torch.dtype, *, warm: bool, is_projected: bool) -> float:
    """Return the seconds of a thread that a build of "fast" takes and one of "flat" does not."""
    projecting = rows * dim * (_BUILD_VALUE + dim // 2 * multiply_add_seconds(dtype)) if is_projected else 0.0
    if warm:
        return RECHECK * search_cost(rows, dim, dim, 2 * k, dtype) + projecting
    scans = _TUNING_SCANS * HELD_OUT * search_cost(rows, dim, dim, k, dtype)
    return scans + _directions_cost(dim, dtype) + projecting


def _directions_cost(dim: int, dtype: torch.dtype) -> float:
    """Return the seconds of a thread that finding the leading directions of a sample takes."""
    return _DIRECTION_PASSES * SAMPLE_ROWS * dim * (dim // 2) * multiply_add_seconds(dtype)


def _forecast(request: EngineRequest, rows: StoredRows, distance: Distance, tuned: Tuned | None) -> Forecast:
    """Foretell by an earlier tuning, or by a sample of the bank."""
    k = request.expected_k

    def flat() -> Scan:
        engine = ExactEngine(sample := sample_of(rows, distance), distance)
        dims = cast(int, engine.parameters["scan_dims"])
        if engine.parameters["scan_dtype"] == "int8":
            needed = engine.candidates_needed(len(rows), k)
            if pays_in_int8(sample, len(rows), needed, _TAIL * needed * seconds_per_kept(len(rows))):
                return Scan(dims, torch.int8, k + math.ceil(needed))
        return _usual_scan(dims, k, scan_dtype(rows.device))

    def fast() -> Scan:
        chosen = foretell(rows, distance, k, request.target) if tuned is None else tuned
        dims = rows.dim if chosen.basis is None else chosen.basis.shape[1]
        return Scan(dims, chosen.dtype, chosen.candidates(k))

    return Forecast(flat, fast)


def _fast(
    request: EngineRequest, rows: StoredRows, distance: Distance, previous: Engine | None, known_queries: Tensor | None
) -> Engine:
    """Make "fast"; or the exact engine where "auto" would miss its target with it."""
    tuned = previous.tuned if isinstance(previous, FastEngine) else None
    engine = FastEngine(rows, distance, request.expected_k, request.target, tuned, known_queries)
    is_unmet = request.spec == "auto" and engine.recall < request.target - _UNMET
    return ExactEngine(rows, distance) if is_unmet else engine


def _faiss(
    request: EngineRequest, rows: StoredRows, distance: Distance, previous: Engine | None, known_queries: Tensor | None
) -> Engine:
    """Make a FAISS index, tuned and measured where a recall is asked for: only then is an earlier one taken over."""
    is_measured = request.spec == "ivf" or request.target_recall is not None
    spec = ivf_spec(len(rows)) if request.spec == "ivf" else request.spec
    trained = previous if is_measured and isinstance(previous, FaissEngine) else None
    if trained is not None and not trained.fits(rows, distance, spec):
        trained = None
    engine = FaissEngine(rows, distance, spec, request.nprobe, trained)
    if is_measured:
        engine.tune(request.expected_k, request.target, request.nprobe, known_queries)
    return engine


def ivf_spec(rows: int) -> str:
    """Return the inverted lists that "ivf" makes of N rows: 4√N, as far as each can be trained.

    Raises:
        TooFewRowsError: If there are too few rows for two lists.

    Example:
        >>> ivf_spec(10_000)
        'IVF256,Flat'
    """
    lists = min(int(4 * rows**0.5), rows // _LEAST_ROWS_PER_LIST)
    if lists < 2:
        raise TooFewRowsError(
            f"`features` must hold at least {2 * _LEAST_ROWS_PER_LIST} rows for 'ivf' (two lists of "
            f"{_LEAST_ROWS_PER_LIST}), got {rows}: use 'flat'"
        )
    return f"IVF{1 << (lists.bit_length() - 1)},Flat"
