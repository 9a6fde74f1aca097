"""What is evaluated: labelled bank and query rows, checked, with their classes numbered; and what makes it suspect."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.offline.rows import Rows, Subset, read_rows, spans

Ids = npt.NDArray[np.int64]
ArrayLike = Any

_CHECKED_BYTES = 64 << 20


@dataclass(frozen=True)
class Side:
    """Labelled rows.

    Attributes:
        rows: (n, d), those that have a label.
        labels: (n,) int64 class ids, or (n, C) int64 multi-hot.
        ids: (n,) row numbers in what the caller gave, ascending.
        unlabelled: How many rows were left out.
    """

    rows: Rows
    labels: Tensor
    ids: Ids
    unlabelled: int

    def pick(self, places: Ids) -> "Side":
        """Some of the rows, by ascending place."""
        chosen = torch.from_numpy(places)
        return replace(self, rows=Subset(self.rows, places), labels=self.labels[chosen], ids=self.ids[places])


@dataclass(frozen=True)
class Problem:
    """A bank, the queries that it classifies, and the classes.

    With `leave_one_out` the queries are the bank's own rows, and none is its own neighbour.
    """

    bank: Side
    queries: Side
    num_classes: int
    class_names: list[str] | None
    leave_one_out: bool

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
        return len(self.bank.rows) - self.leave_one_out

    def name(self, label: int) -> str:
        """What a class is called."""
        return self.class_names[label] if self.class_names else str(label)

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
        """(Q,) bank rows of the query's class, itself not counted; for single labels."""
        return self.bank_counts[self.queries.labels] - int(self.leave_one_out)

    @cached_property
    def fingerprint(self) -> str:
        """Tells data apart, from the labels and 1,000 rows of each side."""
        digest = sha256(str((self.bank.rows.shape, self.queries.rows.shape, self.leave_one_out)).encode())
        for side in (self.bank, self.queries):
            digest.update(side.labels.numpy().tobytes())
            places = np.unique(np.linspace(0, len(side.rows) - 1, 1000).astype(np.int64))
            block = read_rows(side.pick(places).rows)
            digest.update(np.ascontiguousarray(block.cpu() if isinstance(block, Tensor) else block).tobytes())
        return digest.hexdigest()[:16]

    def few_shot(self, per_class: int, seed: int) -> "Problem":
        """The same queries before a bank of `per_class` rows drawn from each class, or all of a smaller class."""
        order = np.random.default_rng(seed).permutation(len(self.bank.rows))
        labels = self.bank.labels.numpy()[order]
        by_class = np.argsort(labels, kind="stable")
        first = np.searchsorted(labels[by_class], labels[by_class])  # where the class begins in the sorted order
        drawn = order[by_class[np.arange(len(labels)) - first < per_class]]
        return replace(self, bank=self.bank.pick(np.sort(drawn)))

    def _counts(self, labels: Tensor) -> Tensor:
        return labels.sum(0) if labels.ndim == 2 else torch.bincount(labels, minlength=self.num_classes)


def make_problem(
    bank_features: Rows,
    bank_labels: ArrayLike,
    query_features: Rows | None,
    query_labels: ArrayLike | None,
    *,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    leave_one_out: bool,
) -> Problem:
    """Check both sides and number the classes. Labels that are names are numbered in their sorted order.

    Raises:
        ValueError: If shapes or kinds do not fit, a label is out of range, or nothing is labelled.
    """
    _check_sides(query_features, query_labels, leave_one_out)
    if query_features is None or query_labels is None:
        query_features, query_labels = bank_features, bank_labels
    bank_features, query_features = _rows(bank_features), _rows(query_features)
    _check_rows(bank_features, query_features)
    found, names = _numbered([_array(bank_labels, "bank_labels"), _array(query_labels, "query_labels")], class_names)
    bank = _side(bank_features, found[0], "bank")
    queries = bank if leave_one_out else _side(query_features, found[1], "query")
    if bank.labels.ndim != queries.labels.ndim:
        raise ValueError("`bank_labels` and `query_labels` must be of one kind: class ids, or multi-hot")
    count = _class_count(bank.labels, queries.labels, num_classes, names)
    if leave_one_out and len(bank.rows) < 2:
        raise ValueError("leave_one_out needs a bank of two labelled rows or more, got 1")
    return Problem(bank, queries, count, names, leave_one_out)


def _check_sides(query_features: Rows | None, query_labels: ArrayLike | None, leave_one_out: bool) -> None:
    given = query_features is not None or query_labels is not None
    if leave_one_out and given:
        raise ValueError("leave_one_out takes the bank alone, its rows are the queries: leave out the queries")
    if not leave_one_out and (query_features is None or query_labels is None):
        raise ValueError("`query_features` and `query_labels` are needed, or leave_one_out=True to use the bank's rows")


def _rows(features: Any) -> Rows:
    found: Rows = np.asarray(features) if isinstance(features, (list, tuple)) else features
    return found


def _check_rows(bank: Rows, queries: Rows) -> None:
    for name, rows in (("bank_features", bank), ("query_features", queries)):
        if len(rows.shape) != 2 or 0 in rows.shape:
            raise ValueError(f"`{name}` must be (N, d) with at least one row, got shape {tuple(rows.shape)}")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"`query_features` must have the bank's dimension {bank.shape[1]}, got {queries.shape[1]}: "
            "take both from the same model"
        )


def _array(labels: ArrayLike, name: str) -> npt.NDArray[Any]:
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.ndim not in (1, 2) or found.dtype.kind not in "iubU":
        raise ValueError(
            f"`{name}` must be (N,) class ids or names, or (N, C) multi-hot integers, got shape {found.shape}, "
            f"{found.dtype}"
        )
    return found


