"""What weight a neighbour gets, and the class scores that follow."""

import torch
from torch import Tensor

WEIGHTINGS = ("inverse", "softmax", "uniform")


def check_vote_options(temperature: float, weighting: str) -> None:
    """Raise ValueError if no vote can be taken with these options."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")


def neighbor_weights(distances: Tensor, *, temperature: float = 0.07, weighting: str = "inverse") -> Tensor:
    """Weigh each neighbour by its distance.

    - "inverse": 1 / (d + T).
    - "softmax": softmax over the row's neighbours of -d / T. With the cosine distance 1 - cos this is the weighting of
      DINOv2 and of Wu et al. 2018 (arXiv 1805.01978, section 3.4), exp(cos / T) up to a factor that the row shares.
    - "uniform": 1.

    Args:
        distances: (B, k), not negative; inf where a neighbour is missing.
        temperature: T above, in the unit of the distances.
        weighting: One of the three above.

    Returns:
        (B, k) float32 weights, 0 where the neighbour is missing.

    Raises:
        ValueError: For a temperature that is not positive or an unknown weighting.

    Example:
        >>> neighbor_weights(torch.tensor([[0.0, 0.3, float("inf")]]), temperature=0.1)
        tensor([[10.0000,  2.5000,  0.0000]])
    """
    check_vote_options(temperature, weighting)
    distances = distances.float()
    if weighting == "inverse":
        return 1 / (distances + temperature)
    found = distances.isfinite()
    if weighting == "uniform":
        return found.float()
    nearest = distances.amin(dim=1, keepdim=True) if distances.shape[1] else distances
    weights = torch.where(found, torch.exp((nearest - distances) / temperature), 0.0)
    return weights / weights.sum(dim=1, keepdim=True, dtype=torch.float64).clamp(min=1.0).float()


def vote(
    distances: Tensor, labels: Tensor, num_classes: int, *, temperature: float = 0.07, weighting: str = "inverse"
) -> Tensor:
    """Add up the neighbours' weights per class.

    The sums run in float64, where they are exact for weights of one magnitude, so that equal votes give bitwise equal
    scores whatever the order of the neighbours, and argmax then picks the lowest class id.

    Args:
        distances: (B, k) float, not negative; inf marks a missing neighbour, whose label is ignored.
        labels: (B, k) integer class ids of the neighbours, or (B, k, C) multi-hot.
        num_classes: C, the width of the scores.
        temperature: See `neighbor_weights`.
        weighting: See `neighbor_weights`.

    Returns:
        (B, C) float32, raw sums of weights, on the distances' device. Memory O(B·(k + C)) beside the arguments.

    Raises:
        ValueError: If the shapes do not fit, a distance is negative or NaN, or a label is outside [0, num_classes).

    Example:
        >>> vote(torch.tensor([[0.0, 0.1, 0.1]]), torch.tensor([[2, 0, 0]]), num_classes=3, temperature=0.1)
        tensor([[10.,  0., 10.]])
    """
    check_vote_options(temperature, weighting)
    _check_shapes(distances, labels, num_classes)
    _check_values(distances, labels, num_classes)
    return tally(distances, labels, num_classes, temperature=temperature, weighting=weighting)


def tally(
    distances: Tensor, labels: Tensor, num_classes: int, *, temperature: float = 0.07, weighting: str = "inverse"
) -> Tensor:
    """Vote like `vote`, with distances and labels known to be valid: nothing is looked at, so that no GPU waits."""
    found = distances.isfinite()
    weights = neighbor_weights(distances, temperature=temperature, weighting=weighting).double()
    scores = weights.new_zeros(len(weights), num_classes)
    if labels.ndim == 2:
        scores.scatter_add_(1, labels.masked_fill(~found, 0).long(), weights)
    else:
        for i in range(labels.shape[1]):  # k passes over (B, C), never a (B, k, C) product
            scores += weights[:, i, None] * labels[:, i]
    return scores.float()


def normalize_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Divide scores by their row's sum of neighbour weights, so that they lie in [0, 1].

    The division is per row, so the result does not depend on the batch. A row without neighbours stays 0.

    Args:
        scores: (B, C) from `vote`.
        weights: (B, k) from `neighbor_weights`, with the same options.

    Returns:
        (B, C) float32 in [0, 1]: the share of the neighbours' weight that each class has.

    Example:
        >>> normalize_scores(torch.tensor([[10.0, 30.0]]), torch.tensor([[10.0, 10.0, 20.0]]))
        tensor([[0.2500, 0.7500]])
    """
    total = weights.sum(dim=1, keepdim=True, dtype=torch.float64)
    shares = torch.where(total > 0, scores.double() / total, 0.0)
    return shares.clamp(max=1.0).float()  # a rounded 1.0000001 would be taken for a logit by torchmetrics


def _check_shapes(distances: Tensor, labels: Tensor, num_classes: int) -> None:
    if num_classes <= 0:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    if distances.ndim != 2 or not distances.is_floating_point():
        raise ValueError(
            f"`distances` must be a (B, k) float tensor, got shape {tuple(distances.shape)}, {distances.dtype}"
        )
    if labels.ndim not in (2, 3) or labels.shape[:2] != distances.shape:
        raise ValueError(
            f"`labels` must be (B, k) class ids or (B, k, C) multi-hot for distances of shape "
            f"{tuple(distances.shape)}, got shape {tuple(labels.shape)}"
        )
    if labels.ndim == 2 and (labels.is_floating_point() or labels.is_complex()):
        raise ValueError(f"`labels` must be integer class ids, got {labels.dtype}: cast them with .long()")
    if labels.ndim == 3 and labels.shape[2] != num_classes:
        raise ValueError(f"multi-hot `labels` must have num_classes={num_classes} columns, got {labels.shape[2]}")


def _check_values(distances: Tensor, labels: Tensor, num_classes: int) -> None:
    """Check the values with one device synchronisation, and look for the culprit only if there is one."""
    found = distances.isfinite()
    wrong_distance = ~(distances >= 0)
    wrong_label = found & ((labels < 0) | (labels >= num_classes)) if labels.ndim == 2 else torch.zeros_like(found)
    if not (wrong_distance | wrong_label).any():
        return
    if wrong_distance.any():
        raise ValueError(
            f"`distances` must not be negative or NaN, got {distances[wrong_distance][0].item()} "
            f"({int(wrong_distance.sum())} such values)"
        )
    raise ValueError(
        f"`labels` must be in [0, num_classes={num_classes}) where the distance is finite, got "
        f"{labels[wrong_label][0].item()}: give a missing neighbour the distance inf, or raise num_classes"
    )
