"""What is evaluated: labelled bank and query rows, checked, with their classes numbered; and what makes it suspect."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.classify.labels import (
    Names,
    as_class_count,
    as_labels_or_names,
    first_name,
    is_labelled,
    is_named,
    is_soft,
    most_likely,
    number_classes,
    one_hot_ids,
    width_of,
)
from faiss_knn.offline.groups import read_groups
from faiss_knn.offline.lazy_rows import RowSource, Subset, read_rows, spans
from faiss_knn.offline.left_out import LeftOut
from faiss_knn.offline.report.results import Checks
from faiss_knn.search.inputs import are_comparable, check_dense, shown

Ids = npt.NDArray[np.int64]
ArrayLike = Any

_CHECKED_BYTES = 64 << 20
_WIDE = 1 << 16  # class ids from which on the classes are numbered anew, if few of the ids below occur


@dataclass(frozen=True)
class LabelledRows:
    """Rows that have a label, and where they were in what the caller gave.

    Attributes:
        rows: (n, d), those that have a label.
        labels: (n,) int64 class numbers, or (n, C) int64 multi-hot.
        ids: (n,) row numbers in what the caller gave, ascending.
        unlabelled: How many rows were left out for want of a label.
        shares: (n, C) shares of the classes, of which `labels` are the largest; None if each row has one class.
        skipped: How many rows were left out because no distance can be measured from them.
        groups: (n,) int64 which group each is of, or None.
        own: (n,) int64 of queries, each one's own row in what was given as the bank, -1 without one; or None.
        ignored: (n, m) int64 of queries, rows of what was given as the bank that each may not find, or -1; or None.
    """

    rows: RowSource
    labels: Tensor
    ids: Ids
    unlabelled: int
    shares: Tensor | None = None
    skipped: int = 0
    groups: Tensor | None = None
    own: Ids | None = None
    ignored: Ids | None = None

    def pick(self, places: Ids) -> "LabelledRows":
        """Pick some of the rows, by ascending place."""
        chosen = torch.from_numpy(places)
        shares = None if self.shares is None else self.shares[chosen]
        return replace(
            self,
            rows=Subset(self.rows, places),
            labels=self.labels[chosen],
            ids=self.ids[places],
            shares=shares,
            groups=None if self.groups is None else self.groups[chosen],
            own=None if self.own is None else self.own[places],
            ignored=None if self.ignored is None else self.ignored[places],
        )


@dataclass(frozen=True)
class Limits:
    """Which rows belong together, and which of the bank a query may not find, all as `evaluate` takes them.

    Attributes:
        groups: See `faiss_knn.offline.groups.read_groups`.
        exclude_same_group: Whether a query may not find rows of its own group.
        own_rows: (Q,) each query's own row in the bank, -1 where it has none.
        ignored_rows: Lists, or (Q, m) padded with -1, of bank rows that each query may not find.
    """

    groups: Any = None
    exclude_same_group: bool = False
    own_rows: Any = None
    ignored_rows: Any = None


@dataclass(frozen=True)
class EvalTask:
    """A bank, the queries that it classifies, and the classes.

    With `leave_one_out` the queries are the bank's own rows, and none is its own neighbour.

    Attributes:
        bank: The rows that are searched.
        queries: The rows that are classified.
        num_classes: C, how many classes are numbered.
        class_names: Names by class number, or None.
        leave_one_out: See above.
        class_ids: (C,) ids by class number, where these are not the same.
        fingerprint: Of every number and label, once they were looked at.
        exclude_same_group: Whether a query may not find rows of its own group.
    """

    bank: LabelledRows
    queries: LabelledRows
    num_classes: int
    class_names: list[str] | None
    leave_one_out: bool
    class_ids: list[int] | None = None
    fingerprint: str = ""
    exclude_same_group: bool = False

    @property
    def multi_hot(self) -> bool:
        """Whether rows may have several classes."""
        return self.bank.labels.ndim == 2

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.bank.rows.shape[1]

    @property
    def reachable(self) -> int:
        """How many neighbours a query can have."""
        return len(self.bank.rows) - (0 if self.left_out is None else int(self.left_out.counts.min()))

    @cached_property
    def n_groups(self) -> int | None:
        """How many groups the queries are of, None where no groups were given."""
        return None if self.queries.groups is None else len(torch.unique(self.queries.groups))

    @cached_property
    def left_out(self) -> LeftOut | None:
        """Which bank rows each query may not find; None: it may find all."""
        queries = self.queries
        own = queries.ids if self.leave_one_out else queries.own
        grouped = self.exclude_same_group
        if own is None and queries.ignored is None and not grouped:
            return None
        nowhere = np.full(len(queries.ids), -1)
        listed = np.empty((0, 2), np.int64)
        if queries.ignored is not None:
            places = _places_of(queries.ignored, self.bank.ids)
            listed = np.stack([np.nonzero(places >= 0)[0], places[places >= 0]], 1)
        return LeftOut(
            torch.from_numpy(nowhere if own is None else _places_of(own, self.bank.ids)),
            self.bank.groups if grouped else None,
            queries.groups if grouped else None,
            torch.from_numpy(np.unique(listed[:, 0] * len(self.bank.ids) + listed[:, 1])),
            len(self.bank.ids),
        )

    def names_of(self, classes: Tensor) -> list[str]:
        """Name classes (n,), given by number: their names, or else their ids."""
        numbers: list[int] = classes.tolist()
        names: Sequence[Any] | None = self.class_names or self.class_ids
        return [str(number if names is None else names[number]) for number in numbers]

    @cached_property
    def bank_counts(self) -> Tensor:
        """(C,) bank rows of each class."""
        return self._counts(self.bank.labels)

    @cached_property
    def query_counts(self) -> Tensor:
        """(C,) queries of each class."""
        return self._counts(self.queries.labels)

    @cached_property
    def relevant_counts(self) -> Tensor:
        """(Q,) bank rows of the query's class that it may find; for single labels."""
        counts = self.bank_counts[self.queries.labels]
        if self.left_out is None:
            return counts
        return counts - self.left_out.count_alike(self.bank.labels, self.queries.labels)

    def few_shot(self, per_class: int, random: np.random.SeedSequence) -> "EvalTask":
        """Return the same queries before a bank of `per_class` rows of each class, or all of a smaller class."""
        order = np.random.default_rng(random).permutation(len(self.bank.rows))
        labels = self.bank.labels.numpy()[order]
        by_class = np.argsort(labels, kind="stable")
        first = np.searchsorted(labels[by_class], labels[by_class])  # where the class begins in the sorted order
        drawn = order[by_class[np.arange(len(labels)) - first < per_class]]
        return replace(self, bank=self.bank.pick(np.sort(drawn)))

    def _counts(self, labels: Tensor) -> Tensor:
        return labels.sum(0) if labels.ndim == 2 else torch.bincount(labels, minlength=self.num_classes)


