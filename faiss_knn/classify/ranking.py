"""Class scores as a metric of the first n classes must see them."""

from typing import Any

import torch
from torch import Tensor


def scores_for(metric: Any, shares: Tensor, labels: Tensor) -> Tensor:
    """Return what a torchmetric is to judge: ranks if it counts hits among the first `top_k` classes, else the shares.

    Args:
        metric: A torchmetric, or a wrapper around some.
        shares: (B, C) from `Votes`.
        labels: (B,) class ids, or (B, C).

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> shares, labels = torch.tensor([[0.0, 0.4, 0.6, 0.0]]), torch.tensor([0])
        >>> scores_for(MulticlassAccuracy(4), shares, labels)
        tensor([[0.0000, 0.4000, 0.6000, 0.0000]])
        >>> scores_for(MulticlassAccuracy(4, top_k=3), shares, labels)
        tensor([[0.0000, 0.8000, 1.0000, 0.4000]])
    """
    return rank_scores(shares, labels) if labels.ndim == 1 and has_top(metric) else shares


def rank_scores(shares: Tensor, labels: Tensor) -> Tensor:
    """Number the classes of each row by their share, the lowest id first among equals, as scores in [0, 1].

    A class without a vote is no hit, at whatever place: where that is the true class it comes last. (Among all C
    classes there is no place left behind the first n = C: such a metric is 1 whatever the scores.) `torch.topk` alone
    would fill its places from classes of share 0, and choose among equals as it likes.

    Args:
        shares: (B, C), 0 without a vote.
        labels: (B,) true class ids; what is outside [0, C) is no class.
    """
    width = shares.shape[1]
    order = shares.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(width, dtype=torch.float32, device=shares.device).expand_as(shares)
    ranks = 1 - torch.empty_like(shares, dtype=torch.float32).scatter_(1, order, places) / (width + 1)
    true = torch.arange(width, device=shares.device) == labels[:, None]
    return ranks.masked_fill(true & (shares == 0), 0.0)


def has_top(metric: Any) -> bool:
    """Tell whether a torchmetric, or one that it wraps, counts hits among the first `top_k` classes, not the first."""
    return any((getattr(part, "top_k", None) or 1) > 1 for part in metric.modules())
