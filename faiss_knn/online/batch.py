"""What a step gives: its tensors by their keys, and which rows of a batch are searched and counted."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor

from faiss_knn.classify.labels import is_soft, most_likely
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.unique_samples import sample_ids, unpadded_rows
from faiss_knn.search.inputs import are_comparable

_BLOCK_ELEMENTS = 1 << 22  # of temporaries while a bank is looked through
_OURS = "_faiss_knn_predictions"  # marks predictions: a batch that is handed out again still holds them


def find_tensor(key: str, outputs: Any, batch: Any, caller: str) -> Tensor:
    """Return `outputs[key]` if there, else `batch[key]`.

    Raises:
        ValueError: If neither has the key, or what it names is not a tensor with a batch dimension.
    """
    for place in (outputs, batch):
        if isinstance(place, Mapping) and key in place:
            return _batched(place[key], key, caller)
    message = (
        f"{caller}: Key '{key}' not found in batch or outputs. "
        f"Available batch keys: {_keys(batch)}, Available output keys: {_keys(outputs)}"
    )
    logger.warning(message)
    raise ValueError(message)


def find_rows(options: OnlineOptions, outputs: Any, batch: Any) -> dict[str, Tensor]:
    """Return the tensors of a step that `options` names, by key: a row of each per sample.

    Raises:
        ValueError: As `find_tensor`, or if they differ in length.
    """
    rows = {key: find_tensor(key, outputs, batch, options.name) for key in options.keys}
    check_aligned(options.title, rows)
    return rows


def check_aligned(title: str, rows: Mapping[str, Tensor]) -> None:
    """Check that every tensor has as many rows as the others.

    Raises:
        ValueError: If not, with their shapes.
    """
    shapes = {key: tuple(values.shape) for key, values in rows.items()}
    if len({shape[0] for shape in shapes.values()}) > 1:
        described = " and ".join(f"'{key}' of shape {shape}" for key, shape in shapes.items())
        raise ValueError(
            f"{title}: one step must give as many features as labels, got {described}: "
            "repeat the labels once per view, or keep one view's features"
        )


def was_skipped(pl_module: Any, outputs: Any) -> bool:
    """Tell whether `training_step` returned None, which Lightning takes as "skip this batch".

    Under automatic optimization any other return leaves at least the loss in the outputs.
    """
    return not outputs and getattr(pl_module, "automatic_optimization", False) is True


def flat_rows(values: Tensor) -> Tensor:
    """View (n, ...) as (n, d); a 1-D tensor as (n, 1)."""
    return values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)


def searchable(rows: Tensor, normalized: bool) -> Tensor:
    """Tell which rows have a distance to others.

    Args:
        rows: (n, d) of any float dtype.
        normalized: Whether rows are compared by direction, which a zero row does not have.

    Returns:
        (n,) bool: False for rows with a value that float32 does not hold as a finite number, and for such zero rows.
    """
    parts = torch.split(rows, max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1])))
    return torch.cat([are_comparable(part.float(), normalized=normalized) for part in parts])


class BatchSelection(NamedTuple):
    """Which of a batch's B rows are searched and counted.

    A slice where it says all: to pick rows by a mask, a GPU is waited for.

    Attributes:
        highest: The highest label, or of (B, C) the last column; -1 in an empty batch.
        skipped: How many of the sampler's own rows are not counted.
        searched: The rows that have a distance to others, (B,) bool or all.
        counted: Those that the metrics count, (B,) bool or the first ones.
    """

    highest: int
    skipped: int
    searched: Tensor | slice
    counted: Tensor | slice


def select(options: OnlineOptions, queries: Tensor, labels: Tensor, own: int) -> BatchSelection:
    """Look through a batch, and wait for a GPU once.

    Args:
        options: How rows are compared, and what their labels are.
        queries: (B, d).
        labels: (B,) or (B, C).
        own: How many leading rows are samples of their own, not a sampler's padding.
    """
    if len(labels) == 0:
        return BatchSelection(-1, 0, slice(None), slice(0))
    searched = searchable(queries, options.is_normalized)
    counted = searched & options.is_labelled(labels)
    of_ids = labels.ndim == 1 and not options.is_regression
    last = 0 if labels.ndim == 1 else labels.shape[1] - 1
    highest = labels.amax() if of_ids else torch.full((), last, device=labels.device)
    most, searched_rows, counted_rows = torch.stack([highest, searched.sum(), counted[:own].sum()]).tolist()
    if searched_rows < len(queries) or counted_rows < own:
        counted[own:] = False
        comparable = slice(None) if searched_rows == len(queries) else searched
        return BatchSelection(most, own - counted_rows, comparable, counted)
    return BatchSelection(most, 0, slice(None), slice(own))


@dataclass
class BatchQueries:
    """What a validation batch of B rows asks.

    Attributes:
        queries: (n, d), those that are searched.
        labels: (B,) or (B, C), such as a metric can judge.
        ids: (B,) sample ids on the CPU, if they count.
        place: Where the predictions go: the batch, or the outputs where that is no mapping; None where neither is.
        key: What they are called there.
        own: How many leading rows are samples of their own, not a sampler's padding.
        selection: Which rows are searched and counted.
    """

    queries: Tensor
    labels: Tensor
    ids: Tensor | None
    place: MutableMapping[str, Any] | None
    key: str
    own: int
    selection: BatchSelection

    def counted_of(self, new: Tensor) -> Tensor:
        """Return those of the counted rows that `new` (B,) bool holds too, (B,) bool."""
        new, counted = new.to(self.labels.device), self.selection.counted
        return new if isinstance(counted, slice) else counted & new

    def among_searched(self, rows: Tensor | slice) -> Tensor | slice:
        """Return rows that were searched, by their place among those that were."""
        searched = self.selection.searched
        return rows if isinstance(searched, slice) else rows[searched]  # type: ignore[index]

    def hand_out(self, predictions: Tensor) -> None:
        """Put predictions (B, C) where the batch's owner finds them."""
        if self.place is not None:
            self.place[self.key] = predictions
            vars(predictions)[_OURS] = True


