"""What a bank tells early of the features in it, from a bounded sample of its rows."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.distributed import all_or_none, broadcast_object, gather_rows, rank_and_size
from faiss_knn.measures.alignment import alignment, label_alignment
from faiss_knn.measures.churn import neighbor_churn
from faiss_knn.measures.collapse import collapse_of
from faiss_knn.measures.duplicate_share import duplicate_share
from faiss_knn.measures.effective_rank import effective_rank
from faiss_knn.measures.hubness import k_occurrences, skewness
from faiss_knn.measures.uniformity import uniformity
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.run_memory import LabelledFeatures, RunMemory
from faiss_knn.search.engines.rerank import drop_self
from faiss_knn.search.engines.workers import run_alone
from faiss_knn.search.index import KNNIndex

SAMPLE_ROWS = 2048
NEIGHBORS = 10  # of each row of the sample, as in the literature on hubs, whatever k the vote has
_LOOKED_AT = 256  # rows that a collapse shows in
_KEY_COLUMNS = 32  # at each end of a row, that its key is made of
_KEY_BLOCK = 1 << 16  # rows that get their keys at once
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Diagnostics:
    """Measures the bank of an epoch by the names in `options.diagnostics`.

    A bank of more than 2,048 rows is judged by that many of them. Which, depends on the rows alone, not on their order
    or on the ranks they are on: those with the smallest hashes of the sample ids, so that they are the same samples
    each epoch; without ids, and for copies (which are found only if they are drawn together), of the rows' own numbers.

    Args:
        options: What is asked, and how rows are compared.
        memory: Holds the sample of the validation before.
    """

    def __init__(self, options: OnlineOptions, memory: RunMemory) -> None:
        self._options, self._memory = options, memory

    def values(self, rows: LabelledFeatures) -> dict[str, float]:
        """Measure the bank that all ranks' rows make; all ranks must call it together, and get the same.

        Args:
            rows: What this rank indexes: its own, under gather="shard", or those of all ranks.

        Returns:
            Value by diagnostic; without those that have none, such as the churn of a first validation.
        """
        values: dict[str, float] = {}
        with all_or_none():
            samples = self._samples(rows)
            if rank_and_size()[0] == 0:
                self._warn_of_collapse(rows.features)
                # On one thread: those of a decomposition wait for each other thousands of times, each time as long as
                # another process (a data loader) has the core of one of them.
                values = run_alone(lambda: {name: self._measured(name, sample) for name, sample in samples.items()})
        if not samples:
            return {}
        return {name: value for name, value in broadcast_object(values).items() if not math.isnan(value)}

    def _samples(self, rows: LabelledFeatures) -> Mapping[str, LabelledFeatures]:
        """Draw the sample for each diagnostic."""
        by_row = {name: rows.ids is None or name == "duplicate_share" for name in self._options.diagnostics}
        drawn = {kind: self._drawn(rows, kind, self._options.shards) for kind in sorted(set(by_row.values()))}
        return {name: drawn[kind] for name, kind in by_row.items()}

    def of_views(self, rows: LabelledFeatures) -> float:
        """Return the alignment of two views; all ranks must call it together, and get the same.

        Args:
            rows: This rank's own: of the first view, and of the second in the place of labels.

        Returns:
            NaN without rows.
        """
        with all_or_none():
            sample, value = self._drawn(rows, by_row=rows.ids is None, shards=True), math.nan
            if rank_and_size()[0] == 0 and len(sample.features):
                value = run_alone(lambda: alignment(sample.features, sample.labels))
        return broadcast_object(value)

    def _drawn(self, rows: LabelledFeatures, by_row: bool, shards: bool) -> LabelledFeatures:
        """Return the rows of the smallest keys, over all ranks, the smallest first.

        Args:
            rows: What they are drawn from.
            by_row: Whether keys are those of the rows' numbers.
            shards: Whether the other ranks have others.
        """
        if not shards and rank_and_size()[0] > 0:
            return rows  # rank zero has all of them, and measures
        keys = _row_keys(rows) if by_row or rows.ids is None else _mixed(rows.ids.cpu().numpy())
        own = _smallest(keys)
        sample = _taken(rows, own)
        if not shards:
            return sample
        features, labels = (gather_rows(part)[0] for part in sample[:2])
        ids = None if sample.ids is None else gather_rows(sample.ids)[0]
        of_all = gather_rows(torch.from_numpy(keys[own].view(np.int64)))[0].numpy().view(np.uint64)
        return _taken(LabelledFeatures(features, labels, ids), _smallest(of_all))

    def _measured(self, name: str, sample: LabelledFeatures) -> float:
        """Return the value of one diagnostic; NaN where it has none, which is said once unless it will have."""
        is_first = name == "neighbor_churn" and self._memory.last_sample is None
        value = self._churn(sample) if name == "neighbor_churn" else _MEASURES[name](sample, self._options)
        if math.isnan(value) and not is_first:
            self._memory.warn_once(
                f"diagnostic {name}", f"{self._options.title}: {name} is left out where {_UNDEFINED[name]}"
            )
        return value

    def _churn(self, sample: LabelledFeatures) -> float:
        """Compare the neighbours now with those at the validation before, among the samples that both banks hold."""
        before, self._memory.last_sample = self._memory.last_sample, sample
        if before is None:
            return float("nan")
        ids_before, ids_now = (part.ids.numpy() for part in (before, sample) if part.ids is not None)
        ids, *places = np.intersect1d(ids_before, ids_now, return_indices=True)
        if len(ids) <= NEIGHBORS:
            return float("nan")
        lists = [
            ids[_neighbors(part.features[torch.from_numpy(place)], self._options).numpy()]
            for part, place in zip((before, sample), places, strict=True)
        ]
        return neighbor_churn(ids, lists[0], ids, lists[1])

    def _warn_of_collapse(self, features: Tensor) -> None:
        """Say once per run that the features have collapsed; a few rows show it, at next to no cost."""
        if "collapse" in self._memory.warned or not len(features):
            return
        if what := collapse_of(features[:: -(-len(features) // _LOOKED_AT)]):
            self._memory.warn_once(
                "collapse",
                f"{self._options.title}: the network has collapsed: the features in its bank are {what}, so that their "
                "neighbours say nothing. This is said once per run",
            )


def _effective_rank(sample: LabelledFeatures, _: OnlineOptions) -> float:
    return effective_rank(sample.features)


def _alignment(sample: LabelledFeatures, options: OnlineOptions) -> float:
    directed = sample.features.any(1)
    if sample.labels.ndim > 1 or options.is_regression or not directed.any():
        return float("nan")
    return label_alignment(sample.features[directed], sample.labels[directed])


def _uniformity(sample: LabelledFeatures, _: OnlineOptions) -> float:
    directed = sample.features[sample.features.any(1)]
    return uniformity(directed) if len(directed) > 1 else float("nan")


def _hubness(sample: LabelledFeatures, options: OnlineOptions) -> float:
    rows = len(sample.features)
    if rows <= NEIGHBORS:
        return float("nan")
    return skewness(k_occurrences(_neighbors(sample.features, options), rows))


def _duplicate_share(sample: LabelledFeatures, _: OnlineOptions) -> float:
    return duplicate_share(sample.features)


_MEASURES: dict[str, Callable[[LabelledFeatures, OnlineOptions], float]] = {
    "effective_rank": _effective_rank,
    "alignment": _alignment,
    "uniformity": _uniformity,
    "hubness": _hubness,
    "duplicate_share": _duplicate_share,
}
_UNDEFINED = {
    "alignment": "no class has two rows, or labels are not one class id a row",
    "uniformity": "fewer than two rows have a direction",
    "hubness": f"the bank has no more than {NEIGHBORS} rows",
    "neighbor_churn": f"the samples of two validations have no more than {NEIGHBORS} ids in common",
}


def _neighbors(features: Tensor, options: OnlineOptions) -> Tensor:
    """Find each row's nearest others (n, 10), exactly."""
    neighbors = KNNIndex(distance_metric=options.distance_metric).build(features).search(features, NEIGHBORS + 1)
    return drop_self(*neighbors, torch.arange(len(features)))[1]


