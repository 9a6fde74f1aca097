"""Votes by another library's own float32 rule, with its quirks: to reproduce its number, not to judge features."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from faiss_knn.measures.class_means import class_means
from faiss_knn.offline.accuracy import BLOCK, Hits, neighbor_labels
from faiss_knn.offline.lazy_rows import spans
from faiss_knn.offline.options import EvalOptions
from faiss_knn.offline.search import SearchResult
from faiss_knn.offline.task import EvalTask
from faiss_knn.protocol import OwnRule, get_protocol


def make_quirks_judge(task: EvalTask, result: SearchResult, options: EvalOptions) -> "QuirksJudge":
    """Prepare the votes of a task's neighbours by the rule of the protocol that `options.with_quirks` names.

    Raises:
        ValueError: If the labels are not one class a row.
    """
    rule = get_protocol(str(options.with_quirks)).own_rule
    if rule is None or task.multi_hot or task.bank.shares is not None:
        raise ValueError(
            "with_quirks=True is for labels of one class a row: leave it out for multi-hot ones and shares"
        )
    device = result.indices.device
    labels = neighbor_labels(result.indices, task.bank.labels.to(device))
    truth = task.queries.labels.to(device)
    return QuirksJudge(result.distances, labels, truth, task.num_classes, options.distance_metric, max(options.k), rule)


class QuirksJudge:
    """Judges votes as a library's code would, given the same lists of neighbours.

    One-hot labels times float32 weights are summed over the neighbours. All classes are ranked, also those without a
    vote: no number first, then infinity, then by falling score, and equal ones by class id. What is infinite
    times the zeros of a one-hot label is no number, so that an overflow puts the classes without it first. The share of
    a prediction is its score where a softmax is cut, so that shares at a smaller k do not add up to 1; 0 for no number.

    Args:
        distances: (Q, K) ascending, inf where missing.
        labels: (Q, K) class ids, -1 where missing.
        truth: (Q,) class ids.
        num_classes: C.
        distance_metric: Of `distances`: "cosine", "dot" or, for weights "inverse", any.
        largest_k: The largest k that is asked for, over which a softmax runs.
        rule: The library's.

    Example:
        >>> near = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[4, 2, 2]]), torch.tensor([1])
        >>> judge = QuirksJudge(*near, 5, "cosine", 3, OwnRule("exp"))
        >>> judge.judge(3, 0.07, "softmax", {}).top5  # of class 1, without a vote
        tensor([True])
    """

    def __init__(
        self,
        distances: Tensor,
        labels: Tensor,
        truth: Tensor,
        num_classes: int,
        distance_metric: str,
        largest_k: int,
        rule: OwnRule,
    ) -> None:
        self.distances = distances[:, :largest_k].float()
        self.labels = labels
        self.truth = truth
        self.num_classes = num_classes
        self.distance_metric = distance_metric
        self.rule = rule

    def judge(self, k: int, temperature: float, weighting: str, metrics: object) -> Hits:
        """Judge one vote; the weighting is the rule's own, and `EvalOptions` refuses metrics."""
        del weighting, metrics
        counted = min(5, k) if self.rule.top5_within_k else 5
        first, fifth, predictions, shares = [], [], [], []
        for a, b in spans(len(self.labels), max(1, BLOCK // (self.num_classes * k))):
            scores = self._scores(a, b, k, temperature)
            best, order = scores.sort(dim=1, descending=True, stable=True)
            hits = order == self.truth[a:b, None]
            first.append(hits[:, 0])
            fifth.append(hits[:, :counted].any(1))
            predictions.append(order[:, 0])
            shares.append(best[:, 0] if self.rule.weights == "softmax" else (best[:, 0] / scores.sum(1)).nan_to_num(0))
        top1 = torch.cat(first)
        per_class = class_means(top1, self.truth, self.num_classes)
        return Hits(top1, torch.cat(fifth), per_class, {}, torch.cat(predictions), torch.cat(shares))

    def _scores(self, a: int, b: int, k: int, temperature: float) -> Tensor:
        """Sum (b - a, C) float32 votes of the k nearest."""
        labels = self.labels[a:b, :k]
        weights = self._weights(a, b, temperature)[:, :k].masked_fill(labels < 0, 0)
        return (one_hot(labels.clamp(min=0), self.num_classes) * weights[:, :, None]).sum(1)

    def _weights(self, a: int, b: int, temperature: float) -> Tensor:
        """Weigh all K neighbours of some queries, in float32, which may overflow."""
        distances = self.distances[a:b]
        if self.rule.weights == "inverse":
            return 1 / (distances + temperature)
        logits = (1 - distances if self.distance_metric == "cosine" else -distances) / temperature
        return logits.softmax(1) if self.rule.weights == "softmax" else logits.exp()
