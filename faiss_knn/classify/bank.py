"""FeatureBank: features, their labels and the index over them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.classify.vote import check_vote_options, tally
from faiss_knn.search.index import KNNIndex, Neighbors

_MULTI_HOT_BLOCK = 1 << 24  # labels gathered at once for a multi-hot vote


class FeatureBank:
    """Labelled features that classify queries by their nearest neighbours.

    Rows labelled -1 are left out; the indices that `neighbors` returns still count the rows as they were given.

    Args:
        features: (N, d) tensor, ndarray or memmap of any float dtype.
        labels: (N,) integer class ids, -1 where unlabelled; or (N, C) multi-hot of 0 and 1, a row with -1 unlabelled.
        num_classes: Width of the scores; None: the largest label + 1, or C.
        index: A spec of `KNNIndex`, or a `KNNIndex` to build: one that was built before keeps its trained state.
        expected_k: See `KNNIndex.build`; None: its default.
        expected_queries: See `KNNIndex.build`.
        **index_options: Those of `KNNIndex`, where `index` is a spec.

    Raises:
        ValueError: If labels and features do not fit, no row is labelled, a label is out of range, or `KNNIndex`
            refuses the features.

    Example:
        >>> bank = FeatureBank(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> bank.predict(torch.tensor([[4.5]]), k=1, temperature=0.5)
        tensor([[0., 1.]])
        >>> bank.neighbors(torch.tensor([[4.5]]), k=2).indices
        tensor([[2, 1]])
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        labels: Tensor | np.ndarray,
        *,
        num_classes: int | None = None,
        index: str | KNNIndex = "flat",
        expected_k: int | None = None,
        expected_queries: int | None = None,
        **index_options: Any,
    ) -> None:
        self.labels = _checked_labels(labels, len(features))
        self.num_classes = _class_count(self.labels, num_classes)
        labelled = _labelled(self.labels)
        self._rows = None if labelled.all() else labelled.nonzero()[:, 0]
        if self._rows is not None:
            features = _take(features, self._rows)
        if not isinstance(index, str) and index_options:
            raise ValueError(f"options {sorted(index_options)} belong to the KNNIndex that `index` is: give them to it")
        self.index = KNNIndex(index, **index_options) if isinstance(index, str) else index
        hints = {} if expected_k is None else {"expected_k": expected_k}
        self.index.build(features, expected_queries=expected_queries, **hints)

    def __len__(self) -> int:
        return len(self.labels) if self._rows is None else len(self._rows)

    def neighbors(self, queries: Tensor | np.ndarray, k: int, *, checked: bool = False) -> Neighbors:
        """Find the k nearest labelled rows of each query.

        Args:
            queries: (B, d) of any float dtype.
            k: How many; at most the labelled rows are returned.
            checked: See `KNNIndex.search`.

        Returns:
            `Neighbors` as from `KNNIndex.search`; indices count the rows as they were given, -1 where missing.
        """
        found = self.index.search(queries, k, checked=checked)
        if self._rows is None:
            return found
        rows = self._rows.to(found.indices.device)
        return Neighbors(found.distances, torch.where(found.indices < 0, -1, rows[found.indices.clamp(min=0)]))

    def predict(
        self, queries: Tensor | np.ndarray, k: int = 5, temperature: float = 0.07, weighting: str = "inverse"
    ) -> Tensor:
        """Score each class by the vote of the k nearest rows.

        Args:
            queries: (B, d) of any float dtype.
            k: How many neighbours vote; the whole bank if it has fewer rows.
            temperature: See `neighbor_weights`.
            weighting: "inverse", "softmax" or "uniform".

        Returns:
            (B, C) float32, raw sums of weights. `.argmax(1)` is the predicted class, the lowest id among equals.

        Raises:
            ValueError: As `KNNIndex.search` and `vote`.
        """
        check_vote_options(temperature, weighting)
        return self.score(self.neighbors(queries, k), temperature=temperature, weighting=weighting)

    def score(self, neighbors: Neighbors, *, temperature: float = 0.07, weighting: str = "inverse") -> Tensor:
        """Vote with neighbours already found, those of `neighbors` or their first columns.

        Args:
            neighbors: (B, k) distances and indices, -1 where missing.
            temperature: See `neighbor_weights`.
            weighting: "inverse", "softmax" or "uniform".

        Returns:
            (B, C) float32 on the neighbours' device, raw sums of weights.
        """
        if self.labels.device != neighbors.indices.device:
            self.labels = self.labels.to(neighbors.indices.device)
        blocks = [
            tally(d, self.labels[i.clamp(min=0)], self.num_classes, temperature=temperature, weighting=weighting)
            for d, i in zip(*(torch.split(t, self._rows_per_vote(t.shape[1])) for t in neighbors), strict=True)
        ]
        return torch.cat(blocks)

    def _rows_per_vote(self, k: int) -> int:
        return max(1, _MULTI_HOT_BLOCK // (max(1, k) * (self.num_classes if self.labels.ndim == 2 else 1)))


def _checked_labels(labels: Tensor | np.ndarray, rows: int) -> Tensor:
    labels = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels)
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise ValueError(
            f"`labels` must be ({rows},) class ids or ({rows}, C) multi-hot, one row per feature row, "
            f"got shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"`labels` must be integers, got {labels.dtype}: cast them with .long()")
    if labels.numel() == 0:
        raise ValueError("`labels` is empty: a bank needs at least one labelled row")
    if (lowest := int(labels.min())) < -1:
        raise ValueError(f"`labels` must be class ids from 0, or -1 for unlabelled rows, got {lowest}")
    if labels.ndim == 2 and (highest := int(labels.max())) > 1:
        raise ValueError(f"multi-hot `labels` must be 0 and 1, got {highest}")
    if not _labelled(labels).any():
        raise ValueError("every row of `labels` is -1: a bank needs at least one labelled row")
    return labels


def _labelled(labels: Tensor) -> Tensor:
    return labels >= 0 if labels.ndim == 1 else (labels >= 0).all(dim=1)


def _class_count(labels: Tensor, num_classes: int | None) -> int:
    seen = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    if num_classes is None:
        return seen
    if num_classes <= 0:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    if seen > num_classes or (labels.ndim == 2 and seen != num_classes):
        what = f"label {seen - 1}" if labels.ndim == 1 else f"{seen} multi-hot columns"
        raise ValueError(f"num_classes={num_classes} does not fit `labels` with {what}: give num_classes={seen}")
    return num_classes


def _take(features: Tensor | np.ndarray, rows: Tensor) -> Tensor | np.ndarray:
    return features[rows.to(features.device)] if isinstance(features, Tensor) else features[rows.cpu().numpy()]
