"""Which rows make the bank of a validation epoch: those of all ranks, or this rank's, that can be searched and vote."""

from collections.abc import Mapping

import torch
from torch import Tensor

from faiss_knn.distributed import all_gather_object, all_or_none, gather_rows, rank_and_size
from faiss_knn.online.batch import check_aligned, flat_rows, searchable
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.ring import QueueStorage
from faiss_knn.online.run_memory import LabelledFeatures, RunMemory
from faiss_knn.online.unique_samples import newest_per_id, sample_ids


class BankRows:
    """The rows that a bank is made of, chosen from what each rank has stored of each key.

    Args:
        options: Which keys, how they are gathered, and what a usable row is.
        memory: For what is warned of once.
        stored: What is stored on this rank, by key.

    Attributes:
        skipped: How many of the rows that this rank counts were left out, once they were read.
    """

    def __init__(self, options: OnlineOptions, memory: RunMemory, stored: Mapping[str, QueueStorage]) -> None:
        self._options, self._memory, self._stored = options, memory, stored
        self._lengths: list[list[int]] = []
        self.skipped = 0

    def read(self) -> LabelledFeatures:
        """Return the rows that this rank indexes: its own, or gathered from all ranks; with ids for diagnostics.

        All ranks must call it together.
        """
        gathered = not self._options.shards
        self._lengths = self._shared_lengths()
        rows = {key: self._snapshot(key, gathered) for key in self._options.keys[:2]}
        newest, ids = (None, None) if self._options.id is None else self._newest()
        if newest is not None and gathered:
            newest = gather_rows(newest)[0]
        if not self._options.diagnostics:
            ids = None
        elif ids is not None and gathered:
            ids = gather_rows(ids)[0]
        with all_or_none():
            features, labels, usable = self._usable(rows)
            self._count_skipped(len(usable) - int(usable.sum()), len(usable))
            chosen = usable if newest is None else usable & newest.to(usable.device)
            if chosen.all():
                return LabelledFeatures(features, labels, ids)
            return LabelledFeatures(features[chosen], labels[chosen], None if ids is None else ids[chosen.cpu()])

    def _usable(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (n, d), labels (n,) or (n, C), and (n,) bool: which of them can be searched and vote."""
        options = self._options
        check_aligned(options.title, rows)
        features = options.prepared(flat_rows(rows[options.feature_key]))
        labels = options.read_labels(rows[options.label_key])
        return features, labels, searchable(features, options.is_normalized) & options.is_labelled(labels)

    def read_views(self) -> LabelledFeatures:
        """Return this rank's rows of both keys of features, the second's in the place of labels.

        Those that have a direction under both; with ids the newest of each. All ranks must call it together.
        """
        self._lengths = self._shared_lengths()
        with all_or_none():
            rows = {key: self._snapshot(key, gathered=False) for key in self._options.keys}
            check_aligned(self._options.title, rows)
            first, second = (flat_rows(rows[key]) for key in self._options.keys[:2])
            chosen = (searchable(first, True) & searchable(second, True)).cpu()
            ids = self._ids(rows)
        if ids is not None:
            chosen = _newest_of(ids, chosen)
            ids = ids[chosen]
        return LabelledFeatures(first[chosen.to(first.device)], second[chosen.to(second.device)], ids)

    def _newest(self) -> tuple[Tensor, Tensor]:
        """Tell which of this rank's rows are the newest usable ones of their sample over all ranks, and their ids."""
        with all_or_none():
            rows = {key: self._snapshot(key, gathered=False) for key in self._options.keys}
            usable, ids = self._usable(rows)[2].cpu(), self._ids(rows)
        assert ids is not None
        return _newest_of(ids, usable), ids

    def _ids(self, rows: Mapping[str, Tensor]) -> Tensor | None:
        key = self._options.id
        return None if key is None else sample_ids(rows[key], f"'{key}'")

    def _shared_lengths(self) -> list[list[int]]:
        """Tell how many rows each rank has of each key: a key that is younger than the others has fewer."""
        title, keys, most = self._options.title, self._options.keys, self._options.queue_length
        lengths = all_gather_object([min(len(self._stored[key].ring), most) for key in keys])
        if any(len(set(own)) > 1 for own in lengths):
            self._memory.warn_once(
                "lengths",
                f"{title}: {', '.join(keys)} have {lengths} rows (by rank): the last that all "
                "of them have are used, until the queues have filled again",
            )
        return lengths

    def _snapshot(self, key: str, gathered: bool) -> Tensor:
        """Return the rows of a key that have counterparts under all the others."""
        rows = self._stored[key].snapshot(self._options.queue_length, gathered)
        lengths = self._lengths if gathered else [self._lengths[rank_and_size()[0]]]
        counts = [own[self._options.keys.index(key)] for own in lengths]
        common = [min(own) for own in lengths]
        if counts == common:
            return rows
        parts = zip(torch.split(rows, counts), counts, common, strict=True)
        return torch.cat([part[count - last :] for part, count, last in parts])

    def _count_skipped(self, skipped: int, rows: int) -> None:
        if self._options.shards or rank_and_size()[0] == 0:  # of a gathered bank, one rank counts the rows
            self.skipped = skipped
        if skipped:
            warn_of_skipped(self._options, self._memory, skipped, rows, "bank")


def _newest_of(ids: Tensor, usable: Tensor) -> Tensor:
    """Tell which usable rows are the newest of their sample over all ranks, (n,) bool."""
    newest = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    newest[usable] = newest_per_id(ids[usable])
    return newest


def warn_of_skipped(options: OnlineOptions, memory: RunMemory, skipped: int, rows: int, where: str) -> None:
    """Say once per run that rows were left out of the "bank" or the queries ("query")."""
    memory.warn_once(
        "skipped",
        f"{options.title}: left out {skipped} of {rows} {where} rows: '{options.feature_key}' not finite "
        f"(or zero, under cosine) or '{options.label_key}' -1. All are counted in {options.name}_skipped; "
        "this is said once per run",
    )
