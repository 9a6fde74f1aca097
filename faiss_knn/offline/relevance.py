"""evaluate_relevance(): retrieval judged by lists of what is relevant to each query, instead of by labels."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.measures.average_precision import micro_average_precision
from faiss_knn.measures.judged import judged_metrics, revisited_metrics
from faiss_knn.offline.formats import DataError
from faiss_knn.offline.lazy_rows import spans
from faiss_knn.offline.neighbors import exact_neighbors
from faiss_knn.search.inputs import as_count, shown

Relevance = Sequence[Mapping[str, Sequence[int]]]

_BLOCK = 1 << 24  # neighbours that are searched for at once
_MOST = 1 << 30  # that are kept
_KINDS = (("easy", "hard", "junk"), ("positives", "junk"))


def evaluate_relevance(
    bank_features: Any,
    query_features: Any,
    relevance: Relevance,
    *,
    distance_metric: str = "cosine",
    ks: Iterable[int] = (1, 5, 10),
    depth: int | None = None,
) -> dict[str, float]:
    """Rank the bank for each query, exactly, and judge the lists by what is relevant.

    Args:
        bank_features: (N, d), as in `evaluate`.
        query_features: (Q, d).
        relevance: For each query lists of bank rows by name: "positives" and "junk" (which may be left out), or those
            of revisited Oxford and Paris, "easy", "hard" and "junk".
        distance_metric: As in `evaluate`.
        ks: List lengths for `mp@k`.
        depth: Length of the lists; None: the whole bank, as the numbers of papers are.

    Returns:
        `judged_metrics`, and `micro_ap` over all pairs without junk (`micro_average_precision`); or
        `revisited_metrics`.

    Raises:
        ValueError: If features or lists do not fit, or lists need more memory than 8 GiB.

    Example:
        >>> bank, queries = np.eye(3), np.array([[1.0, 0.5, 0.0]])
        >>> scores = evaluate_relevance(bank, queries, [{"positives": [1], "junk": [0]}], ks=[1])
        >>> scores["map"], scores["mp@1"], scores["micro_ap"]
        (1.0, 1.0, 1.0)
    """
    n_bank, n_queries = len(bank_features), len(query_features)
    lists = _checked(relevance, n_bank, n_queries)
    depth = n_bank if depth is None else min(n_bank, as_count(depth, "`depth`"))
    if depth * n_queries > _MOST:
        raise ValueError(f"{n_queries} lists of {depth} rows are too many to keep: give `depth`, the length of a list")
    blocks = [
        exact_neighbors(bank_features, query_features[a:b], depth, distance_metric=distance_metric)
        for a, b in spans(n_queries, max(1, _BLOCK // depth))
    ]
    neighbors = np.concatenate([part.indices.cpu().numpy() for part in blocks])
    if "easy" in lists:
        return revisited_metrics(neighbors, lists["easy"], lists["hard"], lists["junk"], ks)
    scores = -np.concatenate([part.distances.cpu().numpy() for part in blocks])
    whole = judged_metrics(neighbors, lists["positives"], lists["junk"], ks)
    return whole | {"micro_ap": _micro(scores, neighbors, lists["positives"], lists["junk"])}


def read_relevance(path: str | Path) -> list[dict[str, list[int]]]:
    """Read what is relevant to each query: a JSON list, or a JSON object a line, as `evaluate_relevance` takes them.

    Raises:
        DataError: If the file cannot be read as that.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        read = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(x) for x in text.splitlines() if x.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON, lists of rows by name for each query: {error}") from error
    return list(read)


def _checked(relevance: Relevance, n_bank: int, n_queries: int) -> dict[str, list[npt.NDArray[np.int64]]]:
    """Check the lists of all queries, by name."""
    if len(relevance) != n_queries:
        raise ValueError(f"`relevance` must have an entry for each of {n_queries} queries, got {len(relevance)}")
    first = relevance[0] if n_queries and isinstance(relevance[0], Mapping) else {}
    names = next((kind for kind in _KINDS if kind[0] in first), _KINDS[1])
    for number, entry in enumerate(relevance):
        known = isinstance(entry, Mapping) and names[0] in entry and set(entry) <= set(names)
        if not known or any(name not in entry for name in names[:-1]):
            raise ValueError(
                f"`relevance[{number}]` must have lists of rows by the names easy, hard, junk, or positives, junk, "
                f"all entries alike, got {', '.join(map(str, entry)) if isinstance(entry, Mapping) else shown(entry)}"
            )
    return {name: [_rows(entry.get(name, ()), name, i, n_bank) for i, entry in enumerate(relevance)] for name in names}


def _rows(given: Any, name: str, number: int, n_bank: int) -> npt.NDArray[np.int64]:
    rows = np.asarray(given)
    whole = rows.ndim == 1 and (rows.dtype.kind in "iu" or not rows.size)
    if not whole or (rows.size and not 0 <= rows.min() <= rows.max() < n_bank):
        wrong = shown(given) if not whole else str(rows.min() if rows.min() < 0 else rows.max())
        raise ValueError(f"`relevance[{number}]`: {name} must be rows of the bank, in [0, {n_bank}), got {wrong}")
    return rows.astype(np.int64)


def _micro(
    scores: npt.NDArray[Any], neighbors: npt.NDArray[Any], positives: Sequence[Any], junk: Sequence[Any]
) -> float:
    kept_scores, kept_matches = [], []
    for score, ranked, right, taken in zip(scores, neighbors, positives, junk, strict=True):
        kept = ~np.isin(ranked, taken) & (ranked >= 0)
        kept_scores.append(score[kept])
        kept_matches.append(np.isin(ranked[kept], right))
    total = sum(len(np.unique(right)) for right in positives)
    return micro_average_precision(np.concatenate(kept_scores), np.concatenate(kept_matches), total)
