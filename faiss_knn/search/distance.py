"""The five distances: what each needs of a row, and its exact value for given pairs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from faiss_knn.names import DISTANCES
from faiss_knn.search.inputs import as_choice

_LEAST_NORM = 2.0**-500  # below it a square may be lost in float64
_RESCALED = 1 << 20  # values measured again at once
_VALUES = 1 << 20  # differences or products held at once
_REDUCED = 64  # exponent that rows are reduced by whose products with a query left the range
_RESCALE = 2.0**600  # brings squares of the largest and the smallest differences into range


@dataclass(frozen=True)
class Distance:
    """One of the five distances.

    Attributes:
        name: As the user writes it.
        faiss_metric: The FAISS metric whose order is the same on prepared rows.
        normalized: Rows are compared by their direction: zero rows have none.
        norm: 1 or 2, the norm of differences that pairs are measured by; 0 for none: by minus their inner product,
            which takes the place of the norm below.
        from_norm: Maps that norm of (unit) differences to the distance.
        to_norm: The inverse of `from_norm`.
    """

    name: str
    faiss_metric: str
    normalized: bool
    norm: float
    from_norm: Callable[[Tensor], Tensor]
    to_norm: Callable[[Tensor], Tensor]


def get_distance(name: str) -> Distance:
    """Look a distance up by name.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> get_distance("cosine").normalized
        True
    """
    return _DISTANCES[as_choice(name, DISTANCES, "`distance_metric`")]


# Functions with names, for an index to be pickled and sent to another process.
def _same(norm: Tensor) -> Tensor:
    return norm


def _half_square(norm: Tensor) -> Tensor:
    return norm.square() / 2


def _root_of_double(distance: Tensor) -> Tensor:
    return (2 * distance).sqrt()


_DISTANCES = {
    "euclidean": Distance("euclidean", "METRIC_L2", normalized=False, norm=2.0, from_norm=_same, to_norm=_same),
    "squared_euclidean": Distance(
        "squared_euclidean", "METRIC_L2", normalized=False, norm=2.0, from_norm=torch.square, to_norm=torch.sqrt
    ),
    # For unit vectors |a - b|^2 = 2 - 2 cos: no cancellation where the angle is small, unlike 1 - a.b.
    "cosine": Distance(
        "cosine",
        "METRIC_L2",
        normalized=True,
        norm=2.0,
        from_norm=_half_square,
        to_norm=_root_of_double,
    ),
    "manhattan": Distance("manhattan", "METRIC_L1", normalized=False, norm=1.0, from_norm=_same, to_norm=_same),
    "dot": Distance("dot", "METRIC_INNER_PRODUCT", normalized=False, norm=0.0, from_norm=_same, to_norm=_same),
}


def lengths(rows: Tensor) -> Tensor:
    """Return the float64 euclidean length of each row, the same bits wherever and among whatever rows it stands.

    Args:
        rows: (n, d) of any float dtype.

    Returns:
        (n,) float64; 0 or NaN for a zero row.
    """
    # Without it, rows of 1e-200 or 1e200 would lose their squares.
    return _largest(rows)[:, 0].double() * scaled_lengths(rows)


def scaled_lengths(rows: Tensor) -> Tensor:
    """Return the float64 length of each row (n, d) over its largest coordinate, (n,); NaN for a zero row."""
    scaled = rows.to(torch.float64, copy=True).div_(_largest(rows))
    return _per_pair(torch.zeros_like(scaled[:1]), scaled[None], 2.0)[0]


def normalize(rows: Tensor, known: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return rows, none zero, as vectors of length 1.

    Rows that are exact multiples of each other come out equal bit for bit: divided by their largest coordinate they
    are equal numbers, which are rounded alike.

    Args:
        rows: (n, d) of any float dtype.
        known: (n,) their `scaled_lengths`; None: to be found.
        dtype: To compute in, float64 or float32.
    """
    known = scaled_lengths(rows) if known is None else known
    return rows.to(dtype, copy=True).div_(_largest(rows)).div_(known[:, None].to(dtype))


