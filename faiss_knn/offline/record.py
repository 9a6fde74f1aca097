"""A record: what one index's neighbours are worth under one vote, field by field."""

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn import __version__
from faiss_knn.measures.average_precision import micro_average_precision
from faiss_knn.measures.recall import recalls
from faiss_knn.measures.retrieval import retrieval_by_class
from faiss_knn.measures.significance import (
    cluster_bootstrap_interval,
    cluster_standard_error,
    wilson_interval,
)
from faiss_knn.offline.accuracy import Hits, neighbor_labels
from faiss_knn.offline.lazy_rows import spans
from faiss_knn.offline.options import EvalOptions, VoteOptions
from faiss_knn.offline.report.results import Record
from faiss_knn.offline.search import SearchResult, Variant
from faiss_knn.offline.task import EvalTask

_RETRIEVAL = ("precision", "hit_rate", "recall", "map", "ndcg", "mrr", "r_precision", "map@r")
_QUERY_BLOCK = 1 << 16  # queries whose retrieval metrics are computed at once


def setup_fields(task: EvalTask, options: EvalOptions, variant: Variant, vote: VoteOptions) -> Record:
    """Say what a record is of, which is known before the search: index, vote, options, data.

    Args:
        task: The first of the draws.
        options: As checked.
        variant: Which index.
        vote: How its neighbours vote.
    """
    stored = options.storage_dtype
    return {
        "spec": variant.spec,
        "settings": variant.settings,
        "k": vote.k,
        "temperature": vote.temperature,
        "weighting": vote.weighting,
        "distance_metric": options.distance_metric,
        "protocol": options.protocol,
        "center": options.center,
        "pca": options.pca,
        "whiten": options.whiten,
        "normalize": options.normalize,
        "leave_one_out": task.leave_one_out,
        "n_groups": task.n_groups,
        "exclude_same_group": task.exclude_same_group,
        "per_class": options.per_class,
        "tries": options.tries,
        "seed": options.seed,
        "options": {
            "nprobe": options.nprobe,
            "target_recall": options.target_recall,
            "latency": options.latency,
            "storage_dtype": None if stored is None else str(stored).removeprefix("torch."),
            "depth": options.length,
            "metrics": list(dict.fromkeys(options.metrics)),
            **({} if options.with_quirks is None else {"with_quirks": options.with_quirks}),
        },
        "data": task.fingerprint,
        "num_classes": task.num_classes,
        "n_bank": len(task.bank.rows),
        "n_queries": len(task.queries.rows),
        "dim": task.dim,
        "skipped_bank": task.bank.skipped,
        "skipped_queries": task.queries.skipped,
    }


def top1_by_query(hits: Sequence[Hits]) -> Tensor:
    """Compute the share (Q,) of the draws in which each query was right, float64."""
    return torch.stack([one.top1 for one in hits]).double().mean(0)


def accuracy_fields(
    hits: Sequence[Hits], exact_top1: Tensor, class_scores: Tensor, multi_hot: bool, groups: Tensor | None
) -> dict[str, Any]:
    """Say how often a vote was right, and how much less often than with exact neighbours.

    Args:
        hits: Of each draw.
        exact_top1: (Q,) `top1_by_query` of the exact neighbours under the same vote.
        class_scores: (C,) means over the draws of `Hits.per_class`.
        multi_hot: Whether queries may have several classes.
        groups: (Q,) which group each query is of: what is said to be sure is so over groups; None: over queries.
    """
    by_query = top1_by_query(hits)
    by_draw = torch.stack([one.top1 for one in hits]).double().mean(1)
    top1, loss = by_query.mean().item(), exact_top1 - by_query
    class_mean = class_scores.nanmean().item()
    low, high = _interval(by_query, groups)
    return {
        "top1": top1,
        "top1_se": math.sqrt(top1 * (1 - top1) / len(by_query)) if groups is None else _grouped_error(by_query, groups),
        "top1_low": low,
        "top1_high": high,
        "top1_std": by_draw.std().item() if len(hits) > 1 else None,
        "top5": torch.stack([one.top5 for one in hits]).double().mean().item(),
        "macro_top1": None if multi_hot else class_mean,
        "map": class_mean if multi_hot else None,
        "accuracy_loss": loss.mean().item(),
        "accuracy_loss_se": (
            loss.std(correction=0).item() / math.sqrt(len(loss)) if groups is None else _grouped_error(loss, groups)
        ),
        **mean_values([one.values for one in hits]),
    }


def _interval(by_query: Tensor, groups: Tensor | None) -> tuple[float, float]:
    """Compute the 95 % interval of a share of right queries; of several draws, by the mean over them."""
    if groups is None:
        return wilson_interval(min(by_query.sum().item(), len(by_query)), len(by_query))
    return cluster_bootstrap_interval(by_query.cpu().numpy(), groups.numpy())


def _grouped_error(by_query: Tensor, groups: Tensor) -> float:
    return cluster_standard_error(by_query.cpu().numpy(), groups.numpy())