def _smallest(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return np.argsort(keys, kind="stable")[:SAMPLE_ROWS]


def _taken(rows: LabelledFeatures, places: npt.NDArray[np.int64]) -> LabelledFeatures:
    """Return some of the rows, on the CPU."""
    at = torch.from_numpy(places)
    features, labels = (part[at.to(part.device)].cpu() for part in rows[:2])
    return LabelledFeatures(features, labels, None if rows.ids is None else rows.ids[at.to(rows.ids.device)].cpu())


def _row_keys(rows: LabelledFeatures) -> npt.NDArray[np.uint64]:
    """Hash rows by their first and last numbers, (n,): the same key wherever a row stands."""
    weights = torch.from_numpy(np.random.default_rng(0).integers(1 << 62, size=2 * _KEY_COLUMNS))
    keys = []
    for block in torch.split(rows.features, _KEY_BLOCK):
        ends = torch.cat([block[:, :_KEY_COLUMNS], block[:, -_KEY_COLUMNS:]], 1) + 0.0  # no -0.0
        bits = ends.view(_BITS[ends.dtype]).long()
        keys.append((bits * weights[: bits.shape[1]].to(bits.device)).sum(1).cpu())  # whole numbers: in any order
    return _mixed(torch.cat(keys).numpy())


def _mixed(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Map whole numbers (n,), one to one, to such as look random (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
