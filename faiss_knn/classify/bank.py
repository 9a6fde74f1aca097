"""FeatureBank: features, their labels and the index over them."""

from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.classify.labels import (
    Names,
    as_class_count,
    as_labels_or_names,
    check_labels,
    is_labelled,
    number_classes,
    number_names,
    width_of,
)
from faiss_knn.classify.regression import TASKS, check_targets, columns_of, is_finite, read_targets, votes_of_means
from faiss_knn.classify.vote import Votes, check_vote_options, count_votes
from faiss_knn.search.index import KNNIndex, Neighbors
from faiss_knn.search.inputs import as_choice, as_matrix, as_switch, named_as_index

_MULTI_HOT_BLOCK = 1 << 24  # labels gathered at once for a multi-hot vote
_SCORES_BLOCK = 1 << 24  # scores made at once
_WIDE = 1 << 20  # columns from which on scores by class id need a class in every 16th of them


class VotingBank(Protocol):
    """What a validation needs of a bank, be it whole on every rank (`FeatureBank`) or in shards (`ShardedBank`)."""

    num_classes: int

    def find(self, queries: Any, k: int) -> Any:
        """Find the k nearest rows of checked queries (B, d); what is found has its first n columns by `first(n)`."""

    def votes(self, neighbors: Any, *, temperature: float, weighting: str) -> Votes:
        """Let what was found vote."""

    def labels_of(self, neighbors: Any) -> Tensor:
        """Return the labels of what was found, (B, k), or (B, k, C); of missing rows -1."""


