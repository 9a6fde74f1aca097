"""Slow, obvious numpy: what the tests hold the package to."""

import numpy as np


def distances(queries: np.ndarray, rows: np.ndarray, distance_metric: str) -> np.ndarray:
    """(B, N) in extended precision, one difference at a time."""
    queries, rows = queries.astype(np.longdouble), rows.astype(np.longdouble)
    if distance_metric == "cosine":
        queries = queries / np.sqrt((queries**2).sum(1, keepdims=True))
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    if distance_metric == "dot":
        return np.array([-(rows * query).sum(1) for query in queries], np.longdouble).reshape(len(queries), len(rows))
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
    return np.array(found, np.longdouble).reshape(len(queries), len(rows))


def brute_force(
    queries: np.ndarray, rows: np.ndarray, k: int, distance_metric: str = "euclidean"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows by (distance, index): (B, k) distances and row numbers."""
    every = distances(queries, rows, distance_metric)
    order = np.argsort(every, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(every, order, 1), order


def log_class_scores(
    distances: np.ndarray, labels: np.ndarray, num_classes: int, temperature: float, weighting: str
) -> np.ndarray:
    """(B, C) logarithms of each class's share of the votes, -inf without one, in extended precision, term by term.

    `labels` are (B, k) class ids or (B, k, C) shares of classes; a neighbour at distance inf is missing.
    """
    found = np.full((len(distances), num_classes), -np.inf, np.longdouble)
    for b, row in enumerate(distances.astype(np.longdouble)):
        total = np.longdouble(-np.inf)
        for i in np.flatnonzero(np.isfinite(row)):
            log = {"inverse": -np.log(row[i] + temperature), "softmax": -row[i] / temperature, "uniform": 0 * row[i]}
            total = np.logaddexp(total, log[weighting])
            for c in range(num_classes):
                part = labels[b, i, c] if labels.ndim == 3 else labels[b, i] == c
                if part > 0:
                    found[b, c] = np.logaddexp(found[b, c], log[weighting] + np.log(np.longdouble(part)))
        found[b] -= total if np.isfinite(total) else 0
    return found
