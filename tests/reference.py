"""Slow, obvious numpy: what the tests hold the package to."""

import numpy as np


def distances(queries: np.ndarray, rows: np.ndarray, distance_metric: str) -> np.ndarray:
    """(B, N) in extended precision, one difference at a time."""
    queries, rows = queries.astype(np.longdouble), rows.astype(np.longdouble)
    if distance_metric == "cosine":
        queries = queries / np.sqrt((queries**2).sum(1, keepdims=True))
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    found = []
    for query in queries:
        difference = rows - query
        squares = (difference**2).sum(1)
        if distance_metric == "cosine":
            found.append(squares / 2)
        elif distance_metric == "squared_euclidean":
            found.append(squares)
        elif distance_metric == "euclidean":
            found.append(np.sqrt(squares))
        else:
            found.append(np.abs(difference).sum(1))
    return np.array(found)


def brute_force(
    queries: np.ndarray, rows: np.ndarray, k: int, distance_metric: str = "euclidean"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows by (distance, index): (B, k) distances and row numbers."""
    every = distances(queries, rows, distance_metric)
    order = np.argsort(every, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(every, order, 1), order
