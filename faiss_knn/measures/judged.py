"""Ranked lists judged by lists of what is relevant: revisited Oxford and Paris, and any other benchmark with junk.

A query has positives, rows that are right, and junk, rows that are neither right nor wrong, which are taken out of the
list before anything is counted. All other rows are wrong.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.search.inputs import as_count

Lists = Sequence[npt.ArrayLike]


def trapezoid_average_precision(ranks: npt.ArrayLike, total: int) -> float:
    """Measure the area under the precision-recall curve by trapezoids, as Oxford, Paris and their revisions count it.

    With n positives, of which the j-th found, from 0, is at rank r_j, from 0, that is
    Σ_j (j / r_j + (j + 1) / (r_j + 1)) / 2n, where 0 / 0 is 1 (Philbin et al. 2007; Radenović et al. 2018, arXiv
    1803.11285). The average precision of other benchmarks is the second term alone.

    Args:
        ranks: Of the positives found, from 0, ascending.
        total: n, with those that were not found.

    Raises:
        ValueError: If ranks do not ascend, or are more than `total`.

    Example:
        >>> trapezoid_average_precision([0, 2], total=2)
        0.7916666666666666
    """
    places = np.asarray(ranks, dtype=np.float64)
    if places.ndim != 1 or (np.diff(places) <= 0).any() or (len(places) and places[0] < 0):
        raise ValueError("`ranks` must ascend from 0 or more, each once")
    if total < max(1, len(places)):
        raise ValueError(f"`total` must be 1 or more, and as many as `ranks`, {len(places)}, got {total}")
    counts = np.arange(len(places))
    before = np.divide(counts, places, out=np.ones_like(places), where=places > 0)
    return float((before + (counts + 1) / (places + 1)).sum() / (2 * total))


def judged_metrics(
    neighbors: npt.ArrayLike, positives: Lists, junk: Lists | None = None, ks: Iterable[int] = (1, 5, 10)
) -> dict[str, float]:
    """Judge ranked lists by what is relevant to each query.

    Args:
        neighbors: (Q, K) row numbers, best first, -1 where missing. Positives beyond the list are not found.
        positives: For each query the rows that are right. A query without any is left out of the means.
        junk: For each query the rows that are taken out of its list first; None: none.
        ks: List lengths for `mp@k`.

    Returns:
        `map`, mean of `trapezoid_average_precision`; `mp@k`, mean share of positives among the first
        min(k, place of the last positive); `queries`, how many have positives. NaN where none has.

    Raises:
        ValueError: If the lists are not as many as the queries, or a row is both positive and junk.

    Example:
        >>> scores = judged_metrics([[4, 7, 1, 2]], positives=[[4, 2]], junk=[[7]], ks=[1, 2])
        >>> scores["map"], scores["mp@1"], scores["mp@2"]
        (0.7916666666666666, 1.0, 0.5)
    """
    lists = np.asarray(neighbors)
    lengths = [as_count(k, "`ks`") for k in ks]
    if lists.ndim != 2 or lists.dtype.kind not in "iu":
        raise ValueError(f"`neighbors` must be (Q, K) row numbers, got {lists.dtype} of shape {lists.shape}")
    junk = [[] for _ in lists] if junk is None else junk
    for name, given in (("positives", positives), ("junk", junk)):
        if len(given) != len(lists):
            raise ValueError(f"`{name}` must have a list for each of {len(lists)} queries, got {len(given)}")
    judged = [_judge(*one, lengths) for one in zip(lists, positives, junk, strict=True)]
    rows = np.array([row for row in judged if row is not None], dtype=np.float64).reshape(-1, 1 + len(lengths))
    means = rows.mean(0) if len(rows) else np.full(1 + len(lengths), np.nan)
    names = ["map", *(f"mp@{k}" for k in lengths)]
    return dict(zip(names, means.tolist(), strict=True)) | {"queries": len(rows)}


def revisited_metrics(
    neighbors: npt.ArrayLike, easy: Lists, hard: Lists, junk: Lists, ks: Iterable[int] = (1, 5, 10)
) -> dict[str, float]:
    """Judge ranked lists by the three setups of revisited Oxford and Paris (Radenović et al. 2018, arXiv 1803.11285).

    | setup | positives | taken out |
    |---|---|---|
    | easy | easy | hard, junk |
    | medium | easy, hard | junk |
    | hard | hard | easy, junk |

    Args:
        neighbors: (Q, K) row numbers, best first, -1 where missing: of the whole bank, for the numbers of papers.
        easy: For each query the rows that show it easily.
        hard: The rows that show it, but not easily.
        junk: The rows that show hardly any of it.
        ks: As in `judged_metrics`.

    Returns:
        `map_easy`, `map_medium`, `map_hard`, and `mp@k_easy` and so on, as in `judged_metrics`.

    Raises:
        ValueError: As `judged_metrics`.

    Example:
        >>> scores = revisited_metrics([[0, 1, 2, 3]], easy=[[1]], hard=[[3]], junk=[[0]], ks=[1])
        >>> scores["map_easy"], scores["map_medium"], scores["map_hard"]
        (1.0, 0.7916666666666666, 0.25)
    """
    lengths = list(ks)
    both = [[*a, *b] for a, b in zip(_plain(easy), _plain(hard), strict=True)]
    without = [[[*a, *b] for a, b in zip(_plain(one), _plain(junk), strict=True)] for one in (hard, easy)]
    setups = {"easy": (easy, without[0]), "medium": (both, junk), "hard": (hard, without[1])}
    metrics: dict[str, float] = {}
    for name, (positives, taken) in setups.items():
        scores = judged_metrics(neighbors, positives, taken, lengths)
        metrics |= {f"{metric}_{name}": value for metric, value in scores.items()}
    return metrics


def _plain(lists: Lists) -> list[list[Any]]:
    return [np.asarray(one).tolist() for one in lists]


def _judge(
    ranked: npt.NDArray[Any], positives: npt.ArrayLike, junk: npt.ArrayLike, ks: list[int]
) -> list[float] | None:
    """Compute a query's average precision and precision at each k; None without positives."""
    right, junk_rows = (np.unique(np.asarray(rows, dtype=np.int64)) for rows in (positives, junk))
    if np.isin(right, junk_rows).any():
        raise ValueError(f"row {right[np.isin(right, junk_rows)][0]} is both positive and junk of a query")
    if not len(right):
        return None
    listed = ranked[(ranked >= 0) & ~np.isin(ranked, junk_rows)]
    ranks = np.flatnonzero(np.isin(listed, right))
    last = ranks[-1] + 1 if len(ranks) == len(right) else max(ks, default=1)
    precisions = [float((ranks < min(k, last)).sum()) / min(k, last) for k in ks]
    return [trapezoid_average_precision(ranks, len(right)), *precisions]