def make_task(
    bank_features: Any,
    bank_labels: ArrayLike,
    query_features: Any,
    query_labels: ArrayLike,
    *,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    leave_one_out: bool,
    ignore_index: int | None = None,
    multi_label: bool = False,
    limits: Limits | None = None,
) -> EvalTask:
    """Check bank and queries and number the classes.

    Labels that are names are numbered in their sorted order, and so are class ids that are few and large. Rows of 0 and
    1 with one 1 each are class ids, unless `multi_label`. `limits` say which groups rows are of, and which rows queries
    may not find.

    Raises:
        ValueError: If shapes or kinds do not fit, a label is out of range, or nothing is labelled.
    """
    _check_queries_given(query_features, query_labels, leave_one_out)
    if leave_one_out:
        query_features, query_labels = bank_features, bank_labels
    for name, features, labels in (("bank", bank_features, bank_labels), ("query", query_features, query_labels)):
        _check_order(name, features, labels)
    query_features = _with_columns_of(bank_features, query_features, "features")
    query_labels = _with_columns_of(bank_labels, query_labels, "labels")
    bank_rows, query_rows = as_rows(bank_features, "bank_features"), as_rows(query_features, "query_features")
    _check_rows(bank_rows, query_rows)
    read = [
        as_labels_or_names(labels, f"`{name}`", ignore_index=ignore_index)
        for labels, name in ((bank_labels, "bank_labels"), (query_labels, "query_labels"))
    ]
    names = None if class_names is None else [str(name) for name in class_names]
    labels, names = _numbered(read, names, ignore_index)
    both = [_labelled_rows(bank_rows, labels[0], "bank"), _labelled_rows(query_rows, labels[1], "query")]
    both, columns = _one_kind(both, multi_label)
    count, ids = _class_count(both, columns, None if num_classes is None else as_class_count(num_classes), names)
    if ids is not None:
        _, numbers = number_classes(*(labelled.labels for labelled in both))
        both = [replace(labelled, labels=number) for labelled, number in zip(both, numbers, strict=True)]
    bank = both[0]
    if leave_one_out and len(bank.rows) < 2:
        raise ValueError("leave_one_out needs a bank of two labelled rows or more, got 1")
    task = EvalTask(bank, bank if leave_one_out else both[1], count, names, leave_one_out, ids)
    return task if limits is None else _limited(task, limits, len(bank_rows), len(query_rows))


