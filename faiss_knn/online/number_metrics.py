"""Metrics of regression: which they are, and their values over all queries at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from faiss_knn.distributed import gather_rows
from faiss_knn.online.metrics import alone, errors_of, is_made_for, names_of, parts_of, scalars, tried

_TRIED = (0, 2, 3, 5, 10)  # numbers a row that a metric is tried with; 0: one, in rows of shape (n,)
_TRIED_ROWS = 32
_OF_REGRESSION = "torchmetrics.regression."


def are_of_numbers(metrics: Mapping[str, Metric]) -> bool:
    """Tell whether metrics judge numbers: one is torchmetrics' of regression, or derived from one, and none of classes.

    Example:
        >>> from torchmetrics import Accuracy, MeanAbsoluteError
        >>> are_of_numbers({"mae": MeanAbsoluteError()}), are_of_numbers({"acc": Accuracy("binary")})
        (True, False)
    """
    parts = [part for metric in metrics.values() for part in parts_of(metric)]
    return any(_is_of_regression(part) for part in parts) and not any(
        is_made_for(part, "Multiclass", "Binary", "Multilabel") for part in parts
    )


def _is_of_regression(metric: Metric) -> bool:
    return any(base.__module__.startswith(_OF_REGRESSION) for base in type(metric).__mro__)


def rehearse_numbers(
    metrics: Mapping[str, Metric], columns: int | None = None, *, standard_errors: bool = False
) -> set[str]:
    """Update and compute a clone of each metric on made-up numbers; see `faiss_knn.online.metrics.rehearse`.

    Args:
        metrics: Name to metric.
        columns: Numbers a row; 0 for one, in rows of shape (n,); None: as many as each metric can judge.
        standard_errors: Whether their standard errors will be values too.

    Raises:
        ValueError: Naming the metric that can judge no such numbers, with its own reason; or one name of two values.
    """
    values = {name: _rehearsed(name, metric, columns) for name, metric in metrics.items()}
    return names_of(values, [name for name in metrics if standard_errors and is_mean_of_errors(metrics[name])])


def _rehearsed(name: str, metric: Metric, columns: int | None) -> Any:
    errors: list[Exception] = []
    for width in _TRIED if columns is None else [columns]:
        numbers = torch.linspace(0.25, 0.75, _TRIED_ROWS * max(1, width), dtype=torch.float64, device="cpu")
        shape = (_TRIED_ROWS, width) if width else (_TRIED_ROWS,)
        try:
            return tried(_in_float64(metric), numbers.reshape(shape), numbers.square().reshape(shape))
        except Exception as error:  # whatever it is, it would come after an epoch otherwise
            errors.append(error)
    reason = f"{type(errors[0]).__name__}: {' '.join(str(errors[0]).split())}"
    form = "numbers" if columns is None else f"targets of shape (n{f', {columns}' if columns else ''})"
    raise ValueError(f"metric {name} cannot judge {form}: {reason}")


def _in_float64(metric: Metric) -> Metric:
    """Return a fresh clone that adds up in float64, on this rank alone."""
    return alone(metric).set_dtype(torch.float64)


def is_mean_of_errors(metric: Metric) -> bool:
    """Tell whether a metric of regression is a mean of its queries' errors, or the root of one.

    Example:
        >>> from torchmetrics import MeanAbsoluteError, R2Score
        >>> is_mean_of_errors(MeanAbsoluteError()), is_mean_of_errors(R2Score())
        (True, False)
    """
    return type(metric).__name__ in ("MeanAbsoluteError", "MeanSquaredError")


class NumberTable:
    """Metrics of regression per scored loader and k, for one validation run: `MetricTable` for numbers.

    Sums of floats depend on their order, and so on batches and ranks. So the numbers themselves are kept, 2·D a query,
    where they are, and each metric judges all of them at the end, on every rank's CPU, in an order that depends on the
    numbers alone, in float64.

    Args:
        metrics: Name to metric.
        ks: The numbers of neighbours that are scored.
        loaders: Numbers of the dataloaders that are scored.
    """

    has_standard_error = staticmethod(is_mean_of_errors)

    def __init__(self, metrics: Mapping[str, Metric], ks: Sequence[int], loaders: Sequence[int]) -> None:
        self._metrics = metrics
        self._kept: dict[int, dict[int, list[Tensor]]] = {loader: {k: [] for k in ks} for loader in loaders}

    def update(self, loader: int, k: int, means: Tensor, targets: Tensor) -> None:
        """Add a batch: `means` (B, D) and `targets` (B,) or (B, D), all finite."""
        if len(means):
            pair = torch.stack([means.reshape(targets.shape).double(), targets.double()], 1)
            self._kept[loader][k].append(pair)

    def values(
        self, prefix: str, several_k: bool, standard_errors: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute the metrics over all ranks, which must all ask, by log key: see `MetricTable.values`."""
        values: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        for loader, by_k in self._kept.items():
            suffix = f"/dataloader_idx_{loader}" if len(self._kept) > 1 else ""
            for k, batches in by_k.items():
                pairs = _in_order(gather_rows(torch.cat(batches) if batches else None, device="cpu")[0])
                if not len(pairs):
                    continue
                means, targets = (part.contiguous() for part in pairs.unbind(1))
                stem = f"{prefix}_k{k}" if several_k else prefix
                for name, metric in self._metrics.items():
                    numbers, rest = scalars(f"{stem}_{name}", tried(_in_float64(metric), means, targets))
                    if standard_errors and is_mean_of_errors(metric):
                        numbers |= errors_of(numbers, standard_error_of_mean(metric, means, targets))
                    values.update({key + suffix: value for key, value in numbers.items()})
                    others.update({key + suffix: value for key, value in rest.items()})
        return values, others


def _in_order(pairs: Tensor) -> Tensor:
    """Sort rows (n, …) float64 by their bytes: an order that depends on the rows alone."""
    if len(pairs) < 2:
        return pairs
    rows = np.ascontiguousarray(pairs.numpy().reshape(len(pairs), -1))
    return pairs[torch.from_numpy(rows.view(f"V{rows.strides[0]}")[:, 0].argsort(kind="stable"))]


def standard_error_of_mean(metric: Metric, means: Tensor, targets: Tensor) -> Tensor:
    """Estimate the standard error of a mean over n queries: the deviation of their parts (n - 1) over sqrt(n).

    That of a root of a mean squared error is divided by twice the root (delta method: Casella and Berger 2002, theorem
    5.5.24).

    Args:
        metric: One that `is_mean_of_errors`.
        means: (n,) or (n, D) float64.
        targets: Likewise.

    Returns:
        float64, a scalar or (D,) as the metric; NaN of fewer than two queries.

    Example:
        >>> from torchmetrics import MeanAbsoluteError
        >>> standard_error_of_mean(MeanAbsoluteError(), torch.zeros(2).double(), torch.tensor([1.0, 3.0]).double())
        tensor(1., dtype=torch.float64)
    """
    errors = (means - targets).reshape(len(means), -1)
    parts = errors.abs() if type(metric).__name__ == "MeanAbsoluteError" else errors.square()
    if metric.num_outputs == 1:
        parts = parts.mean(1)
    if len(parts) < 2:
        return torch.full(parts.shape[1:], torch.nan, dtype=torch.float64)
    error: Tensor = parts.std(0) / len(parts) ** 0.5
    if getattr(metric, "squared", True):
        return error
    root: Tensor = parts.mean(0).sqrt()
    return error / (2 * root)
