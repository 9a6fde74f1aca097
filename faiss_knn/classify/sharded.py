"""ShardedBank: labelled features that stay on the ranks that have them."""

from torch import Tensor

from faiss_knn.classify.vote import vote
from faiss_knn.search.index import KNNIndex, Neighbors
from faiss_knn.search.sharded import ShardedIndex, ShardedRows


class ShardedBank:
    """Classify the queries of all ranks by the features of all ranks, of which each rank holds its own.

    The counterpart of `FeatureBank` over ranks: `neighbors` is a collective, and for an exact index the scores are
    those of one bank over the rows of all ranks.

    Args:
        features: (n_r, d) of this rank, all labelled; may be empty, and unlike the others in shape then.
        labels: (n_r,) class ids, or (n_r, C) multi-hot.
        num_classes: Width of the scores.
        index: This rank's index, to be built.
        expected_k: See `KNNIndex.build`.

    Raises:
        ValueError: On every rank, if no rank has rows, they do not fit together, or a rank cannot build its index.

    Example:
        >>> import torch
        >>> bank = ShardedBank(torch.tensor([[0.0], [5.0]]), torch.tensor([0, 1]), num_classes=2, index=KNNIndex())
        >>> bank.score(*bank.neighbors(torch.tensor([[4.5]]), k=1), temperature=0.5)
        tensor([[0., 1.]])
    """

    def __init__(
        self, features: Tensor, labels: Tensor, *, num_classes: int, index: KNNIndex, expected_k: int | None = None
    ) -> None:
        self.num_classes = num_classes
        self._index = ShardedIndex(index).build(features, expected_k=expected_k)
        self._labels = ShardedRows(labels)

    def __len__(self) -> int:
        """The number of rows over all ranks."""
        return len(self._index)

    def neighbors(self, queries: Tensor | None, k: int) -> tuple[Neighbors, Tensor]:
        """Find the k nearest rows of all ranks for this rank's queries.

        Args:
            queries: (B_r, d) of this rank; None from a rank that only serves the others.
            k: How many, the same on every rank.

        Returns:
            The neighbours as from `ShardedIndex.search`, and their labels, (B_r, k) or (B_r, k, C), fetched from the
            ranks that have them.
        """
        found = self._index.search(queries, k)
        return found, self._labels.take(found.indices)

    def score(
        self, neighbors: Neighbors, labels: Tensor, *, temperature: float = 0.07, weighting: str = "inverse"
    ) -> Tensor:
        """Vote with what `neighbors` found, or its first columns: (B, C) float32 raw scores, on this rank alone."""
        return vote(neighbors.distances, labels, self.num_classes, temperature=temperature, weighting=weighting)
