"""Ranking metrics from lists of neighbours' labels."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from faiss_knn.classify.labels import as_dense
from faiss_knn.measures.class_means import class_means


def retrieval_metrics(
    neighbor_labels: Tensor, query_labels: Tensor, relevant_counts: Tensor, ks: Iterable[int]
) -> dict[str, float]:
    """Judge ranked lists in which a neighbour is relevant when it has the query's label.

    With rel(i) = 1 if the i-th neighbour is relevant, P(i) the share of relevant ones among the first i, and R the
    relevant rows in the whole bank, the value of each metric is the mean over the queries with R > 0 of:

    - `precision@k`: relevant in the first k / k;  `hit_rate@k`: 1 if there is any;  `recall@k`: relevant / R
    - `map@k`: sum of P(i)·rel(i) over i ≤ k / min(R, k);  `ndcg@k`: binary gain, ideal over min(R, k)
      (Järvelin and Kekäläinen 2002)
    - `mrr`: 1 / rank of the first relevant one, 0 if the list holds none
    - `r_precision`: relevant in the first R / R;  `map@r`: sum of P(i)·rel(i) over i ≤ R / R
      (Musgrave et al. 2020, arXiv 2003.08505, section 3.2). Beyond the end of a list nothing counts as relevant, so
      both are lower bounds where K < R.

    Args:
        neighbor_labels: (B, K) integer class ids, best first; -1 where a neighbour is missing or has no label.
        query_labels: (B,) integer class ids.
        relevant_counts: (B,) integer R. A query with R = 0 is left out of every mean, whatever its list holds.
        ks: The list lengths to judge at, each in [1, K].

    Returns:
        The metrics above by name, one entry per k where the name has one; NaN if no query has R > 0.

    Raises:
        ValueError: If shapes do not fit, a k is outside [1, K], or a list holds more relevant rows than its R.

    Example:
        >>> scores = retrieval_metrics(torch.tensor([[7, 3, 7]]), torch.tensor([7]), torch.tensor([2]), ks=[1, 3])
        >>> scores["precision@3"], scores["map@3"], scores["mrr"]
        (0.6666666666666666, 0.8333333333333333, 1.0)
    """
    values, _ = _values_by_query(neighbor_labels, query_labels, relevant_counts, ks)
    return {name: value.mean().item() for name, value in values.items()}


def retrieval_by_class(
    neighbor_labels: Tensor, query_labels: Tensor, relevant_counts: Tensor, ks: Iterable[int], num_classes: int
) -> dict[str, Tensor]:
    """Compute the metrics of `retrieval_metrics` for the queries of each class.

    Their means over classes, `value.nanmean()`, weigh a class of few queries like one of many.

    Args:
        neighbor_labels: As in `retrieval_metrics`, and so are the next three.
        query_labels: (B,).
        relevant_counts: (B,).
        ks: List lengths.
        num_classes: C.

    Returns:
        (C,) float64 means by name, NaN for a class without a query of R > 0.

    Raises:
        ValueError: As `retrieval_metrics`.

    Example:
        >>> lists = torch.tensor([[0, 1], [1, 0], [0, 0]])
        >>> found = retrieval_by_class(lists, torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1]), [1], num_classes=3)
        >>> found["precision@1"]
        tensor([0.5000, 0.0000,    nan], dtype=torch.float64)
    """
    values, classes = _values_by_query(neighbor_labels, query_labels, relevant_counts, ks)
    return {name: class_means(value, classes, num_classes) for name, value in values.items()}


def _values_by_query(
    neighbor_labels: Tensor, query_labels: Tensor, relevant_counts: Tensor, ks: Iterable[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute each metric of the queries with R > 0, and return their classes, once all is checked."""
    neighbor_labels, query_labels, relevant_counts = (
        as_dense(values, f"`{name}`")
        for name, values in (
            ("neighbor_labels", neighbor_labels),
            ("query_labels", query_labels),
            ("relevant_counts", relevant_counts),
        )
    )
    ks = _lengths(ks)
    _check(neighbor_labels, query_labels, relevant_counts, ks)
    kept = relevant_counts > 0
    wanted = relevant_counts[kept].double()
    relevant = (neighbor_labels == query_labels[:, None])[kept] & (neighbor_labels[kept] >= 0)
    _check_counts(relevant, wanted)
    return _per_query(relevant.double(), wanted, ks), query_labels[kept].long()


