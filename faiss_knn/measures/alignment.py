"""Alignment: how near the features of one class, or of one sample's two views, lie to each other."""

import torch
from torch import Tensor

from faiss_knn.search.distance import directions
from faiss_knn.search.inputs import as_matrix, check_finite, shown


def alignment(first: Tensor, second: Tensor, *, alpha: float = 2.0) -> float:
    """Average the distances between pairs of features on the unit sphere, to the power alpha.

    Wang and Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", arXiv 2005.10242, section 4.1: E ‖f(x) − f(y)‖^α over positive pairs. Lower is better aligned.

    Args:
        first: (n, d) of any float dtype; divided by their lengths here.
        second: (n, d) their partners, such as the other view of each sample.
        alpha: The power; the paper's experiments take 2.

    Returns:
        In [0, 2^alpha].

    Raises:
        ValueError: If the shapes differ, or a row is zero or not finite.

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        2.0
    """
    a, b = on_sphere(first, "first"), on_sphere(second, "second")
    if a.shape != b.shape:
        raise ValueError(f"`second` must have the shape of `first`, {tuple(a.shape)}, got {tuple(b.shape)}")
    return float((a - b).norm(dim=1).pow(alpha).mean())


def label_alignment(features: Tensor, labels: Tensor) -> float:
    """Average the squared distances between all pairs of two rows of one label, each pair once, on the unit sphere.

    `alignment` (alpha = 2) where any two rows of a label are a positive pair. In O(n·d): the squared distances of a
    class add up to its rows times their squared distances from its mean.

    Args:
        features: (n, d) of any float dtype; divided by their lengths here.
        labels: (n,) integer class ids, -1 where unlabelled.

    Returns:
        In [0, 4]; NaN where no label has two rows.

    Raises:
        ValueError: If the labels do not fit, or a row is zero or not finite.

    Example:
        >>> label_alignment(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([4, 4, 4]))
        1.3333333333333333
    """
    rows = on_sphere(features, "features")
    if not isinstance(labels, Tensor) or labels.shape != rows.shape[:1] or labels.is_floating_point():
        raise ValueError(f"`labels` must be ({len(rows)},) integer class ids, one for each row, got {shown(labels)}")
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    if not len(rows):
        return float("nan")
    classes, numbers, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, numbers, rows)
    spread = (rows - (sums / counts[:, None])[numbers]).square().sum(1)  # (n,) from the mean of their class
    pairs = float((counts * (counts - 1)).sum()) / 2
    return float((counts[numbers] * spread).sum()) / pairs if pairs else float("nan")


def on_sphere(features: Tensor, argument: str) -> Tensor:
    """Return features (n, d) as float64 vectors of length 1.

    Raises:
        ValueError: If they are no matrix of finite numbers, or a row is zero.
    """
    rows = as_matrix(features, argument)
    if not len(rows):
        raise ValueError(f"`{argument}` must have rows, got none")
    check_finite(rows, argument)
    if zero := int((~rows.any(1)).sum()):
        raise ValueError(f"`{argument}` must have no zero rows, which lie in no direction, got {zero}: leave them out")
    return directions(rows)
