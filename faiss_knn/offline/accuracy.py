"""From neighbours to hits: the vote judged for each query, and metrics over all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from faiss_knn.classify.ranking import scores_for
from faiss_knn.classify.vote import count_votes, number_rows
from faiss_knn.measures.average_precision import average_precisions
from faiss_knn.measures.class_means import class_means
from faiss_knn.offline.lazy_rows import spans
from faiss_knn.offline.metric_names import plain_defaults
from faiss_knn.offline.search import SearchResult
from faiss_knn.offline.task import EvalTask

BLOCK = 1 << 23  # numbers that a block of scores may hold


@dataclass(frozen=True)
class Hits:
    """Judgement of one vote.

    Attributes:
        top1: (Q,) bool, whether the class of highest score is the query's (multi-hot: one of the query's).
        top5: (Q,) bool, whether one of the five highest classes is; a class without weight never counts.
        per_class: (C,) float64: top-1 of the class's queries, or for multi-hot labels its average precision; NaN where
            no query has the class.
        values: Metrics of torchmetrics by name.
        prediction: (Q,) the class of highest score, of equal ones the lowest; -1 without any vote.
        share: (Q,) float32, the prediction's share of the neighbours' weight.
    """

    top1: Tensor
    top5: Tensor
    per_class: Tensor
    values: dict[str, float]
    prediction: Tensor
    share: Tensor


class Judge(Protocol):
    """Judges votes of the same neighbours under any options."""

    def judge(self, k: int, temperature: float, weighting: str, metrics: Mapping[str, Any]) -> Hits:
        """Judge one vote, and `metrics` (reset first) on the shares of weight."""
        ...


def make_judge(task: EvalTask, result: SearchResult) -> Judge:
    """Choose how to judge the votes of a task's neighbours: by class ids, shares of classes, or multi-hot labels."""
    device = result.indices.device
    bank_labels, truth = task.bank.labels.to(device), task.queries.labels.to(device)
    if task.bank.shares is not None:
        return SharesJudge(result.distances, result.indices, task.bank.shares.to(device), truth)
    if task.multi_hot:
        return MultiHotJudge(result.distances, result.indices, bank_labels, truth)
    return ClassJudge(result.distances, neighbor_labels(result.indices, bank_labels), truth, task.num_classes)


def neighbor_labels(indices: Tensor, bank_labels: Tensor) -> Tensor:
    """Look up the (Q, K) class ids of neighbours, -1 where missing."""
    return torch.where(indices < 0, -1, bank_labels[indices.clamp(min=0)])