def _limited(task: EvalTask, limits: Limits, n_bank: int, n_queries: int) -> EvalTask:
    """Add groups and lists of rows that queries may not find, as they were given for all rows."""
    bank, queries = task.bank, task.queries
    if limits.groups is not None:
        groups = read_groups(limits.groups, n_bank, n_queries, leave_one_out=task.leave_one_out)
        bank, queries = (
            side if of_all is None else replace(side, groups=of_all[torch.from_numpy(side.ids)])
            for side, of_all in zip((bank, queries), groups, strict=True)
        )
    if limits.exclude_same_group and bank.groups is None:
        missing = "" if limits.groups is None else "those of the bank too, "
        raise ValueError(f"exclude_same_group needs groups: give {missing}`groups`, (bank_groups, query_groups)")
    own, ignored = limits.own_rows, limits.ignored_rows
    if task.leave_one_out and own is not None:
        raise ValueError("leave_one_out says which row is a query's own: leave out `own_rows`")
    if own is not None:
        queries = replace(queries, own=_row_numbers(own, "own_rows", n_queries, n_bank, 1)[queries.ids])
    if ignored is not None:
        queries = replace(queries, ignored=_row_numbers(ignored, "ignored_rows", n_queries, n_bank, 2)[queries.ids])
    bank = queries if task.leave_one_out else bank
    task = replace(task, bank=bank, queries=queries, exclude_same_group=limits.exclude_same_group)
    if task.reachable < 1:
        raise ValueError("no query has a neighbour that it may find: each has lost the whole bank")
    return task


def _row_numbers(given: Any, argument: str, n_queries: int, n_bank: int, ndim: int) -> Ids:
    """Read row numbers of the bank, -1 for none: (Q,), or (Q, m) from lists of any lengths."""
    what = "a row of the bank, or -1," if ndim == 1 else "a list of rows of the bank"
    need = f"`{argument}` must be {what} for each of {n_queries} queries, got"
    if np.ma.is_masked(given):
        raise ValueError(f"{need} masked entries: fill them with -1")
    try:
        values = given.cpu().numpy() if isinstance(given, Tensor) else given
        if ndim == 2 and isinstance(values, (list, tuple)):
            width = max((len(one) for one in values), default=1) or 1
            values = [[*one, *[-1] * (width - len(one))] for one in values]
        rows = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{need} {shown(given)}: {str(error).splitlines()[0]}") from error
    if rows.dtype.kind not in "iu" or rows.ndim != ndim or len(rows) != n_queries:
        raise ValueError(f"{need} {rows.dtype} of shape {rows.shape}")
    if rows.size and not -1 <= rows.min() <= rows.max() < n_bank:
        wrong = rows.min() if rows.min() < -1 else rows.max()
        raise ValueError(f"`{argument}` must be rows of the bank, in [0, {n_bank}), or -1, got {wrong}")
    return rows.astype(np.int64)


def _places_of(rows: Ids, ids: Ids) -> Ids:
    """Find the places of row numbers among ascending `ids`, -1 where they are not there."""
    places = np.searchsorted(ids, rows).clip(max=len(ids) - 1)
    known_places: Ids = np.where(ids[places] == rows, places, -1)
    return known_places


def _check_queries_given(query_features: RowSource | None, query_labels: ArrayLike | None, leave_one_out: bool) -> None:
    given = query_features is not None or query_labels is not None
    if leave_one_out and given:
        raise ValueError("leave_one_out takes the bank alone, its rows are the queries: leave out the queries")
    if not leave_one_out and (query_features is None or query_labels is None):
        raise ValueError("`query_features` and `query_labels` are needed, or leave_one_out=True to use the bank's rows")


def _check_order(name: str, features: Any, labels: Any) -> None:
    """Refuse pandas labels that hold the index of their rows in another order; rows and labels are joined in order."""
    rows: Any = getattr(features, "index", None)
    others: Any = getattr(labels, "index", None)
    if not all(hasattr(index, "equals") and index.is_unique for index in (rows, others)) or rows.equals(others):
        return
    if len(rows) == len(others) and rows.isin(others).all():
        raise ValueError(
            f"`{name}_labels` must be in the order of `{name}_features`, got the same index in another order: "
            f"give {name}_labels.loc[{name}_features.index]"
        )


