"""One validation epoch, without Lightning: a bank is built, each batch searched and voted on, metrics are computed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.nn.functional import pad

from faiss_knn.distributed import all_gather_object, all_or_none, is_final, raise_together, rank_and_size
from faiss_knn.online.bank_rows import BankRows, warn_of_skipped
from faiss_knn.online.batch import BatchQueries, find_rows, find_tensor, read_batch
from faiss_knn.online.clock import Clock
from faiss_knn.online.collected_queries import CollectedQueries, dealt_out, queries_of
from faiss_knn.online.diagnostics import Diagnostics
from faiss_knn.online.epoch_bank import EpochBank
from faiss_knn.online.epoch_recall import EpochRecall, warn_of_recall
from faiss_knn.online.gallery import Gallery, check_images
from faiss_knn.online.metrics import MetricTable
from faiss_knn.online.number_metrics import NumberTable
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.ring import QueueStorage
from faiss_knn.online.run_memory import RunMemory
from faiss_knn.online.standard_errors import WITH_ERRORS
from faiss_knn.online.unique_samples import UniqueSamples, unpadded_rows


@dataclass(frozen=True)
class Plan:
    """What a validation will read.

    Attributes:
        dataloaders: In order; None where several are read at once under one number.
        batches: How many batches of each this rank will see; inf where that is not known.
        is_rehearsal: Whether this is a check before training, of which an empty bank is nothing to warn of.
    """

    dataloaders: Sequence[Any]
    batches: Sequence[float]
    is_rehearsal: bool = False

    def query_count(self, scored: Sequence[int]) -> int | None:
        """Return about how many rows the scored dataloaders will give; None where that is not known."""
        rows = 0.0
        for number in scored:
            size = getattr(self.dataloaders[number], "batch_size", None)
            rows += size * self.batches[number] if isinstance(size, int) else float("inf")
        return None if rows == float("inf") else int(rows)


class Evaluation:
    """One validation epoch. All ranks go through the same steps of it: made, `add` per batch, `finish`.

    An error of one of several ranks waits for the next step that they make together, where all raise it: raised at
    once it would leave the others waiting there.

    Args:
        options: What is scored, and how.
        memory: What earlier validations left.
        plan: What will be read.
        device: Where metrics keep their states, and values are returned.
        stored: The rows of the bank on this rank, by key; None: those that a dataloader will give, under
            `options.bank_dataloader_idx`.

    Attributes:
        stored: The rows of the bank, as given or as they come.

    Raises:
        ValueError: If the ranks cannot know how often each of them will search.
    """

    def __init__(
        self,
        options: OnlineOptions,
        memory: RunMemory,
        plan: Plan,
        device: torch.device,
        stored: Mapping[str, QueueStorage] | None,
    ) -> None:
        self._options, self._memory, self._plan, self._device = options, memory, plan, device
        self._clock = Clock(device, options.seconds or bool(options.verbose))
        scored = [i for i in range(len(plan.batches)) if i != options.bank_dataloader_idx]
        self._table = (
            NumberTable(options.metrics, options.ks, scored)
            if options.is_regression
            else MetricTable(options.metrics, options.ks, scored, device)
        )
        self._unique = {i: UniqueSamples() for i in scored} if options.id is not None else {}
        self._most_searches = self._count_searches({i: plan.batches[i] for i in scored})
        self._searches = 0
        self._expected_queries = plan.query_count(scored)
        self.stored = stored or {key: QueueStorage(options.new_ring(key, device)) for key in options.keys}
        self._collected = CollectedQueries()
        shows = options.gallery is not None and not plan.is_rehearsal and rank_and_size()[0] == 0
        self._gallery = Gallery(options.gallery.rows) if shows else None
        self._bank: EpochBank | None = None
        self._is_built = False
        self._width = self._skipped = 0
        self._error: Exception | None = None
        if stored is not None:
            self._build()

    def _count_searches(self, batches: Mapping[int, float]) -> int:
        """Count the batches of the rank with the most of them: ranks with shards all search as often as that.

        Under search="epoch" they count at its end.
        """
        if not self._options.shards or self._options.search == "epoch":
            return 0
        most = max(all_gather_object(sum(batches.values())))
        if most == float("inf"):
            raise ValueError(
                f"{self._options.title}: gather='shard' needs validation dataloaders with a length, got "
                f"{batches} batches by dataloader: ranks that cannot know how often the others search would hang; "
                "use gather='replicate', or search='epoch'"
            )
        return int(most)

    @contextmanager
    def defer_error(self) -> Iterator[None]:
        """Keep an error of one of several ranks for the end of the epoch, where all ranks raise it.

        What all ranks have heard of already, in a search that they make together, or what parted them, ends the epoch
        at once.
        """
        try:
            yield
        except Exception as error:
            rank, size = rank_and_size()
            if size == 1 or is_final(error):
                raise
            logger.error(f"rank {rank} stops scoring, and all ranks stop when they meet next: {error}")
            self._error = self._error or error

    def _build(self) -> None:
        """Make the bank from every rank's rows; every rank must call it at the same point."""
        self._is_built = True
        with all_or_none():
            raise_together(self._error)
            with self._clock.measure("build"):
                self._make_bank()

    def _make_bank(self) -> None:
        options, chosen = self._options, BankRows(self._options, self._memory, self.stored)
        self._rows = chosen.read()
        features, labels, _ = self._rows
        self._skipped += chosen.skipped
        rows = sum(all_gather_object(len(labels))) if options.shards else len(labels)
        if rows == 0:
            if not self._plan.is_rehearsal:
                self._memory.warn_once("empty", f"! {options.name}: queue data is empty, skipping KNN computation")
            return
        self._bank = EpochBank(options, self._memory, features, labels, self._expected_queries)
        self._sample = EpochRecall(options, self._bank, self._expected_queries)
        if options.verbose and rank_and_size()[0] == 0 and len(self._bank.index):
            logger.info(f"{options.title}: bank of {rows:,} rows, {self._bank.index.stats}")

    def add(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """Take a batch into the bank, where its dataloader is the bank's; else vote on it and update the metrics.

        Args:
            outputs: What the validation step returned.
            batch: What it was given; gets the predictions.
            batch_idx: Number of the batch in its dataloader, on this rank.
            dataloader_idx: Number of the dataloader.

        Returns:
            The predictions, (B, C) raw scores, or means like the labels; None for a batch of the bank's, without a
            bank, under search="epoch", or after an error that the ranks have yet to raise.
        """
        if dataloader_idx == self._options.bank_dataloader_idx:
            with self.defer_error():
                self._fill(outputs, batch, batch_idx)
            return None
        if not self._is_built:
            self._build()
        if self._bank is None:
            return None
        batch_queries: BatchQueries | None = None
        with self.defer_error():
            batch_queries = self._read(self._bank, outputs, batch, batch_idx, dataloader_idx)
            if self._options.search == "epoch":
                self._collected.keep(batch_queries, dataloader_idx, self._width)
        if self._options.search == "epoch":
            return None
        with self.defer_error():
            with self._clock.measure("search"):
                neighbors = self._search(self._bank, None if batch_queries is None else batch_queries.queries)
            if batch_queries is not None and neighbors is not None and self._error is None:
                with self._clock.measure("vote"):
                    predictions = self._score(self._bank, batch_queries, neighbors, dataloader_idx, self._width)
                if self._gallery is not None:
                    images = find_tensor(self._options.gallery.key, outputs, batch, self._options.title)
                    self._show(self._bank, batch_queries, neighbors, predictions, images)
                return predictions
        return None

    def _fill(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a batch of the bank's dataloader in."""
        options, number = self._options, self._options.bank_dataloader_idx or 0
        if self._is_built:
            raise ValueError(
                f"{options.title}: a batch of dataloader {number}, which fills the bank, came after one that is "
                "scored: go through the bank's dataloader first"
            )
        rows = find_rows(options, outputs, batch)
        own = unpadded_rows(self._plan.dataloaders[number], batch_idx, len(rows[options.feature_key]))
        if len(self.stored[options.feature_key].ring) + own > options.queue_length:
            self._memory.warn_once(
                "full",
                f"{options.title}: dataloader {number} has more than queue_length="
                f"{options.queue_length} rows for the bank on each rank: only the last are kept. Raise queue_length",
            )
        for key, values in rows.items():
            self.stored[key].ring.append(values[:own])

    def _read(self, bank: EpochBank, outputs: Any, batch: Any, batch_idx: int, number: int) -> BatchQueries:
        batch_queries = read_batch(self._options, outputs, batch, self._plan.dataloaders[number], batch_idx)
        self._check_width(batch_queries, bank)
        self._width = max(self._width, bank.bank.num_classes, batch_queries.selection.highest + 1)
        self._sample.draw(batch_queries.queries)
        if batch_queries.selection.skipped:
            self._skipped += batch_queries.selection.skipped
            warn_of_skipped(self._options, self._memory, batch_queries.selection.skipped, batch_queries.own, "query")
        return batch_queries

    def _check_width(self, batch_queries: BatchQueries, bank: EpochBank) -> None:
        options, queries, features = self._options, batch_queries.queries, bank.features
        if options.is_regression and options.width_of(batch_queries.labels) not in (0, bank.bank.num_classes):
            raise ValueError(
                f"{options.title}: '{options.label_key}' has {options.width_of(batch_queries.labels)} numbers a row in "
                f"validation, and {bank.bank.num_classes} in the bank: give the targets that training gives"
            )
        if len(features) and queries.shape[1] != features.shape[1]:
            raise ValueError(
                f"{options.title}: '{options.feature_key}' has {queries.shape[1]} values a row in validation, and "
                f"{features.shape[1]} in the bank: score the features that training queues, or begin with an empty "
                "queue if a checkpoint brought others"
            )

    def _search(self, bank: EpochBank, queries: Tensor | None) -> Any:
        """Find the neighbours of a batch; with shards, together with all ranks, whether it asks or not."""
        if self._options.shards:
            if self._error is not None:
                raise_together(self._error)  # here the other ranks meet for their search
            self._searches += 1
        elif queries is None or self._error is not None:
            return None
        return bank.bank.find(queries, max(self._options.ks))

    def serve_other_ranks(self) -> bool:
        """Search along once for the ranks that have more batches; tell whether there were any.

        What `add` does on those ranks with one batch, this does without.
        """
        if not self._is_built:
            self._build()
        if self._bank is None or self._searches >= self._most_searches:
            return False
        self._search(self._bank, None)
        return True

    def _search_collected(self, bank: EpochBank) -> None:
        """Search and score what was kept of the epoch; all ranks must call it together."""
        with all_or_none():
            groups = self._collected.groups()
            rounds = max(all_gather_object(len(groups))) if self._options.shards else len(groups)
            for group in groups + [[]] * (rounds - len(groups)):
                with self._clock.measure("search"):
                    neighbors = self._search(bank, queries_of(group))
                with self._clock.measure("vote"):
                    for batch, own in dealt_out(neighbors, group):
                        self._score(bank, batch.batch_queries, own, batch.number, batch.width)

    def _score(self, bank: EpochBank, batch_queries: BatchQueries, neighbors: Any, number: int, width: int) -> Tensor:
        """Update the dataloader's metrics, and hand out (B, C) raw scores, 0 for rows without a distance.

        Of numbers, means like the labels in shape, NaN for such rows.
        """
        options = self._options
        predictions, shares = batch_queries.queries, {}
        for k in sorted(options.ks):
            votes = bank.bank.votes(neighbors.first(k), temperature=options.temperature, weighting=options.weighting)
            shares[k] = _widened(votes.shares, width)
            blank = torch.nan if options.is_regression else 0.0
            predictions = votes.scores.new_full((len(batch_queries.labels), bank.bank.num_classes), blank)
            predictions[batch_queries.selection.searched] = votes.scores
        if options.is_regression:
            predictions = predictions.reshape(batch_queries.labels.shape)

        def count(rows: Tensor | slice) -> None:
            for k, of_classes in shares.items():
                self._table.update(
                    number, k, of_classes[batch_queries.among_searched(rows)], batch_queries.labels[rows]
                )

        if batch_queries.ids is None:
            count(batch_queries.selection.counted)
        else:
            self._unique[number].add(batch_queries.ids, lambda new: count(batch_queries.counted_of(new)))
        batch_queries.hand_out(predictions)
        return predictions

    def _show(
        self, bank: EpochBank, batch_queries: BatchQueries, neighbors: Any, predictions: Tensor, images: Tensor
    ) -> None:
        """Let the gallery look through a batch."""
        assert self._gallery is not None
        if batch_queries.labels.ndim > 1 or self._options.is_regression:
            self._memory.warn_once(
                "gallery", f"{self._options.title}: no gallery is shown of labels (B, C) nor of numbers"
            )
            return
        searched, labels = batch_queries.selection.searched, torch.full_like(batch_queries.labels, -1)
        labels[batch_queries.selection.counted] = batch_queries.labels[batch_queries.selection.counted]
        shares = _widened(predictions / predictions.sum(1, keepdim=True).clamp(min=1e-30), self._width)
        check_images(images, len(labels))
        self._gallery.look(
            images[searched], shares[searched], labels[searched], bank.bank.labels_of(neighbors), neighbors.distances
        )

    def finish(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute the metrics over all ranks, and free the bank; all ranks must call it together.

        Args:
            prefix: Of the keys: "{prefix}_{metric}".

        Returns:
            The numbers, float32 on the evaluation's device, and the values that are none, by key. Without a bank there
            is only the number of rows that were left out, if any were.
        """
        while self.serve_other_ranks():
            pass
        if self._bank is None:
            return self._counted(prefix), {}
        raise_together(self._error)
        if self._options.search == "epoch":
            self._search_collected(self._bank)
        with self._clock.measure("vote"):
            numbers, others = self._metrics(prefix)
        with self._clock.measure("search"):
            numbers |= self._search_metrics(prefix)
        numbers |= self._costs(prefix)
        if self._gallery is not None and (pictures := self._gallery.pictures()):
            others[f"{prefix}_gallery"] = pictures
        self._bank.index.release()
        self._memory.width = max(self._memory.width, self._width)
        return {key: value.to(self._device, torch.float32) for key, value in numbers.items()}, others

    def _metrics(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compute the metrics over all ranks, and say once which of them have no standard error."""
        options = self._options
        for samples in self._unique.values():
            samples.finish()
        without = [name for name, metric in options.metrics.items() if not self._table.has_standard_error(metric)]
        if options.standard_errors and without:
            self._memory.warn_once(
                "standard_errors",
                f"{options.title}: no standard error is logged for {', '.join(without)}: {WITH_ERRORS} have one, as "
                "means over queries",
            )
        return self._table.values(prefix, options.has_several_k, options.standard_errors)

    def _costs(self, prefix: str) -> dict[str, Tensor]:
        """Return the seconds that scoring took, if they are asked for, and say their share of the epoch if verbose."""
        options = self._options
        if not (options.seconds or options.verbose):
            return {}
        parts = self._clock.seconds()
        total, epoch = sum(parts.values()), self._clock.since_start()
        if options.verbose and rank_and_size()[0] == 0:
            each = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
            logger.info(
                f"{options.title}: {total:.3f} s ({each}) of a validation of {epoch:.3f} s, {100 * total / epoch:.0f} %"
            )
        named = {"seconds": total, **{f"{part}_seconds": seconds for part, seconds in parts.items()}}
        return (
            {f"{prefix}_{name}": torch.tensor(value, device="cpu") for name, value in named.items()}
            if options.seconds
            else {}
        )

    def _search_metrics(self, prefix: str) -> dict[str, Tensor]:
        """Return what approximation the index makes, and how many rows were left out, over all ranks."""
        values = {}
        recall = self._sample.recall()
        if recall is not None:
            values[f"{prefix}_index_recall"] = torch.tensor(recall, dtype=torch.float32, device="cpu")
            warn_of_recall(self._options, self._memory, recall)
        for name, value in Diagnostics(self._options, self._memory).values(self._rows).items():
            values[f"{prefix}_{name}"] = torch.tensor(value, dtype=torch.float32, device="cpu")
        return values | self._counted(prefix)

    def _counted(self, prefix: str) -> dict[str, Tensor]:
        """Return how many rows were left out, over all ranks, if any were."""
        skipped = sum(all_gather_object(self._skipped))
        return {f"{prefix}_skipped": torch.tensor(float(skipped), device=self._device)} if skipped else {}


def _widened(scores: Tensor, width: int) -> Tensor:
    """Add classes without a vote to scores (B, C), up to `width`."""
    return pad(scores, (0, width - scores.shape[1])) if width > scores.shape[1] else scores
