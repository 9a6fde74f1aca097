"""Targets that are numbers: what one is, and the weighted mean of the neighbours'.

Inside the package they are (N,) or (N, D) float32 or float64; a row with a number that is not finite has no target.
"""

from typing import Any

import torch
from torch import Tensor

from faiss_knn.classify.labels import as_dense, as_labels, is_labelled
from faiss_knn.classify.vote import Votes, log_weights
from faiss_knn.search.inputs import as_integer

TASKS = ("classification", "regression")


def read_targets(values: Any, what: str, *, ignore_index: int | None = None) -> Tensor:
    """Read targets that are numbers.

    Args:
        values: Tensor, ndarray, list or pandas Series, (N,), (N, 1) or (N, D), of a float dtype; NaN where a row has
            none. Integers are labels, and of these multi-hot rows (N, D) of 0 and 1 are numbers too; -1 marks a row
            without.
        what: Names the values in errors, such as "`labels`".
        ignore_index: A value that means "no target", beside NaN.

    Returns:
        (N,) or (N, D) float64 if they are, else float32; NaN in each row that has none.

    Raises:
        ValueError: For other shapes and types.

    Example:
        >>> read_targets([[0.5], [float("nan")], [-9.0]], "`labels`", ignore_index=-9)
        tensor([0.5000,    nan,    nan], dtype=torch.float64)
    """
    targets = as_dense(values, what)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim not in (1, 2) or 0 in targets.shape[1:]:
        raise ValueError(f"{what} must be (N,) or (N, D) numbers, got shape {tuple(targets.shape)}")
    if not targets.is_floating_point():
        targets = _from_multi_hot(targets, what)
    targets = targets if targets.dtype == torch.float64 else targets.float()
    missing = ~is_finite(targets)
    if ignore_index is not None:
        missing |= _by_column(targets == as_integer(ignore_index, "`ignore_index`")).any(1)
    return targets.masked_fill(missing.view(-1, *[1] * (targets.ndim - 1)), torch.nan)


def _from_multi_hot(values: Tensor, what: str) -> Tensor:
    if values.ndim == 1 or (len(values) and not -1 <= int(values.min()) <= int(values.max()) <= 1):
        raise ValueError(
            f"{what} must be floats where neighbours' means are scored, got {values.dtype}, which is what class ids "
            "are: cast numbers with .float(), or score classes"
        )
    labels = as_labels(values, what)
    return labels.float().masked_fill(~is_labelled(labels)[:, None], torch.nan)


def is_finite(targets: Tensor) -> Tensor:
    """Tell which rows of (N,) or (N, D) targets hold nothing but finite numbers."""
    return _by_column(targets.isfinite()).all(1)


def columns_of(targets: Tensor) -> int:
    """Count the numbers that each row of (N,) or (N, D) targets has."""
    return 1 if targets.ndim == 1 else targets.shape[1]


def check_targets(targets: Tensor, what: str) -> None:
    """Check that there is a target.

    Raises:
        ValueError: If not.
    """
    if not is_finite(targets).any():
        raise ValueError(f"{what} must have a finite number in one row at least, got {len(targets)} rows without")


def neighbor_means(
    distances: Tensor, is_found: Tensor, targets: Tensor, *, temperature: float = 0.07, weighting: str = "inverse"
) -> Tensor:
    """Average the neighbours' targets by their weights, those of a vote (`neighbor_weights`).

    Σ w_i t_i / Σ w_i, in float64. The parts are added up in the order of their size, so that neighbours at equal
    distances give the same sum in any order.

    Args:
        distances: (B, k) float, for "inverse" not negative.
        is_found: (B, k) bool, False where a neighbour is missing.
        targets: (B, k) or (B, k, D) float; of missing neighbours anything.
        temperature: See `neighbor_weights`.
        weighting: See `neighbor_weights`.

    Returns:
        (B, D) of the targets' dtype; NaN in a row without neighbours.

    Example:
        >>> distances, targets = torch.tensor([[0.0, 0.1]]), torch.tensor([[1.0, 4.0]])
        >>> neighbor_means(distances, distances >= 0, targets, temperature=0.1)
        tensor([[2.]])
    """
    logs = log_weights(distances, is_found, temperature=temperature, weighting=weighting)
    weights = torch.exp(logs - logs.amax(1, keepdim=True)).where(is_found, 0.0)
    targets = targets[:, :, None] if targets.ndim == 2 else targets
    parts = (weights[:, :, None] * targets.double()).where(is_found[:, :, None], 0.0).sort(dim=1).values
    # Column by column: a sum over a dimension takes its numbers in an order that depends on the batch.
    total, sums = weights.new_zeros(len(weights), 1), parts.new_zeros(len(parts), parts.shape[2])
    for i in range(parts.shape[1]):
        total += weights[:, i, None]
        sums += parts[:, i]
    return (sums / total).to(targets.dtype)


def votes_of_means(
    distances: Tensor,
    is_found: Tensor,
    labels: Tensor,
    num_classes: int,  # noqa: ARG001
    *,
    temperature: float,
    weighting: str,
) -> Votes:
    """Give `neighbor_means` as both parts of a vote: what `count_votes` is where labels are classes."""
    means = neighbor_means(distances, is_found, labels, temperature=temperature, weighting=weighting)
    return Votes(means, means)


def _by_column(values: Tensor) -> Tensor:
    return values[:, None] if values.ndim == 1 else values