class FeatureBank:
    """Labelled features that classify queries by their nearest neighbours.

    Rows labelled -1 are left out; the indices that `neighbors` returns still count the rows as they were given.

    Args:
        features: (N, d) tensor, ndarray, memmap or pandas DataFrame of any float dtype.
        labels: One of: (N,) or (N, 1) integer class ids, -1 where unlabelled, of any integer dtype, also as a list or
            pandas Series or Categorical; (N,) names; (N, C) multi-hot of 0 and 1, a row with -1 unlabelled; (N, C)
            float shares of the classes, each row adding up to 1.
        num_classes: Width of the scores; None: the largest label + 1, or C.
        index: A spec of `KNNIndex`, or a `KNNIndex` to build: one that was built before keeps its trained state.
        expected_k: See `KNNIndex.build`; None: its default.
        expected_queries: See `KNNIndex.build`.
        ignore_index: A label that means "unlabelled", beside -1.
        renumber: Whether the scores have one column per class that occurs, in the order of `classes`, instead of one
            per class id. Names are always renumbered; needed where ids are few and large.
        task: "classification", or "regression": labels are numbers then, (N,) or (N, D) of a float dtype, NaN where a
            row has none; neighbours do not vote for classes, their labels are averaged by their weights.
        **index_options: Those of `KNNIndex`, where `index` is a spec.

    Attributes:
        classes: (C,) what each column of the scores stands for: class ids, or names in sorted order; under
            task="regression" the columns' numbers.
        num_classes: C, or D.

    Raises:
        ValueError: If labels and features do not fit, no row is labelled, a label is out of range, or `KNNIndex`
            refuses the features.

    Example:
        >>> bank = FeatureBank(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> bank.predict(torch.tensor([[4.5]]), k=1, temperature=0.5)
        tensor([[0., 1.]])
        >>> bank.neighbors(torch.tensor([[4.5]]), k=2).indices
        tensor([[2, 1]])
        >>> named = FeatureBank(torch.tensor([[0.0], [1.0], [5.0]]), ["cat", "cat", "dog"])
        >>> str(named.classes[named.predict(torch.tensor([[4.5]]), k=1).argmax(1)[0]])
        'dog'
        >>> heights = FeatureBank(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([1.5, 2.5, 9.0]), task="regression")
        >>> heights.predict(torch.tensor([[0.5]]), k=2)
        tensor([2.])
    """

    def __init__(
        self,
        features: Any,
        labels: Any,
        *,
        num_classes: int | None = None,
        index: str | KNNIndex = "flat",
        expected_k: int | None = None,
        expected_queries: int | None = None,
        ignore_index: int | None = None,
        renumber: bool = False,
        task: str = "classification",
        **index_options: Any,
    ) -> None:
        self.index = _as_index(index, index_options)
        renumber = as_switch(renumber, "`renumber`")
        matrix = as_matrix(features, "features")
        features = features if isinstance(features, (Tensor, np.ndarray)) else matrix  # a memmap stays one
        self._averages = as_choice(task, TASKS, "`task`") == "regression"
        if self._averages:
            self.labels = read_targets(labels, "`labels`", ignore_index=ignore_index)
            self.classes = _columns(self.labels, len(matrix), num_classes, renumber)
        else:
            read = as_labels_or_names(labels, "`labels`", ignore_index=ignore_index)
            self.classes, self.labels = _numbered(read, len(matrix), num_classes, renumber)
        self.num_classes = len(self.classes)
        labelled = is_finite(self.labels) if self._averages else is_labelled(self.labels)
        self._rows = None if labelled.all() else labelled.nonzero()[:, 0]
        if self._rows is not None:
            features = _take(features, self._rows)
        hints = {} if expected_k is None else {"expected_k": expected_k}
        with named_as_index() if isinstance(index, str) else nullcontext():
            self.index.build(features, expected_queries=expected_queries, **hints)

    def __len__(self) -> int:
        return len(self.labels) if self._rows is None else len(self._rows)

    def neighbors(self, queries: Tensor | np.ndarray, k: int) -> Neighbors:
        """Find the k nearest labelled rows of each query.

        Args:
            queries: (B, d) of any float dtype.
            k: How many; at most the labelled rows are returned.

        Returns:
            `Neighbors` as from `KNNIndex.search`; indices count the rows as they were given, -1 where missing.
        """
        return self._numbered_as_given(self.index.search(queries, k))

    def find(self, queries: Tensor, k: int) -> Neighbors:
        """Find neighbours as `neighbors` does, of queries known to be finite and, under cosine, not zero.

        Nothing is looked at, so that no GPU waits. See `VotingBank`.
        """
        return self._numbered_as_given(self.index._search_checked(queries, k))

    def _numbered_as_given(self, neighbors: Neighbors) -> Neighbors:
        if self._rows is None:
            return neighbors
        rows = self._rows.to(neighbors.indices.device)
        return Neighbors(
            neighbors.distances, torch.where(neighbors.indices < 0, -1, rows[neighbors.indices.clamp(min=0)])
        )

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
            (B, C) float32, raw sums of weights. `.argmax(1)` is the predicted class, the lowest id among equals. Under
            task="regression" (B,) or (B, D) means, in the labels' dtype.

        Raises:
            ValueError: As `KNNIndex.search` and `vote`.
        """
        check_vote_options(temperature, weighting, self.index.distance_metric)
        return self.score(self.neighbors(queries, k), temperature=temperature, weighting=weighting)

    def score(self, neighbors: Neighbors, *, temperature: float = 0.07, weighting: str = "inverse") -> Tensor:
        """Vote with neighbours already found, those of `neighbors` or their first columns.

        Args:
            neighbors: (B, k) distances and indices, -1 where missing.
            temperature: See `neighbor_weights`.
            weighting: "inverse", "softmax" or "uniform".

        Returns:
            (B, C) float32 on the neighbours' device, raw sums of weights; or means, as from `predict`.
        """
        scores = self.votes(neighbors, temperature=temperature, weighting=weighting).scores
        return scores[:, 0] if self._averages and self.labels.ndim == 1 else scores

    def labels_of(self, neighbors: Neighbors) -> Tensor:
        """Return the labels of neighbours: see `VotingBank`."""
        labels = self.labels.to(neighbors.indices.device)[neighbors.indices.clamp(min=0)]
        return labels.masked_fill((neighbors.indices < 0).view(neighbors.indices.shape + (1,) * (labels.ndim - 2)), -1)

    def votes(self, neighbors: Neighbors, *, temperature: float = 0.07, weighting: str = "inverse") -> Votes:
        """Vote as `score` does, and give the shares of the votes too.

        A neighbour is missing if its index is -1, whatever its distance.
        """
        check_vote_options(temperature, weighting, self.index.distance_metric)
        if not isinstance(neighbors, Neighbors):
            raise ValueError(  # noqa: TRY004
                f"`neighbors` must be Neighbors, as `neighbors()` finds them, got {type(neighbors).__name__}"
            )
        if self.labels.device != neighbors.indices.device:
            self.labels = self.labels.to(neighbors.indices.device)
        count = votes_of_means if self._averages else count_votes
        blocks = []
        for distances, indices in zip(
            *(torch.split(part, self._rows_per_vote(part.shape[1])) for part in neighbors), strict=True
        ):
            labels, is_found = self.labels[indices.clamp(min=0)], indices >= 0
            blocks.append(
                count(distances, is_found, labels, self.num_classes, temperature=temperature, weighting=weighting)
            )
        return Votes(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))

    def _rows_per_vote(self, k: int) -> int:
        if self.labels.ndim == 2:
            return max(1, _MULTI_HOT_BLOCK // (max(1, k) * self.num_classes))
        return max(1, _SCORES_BLOCK // max(k, self.num_classes))


def _as_index(index: Any, options: dict[str, Any]) -> KNNIndex:
    """Make the index of a spec, or take one that was made."""
    if isinstance(index, str):
        with named_as_index():
            return KNNIndex(index, **options)
    if not isinstance(index, KNNIndex):
        raise ValueError(f"`index` must be a spec or a KNNIndex, got {type(index).__name__}")  # noqa: TRY004
    if options:
        raise ValueError(f"options {sorted(options)} belong to the KNNIndex that `index` is: give them to it")
    return index


def _columns(targets: Tensor, rows: int, num_classes: int | None, renumber: bool) -> npt.NDArray[Any]:
    """Return the numbers of the columns that targets have."""
    if num_classes not in (None, columns_of(targets)) or renumber:
        raise ValueError("`num_classes` and `renumber` are of classes, task='regression' has none: leave them out")
    if len(targets) != rows:
        raise ValueError(
            f"`labels` must be ({rows},) or ({rows}, D) numbers, one row per feature row, got shape "
            f"{tuple(targets.shape)}"
        )
    check_targets(targets, "`labels`")
    return np.arange(columns_of(targets))


def _numbered(
    labels: Tensor | Names, rows: int, num_classes: int | None, renumber: bool
) -> tuple[npt.NDArray[Any], Tensor]:
    """Say what each column of the scores stands for, and give the labels as numbers of columns."""
    if len(labels) != rows:
        raise ValueError(
            f"`labels` must be ({rows},) class ids or ({rows}, C) multi-hot, one row per feature row, "
            f"got shape {tuple(labels.shape)}"
        )
    if isinstance(labels, Tensor):
        check_labels(labels, "`labels`")
        if not renumber:
            return _by_id(labels, num_classes)
    classes, numbers = _by_number(labels) if isinstance(labels, Tensor) else number_names(labels)
    if num_classes is not None and as_class_count(num_classes) != len(classes):
        raise ValueError(
            f"num_classes={num_classes} does not fit `labels` of {len(classes)} classes, of which each has a column: "
            "leave num_classes out"
        )
    return classes, numbers


def _by_number(labels: Tensor) -> tuple[npt.NDArray[Any], Tensor]:
    if labels.ndim == 2:
        raise ValueError("`renumber` is for (N,) class ids, got `labels` of (N, C): their columns are the classes")
    classes, (numbers,) = number_classes(labels)
    return classes.cpu().numpy(), numbers


def _by_id(labels: Tensor, num_classes: int | None) -> tuple[npt.NDArray[Any], Tensor]:
    seen = width_of(labels)
    if num_classes is None:
        if labels.ndim == 1 and seen > _WIDE and seen > 16 * (distinct := len(torch.unique(labels))):
            raise ValueError(
                f"`labels` of {distinct} class ids up to {seen - 1} would make scores of {seen} columns: give "
                "renumber=True for one column per class that occurs, named by the bank's `classes`"
            )
        return np.arange(seen), labels
    count = as_class_count(num_classes)
    if seen > count or (labels.ndim == 2 and seen != count):
        what = f"label {seen - 1}" if labels.ndim == 1 else f"{seen} multi-hot columns"
        raise ValueError(f"num_classes={count} does not fit `labels` with {what}: give num_classes={seen}")
    return np.arange(count), labels


def _take(features: Tensor | np.ndarray, rows: Tensor) -> Tensor | np.ndarray:
    return features[rows.to(features.device)] if isinstance(features, Tensor) else features[rows.cpu().numpy()]