def _numbered(
    labels: list[npt.NDArray[Any]], class_names: Sequence[str] | None
) -> tuple[list[Tensor], list[str] | None]:
    names = None if class_names is None else [str(name) for name in class_names]
    words = [array.dtype.kind == "U" for array in labels]
    if not any(words):
        return [torch.from_numpy(array.astype(np.int64)) for array in labels], names
    if not all(words):
        raise ValueError("`bank_labels` and `query_labels` must both be class ids or both be names")
    names = names or [str(name) for name in np.unique(np.concatenate(labels))]
    number = {name: i for i, name in enumerate(names)}
    unknown = next((str(word) for array in labels for word in np.unique(array) if str(word) not in number), None)
    if unknown is not None:
        raise ValueError(f"label {unknown!r} is not among the class names, {names[:3]} ({len(names)} of them)")
    return [
        torch.tensor([number[str(word)] for word in array], dtype=torch.int64, device="cpu") for array in labels
    ], names


def _side(rows: Rows, labels: Tensor, name: str) -> Side:
    argument = f"{name}_labels"
    if len(labels) != len(rows):
        raise ValueError(f"`{argument}` must have one entry per row, {len(rows)}, got {len(labels)}")
    if int(labels.min()) < -1 or (labels.ndim == 2 and int(labels.max()) > 1):
        need = "class ids from 0, or -1 for unlabelled rows" if labels.ndim == 1 else "0 and 1, or -1 for unlabelled"
        wrong = int(labels.min()) if int(labels.min()) < -1 else int(labels.max())
        raise ValueError(f"`{argument}` must be {need}, got {wrong}")
    labelled = labels >= 0 if labels.ndim == 1 else (labels >= 0).all(1)
    ids = labelled.nonzero()[:, 0].numpy()
    if not len(ids):
        raise ValueError(f"every entry of `{argument}` is -1: at least one labelled row is needed")
    left_out = len(labels) - len(ids)
    return Side(Subset(rows, ids) if left_out else rows, labels[labelled], ids, left_out)


def _class_count(bank: Tensor, queries: Tensor, num_classes: int | None, names: list[str] | None) -> int:
    if bank.ndim == 2 and bank.shape[1] != queries.shape[1]:
        raise ValueError(f"`query_labels` must have the bank's {bank.shape[1]} columns, got {queries.shape[1]}")
    seen = bank.shape[1] if bank.ndim == 2 else int(max(bank.max(), queries.max())) + 1
    count = num_classes if num_classes is not None else max(seen, len(names or []))
    if count < seen or (bank.ndim == 2 and count != seen):
        raise ValueError(f"num_classes={count} does not fit the labels, which need {seen}: give num_classes={seen}")
    if names is not None and len(names) < count:
        raise ValueError(f"`class_names` must name all {count} classes, got {len(names)}")
    return count


def check_values(problem: Problem, distance_metric: str) -> None:
    """Look at every number once, before an hour of searching.

    Raises:
        ValueError: If a row is not finite, or zero under cosine, naming the row as the caller numbers it.
    """
    sides = {"bank_features": problem.bank} | ({} if problem.leave_one_out else {"query_features": problem.queries})
    for name, side in sides.items():
        for start, stop in spans(len(side.rows), max(1, _CHECKED_BYTES // (4 * problem.dim))):
            block = read_rows(side.rows, start, stop)
            bad = _unfit(block, distance_metric == "cosine")
            if len(bad):
                row = int(side.ids[start + bad[0]])
                need = "finite, and not zero under cosine" if distance_metric == "cosine" else "finite"
                raise ValueError(f"`{name}` must be {need}: row {row} is not: leave it out (label -1) or mend it")


def _unfit(block: npt.NDArray[Any] | Tensor, needs_direction: bool) -> Ids:
    """Places of rows that are not finite, or zero where that matters."""
    if isinstance(block, Tensor):
        largest = block.abs().amax(1).cpu().numpy()
        return np.flatnonzero(~np.isfinite(largest) | ((largest == 0) & needs_direction))
    squares = np.einsum("ij,ij->i", block, block)  # one fast pass clears all rows but those and the over- or underflown
    doubtful = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
    largest = np.abs(block[doubtful]).max(1, initial=0)  # NaN and inf stay in a maximum
    bad: Ids = doubtful[~np.isfinite(largest) | ((largest == 0) & needs_direction)]
    return bad


def suspicions(problem: Problem, ks: Sequence[int]) -> dict[str, Any]:
    """What makes a number suspect, as far as the labels show it.

    Returns:
        `rows_per_class` (least, median, most, over classes in the bank), `classes_in_bank`, `classes_unseen` (query
        classes without bank rows), `queries_unseen` (queries of those), `majority_baseline` (top-1 of always
        answering with the bank's commonest class), `unlabelled_bank`, `unlabelled_queries`, `k_above_bank`; with
        leave-one-out, `lone_queries` (whose class has no other row).
    """
    bank, queries = problem.bank_counts, problem.query_counts
    present = bank[bank > 0]
    unseen = (bank == 0) & (queries > 0)
    found: dict[str, Any] = {
        "rows_per_class": [int(present.min()), float(present.float().quantile(0.5)), int(present.max())],
        "classes_in_bank": len(present),
        "classes_unseen": [problem.name(int(i)) for i in unseen.nonzero()[:, 0]],
        "queries_unseen": int(queries[unseen].sum()),
        "majority_baseline": float(queries[bank.argmax()] / len(problem.queries.rows)),
        "unlabelled_bank": problem.bank.unlabelled,
        "unlabelled_queries": problem.queries.unlabelled,
        "k_above_bank": [k for k in ks if k > problem.reachable],
    }
    if problem.leave_one_out and not problem.multi_hot:
        found["lone_queries"] = int((problem.relevant_counts == 0).sum())
    return found
