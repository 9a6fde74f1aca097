"""The torchmetrics that a callback was given: their names, their clones, their values."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from faiss_knn.classify.ranking import scores_for
from faiss_knn.search.ranks import gather_rows, share


def named_metrics(metrics: Any) -> dict[str, Metric]:
    """Read the forms in which metrics are given.

    Args:
        metrics: None, a Metric, a list or tuple of them (named by their classes), a mapping from names to them, a
            `MetricCollection`, or a mapping {"train": ..., "val": ...} of any of these, of which "val" counts.
            omegaconf containers are sequences and mappings too.

    Raises:
        ValueError: Naming the item that is not a Metric, or the class that a list holds twice.
    """
    if isinstance(metrics, Mapping) and set(metrics) == {"train", "val"}:
        metrics = metrics["val"]
    if metrics is None:
        return {}
    if isinstance(metrics, Metric):
        return {type(metrics).__name__: metrics}
    if isinstance(metrics, Mapping | MetricCollection):
        return {str(name): _checked(metric, f"metrics[{name!r}]") for name, metric in metrics.items()}
    if isinstance(metrics, Sequence) and not isinstance(metrics, str):
        return _by_class([_checked(metric, f"metrics[{i}]") for i, metric in enumerate(metrics)])
    raise ValueError(
        f"metrics can only be a torchmetric of list/tuple of torchmetrics, or a mapping of names to them, "
        f"got {type(metrics).__name__}"
    )


def class_count(metrics: Mapping[str, Metric]) -> int | None:
    """The width of scores that the metrics were made for, None if they do not say.

    Raises:
        ValueError: If they were made for different widths.
    """
    widths = {}
    for name, metric in metrics.items():
        width = getattr(metric, "num_classes", None) or getattr(metric, "num_labels", None)
        if isinstance(width, int):
            widths[name] = width
    if len(set(widths.values())) > 1:
        raise ValueError(f"`metrics` must agree on num_classes, got {widths}: use one callback per width")
    return next(iter(widths.values()), None)


def scalars(key: str, value: Any) -> dict[str, Tensor]:
    """Spread a metric's value over log keys: `key`, or `key_{i}` for a vector, `key_{name}` for a mapping.

    Example:
        >>> import torch
        >>> scalars("eval/knn_acc", torch.tensor([0.5, 1.0]))
        {'eval/knn_acc_0': tensor(0.5000), 'eval/knn_acc_1': tensor(1.)}
    """
    if isinstance(value, Mapping):
        return {k: v for name, part in value.items() for k, v in scalars(f"{key}_{name}", part).items()}
    if isinstance(value, Tensor) and value.numel() == 1:
        return {key: value.reshape(())}
    if isinstance(value, Tensor) and value.ndim == 1:
        return {f"{key}_{i}": part for i, part in enumerate(value)}
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"the metric of '{key}' computes {shape}, which cannot be logged: give one that computes numbers")


class MetricTable:
    """A clone of each metric per scored loader and k, for one validation run.

    Args:
        metrics: Name to metric.
        ks: The numbers of neighbours that are scored.
        loaders: Numbers of the dataloaders that are scored.
        device: Where the clones keep their states.
    """

    def __init__(self, metrics: Mapping[str, Metric], ks: Sequence[int], loaders: Sequence[int], device: Any) -> None:
        self._clones = {
            loader: {k: {name: _own_clone(metric, device) for name, metric in metrics.items()} for k in ks}
            for loader in loaders
        }
        self._rows = dict.fromkeys(loaders, 0)

    def update(self, loader: int, k: int, shares: Tensor, labels: Tensor) -> None:
        """Add a batch: `shares` (B, C) in [0, 1] and `labels` (B,) or (B, C)."""
        if len(shares) == 0:
            return
        self._rows[loader] += len(shares)
        for metric in self._clones[loader][k].values():
            metric.update(scores_for(metric, shares, labels).to(metric.device), labels.to(metric.device))

    def values(self, prefix: str, several_k: bool) -> dict[str, Tensor]:
        """Compute what was updated on all ranks, as log keys: `{prefix}[_k{K}]_{metric}[/dataloader_idx_{i}]`."""
        values: dict[str, Tensor] = {}
        on_ranks = share(self._rows)
        for loader, clones in self._clones.items():
            if not any(rows[loader] for rows in on_ranks):
                continue
            suffix = f"/dataloader_idx_{loader}" if len(self._clones) > 1 else ""
            for k, named in clones.items():
                stem = f"{prefix}_k{k}" if several_k else prefix
                for name, metric in named.items():
                    found = scalars(f"{stem}_{name}", _compute(metric))
                    values.update({key + suffix: value for key, value in found.items()})
        return values


def _own_clone(metric: Metric, device: Any) -> Metric:
    clone = metric.clone().to(device)
    clone.reset()
    for part in clone.modules():
        if isinstance(part, Metric) and part.dist_sync_fn is None:
            part.dist_sync_fn = _gather_states
    return clone


def _gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
    """Every rank's state. torchmetrics' own gather aborts where a rank without a query has no idea of the shape."""
    if state.ndim == 0:
        return list(gather_rows(state[None], group=group, device=state.device)[0])
    rows, counts = gather_rows(state, group=group, device=state.device)
    return list(torch.split(rows, counts))


def _compute(metric: Metric) -> Any:
    with warnings.catch_warnings():
        # A rank without a query takes part in the computation all the same.
        warnings.filterwarnings("ignore", ".*was called before the ``update`` method", UserWarning)
        return metric.compute()


def _by_class(metrics: list[Metric]) -> dict[str, Metric]:
    names = [type(metric).__name__ for metric in metrics]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"`metrics` has {', '.join(sorted(twice))} more than once and a list names metrics by class: "
            "give a dict of names to metrics"
        )
    return dict(zip(names, metrics, strict=True))


def _checked(metric: Any, where: str) -> Metric:
    if not isinstance(metric, Metric):
        raise ValueError(f"metric {where} is no a torchmetric, got {metric!r}: give a torchmetrics.Metric")  # noqa: TRY004
    return metric