def recall_fields(
    draws: Sequence[EvalTask],
    results: Sequence[SearchResult],
    exact: Sequence[SearchResult],
    ks: Sequence[int],
    *,
    by_id: bool,
) -> dict[int, dict[str, Any]]:
    """Say by k how many of the exact neighbours an index found, on average over the draws.

    Distances between compressed rows are others, so that a row of the same distance cannot be told: `by_id` alone.
    """
    reachable = [task.reachable for task in draws]

    def at(k: int) -> dict[str, Any]:
        shares = []
        for most, result, exact_result in zip(reachable, results, exact, strict=True):
            near, all_near = result.first(min(k, most)), exact_result.first(min(k, most))
            by_distance, same = recalls(near.distances, near.indices, all_near.distances, all_near.indices)
            shares.append({"recall": same if by_id else by_distance, "recall_ids": same})
        return mean_values(shares)

    return {k: at(k) for k in ks}


def retrieval_of(
    draws: Sequence[EvalTask], results: Sequence[SearchResult], ks: Sequence[int]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compute `retrieval_metrics`, of all queries and of each class, on average over the draws.

    Returns:
        Means over the queries, and over the classes as `macro_…`, with `micro_ap@k` of all pairs in lists of k; and the
        (C,) means of the classes, NaN where no query has R > 0. Nothing for multi-hot labels. `r_precision` and `map@r`
        are there where the lists reach every R.
    """
    found = [_retrieval(draw, result, ks) for draw, result in zip(draws, results, strict=True)]
    by_class = {name: torch.stack([one[name] for _, one in found]).mean(0) for name in found[0][1]}
    return mean_values([means for means, _ in found]), by_class


def _retrieval(task: EvalTask, result: SearchResult, ks: Sequence[int]) -> tuple[dict[str, float], dict[str, Tensor]]:
    if task.multi_hot:
        return {}, {}
    device = result.indices.device
    relevant, truth = task.relevant_counts.to(device), task.queries.labels.to(device)
    labels = neighbor_labels(result.indices, task.bank.labels.to(device))
    sums: dict[str, Tensor] = {}
    for a, b in spans(len(labels), _QUERY_BLOCK):
        counts = torch.bincount(truth[a:b][relevant[a:b] > 0], minlength=task.num_classes)
        by_class = retrieval_by_class(labels[a:b], truth[a:b], relevant[a:b], ks, task.num_classes)
        for name, value in by_class.items():
            sums[name] = sums.get(name, 0) + value.nan_to_num() * counts
    judged = torch.bincount(truth[relevant > 0], minlength=task.num_classes)
    if not int(judged.sum()):
        return {}, {}
    if int(relevant.max()) > labels.shape[1]:
        sums = {name: value for name, value in sums.items() if name not in ("r_precision", "map@r")}
    classes = {name: value / judged for name, value in sums.items()}
    means = {name: float(value.sum() / judged.sum()) for name, value in sums.items()}
    means |= {f"macro_{name}": float(value.nanmean()) for name, value in classes.items()}
    return means | _micro_precisions(result, labels == truth[:, None], int(relevant.sum()), ks), classes


def _micro_precisions(result: SearchResult, same: Tensor, total: int, ks: Sequence[int]) -> dict[str, float]:
    """Compute the average precision of all pairs of a query and one of its k neighbours, nearest pairs first."""
    found, scores = (result.indices >= 0).cpu().numpy(), -result.distances.cpu().numpy()
    matches = same.cpu().numpy()
    return {
        f"micro_ap@{k}": micro_average_precision(scores[:, :k][found[:, :k]], matches[:, :k][found[:, :k]], total)
        for k in ks
    }


def retrieval_at(means: Mapping[str, float], k: int) -> dict[str, Any]:
    """Choose the retrieval metrics that a record of this k holds, None for those that are not there."""
    wanted = [*_RETRIEVAL, *(f"macro_{name}" for name in _RETRIEVAL), "micro_ap"]
    values = {name: means.get(f"{name}@{k}", means.get(name)) for name in wanted}
    return {f"retrieval_{name.replace('@', '_')}": value for name, value in values.items()}


def retrieval_classes_at(by_class: Mapping[str, Tensor], k: int) -> dict[str, list[float]]:
    """Choose the same of each class, those that are there, under the names of the records' fields."""
    values = {name: by_class.get(f"{name}@{k}", by_class.get(name)) for name in _RETRIEVAL}
    return {f"retrieval_{x.replace('@', '_')}": value.tolist() for x, value in values.items() if value is not None}


def surroundings() -> dict[str, Any]:
    """Say with which versions a record was made, and when."""
    return _versions() | {"created": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def _versions() -> dict[str, Any]:
    names = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss")
    ours = {"python": platform.python_version(), "faiss-knn": __version__}
    return {"versions": ours | {name: v for name in names if (v := _version(name))}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def mean_values(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average each number over the records; take what is no number from the first.

    Example:
        >>> mean_values([{"bytes": 10, "device": "cpu"}, {"bytes": 20, "device": "cpu"}])
        {'bytes': 15, 'device': 'cpu'}
    """
    if len(records) == 1:
        return dict(records[0])
    return {name: _mean([record[name] for record in records]) for name in records[0]}


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], (bool, str, dict)) or any(value is None for value in values):
        return values[0]
    mean = float(np.mean(values))
    return round(mean) if all(isinstance(value, int) for value in values) else mean
