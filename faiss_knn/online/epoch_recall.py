"""The recall of an approximate index on an epoch's own queries: a sample of them is searched exactly too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from faiss_knn.distributed import all_gather_object, all_or_none, rank_and_size
from faiss_knn.online.epoch_bank import EpochBank
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.run_memory import RunMemory
from faiss_knn.search.engines.recall_sample import recall_by_query
from faiss_knn.search.sharded import ShardedIndex

_EXPECTED_BATCHES = 8  # over which queries are drawn where their number is not known
_TUNED_RECALL, _PLAIN_RECALL, _RECALL_LEEWAY = 0.99, 0.9, 0.02  # below which a recall is warned of


class EpochRecall:
    """Queries drawn from those of an epoch, spread over it where its length is known.

    Args:
        options: How many are drawn, over all ranks.
        bank: Whose recall is measured.
        expected_queries: About how many this rank's epoch will have; None: not known.
    """

    def __init__(self, options: OnlineOptions, bank: EpochBank, expected_queries: int | None) -> None:
        self._options, self._bank = options, bank
        self._drawn: list[Tensor] = []
        self._seen = 0
        self._sample_size = -(-options.recall_queries // rank_and_size()[1])
        if len(bank.index) == 0 or bank.index.stats.exact:
            self._sample_size = 0
        self._step = max(1, (expected_queries or self._sample_size * _EXPECTED_BATCHES) // max(1, self._sample_size))

    def draw(self, queries: Tensor) -> None:
        """Keep every so many of the queries (n, d)."""
        if self._sample_size == 0:
            return
        first = -self._seen % self._step
        self._seen += len(queries)
        drawn = queries[first :: self._step][: self._sample_size - sum(map(len, self._drawn))]
        if len(drawn):
            self._drawn.append(drawn.clone())

    def recall(self) -> float | None:
        """Return the share of exact neighbours found, over all ranks; None for an exact index.

        Without queries to draw (recall_queries=0) it is what the ranks measured when they built their index.
        """
        index = self._bank.index
        exact = index.stats.exact if len(index) else True
        if self._options.recall_queries == 0:
            return _weighted_mean(all_gather_object((len(index), None if exact else index.stats.recall)))
        if all(all_gather_object(exact)):
            return None
        queries = torch.cat(self._drawn) if self._drawn else None
        return _weighted_mean(all_gather_object(self._measured(queries)))

    def _measured(self, queries: Tensor | None) -> tuple[int, float | None]:
        """Return how many queries this rank measured, and their recall."""
        most = max(self._options.ks)
        if not self._options.shards:
            with all_or_none():
                return (0, None) if queries is None else (len(queries), self._bank.index.measure_recall(queries, most))
        exact = ShardedIndex(self._options.new_index("flat"))
        ids = self._bank.bank.find(queries, most).indices
        truth = exact.build(self._bank.features).search(queries, most).indices
        shares = recall_by_query(ids, truth)
        return len(shares), float(shares.mean()) if len(shares) else None


def warn_of_recall(options: OnlineOptions, memory: RunMemory, recall: float) -> None:
    """Say once per run that an index finds too little for its score to be trusted."""
    is_tuned = options.target_recall is not None or options.index in ("fast", "ivf", "auto")
    needed = options.target_recall or (_TUNED_RECALL if is_tuned else _PLAIN_RECALL)
    if recall < needed - _RECALL_LEEWAY:
        memory.warn_once(
            "recall",
            f"{options.title}: index={options.index!r} found {recall:.3f} of the exact neighbours: the score "
            + ("may be too low: its next build is tuned on the queries asked" if is_tuned else "may be too low")
            + "; index='flat' finds all",
        )


def _weighted_mean(reports: Sequence[tuple[int, float | None]]) -> float | None:
    """Return the mean of what ranks measured, each by its count; None if none did."""
    measured = [(count, value) for count, value in reports if value is not None and count]
    total = sum(count for count, _ in measured)
    return sum(count * value for count, value in measured) / total if total else None
