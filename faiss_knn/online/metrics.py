"""The torchmetrics that a callback was given: their names, their clones, their values."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric, MetricCollection

from faiss_knn.classify.ranking import has_top, rank_scores
from faiss_knn.distributed import all_gather_object, gather_rows, raise_together
from faiss_knn.online.clock import PARTS
from faiss_knn.online.standard_errors import has_standard_error, standard_error
from faiss_knn.search.inputs import shown

RESERVED = (
    "index_recall",
    "skipped",
    "seconds",
    *(f"{part}_seconds" for part in PARTS),
)  # what is logged beside the metrics
_TRIED = (2, 3, 5, 10, 20, 50, 100, 200, 1000)  # classes that a metric is tried with where it does not say its width


def named_metrics(metrics: Any) -> dict[str, Metric]:
    """Read the forms in which metrics are given.

    Args:
        metrics: None, a Metric, a list or tuple of them (named by their classes), a mapping from names to them, a
            `MetricCollection`, or a mapping {"train": ..., "val": ...} of any of these, of which "val" counts. A
            collection inside of a mapping adds its own names, "{name}_{own}".
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
        return {name: _checked(metric, f"metrics[{name!r}]") for name, metric in _flat(metrics)}
    if isinstance(metrics, Sequence) and not isinstance(metrics, str):
        return _by_class([_checked(metric, f"metrics[{i}]") for i, metric in enumerate(metrics)])
    raise ValueError(
        f"metrics can only be a torchmetric of list/tuple of torchmetrics, or a mapping of names to them, "
        f"got {type(metrics).__name__}"
    )


def _flat(metrics: Mapping[Any, Any] | MetricCollection) -> Iterator[tuple[str, Any]]:
    for name, metric in metrics.items():
        if isinstance(metric, MetricCollection):
            yield from ((f"{name}_{own}", part) for own, part in _flat(metric))
        else:
            yield str(name), metric


def class_count(metrics: Mapping[str, Metric]) -> int | None:
    """Tell the width of scores that the metrics were made for, None if they do not say.

    Raises:
        ValueError: If they were made for different widths.
    """
    widths = {}
    for name, metric in metrics.items():
        for part in parts_of(metric):
            width = getattr(part, "num_classes", None) or getattr(part, "num_labels", None)
            if isinstance(width, int):
                widths[name] = width
            elif is_made_for(part, "Binary"):
                widths[name] = 2
    if len(set(widths.values())) > 1:
        raise ValueError(f"`metrics` must agree on num_classes, got {widths}: use one callback per width")
    return next(iter(widths.values()), None)


def is_multiclass(metrics: Mapping[str, Metric]) -> bool:
    """Tell whether any of the metrics is made for one class a row."""
    return any(is_made_for(part, "Multiclass", "Binary") for metric in metrics.values() for part in parts_of(metric))


def is_made_for(metric: Metric, *tasks: str) -> bool:
    """Tell whether a metric is one of torchmetrics' for a task, such as "Binary", or made of one."""
    return any(base.__name__.startswith(tasks) for base in type(metric).__mro__)


def parts_of(metric: Metric) -> list[Metric]:
    """Return a metric and those that it wraps."""
    return [part for part in metric.modules() if isinstance(part, Metric)]


def rehearse(
    metrics: Mapping[str, Metric],
    num_classes: int | None = None,
    *,
    multi_hot: bool | None = None,
    standard_errors: bool = False,
) -> set[str]:
    """Update and compute a clone of each metric, before hours of training are spent.

    Args:
        metrics: Name to metric.
        num_classes: Width of the scores; None: what each metric was made for, or one of several that it can judge.
        multi_hot: Whether labels are (n, C); None: either will do.
        standard_errors: Whether their standard errors will be values too.

    Returns:
        The names of their values, as `scalars` spreads them.

    Raises:
        ValueError: Naming the metric that can judge no such labels, with its own reason; or one name of two values.
    """
    values = {
        name: _rehearsed(name, metric, num_classes or class_count({name: metric}), multi_hot)
        for name, metric in metrics.items()
    }
    return names_of(values, [name for name in metrics if standard_errors and has_standard_error(metrics[name])])