def _with_columns_of(bank: Any, queries: Any, what: str) -> Any:
    """Put the queries' columns in the bank's order, where both are frames with names for columns."""
    wanted, given = _column_names(bank), _column_names(queries)
    if wanted is None or given is None or wanted == given:
        return queries
    if what == "labels" and len(wanted) == len(given) == 1:
        return queries  # a column of ids, whatever it is called
    places = {name: place for place, name in enumerate(given)}
    missing, extra = [x for x in wanted if x not in places], [x for x in given if x not in set(wanted)]
    if missing or extra or len(places) < len(given) or len(wanted) != len(given):
        differs = [f"{word} {_some(names)}" for word, names in (("without", missing), ("with", extra)) if names]
        raise ValueError(
            f"`query_{what}` must have the columns of `bank_{what}`, each once, got a DataFrame "
            f"{' and '.join(differs) or 'that has some twice'}: choose the same columns, or give .to_numpy() of both "
            "to take them in order"
        )
    return queries.to_numpy()[:, [places[name] for name in wanted]]


def _column_names(features: Any) -> list[Any] | None:
    """Return the names of a frame's columns; None for what is no frame, and for columns that are only counted."""
    if not hasattr(features, "to_numpy") or not hasattr(features, "columns"):
        return None
    names = list(features.columns)
    return None if names == list(range(len(names))) else names


def _some(names: list[Any]) -> str:
    return ", ".join(map(repr, names[:3])) + (f", … ({len(names)} of them)" if len(names) > 3 else "")


def as_rows(features: Any, name: str) -> RowSource:
    """Take tensors, arrays, lists and DataFrames as rows; what is read in blocks stays as it is."""
    if hasattr(features, "to_numpy"):  # a DataFrame
        features = features.to_numpy()
    if isinstance(features, (list, tuple)):
        try:
            features = np.asarray(features)
        except ValueError as error:
            raise ValueError(f"`{name}` must be rows of one length: {str(error).splitlines()[0]}") from error
    if np.ma.is_masked(features):
        raise ValueError(f"`{name}` must not have masked entries: leave those rows out, or fill them in")
    if isinstance(features, Tensor):
        check_dense(features, f"`{name}`")
        if features.is_complex():
            raise ValueError(f"`{name}` must be real numbers, got {features.dtype}")
        if features.is_floating_point() and features.dtype.itemsize < 2:
            raise ValueError(
                f"`{name}` must be numbers that torch calculates with, got {features.dtype}: take .float()"
            )
        return features.detach()
    if not all(hasattr(features, part) for part in ("shape", "dtype", "__len__", "__getitem__")):
        raise ValueError(f"`{name}` must be an (N, d) tensor or array, got {type(features).__name__}")
    if hasattr(features, "toarray"):
        raise ValueError(f"`{name}` must be a dense array, got a sparse one: take its .toarray()")
    dtype = features.dtype  # of torch where a Subset of a tensor is given
    if isinstance(dtype, np.dtype) and (dtype.kind not in "fiub" or dtype.itemsize > 8):
        raise ValueError(f"`{name}` must be numbers of at most 64 bits, got {dtype}: leave out columns of other kinds")
    rows: RowSource = np.asarray(features) if isinstance(features, (np.ma.MaskedArray, np.matrix)) else features
    return rows


def _check_rows(bank: RowSource, queries: RowSource) -> None:
    for name, rows in (("bank_features", bank), ("query_features", queries)):
        if len(rows.shape) != 2 or 0 in rows.shape:
            raise ValueError(f"`{name}` must be (N, d) with at least one row, got shape {tuple(rows.shape)}")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"`query_features` must have the bank's dimension {bank.shape[1]}, got {queries.shape[1]}: "
            "take both from the same model"
        )


def _numbered(
    read: list[Tensor | Names], names: list[str] | None, ignore_index: int | None
) -> tuple[list[Tensor], list[str] | None]:
    """Turn labels into tensors: names into their place in `names`, or in their sorted order."""
    tensors = [labels.cpu() for labels in read if isinstance(labels, Tensor)]
    if len(tensors) == len(read):
        return tensors, names
    if tensors:
        raise ValueError("`bank_labels` and `query_labels` must both be class ids or both be names")
    words = [labels for labels in read if not isinstance(labels, Tensor)]
    if ignore_index is not None:
        raise ValueError(f"`ignore_index` is for class ids, but the labels are names, such as {first_name(words[0])!r}")
    named = [array[is_named(array)].astype(str) for array in words]
    names = names or [str(name) for name in np.unique(np.concatenate(named))]
    number = {name: i for i, name in enumerate(names)}
    unknown = next((str(word) for array in named for word in np.unique(array) if str(word) not in number), None)
    if unknown is not None:
        raise ValueError(f"label {unknown!r} is not among the class names, {names[:3]} ({len(names)} of them)")
    return [
        torch.tensor([-1 if word is None else number[str(word)] for word in array], dtype=torch.int64, device="cpu")
        for array in words
    ], names


