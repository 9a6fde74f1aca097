"""Which samples count: a distributed sampler repeats some to even out the ranks, and a queue holds several epochs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from faiss_knn.distributed import all_or_none, gather_rows, rank_and_size, send_rows, swap_rows


def unpadded_rows(loader: Any, batch_idx: int, rows: int) -> int:
    """Count the leading rows of a batch that are samples of their own, not the padding of a `DistributedSampler`.

    That sampler deals sample p of the (padded) order to rank p mod R: position i of rank r is padding where
    i · R + r is beyond the data set, so that padding ends a rank's rows.

    Args:
        loader: The dataloader that the batch came from.
        batch_idx: Number of the batch on this rank.
        rows: Rows of the batch.

    Returns:
        0 … rows; all of them where the sampler is another, or the batch does not hold one row per sample.
    """
    sampler, batch_size = _sampler(loader)
    if sampler is None or not isinstance(batch_size, int):
        return rows
    start = batch_idx * batch_size
    if rows != min(batch_size, sampler.num_samples - start):
        return rows
    own = -(-(len(sampler.dataset) - sampler.rank) // sampler.num_replicas)  # type: ignore[arg-type]
    return min(max(own - start, 0), rows)


def _sampler(loader: Any) -> tuple[DistributedSampler[Any] | None, int | None]:
    for place in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(place, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return sampler, getattr(place, "batch_size", None)
    return None, None


def check_sample_ids(values: Tensor, what: str) -> None:
    """Check that a batch holds sample ids.

    Raises:
        ValueError: If they are not one integer per row.
    """
    if len(values) == 0:
        return  # of a queue that is empty still, nothing told the dtype
    if values.is_floating_point() or values.is_complex() or values.numel() != len(values):
        raise ValueError(
            f"{what} must hold one integer id per row, got {values.dtype} of shape {tuple(values.shape)}: "
            "number the samples, e.g. by their index in the data set"
        )


def sample_ids(values: Tensor, what: str) -> Tensor:
    """Return (n,) int64 sample ids on the CPU from what a batch holds.

    Raises:
        ValueError: If they are not one integer per row.
    """
    check_sample_ids(values, what)
    return values.detach().reshape(-1).long().cpu()


def newest_per_id(ids: Tensor) -> Tensor:
    """Tell which of this rank's rows are the newest of their id over all ranks; every rank must ask.

    Each id is decided on one rank (id mod ranks), so that no rank holds the ids of all. Of equally new rows the one
    of the lowest rank counts.

    Args:
        ids: (n,) int64 on the CPU, oldest row first.

    Returns:
        (n,) bool.

    Example:
        >>> newest_per_id(torch.tensor([7, 8, 7]))
        tensor([False,  True,  True])
    """
    _, size = rank_and_size()
    with all_or_none():
        ages = torch.arange(len(ids) - 1, -1, -1, device=ids.device)
        owners, order = ids.remainder(size).sort(stable=True)
        sent = owners.bincount(minlength=size).tolist()
        records, came = send_rows(torch.stack([ids, ages], 1)[order], sent)
        decided = swap_rows(_first_per_id(*records.unbind(1)), came, sent)
        return torch.empty_like(decided).scatter_(0, order, decided)


def _first_per_id(ids: Tensor, ages: Tensor) -> Tensor:
    by_age = ages.argsort(stable=True)
    order = by_age[ids[by_age].argsort(stable=True)]
    first = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    first[1:] = ids[order][1:] != ids[order][:-1]
    return torch.empty_like(first).scatter_(0, order, first)


class UniqueSamples:
    """Let the rows of a dataloader through once per sample id, over all ranks.

    Padding ends a rank's rows, so the last batch is held back until `finish`, where the ranks compare what they
    counted; nothing else travels, and no batch waits for another rank.

    Example:
        >>> samples, counted = UniqueSamples(), []
        >>> samples.add(torch.tensor([4, 5]), lambda new: counted.append(new.tolist()))
        >>> samples.add(torch.tensor([5, 6]), lambda new: counted.append(new.tolist()))
        >>> samples.finish()
        >>> counted
        [[True, True], [False, True]]
    """

    def __init__(self) -> None:
        self._counted: set[int] = set()
        self._last_batch: tuple[list[int], Tensor, Callable[[Tensor], None]] | None = None

    def add(self, ids: Tensor, count: Callable[[Tensor], None]) -> None:
        """Take a batch in: `count(mask)` is called later, with the (n,) bool mask of the rows that count."""
        self._let_through()
        new = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        first_seen: list[int] = []
        for row, sample in enumerate(ids.tolist()):
            if sample not in self._counted and sample not in first_seen:
                new[row] = True
                first_seen.append(sample)
        self._last_batch = (first_seen, new, count)

    def finish(self) -> None:
        """Settle the last batches; every rank must call it."""
        with all_or_none():
            self._settle()

    def _settle(self) -> None:
        first_seen, new, _ = self._last_batch or ([], torch.zeros(0, dtype=torch.bool, device="cpu"), None)
        rank, _ = rank_and_size()
        last, counts = gather_rows(torch.tensor(first_seen, dtype=torch.int64, device="cpu"))
        counted_here = torch.tensor(
            [sample in self._counted for sample in last.tolist()], dtype=torch.bool, device="cpu"
        )
        counted = gather_rows(counted_here[None])[0].any(0)
        start = sum(counts[:rank])
        on_lower_ranks = set(last[:start].tolist())
        once = [not (counted[start + i] or sample in on_lower_ranks) for i, sample in enumerate(first_seen)]
        new[new.clone()] = torch.tensor(once, dtype=torch.bool, device="cpu")
        self._let_through()

    def _let_through(self) -> None:
        if self._last_batch is not None:
            first_seen, new, count = self._last_batch
            count(new)
            self._counted.update(first_seen)
        self._last_batch = None
