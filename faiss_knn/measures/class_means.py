"""A number of each query, averaged by class."""

import torch
from torch import Tensor


def class_means(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Average a number over the queries of each class.

    Args:
        values: (Q,) numbers or bool, such as whether a vote was right.
        classes: (Q,) int64 class ids in [0, C).
        num_classes: C.

    Returns:
        (C,) float64, NaN for a class that no query has.

    Example:
        >>> class_means(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 3)
        tensor([0.5000,    nan, 1.0000], dtype=torch.float64)
    """
    counts = torch.bincount(classes, minlength=num_classes)
    return torch.bincount(classes, values.double(), minlength=num_classes) / counts