def _labelled_rows(rows: RowSource, labels: Tensor, name: str) -> LabelledRows:
    argument = f"{name}_labels"
    if len(labels) != len(rows):
        raise ValueError(f"`{argument}` must have one entry per row, {len(rows)}, got {len(labels)}")
    if not is_soft(labels) and (int(labels.min()) < -1 or (labels.ndim == 2 and int(labels.max()) > 1)):
        need = "class ids from 0, or -1 for unlabelled rows" if labels.ndim == 1 else "0 and 1, or -1 for unlabelled"
        wrong = int(labels.min()) if int(labels.min()) < -1 else int(labels.max())
        raise ValueError(f"`{argument}` must be {need}, got {wrong}")
    mask = is_labelled(labels)
    ids = mask.nonzero()[:, 0].numpy()
    if not len(ids):
        raise ValueError(f"every entry of `{argument}` is -1: at least one labelled row is needed")
    left_out = len(labels) - len(ids)
    return LabelledRows(Subset(rows, ids) if left_out else rows, labels[mask], ids, left_out)


def _one_kind(both: list[LabelledRows], multi_label: bool) -> tuple[list[LabelledRows], int]:
    """Let both have class ids or both multi-hot labels; return the columns that labels had, 0 without."""
    widths = {labelled.labels.shape[1] for labelled in both if labelled.labels.ndim == 2}
    if len(widths) == 2:
        bank, queries = (labelled.labels.shape[1] for labelled in both)
        raise ValueError(f"`query_labels` must have the bank's {bank} columns, got {queries}")
    any_soft = any(is_soft(labelled.labels) for labelled in both)
    single = [_as_ids(labelled.labels) for labelled in both]
    ids = [one for one in single if one is not None]
    if any_soft and len(ids) < len(both):
        raise ValueError("labels that are shares of classes go with class ids, one-hot rows or shares, not multi-hot")
    if len({labelled.labels.ndim for labelled in both}) == 2 and not any_soft:
        raise ValueError("`bank_labels` and `query_labels` must be of one kind: class ids, or multi-hot")
    if len(ids) == len(both) and (any_soft or not widths or not multi_label):
        return [_with_ids(labelled, one) for labelled, one in zip(both, ids, strict=True)], max(widths, default=0)
    return both, max(widths)


def _as_ids(labels: Tensor) -> Tensor | None:
    """Return (n,) class ids, by the largest share if rows have several; None for multi-hot labels."""
    if labels.ndim == 1:
        return labels
    return most_likely(labels) if is_soft(labels) else one_hot_ids(labels)


def _with_ids(labelled: LabelledRows, ids: Tensor) -> LabelledRows:
    return replace(labelled, labels=ids, shares=labelled.labels if is_soft(labelled.labels) else None)


def _class_count(
    both: list[LabelledRows], columns: int, num_classes: int | None, names: list[str] | None
) -> tuple[int, list[int] | None]:
    """Count the classes, and return their ids where they are numbered anew."""
    labels = [labelled.labels for labelled in both]
    seen = max(columns, *(width_of(part) for part in labels))
    count = num_classes if num_classes is not None else max(seen, len(names or []))
    fixed = labels[0].ndim == 2 or any(labelled.shares is not None for labelled in both)
    if count < seen or (fixed and count != columns):
        raise ValueError(f"num_classes={count} does not fit the labels, which need {seen}: give num_classes={seen}")
    if names is not None and len(names) < count:
        raise ValueError(f"`class_names` must name all {count} classes, got {len(names)}")
    if columns or names is not None or count <= _WIDE:
        return count, None
    present, _ = number_classes(*labels)
    return (count, None) if count <= 16 * len(present) else (len(present), present.tolist())