def _per_query(relevant: Tensor, wanted: Tensor, ks: list[int]) -> dict[str, Tensor]:
    """Compute each metric for each query, from float64 (B, K) relevance and (B,) R."""
    ranks = torch.arange(1, relevant.shape[1] + 1, dtype=torch.float64, device=relevant.device)
    hits = relevant.cumsum(1)  # (B, K)
    gains = (relevant * hits / ranks).cumsum(1)  # running sum of P(i)·rel(i)
    discounts = 1 / torch.log2(ranks + 1)
    dcg = (relevant * discounts).cumsum(1)
    ideal = discounts.cumsum(0)
    values: dict[str, Tensor] = {}
    for k in ks:
        reachable = wanted.clamp(max=k)
        values[f"precision@{k}"] = hits[:, k - 1] / k
        values[f"hit_rate@{k}"] = (hits[:, k - 1] > 0).double()
        values[f"recall@{k}"] = hits[:, k - 1] / wanted
        values[f"map@{k}"] = gains[:, k - 1] / reachable
        values[f"ndcg@{k}"] = dcg[:, k - 1] / ideal[reachable.long() - 1]
    values["mrr"] = (relevant * (hits == 1) / ranks).sum(1)
    last = wanted.long().clamp(max=len(ranks))[:, None]  # the R-th place, or the end of a shorter list
    values["r_precision"] = pad(hits, (1, 0)).gather(1, last)[:, 0] / wanted
    values["map@r"] = pad(gains, (1, 0)).gather(1, last)[:, 0] / wanted
    return values


def _lengths(ks: Iterable[int]) -> list[int]:
    """Return the list lengths in ascending order, each once."""
    try:
        return sorted({operator.index(k) for k in ks})
    except (TypeError, RuntimeError) as error:  # the latter from tensors
        raise ValueError(f"`ks` must be integers, several list lengths such as [1, 5]: {error}") from error


def _check(neighbor_labels: Tensor, query_labels: Tensor, relevant_counts: Tensor, ks: list[int]) -> None:
    if neighbor_labels.ndim != 2:
        raise ValueError(f"`neighbor_labels` must be (B, K), got shape {tuple(neighbor_labels.shape)}")
    for name, given in (("query_labels", query_labels), ("relevant_counts", relevant_counts)):
        if given.shape != neighbor_labels.shape[:1]:
            raise ValueError(
                f"`{name}` must have one entry per list, shape ({len(neighbor_labels)},), got {tuple(given.shape)}"
            )
        if given.device != neighbor_labels.device:
            raise ValueError(f"`{name}` must be on the device of `neighbor_labels`, got {given.device}")
    for name, given in (("neighbor_labels", neighbor_labels), ("query_labels", query_labels)):
        if given.is_floating_point():
            raise ValueError(f"`{name}` must be integer class ids, got {given.dtype}: cast them with .long()")
    if not ((relevant_counts >= 0) & (relevant_counts == relevant_counts.double().floor())).all():
        raise ValueError("`relevant_counts` must be numbers of rows, integers from 0: a query without any has 0")
    length = neighbor_labels.shape[1]
    if ks and not 1 <= ks[0] <= ks[-1] <= length:
        raise ValueError(
            f"`ks` must lie in [1, K={length}], got {ks}: search more neighbours, or pad lists of the whole bank "
            "with -1"
        )


def _check_counts(relevant: Tensor, wanted: Tensor) -> None:
    excess = (relevant.sum(1) > wanted).nonzero()
    if len(excess):
        row = int(excess[0])
        raise ValueError(
            f"`relevant_counts` must count the relevant rows of the whole bank, got {int(wanted[row])} for a list that "
            f"holds {int(relevant[row].sum())}"
        )
