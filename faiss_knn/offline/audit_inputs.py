"""What is audited: rows with and without labels, checked, and their labels as they were given."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from faiss_knn.classify.labels import as_labels_or_names
from faiss_knn.offline.report.findings import Side
from faiss_knn.offline.task import EvalTask, check_values, make_task

Ids = npt.NDArray[np.int64]

_LONE = "`features` must have two rows or more that can be compared, got 1"


@dataclass(frozen=True)
class AuditInputs:
    """Rows of a bank and perhaps queries, those that are finite and, under cosine, not zero.

    Attributes:
        task: Bank and queries without labels; with `leave_one_out` there are no queries.
        sizes: Rows and queries as given.
        labels: (N,) class numbers of the bank's rows, -1 where unlabelled; None without labels.
        query_labels: (Q,) the same of the queries.
        classes: The labels as given, by class number.
    """

    task: EvalTask
    sizes: tuple[int, int]
    labels: Ids | None
    query_labels: Ids | None
    classes: list[Any]

    @property
    def bad_rows(self) -> list[int]:
        """Rows that were left out."""
        return _missing(self.sizes[0], self.task.bank.ids)

    @property
    def bad_queries(self) -> list[int]:
        """Queries that were left out."""
        return [] if self.task.leave_one_out else _missing(self.sizes[1], self.task.queries.ids)

    def row_ids(self, places: Ids) -> list[int]:
        """Return row numbers as they were given."""
        ids: list[int] = self.task.bank.ids[places].tolist()
        return ids

    def query_ids(self, places: Ids) -> list[int]:
        """Return numbers of queries as they were given."""
        ids: list[int] = self.task.queries.ids[places].tolist()
        return ids

    def labels_of(self, places: Ids) -> Ids:
        """Return class numbers of some rows, -1 where unlabelled."""
        return np.full(len(places), -1) if self.labels is None else self.labels[places]

    def class_of(self, number: int) -> Any:
        """Return a label as it was given; None for -1."""
        return self.classes[number] if number >= 0 else None

    def labels_by_row(self, rows: Collection[int]) -> dict[tuple[Side, int], Any]:
        """Return the labels of rows, numbered as given, None where they have none, by ("row", number)."""
        return self._labels_by_number("row", rows, self.task.bank.ids, self.labels)

    def labels_by_query(self, queries: Collection[int]) -> dict[tuple[Side, int], Any]:
        """Return the labels of queries likewise, by ("query", number)."""
        return self._labels_by_number("query", queries, self.task.queries.ids, self.query_labels)

    def _labels_by_number(
        self, side: Side, numbers: Collection[int], ids: Ids, labels: Ids | None
    ) -> dict[tuple[Side, int], Any]:
        if labels is None:
            return {(side, number): None for number in numbers}
        classes = labels[np.searchsorted(ids, np.fromiter(numbers, np.int64, len(numbers)))].tolist()
        return {(side, number): self.class_of(one) for number, one in zip(numbers, classes, strict=True)}


def _missing(count: int, ids: Ids) -> list[int]:
    return [int(i) for i in np.setdiff1d(np.arange(count), ids)]


def make_inputs(
    features: Any,
    labels: Any,
    query_features: Any,
    query_labels: Any,
    *,
    distance_metric: str,
    class_names: Sequence[str] | None,
    ignore_index: int | None,
) -> AuditInputs:
    """Check features and labels as `evaluate` does, but keep rows without a label.

    Raises:
        ValueError: If they do not fit, a row may have several classes, or fewer than two rows can be compared.
    """
    alone = query_features is None
    if query_labels is not None and (alone or labels is None):
        raise ValueError("`query_labels` need `query_features`, and `labels` beside them: give all of them")
    with _as_named_here():
        sides = [features] if alone else [features, query_features]
        if _length(features) == 1:
            raise ValueError(_LONE)
        blank = [np.zeros(_length(rows), np.int64) for rows in sides] + [None]
        task = make_task(
            features, blank[0], query_features, None if alone else blank[1],
            num_classes=None, class_names=None, leave_one_out=alone,
        )  # fmt: skip
        task = check_values(task, distance_metric, skip_bad_rows=True)
        if len(task.bank.rows) < 2:
            raise ValueError(_LONE)
        sizes = (len(sides[0]), 0 if alone else len(sides[1]))
        known, query_known, classes = _labels(
            features, labels, query_features, query_labels, sizes, class_names, ignore_index
        )
    return AuditInputs(
        task,
        sizes,
        None if known is None else known[task.bank.ids],
        None if query_known is None else query_known[task.queries.ids],
        classes,
    )


def _length(rows: Any) -> int:
    return len(rows) if hasattr(rows, "__len__") else 0


def _labels(
    features: Any,
    labels: Any,
    query_features: Any,
    query_labels: Any,
    sizes: tuple[int, int],
    class_names: Sequence[str] | None,
    ignore_index: int | None,
) -> tuple[Ids | None, Ids | None, list[Any]]:
    """Number the classes of all rows and queries as given, and return the labels by number."""
    if labels is None:
        return None, None, []
    alone = query_labels is None
    task = make_task(
        features, labels, None if alone else query_features, query_labels,
        num_classes=None, class_names=class_names, leave_one_out=alone, ignore_index=ignore_index,
    )  # fmt: skip
    if task.multi_hot:
        raise ValueError("`labels` must be one class a row, got multi-hot labels: leave them out, or give one column")
    classes: list[Any] = list(range(task.num_classes)) if task.class_ids is None else list(task.class_ids)
    if task.class_names is not None and not isinstance(as_labels_or_names(labels, "`labels`"), Tensor):
        classes = list(task.class_names)
    filled = []
    for size, side in ((sizes[0], task.bank), (sizes[1], None if alone else task.queries)):
        column = np.full(size, -1, np.int64)
        if side is not None:
            column[side.ids] = side.labels.cpu().numpy()
        filled.append(column)
    return filled[0], None if alone else filled[1], classes


@contextmanager
def _as_named_here() -> Iterator[None]:
    """Name arguments in errors as `audit` does, which calls what is searched features and labels."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("bank_features", "features").replace("bank_labels", "labels")) from error