def check_values(task: EvalTask, distance_metric: str, skip_bad_rows: bool = False) -> EvalTask:
    """Check every number once, before an hour of searching, and compute the fingerprint of all of them.

    Returns:
        The task with its fingerprint; with `skip_bad_rows` without the rows that are not finite or, under cosine,
        zero, which are counted.

    Raises:
        ValueError: If there is such a row, naming it as the caller numbers it, or there is no other one.
    """
    digest = blake2b(str((task.dim, task.class_ids)).encode(), digest_size=8)
    if task.exclude_same_group:
        digest.update(b"without its group")
    bank = _checked_values(task.bank, "bank_features", distance_metric, skip_bad_rows, digest)
    queries = bank
    if not task.leave_one_out:
        queries = _checked_values(task.queries, "query_features", distance_metric, skip_bad_rows, digest)
    if task.leave_one_out and len(bank.rows) < 2:
        raise ValueError("leave_one_out needs a bank of two rows or more that can be compared, got 1")
    return replace(task, bank=bank, queries=queries, fingerprint=digest.hexdigest())


def _checked_values(
    labelled: LabelledRows, name: str, distance_metric: str, skip_bad_rows: bool, digest: Any
) -> LabelledRows:
    needs_direction = distance_metric == "cosine"
    digest.update(str((len(labelled.rows), labelled.rows.dtype)).encode())
    bad = []
    for start, stop in spans(len(labelled.rows), max(1, _CHECKED_BYTES // (4 * labelled.rows.shape[1]))):
        block = read_rows(labelled.rows, start, stop)
        digest.update(_bytes_of(block))
        bad.append(start + _unfit(block, needs_direction))
        if len(bad[-1]) and not skip_bad_rows:
            need = "finite, and not zero under cosine" if needs_direction else "finite"
            row = int(labelled.ids[bad[-1][0]])
            raise ValueError(f"`{name}` must be {need}: row {row} is not: leave it out (label -1) or mend it")
    for told in (labelled.labels, labelled.shares, labelled.groups, labelled.own, labelled.ignored):
        digest.update(b"" if told is None else _bytes_of(told))
    places = np.concatenate(bad)
    if not len(places):
        return labelled
    if len(places) == len(labelled.rows):
        raise ValueError(f"every row of `{name}` is zero or not finite: at least one other is needed")
    kept = np.setdiff1d(np.arange(len(labelled.rows)), places, assume_unique=True)
    return replace(labelled.pick(kept), skipped=len(places))


def _bytes_of(block: npt.NDArray[Any] | Tensor) -> Any:
    if isinstance(block, Tensor):
        block = block.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return np.ascontiguousarray(block).data


def _unfit(block: npt.NDArray[Any] | Tensor, needs_direction: bool) -> Ids:
    """Find the places of rows that are not finite, or zero where that matters."""
    if isinstance(block, Tensor):
        return (~are_comparable(block, normalized=needs_direction)).nonzero()[:, 0].cpu().numpy()
    squares = np.einsum("ij,ij->i", block, block)  # one fast pass clears all rows but those and the over- or underflown
    doubtful = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
    bad: Ids = doubtful[~are_comparable(torch.from_numpy(block[doubtful]), normalized=needs_direction).numpy()]
    return bad


def warning_facts(task: EvalTask, ks: Sequence[int]) -> Checks:
    """Collect what makes a number suspect, as far as the labels show it."""
    bank, queries = task.bank_counts, task.query_counts
    present = bank[bank > 0]
    unseen = (bank == 0) & (queries > 0)
    facts: Checks = {
        "rows_per_class": [int(present.min()), float(present.float().quantile(0.5)), int(present.max())],
        "classes_in_bank": len(present),
        "classes_unseen": task.names_of(unseen.nonzero()[:, 0]),
        "queries_unseen": int(queries[unseen].sum()),
        "majority_baseline": float(queries[bank.argmax()] / len(task.queries.rows)),
        "unlabelled_bank": task.bank.unlabelled,
        "unlabelled_queries": task.queries.unlabelled,
        "skipped_bank": task.bank.skipped,
        "skipped_queries": task.queries.skipped,
        "k_above_bank": [k for k in ks if k > task.reachable],
    }
    if task.leave_one_out and not task.multi_hot:
        facts["lone_queries"] = int((task.relevant_counts == 0).sum())
    return facts


def few_shot_facts(task: EvalTask, per_class: int) -> Checks:
    """Collect what makes few-shot draws from a bank suspect: classes with too few rows."""
    present = task.bank_counts[task.bank_counts > 0]
    return {
        "classes_short": int((present < per_class).sum()),
        "smallest_class": int(present.min()),
        "draws_alike": int(present.max()) <= per_class,
    }