def read_batch(options: OnlineOptions, outputs: Any, batch: Any, dataloader: Any, batch_idx: int) -> BatchQueries:
    """Read what a validation step gave.

    Args:
        options: Which tensors, and how they are compared.
        outputs: What the step returned.
        batch: What it was given.
        dataloader: Where the batch came from: its sampler may have padded it.
        batch_idx: Number of the batch in it, on this rank.

    Raises:
        ValueError: As `find_rows`, for bad labels or ids, or where the predictions' key is taken.
    """
    place = next((place for place in (batch, outputs) if isinstance(place, MutableMapping)), None)
    key = f"{options.name}_preds"
    if place is not None and key in place and not _is_ours(place[key]):
        raise ValueError(f"Key '{key}' already exists in batch")
    rows = find_rows(options, outputs, batch)
    queries = options.prepared(flat_rows(rows[options.feature_key]))
    labels = options.read_labels(rows[options.label_key])
    if is_soft(labels) and not options.is_regression:
        labels = most_likely(labels)  # what a metric can judge; neighbours vote by their shares
    # Where ids tell the samples apart, padding is known by them.
    own = len(labels) if options.id is not None else unpadded_rows(dataloader, batch_idx, len(labels))
    selection = select(options, queries, labels, own)
    options.check_label(selection.highest)
    ids = None if options.id is None else sample_ids(rows[options.id], f"'{options.id}'")
    return BatchQueries(queries[selection.searched], labels, ids, place, key, own, selection)


def _is_ours(value: object) -> bool:
    """Tell whether what a batch holds are predictions of an earlier run, also of another trainer's."""
    return isinstance(value, Tensor) and _OURS in vars(value)


def _batched(value: Any, key: str, caller: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: '{key}' must be a tensor with one row per sample, got {what}")
    return value


def _keys(place: Any) -> list[Any] | None:
    return list(place.keys()) if isinstance(place, Mapping) else None