def directions(rows: Tensor) -> Tensor:
    """Return rows (n, d) divided by their lengths, float64; those that are zero or not finite as they are.

    Example:
        >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    rows = rows.double()
    has_direction = (rows != 0).any(1) & rows.isfinite().all(1)
    return torch.where(has_direction[:, None], normalize(torch.where(has_direction[:, None], rows, 1.0)), rows)


def _largest(rows: Tensor) -> Tensor:
    """Return the largest absolute coordinate of each row (n, d), (n, 1)."""
    return rows.abs().amax(1, keepdim=True)


def pair_norms(
    queries: Tensor, rows: Tensor, distance: Distance, dtype: torch.dtype = torch.float64, *, wide: bool = False
) -> Tensor:
    """Measure each query against its own rows, in float64 or float32, from differences or, for "dot", products.

    No matrix product and no blocked sum takes part, so a pair's value depends on that pair alone: the same bits at
    any batch size, position and thread count.

    Args:
        queries: (B, d) of any float dtype; of length 1 if `distance.normalized`.
        rows: (B, m, d), or (1, m, d) for the same rows for every query; likewise.
        distance: Which distance.
        dtype: To compute in.
        wide: Whether values come from float64, and their squares may leave its range.

    Returns:
        (B, m) norms of the differences in that dtype; `distance.from_norm` makes distances of them.
    """
    queries, rows = queries.to(dtype), rows.to(dtype)
    if distance.norm == 0:
        return _in_range(queries, rows) if wide else 0.0 - _inner(queries, rows)
    norms = _per_pair(queries, rows, distance.norm)
    return _without_range_errors(norms, queries, rows) if wide and distance.norm == 2 else norms


def _without_range_errors(norms: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
    """Measure those pairs again, scaled by a power of two, whose squares float64 cannot hold."""
    query, place = ((norms < _LEAST_NORM) | ~norms.isfinite()).nonzero().unbind(1)
    for some in torch.split(torch.arange(len(query), device=norms.device), max(1, _RESCALED // rows.shape[2])):
        q, m = query[some], place[some]
        near = norms[q, m, None] < _LEAST_NORM
        scale = torch.where(near, norms.new_full((), _RESCALE), norms.new_full((), 1 / _RESCALE))
        compared, asking = rows[0, m] if len(rows) == 1 else rows[q, m], queries[q]
        # Far rows are scaled first: their differences may leave the range too.
        differences = torch.where(near, (compared - asking) * scale, compared * scale - asking * scale)
        scaled = _per_pair(torch.zeros_like(differences), differences[:, None], 2.0)[:, 0]
        norms[q, m] = (scaled / scale[:, 0]).clamp(max=torch.finfo(norms.dtype).max)
    return norms


def _per_pair(queries: Tensor, rows: Tensor, norm: float) -> Tensor:
    if norm == 2 and queries.device.type == "cpu":  # in half of the time that cdist takes for few rows a query
        return _in_blocks(queries, rows, _euclidean)
    if len(rows) == 1:
        return torch.cdist(queries[None], rows, p=norm, compute_mode="donot_use_mm_for_euclid_dist")[0]
    return torch.cdist(queries[:, None], rows, p=norm, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


def _euclidean(queries: Tensor, rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows - queries, dim=2)
    return norms


def _inner(queries: Tensor, rows: Tensor) -> Tensor:
    """Return the inner products (B, m) of queries (B, d) with rows (B, m, d) or (1, m, d)."""
    return _in_blocks(queries, rows, _summed_products)


def _summed_products(queries: Tensor, rows: Tensor) -> Tensor:
    return _summed(queries * rows)


def _in_blocks(queries: Tensor, rows: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compare queries (B, d) with rows (B, m, d) or (1, m, d), in parts that `compare` gets as (b, 1, d), (b, n, d)."""
    compared = queries.new_empty(len(queries), rows.shape[1])
    width = max(1, min(rows.shape[1], _VALUES // rows.shape[2]))
    height = max(1, _VALUES // (width * rows.shape[2]))
    for top in range(0, len(queries), height):
        part = slice(top, top + height)
        own = rows if len(rows) == 1 else rows[part]
        for left in range(0, rows.shape[1], width):
            compared[part, left : left + width] = compare(queries[part, None], own[:, left : left + width])
    return compared


def _summed(values: Tensor) -> Tensor:
    """Add up the last dimension by halves: sums whose bits depend on the values alone, on any device."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        sums = values[..., :half] + values[..., half : 2 * half]
        if values.shape[-1] % 2:
            sums[..., 0] += values[..., -1]
        values = sums
    return values[..., 0]


def _in_range(queries: Tensor, rows: Tensor) -> Tensor:
    """Return minus the inner products of float64 values, those beyond float64's range as its largest numbers."""
    scaled, exponents = scaled_by_powers(queries)
    products, exponents = _inner(scaled, rows), exponents[:, None].expand(-1, rows.shape[1])
    if (beyond := ~products.isfinite()).any():
        products = torch.where(beyond, _inner(scaled, rows * 2.0**-_REDUCED), products)
        exponents = torch.where(beyond, exponents + _REDUCED, exponents)
    most = torch.finfo(products.dtype).max
    return 0.0 - _times_power(products, exponents).clamp(-most, most)


def scaled_by_powers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (n, d) whose largest coordinates lie in [1/2, 1), and the float64 exponents of what was divided by.

    Example:
        >>> scaled_by_powers(torch.tensor([[3.0, -6.0], [0.0, 0.0]]))
        (tensor([[ 0.3750, -0.7500],
                [ 0.0000,  0.0000]], dtype=torch.float64), tensor([3., 0.], dtype=torch.float64))
    """
    rows = rows.double()
    exponents = torch.frexp(_largest(rows)[:, 0]).exponent.double()
    return _times_power(rows, -exponents[:, None]), exponents


def _times_power(values: Tensor, exponents: Tensor) -> Tensor:
    """Multiply by powers of two, in two steps, as a power itself may be beyond float64."""
    first = (exponents / 2).floor()
    return values * torch.exp2(first) * torch.exp2(exponents - first)
