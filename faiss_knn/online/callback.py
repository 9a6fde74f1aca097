"""OnlineKNN: a k-NN vote over the queue at every validation, logged as torchmetrics."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from loguru import logger
from torch import Tensor

from faiss_knn.classify.bank import FeatureBank
from faiss_knn.classify.vote import check_vote_options, neighbor_weights, normalize_scores
from faiss_knn.online.lookup import find_tensor, was_skipped
from faiss_knn.online.metrics import MetricTable, class_count, named_metrics
from faiss_knn.online.queue import OnlineQueue, find_or_create_queue
from faiss_knn.online.rows import class_labels, flat_rows, labelled, searchable
from faiss_knn.online.state import trainer_state
from faiss_knn.search.distance import get_distance
from faiss_knn.search.index import KNNIndex, Neighbors


@dataclass
class _Run:
    """What one callback holds for one call of fit, validate or test."""

    input_queue: OnlineQueue
    target_queue: OnlineQueue
    index: KNNIndex
    bank: FeatureBank | None = None
    table: MetricTable | None = None
    skipped: int = 0
    warned: set[str] = field(default_factory=set)


class OnlineKNN(Callback):
    """Score a network's features by their nearest neighbours at every validation.

    During training two `OnlineQueue` collect the features and labels of the last `queue_length` samples (per rank).
    When a validation epoch starts, one index is built over them; each validation batch is classified by the vote of
    its k nearest rows; when the epoch ends, `eval/{name}_{metric}` is logged (`test/…` under `trainer.test`).
    The callback takes the place of stable-pretraining's of the same name; works with any LightningModule whose steps
    return a dict or whose batch is one, and leaves the module and its state_dict alone.

    Scores: `batch["{name}_preds"]` holds (B, C) raw sums of the neighbours' weights (in the outputs where the batch is
    no dict). The metrics receive them divided by the row's sum of weights: shares in [0, 1] per row, so that
    probability metrics do not depend on the batch size.

    Rows that are not finite (or zero, under cosine) and labels -1 are left out, counted as `eval/{name}_skipped`, and
    warned of once per run. As long as the queue is empty nothing is logged: a `ModelCheckpoint` that monitors a key
    then finds none, and raises or warns as its own options say.

    Args:
        name: Names the logged keys and the predictions.
        input: Key of the features in the step's outputs, or else in the batch.
        target: Key of the labels, found likewise: class ids, -1 where unlabelled, or (B, C) multi-hot.
        queue_length: Rows in the bank, per rank.
        metrics: A torchmetric, a list or dict of them, {"train": …, "val": …} of which "val" counts, or None.
        input_dim: Width of the features; a list or tuple stands for its product, to which features are flattened.
            The queue is float32 then, unless `bank_dtype` says otherwise; None: as the first batch.
        target_dim: Width of the labels; None: as the first batch.
        num_classes: Width of the scores. None: what the metrics were made for, else the bank's largest label + 1.
        k: Neighbours that vote. Several: one search, keys `eval/{name}_k{K}_{metric}`, predictions of the largest.
        temperature: T of the weights.
        chunk_size: Queries per search block; -1: chosen so that memory stays bounded.
        distance_metric: "euclidean", "squared_euclidean", "cosine" or "manhattan".
        verbose: Whether to report each bank, and the queues' fill.
        index: "flat", "ivf", "fast", "auto" or a FAISS factory string, see `KNNIndex`.
        nprobe: Lists that an IVF index visits.
        target_recall: What an approximate index is tuned to; `eval/{name}_index_recall` is what it reached.
        weighting: "inverse" 1/(d+T), "softmax" of -d/T, or "uniform".
        gather: "replicate": every rank holds the bank of all; "shard": every rank searches its own rows for all.
        bank_dtype: dtype of the queue and the index, torch.float16 or bfloat16 for half the memory.
        bank_device: Where the bank is kept and searched; None: the module's device.
        bank_dataloader_idx: Fill the bank from this validation dataloader instead of the queue.
        id: Key of the sample ids: the newest row of each id counts.
        every_n_epochs: Score only every so many epochs of a fit.

    Raises:
        ValueError: For each bad argument, naming it.
    """

    def __init__(
        self,
        name: str,
        input: str,  # noqa: A002
        target: str,
        queue_length: int,
        metrics: Any,
        input_dim: int | Sequence[int] | None = None,
        target_dim: int | None = None,
        num_classes: int | None = None,
        k: int | Sequence[int] = 5,
        temperature: float = 0.07,
        chunk_size: int = -1,
        distance_metric: str = "euclidean",
        verbose: bool | None = None,
        *,
        index: str = "flat",
        nprobe: int | None = None,
        target_recall: float | None = None,
        weighting: str = "inverse",
        gather: str = "replicate",
        bank_dtype: torch.dtype | None = None,
        bank_device: torch.device | str | None = None,
        bank_dataloader_idx: int | None = None,
        id: str | None = None,  # noqa: A002
        every_n_epochs: int = 1,
    ) -> None:
        self.ks = _checked_ks(k)
        check_vote_options(temperature, weighting)
        if chunk_size == 0 or chunk_size < -1:
            raise ValueError(f"chunk_size must be positive or -1, got {chunk_size}")
        input_dim = int(np.prod(input_dim)) if isinstance(input_dim, Sequence) else input_dim
        _check_positive(num_classes=num_classes, queue_length=queue_length, every_n_epochs=every_n_epochs)
        _check_positive(input_dim=input_dim, target_dim=target_dim)
        if gather not in ("replicate", "shard"):
            raise ValueError(f"`gather` must be 'replicate' or 'shard', got {gather!r}")
        get_distance(distance_metric)
        self.name = name
        self.input = input
        self.target = target
        self.queue_length = queue_length
        self.metrics = named_metrics(metrics)
        self.input_dim = input_dim
        self.target_dim = target_dim
        self.num_classes = num_classes
        self.k = k
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.distance_metric = distance_metric
        self.verbose = verbose
        self.index = index
        self.nprobe = nprobe
        self.target_recall = target_recall
        self.weighting = weighting
        self.gather = gather
        self.bank_dtype = bank_dtype
        self.bank_device = bank_device
        self.bank_dataloader_idx = bank_dataloader_idx
        self.id = id
        self.every_n_epochs = every_n_epochs
        self._warned_inferred_num_classes = False
        self._metrics_class_count = class_count(self.metrics)
        self._new_index()  # a bad index option is an error here, not at the first validation

    @property
    def state_key(self) -> str:
        """Name of this callback in checkpoints; its rows are in the queues' states."""
        return f"OnlineKNN[name={self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        twins = [c for c in trainer.callbacks if isinstance(c, OnlineKNN) and c.name == self.name]
        if len(twins) > 1:
            raise ValueError(f"{len(twins)} OnlineKNN callbacks are named '{self.name}': give each a name of its own")
        previous = trainer_state(trainer).get(self)
        dtype = self.bank_dtype or (torch.float32 if self.input_dim else None)
        target_dtype = torch.long if self.target_dim else None
        trainer_state(trainer)[self] = _Run(
            self._queue(trainer, self.input, self.input_dim, dtype),
            self._queue(trainer, self.target, self.target_dim, target_dtype),
            previous.index if previous else self._new_index(),
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if was_skipped(pl_module, outputs):
            return
        self._check_aligned(*(find_tensor(key, outputs, batch, self.name) for key in (self.input, self.target)))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        run = self._run(trainer)
        run.bank, run.skipped = None, 0
        if self._is_due(trainer):
            loaders = _loader_count(trainer)
            run.table = MetricTable(self.metrics, self.ks, loaders, pl_module.device)
            run.bank = self._build_bank(trainer, run)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        run = self._run(trainer)
        if run.bank is None:
            return
        place = _first_mapping(batch, outputs)
        if place is not None and f"{self.name}_preds" in place:
            raise ValueError(f"Key '{self.name}_preds' already exists in batch")
        queries = flat_rows(find_tensor(self.input, outputs, batch, self.name))
        labels = class_labels(find_tensor(self.target, outputs, batch, self.name), f"'{self.target}'")
        scores = self._score(trainer, run, queries, labels, dataloader_idx)
        if place is not None:
            place[f"{self.name}_preds"] = scores

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        run = self._run(trainer)
        if run.bank is None or run.table is None:
            return
        stage = "test" if trainer.state.stage == RunningStage.TESTING else "eval"
        values = run.table.values(f"{stage}/{self.name}", several_k=not isinstance(self.k, int))
        stats = run.index.stats
        if not stats.exact and stats.recall is not None:
            values[f"{stage}/{self.name}_index_recall"] = torch.tensor(stats.recall)
        if run.skipped:
            values[f"{stage}/{self.name}_skipped"] = torch.tensor(float(run.skipped))
        for key, value in values.items():
            pl_module.log(key, value.to(pl_module.device, torch.float32), add_dataloader_idx=False)
        run.bank = run.table = None

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _queue(self, trainer: Any, key: str, dim: int | None, dtype: torch.dtype | None) -> OnlineQueue:
        queue = find_or_create_queue(trainer, key, self.queue_length, dim, dtype, gather_distributed=True)
        if queue.verbose is None:
            queue.verbose = self.verbose
        return queue

    def _run(self, trainer: Any) -> _Run:
        run: _Run = trainer_state(trainer)[self]
        return run

    def _new_index(self) -> KNNIndex:
        return KNNIndex(
            self.index,
            distance_metric=self.distance_metric,
            device=self.bank_device,
            nprobe=self.nprobe,
            target_recall=self.target_recall,
            storage_dtype=self.bank_dtype,
            chunk_size=self.chunk_size,
        )

    def _check_aligned(self, features: Tensor, labels: Tensor) -> None:
        if len(features) != len(labels):
            raise ValueError(
                f"OnlineKNN[{self.name}]: one step must give as many features as labels, got "
                f"'{self.input}' of shape {tuple(features.shape)} and '{self.target}' of shape {tuple(labels.shape)}: "
                "repeat the labels once per view, or keep one view's features"
            )

    def _is_due(self, trainer: Any) -> bool:
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not fitting or trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _warn_once(self, trainer: Any, run: _Run, what: str, message: str) -> None:
        if what not in run.warned and trainer.is_global_zero:
            logger.warning(message)
        run.warned.add(what)

    def _build_bank(self, trainer: Any, run: _Run) -> FeatureBank | None:
        features = flat_rows(run.input_queue.snapshot(trainer))
        labels = class_labels(run.target_queue.snapshot(trainer), f"'{self.target}'")
        self._check_aligned(features, labels)
        kept = self._searchable(features) & labelled(labels)
        if self._count_skipped(trainer, run, kept, "bank"):
            features, labels = features[kept], labels[kept]
        if len(features) == 0:
            if not trainer.sanity_checking:
                self._warn_once(trainer, run, "empty", f"! {self.name}: queue data is empty, skipping KNN computation")
            return None
        classes = self._class_count(trainer, labels)
        bank = FeatureBank(features, labels, num_classes=classes, index=run.index)
        if self.verbose and trainer.is_global_zero:
            logger.info(f"OnlineKNN[{self.name}]: bank of {len(bank):,} rows, {run.index.stats}")
        return bank

    def _searchable(self, rows: Tensor) -> Tensor:
        return searchable(rows, directions=self.distance_metric == "cosine")

    def _count_skipped(self, trainer: Any, run: _Run, kept: Tensor, where: str) -> int:
        """Count the rows that are not kept, warn of them once per run, and return how many they are."""
        skipped = len(kept) - int(kept.sum())
        run.skipped += skipped
        if skipped:
            self._warn_once(
                trainer,
                run,
                "skipped",
                f"OnlineKNN[{self.name}]: left out {skipped} of {len(kept)} {where} rows: '{self.input}' not finite "
                f"(or zero, under cosine) or '{self.target}' -1. All are counted in {self.name}_skipped; "
                "this is said once per run",
            )
        return skipped

    def _class_count(self, trainer: Any, labels: Tensor) -> int:
        seen = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        classes = self.num_classes or self._metrics_class_count
        if classes is None:
            if not self._warned_inferred_num_classes and trainer.is_global_zero:
                logger.warning(
                    f"OnlineKNN[{self.name}]: inferring num_classes={seen} from the labels in the bank. "
                    "Give num_classes to keep the width of the scores the same in every run."
                )
            self._warned_inferred_num_classes = True
            return seen
        self._check_label(seen - 1, classes)
        return classes

    def _check_label(self, highest: int, num_classes: int) -> None:
        if highest >= num_classes:
            raise ValueError(
                f"OnlineKNN[{self.name}]: configured num_classes={num_classes} but observed label {highest} >= "
                f"num_classes. Increase num_classes to at least {highest + 1}."
            )

    def _score(self, trainer: Any, run: _Run, queries: Tensor, labels: Tensor, loader: int) -> Tensor:
        """Update the loader's metrics and return (B, C) raw scores of the largest k, 0 for rows without a distance."""
        assert run.bank is not None
        assert run.table is not None
        self._check_aligned(queries, labels)
        classes = run.bank.num_classes
        if len(labels):
            self._check_label(int(labels.max()) if labels.ndim == 1 else labels.shape[1] - 1, classes)
        searched = self._searchable(queries)
        counted = searched & labelled(labels)
        self._count_skipped(trainer, run, counted, "query")
        found = run.bank.neighbors(queries if searched.all() else queries[searched], max(self.ks))
        predictions = queries.new_zeros(len(queries), classes, dtype=torch.float32)
        for k in sorted(self.ks):
            nearest = Neighbors(found.distances[:, :k], found.indices[:, :k])
            scores = run.bank.score(nearest, temperature=self.temperature, weighting=self.weighting)
            weights = neighbor_weights(nearest.distances, temperature=self.temperature, weighting=self.weighting)
            run.table.update(loader, k, normalize_scores(scores, weights)[counted[searched]], labels[counted])
            predictions[searched] = scores
        return predictions


def _checked_ks(k: int | Sequence[int]) -> tuple[int, ...]:
    ks = tuple(k) if isinstance(k, Sequence) else (k,)
    if not ks or len(set(ks)) < len(ks):
        raise ValueError(f"k must be one number or several different ones, got {k}")
    for one in ks:
        if not isinstance(one, int) or one <= 0:
            raise ValueError(f"k must be positive, got {one}")
    return ks


def _check_positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count <= 0:
            raise ValueError(f"{name} must be positive, got {count}")


def _first_mapping(*places: Any) -> MutableMapping[str, Any] | None:
    return next((place for place in places if isinstance(place, MutableMapping)), None)


def _loader_count(trainer: Any) -> int:
    if trainer.sanity_checking:
        return len(trainer.num_sanity_val_batches)
    return len(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
