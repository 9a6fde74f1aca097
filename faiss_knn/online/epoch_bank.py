"""The bank of a validation epoch: the index over its rows, and what lets them vote."""

from typing import Any

from torch import Tensor

from faiss_knn.classify.bank import FeatureBank, VotingBank
from faiss_knn.classify.sharded import ShardedBank
from faiss_knn.distributed import all_gather_object, all_or_none, broadcast_object
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.run_memory import RunMemory
from faiss_knn.search.index import KNNIndex, TooFewRowsError
from faiss_knn.search.inputs import named_as_index


class EpochBank:
    """A bank over the rows of all ranks, or over this rank's rows as one of the ranks' shards.

    All ranks make it together; without rows on any rank there is no bank.

    Args:
        options: How it is indexed.
        memory: Whose index is used, with what it learned from banks before.
        features: (n, d) that this rank indexes.
        labels: Theirs, (n,) or (n, C).
        expected_queries: About how many queries will be searched, over all ranks; None: not known.

    Attributes:
        bank: Finds neighbours and lets them vote.
        index: What searches: the run's, or an exact one while there are too few rows for that.
        features: As given.
    """

    def __init__(
        self, options: OnlineOptions, memory: RunMemory, features: Tensor, labels: Tensor, expected_queries: int | None
    ) -> None:
        self._options, self._memory = options, memory
        self.index, self.features, self._labels = memory.index, features, labels
        of_rank = options.width_of(labels)
        seen = max(all_gather_object(of_rank)) if options.shards else of_rank
        if options.known_width is None and not options.is_regression:
            memory.warn_once(
                "width",
                f"{options.title}: inferring num_classes={seen} from the labels in the bank. "
                "Give num_classes to keep the width of the scores the same in every run.",
            )
        self._hints: dict[str, Any] = {
            "num_classes": options.score_width(seen, memory.width),
            "expected_k": max(options.ks),
            "task": "regression" if options.is_regression else "classification",
        }
        self.bank: VotingBank = self._sharded() if options.shards else self._replicated(expected_queries)

    def _replicated(self, expected_queries: int | None) -> FeatureBank:
        """Index the rows of all ranks, as rank zero chooses to."""
        self._hints["expected_queries"] = expected_queries
        with all_or_none():
            try:
                bank = self._indexed()
            except TooFewRowsError as error:
                self.index = self._exact_for_now(error)
                bank = self._indexed()
        # Other processors or thread counts may choose otherwise for the same bank.
        choice = self.index.stats.spec, self.index.stats.nprobe
        of_rank_zero = broadcast_object(choice)
        with all_or_none():
            if of_rank_zero != choice:
                self._memory.index = self.index = self._options.new_index(*of_rank_zero)
                bank = self._indexed()
        return bank

    def _indexed(self) -> FeatureBank:
        with named_as_index():
            return FeatureBank(self.features, self._labels, index=self.index, **self._hints)

    def _sharded(self) -> ShardedBank:
        """Index this rank's rows; exactly on all ranks, where one of them has too few for the index asked for."""
        failure: TooFewRowsError | None = None
        with all_or_none(), named_as_index():
            try:
                if len(self.features):
                    self.index.build(self.features, expected_k=self._hints["expected_k"])
            except TooFewRowsError as error:
                failure = error
        has_failed = any(all_gather_object(failure is not None))
        if has_failed:
            self.index = self._exact_for_now(failure)
        return ShardedBank(self.features, self._labels, index=self.index, is_built=not has_failed, **self._hints)

    def _exact_for_now(self, why: Exception | None) -> KNNIndex:
        """Return an exact index, which any number of rows is enough for."""
        options = self._options
        self._memory.warn_once(
            "few",
            f"{options.title}: searches exactly until there are rows enough for index={options.index!r} ({why})",
        )
        return options.new_index("flat")
