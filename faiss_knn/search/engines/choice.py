"""From a spec to an engine: who searches a bank, by what was asked, what the bank is and what was learned before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from faiss_knn.search.distance import Distance
from faiss_knn.search.engines import faiss_gpu
from faiss_knn.search.engines.base import Engine, TooFewRowsError
from faiss_knn.search.engines.costs import search_cost
from faiss_knn.search.engines.exact import ExactEngine
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
        foretell=lambda: _foretold(request, rows, distance, tuned),
    )
    return "fast" if pays else "flat"


class Scans(NamedTuple):
    """What the two engines would do for each query.

    Attributes:
        flat_dims: Width that "flat" scans.
        fast_dims: Width that "fast" scans.
        candidates: Rows that "fast" measures.
        in_int8: Whether "flat" scans in int8.
    """

    flat_dims: int
    fast_dims: int
    candidates: int
    in_int8: bool = False


def prefers_fast(
    rows: int,
    dim: int,
    queries: int,
    k: int,
    dtype: torch.dtype,
    *,
    warm: bool,
    foretell: Callable[[], Scans] | None = None,
) -> bool:
    """Decide for "auto" whether a build and `queries` searches are cheaper with "fast" than with "flat".

    flat:  build N·d + Q · (scan + 1.25k candidates, or in int8 2k)
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
        foretell: Says what the bank's spectrum allows; asked only if the narrowest scan would pay and the answer takes
            little beside the searches. None: that it does.
    """

    def pays(scans: Scans) -> bool:
        measured = 2 * k + 8 if scans.in_int8 else k + k // 4 + 4
        flat = search_cost(rows, dim, scans.flat_dims, measured, torch.int8 if scans.in_int8 else dtype)
        fast = search_cost(rows, dim, scans.fast_dims, scans.candidates, dtype, is_quick=True)
        total = _tuning_cost(rows, dim, k, dtype, warm=warm) + queries * fast
        return fast < _FASTER * flat and total < _SURE * queries * flat

    if not pays(Scans(dim, max(1, dim // _LEAST_SHARE), k)):
        return False
    if foretell is None:
        return True
    searches = queries * search_cost(rows, dim, dim, k, dtype)
    is_affordable = warm or _FORETELLING + _directions_cost(dim, dtype) <= _FORECAST * searches
    return is_affordable and pays(foretell())


def _tuning_cost(rows: int, dim: int, k: int, dtype: torch.dtype, *, warm: bool) -> float:
    """Return the seconds of a thread that a build of "fast" takes and one of "flat" does not."""
    projected = _BUILD_VALUE + dim // 2 * multiply_add_seconds(dtype)
    if warm:
        return RECHECK * search_cost(rows, dim, dim, 2 * k, dtype) + rows * dim * projected
    scans = _TUNING_SCANS * HELD_OUT * search_cost(rows, dim, dim, k, dtype)
    return scans + _directions_cost(dim, dtype) + rows * dim * projected


def _directions_cost(dim: int, dtype: torch.dtype) -> float:
    """Return the seconds of a thread that finding the leading directions of a sample takes."""
    return _DIRECTION_PASSES * SAMPLE_ROWS * dim * (dim // 2) * multiply_add_seconds(dtype)


def _foretold(request: EngineRequest, rows: StoredRows, distance: Distance, tuned: Tuned | None) -> Scans:
    """Foretell the scans by an earlier tuning, or by that of a sample of the bank."""
    flat = ExactEngine(sample_of(rows, distance), distance).parameters
    if tuned is None:
        tuned = foretell(rows, distance, request.expected_k, request.target)
    dims = rows.dim if tuned.basis is None else tuned.basis.shape[1]
    return Scans(cast(int, flat["scan_dims"]), dims, tuned.candidates(request.expected_k), flat["scan_dtype"] == "int8")


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
