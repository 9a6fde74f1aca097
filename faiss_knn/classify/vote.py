"""What weight a neighbour gets, and the class scores that follow."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from faiss_knn.classify.labels import as_class_count, as_dense
from faiss_knn.names import WEIGHTINGS
from faiss_knn.search.inputs import as_choice, as_number

_FLOAT32 = torch.finfo(torch.float32)
_LEAST_LOG = -1e300  # a neighbour that was found has a weight, however small
_MANY = 16  # classes for each neighbour, from which on it is faster to number them anew in each row
_BELOW_ALL = -1e301  # less than any weight's logarithm, and finite: its difference from -inf is -inf
_SMALL = -100 * math.log(2)  # logarithm of the scores below which float32 runs short of exponents


def check_vote_options(temperature: float, weighting: str, distance_metric: str | None = None) -> None:
    """Raise ValueError if no vote can be taken with these options, by distances of that name if it is known."""
    number = as_number(temperature, "temperature")
    if not number > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not _FLOAT32.tiny <= number <= _FLOAT32.max:
        raise ValueError(
            f"temperature must be between {_FLOAT32.tiny:.3g} and {_FLOAT32.max:.3g}, the numbers that float32 holds, "
            f"got {temperature}: take one in the unit of the distances"
        )
    as_choice(weighting, WEIGHTINGS, "`weighting`")
    if (weighting, distance_metric) == ("inverse", "dot"):
        raise ValueError(
            "weighting='inverse' does not go with distance_metric='dot', whose distances may be negative: take "
            "'softmax' or 'uniform'"
        )


def log_weights(distances: Tensor, is_found: Tensor, *, temperature: float, weighting: str) -> Tensor:
    """Weigh each neighbour, in logarithms, in which nothing underflows.

    Args:
        distances: (B, k), for "inverse" not negative; what is too large for float32 counts as its largest number.
        is_found: (B, k) bool, False where a neighbour is missing.
        temperature: See `neighbor_weights`.
        weighting: See `neighbor_weights`.

    Returns:
        (B, k) float64 logarithms of the weights, -inf where the neighbour is missing. Those of "softmax" are not yet
        divided by the row's sum.
    """
    distances, temperature = distances.double().clamp(-_FLOAT32.max, _FLOAT32.max), float(temperature)
    if weighting == "inverse":
        logs = -torch.log(distances + temperature)
    elif weighting == "softmax":
        logs = (-distances / temperature).clamp(min=_LEAST_LOG)
    else:
        logs = torch.zeros_like(distances)
    return logs.masked_fill(~is_found, -torch.inf)


def neighbor_weights(distances: Tensor, *, temperature: float = 0.07, weighting: str = "inverse") -> Tensor:
    """Weigh each neighbour by its distance.

    - "inverse": 1 / (d + T).
    - "softmax": softmax over the row's neighbours of -d / T. With the cosine distance 1 - cos this is the weighting of
      DINOv2 and of Wu et al. 2018 (arXiv 1805.01978, section 3.4), exp(cos / T) up to a factor that the row shares;
      with the distance "dot" it is exp(q·x / T) likewise.
    - "uniform": 1.

    Args:
        distances: (B, k), for "inverse" not negative; inf where a neighbour is missing.
        temperature: T above, in the unit of the distances.
        weighting: One of the three above.

    Returns:
        (B, k) float32 weights, 0 where the neighbour is missing.

    Raises:
        ValueError: For a temperature that is not positive or that float32 does not hold, or an unknown weighting.

    Example:
        >>> neighbor_weights(torch.tensor([[0.0, 0.3, float("inf")]]), temperature=0.1)
        tensor([[10.0000,  2.5000,  0.0000]])
    """
    check_vote_options(temperature, weighting)
    is_found = distances.isfinite()
    logs = log_weights(distances, is_found, temperature=temperature, weighting=weighting)
    return torch.softmax(logs, dim=1).where(is_found, 0.0).float() if weighting == "softmax" else _weights(logs)


def _weights(logs: Tensor) -> Tensor:
    """Compute float32 weights, which are 0 for missing neighbours alone."""
    return logs.exp().clamp(_FLOAT32.tiny, _FLOAT32.max).where(logs > -torch.inf, 0.0).float()


class Votes(NamedTuple):
    """What the neighbours say about each class.

    A class has a positive score and share if and only if a neighbour voted for it. A share below 2^-100 keeps its place
    among the others but not its size, for which float32 has no exponent.

    Attributes:
        scores: (B, C) float32, raw sums of `neighbor_weights`.
        shares: (B, C) float32 in [0, 1], each class's part of the neighbours' weight, divided in float64 and rounded
            once; 0 without neighbours.
    """

    scores: Tensor
    shares: Tensor


def vote(
    distances: Tensor, labels: Tensor, num_classes: int, *, temperature: float = 0.07, weighting: str = "inverse"
) -> Tensor:
    """Add up the neighbours' weights per class.

    The sums run in float64, where they are exact for weights of one magnitude, so that equal votes give bitwise equal
    scores whatever the order of the neighbours, and argmax then picks the lowest class id. A class that a neighbour
    voted for scores above one without a vote, however far that neighbour is: see `Votes`.

    Args:
        distances: (B, k) float, for "inverse" not negative; inf marks a missing neighbour, whose label is ignored.
        labels: (B, k) integer class ids of the neighbours, or (B, k, C) multi-hot of 0 and 1, or (B, k, C) float shares
            in [0, 1], by which a neighbour's weight is divided among classes.
        num_classes: C, the width of the scores.
        temperature: See `neighbor_weights`.
        weighting: See `neighbor_weights`.

    Returns:
        (B, C) float32, raw sums of weights, on the distances' device. Memory O(B·(k + C)) beside the arguments.

    Raises:
        ValueError: If the shapes do not fit, a distance is NaN, -inf or, for "inverse", negative, or a label is outside
            [0, num_classes).

    Example:
        >>> vote(torch.tensor([[0.0, 0.1, 0.1]]), torch.tensor([[2, 0, 0]]), num_classes=3, temperature=0.1)
        tensor([[10.,  0., 10.]])
    """
    check_vote_options(temperature, weighting)
    distances, labels = as_dense(distances, "`distances`"), as_dense(labels, "`labels`")
    num_classes = as_class_count(num_classes)
    _check_shapes(distances, labels, num_classes)
    _check_values(distances, labels, num_classes, may_be_negative=weighting != "inverse")
    is_found = distances.isfinite()
    return count_votes(distances, is_found, labels, num_classes, temperature=temperature, weighting=weighting).scores


def count_votes(
    distances: Tensor, is_found: Tensor, labels: Tensor, num_classes: int, *, temperature: float, weighting: str
) -> Votes:
    """Vote like `vote`, with arguments known to be valid: nothing is looked at, so that no GPU waits.

    Args:
        distances: See `log_weights`.
        is_found: (B, k) bool, False where a neighbour is missing.
        labels: As in `vote`.
        num_classes: C.
        temperature: See `neighbor_weights`.
        weighting: See `neighbor_weights`.
    """
    logs = log_weights(distances, is_found, temperature=temperature, weighting=weighting)
    if labels.ndim == 2:
        # A missing neighbour, with class 0, adds nothing to it.
        return _count_ids(logs, labels.long().masked_fill(~is_found, 0), num_classes, weighting)
    shares = _share_rows(logs, labels)
    return Votes(shares if weighting == "softmax" else _add_rows(_weights(logs).double(), labels), shares)


def _count_ids(logs: Tensor, labels: Tensor, num_classes: int, weighting: str) -> Votes:
    """Vote with class ids (B, k). Where classes are many, those of the neighbours alone are counted, in (B, k)."""
    many = num_classes > _MANY * labels.shape[1]
    numbers, width = (number_rows(labels), labels.shape[1]) if many else (labels, num_classes)
    shares = _spread(_share_ids(logs, numbers, width), labels, num_classes)
    if weighting == "softmax":
        return Votes(shares, shares)
    return Votes(_spread(_add_ids(_weights(logs).double(), numbers, width), labels, num_classes), shares)


def number_rows(labels: Tensor) -> Tensor:
    """Number the classes of each row of (B, k) labels from 0, in ascending order.

    Example:
        >>> number_rows(torch.tensor([[7, 2, 7], [5, 9, 1]]))
        tensor([[1, 0, 1],
                [1, 2, 0]])
    """
    ordered, order = labels.sort(dim=1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(labels).scatter_(1, order, steps.cumsum(1))


def _spread(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Make (B, C) from what the class of each neighbour (B, k) has, the same for all neighbours of the class."""
    return values.new_zeros(len(values), num_classes).scatter_(1, labels, values)


