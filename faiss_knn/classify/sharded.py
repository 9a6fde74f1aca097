"""ShardedBank: labelled features that stay on the ranks that have them."""

from typing import NamedTuple

from torch import Tensor

from faiss_knn.classify.labels import as_class_count, as_labels, check_labels, is_labelled, width_of
from faiss_knn.classify.regression import columns_of, is_finite, votes_of_means
from faiss_knn.classify.vote import Votes, check_vote_options, count_votes
from faiss_knn.distributed import all_or_none
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.sharded import ShardedIndex, ShardedRows


class LabelledNeighbors(NamedTuple):
    """Neighbours with their labels.

    Attributes:
        distances: (B, k) as in `Neighbors`.
        indices: (B, k) as in `Neighbors`.
        labels: (B, k) class ids, or (B, k, C); anything where the index is -1.
    """

    distances: Tensor
    indices: Tensor
    labels: Tensor

    def first(self, k: int) -> "LabelledNeighbors":
        """Return the first k columns."""
        return LabelledNeighbors(self.distances[:, :k], self.indices[:, :k], self.labels[:, :k])


class ShardedBank:
    """Classify the queries of all ranks by the features of all ranks, of which each rank holds its own.

    The counterpart of `FeatureBank` over ranks (see `VotingBank`): `find` is a collective, and for an exact index the
    scores are those of one bank over the rows of all ranks.

    Args:
        features: (n_r, d) of this rank, all labelled; may be empty, and unlike the others in shape then.
        labels: (n_r,) class ids, or (n_r, C) multi-hot; under task="regression" (n_r,) or (n_r, D) floats.
        num_classes: Width of the scores, or D.
        index: This rank's index, to be built unless `is_built`.
        expected_k: See `KNNIndex.build`.
        is_built: Whether the index holds the features already.
        task: As of `FeatureBank`.

    Raises:
        ValueError: On every rank, if no rank has rows, they do not fit together, or a rank cannot build its index.

    Example:
        >>> import torch
        >>> bank = ShardedBank(torch.tensor([[0.0], [5.0]]), torch.tensor([0, 1]), num_classes=2, index=KNNIndex())
        >>> bank.votes(bank.find(torch.tensor([[4.5]]), k=1), temperature=0.5).scores
        tensor([[0., 1.]])
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        index: KNNIndex,
        expected_k: int | None = None,
        is_built: bool = False,
        task: str = "classification",
    ) -> None:
        self._averages = task == "regression"
        with all_or_none():
            self.num_classes = as_class_count(num_classes)
            labels = _checked(features, labels, self.num_classes, self._averages)
            self._index = ShardedIndex(index).build(features, expected_k=expected_k, is_built=is_built)
            self._labels = ShardedRows(labels)

    def __len__(self) -> int:
        """Return the number of rows over all ranks."""
        return len(self._index)

    def find(self, queries: Tensor | None, k: int) -> LabelledNeighbors:
        """Find the k nearest rows of all ranks for this rank's queries; all ranks must call it together.

        Args:
            queries: (B_r, d) of this rank; None from a rank that only serves the others.
            k: How many, the same on every rank.

        Returns:
            The neighbours as from `ShardedIndex.search`, with their labels from the ranks that have them.

        Raises:
            Exception: On every rank, if it fails on one: its own error there, one that names it elsewhere.
        """
        with all_or_none():
            neighbors = self._index.search(queries, k)
            return LabelledNeighbors(*neighbors, self._labels.take(neighbors.indices))

    def labels_of(self, neighbors: LabelledNeighbors) -> Tensor:
        """Return the labels of what `find` found: see `VotingBank`."""
        missing = neighbors.indices < 0
        return neighbors.labels.masked_fill(missing.view(missing.shape + (1,) * (neighbors.labels.ndim - 2)), -1)

    def votes(self, neighbors: LabelledNeighbors, *, temperature: float = 0.07, weighting: str = "inverse") -> Votes:
        """Let what `find` found, or its first columns, vote on this rank alone: see `FeatureBank.votes`."""
        check_vote_options(temperature, weighting, self._index.index.distance_metric)
        count = votes_of_means if self._averages else count_votes
        return count(
            neighbors.distances,
            neighbors.indices >= 0,
            neighbors.labels,
            self.num_classes,
            temperature=temperature,
            weighting=weighting,
        )


def _checked(features: Tensor, labels: Tensor, num_classes: int, averages: bool) -> Tensor:
    """Check this rank's labels; without that a wrong one would be found in the middle of a search, or never."""
    if len(labels) != len(features):
        raise ValueError(
            f"`labels` must have one row per feature row, {len(features)}, got shape {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        return labels  # of whatever shape and dtype: other ranks have rows
    if averages:
        if columns_of(labels) != num_classes or not is_finite(labels).all():
            raise ValueError(f"`labels` must be {num_classes} finite numbers a row, got shape {tuple(labels.shape)}")
        return labels
    labels = as_labels(labels, "`labels`")
    check_labels(labels, "`labels`")
    if not is_labelled(labels).all():
        raise ValueError("`labels` must have no unlabelled rows here, got -1: leave those rows out")
    if (seen := width_of(labels)) > num_classes or (labels.ndim == 2 and seen != num_classes):
        raise ValueError(f"num_classes={num_classes} does not fit `labels` of {seen} classes: give num_classes={seen}")
    return labels
