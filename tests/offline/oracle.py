"""k-nearest-neighbour evaluation in slow, obvious float64."""

import numpy as np


def distance_table(queries, bank, metric):
    queries, bank = np.asarray(queries, np.float64), np.asarray(bank, np.float64)
    if metric == "cosine":
        queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank))
        return np.array([[1 - q @ b for b in bank] for q in queries]).clip(0)
    gaps = queries[:, None] - bank[None]
    if metric == "manhattan":
        return np.abs(gaps).sum(2)
    squared = (gaps**2).sum(2)
    return squared if metric == "squared_euclidean" else np.sqrt(squared)


def neighbors(queries, bank, k, metric, leave_one_out=False):
    table = distance_table(queries, bank, metric)
    if leave_one_out:
        np.fill_diagonal(table, np.inf)
    order = np.argsort(table, axis=1, kind="stable")[:, :k]  # ties by index
    return np.take_along_axis(table, order, 1), order


def weights(distances, temperature, weighting):
    if weighting == "uniform":
        return np.ones_like(distances)
    if weighting == "inverse":
        return 1 / (distances + temperature)
    raised = np.exp(-(distances - distances.min()).astype(np.longdouble) / temperature)
    return raised / raised.sum()


def to_24_bits(scores):
    """Rounded like float32, but with exponents that do not end: equal scores stay equal, small ones in order."""
    mantissas, exponents = np.frexp(scores)
    return np.ldexp(mantissas.astype(np.float32).astype(np.longdouble), exponents)


def judge(distances, indices, bank_labels, query_labels, temperature, weighting, num_classes):
    """(Q,) top-1 and top-5 hits, query by query."""
    top1, top5 = [], []
    for d, ids, truth in zip(distances, indices, query_labels, strict=True):
        scores = np.zeros(num_classes, np.longdouble)
        for weight, i in zip(weights(d, temperature, weighting), ids, strict=True):
            scores[bank_labels[i]] += weight
        ranked = [c for c in np.argsort(-to_24_bits(scores), kind="stable") if scores[c] > 0]
        top1.append(truth == ranked[0])
        top5.append(truth in ranked[:5])
    return np.array(top1), np.array(top5)


def macro(hits, labels):
    return np.mean([hits[labels == c].mean() for c in np.unique(labels)])