def names_of(values: Mapping[str, Any], with_errors: Sequence[str]) -> set[str]:
    """Return the names that metrics' values are logged under, as `scalars` spreads them.

    Args:
        values: What each metric computed, by name.
        with_errors: Names of the metrics whose standard errors are logged too.

    Raises:
        ValueError: If two values have one name.
    """
    names = list(RESERVED)
    for name, value in values.items():
        numbers, others = scalars(name, value)
        names += [*numbers, *others]
        if name in with_errors:
            names += [f"{key}_se" for key in numbers]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"`metrics` must have names of their own, got {', '.join(sorted(twice))} twice: rename one")
    return set(names) - set(RESERVED)


def _rehearsed(name: str, metric: Metric, width: int | None, multi_hot: bool | None) -> Any:
    """Return what a metric computes of made-up scores of the first width that it can judge."""
    forms = [False, True] if multi_hot is None and not is_multiclass({name: metric}) else [bool(multi_hot)]
    errors: list[Exception] = []
    for classes in [width] if width else _TRIED:
        for columns in forms:
            try:
                return _trial(metric, classes, columns)
            except Exception as error:  # whatever it is, it would come after an epoch otherwise
                errors.append(error)
    reason = f"{type(errors[0]).__name__}: {' '.join(str(errors[0]).split())}"
    shown_width = width or _TRIED[0]
    others = "" if width else f" (nor {', '.join(map(str, _TRIED[1:]))}: give num_classes if it is made for others)"
    form = "" if multi_hot is None else " against multi-hot labels" if multi_hot else " against class ids"
    raise ValueError(f"metric {name} cannot judge scores of {shown_width} classes{form}: {reason}{others}")


def _trial(metric: Metric, width: int, columns: bool) -> Any:
    shares = one_hot(torch.arange(2 * width, device="cpu") % width, width).float()
    labels = torch.arange(2 * width, device="cpu") % min(width, class_count({"": metric}) or width)
    return tried(metric, *_Judged.by(metric).of(shares, one_hot(labels, width) if columns else labels))


def tried(metric: Metric, predictions: Tensor, targets: Tensor) -> Any:
    """Return what a metric computes of one update, with nothing left of it."""
    with torch.no_grad(), _same_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clone = alone(metric)
        clone.update(predictions, targets)
        return clone.compute()


def alone(metric: Metric) -> Metric:
    """Return a fresh clone on the CPU that asks no other rank."""
    clone = metric.clone().to("cpu")
    clone.reset()
    for part in clone.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _on_this_rank_alone
    return clone


def _on_this_rank_alone() -> bool:
    """Tell a metric that there are no other ranks: none need be where this one is."""
    return False


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave random state alone, which some metrics draw from."""
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


class _Judged(NamedTuple):
    """What a metric judges, known before any batch.

    Attributes:
        one_score: Whether it knows two classes by one score, that of class 1.
        columns: Whether it knows the labels as 0/1, a column for each class.
        ranks: Whether it counts hits among the first classes; see `rank_scores`.
    """

    one_score: bool
    columns: bool
    ranks: bool

    @classmethod
    def by(cls, metric: Metric) -> "_Judged":
        """Look at a metric and those that it wraps."""
        one_score, columns = (
            any(is_made_for(part, task) for part in parts_of(metric)) for task in ("Binary", "Multilabel")
        )
        return cls(one_score, columns, has_top(metric))

    def of(self, shares: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is judged of shares (B, C), and the labels as the metric knows them."""
        if labels.ndim > 1:
            return shares, labels
        if self.one_score and shares.shape[1] >= 2:
            return shares[:, 1], labels
        if self.columns:
            return shares, one_hot(labels, shares.shape[1])
        return rank_scores(shares, labels) if self.ranks else shares, labels