def _add_ids(weights: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Sum the weights of each neighbour's class, (B, k): float32 ones of one magnitude add up exactly in float64."""
    sums = weights.new_zeros(len(weights), width).scatter_add_(1, numbers, weights).gather(1, numbers)
    return sums.clamp(max=_FLOAT32.max).float()


def _share_ids(logs: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Compute the share of each neighbour's class, (B, k)."""
    shape = (len(logs), width)
    peaks = logs.new_full(shape, _BELOW_ALL).scatter_reduce_(1, numbers, logs, "amax").gather(1, numbers)
    masses = numbers.new_zeros(shape).scatter_add_(1, numbers, _fixed(logs, peaks, logs.shape[1])).gather(1, numbers)
    return _shares(logs, peaks, masses)


def _add_rows(weights: Tensor, labels: Tensor) -> Tensor:
    """Sum weights by multi-hot or soft labels (B, k, C) to (B, C), in k passes, never as a (B, k, C) product."""
    sums = weights.new_zeros(len(weights), labels.shape[2])
    for i in range(labels.shape[1]):
        part = labels[:, i].double().where(weights[:, i, None] > 0, 0.0)  # a missing neighbour's labels may be anything
        sums += weights[:, i, None] * part
    return sums.clamp(max=_FLOAT32.max).float()


def _share_rows(logs: Tensor, labels: Tensor) -> Tensor:
    """Compute (B, C) shares from multi-hot or soft labels (B, k, C)."""
    k = labels.shape[1]
    peaks = logs.new_full((len(logs), labels.shape[2]), _BELOW_ALL)
    for i in range(k):
        peaks = torch.maximum(peaks, _given(logs, labels, i))
    masses = torch.zeros_like(peaks, dtype=torch.int64)
    for i in range(k):
        masses += _fixed(_given(logs, labels, i), peaks, k)
    return _shares(logs, peaks, masses)


def _given(logs: Tensor, labels: Tensor, i: int) -> Tensor:
    """Compute (B, C) logarithms of the weight that neighbour i gives each class."""
    part, log = labels[:, i], logs[:, i, None]
    weights = log + part.double().log() if part.is_floating_point() else log
    return torch.where((part > 0) & (log > -torch.inf), weights, -torch.inf)


def _fixed(logs: Tensor, peaks: Tensor, k: int) -> Tensor:
    """Compute exp(logs - peaks) in int64 fixed point, of which k add up exactly, in any order and on any device."""
    return (torch.exp(logs - peaks) * 2.0 ** (62 - k.bit_length())).long()


def _shares(logs: Tensor, peaks: Tensor, masses: Tensor) -> Tensor:
    """Divide exp(peaks) · masses by the row's sum of exp(logs), ordered also where float32 has no exponent for it.

    Args:
        logs: (B, k) of the neighbours.
        peaks: (B, …) the largest of those of each class.
        masses: (B, …) sums of `_fixed` of each class.
    """
    k = logs.shape[1]
    if k == 0:
        return torch.zeros_like(peaks, dtype=torch.float32)
    nearest = logs.amax(1, keepdim=True).clamp(min=_BELOW_ALL)
    parts = masses / _fixed(logs, nearest, k).sum(1, keepdim=True).double()
    shares = torch.exp(peaks - nearest) * parts
    below = (_SMALL - (peaks - nearest) - parts.log()).clamp(min=0)
    small = (math.exp(_SMALL) * (1 + below) ** -0.25).clamp(min=_FLOAT32.tiny)
    return torch.where(masses > 0, torch.where(below > 0, small, shares), 0.0).float()


def normalize_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Divide scores by their row's sum of neighbour weights, so that they lie in [0, 1].

    The division is per row, so the result does not depend on the batch. A row without neighbours stays 0. Scores that
    were rounded to float32 are divided by a total rounded likewise: unanimous votes are shares of 1. `Votes.shares` has
    the shares of sums that were not rounded before.

    Args:
        scores: (B, C) from `vote`.
        weights: (B, k) from `neighbor_weights`, with the same options.

    Returns:
        (B, C) float32 in [0, 1]: the share of the neighbours' weight that each class has.

    Example:
        >>> normalize_scores(torch.tensor([[10.0, 30.0]]), torch.tensor([[10.0, 10.0, 20.0]]))
        tensor([[0.2500, 0.7500]])
    """
    total = weights.sum(dim=1, keepdim=True, dtype=torch.float64).to(scores.dtype).double()
    shares = torch.where(total > 0, scores.double() / total, 0.0)
    return shares.clamp(max=1.0).float()  # a rounded 1.0000001 would be taken for a logit by torchmetrics


def _check_shapes(distances: Tensor, labels: Tensor, num_classes: int) -> None:
    if distances.ndim != 2 or not distances.is_floating_point():
        raise ValueError(
            f"`distances` must be a (B, k) float tensor, got shape {tuple(distances.shape)}, {distances.dtype}"
        )
    if labels.ndim not in (2, 3) or labels.shape[:2] != distances.shape:
        raise ValueError(
            f"`labels` must be (B, k) class ids or (B, k, C) multi-hot for distances of shape "
            f"{tuple(distances.shape)}, got shape {tuple(labels.shape)}"
        )
    if labels.ndim == 2 and labels.is_floating_point():
        raise ValueError(f"`labels` must be integer class ids, got {labels.dtype}: cast them with .long()")
    if labels.ndim == 3 and labels.shape[2] != num_classes:
        raise ValueError(f"multi-hot `labels` must have num_classes={num_classes} columns, got {labels.shape[2]}")
    if labels.device != distances.device:
        raise ValueError(f"`labels` must be on the distances' device {distances.device}, got {labels.device}")


def _check_values(distances: Tensor, labels: Tensor, num_classes: int, *, may_be_negative: bool) -> None:
    """Check the values with one device synchronisation, and look for the culprit only if there is one."""
    is_found = distances.isfinite()
    wrong_distance = ~(distances > -torch.inf if may_be_negative else distances >= 0)
    # of a NaN neither comparison holds
    fits = (labels >= 0) & (labels < num_classes) if labels.ndim == 2 else (labels >= 0) & (labels <= 1)
    wrong_label = ~fits & (is_found if labels.ndim == 2 else is_found[:, :, None])
    if not (wrong_distance.any() | wrong_label.any()):
        return
    if wrong_distance.any():
        refused = "-inf" if may_be_negative else "negative"
        raise ValueError(
            f"`distances` must not be {refused} or NaN, got {distances[wrong_distance][0].item()} "
            f"({int(wrong_distance.sum())} such values)"
        )
    need = f"in [0, num_classes={num_classes})" if labels.ndim == 2 else "0 and 1, or shares in [0, 1],"
    what = "`labels`" if labels.ndim == 2 else "multi-hot `labels`"
    raise ValueError(
        f"{what} must be {need} where the distance is finite, got "
        f"{labels[wrong_label][0].item()}: give a missing neighbour the distance inf"
        + (", or raise num_classes" if labels.ndim == 2 else "")
    )