class ClassJudge:
    """Judges the votes of neighbours with class ids, cut at any k.

    A query's neighbours hold at most k classes, so the vote runs over these, numbered in ascending order of the class
    id: sums and ties are those of a vote over all C classes, in O(Q·k) memory.

    Args:
        distances: (Q, K) ascending, inf where missing.
        labels: (Q, K) class ids, -1 where missing.
        truth: (Q,) class ids.
        num_classes: C.

    Example:
        >>> judge = ClassJudge(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[4, 2, 2]]), torch.tensor([2]), 5)
        >>> judge.judge(3, 0.07, "uniform", {}).top1, judge.judge(1, 0.07, "uniform", {}).top1
        (tensor([True]), tensor([False]))
    """

    def __init__(self, distances: Tensor, labels: Tensor, truth: Tensor, num_classes: int) -> None:
        self.distances = distances
        self.labels = labels
        self.truth = truth
        self.num_classes = num_classes
        self._numbered: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def judge(self, k: int, temperature: float, weighting: str, metrics: Mapping[str, Any]) -> Hits:
        """Judge one vote, and `metrics` (reset first) on the shares of weight."""
        local, own_local, reached = self._numbering(k)
        is_found = self.labels[:, :k] >= 0
        votes = count_votes(self.distances[:, :k], is_found, local, k, temperature=temperature, weighting=weighting)
        scores = votes.scores  # (Q, k)
        own = scores.gather(1, own_local[:, None])
        lower_id = torch.arange(k, device=own.device) < own_local[:, None]
        above = ((scores > own) | ((scores == own) & lower_id)).sum(1)
        counted = reached & (own[:, 0] > 0)
        top1 = counted & (above == 0)
        values = self._values(k, temperature, weighting, metrics)
        per_class = class_means(top1, self.truth, self.num_classes)
        return Hits(top1, counted & (above < 5), per_class, values, *self._predicted(scores, votes.shares))

    def _predicted(self, scores: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Find the class (Q,) that each query is taken for, and its share, from (Q, k) of the classes as numbered."""
        k = scores.shape[1]
        local = self._numbering(k)[0]
        classes = torch.zeros_like(local).scatter_(1, local, self.labels[:, :k])
        place = scores.argmax(1, keepdim=True)  # the first of equal ones; without any vote that of the label -1
        return classes.gather(1, place)[:, 0], shares.gather(1, place)[:, 0]

    def _numbering(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Number the neighbours' classes in [0, k), (Q, k); find the true class's (Q,), and whether it is there."""
        if k not in self._numbered:
            labels = self.labels[:, :k]
            local = number_rows(labels)
            true = labels == self.truth[:, None]
            self._numbered[k] = local, torch.where(true, local, 0).amax(1), true.any(1)
        return self._numbered[k]

    def _values(self, k: int, temperature: float, weighting: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        if not metrics:
            return {}
        for metric in metrics.values():
            metric.reset()
        for a, b in spans(len(self.labels), max(1, BLOCK // self.num_classes)):
            is_found = self.labels[a:b, :k] >= 0
            shares = class_shares(
                self.distances[a:b, :k], is_found, self.labels[a:b, :k], self.num_classes, temperature, weighting
            )
            update(metrics, shares, self.truth[a:b])
        return values_of(metrics)


class MultiHotJudge:
    """Judges the votes of neighbours with multi-hot labels; holds one (Q, C) of scores at a time.

    Args:
        distances: (Q, K) ascending, inf where missing.
        indices: (Q, K) bank rows, -1 where missing.
        bank_labels: (N, C) multi-hot.
        truth: (Q, C) multi-hot.
    """

    def __init__(self, distances: Tensor, indices: Tensor, bank_labels: Tensor, truth: Tensor) -> None:
        self.distances = distances
        self.indices = indices
        self.bank_labels = bank_labels
        self.truth = truth

    def judge(self, k: int, temperature: float, weighting: str, metrics: Mapping[str, Any]) -> Hits:
        """Judge one vote, and `metrics` (reset first) on the shares of weight."""
        scores = self._scores(k, temperature, weighting)
        for metric in metrics.values():
            metric.reset()
        update(metrics, scores, self.truth)
        best, order = scores.sort(dim=1, descending=True, stable=True)
        hits = self.truth.gather(1, order).bool() & (best > 0)
        precisions = average_precisions(scores, self.truth)
        values = values_of(metrics)
        return Hits(hits[:, 0], hits[:, :5].any(1), precisions, values, _first_class(order, best), best[:, 0])

    def _scores(self, k: int, temperature: float, weighting: str) -> Tensor:
        num_classes = self.bank_labels.shape[1]
        blocks = []
        for a, b in spans(len(self.indices), max(1, BLOCK // (num_classes * k))):
            indices = self.indices[a:b, :k]
            labels = self.bank_labels[indices.clamp(min=0)]
            blocks.append(
                class_shares(self.distances[a:b, :k], indices >= 0, labels, num_classes, temperature, weighting)
            )
        return torch.cat(blocks)


class SharesJudge:
    """Judges the votes of neighbours whose labels are shares of classes; holds a block of scores at a time.

    Args:
        distances: (Q, K) ascending, inf where missing.
        indices: (Q, K) bank rows, -1 where missing.
        bank_shares: (N, C) shares of the classes.
        truth: (Q,) class ids.
    """

    def __init__(self, distances: Tensor, indices: Tensor, bank_shares: Tensor, truth: Tensor) -> None:
        self.distances = distances
        self.indices = indices
        self.bank_shares = bank_shares
        self.truth = truth

    def judge(self, k: int, temperature: float, weighting: str, metrics: Mapping[str, Any]) -> Hits:
        """Judge one vote, and `metrics` (reset first) on the shares of weight."""
        num_classes = self.bank_shares.shape[1]
        for metric in metrics.values():
            metric.reset()
        first, fifth, predictions, shares = [], [], [], []
        for a, b in spans(len(self.indices), max(1, BLOCK // (num_classes * k))):
            indices, truth = self.indices[a:b, :k], self.truth[a:b]
            labels = self.bank_shares[indices.clamp(min=0)]
            scores = class_shares(self.distances[a:b, :k], indices >= 0, labels, num_classes, temperature, weighting)
            update(metrics, scores, truth)
            best, order = scores.sort(dim=1, descending=True, stable=True)
            hits = (order == truth[:, None]) & (best > 0)
            first.append(hits[:, 0])
            fifth.append(hits[:, :5].any(1))
            predictions.append(_first_class(order, best))
            shares.append(best[:, 0])
        top1 = torch.cat(first)
        per_class = class_means(top1, self.truth, num_classes)
        return Hits(top1, torch.cat(fifth), per_class, values_of(metrics), torch.cat(predictions), torch.cat(shares))


def _first_class(order: Tensor, scores: Tensor) -> Tensor:
    """Find the class (Q,) of highest score in (Q, C) classes and scores that descend, -1 where that score is 0."""
    return order[:, 0].masked_fill(scores[:, 0] <= 0, -1)


def update(metrics: Mapping[str, Any], shares: Tensor, truth: Tensor) -> None:
    """Show a block of queries to each metric."""
    if not metrics:
        return
    with plain_defaults():
        for metric in metrics.values():
            metric.update(scores_for(metric, shares, truth).cpu(), truth.cpu())


def values_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Compute the metrics over all that they were shown.

    Raises:
        ValueError: If one does not give a single number.
    """
    if not metrics:
        return {}
    with plain_defaults():
        return {name: scalar(name, metric.compute()) for name, metric in metrics.items()}


def scalar(name: str, value: Any) -> float:
    """Return a metric's value as a number.

    Raises:
        ValueError: If it is not a single one.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"`metrics`: {name} does not give a single number: choose one that does, or average=...")
    return float(value)


def class_shares(
    distances: Tensor, is_found: Tensor, labels: Tensor, num_classes: int, temperature: float, weighting: str
) -> Tensor:
    """Compute (Q, C) shares of the neighbours' weight; `labels` are (Q, k) or (Q, k, C), see `count_votes`."""
    return count_votes(distances, is_found, labels, num_classes, temperature=temperature, weighting=weighting).shares