def scalars(key: str, value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Spread a metric's value over log keys: `key`, or `key_{i}` for a vector, `key_{name}` for a mapping.

    Returns:
        What can be logged, and the other values (matrices, curves), by key.

    Example:
        >>> import torch
        >>> scalars("eval/knn_acc", torch.tensor([0.5, 1.0]))
        ({'eval/knn_acc_0': tensor(0.5000), 'eval/knn_acc_1': tensor(1.)}, {})
    """
    if isinstance(value, Mapping):
        logged: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        for name, part in value.items():
            numbers, rest = scalars(f"{key}_{name}", part)
            logged, others = logged | numbers, others | rest
        return logged, others
    if isinstance(value, float | int | np.number):
        return {key: torch.tensor(float(value), dtype=torch.float32, device="cpu")}, {}
    if isinstance(value, Tensor) and value.numel() == 1:
        return {key: value.reshape(())}, {}
    if isinstance(value, Tensor) and value.ndim == 1:
        return {f"{key}_{i}": part for i, part in enumerate(value)}, {}
    return {}, {key: value}


class MetricTable:
    """A clone of each metric per scored loader and k, for one validation run.

    Args:
        metrics: Name to metric.
        ks: The numbers of neighbours that are scored.
        loaders: Numbers of the dataloaders that are scored.
        device: Where the clones keep their states.
    """

    has_standard_error = staticmethod(has_standard_error)

    def __init__(self, metrics: Mapping[str, Metric], ks: Sequence[int], loaders: Sequence[int], device: Any) -> None:
        self._clones = {
            loader: {k: {name: _own_clone(metric, device) for name, metric in metrics.items()} for k in ks}
            for loader in loaders
        }
        self._judged = {name: _Judged.by(metric) for name, metric in metrics.items()}
        self._rows = dict.fromkeys(loaders, 0)

    def update(self, loader: int, k: int, shares: Tensor, labels: Tensor) -> None:
        """Add a batch: `shares` (B, C) in [0, 1] and `labels` (B,) or (B, C)."""
        if len(shares) == 0:
            return
        self._rows[loader] += len(shares)
        for name, metric in self._clones[loader][k].items():
            metric.update(*(values.to(metric.device) for values in self._judged[name].of(shares, labels)))

    def values(
        self, prefix: str, several_k: bool, standard_errors: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute what was updated on all ranks, by log key: `{prefix}[_k{K}]_{metric}[_se][/dataloader_idx_{i}]`.

        Args:
            prefix: Of the keys.
            several_k: Whether they name k.
            standard_errors: Whether to add those of the metrics that have them.

        Returns:
            The numbers, and the values that are none.
        """
        values: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        on_ranks = all_gather_object(self._rows)
        for loader, clones in self._clones.items():
            if not any(rows[loader] for rows in on_ranks):
                continue
            suffix = f"/dataloader_idx_{loader}" if len(self._clones) > 1 else ""
            for k, named in clones.items():
                stem = f"{prefix}_k{k}" if several_k else prefix
                for name, metric in named.items():
                    numbers, rest = scalars(f"{stem}_{name}", _compute(metric))
                    if standard_errors and has_standard_error(metric):
                        numbers |= errors_of(numbers, standard_error(metric))
                    values.update({key + suffix: value for key, value in numbers.items()})
                    others.update({key + suffix: value for key, value in rest.items()})
        return values, others


def errors_of(numbers: Mapping[str, Tensor], errors: Tensor) -> dict[str, Tensor]:
    """Return the standard errors by the keys of their numbers; of what no query told, none."""
    return {f"{key}_se": error for key, error in zip(numbers, errors.reshape(-1), strict=True) if not error.isnan()}


def _own_clone(metric: Metric, device: Any) -> Metric:
    clone = metric.clone().to(device)
    clone.reset()
    for part in clone.modules():
        if isinstance(part, Metric):
            part.dist_sync_fn = partial(_gather_after_meeting, part.dist_sync_fn or _gather_states)
    return clone


def _gather_after_meeting(gather: Callable[..., Any], state: Tensor, group: Any = None) -> Any:
    """Gather as a metric does, or raise on all ranks where one failed on its way here."""
    if group is not None or gather is not _gather_states:  # which would meet by itself
        raise_together(None)
    return gather(state, group)


def _gather_states(state: Tensor, group: Any = None) -> list[Tensor]:
    """Gather every rank's state. torchmetrics' own gather aborts where a rank without a query cannot tell the shape."""
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
        raise ValueError(f"metric {where} is no a torchmetric, got {shown(metric)}: give a torchmetrics.Metric")  # noqa: TRY004
    return metric
